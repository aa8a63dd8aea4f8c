"""Sparse recovery: the vector with few non-zeros that explains a few linear measurements.

CoSaMP and basis pursuit, which the paper's variants use, and the search with unknown sparsity that
``CONGO`` uses. Pure functions of their arguments: nothing here knows of optimizers or of rounds.
"""

from __future__ import annotations

import math
import typing as tp

import numpy as np

FloatArray = np.ndarray

# Primal-dual iterations between two looks at all columns.
_SWEEP = 50


class Recovery(tp.NamedTuple):
    """A sparse vector and what it leaves unexplained.

    Attributes:
        support: ``[k] int64`` sorted positions of the entries that may differ from zero.
        coefficients: ``[k] float64`` their values.
        residual: Euclidean norm of ``measurements - matrix @ x``.
    """

    support: np.ndarray
    coefficients: FloatArray
    residual: float

    def dense(self, dimension: int) -> FloatArray:
        """The vector itself, ``[dimension] float64``."""
        x = np.zeros(dimension)
        x[self.support] = self.coefficients
        return x


def _checked(matrix: FloatArray, measurements: FloatArray) -> tuple[FloatArray, FloatArray]:
    a = np.asarray(matrix, dtype=float)
    y = np.asarray(measurements, dtype=float)
    if a.ndim != 2 or y.shape != a.shape[:1] or not a.size:
        raise ValueError(
            f"matrix has shape {a.shape} and measurements {y.shape}: "
            "expected a non-empty [m, d] and [m]"
        )
    # One pass without a temporary array: a sum is finite only if every entry is.
    if not (math.isfinite(y.sum()) and math.isfinite(a.sum())):
        raise ValueError("matrix and measurements must be finite: drop the failed measurements")
    return a, y


def _largest(values: FloatArray, count: int) -> np.ndarray:
    if count >= values.size:
        return np.arange(values.size)
    return np.argpartition(values, values.size - count - 1)[values.size - count :]


def cosamp(
    matrix: FloatArray,
    measurements: FloatArray,
    sparsity: int,
    *,
    max_iterations: int = 20,
    tolerance: float = 1e-10,
) -> Recovery:
    """Compressive sampling matching pursuit (CoSaMP; Needell and Tropp 2009).

    Each iteration joins the ``2 * sparsity`` columns most correlated with the residual to the
    current support, fits by least squares (the shortest fit, where the measurements cannot tell the
    columns apart) and keeps the ``sparsity`` largest coefficients, which are fitted again. Stops as
    soon as an iteration does not reduce the residual, and returns
    the best iterate.

    Args:
        matrix: ``[m, d]``.
        measurements: ``[m]``.
        sparsity: largest number of non-zeros, between 1 and ``d``; more than ``m`` cannot be
            told apart and are cut to ``m``.
        max_iterations: upper limit; noise-free problems take two or three.
        tolerance: residual, relative to the norm of the measurements, that counts as zero.

    Raises:
        ValueError: for shapes that do not fit, entries that are not finite, or a sparsity outside
            ``[1, d]``.
    """
    a, y = _checked(matrix, measurements)
    m, d = a.shape
    if not 1 <= sparsity <= d:
        raise ValueError(f"sparsity is {sparsity}: expected a number between 1 and d = {d}")
    sparsity = min(sparsity, m)
    norm = float(np.linalg.norm(y))
    best = Recovery(np.zeros(0, dtype=np.int64), np.zeros(0), norm)
    residual = y
    for _ in range(max_iterations):
        if best.residual <= tolerance * norm:
            break
        merged = np.union1d(best.support, _largest(np.abs(residual @ a), 2 * sparsity))
        columns = a[:, merged]
        fit = np.linalg.lstsq(columns, y, rcond=None)[0]
        kept = np.sort(_largest(np.abs(fit), sparsity))
        columns = columns[:, kept]
        fit = np.linalg.lstsq(columns, y, rcond=None)[0]
        candidate = y - columns @ fit
        left = float(np.linalg.norm(candidate))
        if left >= best.residual * (1 - 1e-12):
            break
        best, residual = Recovery(merged[kept], fit, left), candidate
    return best


def basis_pursuit(
    matrix: FloatArray,
    measurements: FloatArray,
    error: float = 0.0,
    *,
    max_iterations: int = 2000,
    tolerance: float = 1e-6,
) -> Recovery:
    """Basis pursuit with bounded error: ``min ||x||_1`` subject to ``||A x - y||_2 <= error``.

    The primal-dual iteration of Chambolle and Pock (2011, Algorithm 1) on a working set of
    columns. Every few iterations the support that it points to is completed to an exact solution,
    which is returned if it satisfies the optimality conditions over *all* columns; columns that
    violate them join the working set. So the answer is certified, or as good as the iterations
    allowed.

    Args:
        matrix: ``[m, d]``.
        measurements: ``[m]``.
        error: radius of the ball around the measurements, at least 0, in their unit.
        max_iterations: upper limit of primal-dual iterations, over all working sets.
        tolerance: violation of the optimality conditions that counts as none, relative.

    Raises:
        ValueError: for shapes that do not fit, entries that are not finite, or a negative error.
    """
    a, y = _checked(matrix, measurements)
    if not error >= 0:
        raise ValueError(f"error is {error}: expected a finite number of at least 0")
    m, d = a.shape
    norm = float(np.linalg.norm(y))
    if norm <= error:
        return Recovery(np.zeros(0, dtype=np.int64), np.zeros(0), norm)
    correlation = np.abs(y @ a)
    x, dual = np.zeros(d), np.zeros(m)
    working = np.sort(_largest(correlation, min(d, 3 * m)))
    for _ in range(0, max_iterations, _SWEEP):
        columns = np.ascontiguousarray(a[:, working])
        bound = float(np.linalg.norm(columns, 2))
        # The steps' ratio is that of the solutions' sizes, which the matched filter tells up to a
        # factor; 0.1 was the fastest of 0.03 to 3 at d = 1,000 and 10,000, with and without error.
        ratio = 0.1 * correlation.max() / math.sqrt(np.square(columns).sum(axis=0).max())
        tau, sigma = ratio / bound, 1.0 / (ratio * bound)
        part = extrapolated = x[working]
        for _ in range(_SWEEP):
            dual = dual + sigma * (columns @ extrapolated - y)
            if error:
                size = float(np.linalg.norm(dual))
                dual = dual * (max(0.0, 1.0 - sigma * error / size) if size else 0.0)
            step = part - tau * (dual @ columns)
            updated = np.sign(step) * np.maximum(np.abs(step) - tau, 0.0)
            extrapolated = 2 * updated - part
            part = updated
        exact = _complete(columns, y, part, dual, error, tolerance)
        if exact is not None:
            part, certificate = exact
        else:
            certificate = dual
        x[working] = part
        slack = np.abs(certificate @ a)
        slack[working] = 0.0
        violating = np.flatnonzero(slack > 1.0 + tolerance)
        if exact is not None and not violating.size:
            break
        if violating.size:
            violating = violating[_largest(slack[violating], m)]
            keep = working[(x[working] != 0) | (np.abs(dual @ columns) > 0.5)]
            working = np.union1d(keep, violating)
    support = np.flatnonzero(x)
    left = float(np.linalg.norm(y - a[:, support] @ x[support]))
    return Recovery(support, x[support], left)


def _complete(
    columns: FloatArray,
    y: FloatArray,
    x: FloatArray,
    dual: FloatArray,
    error: float,
    tolerance: float,
) -> tuple[FloatArray, FloatArray] | None:
    """The solution with the support and signs of ``x``, if it is optimal over these columns.

    With ``S`` the support and ``s`` the signs, the conditions are ``A_S' u = s``, ``|A' u| <= 1``
    and ``y - A x = (error / ||u||) u``; ``-dual`` approximates ``u``.
    """
    support = np.flatnonzero(np.abs(x) > 1e-9 * np.abs(x).max(initial=0.0))
    if not 0 < support.size <= y.size:
        return None
    basis = columns[:, support]
    signs = np.sign(x[support])
    gram = basis.T @ basis
    try:
        if error:
            toward, least = np.linalg.solve(gram, np.stack([signs, y @ basis], axis=1)).T
            outside = y - basis @ least
            spare = error**2 - float(outside @ outside)
            if spare <= 0:
                return None
            multiplier = math.sqrt(spare / float(signs @ toward))
            fit = least - multiplier * toward
            u = (y - basis @ fit) / multiplier
        else:
            fit = np.linalg.solve(gram, y @ basis)
            if np.linalg.norm(y - basis @ fit) > tolerance * np.linalg.norm(y):
                return None
            # The nearest point to -dual that satisfies the equalities on the support.
            u = -dual + basis @ np.linalg.solve(gram, signs + dual @ basis)
    except np.linalg.LinAlgError:
        return None
    if np.any(np.sign(fit) != signs) or np.abs(u @ columns).max() > 1.0 + tolerance:
        return None
    completed = np.zeros_like(x)
    completed[support] = fit
    return completed, -u


def sparse_regression(
    columns: FloatArray, measurements: FloatArray, dimension: int, free: int = 0
) -> tuple[FloatArray, FloatArray]:
    """Sparse regression with the number of non-zeros left to the data.

    For every size ``k`` a support is searched greedily: the best column joins, then columns are
    exchanged as in subspace pursuit (Dai and Milenkovic 2009). The supports found are averaged with
    the weight of their posterior probability: the marginal likelihood of the linear model under
    Zellner's g-prior with the empirical-Bayes ``g`` (Liang et al. 2008), times a prior
    that is uniform over sizes and, within a size, over the ``C(dimension, k)`` supports. A
    support's coefficients are least squares shrunk by ``g / (1 + g)``; the empty one takes part
    with zeros, so measurements that say nothing return (almost) nothing.

    Args:
        columns: ``[n, c]`` candidate columns.
        measurements: ``[n]``.
        dimension: number of columns that the other ``c - free`` candidates were screened from.
        free: number of columns, the last ones, that do not count as picked among many.

    Returns:
        The mean of the coefficients, ``[c]``, and the probability that each is not zero, ``[c]``.
    """
    n, c = columns.shape
    mean, inclusion = np.zeros(c), np.zeros(c)
    norms = np.sqrt(np.square(columns).sum(axis=0))
    usable = norms > 1e-9 * norms.max(initial=0.0)
    total = float(measurements @ measurements)
    if total == 0 or not usable.any():
        return mean, inclusion
    scaled = columns / np.where(usable, norms, np.inf)
    gram = scaled.T @ scaled
    target = measurements @ scaled

    def fit(chosen: np.ndarray) -> tuple[FloatArray, float]:
        basis = scaled[:, chosen]
        coefficients = np.linalg.lstsq(basis, measurements, rcond=None)[0]
        left = measurements - basis @ coefficients
        return coefficients, float(left @ left)

    def score(chosen: np.ndarray, coefficients: FloatArray) -> FloatArray:
        value = np.abs(target - gram[:, chosen] @ coefficients)
        value[chosen] = -1.0
        return value

    chosen, coefficients = np.zeros(0, dtype=np.int64), np.zeros(0)
    models = [(0.0, chosen, coefficients)]
    best_size = 0
    for k in range(1, min(n - 2, int(usable.sum())) + 1):
        chosen = np.append(chosen, int(np.argmax(score(chosen, coefficients))))
        coefficients, left = fit(chosen)
        for _ in range(5):
            rivals = _largest(score(chosen, coefficients), min(k, n - 1 - k, c - k))
            merged = np.append(chosen, rivals)
            trial = merged[_largest(np.abs(fit(merged)[0]), k)]
            trial_coefficients, trial_left = fit(trial)
            if trial_left >= left * (1 - 1e-9):
                break
            chosen, coefficients, left = trial, trial_coefficients, trial_left
        # Round-off, not signal, below this: the measurements are differences of rounded numbers.
        unexplained = max(left / total, 1e-14)
        g = max((1 - unexplained) / k / (unexplained / (n - k)) - 1.0, 0.0)
        evidence = 0.5 * (n - k) * math.log1p(g) - 0.5 * n * math.log1p(g * unexplained)
        paid = int(np.count_nonzero(chosen < c - free))
        evidence += (
            math.lgamma(paid + 1) + math.lgamma(dimension - paid + 1) - math.lgamma(dimension + 1)
        )
        models.append((evidence, chosen, coefficients * g / (1 + g)))
        if evidence > models[best_size][0]:
            best_size = k
        # Sizes far beyond the best one have no weight: a limit on time, not on the answer.
        if unexplained <= 1e-14 or k > best_size + 15:
            break
    top = models[best_size][0]
    weights = np.array([math.exp(evidence - top) for evidence, _, _ in models])
    weights /= weights.sum()
    for weight, (_, chosen, coefficients) in zip(weights, models):
        mean[chosen] += weight * coefficients
        inclusion[chosen] += weight
    return mean / np.where(usable, norms, 1.0), inclusion
