"""Captions and clips on disk, and every mistake in them named before the first step."""

import numpy as np
import pytest
import torch
from family_cases import captions, clips, family_config, save, save_random
from PIL import Image
from training_cases import log_of

from flexdit_ext.training import FINISHED, load_config, set_up, train
from flexdit_ext.training._folders import ClipFolder
from flexdit_ext.training._latents import Shards

FIELDS = ("caption", "caption_mask")


def test_shards_of_captions(tmp_path):
    """Of two lengths, one without a mask, with what stands for no caption, and the conditions of size."""
    arrays, null = captions(), np.arange(12, dtype=np.float32).reshape(2, 6)
    more = {"images": np.ones((2, 4, 8, 8)), "caption": np.full((2, 3, 6), 2.0), "null_caption": null}
    for name, part in (("a.npz", arrays), ("b.safetensors", more)):
        count = len(part["caption"])
        part |= {"resolution": np.full((count, 2), 64), "aspect_ratio": np.full(count, 0.5)}
        save(tmp_path, part, name)
    data = Shards(tmp_path, (*FIELDS, "resolution", "aspect_ratio"), ("latents", "images"))
    assert len(data) == 12 and data.shape == (4, 8, 8) and data.num_classes == 0
    samples, found = data.__getitems__([11, 2])
    assert torch.equal(samples[0], torch.ones(4, 8, 8)) and np.array_equal(samples[1], arrays["latents"][2])
    assert found["caption_mask"].tolist() == [[True, True, True, False], [True, True, True, False]]
    assert np.array_equal(found["caption"][1], arrays["caption"][2])
    assert found["caption"][0].tolist() == [[2.0] * 6] * 3 + [[0.0] * 6] and found["caption"].dtype == torch.float32
    assert found["resolution"].tolist() == [[64, 64]] * 2 and found["aspect_ratio"].tolist() == [0.5, 0.5]
    assert data.captions.tokens.tolist() == [1 + i % 4 for i in range(10)] + [3, 3]
    without = data.captions.without()
    assert np.array_equal(without["caption"][0, :2], null) and not without["caption"][0, 2:].any()
    assert without["caption_mask"].tolist() == [[True, True, False, False]]
    assert all(isinstance(array, np.memmap) for shard in data._maps.values() for array in shard.values())


@pytest.mark.parametrize(
    ("family", "arrays", "changes", "message"),
    [
        ("flexpixart", captions(length=6), {}, r"captions \(or a null_caption\) of 6 tokens, model.max_caption_tokens"),
        ("flexpixart", captions(null_caption=np.zeros((9, 6))), {}, "of 9 tokens, model.max_caption_tokens is only 5"),
        ("flexpixart", captions(caption=np.zeros((10, 4, 7))), {}, "of 7 channels, model.caption_channels is 6"),
        ("flexpixart", captions(caption=None), {}, "has no array 'caption'; it has"),
        ("flexpixart", captions(latents=None), {}, "has no array 'latents'; it has"),
        ("flexpixart", captions(caption=np.zeros((9, 4, 6))), {}, r"\(9, 4, 6\), must be floating-point \[10, L, D\]"),
        ("flexpixart", captions(caption=np.zeros((10, 4, 6), int)), {}, r"int64 .*must be floating-point \[10, L, D\]"),
        ("flexpixart", captions(caption_mask=np.ones((10, 3))), {}, r"must be booleans or integers \[10, 4\]"),
        ("flexpixart", captions(caption_mask=np.ones((10, 5), bool)), {}, r"caption_mask are bool \(10, 5\), must be"),
        ("flexpixart", captions(caption_mask=np.tri(10, 4, -3, bool)), {}, r"caption_mask\[0\] has no token"),
        ("flexpixart", captions(null_caption=np.zeros((1, 5))), {}, r"null_caption is float64 \(1, 5\), must be"),
        ("flexpixart", captions(), {"model": {"size_conditions": True, "hidden_size": 24}}, "no array 'resolution'"),
        ("flexpixart", captions(), {"model": {"input_size": 16}}, r"\(4, 8, 8\), the model takes \(4, 16, 16\)"),
        ("flexpixart", captions(), {"data": {"kind": "latents"}}, "is 'latents', a flexpixart trains on 'captions'"),
        ("flexpixart", captions(), {"model": {"out_channels": 3}}, "model.out_channels is 3, must be in_channels 4"),
        ("flexpixart", captions(), {"density": {"mode": "fixed", "grid": [1, 2, 2]}}, r"\(1, 2, 2\), must be \(h, w\)"),
        ("flexlatte", clips(frames=4), {}, r"\(1, 4, 8, 8\), the model takes \(1, 3, 8, 8\) \(.*model.num_frames"),
        ("flexlatte", clips(clips=np.zeros((10, 1, 3, 8, 6))), {}, r"shape \(1, 3, 8, 6\), the model takes"),
        ("flexlatte", clips(clips=np.zeros((10, 1, 8, 8))), {}, r"must be floating-point \[n, C, F, H, W\]"),
        ("flexlatte", clips(labels=np.arange(10)), {}, "has 10 classes, model.num_classes is only 4"),
        ("flexlatte", clips(labels=np.arange(10) - 1), {}, "go down to -1, must be at least 0"),
        ("flexlatte", clips(labels=None), {}, "has no array 'labels'"),
        ("flexlatte", clips(), {"density": {"mode": "fixed", "grid": [4, 2, 2]}}, r"sparse grid \(4, 2, 2\), at most"),
        ("flexlatte", clips(), {"density": {"mode": "fixed", "grid": [2, 2]}}, r"\(2, 2\), must be \(f, h, w\)"),
        ("flexlatte", clips(), {"density": {"mode": "fixed", "grid": [2]}}, r"density.grid is \(2,\), must be a grid"),
        ("flexlatte", clips(), {"model": {"class_dropout_prob": 0.0}, "label_dropout": 0.1}, "has no null class"),
        ("flexlatte", clips(), {"model": {"num_classes": 0}}, "model.num_classes and model.caption_channels are 0"),
        ("flexlatte", clips(), {"model": {"caption_channels": 6}}, "has no array 'caption'"),
        ("flexlatte", clips(), {"data": {"frame_step": 2}}, "frame_step is 2, but .* has shards, which are"),
    ],
)  # fmt: skip
def test_what_does_not_fit(tmp_path, family, arrays, changes, message):
    save(tmp_path / "data", arrays, "a.npz")
    with pytest.raises((ValueError, TypeError), match=message):
        set_up(family_config(tmp_path / "run", family, tmp_path / "data", **changes), 1)


def test_shards_that_differ(tmp_path):
    save(tmp_path, captions(null_caption=np.zeros((1, 6))))
    save(tmp_path, captions(null_caption=np.ones((1, 6))), "b.npz")
    with pytest.raises(ValueError, match=r"b\.npz has another null_caption than the shards before it"):
        Shards(tmp_path, FIELDS)
    save(tmp_path, captions(caption=np.zeros((10, 4, 8))), "b.npz")
    with pytest.raises(ValueError, match=r"b\.npz has captions of 8 channels, a\.safetensors of 6"):
        Shards(tmp_path, FIELDS)


def frame(number, size=(20, 16)):
    """A grey picture [h, w], its shade the number."""
    return Image.fromarray(np.full(size[::-1], 10 * number, np.uint8))


def write_clips(root):
    """Class a: a folder of 12 frames, a GIF of 5; class b: a WebP of 7 in a folder of its own."""
    (root / "a" / "run").mkdir(parents=True)
    (root / "b" / "more").mkdir(parents=True)
    for number in range(12):
        frame(number).save(root / "a" / "run" / f"{number}.png")  # by their numbers: 10 after 9
    for path, count, options in (("a/walk.gif", 5, {}), ("b/more/jump.webp", 7, {"lossless": True})):
        first, *rest = [frame(number).convert("RGB") for number in range(count)]
        first.save(root / path, save_all=True, append_images=rest, **options)
    return root


def shades(data, index):
    clip = data.__getitems__([index])[0][0]
    assert clip.shape == data.shape and clip.dtype == torch.float32
    flat = (clip + 1) * 127.5 / 10
    assert (flat - flat[:1, :, :1, :1]).abs().max() < 0.2
    return flat[0, :, 0, 0].round().int().tolist()


def test_folders_of_clips(tmp_path):
    data = ClipFolder(write_clips(tmp_path), 1, 4, 8)
    assert data.classes == ["a", "b"] and data.labels.tolist() == [0, 0, 1] and data.shape == (1, 4, 8, 8)
    assert data.name(1).endswith("a/walk.gif") and data.__getitems__([2, 0])[1]["y"].tolist() == [1, 0]
    assert [shades(data, i) for i in range(3)] == [[4, 5, 6, 7], [0, 1, 2, 3], [1, 2, 3, 4]]
    assert [shades(ClipFolder(tmp_path, 3, 3, 8, step=2), i) for i in range(3)] == [[3, 5, 7], [0, 2, 4], [1, 3, 5]]
    with pytest.raises(ValueError, match=r"walk\.gif has 5 frames, must have at least 7: 4 .*every 2"):
        ClipFolder(tmp_path, 1, 4, 8, step=2).__getitems__([1])
    with pytest.raises(ValueError, match=r"a/run has 12 frames, must have at least 13"):
        ClipFolder(tmp_path, 1, 13, 8)
    (tmp_path / "b" / "more" / "jump.webp").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"jump\.webp is not a readable image"):
        ClipFolder(tmp_path, 1, 4, 8)
    frame(0).save(tmp_path / "b" / "0.png")
    with pytest.raises(ValueError, match=r"b has pictures, must have a folder of them for each clip"):
        ClipFolder(tmp_path, 1, 4, 8)


def test_training_takes_a_folder_of_clips(tmp_path):
    changes = {"model": {"num_classes": 2}, "data": {"flip": True, "frame_step": 2, "workers": 1}, "batch_size": 3}
    config = family_config(tmp_path / "run", "flexlatte", write_clips(tmp_path / "clips"), steps=2, **changes)
    assert train(config) == FINISHED
    assert 0 < log_of(config)[-1]["loss"] < 10


def test_folders_are_for_labels(tmp_path):
    model = {"num_frames": 4, "num_classes": 2, "caption_channels": 6}
    config = family_config(tmp_path / "run", "flexlatte", write_clips(tmp_path / "clips"), model=model)
    with pytest.raises(ValueError, match="a folder per class gives labels alone, the model takes y, caption"):
        set_up(config, 1)


def test_clips_with_captions_and_labels(tmp_path):
    """Both are dropped together."""
    arrays = clips() | {name: captions()[name] for name in FIELDS}
    model = {"caption_channels": 6, "max_caption_tokens": 4}
    setup = set_up(family_config(tmp_path / "run", "flexlatte", save(tmp_path / "data", arrays), model=model), 1)
    assert setup.data.__getitems__([1])[1].keys() == setup.null.keys() == {"y", *FIELDS}
    assert setup.null["y"].tolist() == [4] and setup.draws.label_dropout == 0.2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ('family = "flexlate"', "model.family is 'flexlate', must be one of .*; did you mean 'flexlatte'"),
        ("num_frames = 4", "model.num_frames is a field of flexlatte, but model.family is 'flexdit'"),
        ('family = "flexpixart"\nnum_classes = 4', "num_classes is a field of flexdit and flexlatte, but"),
        ('family = "flexlatte"\nnum_frame = 4', "model.num_frame is not a key; the nearest is model.num_frames"),
        ('family = "flexlatte"\npreset = "XL/2"', "model: preset is 'XL/2', but only a flexdit has presets"),
        ('checkpoint = "{latte}"\nfamily = "flexpixart"', "is 'flexpixart', the checkpoint .* a flexlatte"),
        ('checkpoint = "{latte}"\nlearn_sigma = true', "model.learn_sigma is a field of flexdit, but .*'flexlatte'"),
    ],
)  # fmt: skip
def test_families_and_their_fields(tmp_path, model, message):
    model = model.replace("{latte}", str(tmp_path / "latte"))
    save_random(tmp_path / "latte", "flexlatte")
    text = 'output = "run"\nsteps = 1\nbatch_size = 2\n[data]\nkind = "clips"\npath = "clips"\n[model]\n'
    (tmp_path / "run.toml").write_text(text + model)
    with pytest.raises(ValueError, match=message):
        set_up(load_config(tmp_path / "run.toml"), 1)
