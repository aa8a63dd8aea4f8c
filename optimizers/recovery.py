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
# Supports of each size that the sparse regression keeps.
_BEAM = 32


class Recovery(tp.NamedTuple):
    """A sparse vector and what it leaves unexplained.

    Attributes:
        support: ``[k] int64`` sorted positions of the entries that may differ from zero.
        coefficients: ``[k] float64`` their values.
        residual: Euclidean norm of ``measurements - matrix @ x``.

    Example:

    ```python
    >>> import numpy as np
    >>> from trimtab.optimizers import Recovery
    >>> found = Recovery(np.array([1, 3]), np.array([2.0, -1.0]), residual=0.0)
    >>> found.dense(5)
    array([ 0.,  2.,  0., -1.,  0.])
    ```
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

    Returns:
        A ``Recovery`` of at most ``sparsity`` entries.

    Raises:
        ValueError: for shapes that do not fit, entries that are not finite, or a sparsity outside
            ``[1, d]``.

    Example:

    ```python
    >>> import numpy as np
    >>> from trimtab.optimizers import cosamp
    >>> matrix = np.random.default_rng(0).standard_normal((20, 100))
    >>> found = cosamp(matrix, 2.0 * matrix[:, 7] - matrix[:, 40], sparsity=2)
    >>> found.support, found.coefficients.round(6)
    (array([ 7, 40]), array([ 2., -1.]))
    ```
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

    Returns:
        A ``Recovery``; the empty one if zero satisfies the constraint.

    Raises:
        ValueError: for shapes that do not fit, entries that are not finite, or a negative error.

    Example:

    ```python
    >>> import numpy as np
    >>> from trimtab.optimizers import basis_pursuit
    >>> matrix = np.random.default_rng(0).standard_normal((20, 100))
    >>> found = basis_pursuit(matrix, 2.0 * matrix[:, 7] - matrix[:, 40])
    >>> found.support, found.coefficients.round(6)
    (array([ 7, 40]), array([ 2., -1.]))
    ```
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
    columns: FloatArray,
    measurements: FloatArray,
    dimension: int,
    free: int = 0,
    intercept: bool = False,
) -> tuple[FloatArray, FloatArray]:
    """Sparse regression with the number of non-zeros left to the data.

    A beam search: every support kept at one size is extended by every column, and the most probable
    extensions are the supports of the next size (orthogonal least squares is the same with a beam
    of one). All supports that were kept, of every size, are averaged with the weight of their
    posterior probability: the marginal likelihood of the linear model under Zellner's
    g-prior with the empirical-Bayes ``g`` (Liang et al. 2008), times a prior that is uniform over
    sizes and, within a size, over the ``C(dimension, k)`` supports. A support's coefficients are
    least squares shrunk by ``g / (1 + g)``; the empty one takes part with zeros, so measurements
    that say nothing return (almost) nothing.

    Args:
        columns: ``[n, c]`` candidate columns.
        measurements: ``[n]``.
        dimension: number of columns that the other ``c - free`` candidates were screened from.
        free: number of columns, the last ones, that do not count as picked among many.
        intercept: columns and measurements are centred: an intercept took one of the ``n``
            degrees of freedom.

    Returns:
        The mean of the coefficients, ``[c]``, and the probability that each is not zero, ``[c]``.
    """
    n, c = columns.shape
    degrees = n - int(intercept)
    mean, inclusion = np.zeros(c), np.zeros(c)
    norms = np.sqrt(np.square(columns).sum(axis=0))
    usable = norms > 1e-9 * norms.max(initial=0.0)
    total = float(measurements @ measurements)
    if total == 0 or not usable.any():
        return mean, inclusion
    scaled = columns / np.where(usable, norms, np.inf)
    largest = min(degrees - 1, int(usable.sum()))
    log_prior = np.array(
        [
            math.lgamma(k + 1) + math.lgamma(dimension - k + 1) - math.lgamma(dimension + 1)
            for k in range(min(max(largest, 0), dimension) + 1)
        ]
    )
    costs = np.arange(c) < c - free

    def evidence(left: FloatArray, k: int, paid: np.ndarray) -> tuple[FloatArray, FloatArray]:
        # Round-off, not signal, below 1e-14: the measurements are differences of rounded numbers.
        unexplained = np.maximum(left / total, 1e-14)
        g = np.maximum((1 - unexplained) / k / (unexplained / (degrees - k)) - 1.0, 0.0)
        fit = 0.5 * (degrees - k) * np.log1p(g) - 0.5 * degrees * np.log1p(g * unexplained)
        return fit + log_prior[paid], g

    # The beam, one row a support: its columns, an orthonormal basis of their span, the residual,
    # and how much of every column (squared) is outside the span.
    supports, bases = np.zeros((1, 0), dtype=np.int64), np.zeros((1, 0, n))
    residuals, outside = measurements[None], usable[None].astype(float)
    # A support is known by the sum of its columns' random tags, whatever their order.
    tag_of: np.ndarray = np.random.default_rng(0).integers(1 << 62, size=(c,))
    tag = np.zeros(1, dtype=np.int64)
    models = [(np.zeros(1), supports, np.ones(1))]  # log evidence, supports, shrinkage
    top, best_size = 0.0, 0
    for k in range(1, largest + 1):
        gain = np.square(residuals @ scaled) / np.where(outside > 1e-6, outside, np.inf)
        left = np.square(residuals).sum(axis=1)[:, None] - gain
        left[outside <= 1e-6] = np.inf
        # Ranked by fit, then by evidence; a support is reached from at most k parents. Columns that
        # cost nothing stand in a class of their own.
        order = np.union1d(
            _largest(-left.ravel(), k * _BEAM),
            np.flatnonzero(np.broadcast_to(~costs, left.shape)),
        )
        order = order[np.isfinite(left.ravel()[order])]
        if not order.size:
            break
        parents, joined = np.divmod(order, c)
        paid = costs[supports].sum(axis=1)[parents] + costs[joined]
        score = evidence(np.maximum(left.ravel()[order], 0.0), k, paid)[0]
        ranked = np.argsort(-score, kind="stable")
        parents, joined = parents[ranked], joined[ranked]
        tags = tag[parents] + tag_of[joined]
        _, first = np.unique(tags, return_index=True)
        kept = np.sort(first)[:_BEAM]
        tag, parents, joined = tags[kept], parents[kept], joined[kept]
        supports = np.column_stack([supports[parents], joined])
        spans, direction = bases[parents], scaled[:, joined].T
        for _ in range(2):  # once more, for what rounding left
            inner = (spans @ direction[:, :, None]).transpose(0, 2, 1)
            direction = direction - (inner @ spans)[:, 0]
        direction /= np.linalg.norm(direction, axis=1)[:, None]
        residuals = residuals[parents]
        residuals = residuals - (residuals * direction).sum(axis=1)[:, None] * direction
        outside = outside[parents] - np.square(direction @ scaled)
        outside[np.arange(len(joined)), joined] = 0.0
        bases = np.concatenate([spans, direction[:, None]], axis=1)
        left = np.square(residuals).sum(axis=1)
        logs, g = evidence(left, k, costs[supports].sum(axis=1))
        models.append((logs, supports, g / (1 + g)))
        if logs.max() > top:
            top, best_size = float(logs.max()), k
        # Sizes far beyond the best one have no weight: a limit on time, not on the answer.
        if left.min() <= 1e-14 * total or k > best_size + 10:
            break
    weights = [np.exp(logs - top) for logs, _, _ in models]
    weights = [np.where(weight > 1e-4, weight, 0.0) for weight in weights]
    everything = sum(float(weight.sum()) for weight in weights)
    for weight, (_, supports, shrinkage) in zip(weights[1:], models[1:]):
        some = weight > 0
        if not some.any():
            continue
        chosen, weight = supports[some], weight[some, None] / everything
        picked = scaled.T[chosen]  # [supports, k, n]
        gram = picked @ picked.transpose(0, 2, 1)
        fit = np.linalg.solve(gram, (picked @ measurements)[:, :, None])[:, :, 0]
        np.add.at(mean, chosen, weight * shrinkage[some, None] * fit)
        np.add.at(inclusion, chosen, np.broadcast_to(weight, chosen.shape))
    return mean / np.where(usable, norms, 1.0), inclusion
