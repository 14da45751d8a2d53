"""The .npz that the ADM evaluation suite reads (guided-diffusion's evaluations): written and read in pieces, so that
50,000 images need no more memory than a few."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from .metrics import Statistics

IMAGES, LABELS = "arr_0", "arr_1"
SETTINGS = "settings"
# Of features, and of spatial features for sFID, as ADM's reference batches have them.
STATISTICS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


def write_archive(
    path: Path, shape: tuple[int, ...], parts: Iterable[np.ndarray], labels: np.ndarray, settings: dict
) -> None:
    """Writes arr_0, uint8 of `shape` [N, H, W, 3] from `parts` along its first axis, arr_1, the labels [N], and the
    settings as JSON text. Raises OSError naming the file."""
    try:
        with open(path, "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                with archive.open(IMAGES + ".npy", "w", force_zip64=True) as member:
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(member, header)
                    for part in parts:
                        member.write(np.ascontiguousarray(part).data)
                for name, array in ((LABELS, labels), (SETTINGS, np.array(json.dumps(settings)))):
                    with archive.open(name + ".npy", "w") as member:
                        np.lib.format.write_array(member, array, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error


def read_settings(path: str | os.PathLike) -> dict | None:
    """What write_archive was given; None for anybody else's file."""
    with _open(path) as archive:
        return json.loads(str(archive[SETTINGS])) if SETTINGS in archive.files else None


class Archive:
    """Images of an .npz file with arr_0, uint8 [N, H, W, 3], maybe arr_1, labels, maybe statistics of features.

    Raises FileNotFoundError, or ValueError naming the file.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        with _open(path) as archive:
            names = archive.files
            self.labels = np.asarray(archive[LABELS]) if LABELS in names else None
            self.statistics = {
                kind: Statistics(*(np.asarray(archive[name], dtype=np.float64) for name in pair))
                for kind, pair in STATISTICS.items()
                if set(pair) <= set(names)
            }
        self.shape = self._check_images() if IMAGES in names else None
        if self.shape is None and not self.statistics:
            raise ValueError(f"{path} has {names}, must have images, arr_0, or statistics, mu and sigma")

    def __len__(self) -> int:
        return 0 if self.shape is None else self.shape[0]

    def _check_images(self) -> tuple[int, int, int, int]:
        with zipfile.ZipFile(self.path) as archive, archive.open(IMAGES + ".npy") as member:
            shape, fortran, dtype = _read_header(member)
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or fortran:
            raise ValueError(f"{self.path}: arr_0 is {dtype} {shape}, must be uint8 [N, H, W, 3]")
        return shape

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """All images in order, uint8 [at most `size`, H, W, 3]."""
        if self.shape is None:
            raise ValueError(f"{self.path} has no images, arr_0")
        with zipfile.ZipFile(self.path) as archive, archive.open(IMAGES + ".npy") as member:
            _read_header(member)
            image = int(np.prod(self.shape[1:]))
            for start in range(0, len(self), size):
                count = min(size, len(self) - start)
                data = member.read(count * image)
                if len(data) != count * image:
                    raise ValueError(f"{self.path} ends within image {start + len(data) // image}")
                yield np.frombuffer(data, np.uint8).reshape(count, *self.shape[1:])


def _open(path: str | os.PathLike):
    try:
        archive = np.load(path, allow_pickle=False)
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} is not an .npz file: {error}") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError(f"{path} is not an .npz file")
    return archive


def _read_header(member) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(member)
