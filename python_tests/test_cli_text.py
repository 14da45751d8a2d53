"""`flexdit sample` of FlexPixArt and FlexLatte: what it writes, and what it refuses. FlexDiT: test_cli.py."""

import json
import os
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import relative_error
from PIL import Image
from test_cli import as_pixels, pixels_of, refused, words
from test_single_model import make

from flexdit_ext import FlexLatte, FlexLatteConfig, FlexPixArt, FlexPixArtConfig, Sampler, sample_conditional
from flexdit_ext.__main__ import main

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from text_models import PROMPTS, autoencoder, save_text_encoder, text_encoder, tokenizer

SIZES = {"input_size": 8, "hidden_size": 48, "num_heads": 2, "num_pooling_blocks": 1, "num_sdtm": 1,
         "sdtm_blocks": (1, 1, 1, 1), "num_dense_blocks": 1}  # fmt: skip
TEXT = {"caption_channels": 10, "max_caption_tokens": 9}
CLASSES = {"num_classes": 3, "class_dropout_prob": 0.1}
CONFIGS = {
    "pixart": FlexPixArtConfig(**SIZES, **TEXT),
    "sizes": FlexPixArtConfig(**SIZES, **TEXT, size_conditions=True),
    "text clips": FlexLatteConfig(**SIZES, **TEXT, num_frames=4),
    "class clips": FlexLatteConfig(**SIZES, **CLASSES, num_frames=4),
    "pixel clips": FlexLatteConfig(**SIZES, num_classes=3, num_frames=4, in_channels=3, out_channels=3),
    "gray clips": FlexLatteConfig(**SIZES, num_classes=3, num_frames=4, in_channels=1, out_channels=2),
    "both": FlexLatteConfig(**SIZES, **TEXT, **CLASSES, num_frames=2, in_channels=3, out_channels=3),
    "neither": FlexLatteConfig(**SIZES, num_frames=2),
}


BOUND = 1e-5  # float32, latents of captions that were encoded with and without padding; worst measured 5e-7


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints, the parts of a pipeline, and a file of captions."""
    folder = tmp_path_factory.mktemp("folders")
    for name, config in CONFIGS.items():
        make(config, torch.float32)[0].save_pretrained(folder / name)
    save_text_encoder(folder / "t5")
    tokenizer().save_pretrained(folder / "pipeline" / "tokenizer")
    text_encoder().save_pretrained(folder / "pipeline" / "text_encoder")
    autoencoder(2).save_pretrained(folder / "pipeline" / "vae")
    write_captions(folder / "captions.safetensors")
    return folder


def captions(**change):
    torch.manual_seed(3)
    tensors = {
        "caption": torch.randn(3, 5, 10),
        "caption_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0]]),
        "null_caption": torch.randn(7, 10),
        "null_caption_mask": torch.tensor([1, 1, 1, 1, 1, 1, 0]),
    }
    return {name: value for name, value in (tensors | change).items() if value is not None}


def write_captions(path, **change):
    safetensors.torch.save_file(captions(**change), path)
    return path


def load(folders, name):
    return (FlexLatte if "num_frames" in vars(CONFIGS[name]) else FlexPixArt).from_pretrained(folders / name)


def draw(folders, name, out, **options):
    line = {"checkpoint": folders / name, "out": out, "steps": 2, "quiet": True} | options
    assert main(["sample", *words(line)]) == 0
    return {path.name: path for path in sorted(out.iterdir())}


def states_of(texts):
    """Of each text apart, without padding."""
    with torch.no_grad():
        ids = [tokenizer()(text.lower().strip(), return_tensors="pt").input_ids[:, :9] for text in texts]
        return [text_encoder()(input_ids=one).last_hidden_state for one in ids]


def by_hand(model, text, null, **options):
    """A sample of one prompt, its tokens alone."""
    conditions, without = {"caption": text}, {"caption": null}
    length = max(text.shape[1], null.shape[1])
    both = [torch.cat([one, one.new_zeros(1, length - one.shape[1], 10)], 1) for one in (text, null)]
    masks = [torch.arange(length)[None] < one.shape[1] for one in (text, null)]
    conditions, without = ({"caption": c, "caption_mask": m} for c, m in zip(both, masks, strict=True))
    return sample_conditional(model, conditions, 2, unconditional=without, **options)


# ---- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["t5", "pipeline"])
def test_prompts(source, folders, tmp_path):
    options = {"prompt": PROMPTS, "cfg_scale": 3.0, "seed": 5, "latents": "safetensors"}
    line = []
    for prompt in PROMPTS:
        line += ["--prompt", prompt]
    options = {"text_encoder": folders / source, "vae": folders / "pipeline", "negative_prompt": "A dog"} | options
    del options["prompt"]
    arguments = words({"checkpoint": folders / "pixart", "out": tmp_path / "out", "steps": 2} | options)
    assert main(["sample", *arguments, *line, "--quiet"]) == 0
    files = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert sorted(files) == ["00000.png", "00001.png", "grid.png", "latents.safetensors"]
    *texts, null = states_of([*PROMPTS, "a dog"])
    model = load(folders, "pixart")
    expected = [by_hand(model, text, null, cfg_scale=3.0, seed=5, start_index=i) for i, text in enumerate(texts)]
    latents = safetensors.torch.load_file(files["latents.safetensors"])["latents"]
    assert relative_error(latents, torch.cat(expected)) < BOUND
    with torch.no_grad():
        images = as_pixels(autoencoder(2).decode(latents / autoencoder().config.scaling_factor).sample)
    drawn = [pixels_of(files[name]).astype(int) for name in ("00000.png", "00001.png")]
    assert images.shape[1:] == (16, 16, 3) and np.abs(np.stack(drawn) - images).max() <= 1 and images.std() > 2
    with Image.open(files["00001.png"]) as image:
        settings = json.loads(image.text["flexdit"])
    assert settings["prompt"] == PROMPTS[1] and settings["negative_prompt"] == "A dog" and settings["index"] == 1


def test_prompts_of_clips_are_lattes(folders, tmp_path):
    """LattePipeline's encoding of one prompt: its tokens, and as many of the empty text's."""
    import diffusers

    (tmp_path / "prompts.txt").write_text(f"{PROMPTS[0]}\n\n{PROMPTS[1]}\n")
    options = {"prompts": tmp_path / "prompts.txt", "text_encoder": folders / "t5", "cfg_scale": 4, "batch_size": 1}
    files = draw(folders, "text clips", tmp_path / "out", **options)
    latents = safetensors.torch.load_file(files["latents.safetensors"])["latents"]
    pipeline = diffusers.LattePipeline(tokenizer(), text_encoder(), autoencoder(), None, diffusers.DDIMScheduler())
    model = load(folders, "text clips")
    for i, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            text, null = pipeline.encode_prompt(prompt, device="cpu")
        assert text.shape == null.shape
        expected = by_hand(model, text, null, cfg_scale=4.0, start_index=i)
        assert relative_error(latents[i : i + 1], expected) < BOUND


def test_captions_of_a_file(folders, tmp_path):
    options = {
        "captions": folders / "captions.safetensors",
        "cfg_scale": 2,
        "images_per_prompt": 2,
        "dtype": "bfloat16",
    }
    files = draw(folders, "pixart", tmp_path / "out", size="8x4", grid="2x1", **options)
    tensors = safetensors.torch.load_file(files["latents.safetensors"])
    given = captions()
    model = load(folders, "pixart").bfloat16()
    null = given["null_caption"][None, :6]
    index = torch.arange(3).repeat_interleave(2)
    caption = torch.cat([given["caption"], torch.zeros(3, 1, 10)], 1)[index]
    mask = torch.cat([given["caption_mask"], torch.zeros(3, 1)], 1).bool()[index]
    expected = Sampler(model).sample(
        caption=caption,
        caption_mask=mask,
        steps=2,
        cfg_scale=2.0,
        null_caption=null,
        size=(8, 4),
        grid=(2, 1),
    )
    assert list(tensors) == ["latents"] and torch.equal(tensors["latents"], expected)


def test_sizes_are_given(folders, tmp_path):
    """In pixels, eight of a latent's unless the autoencoder says otherwise."""
    options = {"captions": folders / "captions.safetensors", "size": "8x4", "latents": "safetensors"}
    model, given = load(folders, "sizes"), captions()
    conditions = {"caption": given["caption"], "caption_mask": given["caption_mask"].bool()}
    for factor, more in ((8, {}), (2, {"vae": folders / "pipeline"})):
        files = draw(folders, "sizes", tmp_path / str(factor), **options, **more)
        sizes = {"resolution": torch.tensor([[8.0 * factor, 4.0 * factor]] * 3), "aspect_ratio": torch.full((3,), 2.0)}
        expected = sample_conditional(model, conditions | sizes, 2, size=(8, 4))
        latents = safetensors.torch.load_file(files["latents.safetensors"])["latents"]
        assert relative_error(latents, expected) < BOUND


def frames_of(path):
    """[F, H, W, c] and how long each is shown, in milliseconds."""
    with Image.open(path) as image:
        frames, times = [], []
        for i in range(image.n_frames):
            image.seek(i)
            frames.append(np.asarray(image.convert("RGB")).astype(int))
            times.append(image.info["duration"])
        return np.stack(frames), times, image.info.get("comment"), dict(image.getexif())


@pytest.mark.parametrize("form", ["gif", "webp"])
def test_clips_of_labels(form, folders, tmp_path):
    options = {"labels": "2,0", "frames": 3, "fps": 8, "seed": 1, "images_per_label": 2, "format": form}
    files = draw(folders, "pixel clips", tmp_path / "out", **options, size="16", steps=3)
    assert list(files) == [*(f"0000{i}_{label}.{form}" for i, label in enumerate((2, 2, 0, 0))), "grid.png"]
    y = torch.tensor([2, 2, 0, 0])
    latents = sample_conditional(load(folders, "pixel clips"), {"y": y}, 3, seed=1, frames=3, size=(16, 16))
    expected = as_pixels(latents.transpose(1, 2).flatten(0, 1)).reshape(4, 3, 16, 16, 3).astype(int)
    for i, name in enumerate(list(files)[:4]):
        frames, times, comment, exif = frames_of(files[name])
        assert times == ([120, 130, 130] if form == "gif" else [125, 125, 125])
        error = np.abs(frames - expected[i])
        assert error.mean() < 3 if form == "gif" else not error.any()
        settings = json.loads(comment if form == "gif" else exif[0x010E])
        assert settings["label"] == (2, 2, 0, 0)[i] and settings["fps"] == 8 and settings["frames"] == 3
    grid = pixels_of(files["grid.png"])
    assert grid.shape == (34, 34, 3) and np.array_equal(grid[:16, 18:], expected[1, 0])


def test_mp4(folders, tmp_path):
    imageio = pytest.importorskip("imageio.v2")
    pytest.importorskip("imageio_ffmpeg")
    for name in ("pixel clips", "gray clips"):
        files = draw(folders, name, tmp_path / name, labels="1", format="mp4", fps=5, size="16x32", steps=3)
        assert list(files) == ["00000_1.mp4", "grid.png"]
        clip = sample_conditional(load(folders, name), {"y": torch.tensor([1])}, 3, size=(16, 32))
        expected = as_pixels(clip[0].transpose(0, 1)).astype(int)
        with imageio.get_reader(files["00000_1.mp4"]) as reader:
            frames = np.stack([frame for frame in reader]).astype(int)
            assert reader.get_meta_data()["fps"] == 5
        assert frames.shape == (4, 16, 32, 3)
        brightness = [one.mean(-1).reshape(4, 4, 4, 8, 4).mean((2, 4)) for one in (frames, expected)]
        assert np.corrcoef(brightness[0].ravel(), brightness[1].ravel())[0, 1] > 0.95  # colours are halved in size


def test_clips_through_an_autoencoder(folders, tmp_path):
    files = draw(
        folders, "class clips", tmp_path / "out", labels="1", cfg_scale=2, vae=folders / "pipeline", grid="2x3x3"
    )
    assert list(files) == ["00000_1.gif", "grid.png"]
    latents = sample_conditional(
        load(folders, "class clips"),
        {"y": torch.tensor([1])},
        2,
        cfg_scale=2.0,
        unconditional={"y": torch.tensor([3])},
        grid=(2, 3, 3),
    )
    vae = autoencoder(2)
    with torch.no_grad():
        first = vae.decode(latents[:, :, 0] / vae.config.scaling_factor).sample
    assert np.abs(pixels_of(files["grid.png"]).astype(int) - as_pixels(first)[0]).max() <= 1
    assert frames_of(files["00000_1.gif"])[0].shape == (4, 16, 16, 3)


def test_labels_and_captions(folders, tmp_path):
    """A model of both takes one label for each caption; guidance leads away from both."""
    options = {"labels": "2,0,1", "captions": folders / "captions.safetensors", "cfg_scale": 3, "latents": "npy"}
    files = draw(folders, "both", tmp_path / "out", **options)
    assert list(files)[:3] == ["00000_2.gif", "00001_0.gif", "00002_1.gif"]
    text = captions()
    pad = torch.nn.functional.pad
    expected = sample_conditional(
        load(folders, "both"),
        {"y": torch.tensor([2, 0, 1]), "caption": pad(text["caption"], (0, 0, 0, 1)),
         "caption_mask": pad(text["caption_mask"].bool(), (0, 1))},
        2,
        cfg_scale=3.0,
        unconditional={"y": torch.tensor([3]), "caption": text["null_caption"][None, :6],
                       "caption_mask": torch.ones(1, 6, dtype=torch.bool)},
    )  # fmt: skip
    assert relative_error(torch.from_numpy(np.load(files["latents.npy"])), expected) < BOUND
    with Image.open(files["00001_0.gif"]) as image:
        settings = json.loads(image.info["comment"])
    assert settings["label"] == 0 and settings["caption"] == 1


def test_long_prompts_are_cut(folders, tmp_path, capsys):
    line = {"checkpoint": folders / "pixart", "text_encoder": folders / "t5", "steps": 1, "out": tmp_path / "a"}
    line |= {"negative_prompt": "red " * 10, "cfg_scale": 2}
    assert main(["sample", *words(line), "--prompt", "the red cat", "--prompt", "the " * 8 + "blue dog"]) == 0
    assert [line for line in capsys.readouterr().err.splitlines() if "warning" in line] == [
        "flexdit sample: warning: prompt 1 has 11 tokens, the model reads 9, left out is: blue dog",
        "flexdit sample: warning: the negative prompt has 11 tokens, the model reads 9, left out is: red red",
    ]
    cut = draw(folders, "pixart", tmp_path / "b", text_encoder=folders / "t5", prompt="the " * 8, steps=1, seed=3)
    long = draw(folders, "pixart", tmp_path / "c", text_encoder=folders / "t5", prompt="the " * 10, steps=1, seed=3)
    a, b = (safetensors.torch.load_file(files["latents.safetensors"])["latents"] for files in (cut, long))
    assert torch.equal(a, b) and capsys.readouterr() == ("", "")


# ---- what is refused ------------------------------------------------------------------------------------------------

FILE = {"captions": "captions.safetensors"}
PROMPT = {"prompt": "a cat", "text_encoder": "t5"}
REFUSED = [
    ("pixart", {}, "one of these is required: --labels, --prompt, --prompts, --captions"),
    ("pixart", {"labels": "1"}, "--labels is for models with classes, the FlexPixArt in "),
    ("class clips", PROMPT, "--prompt, --prompts and --captions are for models of text" ),
    ("class clips", FILE, "--prompt, --prompts and --captions are for models of text"),
    ("both", FILE, "both has classes, required: --labels"),
    ("both", {"labels": "1"}, "both reads captions, one of these is required: --prompt, --prompts, --captions"),
    ("both", FILE | {"labels": "1,2"}, "--labels are 2, the captions 3: one label for each is required"),
    ("neither", {"labels": "1"}, "has neither classes nor captions"),
    ("class clips", {"labels": "4"}, "--labels: 4, must be from 0 to 3"),
    ("pixel clips", {"labels": "1", "cfg_scale": 2}, "--cfg-scale is 2.0, must be 1: the model has no null class"),
    ("pixart", {"prompt": "a cat"}, "--prompt needs --text-encoder"),
    ("pixart", FILE | {"text_encoder": "t5"}, "--text-encoder is for --prompt and --prompts"),
    ("pixart", FILE | {"negative_prompt": "dog"}, "--negative-prompt is for --prompt and --prompts"),
    ("pixart", PROMPT | {"negative_prompt": "dog"}, "--negative-prompt does nothing with --cfg-scale 1"),
    ("pixart", FILE | PROMPT, "argument --prompt: not allowed with argument --captions"),
    ("pixart", FILE | {"frames": 2}, "--frames is for clips, "),
    ("pixart", FILE | {"fps": 2}, "--fps is for clips, "),
    ("pixart", FILE | {"format": "gif"}, "--format is for clips, "),
    ("pixart", FILE | {"grid": "2x2x2"}, "--grid is 2x2x2, must be HEIGHTxWIDTH for images"),
    ("pixart", FILE | {"size": "8x7"}, "size is (8, 7), must be (height, width): multiples of the patch size 2"),
    ("class clips", {"labels": "1", "size": "9"}, "size is (9, 9), must be (height, width): multiples"),
    ("class clips", {"labels": "1", "frames": 5}, "--frames is 5, must be from 1 to the model's 4"),
    ("class clips", {"labels": "1", "frames": 0}, "argument --frames: '0', must be an integer from 1"),
    ("class clips", {"labels": "1", "grid": "2x2"}, "--grid is 2x2, must be FRAMESxHEIGHTxWIDTH for clips"),
    ("class clips", {"labels": "1", "grid": "5x2x2"}, "grid has the sparse grid (5, 2, 2), at most the dense grid"),
    ("class clips", {"labels": "1", "format": "avi"}, "argument --format: invalid choice: 'avi'"),
    ("class clips", {"labels": "1", "fps": 60}, "--fps is 60, a GIF has at most 50 frames a second"),
    ("class clips", {"labels": "1", "dtype": "float16", "device": "cpu"}, "dtype is torch.float16, must be one of"),
    ("pixart", FILE | {"vae": "t5"}, "--vae: "),
    ("pixart", PROMPT | {"text_encoder": "none"}, "none is not a folder"),
    ("pixart", PROMPT | {"text_encoder": "pixart"}, "is a folder of something else, must be a t5"),
    ("pixart", {"captions": "none"}, "none: No such file"),
    ("pixart", {"captions": "t5/tokenizer.json"}, "tokenizer.json is not a safetensors file"),
    ("pixart", {"prompts": "none", "text_encoder": "t5"}, "none: No such file"),
]  # fmt: skip


@pytest.mark.parametrize("name, options, message", REFUSED, ids=lambda value: str(value)[:40])
def test_refuses(name, options, message, folders, tmp_path, capsys):
    paths = ("captions", "text_encoder", "vae", "prompts")
    options = {key: folders / value if key in paths else value for key, value in options.items()}
    line = {"checkpoint": folders / name, "out": tmp_path / "made" / "out", "steps": 1} | options
    assert message in refused(capsys, "sample", *words(line))
    assert list(tmp_path.iterdir()) == []


ZEROS = torch.zeros(3, 5, 10)
DAMAGED = [
    ({"caption": None}, "there is no tensor caption [N, L, 10]"),
    ({"caption": torch.zeros(3, 5, 8)}, "caption has shape (3, 5, 8), must be [N, L, 10] with L from 1 to 9"),
    ({"caption": torch.zeros(3, 10)}, "caption has shape (3, 10), must be [N, L, 10]"),
    ({"caption": torch.zeros(0, 5, 10)}, "caption has shape (0, 5, 10)"),
    ({"caption": torch.zeros(3, 12, 10)}, "caption has shape (3, 12, 10)"),
    ({"caption": ZEROS.int()}, "caption is torch.int32, must be floating point"),
    ({"caption_mask": torch.ones(3, 4)}, "caption_mask has shape (3, 4), must be (3, 5) as caption"),
    ({"caption_mask": torch.full((3, 5), 2)}, "caption_mask has values other than 0 and 1"),
    ({"caption_mask": torch.eye(3, 5).flip(0) * (torch.arange(3) != 1)[:, None]}, "caption_mask[1] has no token"),
    ({"null_caption": torch.zeros(2, 5, 10)}, "null_caption has shape (2, 5, 10), must be [N or 1, L, 10]"),
    ({"null_caption": torch.zeros(5, 8), "null_caption_mask": None}, "null_caption has shape (1, 5, 8)"),
    ({"null_caption_mask": torch.ones(4)}, "null_caption_mask has shape (1, 4), must be (1, 7) as null_caption"),
    ({"null_caption": None}, "null_caption_mask is given without null_caption"),
    ({"null_caption": None, "null_caption_mask": None}, "guidance needs a tensor null_caption in "),
    ({"captions": ZEROS}, "unknown tensors ['captions'], allowed are "),
]  # fmt: skip


@pytest.mark.parametrize("change, message", DAMAGED, ids=lambda value: str(value)[:30])
def test_refuses_captions(change, message, folders, tmp_path, capsys):
    file = write_captions(tmp_path / "c.safetensors", **change)
    line = {"checkpoint": folders / "pixart", "out": tmp_path / "out", "steps": 1, "captions": file, "cfg_scale": 2}
    assert message in refused(capsys, "sample", *words(line))
    assert not (tmp_path / "out").exists()


def test_refuses_text_for_flexdit(saved, folders, tmp_path, capsys):
    line = {"checkpoint": saved[1], "out": tmp_path / "out", "labels": "0", "steps": 1}
    for change, message in (
        ({"prompt": "a cat"}, "--prompt is for models of text, "),
        ({"captions": folders / "captions.safetensors"}, "--captions is for models of text, "),
        ({"text_encoder": folders}, "--text-encoder is for models of text, "),
        ({"frames": 3}, "--frames is for models of clips, "),
        ({"format": "mp4"}, "--format is for models of clips, "),
        ({"grid": "2x2x2"}, "grid has the sparse grid (2, 2, 2), at most the dense grid (4, 4) is allowed"),
    ):
        assert message in refused(capsys, "sample", *words(line | change))
    assert not (tmp_path / "out").exists()


def test_refuses_other_text_encoders(folders, tmp_path, capsys):
    line = {"checkpoint": folders / "pixart", "out": tmp_path / "out", "prompt": "a cat", "steps": 1}

    def message(folder):
        capsys.readouterr()  # what transformers said when it was saved
        return refused(capsys, "sample", *words(line | {"text_encoder": folder}))

    save_text_encoder(tmp_path / "wide", width=12)
    assert "gives captions of 12 channels, the model has 10: they must agree" in message(tmp_path / "wide")
    folder = save_text_encoder(tmp_path / "t5")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    del tensors["encoder.final_layer_norm.weight"]
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "weights that do not fit its configuration: {'missing_keys': ['encoder.final_" in message(folder)
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    assert "t5 cannot be loaded: " in message(folder)
    (folder / "config.json").write_text("{")
    assert "config.json is not JSON" in message(folder)
    (folder / "config.json").unlink()
    assert "config.json cannot be read" in message(folder)
    text_encoder().save_pretrained(tmp_path / "pipeline" / "text_encoder")
    assert "tokenizer is not a folder" in message(tmp_path / "pipeline")
    assert not (tmp_path / "out").exists()


def test_prompts_files(folders, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    line = {"checkpoint": folders / "pixart", "out": tmp_path / "out", "prompts": file, "text_encoder": folders / "t5"}
    file.write_text("\n \n")
    assert "prompts.txt has no prompts, must have one a line" in refused(capsys, "sample", *words(line))
    file.write_bytes(b"\xff\xfe")
    assert "prompts.txt is not UTF-8" in refused(capsys, "sample", *words(line))


@pytest.mark.parametrize("module, package, options", [
    ("transformers", "transformers", PROMPT),
    ("imageio_ffmpeg", "imageio-ffmpeg", {"labels": "1", "format": "mp4"}),
    ("imageio", "imageio", {"labels": "1", "format": "mp4"}),
])  # fmt: skip
def test_says_what_to_install(module, package, options, folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    options = {key: folders / value if key == "text_encoder" else value for key, value in options.items()}
    name = "pixart" if "prompt" in options else "pixel clips"
    line = {"checkpoint": folders / name, "out": tmp_path / "out", "steps": 1} | options
    assert f"pip install {package}, or flexdit_ext[cli]" in refused(capsys, "sample", *words(line))
    assert not (tmp_path / "out").exists()


def test_odd_sides_are_not_for_mp4(folders, tmp_path, capsys):
    config = FlexLatteConfig(7, 1, 3, 3, 48, 2, num_classes=3, num_frames=2, num_sdtm=1)
    make(config, torch.float32)[0].save_pretrained(tmp_path / "odd")
    line = {"checkpoint": tmp_path / "odd", "out": tmp_path / "out", "labels": "1", "steps": 1, "format": "mp4"}
    message = refused(capsys, "sample", *words(line), "--quiet")
    assert "--format mp4 needs even sides, the frames have 7x7: --format gif or webp" in message
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(folders, tmp_path, capsys, monkeypatch):
    """Before anything is drawn where that shows at once; a failure in the middle leaves what was there."""
    line = {"checkpoint": folders / "pixel clips", "labels": "1,2", "steps": 1}
    (tmp_path / "file").write_text("mine")
    message = refused(capsys, "sample", *words(line | {"out": tmp_path / "file" / "out"}), "--quiet")
    assert "cannot write to the folder" in message
    before = {
        name: path.read_bytes() for name, path in draw(folders, "pixel clips", tmp_path / "out", labels="0").items()
    }
    fsync = os.fsync
    for form in ("gif", "mp4"):

        def full(descriptor):
            if "00001" in os.readlink(f"/proc/self/fd/{descriptor}"):
                raise OSError(28, "No space left on device")
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        message = refused(capsys, "sample", *words(line | {"out": tmp_path / "out", "format": form}), "--quiet")
        monkeypatch.undo()
        assert f"cannot write 00001_2.{form} to {tmp_path / 'out'}: No space left on device" in message
        assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_values_that_are_not_finite(folders, tmp_path, capsys):
    model = load(folders, "pixel clips")
    with torch.no_grad():
        model.final_layer.linear.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    line = {"checkpoint": tmp_path / "broken", "labels": "1", "steps": 1, "out": tmp_path / "out", "start_index": 7}
    assert "clip 7 is not finite" in refused(capsys, "sample", *words(line), "--quiet")
    assert not (tmp_path / "out").exists()


# ---- info -----------------------------------------------------------------------------------------------------------


def test_info_of_checkpoints(saved, folders, capsys):
    def info(path):
        assert main(["info", "--json", "--checkpoint", str(path)]) == 0
        return json.loads(capsys.readouterr().out)

    model = load(folders, "both")
    told = info(folders / "both")
    assert told["model"] == f"FlexLatte, {sum(one.numel() for one in model.parameters())} parameters"
    assert told["latents"] == "3x2x8x8" and told["blocks"] == "1 pooling, 1 x [1, 1, 1, 1] sparse and dense, 1 dense"
    assert told["conditions"] == "3 classes, captions of at most 9 tokens of 10 channels"
    share = model.macs() / model.macs((2, 4, 4))
    assert (
        told["sparse grids"] == f"2x2, 2x2, 2x2, 2x2 from data to noise, {share:.0%} of the work on all tokens"
        and share < 0.8
    )
    assert info(folders / "sizes")["conditions"] == "captions of at most 9 tokens of 10 channels, height and width"
    told = info(saved[1])
    assert told["model"].startswith("FlexDiT, ") and told["conditions"] == "3 classes" and told["latents"] == "1x8x8"
    assert refused(capsys, "info", "--checkpoint", folders / "none").endswith("none does not exist")
