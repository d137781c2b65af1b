"""Sample packs of guided-diffusion's evaluator: `.npz` files whose `arr_0` is uint8 `(N, H, W, 3)`.

Both directions go batch by batch: fifty thousand samples of 256x256 are ten gigabytes. Nothing is unpickled.
"""

import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from ..folders import writing

_MEMBER = "arr_0.npy"


def write_sample_pack(path: str | os.PathLike[str], batches: Iterable[torch.Tensor], count: int) -> None:
    """Write samples as the official evaluator reads them, whole or not at all.

    Args:
        path: Of the `.npz` file.
        batches: uint8 `(B, 3, H, W)`, all of one size.
        count: Of all samples; the header says it first.

    Raises:
        ValueError: If there are more or fewer samples than `count`, or they differ in size or type.
    """
    with (
        writing(Path(path)) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
        archive.open(_MEMBER, "w", force_zip64=True) as file,
    ):
        _write_array(file, batches, count)


class SamplePack:
    """The samples of a pack.

    Args:
        path: Of an `.npz` file with `arr_0`.

    Attributes:
        count: Samples.
        height: Pixels.
        width: Pixels.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no `.npz` file, or `arr_0` is missing or no uint8 array `(N, H, W, 3)`.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"There is no file {os.fspath(path)!r}.")
        with self._open() as file:
            shape, fortran, dtype = _read_header(file, os.fspath(path))
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
            raise ValueError(f"arr_0 in {os.fspath(path)!r} is {dtype} {shape}, not uint8 (N, H, W, 3) in C order.")
        self.count, self.height, self.width = shape[:3]

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[torch.Tensor]:
        """Yield samples `start` to `stop` as uint8 `(B, 3, H, W)`.

        Raises:
            ValueError: If the file ends too early.
        """
        stop = self.count if stop is None else min(stop, self.count)
        size = self.height * self.width * 3
        with self._open() as file:
            _read_header(file, str(self.path))
            file.seek(start * size, os.SEEK_CUR)
            for first in range(start, stop, batch_size):
                rows = min(batch_size, stop - first)
                content = file.read(rows * size)
                if len(content) != rows * size:
                    raise ValueError(f"{str(self.path)!r} ends before its {self.count} samples do.")
                array = np.frombuffer(content, np.uint8).reshape(rows, self.height, self.width, 3)
                yield torch.from_numpy(array.transpose(0, 3, 1, 2).copy())

    def _open(self) -> IO[bytes]:
        try:
            return zipfile.ZipFile(self.path).open(_MEMBER)
        except (zipfile.BadZipFile, KeyError) as error:
            raise ValueError(f"{str(self.path)!r} is no .npz file with arr_0: {error}.") from error


def _write_array(file: IO[bytes], batches: Iterable[torch.Tensor], count: int) -> None:
    shape: tuple[int, ...] | None = None
    written = 0
    for images in batches:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"Samples are {images.dtype} {tuple(images.shape)}; expected uint8 (B, 3, H, W).")
        array = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
        if shape is None:
            shape = array.shape[1:]
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
            np.lib.format.write_array_header_1_0(file, header)
        if array.shape[1:] != shape:
            raise ValueError(f"Samples of {array.shape[1:]} and {shape} cannot be in one pack.")
        file.write(array.tobytes())
        written += len(array)
    if written != count or not count:
        raise ValueError(f"{written} samples came where count={count} were to be written.")


def _read_header(file: IO[bytes], name: str) -> tuple[Any, bool, np.dtype]:
    try:
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return reader(file)
    except ValueError as error:
        raise ValueError(f"arr_0 in {name!r} is no array: {error}.") from error
