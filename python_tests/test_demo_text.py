"""examples/captions: the quick run writes readable files, captions say what was measured, prompts are checked."""

from __future__ import annotations

import importlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

imread = pytest.importorskip("matplotlib.image").imread
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TIMEOUT = 240  # seconds; a quick run takes about 8 on two idle cores


@pytest.fixture
def module(monkeypatch):
    """Imports one of the demo's modules by name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return lambda name: importlib.import_module(f"captions.{name}")


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(EXAMPLES / "captions" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "text"
    done = run("run.py", "--quick", "--threads", "2", "--seed", "3", "--steps", "4", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "Targets: not judged" in done.stdout
    return out


def test_every_file_is_written_and_readable(quick_run):
    pictures = {"samples.png", "samples_dense.png", "losses.png"}
    assert {path.name for path in quick_run.iterdir()} == pictures | {"dense", "flexpixart", "report.md", "report.json"}
    assert all(imread(quick_run / name).ndim == 3 for name in pictures)
    files = {"config.json", "model.safetensors", "text_encoder.json", "text_encoder.safetensors"}
    for name in ("dense", "flexpixart"):
        assert {path.name for path in (quick_run / name).iterdir()} == files


def test_report_has_every_measurement(quick_run):
    report = json.loads((quick_run / "report.json").read_text(encoding="utf-8"))
    assert report["seed"] == 3 and report["targets"] == {} and report["text_encoder"] == "words"
    assert report["macs"]["flexpixart"] < report["macs"]["dense"]
    assert set(report["macs"]["flexpixart_by_grid"]) == {"5x5", "4x4", "3x3"}
    judged = {"digit", "thickness", "tilt", "width", "properties", "everything"}
    assert set(report["fitting"]) == {"dense", "flexpixart", "held_out", "shuffled", "shuffled_within_digit"}
    assert all(set(shares) == judged for shares in report["fitting"].values())
    assert all(report["fitting"]["held_out"][name] == 1 for name in ("thickness", "tilt", "width", "properties"))
    assert report["counts"] == {"samples": 40, "sets": 2, "held_out": 500, "train": 1297}
    assert 0 < report["stated"]["thickness"] < report["stated"]["properties"] <= 80
    assert all(rate > 0 for rate in report["images_per_second"].values())
    text = (quick_run / "report.md").read_text(encoding="utf-8")
    assert "images/s" in text and "Fréchet" in text and "shuffled" in text


def test_trained_folder_draws_for_a_prompt(module, quick_run, tmp_path, monkeypatch, capsys):
    draw, model, picture = module("draw"), str(quick_run / "flexpixart"), tmp_path / "drawn.png"

    def status(caption: str) -> int:
        arguments = ["draw.py", caption, "--model", model, "--steps", "2", "--count", "3", "--out", str(picture)]
        monkeypatch.setattr(sys, "argv", arguments)
        return draw.main()

    assert status("a blue three") == 2 and not picture.exists()
    errors = capsys.readouterr().err
    assert "unknown word 'blue'" in errors and "bold" in errors
    assert status("a three, thick") == 0 and imread(picture).ndim == 3


def test_saved_model_draws_the_same(module, quick_run):
    loaded = module("models").CaptionedPixArt.from_pretrained(quick_run / "flexpixart")
    captions = ["a thin seven", "a three, thick, tilted left"]
    images = loaded.sample(captions, 2, 2.0, seed=5)
    assert images.shape == (2, 1, 8, 8)
    assert not torch.equal(images[0], loaded.sample([captions[1]], 2, 2.0, seed=5)[0])  # the text is read
    torch.testing.assert_close(images[1:], loaded.sample(captions[1:], 2, 2.0, seed=5, start_index=1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"kind": "letters"}, "kind is 'letters'"),
        ({"channels": 32}, "do not belong together"),
        ({"words": ["one", "two"]}, "do not belong together"),
        ({"colour": 1}, "do not belong together"),
    ],
)
def test_damaged_text_encoder_is_refused(module, quick_run, tmp_path, damage, message):
    folder = quick_run / "flexpixart"
    config = json.loads((folder / "text_encoder.json").read_text(encoding="utf-8")) | damage
    (tmp_path / "text_encoder.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "text_encoder.safetensors").symlink_to(folder / "text_encoder.safetensors")
    with pytest.raises(ValueError, match=message):
        module("encoders").load_encoder(tmp_path)


def strokes(**points) -> torch.Tensor:
    """One image [1, 1, 8, 8] of ink 1 at these rows -> columns."""
    image = torch.full((1, 1, 8, 8), -1.0)
    for row, columns in points.items():
        image[0, 0, int(row.removeprefix("row")), columns] = 1.0
    return image


def test_properties_of_drawn_strokes(module):
    measure = module("properties").measure
    upright = strokes(**{f"row{row}": [3] for row in range(2, 6)})
    leaning = strokes(row2=[5], row3=[4], row4=[3], row5=[2])  # "/"
    bar = strokes(row3=[2, 3, 4, 5])
    measured = measure(torch.cat([upright, leaning, leaning.flip(3), bar, torch.full((1, 1, 8, 8), -1.0)]))
    torch.testing.assert_close(measured["thickness"], torch.tensor([4, 4, 4, 4, 0.0], dtype=torch.float64))
    torch.testing.assert_close(measured["tilt"], torch.tensor([0, 1, -1, 0, 0.0], dtype=torch.float64))
    spread = 1.25**0.5  # of 0, 1, 2, 3
    expected = torch.tensor([0, spread, spread, spread, 0], dtype=torch.float64)
    torch.testing.assert_close(measured["width"], expected)
    torch.testing.assert_close(measure(2 * bar)["thickness"], measured["thickness"][3:4])  # clamped


def test_levels_are_thirds_and_bounds_belong_below(module):
    properties = module("properties")
    images = torch.full((30, 1, 8, 8), -1.0)
    for index in range(30):
        images[index, 0].view(-1)[: index + 1] = 1.0
    levels = properties.Thresholds.of(images).levels(images)["thickness"]
    assert levels == ["thin"] * 10 + ["medium"] * 10 + ["thick"] * 10
    limits = {"thickness": (4.0, 8.0), "tilt": (-0.1, 0.1), "width": (0.5, 1.0)}
    at_limit = properties.Thresholds(limits).levels(strokes(row3=[2, 3, 4, 5]))
    assert at_limit == {"thickness": ["thin"], "tilt": ["upright"], "width": ["wide"]}


def test_parse_reads_what_was_rendered(module):
    wording, generator, seen = module("wording"), random.Random(1), set()
    for _ in range(2000):
        asked = wording.Description(
            generator.choice([None, *range(10)]),
            generator.choice([None, "thin", "thick"]),
            generator.choice([None, "left", "upright", "right"]),
            generator.choice([None, "narrow", "wide"]),
        )
        caption = wording.render(asked, generator)
        assert wording.parse(caption) == asked, caption
        seen |= set(wording.split_words(caption))
    assert seen == set(wording.known_words())
    assert wording.parse("") == wording.Description()


def test_bad_captions_are_named(module):
    wording, encoders = module("wording"), module("encoders")
    with pytest.raises(ValueError, match=r"unknown word 'blue'; known are 0, 1, .*zero"):
        wording.parse("a blue three")
    with pytest.raises(ValueError, match="contradicts itself in the tilt: upright and left"):
        wording.parse("a straight three, tilted left")
    encoder = encoders.WordEncoder.for_captions(["a thin one", "two"], channels=8, heads=2, max_tokens=4)
    assert encoder.words == ["a", "one", "thin", "two"]
    with pytest.raises(ValueError, match="unknown word 'three'; known are a, one, thin, two"):
        encoder(["two", "a three"])
    with pytest.raises(ValueError, match="has 4 words, at most 3 fit"):
        encoder(["a thin thin one"])


def test_word_encoder_masks_padding_and_learns(module):
    encoder = module("encoders").WordEncoder.for_captions(["a thin one", "two"], channels=8, heads=2)
    output, mask = encoder(["a thin one", "two", ""])
    assert output.shape == (3, 4, 8) and mask.tolist() == [[True] * 4, [True, True, False, False], [True] + [False] * 3]
    alone, _ = encoder(["two"])
    torch.testing.assert_close(output[1, :2], alone[0])  # padding is not read
    assert not torch.allclose(encoder(["one two"])[0][0, 2], encoder(["two one"])[0][0, 2])  # the order is
    output[mask].square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_shares_count_stated_properties_only(module):
    matching, Description = module("matching"), module("wording").Description
    asked = [Description(3, "thin"), Description(None, None, "left"), Description(5), Description()]
    seen = [Description(3, "thick", "left", "wide"), Description(1, "thin", "left", "wide")] + [Description(5)] * 2
    shares = matching.shares(seen, asked)
    assert (shares["digit"], shares["thickness"], shares["tilt"]) == (1, 0, 1)
    assert (shares["properties"], shares["everything"]) == (1 / 2, 2 / 3)
    assert shares["width"] != shares["width"]  # nobody asked: no number
    assert matching.counts(asked) == {
        "digit": 2, "thickness": 1, "tilt": 1, "width": 0, "properties": 2, "everything": 3,
    }  # fmt: skip
    assert matching.difference(seen, [Description()] * 4, asked, "everything") == (
        2 / 3,
        pytest.approx((2 / 27) ** 0.5),
    )
    # Groups of one keep their captions; in one group of two, half the shuffles swap them.
    assert matching.shuffled_shares(seen[:2], asked[:2], [0, 1], 0)["tilt"] == 1
    swapped = [Description(0, "thin", "left", "wide"), Description(1, "thick", "left", "wide")]
    found = matching.shuffled_shares(swapped, [Description(0), Description(1)], [4, 4], 0)["digit"]
    assert 0 < found < 1


def test_a_missed_target_is_told(module, quick_run):
    report = module("report")
    results = json.loads((quick_run / "report.json").read_text(encoding="utf-8"))
    results["fitting"]["dense"] |= {"digit": 0.95, "properties": 0.9}
    results["fitting"]["flexpixart"] |= {"digit": 0.95, "properties": 0.84}
    results["targets"] = report.judge(results)
    assert [met for name, met in results["targets"].items() if "points below" in name] == [False]
    assert sum(results["targets"].values()) == len(results["targets"]) - 1
    assert "MISSED: FlexPixArt: all stated properties at most 5 points below dense" in report.to_markdown(results)


@pytest.fixture(scope="module")
def tiny_t5(tmp_path_factory) -> Path:
    """A random T5 encoder with a tokenizer of a few pieces, made offline."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("t5")
    words = ["▁a", "▁thin", "▁three", "▁seven", "▁"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -1.0) for word in words)]
    pieces += [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz,"]
    transformers.T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=len(pieces), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(folder)
    return folder


def test_t5_encodes_as_transformers_does_and_once(module, tiny_t5):
    from transformers import AutoTokenizer, T5EncoderModel

    encoder = module("encoders").T5Encoder(tiny_t5)
    captions = ["a thin three", "a seven", ""]
    output, mask = encoder(captions)
    assert encoder.channels == 16 and mask.sum(1).tolist() == [4, 3, 1]  # the end of the text is a token
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_t5), T5EncoderModel.from_pretrained(tiny_t5)
    for row, kept, caption in zip(output, mask, captions):
        with torch.no_grad():
            alone = model(**tokenizer(caption, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(row[kept], alone, rtol=1e-4, atol=1e-5)
    encoder._encoder = None  # a second time nothing is computed
    torch.testing.assert_close(encoder(captions[:1])[0], output[:1, :4])
    with pytest.raises(ValueError, match="has 177 tokens, the model reads 48"):
        module("encoders").T5Encoder(tiny_t5)(["three," * 30])


def test_model_with_t5_is_saved_without_its_weights(module, tiny_t5, tmp_path):
    models, encoders = module("models"), module("encoders")
    t5 = encoders.T5Encoder(tiny_t5)
    made = models.make_models(lambda: t5)
    model = made.to_sparse(made.new_dense())
    assert model.encoder is t5 and not any(name.startswith("encoder") for name, _ in model.named_parameters())
    torch.nn.init.normal_(model.painter.final_layer.linear.weight)  # nothing comes out of a new one
    model(torch.randn(2, 1, 8, 8), torch.tensor([30, 900]), ["a seven", ""]).square().mean().backward()
    assert model.painter.patch_embed.weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "text_encoder.safetensors").exists()
    loaded = models.CaptionedPixArt.from_pretrained(tmp_path / "model")
    asked = (["a thin three"], 2, 2.0, 1)
    torch.testing.assert_close(loaded.sample(*asked), model.sample(*asked))


def test_t5_folder_is_checked_on_the_command_line(tmp_path):
    done = run("run.py", "--quick", "--text-encoder", str(tmp_path), "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and "is not a folder with a config.json" in done.stderr
