"""Files that appear whole or not at all, and pictures as PNG."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """`write` fills a temporary file beside `path`, which is then renamed. On any failure nothing is left of it.

    Raises OSError naming the path.
    """
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".writing-", delete=False) as file:
            temporary = Path(file.name)
            write(file)
            file.flush()
            os.fsync(file.fileno())  # a full disk may show only now
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # tempfile's files are private
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def writable_folder(path: str | os.PathLike) -> Path:
    """The folder, made where it is missing, after a file could be written there. Raises OSError naming it."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise OSError(error.errno, f"cannot write to the folder {path}: {error.strerror or error}") from error


def to_pixels(images: Tensor) -> np.ndarray:
    """Images [n, 1 or 3, H, W] in [-1, 1], what is beyond clamped, as uint8 [n, H, W, 1 or 3]."""
    bad = (~images.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"image {bad[0]} has values that are not finite: the model or its guidance diverged")
    pixels = (images.float().clamp(-1, 1) + 1) * 127.5
    return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def arrange(images: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """One picture [H, W, c] of images [n, h, w, c] in rows of `columns`, white between them."""
    count, height, width, channels = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    picture = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        picture[top : top + height, left : left + width] = image
    return picture


def write_png(path: Path, pixels: np.ndarray, text: dict[str, str]) -> None:
    """uint8 [H, W, 1 or 3] with `text` in the file's tEXt chunks. Raises OSError, ImportError without Pillow."""
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    write_whole(path, lambda file: picture.save(file, format="PNG", pnginfo=info))
