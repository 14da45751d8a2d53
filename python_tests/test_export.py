"""torch.export of the model, and AOTInductor packages of it."""

import shutil
import subprocess
import sys

import pytest
import torch
from helpers import model_inputs, random_model

from flexdit_ext import DensitySchedule

SCHEDULE = DensitySchedule([(5, 5), (3, 4), (2, 2)])


def small_model(dtype=torch.float32, **overrides):
    return random_model(dtype, **({"num_sdtm": 1, "sdtm_blocks": (1, 1, 1, 1), "schedule": SCHEDULE} | overrides))


def export(model, batch=3, grid=None):
    """With a batch size of 1 to 64."""
    x, t, y = model_inputs(model.config, batch, model.patch_embed.weight.dtype)
    batches = {0: torch.export.Dim("batch", min=1, max=64)}
    shapes = {"x": batches, "t": batches, "y": batches}
    fixed = {} if grid is None else {"grid": grid}
    with torch.no_grad():
        return torch.export.export(model, (x, t, y), fixed, dynamic_shapes=shapes | dict.fromkeys(fixed, (None, None)))


def assert_same(call, model, grid=None):
    """To the bit, for other batch sizes, timesteps and labels than the exported ones."""
    for batch in (1, 3, 7):
        x, t, y = model_inputs(model.config, batch, model.patch_embed.weight.dtype, seed=batch)
        fixed = {} if grid is None else {"grid": grid}
        with torch.no_grad():
            assert torch.equal(call(x, t, y, **fixed), model(x, t, y, grid)), batch


@pytest.mark.parametrize("grid", [None, (3, 3)], ids=["schedule", "one grid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_export(dtype, grid):
    model = small_model(dtype, reinject_position=True)
    program = export(model, grid=grid)
    assert_same(program.module(), model, grid)
    ops = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"flexdit_ext.block.default", "flexdit_ext.condition.default", "flexdit_ext.final_layer.default"} <= ops


def test_exported_program_on_disk(tmp_path):
    model = small_model()
    torch.export.save(export(model), tmp_path / "flexdit.pt2")
    assert_same(torch.export.load(tmp_path / "flexdit.pt2").module(), model)


def test_exported_program_still_checks_values():
    model = small_model()
    x, t, y = model_inputs(model.config, 3)
    program = export(model).module()
    with pytest.raises(ValueError, match=r"y\[2\] is 11, must lie in \[0, 11\)"):
        program(x, t, torch.tensor([0, 10, 11]))
    with pytest.raises(ValueError, match="1001"):
        program(x, torch.tensor([0, 10, 1001]), y)


LOAD = """
import sys, torch
import flexdit_ext  # the package calls its ops
data = torch.load(sys.argv[2], weights_only=True)
package = torch._inductor.aoti_load_package(sys.argv[1])
for x, t, y, expected in data:
    assert torch.equal(package(x, t, y), expected)
print("same", len(data))
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_aotinductor_package(tmp_path):
    """Compiled, packaged, and loaded by another process, which never sees the model."""
    model = small_model(num_pooling_blocks=0, num_dense_blocks=1)
    package = torch._inductor.aoti_compile_and_package(export(model), package_path=str(tmp_path / "flexdit.pt2"))
    assert_same(torch._inductor.aoti_load_package(package), model)
    data = []
    for batch in (1, 3, 7):
        inputs = model_inputs(model.config, batch, seed=10 + batch)
        with torch.no_grad():
            data.append((*inputs, model(*inputs)))
    torch.save(data, tmp_path / "data.pt")
    command = [sys.executable, "-c", LOAD, package, str(tmp_path / "data.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "same 3\n", done.stderr
