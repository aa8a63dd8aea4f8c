"""Arrays that the system keeps on disk and reads into memory as they are used."""

from __future__ import annotations

import mmap
import tempfile
from pathlib import Path

import numpy as np

CHUNK = 1 << 24  # bytes of a mapping, of which a process may have some 65,000
ALIGNMENT = 64  # bytes


class MappedArrays:
    """
    Copies arrays to a file without a name, which ends with them, and maps it into memory.

    Args:
        folder (`Path`):
            On a disk with room for them.

    Raises:
        OSError: The disk is full. (Writing to what has been mapped cannot fail.)
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._chunk: mmap.mmap | None = None
        self._end = 0  # of the file
        self._used = 0  # of the chunk

    def keep(self, array: np.ndarray) -> np.ndarray:
        """A copy of an array of numbers in the file."""
        if array.nbytes == 0:
            return array
        if self._chunk is None or self._used + array.nbytes > len(self._chunk):
            size = -(-array.nbytes // CHUNK) * CHUNK
            for _ in range(size // CHUNK):
                self._file.write(bytes(CHUNK))
            self._file.flush()
            self._chunk = mmap.mmap(self._file.fileno(), size, offset=self._end)
            self._end, self._used = self._end + size, 0
        copy = np.ndarray(array.shape, array.dtype, buffer=self._chunk, offset=self._used)
        copy[...] = array
        self._used = -(-(self._used + array.nbytes) // ALIGNMENT) * ALIGNMENT
        return copy
