"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """
    A file to write that takes the place of `path` once it is complete and on the disk.

    Args:
        path (`Path`):
            File to write. What an interrupted writing leaves beside it, a hidden file that ends in
            `.partial`, is overwritten by the next.
    """
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Writes a file of JSON."""
    with replacing(path) as file:
        file.write(f"{json.dumps(value, indent=indent)}\n".encode())
