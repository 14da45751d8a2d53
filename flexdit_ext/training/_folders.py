"""Pictures and clips in a folder per class, or each with a text beside it."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ._samples import Samples

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
CLIP_SUFFIXES = (".gif", ".webp")  # that may hold several frames
FRAME_SUFFIXES = tuple(suffix for suffix in IMAGE_SUFFIXES if suffix not in CLIP_SUFFIXES)


class _Folders(Samples):
    """What _entries finds below a folder per class, in the order of their names, is read by _read. Or there are no
    classes: `captioned` ones are anywhere in the folder, with NAME.txt beside NAME.png, and have `texts`."""

    what: str  # "image", in messages

    def __init__(self, path: str | os.PathLike, shape: tuple[int, ...], name: str, captioned: bool):
        self.root, self.shape, self.captioned = existing_folder(path, name), shape, captioned
        if shape[0] not in (1, 3):
            kind = self.what.split()[0]
            raise ValueError(f"{name}: {kind}s have 1 or 3 channels, the model has in_channels {shape[0]}")
        if captioned:
            self.classes: list[str] = []
            self.files = sorted(self._entries(self.root))
            if not self.files:
                raise ValueError(f"{name} is {self.root}, which has no {self.what}")
            self.texts = [_read_text(file) for file in self.files]
        else:
            self._find_classes(name)

    def _find_classes(self, name: str) -> None:
        self.classes = sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir())
        if not self.classes:
            raise ValueError(f"{name} is {self.root}, which has no folders: there must be one for each class")
        self.num_classes = len(self.classes)
        self.files: list[str] = []
        labels: list[int] = []
        for label, folder in enumerate(self.classes):
            files = sorted(self._entries(self.root / folder))
            if not files:
                raise ValueError(f"{name}: the class {self.root / folder} is empty, it has no {self.what}")
            self.files += files
            labels += [label] * len(files)
        self.labels = torch.tensor(labels)

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        samples = torch.stack([self._read(self.files[index]) for index in indices])
        return samples, {} if self.captioned else {"y": self.labels[list(indices)]}

    def name(self, index: int) -> str:
        return self.files[index]

    def _entries(self, folder: Path) -> Iterator[str]:
        raise NotImplementedError

    def _read(self, file: str) -> Tensor:
        raise NotImplementedError


class ImageFolder(_Folders):
    """[channels, size, size] float32 in [-1, 1], the middle square of an image, resized. channels: 1 or 3; name: of the
    path, in messages."""

    what = f"image ({', '.join(IMAGE_SUFFIXES)})"

    def __init__(
        self, path: str | os.PathLike, channels: int, size: int, name: str = "data.path", captioned: bool = False
    ):
        super().__init__(path, (channels, size, size), name, captioned)

    def _entries(self, folder: Path) -> Iterator[str]:
        for directory, _, names in os.walk(folder):
            yield from (os.path.join(directory, name) for name in names if name.lower().endswith(IMAGE_SUFFIXES))

    def _read(self, file: str) -> Tensor:
        return read_frames(file, self.shape[0], self.shape[1], [0])[0]


class ClipFolder(_Folders):
    """[channels, frames, size, size] float32 in [-1, 1]: animated GIF and WebP files, and folders of pictures in the
    order of the numbers in their names. Of a longer clip the middle is taken, of every `step` frames one."""

    what = f"clip (animated {', '.join(CLIP_SUFFIXES)}, or a folder of {', '.join(FRAME_SUFFIXES)})"

    def __init__(
        self,
        path: str | os.PathLike,
        channels: int,
        frames: int,
        size: int,
        step: int = 1,
        name: str = "data.path",
        captioned: bool = False,
    ):
        self.step = step
        super().__init__(path, (channels, frames, size, size), name, captioned)
        # Counting the frames of a file means reading it: only one of each class is looked at before the first step.
        seen = set()
        for file, label in zip(self.files, [0] * len(self.files) if captioned else self.labels.tolist()):
            if os.path.isdir(file) or label not in seen:
                self._frames(file, len(frames_in(file)) if os.path.isdir(file) else count_frames(file))
            seen.add(label)

    def _entries(self, folder: Path) -> Iterator[str]:
        for directory, _, names in os.walk(folder):
            if any(name.lower().endswith(FRAME_SUFFIXES) for name in names):
                if Path(directory) == folder:
                    raise ValueError(f"{folder} has pictures, must have a folder of them for each clip")
                yield directory
            else:
                yield from (os.path.join(directory, name) for name in names if name.lower().endswith(CLIP_SUFFIXES))

    def _frames(self, file: str, count: int) -> range:
        """Which of `count` frames are taken."""
        needed = (self.shape[1] - 1) * self.step + 1
        if count < needed:
            raise ValueError(
                f"{file} has {count} frames, must have at least {needed}: {self.shape[1]} of them are taken, one of "
                f"every {self.step}"
            )
        first = (count - needed) // 2
        return range(first, first + needed, self.step)

    def _read(self, file: str) -> Tensor:
        channels, _, size, _ = self.shape
        if not os.path.isdir(file):
            frames = read_frames(file, channels, size, self._frames(file, count_frames(file)))
        else:
            files = frames_in(file)
            chosen = [files[i] for i in self._frames(file, len(files))]
            frames = torch.cat([read_frames(one, channels, size, [0]) for one in chosen])
        return frames.transpose(0, 1)


def frames_in(folder: str) -> list[str]:
    """The pictures in a folder, numbers in their names by value."""

    def key(name: str) -> list:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

    names = [name for name in os.listdir(folder) if name.lower().endswith(FRAME_SUFFIXES)]
    return [os.path.join(folder, name) for name in sorted(names, key=key)]


def count_frames(file: str) -> int:
    with _opened(file) as image:
        return getattr(image, "n_frames", 1)


def read_frames(file: str, channels: int, size: int, frames: Sequence[int]) -> Tensor:
    """[len(frames), channels, size, size] float32 in [-1, 1], of each frame the middle square, resized."""
    from PIL import Image

    pixels = []
    with _opened(file) as image:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        for frame in frames:
            if frame:
                image.seek(frame)
            square = image.convert("L" if channels == 1 else "RGB").resize(
                (size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side), reducing_gap=3.0
            )
            pixels.append(np.array(square).reshape(size, size, channels))
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


@contextlib.contextmanager
def _opened(file: str):
    """An image file; what goes wrong with it names it."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            yield image
    except (UnidentifiedImageError, OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"{file} is not a readable image: {error}") from error


def _read_text(file: str) -> str:
    path = Path(file).with_suffix(".txt")
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{file} has no text: {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable text in UTF-8: {error}") from error


def existing_folder(path: str | os.PathLike, name: str) -> Path:
    if not os.path.isdir(path):
        problem = "is not a folder" if os.path.exists(path) else "does not exist"
        raise FileNotFoundError(f"{name} is {path}, which {problem}")
    return Path(path)
