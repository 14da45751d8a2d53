"""`flexdit convert` of diffusers' PixArt and Latte, of FlexPixArt and FlexLatte."""

import json

import pytest
from helpers import assert_same_model, same_tensors

diffusers = pytest.importorskip("diffusers")

from test_cli_convert import refused, run  # noqa: E402
from text_models import latte, pixart  # noqa: E402

from flexdit_ext import FlexLatte, FlexLatteConfig, FlexPixArt, convert  # noqa: E402

SPARSE = "1/1x1,1,1,1/1"
BOTH = pytest.mark.parametrize(
    "make, kind, name", [(pixart, FlexPixArt, "pixart"), (latte, FlexLatte, "latte")], ids=["pixart", "latte"]
)


@BOTH
def test_there_and_back(make, kind, name, tmp_path, capsys):
    theirs = make()
    theirs.save_pretrained(tmp_path / "pipeline" / "transformer")
    assert convert.detect(tmp_path / "pipeline") == name
    run(tmp_path / "pipeline", tmp_path / "ours", "--to", "flexdit", "--from", "diffusers")
    out = capsys.readouterr().out
    assert "missing: 0" in out and "dense_blocks.#.cross.kv.* <- " in out
    model = kind.from_pretrained(tmp_path / "ours")
    assert_same_model(model, getattr(convert, f"from_{name}")(theirs))
    run(tmp_path / "ours", tmp_path / "back", "--to", "diffusers", "--max-shard-size", "50KB")
    again = type(theirs).from_pretrained(tmp_path / "back")
    assert same_tensors(again.state_dict(), theirs.state_dict())
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2


@BOTH
def test_layout_and_our_classes(make, kind, name, tmp_path, capsys):
    make().save_pretrained(tmp_path / "theirs")
    run(tmp_path / "theirs", tmp_path / "ours", "--to", "flexdit", "--layout", SPARSE, "--dtype", "bfloat16")
    assert "sdtm.#.recovery.#.from_dense.weight = identity" in capsys.readouterr().out.replace(".*", ".weight")
    model = kind.from_pretrained(tmp_path / "ours")
    assert (model.config.num_pooling_blocks, model.config.num_sdtm, model.config.num_dense_blocks) == (1, 1, 1)
    layout = {n: getattr(model.config, n) for n in ("num_pooling_blocks", "num_sdtm", "sdtm_blocks")}
    assert_same_model(model, getattr(convert, f"from_{name}")(make(), **layout).bfloat16())
    run(tmp_path / "ours", tmp_path / "wrapped", "--to", "diffusers")
    wrapper = f"{kind.__name__}Transformer{2 + (kind is FlexLatte)}DModel"
    assert f"note: written as flexdit_ext.diffusers.{wrapper}" in capsys.readouterr().out
    assert convert.detect(tmp_path / "wrapped") == "flexdit-diffusers"
    run(tmp_path / "wrapped", tmp_path / "back", "--to", "flexdit")
    assert_same_model(kind.from_pretrained(tmp_path / "back"), model)


def test_published_class_name(tmp_path):
    """PixArt's published folders call it Transformer2DModel, as DiT's do."""
    pixart().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "Transformer2DModel"}))
    assert convert.detect(tmp_path) == "pixart"
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero"})
    )
    assert convert.detect(tmp_path) == "diffusers"


def test_refusals(tmp_path, capsys):
    pixart().save_pretrained(tmp_path / "pixart")
    run(tmp_path / "pixart", tmp_path / "sparse", "--to", "flexdit", "--layout", SPARSE)
    sizes = {"hidden_size": 48, "num_heads": 2, "num_pooling_blocks": 0, "num_sdtm": 0}
    FlexLatte(FlexLatteConfig(8, num_frames=4, num_classes=3, **sizes)).save_pretrained(tmp_path / "labels")
    to = (tmp_path / "x", "--to", "flexdit")
    for arguments, message in (
        ((tmp_path / "pixart", *to, "--num-heads", 2), "--num-heads is for DiTs, "),
        ((tmp_path / "sparse", *to, "--image-size", 64), "sparse is a FlexPixArt"),
        ((tmp_path / "pixart", *to, "--layout", "1/1x1,1,1,1/4"), "the dense model and config differ in depth 6 and 9"),
        ((tmp_path / "pixart", *to, "--layout", "XL/2"), "--layout XL/2 has hidden_size 1152, the source 48"),
        ((tmp_path / "sparse", *to, "--layout", "0/1x1,2,1,1/1"), "only a dense one converts"),
        ((tmp_path / "pixart", tmp_path / "x.pt", "--to", "dit"), "--to is dit, must be flexdit or diffusers"),
        ((tmp_path / "labels", tmp_path / "x", "--to", "diffusers"), "LatteTransformer3DModel has no labels"),
    ):
        error = refused(capsys, *arguments)
        assert message in error and error.count("error: ") == 1, error
    assert not list(tmp_path.glob("x*"))
