"""Arrays of other libraries as arguments of the samplers, through DLPack, and latents as theirs."""

import numpy as np
import pytest
import torch
from helpers import random_model

from flexdit_ext import DensitySchedule, Sampler, sample

LABELS, SCALES, SEEDS = [3, 10, 0], [2.0, 1.0, 0.5], [7, 2**63 + 1, 0]


@pytest.fixture(scope="module")
def model():
    return random_model(torch.float32, num_sdtm=1, schedule=DensitySchedule([(3, 3)]))


@pytest.fixture(scope="module")
def expected(model):
    """Of lists, from the Python sampler and the engine."""
    return run(model, LABELS)


def run(model, y, scale=SCALES, seed=SEEDS):
    return [
        sample(model, y, steps=2, cfg_scale=scale, seed=seed),
        Sampler(model).sample(y, steps=2, cfg_scale=scale, seed=seed),
    ]


def check(model, expected, y, scale=SCALES, seed=SEEDS):
    assert all(map(torch.equal, run(model, y, scale, seed), expected))


def read_only(array):
    array.flags.writeable = False
    return array


NUMPY = {
    "int64": lambda: np.array(LABELS),
    "int32": lambda: np.array(LABELS, dtype=np.int32),
    "read-only": lambda: read_only(np.array(LABELS)),
    "strided": lambda: np.array([LABELS, LABELS]).T[:, 0],
    "backwards": lambda: np.array(LABELS[::-1])[::-1],
    "other byte order": lambda: np.array(LABELS, dtype=">i8"),
}


@pytest.mark.parametrize("make", NUMPY.values(), ids=NUMPY.keys())
def test_numpy(model, expected, make):
    check(model, expected, make(), np.array(SCALES), np.array(SEEDS, dtype=np.uint64))


def test_numpy_scalars(model):
    one = np.array(5)
    for scale, seed in ((np.float32(1.5), np.int64(5)), (np.array(1.5), one), (1.5, one)):
        assert torch.equal(
            sample(model, [3], steps=2, cfg_scale=scale, seed=seed), sample(model, [3], 2, "ddim", 1.5, 5)
        )


class Foreign:
    """An array of a library that has nothing but DLPack and a length."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __len__(self):
        return len(self.tensor)

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


def test_any_library(model, expected):
    check(model, expected, Foreign(torch.tensor(LABELS)), Foreign(torch.tensor(SCALES)))
    check(model, expected, LABELS, SCALES, Foreign(torch.tensor(SEEDS, dtype=torch.uint64)))


def test_jax(model, expected):
    jnp = pytest.importorskip("jax.numpy")
    check(model, expected, jnp.array(LABELS), jnp.array(SCALES))
    low = [7, 5, 0]  # without jax_enable_x64 its integers have 32 bits
    assert torch.equal(sample(model, LABELS, 2, seed=jnp.array(low)), sample(model, LABELS, 2, seed=low))
    back = jnp.from_dlpack(expected[0])
    assert np.array_equal(np.asarray(back), expected[0].numpy())


@pytest.mark.gpu
def test_cupy(model, expected):
    cupy = pytest.importorskip("cupy")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    check(model, expected, cupy.array(LABELS), cupy.array(SCALES), cupy.array(SEEDS, dtype=cupy.uint64))


def test_latents_of_numpy(expected):
    assert np.shares_memory(np.from_dlpack(expected[0]), expected[0].numpy())


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"y": np.array([1.5, 2, 3])}, TypeError, "y: must be int64, got float64"),
        ({"y": np.array([[1, 2, 3]])}, ValueError, "y: must be one-dimensional"),
        ({"y": np.array(1)}, ValueError, "y: must be one-dimensional"),
        ({"y": np.array([], dtype=np.int64)}, ValueError, "at least one label"),
        ({"y": np.array([1, 11, 3])}, ValueError, r"y: labels must be in 0\.\.10"),
        ({"y": np.array(["cat", "dog", "owl"])}, TypeError, "y: must be int64, got <U3"),
        ({"y": LABELS, "scale": np.array([1.0, 2.0])}, ValueError, "cfg_scale"),
        ({"y": LABELS, "scale": np.array([1.0, np.nan, 2.0])}, ValueError, "cfg_scale"),
        ({"y": LABELS, "seed": np.array([1, 2])}, ValueError, "one seed per sample"),
        ({"y": LABELS, "seed": np.array([1, 2, -3])}, ValueError, r"seed\[2\] = -3"),
        ({"y": LABELS, "seed": np.array([1.0, 2.0, 3.0])}, TypeError, r"seed\[0\] = 1\.0"),
    ],
)
def test_wrong_arrays(model, arguments, error, message):
    for call in (0, 1):
        values = {"scale": SCALES, "seed": SEEDS} | arguments
        with pytest.raises(error, match=message):
            if call:
                Sampler(model).sample(values["y"], 2, cfg_scale=values["scale"], seed=values["seed"])
            else:
                sample(model, values["y"], 2, cfg_scale=values["scale"], seed=values["seed"])
