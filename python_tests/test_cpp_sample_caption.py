"""C++ programs and libflexdit_c sample FlexPixArt and FlexLatte as Python's Sampler does, to the bit:
examples/cpp/sample_caption.cpp, compiled here against the library, and a request of c_api.h through ctypes."""

import ctypes
import importlib.util
import sys

import numpy as np
import pytest
from native import ROOT, build_folder, compile_program
from safetensors.numpy import save_file
from single_sampling import CONFIGS, model_of, sampler_of
from test_cpp_sample import Program, read_picture

NAMES = ["pixart with sizes", "text clip", "class clip"]
RUNS = {
    "unguided": (["--steps", "3", "--sampler", "ddim", "--guidance", "1"], {"steps": 3}),
    "guided": (
        ["--steps", "3", "--sampler", "ddpm", "--guidance", "2.5", "--seed", "7", "--count", "2"],
        {"steps": 3, "sampler": "ddpm", "cfg_scale": 2.5, "seed": 7},
    ),
    "other size": (
        ["--steps", "2", "--guidance", "2", "--height", "12", "--width", "4"],
        {"steps": 2, "sampler": "dpmpp", "cfg_scale": 2.0, "size": (12, 4)},
    ),
}


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("cpp") / "sample_caption"
    compile_program(ROOT / "examples/cpp/sample_caption.cpp", path)
    return Program([str(path)], "pnm")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A checkpoint of each, and captions."""
    folder = tmp_path_factory.mktemp("models")
    for name in NAMES:
        model_of(name).save_pretrained(folder / name)
    random = np.random.default_rng(0)
    tensors = {name: random.normal(size=(tokens, 10)).astype(np.float32) for name, tokens in CAPTIONS.items()}
    save_file(tensors, folder / "caption.safetensors")
    return folder, tensors


CAPTIONS = {"caption": 5, "null_caption": 2}


def expected_of(name: str, tensors: dict, count: int, run: dict) -> np.ndarray:
    config, given = CONFIGS[name], {}
    if config.caption_channels:
        given["caption"] = np.stack([tensors["caption"]] * count)
        given["null_caption"] = tensors["null_caption"][None]
    if config.num_classes:
        given["y"] = [run.get("label", 0)] * count
    if config.size_conditions:
        height, width = run.get("size", (8, 8))
        given["resolution"] = [[8.0 * height, 8.0 * width]] * count
        given["aspect_ratio"] = [height / width] * count
    return sampler_of(name).sample(**given, **{key: value for key, value in run.items() if key != "label"}).numpy()


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", NAMES)
def test_same_images_to_the_bit(program, folder, name, run, tmp_path):
    (models, tensors), (options, arguments) = folder, RUNS[run]
    clip = "clip" in name
    if clip:
        options, arguments = [*options, "--frames", "3"], arguments | {"frames": 3}
    if CONFIGS[name].num_classes:
        options, arguments = [*options, "--label", "4"], arguments | {"label": 4}
    expected = expected_of(name, tensors, 2 if "--count" in options else 1, arguments)
    picture, latents = tmp_path / "image.ppm", tmp_path / "latents"
    result = program.run(models / name, models / "caption.safetensors", picture, "--latents", latents, *options)
    assert result.returncode == 0, result.stderr
    assert np.array_equal(np.fromfile(latents, np.float32).reshape(expected.shape), expected)
    frames = expected.swapaxes(1, 2).reshape(-1, 4, *expected.shape[3:]) if clip else expected
    assert np.array_equal(read_picture(picture), strip_of(frames, 3 if clip else len(frames)))
    assert sorted(tmp_path.iterdir()) == [picture, latents]


def strip_of(images: np.ndarray, columns: int) -> np.ndarray:
    """The first three channels, [n, 4, h, w] as rows of `columns`; halves are rounded away from zero."""
    colors = images[:, :3].transpose(0, 2, 3, 1)
    rows = [np.concatenate(list(colors[i : i + columns]), axis=1) for i in range(0, len(colors), columns)]
    zoom = max(1, 64 // images.shape[2])
    shown = (np.clip(np.concatenate(rows), -1, 1) + np.float32(1)) * np.float32(127.5)
    return np.floor(shown + np.float32(0.5)).astype(np.uint8).repeat(zoom, 0).repeat(zoom, 1)


@pytest.mark.parametrize("name, options, message", [
    ("text clip", ["--frames", "5"], "frames is 5"),
    ("pixart with sizes", ["--frames", "2"], "frames is 2"),
    ("pixart with sizes", ["--height", "7"], "height is 7"),
    ("pixart with sizes", ["--count", "0"], "--count is 0, must be at least 1"),
    ("pixart with sizes", ["--count", "x"], '--count is "x"'),
    ("pixart with sizes", ["--labels", "1"], "--labels is no option"),
    ("pixart with sizes", ["--guidance", "nan"], "guidance is"),
    ("pixart with sizes", ["--steps"], "usage: sample_caption FOLDER"),
])  # fmt: skip
def test_bad_options(program, folder, name, options, message, tmp_path):
    result = program.run(folder[0] / name, folder[0] / "caption.safetensors", tmp_path / "image", *options)
    assert result.returncode == 1 and message in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change, options, message", [
    ({"caption": None}, [], "caption is missing"),
    ({"caption": np.zeros((8, 10), np.float32)}, [], "caption has 8 tokens"),
    ({"caption": np.zeros((2, 9), np.float32)}, [], "caption must be F32 [tokens, 10]"),
    ({"caption": np.zeros((2, 10))}, [], "caption must be F32 [tokens, 10]"),
    ({"null_caption": None}, ["--guidance", "2"], "null_caption"),
])  # fmt: skip
def test_bad_captions(program, folder, change, options, message, tmp_path):
    tensors = {name: value for name, value in (folder[1] | change).items() if value is not None}
    save_file(tensors, tmp_path / "caption.safetensors")
    result = program.run(folder[0] / "text clip", tmp_path / "caption.safetensors", tmp_path / "image", *options)
    assert result.returncode == 1 and message in result.stderr
    assert not (tmp_path / "image").exists()


# ---- libflexdit_c ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def example():
    spec = importlib.util.spec_from_file_location("ctypes_sample", ROOT / "examples/python/ctypes_sample.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["ctypes_sample"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("name", NAMES)
def test_c_requests(example, folder, name, dtype):
    class Request(example.Request):
        """flexdit_request with what came later."""

        _fields_ = (
            ("caption", ctypes.c_void_p), ("caption_tokens", ctypes.c_int64), ("null_caption", ctypes.c_void_p),
            ("null_caption_tokens", ctypes.c_int64), ("caption_dtype", ctypes.c_int32),
            ("sparse_frames", ctypes.c_int32), ("frames", ctypes.c_int64), ("resolution", ctypes.c_double * 2),
            ("aspect_ratio", ctypes.c_double),
        )  # fmt: skip

    config, clip = CONFIGS[name], "clip" in name
    library = example.Library(str(build_folder() / "libflexdit_c.so"))
    handles = {kind: ctypes.c_void_p() for kind in ("checkpoint", "model", "session", "image")}
    library.checkpoint_load(str(folder[0] / name).encode(), example.FLOAT32, ctypes.byref(handles["checkpoint"]))
    family = ctypes.c_int64()
    library.checkpoint_get(handles["checkpoint"], 10, ctypes.byref(family))
    assert family.value == (2 if clip else 1)
    library.model_prepare(handles["checkpoint"], None, ctypes.byref(handles["model"]))
    library.session_create(handles["model"], None, ctypes.byref(handles["session"]))
    request = Request()
    library.request_init(ctypes.byref(request), ctypes.sizeof(Request))
    assert request.caption is None and request.caption_dtype == example.FLOAT32 and request.frames == 0
    captions = {key: np.ascontiguousarray(value, dtype) for key, value in folder[1].items()}
    request.steps, request.guidance, request.seed = 2, 2.0, library.derive_seed(3, 0)
    request.sparse_height, request.sparse_width, request.sparse_frames = 2, 3, 2 if clip else 0
    if clip:
        request.frames = 2
    if config.caption_channels:
        request.caption, request.caption_tokens = captions["caption"].ctypes.data, 5
        request.null_caption, request.null_caption_tokens = captions["null_caption"].ctypes.data, 2
        request.caption_dtype = {"float32": 0, "float16": 2, "float64": 3}[np.dtype(dtype).name]
    if config.size_conditions:
        request.resolution[0] = request.resolution[1] = 64.0
        request.aspect_ratio = 1.0
    key, left = ctypes.c_int64(), ctypes.c_int64(1)
    library.session_add(handles["session"], ctypes.byref(request), ctypes.byref(key))
    while left.value:
        library.session_step(handles["session"], ctypes.byref(left))
    library.session_take(handles["session"], key, ctypes.byref(handles["image"]))
    frames, shape = ctypes.c_int64(), (ctypes.c_int64 * 3)()
    library._library.flexdit_image_frames(handles["image"], ctypes.byref(frames))
    library.image_shape(handles["image"], shape)
    assert frames.value == (2 if clip else 1) and list(shape) == [4, 8, 8]
    values = np.empty((4, frames.value, 8, 8), np.float32)
    library.image_copy(handles["image"], example.FLOAT32, values.ctypes.data, values.size)
    for kind, handle in handles.items():
        library.free(kind, handle)
    run = {"steps": 2, "cfg_scale": 2.0, "seed": 3, "grid": (2, 2, 3) if clip else (2, 3)}
    expected = expected_of(name, captions, 1, run | ({"frames": 2} if clip else {}))[0]
    assert np.array_equal(values if clip else values[:, 0], expected)
