"""What Sampler and Session refuse of FlexPixArt and FlexLatte, by name; nothing is computed here."""

import copy
import json

import numpy as np
import pytest
import torch
from single_sampling import CONFIGS, conditions_of, model_of, null_caption_of, sampler_of

from flexdit_ext import FlexDiT, FlexDiTConfig, Sampler


def without(values: dict, *names: str) -> dict:
    return {name: value for name, value in values.items() if name not in names}


# Of three samples' conditions what changes; a None leaves the name out.
PIXART = [
    ({"y": [1, 2, 3]}, ValueError, "y is given, the model has no y"),
    ({"caption": None, "caption_mask": None}, TypeError, "caption is None, the model needs caption"),
    ({"caption": None}, TypeError, "caption is None"),
    ({"caption": [[1.0]]}, TypeError, "caption is list, must be an array of floats"),
    ({"caption": torch.zeros(3, 6, 10, dtype=torch.int64)}, TypeError, "caption is torch.int64, must be"),
    ({"caption": torch.zeros(3, 6, 9)}, ValueError, r"caption has shape \(3, 6, 9\), must be \[any, any, 10\]"),
    ({"caption": torch.zeros(6, 10)}, ValueError, r"caption has shape \(6, 10\), must be"),
    ({"caption": torch.zeros(3, 8, 10)}, ValueError, "caption has 8 tokens, must have 1 to max_caption_tokens = 7"),
    ({"caption": torch.zeros(3, 0, 10)}, ValueError, "caption has 0 tokens"),
    ({"caption": torch.full((3, 6, 10), torch.inf), "caption_mask": None}, ValueError,
     r"caption\[0\] holds values that are not finite"),
    ({"caption": torch.zeros(2, 6, 10), "caption_mask": None}, ValueError,
     r"caption, resolution, aspect_ratio have \[2, 3, 3\] samples, must have the same number"),
    ({"caption": torch.zeros(0, 6, 10), "caption_mask": None}, ValueError, r"caption, resolution, aspect_ratio have"),
    ({"caption_mask": torch.ones(3, 5, dtype=torch.bool)}, ValueError,
     r"caption_mask has shape \(3, 5\), must be \(3, 6\) as caption"),
    ({"caption_mask": torch.ones(6, dtype=torch.bool)}, ValueError, r"caption_mask has shape \(6,\)"),
    ({"caption_mask": torch.ones(3, 6)}, TypeError, "caption_mask is torch.float32, must be an array of bool"),
    ({"caption_mask": [True]}, TypeError, "caption_mask is list"),
    ({"caption_mask": torch.arange(6) < torch.tensor([[2], [0], [1]])}, ValueError,
     r"caption_mask\[1\] has no token, every caption must have one \(the empty text has one\)"),
    ({"null_caption": torch.zeros(2, 4, 10)}, ValueError,
     r"null_caption has 2 captions, must have 1 or one per sample \(3\)"),
    ({"null_caption": torch.zeros(1, 8, 10)}, ValueError, "null_caption has 8 tokens"),
    ({"null_caption": torch.zeros(1, 4, 10), "null_caption_mask": torch.ones(1, 3, dtype=torch.bool)}, ValueError,
     r"null_caption_mask has shape \(1, 3\), must be \(1, 4\) as null_caption"),
    ({"null_caption_mask": torch.ones(1, 4, dtype=torch.bool)}, ValueError,
     "null_caption_mask is given without null_caption"),
    ({"resolution": None}, TypeError, "resolution is None, the model needs resolution"),
    ({"resolution": torch.ones(3)}, ValueError, r"resolution has shape \(3,\), must be \[any, 2\]"),
    ({"resolution": "large"}, TypeError, "resolution is str, must be an array of numbers"),
    ({"resolution": torch.tensor([[8, 8], [8, 0], [8, 8]])}, ValueError,
     "resolution is .*must hold finite numbers above 0"),
    ({"aspect_ratio": torch.ones(3, 1)}, ValueError, r"aspect_ratio has shape \(3, 1\), must be \[any\]"),
    ({"aspect_ratio": [1.0, torch.nan, 1.0]}, ValueError, r"aspect_ratio is \[1\.0, nan, 1\.0\]"),
    ({"frames": 2}, ValueError, "frames is 2, must be None: the model makes images"),
    ({"cfg_scale": 2.0}, ValueError, r"cfg_scale = 2\.0: guidance needs null_caption, the caption of the empty text"),
    ({"cfg_scale": [1.0, 2.0]}, ValueError, "cfg_scale: must be a float or one per sample"),
    ({"guidance_channels": 5}, ValueError, "guidance_channels = 5"),
    ({"size": (7, 8)}, ValueError, r"size is \(7, 8\), must be \(height, width\): multiples of the patch size 2"),
    ({"grid": (5, 4)}, ValueError, r"grid has the sparse grid \(5, 4\), at most the dense grid \(4, 4\)"),
    ({"grid": (2, 2, 2)}, ValueError, "grid has the sparse grid"),
    ({"seed": [1, 2]}, ValueError, "seed: a list must have one seed per sample"),
]  # fmt: skip
CLIPS = [
    ("class clip", {"y": None}, TypeError, "y is None, the model needs y"),
    ("class clip", {"y": [0, 6, 1]}, ValueError, r"y: labels must be in 0\.\.5"),
    ("class clip", {"caption": torch.zeros(3, 6, 10)}, ValueError, "caption is given, the model has no caption"),
    ("class clip", {"null_caption": torch.zeros(1, 6, 10)}, ValueError, "null_caption is given, the model has no"),
    ("class clip", {"caption_mask": torch.ones(3, 6) > 0}, ValueError, "caption_mask is given without caption"),
    ("class clip", {"resolution": torch.ones(3, 2)}, ValueError, "resolution is given, the model has no resolution"),
    ("class clip", {"aspect_ratio": torch.ones(3)}, ValueError, "aspect_ratio is given"),
    ("class clip", {"frames": 5}, ValueError, "frames = 5: must be at least 1, at most 4"),
    ("class clip", {"frames": 0}, ValueError, "frames = 0"),
    ("class clip", {"frames": 2.0}, TypeError, "frames = 2.0: must be an int"),
    ("class clip", {"grid": (5, 2, 2)}, ValueError, r"grid has the sparse grid \(5, 2, 2\), at most .* \(4, 4, 4\)"),
    ("class clip", {"frames": 2, "grid": (3, 2, 2)}, ValueError,
     r"grid has the sparse grid \(3, 2, 2\), at most the dense grid \(2, 4, 4\)"),
    ("class clip", {"size": (8, 4), "grid": [(1, 1, 1), (1, 2, 3), (2, 2)]}, ValueError,
     r"grid\[1\] has the sparse grid"),
    ("text clip", {"y": [0, 1, 2]}, ValueError, "y is given, the model has no y"),
    ("text clip", {"cfg_scale": [1, 1, 2]}, ValueError, "cfg_scale = .*: guidance needs null_caption"),
    ("clip of both", {"y": [0, 1]}, ValueError, r"y, caption have \[2, 3\] samples"),
    ("clip of both", {"cfg_scale": 2.0}, ValueError, "cfg_scale = 2.0: guidance needs null_caption"),
]  # fmt: skip


@pytest.mark.parametrize("name, change, error, message", [*(("pixart with sizes", *case) for case in PIXART), *CLIPS])
def test_sample_refuses_by_name(name, change, error, message):
    given = {key: value for key, value in (conditions_of(name) | change).items() if value is not None}
    with pytest.raises(error, match="^" + message):
        sampler_of(name).sample(steps=2, **given)


def one_of(name: str) -> dict:
    """The first sample's conditions for Session.add."""
    one = {key: value[0] for key, value in without(conditions_of(name), "caption_mask").items()}
    if "y" in one:
        one["label"] = int(one.pop("y"))
    return one | ({"resolution": one["resolution"].tolist()} if "resolution" in one else {})


SESSION = [
    ("pixart", {"label": 1}, ValueError, "label is given, the model has no label"),
    ("pixart", {"caption": None}, TypeError, "caption is None, the model needs caption"),
    ("pixart", {"caption": torch.zeros(1, 6, 10)}, ValueError, r"caption has shape \(1, 6, 10\), must be \[any, 10\]"),
    ("pixart", {"caption": torch.zeros(0, 10)}, ValueError, "caption has 0 tokens, must have 1 to"),
    ("pixart", {"caption": np.full((2, 10), np.nan)}, ValueError, "caption holds values that are not finite"),
    ("pixart", {"null_caption": torch.zeros(8, 10)}, ValueError, "null_caption has 8 tokens"),
    ("pixart", {"cfg_scale": 2.0}, ValueError, "cfg_scale = 2.0: guidance needs null_caption"),
    ("pixart", {"resolution": (8, 8)}, ValueError, "resolution is given, the model has no resolution"),
    ("pixart", {"frames": 1}, ValueError, "frames is 1, must be None"),
    ("pixart", {"grid": (4, 5)}, ValueError, "grid has the sparse grid"),
    ("pixart with sizes", {"resolution": (8, 8, 8)}, ValueError, r"resolution has shape \(3,\), must be \[2\]"),
    ("pixart with sizes", {"resolution": (8, -8)}, ValueError, "resolution is"),
    ("pixart with sizes", {"aspect_ratio": [1.0]}, ValueError, r"aspect_ratio has shape \(1,\), must be \[\]"),
    ("pixart with sizes", {"aspect_ratio": None}, TypeError, "aspect_ratio is None"),
    ("class clip", {"label": None}, TypeError, "label is None, the model needs label"),
    ("class clip", {"label": 6}, ValueError, "label = 6"),
    ("class clip", {"label": 1.0}, TypeError, "label = 1.0"),
    ("class clip", {"caption": torch.zeros(2, 10)}, ValueError, "caption is given"),
    ("class clip", {"frames": 5}, ValueError, "frames = 5"),
    ("class clip", {"frames": 1, "grid": (2, 1, 1)}, ValueError, r"grid has the sparse grid \(2, 1, 1\), at most"),
]  # fmt: skip


@pytest.mark.parametrize("name, change, error, message", SESSION)
def test_add_refuses_by_name(name, change, error, message):
    session = sampler_of(name).session()
    given = {key: value for key, value in (one_of(name) | change).items() if value is not None}
    with pytest.raises(error, match="^" + message):
        session.add(**given)
    assert session.queued == 0


def test_models_without_what_guidance_needs():
    labels_alone = sampler_of("class clip", class_dropout_prob=0.0)
    with pytest.raises(ValueError, match=r"cfg_scale = 2\.0: guidance needs a null class, and this model has none"):
        labels_alone.sample([1], cfg_scale=2.0)
    nothing = sampler_of("class clip", num_classes=0, class_dropout_prob=0.0)
    with pytest.raises(ValueError, match=r"cfg_scale = 2\.0: the model has no condition to guide by"):
        nothing.sample(cfg_scale=2.0)
    flexdit = Sampler(FlexDiT(FlexDiTConfig(input_size=8, hidden_size=16, num_heads=2, num_sdtm=0, num_classes=3)))
    for name, value in (("caption", torch.zeros(1, 2, 3)), ("resolution", [[8, 8]]), ("frames", 2)):
        with pytest.raises(ValueError, match=f"^{name} is "):
            flexdit.sample([1], **{name: value})


def test_another_models_arrays_and_configurations(tmp_path):
    model = model_of("pixart")
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"arrays has no label_embed\.weight"):
        Sampler.from_arrays(CONFIGS["clip of both"], arrays)
    with pytest.raises(TypeError, match="config is dict, must be a FlexDiTConfig, FlexPixArtConfig or FlexLatteConfig"):
        Sampler.from_arrays({}, arrays)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json is the configuration of a 'FlexPixArt', must be a FlexDiT's"):
        FlexDiT.from_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"_class_name": "FlexNone"}, "'_class_name': is 'FlexNone', must be 'FlexPixArt' or 'FlexLatte'"),
        ({"_class_name": "FlexLatte", "num_frames": 2}, "'size_conditions': FlexLatteConfig has no such field"),
        ({"caption_channels": 11}, "caption_embed.fc1.weight"),
        ({"patch_size": 3}, "input_size is 8, must be a multiple of patch_size 3"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(values | change))
        with pytest.raises(ValueError, match=message):
            Sampler.from_pretrained(tmp_path)


def test_other_models_are_refused():
    broken = copy.deepcopy(model_of("pixart"))
    with pytest.raises(ValueError, match="Sampler: model is on meta"):
        Sampler(broken.to("meta"))
    with pytest.raises(TypeError, match=r"dtype is torch\.float16, must be one of"):
        Sampler(model_of("pixart"), torch.float16)


def test_null_captions_are_checked_without_guidance():
    given = conditions_of("pixart") | null_caption_of("pixart")
    with pytest.raises(ValueError, match="null_caption has shape"):
        sampler_of("pixart").sample(**given | {"null_caption": given["null_caption"][0]}, steps=1)
