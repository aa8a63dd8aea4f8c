"""What one round's measurements say about the cost around its base point.

``Measurements`` holds the perturbations of a round; the estimators turn them and the losses told
into an ``Estimate``, one per variant.
"""

from __future__ import annotations

import dataclasses
import math
import typing as tp

import numpy as np

from . import recovery, sensing

FloatArray = np.ndarray


@dataclasses.dataclass
class Measurements:
    """The perturbations of a round, as stored: ``point(i) = clip(base + step(i))``.

    Attributes:
        base: ``[d]``.
        bounds: lower and upper bounds, ``[d]`` each, or None.
        leveled: ``[n] int64`` sorted coordinates that move by levels.
        integers: the same but for the weights of choices.
        rows: per measurement its row: ``[d]`` numbers or, for signs, bits (``sensing``).
        lengths: per measurement what its row is multiplied by.
        jumps: per measurement the steps of the coordinates with levels, ``[n] float32``.
        sums: per measurement the sum of its step.
        mixing: ``[m, d]`` what short rows are multiplied by (variant B), or None.
    """

    base: FloatArray
    bounds: tuple[FloatArray | None, FloatArray | None]
    leveled: np.ndarray
    integers: np.ndarray
    rows: list[np.ndarray] = dataclasses.field(default_factory=list)
    lengths: list[float] = dataclasses.field(default_factory=list)
    jumps: list[np.ndarray] = dataclasses.field(default_factory=list)
    sums: list[float] = dataclasses.field(default_factory=list)
    mixing: FloatArray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def bounded(self) -> bool:
        return self.bounds[0] is not None or self.bounds[1] is not None

    def clip(self, points: FloatArray, part: slice | np.ndarray = slice(None)) -> FloatArray:
        lower, upper = self.bounds
        if lower is not None:
            points = np.maximum(points, lower[part])
        if upper is not None:
            points = np.minimum(points, upper[part])
        return points

    def step(self, i: int) -> FloatArray:
        """The step from the base point to measurement ``i``, ``[d]``."""
        row = sensing.expand(self.rows[i], self.base.size)
        if self.mixing is not None:
            row = row @ self.mixing
        step = self.lengths[i] * row
        if self.bounded:
            step = self.clip(self.base + step) - self.base
        if self.leveled.size:
            step[self.leveled] = self.jumps[i]
        return step

    def steps(self, told: np.ndarray, part: np.ndarray) -> FloatArray:
        """Steps of the told measurements (``[n]``) in some coordinates, ``[n, len(part)]``."""
        if self.rows[0].dtype != np.uint8:
            return np.stack([self.step(int(i))[part] for i in told])
        rows = np.stack([self.rows[i] for i in told])
        shifts = (7 - part % 8).astype(np.uint8)
        signs = ((rows[:, part // 8] >> shifts) & 1) * 2.0 - 1.0
        return self._finished(signs, told, part)

    def _finished(
        self, signs: FloatArray, told: np.ndarray, part: slice | np.ndarray
    ) -> FloatArray:
        lengths = np.array([self.lengths[i] for i in told])
        steps = lengths[:, None] * signs
        if self.bounded:
            steps = self.clip(self.base[part] + steps, part) - self.base[part]
        if self.leveled.size:
            columns = np.arange(part.start, part.stop) if isinstance(part, slice) else part
            own = np.isin(columns, self.leveled)
            places = np.searchsorted(self.leveled, columns[own])
            steps[:, own] = np.stack([self.jumps[i] for i in told])[:, places]
        return steps

    def correlation(self, told: np.ndarray, values: FloatArray) -> FloatArray:
        """|Correlation| of every coordinate's steps with values, up to a factor, ``[d]``.

        Args:
            told: ``[n]``.
            values: ``[n + 1]`` centred, the base point's (whose steps are zero) first.
        """
        rows = np.stack([self.rows[i] for i in told])
        out = np.empty(self.base.size)
        for part, signs in sensing.blocks(rows, self.base.size):
            steps = self._finished(signs, told, part)
            squares = np.square(steps).sum(axis=0) - np.square(steps.sum(axis=0)) / values.size
            out[part] = np.abs(values[1:] @ steps) / np.sqrt(np.where(squares > 0, squares, np.inf))
        return out


@dataclasses.dataclass
class Estimate:
    """What a round found at its base point, in standardised space.

    Attributes:
        gradient: ``[d]``.
        support: ``[k] int64`` coordinates that matter.
        residual: part of the measured differences that is left unexplained, a ratio of norms.
        value: the cost at the base point, fitted.
        signal: root mean square of the differences from the base point.
        noise: standard deviation of one measurement around the fit; NaN if nothing tells.
        bend: cost that perturbations add on average, per squared length a knob; NaN if not fitted.
        common: the slope that all coordinates share, part of the gradient.
        shared: probability that they share one.
        bends: of a coordinate with levels, cost of a step either way, per unit length.
        left: ``[n + 1]`` what the fit leaves of the losses, the base point's first, or None.
        spread: mean squared residual of the long rows over that of the short ones, or NaN.
    """

    gradient: FloatArray
    support: np.ndarray
    residual: float
    value: float
    signal: float
    noise: float = math.nan
    bend: float = math.nan
    common: float = 0.0
    shared: float = 0.0
    bends: dict[int, float] = dataclasses.field(default_factory=dict)
    spread: float = math.nan
    left: FloatArray | None = None


def ratio(left: FloatArray | float, measured: FloatArray) -> float:
    size = float(np.linalg.norm(measured))
    return float(np.linalg.norm(left)) / size if size else 0.0


def _rms(losses: FloatArray) -> float:
    return float(np.sqrt(np.mean(np.square(losses[1:] - losses[0]))))


def cosamp(
    measurements: Measurements, told: np.ndarray, losses: FloatArray, sparsity: int
) -> Estimate:
    """Variants E and Z (CONGO-E, CONGO-Z): directional derivatives, then CoSaMP.

    Args:
        measurements: the round's.
        told: ``[n]`` which of them have a loss.
        losses: ``[n + 1]``, the base point's first.
        sparsity: columns to recover.
    """
    d = measurements.base.size
    lengths = np.array([measurements.lengths[i] for i in told])
    if measurements.bounded or measurements.leveled.size:  # what was cut is measured as cut
        rows = np.stack([measurements.step(int(i)) for i in told]) / lengths[:, None]
    else:
        rows = sensing.expand(np.stack([measurements.rows[i] for i in told]), d)
    y = (losses[1:] - losses[0]) / lengths
    found = recovery.cosamp(rows, y, sparsity)
    return Estimate(
        found.dense(d), found.support, ratio(found.residual, y), float(losses[0]), _rms(losses)
    )


def averaged(measurements: Measurements, told: np.ndarray, losses: FloatArray) -> Estimate:
    """Variant B (CONGO-B): averaged simultaneous perturbations, then basis pursuit.

    The error allowed is the standard error of the averages, taken from their spread.
    """
    assert measurements.mixing is not None
    signs = np.stack([measurements.rows[i] for i in told])
    slopes = (losses[1:] - losses[0]) / np.array([measurements.lengths[i] for i in told])
    terms = signs * slopes[:, None]
    y = terms.mean(axis=0)
    error = math.sqrt(terms.var(axis=0).sum() / len(told))
    found = recovery.basis_pursuit(measurements.mixing, y, error)
    dense = found.dense(measurements.base.size)
    return Estimate(dense, found.support, ratio(found.residual, y), float(losses[0]), _rms(losses))


def least_squares(measurements: Measurements, told: np.ndarray, losses: FloatArray) -> Estimate:
    """As many measurements as dimensions: no sparsity is needed."""
    steps = np.stack([measurements.step(int(i)) for i in told])
    y = losses[1:] - losses[0]
    gradient = np.linalg.lstsq(steps, y, rcond=None)[0]
    left = y - steps @ gradient
    degrees = told.size - measurements.base.size
    return Estimate(
        gradient,
        np.flatnonzero(gradient),
        ratio(left, y),
        float(losses[0]),
        _rms(losses),
        noise=float(np.linalg.norm(left)) / math.sqrt(degrees) if degrees > 2 else math.nan,
    )


def sparse(measurements: Measurements, told: np.ndarray, losses: FloatArray) -> Estimate:
    """Sparse regression in which the data choose the sparsity.

    The model of measurement ``j`` is ``f(x + p) = f0 + g.p + u sum(p) + c |p|^2 + b j +
    noise`` with a sparse ``g``. The loss at the base point is one more measurement, not the
    truth: ``f0`` is fitted. ``u`` is a slope common to all variables, as a price of resources
    is; with signs as rows ``c`` takes the whole diagonal of the Hessian with it; ``b`` is the
    drift of the cost during a round. ``u``, ``c`` and ``b`` enter only if the data want them. An
    integer has two more columns, for its steps up and those down: either may do nothing.
    """
    d, n = measurements.base.size, len(told) + 1
    lengths = np.array([measurements.lengths[i] for i in told])

    def centred(values: FloatArray) -> FloatArray:
        # Fitting f0 is centring, the base point (whose perturbation is zero) included.
        return values - values.sum(axis=0) / n

    def columns_of(part: np.ndarray) -> FloatArray:
        out = np.zeros((n, part.size))
        out[1:] = measurements.steps(told, part)
        return out

    y = centred(losses - losses[0])
    extra = np.zeros((n, 3))
    sums = [measurements.sums[i] for i in told]
    extra[1:] = np.column_stack([sums, np.square(lengths), told + 1])
    extra = centred(extra)
    limit = max(512, 4 * n)
    working = np.arange(d)
    left, kept = y, np.zeros(0, dtype=np.int64)
    for _ in range(3 if d > limit else 1):
        if d > limit:
            top = np.argpartition(measurements.correlation(told, left), d - limit)[d - limit :]
            working = np.union1d(top, kept)
        steps = columns_of(working)
        columns = [centred(steps)]
        integers = np.flatnonzero(np.isin(working, measurements.integers))
        if integers.size:
            columns += [centred(np.maximum(sign * steps[:, integers], 0.0)) for sign in (1, -1)]
        matrix = np.hstack([*columns, extra])
        # Of few knobs, as are most that have levels, one alone looks like a slope that all share.
        paid = int(measurements.leveled.size > 0)
        mean, inclusion = recovery.sparse_regression(
            matrix,
            y,
            d + 2 * measurements.integers.size + paid,
            extra.shape[1] - paid,
            intercept=True,
        )
        linear, probability = mean[: working.size].copy(), inclusion[: working.size].copy()
        sided = mean[working.size : -extra.shape[1]].reshape(2, -1)
        linear[integers] += 0.5 * (sided[0] - sided[1])
        # At a bound, a slope and that of one way are the same column and share its probability.
        either = inclusion[working.size : -extra.shape[1]].reshape(2, -1).sum(axis=0)
        probability[integers] = np.minimum(probability[integers] + either, 1.0)
        left = centred(y - matrix @ mean)
        signal = left + matrix[:, :-2] @ mean[:-2]  # without curvature and drift
        before, kept = kept, working[probability > 0.01]
        if np.array_equal(kept, before):
            break
    common = float(mean[-3])
    gradient = np.full(d, common)
    gradient[working] += linear
    gradient[measurements.leveled[~np.isin(measurements.leveled, measurements.integers)]] -= common
    degrees = max(n - 1 - float(inclusion.sum()), 1.0)
    squares = np.square(left[1:])
    long = lengths > np.mean(lengths)
    known = min(long.sum(), (~long).sum()) >= 3 and squares[~long].any()
    return Estimate(
        gradient,
        working[probability > 0.5],
        ratio(left, signal),
        float(losses[0] - left[0]),
        _rms(losses),
        noise=float(np.linalg.norm(left)) / math.sqrt(degrees),
        bend=float(mean[-2]),
        common=common,
        shared=float(inclusion[-3]),
        bends={
            int(working[i]): float(0.5 * sided[:, k].sum())
            for k, i in enumerate(integers)
            if either[k] > 0.5
        },
        spread=float(squares[long].mean() / squares[~long].mean()) if known else math.nan,
        left=left,
    )


def robust(
    estimator: tp.Callable[[Measurements, np.ndarray, FloatArray], Estimate],
    measurements: Measurements,
    told: np.ndarray,
    losses: FloatArray,
) -> Estimate:
    """An estimate that few measurements cannot carry away: losses far from the fit are drawn in."""
    middle = float(np.median(losses))
    width = 1.4826 * float(np.median(np.abs(losses - middle)))
    if width > 0:
        losses = np.clip(losses, middle - 10 * width, middle + 10 * width)
    found = estimator(measurements, told, losses)
    for _ in range(2):
        if found.left is None or found.residual < 1e-6:
            break
        width = 1.4826 * float(np.median(np.abs(found.left)))
        outlying = np.abs(found.left) > 6 * width
        if not outlying.any() or outlying.mean() > 0.25:
            break
        beyond = np.abs(found.left) - 3 * width
        losses = losses - np.where(outlying, np.sign(found.left) * beyond, 0.0)
        found = estimator(measurements, told, losses)
    return found
