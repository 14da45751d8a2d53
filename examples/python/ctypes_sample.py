"""Pictures from a trained model through the C interface, with ctypes and numpy alone: no torch, no flexdit_ext.

    python examples/python/ctypes_sample.py build/libflexdit_c.so out/flexdit digits.png

Other languages call libflexdit_c in the same way (csrc/include/flexdit/c_api.h; built with -DFLEXDIT_C_API=ON).
"""

from __future__ import annotations

import argparse
import ctypes
import os
import struct
import sys
import zlib
from ctypes import POINTER, byref, c_double, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path

import numpy as np

FLOAT32, NUM_CLASSES = 0, 4  # a flexdit_dtype and a flexdit_property
SAMPLERS = ("ddim", "ddpm", "dpmpp", "flow", "heun")  # flexdit_sampler


class Request(ctypes.Structure):
    """flexdit_request."""

    _fields_ = [
        ("size", c_size_t), ("label", c_int64), ("seed", c_uint64), ("sampler", c_int32), ("clip_x0", c_int32),
        ("steps", c_int64), ("eta", c_double), ("guidance", c_double), ("guidance_begin", c_double),
        ("guidance_end", c_double), ("height", c_int64), ("width", c_int64), ("sparse_height", c_int64),
        ("sparse_width", c_int64),
    ]  # fmt: skip


SIGNATURES = {
    "checkpoint_load": [ctypes.c_char_p, c_int32, POINTER(c_void_p)],
    "checkpoint_get": [c_void_p, c_int32, POINTER(c_int64)],
    "model_prepare": [c_void_p, c_void_p, POINTER(c_void_p)],
    "session_create": [c_void_p, c_void_p, POINTER(c_void_p)],
    "request_init": [POINTER(Request), c_size_t],
    "session_add": [c_void_p, POINTER(Request), POINTER(c_int64)],
    "session_step": [c_void_p, POINTER(c_int64)],
    "session_take": [c_void_p, c_int64, POINTER(c_void_p)],
    "image_shape": [c_void_p, POINTER(c_int64)],
    "image_copy": [c_void_p, c_int32, c_void_p, c_int64],
}


class FlexDiTError(RuntimeError):
    """What flexdit_last_error said."""


class Library:
    """The functions of c_api.h that SIGNATURES lists; a status other than 0 becomes a FlexDiTError."""

    def __init__(self, path: str):
        self._library = ctypes.CDLL(os.path.abspath(path))
        self._library.flexdit_last_error.restype = ctypes.c_char_p
        self._library.flexdit_derive_seed.argtypes = [c_uint64, c_uint64]
        self.derive_seed = self._library.flexdit_derive_seed
        self.derive_seed.restype = c_uint64
        for name, arguments in SIGNATURES.items():
            function = self._library[f"flexdit_{name}"]
            function.argtypes, function.restype, function.errcheck = arguments, c_int32, self._check
            setattr(self, name, function)

    def _check(self, status, function, arguments):
        if status:
            raise FlexDiTError(self._library.flexdit_last_error().decode(errors="replace"))
        return arguments

    def free(self, kind: str, handle: c_void_p) -> None:
        self._library[f"flexdit_{kind}_free"](handle)


def sample(library: Library, folder: str, labels: list[int] | None, settings: dict, seed: int) -> np.ndarray:
    """float32 [n, channels, height, width]; labels None: one of each class. settings: members of Request."""
    handles = {kind: c_void_p() for kind in ("checkpoint", "model", "session")}
    try:
        checkpoint, model, session = handles.values()
        library.checkpoint_load(os.fsencode(folder), FLOAT32, byref(checkpoint))
        if labels is None:
            count = c_int64()
            library.checkpoint_get(checkpoint, NUM_CLASSES, byref(count))
            labels = list(range(count.value))
        library.model_prepare(checkpoint, None, byref(model))
        library.session_create(model, None, byref(session))
        ids = [_add(library, session, label, library.derive_seed(seed, i), settings) for i, label in enumerate(labels)]
        left = c_int64(1)
        while left.value:
            library.session_step(session, byref(left))
        return np.stack([_take(library, session, one) for one in ids])
    finally:
        for kind, handle in handles.items():
            library.free(kind, handle)


def _add(library: Library, session: c_void_p, label: int, seed: int, settings: dict) -> int:
    request, identity = Request(), c_int64()
    library.request_init(byref(request), ctypes.sizeof(request))
    for name, value in {"label": label, "seed": seed, **settings}.items():
        setattr(request, name, value)
        if getattr(request, name) != value:  # ctypes cuts off what does not fit
            raise FlexDiTError(f"{name} is {value}, which {dict(Request._fields_)[name].__name__} does not hold")
    library.session_add(session, byref(request), byref(identity))
    return identity.value


def _take(library: Library, session: c_void_p, identity: int) -> np.ndarray:
    image, shape = c_void_p(), (c_int64 * 3)()
    library.session_take(session, identity, byref(image))
    try:
        library.image_shape(image, shape)
        values = np.empty(tuple(shape), np.float32)
        library.image_copy(image, FLOAT32, values.ctypes.data, values.size)
        return values
    finally:
        library.free("image", image)


def png(images: np.ndarray, zoom: int) -> bytes:
    """Images [n, channels, height, width] of values from -1 to 1 side by side; three channels and more are RGB."""
    colors = 3 if images.shape[1] >= 3 else 1
    pixels = np.concatenate(list(images[:, :colors]), axis=2).transpose(1, 2, 0)  # [height, n * width, colors]
    pixels = np.rint((np.clip(np.nan_to_num(pixels, nan=-1), -1, 1) + 1) * 127.5).astype(np.uint8)
    pixels = pixels.repeat(zoom, axis=0).repeat(zoom, axis=1)
    height, width = pixels.shape[:2]

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2 if colors == 3 else 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)  # each begins with its filter: none
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def write_whole(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.writing")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _labels(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", help="libflexdit_c.so")
    parser.add_argument("folder", help="what save_pretrained wrote")
    parser.add_argument("out", type=Path, help="PNG file")
    parser.add_argument(
        "--labels", type=lambda text: [int(one) for one in text.split(",")], help="default: all classes"
    )
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--sampler", choices=SAMPLERS, default="flow")
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--latents", type=Path, help="also write the float32 values of all images")
    arguments = parser.parse_args()
    if not 0 <= arguments.seed < 2**64:
        parser.error(f"--seed is {arguments.seed}, must be in 0..2^64 - 1")
    settings = {
        "sampler": SAMPLERS.index(arguments.sampler),
        "steps": arguments.steps,
        "guidance": arguments.guidance,
    }
    try:
        images = sample(Library(arguments.library), arguments.folder, arguments.labels, settings, arguments.seed)
        write_whole(arguments.out, png(images, zoom=max(1, 64 // images.shape[2])))
        if arguments.latents:
            write_whole(arguments.latents, images.tobytes())
    except (FlexDiTError, OSError, AttributeError) as error:  # no function of that name in the library
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
