"""Measurement ensembles: the random directions along which a round measures.

A row is drawn when a candidate is asked for and kept until the round ends, signs as single bits:
at ``d = 10^6`` and 232 rows that is 29 MB instead of the 1.9 GB of a dense Gaussian. All
randomness comes from the generator that is passed in.
"""

from __future__ import annotations

import typing as tp

import numpy as np


def gaussian(rng: np.random.RandomState, dimension: int) -> np.ndarray:
    """A row of independent standard normals, ``[dimension] float64`` (variant E)."""
    return rng.standard_normal(dimension)


def rademacher(rng: np.random.RandomState, dimension: int) -> np.ndarray:
    """A row of independent fair signs, ``[ceil(dimension / 8)] uint8``, one bit a sign.

    ``expand`` turns it into numbers (variants Z and adaptive).
    """
    return np.frombuffer(rng.bytes((dimension + 7) // 8), dtype=np.uint8)


def orthogonal(rng: np.random.RandomState, dimension: int) -> np.ndarray:
    """Rows in uniformly random orthogonal directions, of norm ``sqrt(dimension)``.

    ``[dimension, dimension] float64``. Random signs would leave some direction unmeasured even
    with as many rows as dimensions; these do not.
    """
    q, r = np.linalg.qr(rng.standard_normal((dimension, dimension)))
    return q * np.sign(np.diag(r)) * np.sqrt(dimension)


def expand(rows: np.ndarray, dimension: int) -> np.ndarray:
    """Stored rows as numbers: ``[..., dimension] float64``."""
    if rows.dtype != np.uint8:
        return rows
    bits = np.unpackbits(rows, axis=-1, count=dimension)
    signs = bits.astype(np.float64)
    signs *= 2.0
    signs -= 1.0
    return signs


def blocks(rows: np.ndarray, dimension: int) -> tp.Iterator[tuple[slice, np.ndarray]]:
    """The expanded matrix in blocks of columns of at most 32 MB, with their positions.

    Args:
        rows: ``[n, dimension] float64`` or ``[n, ceil(dimension / 8)] uint8``.
        dimension: number of columns.

    Yields:
        A slice of columns and the block, ``[n, columns] float64``.
    """
    width = max(8, (1 << 22) // max(len(rows), 1) // 8 * 8)
    for start in range(0, dimension, width):
        stop = min(start + width, dimension)
        part = (
            rows[:, start // 8 : (stop + 7) // 8] if rows.dtype == np.uint8 else rows[:, start:stop]
        )
        yield slice(start, stop), expand(part, stop - start)
