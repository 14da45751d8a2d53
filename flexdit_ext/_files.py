"""Folders of files that appear all or not at all, and pictures as PNG."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@contextlib.contextmanager
def all_or_nothing(folder: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder within `folder`, which is made where it is missing. What is written there moves into `folder`
    when the block ends well, replacing files of the same names; otherwise nothing is left, nor of folders made here.
    A killed process may leave a folder .writing-*, which can be deleted.

    Raises OSError naming the folder, at once where it cannot be written to.
    """
    folder = Path(folder)
    made = []
    try:
        try:
            made = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            staging = tempfile.TemporaryDirectory(prefix=".writing-", dir=folder)
        except OSError as error:
            raise OSError(error.errno, f"cannot write to the folder {folder}: {error.strerror or error}") from error
        with staging:
            yield Path(staging.name)
            names = sorted(os.listdir(staging.name))
            for name in names:
                if (folder / name).is_dir():
                    raise OSError(f"cannot write {folder / name}: it is a folder")
            for name in names:
                os.replace(Path(staging.name, name), folder / name)
    except BaseException:  # Ctrl-C too
        for path in made:
            with contextlib.suppress(OSError):  # somebody else has put something there
                path.rmdir()
        raise


def write_file(path: Path, data: bytes) -> None:
    """Into a folder of all_or_nothing. Raises OSError naming the file and the folder it was meant for."""
    try:
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # a full disk may show only now
    except OSError as error:
        raise OSError(
            error.errno, f"cannot write {path.name} to {path.parent.parent}: {error.strerror or error}"
        ) from error


def check_finite(images: Tensor, first: int, what: str = "image") -> None:
    """first: the number of the first one, for the message."""
    bad = (~images.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"{what} {first + bad[0]} is not finite: the model, its dtype or the guidance does not bear this"
        )


def to_pixels(images: Tensor) -> np.ndarray:
    """Images [n, 1 or 3, H, W] in [-1, 1], what is beyond clamped, as uint8 [n, H, W, 1 or 3]."""
    pixels = (images.float().clamp(-1, 1) + 1) * 127.5
    return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def arrange(images: list[np.ndarray], columns: int, gap: int = 2) -> np.ndarray:
    """One picture [H, W, c] of images [h, w, c] in rows of `columns`, white between them."""
    height, width, channels = images[0].shape
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    picture = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        picture[top : top + height, left : left + width] = image
    return picture


def png(pixels: np.ndarray, text: dict[str, str] | None = None) -> bytes:
    """A PNG file of uint8 [H, W, 1 or 3], `text` in its tEXt chunks. Raises ImportError without Pillow."""
    from PIL import Image, PngImagePlugin

    info, file = PngImagePlugin.PngInfo(), io.BytesIO()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, format="PNG", pnginfo=info)
    return file.getvalue()
