"""The step without a learning rate: how far to go along estimated gradients, in any unit of cost.

A trust region. The model of the cost around the iterate is quadratic: the gradient is the round's
estimate, the curvature is learnt from how gradients changed between rounds. The step minimises the
model within a radius, and the radius follows how well the model predicted what was measured. All
decisions are ratios of costs, so multiplying the cost by a number changes no step (by a power of
two: no bit of one). Pure functions and one small class: nothing here knows of asks and tells.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

FloatArray = np.ndarray

# Pairs of a step and the change of the gradient over it that the curvature rests on.
_PAIRS = 12
# Coordinates whose mutual curvature is modelled; the others share one number.
_COUPLED = 96
# The line search lengthens a step so much at most: where the cost changes from round to round, what
# pays now may not pay for long.
_LONGEST = 4.0
# It gives up after as many probes.
_PROBES = 8


@dataclasses.dataclass
class Curvature:
    """A model of the Hessian: a matrix on some coordinates, one number on all the others.

    Attributes:
        pairs: steps and changes of the gradient, ``[d]`` each, oldest first.
    """

    pairs: list[tuple[FloatArray, FloatArray]] = dataclasses.field(default_factory=list)

    def learn(self, step: FloatArray, change: FloatArray, error: float) -> None:
        """Adds a pair.

        Args:
            step: ``[d]``.
            change: ``[d]``, of the gradient over the step.
            error: standard error of an entry of ``change``; a pair that says nothing is left out.
        """
        entries = math.sqrt(int(np.count_nonzero(change)))
        if (
            step.any()
            and np.isfinite(change).all()
            and float(np.linalg.norm(change)) > 2.0 * error * entries
        ):
            self.pairs = [*self.pairs[1 - _PAIRS :], (step, change)]

    def quadratic(self, d: int) -> Quadratic:
        """The Hessian that the pairs tell, by BFGS updates from the last pair's mean curvature."""
        if not self.pairs:
            return Quadratic(np.zeros(0, dtype=np.int64), np.zeros((0, 0)), 0.0)
        size = np.zeros(d)
        for _, change in self.pairs:
            size = np.maximum(size, np.abs(change) / np.abs(change).max())
        coupled = np.flatnonzero(size)
        if coupled.size > _COUPLED:
            coupled = np.sort(np.argpartition(-size, _COUPLED)[:_COUPLED])
        step, change = self.pairs[-1]
        product = float(step @ change)
        base = float(change @ change) / product if product > 0 else 0.0
        if base <= 0:
            base = float(np.linalg.norm(change) / np.linalg.norm(step))
        matrix = base * np.eye(coupled.size)
        for step, change in self.pairs:
            s, y = step[coupled], change[coupled]
            known = matrix @ s
            stretch, product = float(s @ known), float(s @ y)
            if stretch <= 0:
                continue
            if product < 0.1 * stretch:  # Powell's damping keeps the matrix positive
                share = 0.9 * stretch / (stretch - product)
                y = share * y + (1 - share) * known
                product = float(s @ y)
            if product > 1e-12 * float(np.linalg.norm(s) * np.linalg.norm(y)):
                matrix = matrix - np.outer(known, known) / stretch + np.outer(y, y) / product
        if not np.isfinite(matrix).all():
            matrix = base * np.eye(coupled.size)
        return Quadratic(coupled, matrix, base)


@dataclasses.dataclass
class Quadratic:
    """The Hessian ``H``: ``matrix`` on the ``coupled`` coordinates, ``base * I`` elsewhere."""

    coupled: np.ndarray
    matrix: FloatArray
    base: float

    def product(self, step: FloatArray) -> FloatArray:
        """``H step``, ``[d]``."""
        out = self.base * step
        out[self.coupled] = self.matrix @ step[self.coupled]
        return out

    def minimise(self, gradient: FloatArray, radius: float, free: np.ndarray) -> FloatArray:
        """The step that minimises ``g.s + s'Hs / 2`` with ``|s| <= radius``, ``[d]``.

        Args:
            gradient: ``[d]``.
            radius: above 0.
            free: ``[d] bool``, coordinates that may move.
        """
        g = np.where(free, gradient, 0.0)
        size = float(np.linalg.norm(g))
        if size == 0:
            return g
        inside = free[self.coupled]
        coupled = self.coupled[inside]
        values, vectors = np.linalg.eigh(self.matrix[np.ix_(inside, inside)])
        parts = vectors.T @ g[coupled]
        rest = g.copy()
        rest[coupled] = 0.0
        outside = float(np.linalg.norm(rest))
        floor = 1e-12 * size / radius
        lowest = min(float(values.min(initial=math.inf)), self.base if outside else math.inf)

        def length(shift: float) -> float:
            return math.hypot(
                float(np.linalg.norm(parts / (values + shift))), outside / (self.base + shift)
            )

        low = max(0.0, -lowest) + floor
        shift = low
        if length(low) > radius:
            high = low + size / radius  # there every part is at most radius long
            for _ in range(60):
                shift = 0.5 * (low + high)
                low, high = (shift, high) if length(shift) > radius else (low, shift)
            shift = high
        step = -rest / (self.base + shift)
        step[coupled] = -vectors @ (parts / (values + shift))
        return step


def next_probe(
    probes: list[tuple[float, float]], start: float, slope: float, error: float
) -> float | None:
    """Where along a step to measure next, as a multiple of it; None to settle with the best.

    Args:
        probes: multiples measured and their costs, in order of measurement; not empty.
        start: cost at multiple 0.
        slope: its derivative there, below 0.
        error: difference of two costs that noise explains.
    """
    t, cost = probes[-1]
    if len(probes) >= _PROBES:
        return None
    bend = (cost - start - slope * t) / t**2
    if all(other > start + error for _, other in probes):
        # Too far: the minimum of the parabola, well inside.
        shorter = min(t for t, _ in probes)
        return shorter * min(max(-slope / (2 * bend) / t, 0.1), 0.5) if bend > 0 else 0.25 * shorter
    if t < max(t for t, _ in probes):
        return None
    if cost >= start - error or any(cost >= other - error for _, other in probes[:-1]):
        return None
    target = -slope / (2 * bend) / t if bend > 0 else math.inf
    return min(t * target, _LONGEST) if target > 1.5 and t < _LONGEST else None
