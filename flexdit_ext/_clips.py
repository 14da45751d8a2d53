"""Clips as files: GIF (256 colours a frame) and WebP (lossless) by Pillow, MP4 (H.264) by imageio's ffmpeg."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from ._files import write_file
from .checkpoint import fsync

FORMATS = ("gif", "webp", "mp4")
_DESCRIPTION = 0x010E  # Exif's ImageDescription
_MOST_GIF = 50  # frames a second: viewers slow down what is shown for less than 2/100 s


def check_clip(form: str, fps: int, size: tuple[int, int] | None = None) -> None:
    """Raises ValueError for what a format cannot do; size: (height, width) in pixels."""
    if form == "gif" and fps > _MOST_GIF:
        raise ValueError(f"--fps is {fps}, a GIF has at most {_MOST_GIF} frames a second: --format webp or mp4")
    if form == "mp4" and size is not None and (size[0] % 2 or size[1] % 2):
        raise ValueError(f"--format mp4 needs even sides, the frames have {size[0]}x{size[1]}: --format gif or webp")


def write_clip(path: Path, frames: np.ndarray, fps: int, text: str) -> None:
    """Writes uint8 [F, H, W, 1 or 3] into a folder of all_or_nothing, in the format of the path's ending; `text` goes
    into its comment. Raises OSError naming the file, ValueError as check_clip."""
    form = path.suffix[1:]
    check_clip(form, fps, frames.shape[1:3])
    if form == "mp4":
        _write_mp4(path, frames, fps, text)
    else:
        write_file(path, _animation(frames, form, fps, text))


def _animation(frames: np.ndarray, form: str, fps: int, text: str) -> bytes:
    from PIL import Image

    unit = 10 if form == "gif" else 1  # milliseconds that a duration is a multiple of
    times = [round(i * 1000 / fps / unit) * unit for i in range(len(frames) + 1)]
    images = [Image.fromarray(frame[..., 0] if frame.shape[2] == 1 else frame) for frame in frames]
    options = {"save_all": True, "duration": np.diff(times).tolist(), "loop": 0}
    if form == "gif":
        # 256 x 256 pixels: a millisecond, where the default method, nearly as exact, takes half a second.
        images = [one if one.mode == "L" else one.quantize(256, Image.Quantize.FASTOCTREE) for one in images]
        options["comment"] = text.encode()
    else:
        exif = Image.Exif()
        exif[_DESCRIPTION] = text
        options |= {"exif": exif, "lossless": True}
    file = io.BytesIO()
    images[0].save(file, format=form.upper(), append_images=images[1:], **options)
    return file.getvalue()


def _write_mp4(path: Path, frames: np.ndarray, fps: int, text: str) -> None:
    import imageio.v2

    options = {"codec": "libx264", "quality": 8, "macro_block_size": 1, "ffmpeg_log_level": "error"}
    try:
        with imageio.v2.get_writer(
            path, format="FFMPEG", mode="I", fps=fps, output_params=["-metadata", f"comment={text}"], **options
        ) as writer:
            for frame in frames:
                writer.append_data(np.repeat(frame, 3 // frame.shape[2], axis=2))
        fsync(path)
    except OSError as error:  # also what imageio makes of ffmpeg's failures
        raise OSError(f"cannot write {path.name} to {path.parent.parent}: {error.strerror or error}") from error
