"""What try_wheel.py runs in each environment: smoke.py CHECKPOINT LATENTS cpu|cuda|none.

Writes the tiny checkpoint if there is none, samples from it, and writes the latents, which are to be the same in all.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import safetensors.numpy

import flexdit_ext
from flexdit_ext import _C, DensitySchedule, FlexDiTConfig, Sampler

CONFIG = FlexDiTConfig(
    input_size=8, hidden_size=32, num_heads=2, num_classes=4, num_pooling_blocks=1, num_sdtm=1,
    num_dense_blocks=1, schedule=DensitySchedule([(3, 3), (2, 2)]),
)  # fmt: skip
REQUEST = {"y": [0, 3, 4, 1], "steps": 4, "cfg_scale": 2.0, "seed": 7}


def write_checkpoint(folder: Path) -> None:
    """Random weights, without torch."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    arrays = {
        name: 0.1 * generator.standard_normal((rows, cols)[name.endswith(".bias") :], dtype=np.float32)
        for name, rows, cols in _C.model_parameters(CONFIG.core)
    }
    patch = (CONFIG.hidden_size, CONFIG.in_channels, CONFIG.patch_size, CONFIG.patch_size)
    arrays["patch_embed.weight"] = arrays["patch_embed.weight"].reshape(patch)
    (folder / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")


def loaded_libraries() -> dict[str, set[str]]:
    """The files of each library that must be there once."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    files = {line.split()[-1] for line in lines if "/" in line}
    return {name: {file for file in files if name in Path(file).name} for name in ("libgomp", "libdnnl")}


def check_torch(latents: np.ndarray, checkpoint: Path) -> None:
    """The module's gradients against reference.py's, and its images against the Sampler's."""
    import torch

    from flexdit_ext import FlexDiT, reference, sample

    model = FlexDiT.from_pretrained(checkpoint)
    assert np.array_equal(Sampler(model).sample(**REQUEST).numpy(), latents)
    python_latents = sample(model, **REQUEST).numpy()
    assert np.abs(python_latents - latents).max() < 1e-3 * np.abs(latents).max()

    twin = reference.FlexDiT(model.config)
    twin.load_state_dict(model.state_dict())
    inputs = torch.randn(3, 4, 8, 8), torch.tensor([10, 600, 990]), torch.tensor([1, 2, 4])
    for one in (model.eval(), twin.eval()):
        one(*inputs, grid=[(3, 3), (2, 2), (2, 2)]).square().mean().backward()
    expected = dict(twin.named_parameters())
    for name, ours in model.named_parameters():
        error = (ours.grad - expected[name].grad).abs().max() / expected[name].grad.abs().max()
        assert error < 1e-3, f"{name}: {error}"
    if torch.cuda.is_available() and _C.build_info()["cuda"]:
        on_gpu = Sampler(model.cuda()).sample(**REQUEST).cpu().numpy()
        assert np.abs(on_gpu - latents).max() < 1e-2 * np.abs(latents).max()


def main(checkpoint: Path, output: Path, kind: str) -> None:
    package = Path(flexdit_ext.__file__).parent
    assert "site-packages" in package.parts, package
    assert (find_spec("torch") is None) == (kind == "none")
    if not checkpoint.exists():
        write_checkpoint(checkpoint)
    latents = Sampler.from_pretrained(checkpoint).sample(**REQUEST)
    assert latents.shape == (4, 4, 8, 8) and np.isfinite(latents).all()
    if kind == "none":
        try:
            _ = flexdit_ext.FlexDiT
        except ImportError as error:
            assert "needs PyTorch" in str(error), error
        else:
            raise AssertionError("FlexDiT is there without torch")
    else:
        check_torch(latents, checkpoint)
    libraries = loaded_libraries()
    assert all(len(files) == 1 for files in libraries.values()), libraries
    assert libraries["libdnnl"] == {str(package / "libdnnl.so.3")}, libraries
    if kind == "none":
        assert libraries["libgomp"] == {str(package / "libgomp.so.1")}, libraries
    np.save(output, latents)
    build = _C.build_info()
    print(f"{kind}: flexdit_ext {flexdit_ext.__version__}, CUDA {build['cuda'] or 'not built'}, {libraries['libgomp']}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
