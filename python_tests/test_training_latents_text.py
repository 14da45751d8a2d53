"""`flexdit latents` of captioned images and of clips."""

import numpy as np
import pytest
import safetensors.torch
import torch
from family_cases import family_config
from PIL import Image
from test_training_families_data import write_clips

from flexdit_ext.__main__ import main
from flexdit_ext.training import FINISHED, train
from flexdit_ext.training._folders import ClipFolder
from flexdit_ext.training._latents import Shards

diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "red": 4, "cat": 5, "sleeps": 6}
TEXTS = {"one": "A red cat\n", "more/two": "a CAT", "three": "a red red red cat sleeps"}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A folder with a tiny autoencoder that halves the sides, a tiny T5, and a tokenizer of seven words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    root = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(root / "vae")
    config = transformers.T5Config(vocab_size=7, d_model=6, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(root / "text_encoder")
    words = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(root / "tokenizer")
    return root


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images" / "more").mkdir(parents=True)
    for shade, (name, text) in enumerate(TEXTS.items()):
        Image.fromarray(np.full((16, 16, 3), 60 * shade, np.uint8)).save(tmp_path / "images" / f"{name}.png")
        (tmp_path / "images" / f"{name}.txt").write_text(text)
    return tmp_path / "images"


def run(pipeline, source, target, *options):
    arguments = [source, target, "--vae", pipeline, "--size", 16, "--batch-size", 2, "--mean", *options]
    return main(["latents", *map(str, arguments)])


def test_captions_are_what_the_text_encoder_says(pipeline, images, tmp_path):
    assert run(pipeline, images, tmp_path / "out", "--shard-size", 2, "--flip", "--text-encoder", pipeline) == 0
    data = Shards(tmp_path / "out", ("caption", "caption_mask"))
    assert len(data.paths) == 3 and len(data) == 6 and data.shape == (4, 8, 8)
    latents, found = data.__getitems__(range(6))
    model = transformers.T5EncoderModel.from_pretrained(pipeline / "text_encoder").eval()
    texts = [[3, 5, 1], [3, 4, 5, 1], [3, 4, 4, 4, 5, 6, 1]]  # more/two, one, three
    for i, tokens in enumerate(texts * 2):
        with torch.no_grad():
            wanted = model(torch.tensor([tokens])).last_hidden_state[0]
        assert found["caption_mask"][i].tolist() == [True] * len(tokens) + [False] * (7 - len(tokens))
        torch.testing.assert_close(found["caption"][i, : len(tokens)], wanted, rtol=0, atol=1e-5)
        assert not found["caption"][i, len(tokens) :].any()
    with torch.no_grad():
        empty = model(torch.tensor([[1]])).last_hidden_state[0]
        vae = diffusers.AutoencoderKL.from_pretrained(pipeline / "vae").eval()
        picture = torch.full((1, 3, 16, 16), -1.0)  # "one", the first shade
        torch.testing.assert_close(latents[1], 0.18215 * vae.encode(picture).latent_dist.mean[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(data.captions.null, empty, rtol=0, atol=1e-6)
    with pytest.warns(UserWarning, match=r"three\.png has 7 tokens, the model reads 4, left out is: red cat sleeps$"):
        assert run(pipeline, images, tmp_path / "cut", "--max-tokens", 4, "--text-encoder", pipeline) == 0
    assert Shards(tmp_path / "cut", ("caption", "caption_mask")).captions.tokens.tolist() == [3, 4, 4]


def test_training_takes_captions(pipeline, images, tmp_path):
    assert run(pipeline, images, tmp_path / "out", "--dtype", "float16", "--text-encoder", pipeline) == 0
    config = family_config(tmp_path / "run", "flexpixart", tmp_path / "out", steps=1, model={"max_caption_tokens": 7})
    assert train(config) == FINISHED


def test_other_texts_are_not_mixed(pipeline, images, tmp_path, capsys):
    assert run(pipeline, images, tmp_path / "out", "--text-encoder", pipeline) == 0
    (images / "one.txt").write_text("a cat")
    assert run(pipeline, images, tmp_path / "out", "--text-encoder", pipeline) == 2
    assert "was made otherwise (texts " in capsys.readouterr().err
    (images / "one.txt").unlink()
    assert run(pipeline, images, tmp_path / "new", "--text-encoder", pipeline) == 2
    assert f"{images}/one.png has no text: {images}/one.txt does not exist" in capsys.readouterr().err
    (images / "one.txt").write_bytes(b"\xff\xfe")
    assert run(pipeline, images, tmp_path / "new", "--text-encoder", pipeline) == 2
    assert "one.txt is not a readable text in UTF-8" in capsys.readouterr().err
    (images / "one.txt").write_text("a cat")
    assert run(pipeline, images, tmp_path / "new", "--text-encoder", images) == 2
    assert f"--text-encoder: {images} cannot be loaded" in capsys.readouterr().err
    assert run(pipeline, images, tmp_path / "new", "--text-encoder", "nowhere") == 2
    assert "--text-encoder: nowhere cannot be loaded" in capsys.readouterr().err


def test_clips(pipeline, tmp_path):
    """A folder per class, or texts beside them."""
    source = write_clips(tmp_path / "clips")
    assert run(pipeline, source, tmp_path / "out", "--frames", 2, "--frame-step", 3) == 0
    data = Shards(tmp_path / "out", ("y",), ("clips",), dims=5)
    latents, found = data.__getitems__(range(3))
    assert latents.shape == (3, 4, 2, 8, 8) and found["y"].tolist() == [0, 0, 1]
    frames = ClipFolder(source, 3, 2, 16, step=3).__getitems__([2])[0][0].transpose(0, 1)
    vae = diffusers.AutoencoderKL.from_pretrained(pipeline / "vae").eval()
    with torch.no_grad():
        wanted = 0.18215 * vae.encode(frames).latent_dist.mean.transpose(0, 1)
    torch.testing.assert_close(latents[2], wanted, rtol=0, atol=1e-5)
    for name in ("a/run", "a/walk", "b/more/jump"):
        (source / f"{name}.txt").write_text("a cat")
    assert run(pipeline, source, tmp_path / "text", "--frames", 3, "--text-encoder", pipeline) == 0
    (path,) = (tmp_path / "text").iterdir()
    tensors = safetensors.torch.load_file(path)
    assert tensors.keys() == {"clips", "caption", "caption_mask", "null_caption"}
    assert tensors["clips"].shape == (3, 4, 3, 8, 8) and tensors["caption"].shape == (3, 3, 6)
    model = {"in_channels": 4, "out_channels": 4, "num_classes": 0, "class_dropout_prob": 0.0, "caption_channels": 6}
    assert train(family_config(tmp_path / "run", "flexlatte", tmp_path / "text", steps=1, model=model)) == FINISHED
