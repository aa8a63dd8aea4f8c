"""CONGO: compressive online gradient optimization, as optimizers of Nevergrad.

A round measures the current point and a few random perturbations of *all* variables at once,
recovers the sparse gradient from the differences and takes one projected descent step (Duggal et
al., "CONGO: Compressive Online Gradient Optimization", ICLR 2025, arXiv 2407.06325). Importing this
module registers ``CONGO``, ``CONGO_B``, ``CONGO_Z`` and ``CONGO_E``.
"""

from __future__ import annotations

import dataclasses
import math
import typing as tp

import nevergrad as ng
import numpy as np
from nevergrad.common import errors
from nevergrad.optimization import base, utils
from nevergrad.parametrization import _datalayers

from . import recovery, sensing

FloatArray = np.ndarray

# A loss that Nevergrad clips to (NaN and +inf become this number) is a failed evaluation.
_FAILED = 5.0e20
_META = "congo"
_PLATEAU = "all losses are equal"


@dataclasses.dataclass(frozen=True)
class Round:
    """What one completed round found: ``optimizer.last_round``.

    Attributes:
        number: rounds completed, this one included.
        support: gradient entries (standardised space) by parameter name, largest first.
        common: slope that the estimate gives to every variable, those of the support included: the
            price of resources, for example. 0 but for the adaptive variant.
        residual: part of the measured differences (curvature and drift taken out, in the adaptive
            variant) that the estimate leaves unexplained: a ratio of norms, 0 for a perfect fit
            and 1 for none.
        measurements: evaluations that the estimate rests on, the base point included.
        lost: evaluations asked for in the round and not used: unanswered, failed, or rejected by a
            cheap constraint.
        perturbation: mean Euclidean length of the perturbations, in standardised space.
        step: Euclidean length of the step taken; 0 for a skipped round.
        skipped: why no step was taken, or an empty string.
    """

    number: int
    support: dict[str, float]
    common: float
    residual: float
    measurements: int
    lost: int
    perturbation: float
    step: float
    skipped: str


def _ratio(left: float, measured: FloatArray) -> float:
    size = float(np.linalg.norm(measured))
    return left / size if size else 0.0


def _leaves(parameter: ng.p.Parameter, path: str = "") -> list[tuple[str, ng.p.Parameter]]:
    """The parameters that own coordinates, with their names, in standardised order."""
    if isinstance(parameter, ng.p.Instrumentation):
        args, kwargs = parameter[0], parameter[1]
        return _leaves(args, path) + _leaves(kwargs, path)
    if isinstance(parameter, ng.p.Container):
        content = parameter._content
        found = []
        for key in sorted(content):  # the order in which containers concatenate their data
            found += _leaves(content[key], f"{path}.{key}" if path else str(key))
        return found
    return [(path, parameter)] if parameter.dimension else []


def coordinate_name(parametrization: ng.p.Parameter, coordinate: int) -> str:
    """The name of a coordinate of the standardised space: ``"pool"``, ``"cpu[3]"``, ``"net.a[0]"``.

    Args:
        parametrization: the optimizer's parametrization.
        coordinate: a position in its standardised data.

    Raises:
        IndexError: for a position outside the standardised data.
    """
    offset = coordinate
    for name, leaf in _leaves(parametrization):
        if 0 <= offset < leaf.dimension:
            shape = leaf._value.shape if isinstance(leaf, ng.p.Data) else (leaf.dimension,)
            if leaf.dimension == 1 and name:
                return name
            return (
                f"{name or 'x'}[{','.join(str(int(k)) for k in np.unravel_index(offset, shape))}]"
            )
        offset -= leaf.dimension
    raise IndexError(f"coordinate is {coordinate}: expected 0 to {parametrization.dimension - 1}")


def standardized_bounds(
    parametrization: ng.p.Parameter,
) -> tuple[FloatArray | None, FloatArray | None]:
    """Lower and upper bounds of every coordinate in standardised space, ``[d]`` each.

    ``None`` where no coordinate has one. Bounds by ``arctan``, ``tanh`` or ``gaussian`` transforms
    leave the standardised space unbounded, and so do bounds behind another operation: there the
    parametrization itself keeps values inside.
    """
    lower, upper = [], []
    for _, leaf in _leaves(parametrization):
        low, high = np.full(leaf.dimension, -np.inf), np.full(leaf.dimension, np.inf)
        if isinstance(leaf, ng.p.Data):
            operations = _datalayers.Operation.filter_from(leaf)
            layer = operations[0] if operations else None
            method = getattr(layer, "_method", "constraint")
            if (
                isinstance(layer, _datalayers.BoundLayer)
                and not isinstance(layer, _datalayers.Modulo)
                and method in ("bouncing", "clipping", "constraint")
            ):
                for bound, out in zip(layer.bounds, (low, high)):
                    if bound is not None:
                        whole = np.broadcast_to(bound, leaf._value.shape)
                        out[:] = leaf._to_reduced_space(whole - leaf._value)
        lower.append(low)
        upper.append(high)
    lows, highs = np.concatenate(lower), np.concatenate(upper)
    return (
        lows if np.isfinite(lows).any() else None,
        highs if np.isfinite(highs).any() else None,
    )


class _CONGO(base.Optimizer):
    """The optimizer behind ``ParametrizedCONGO``, where the options are documented.

    Attributes:
        num_measurements: perturbations that the recovery rests on (``m``).
        evaluations_per_round: tells that complete a round.
        num_rounds: rounds completed.
        gradient: the last estimate in standardised space, ``[d] float64``; None before the first.
        last_round: a ``Round``; None before the first is complete.
    """

    def __init__(
        self,
        parametrization: base.IntOrParameter,
        budget: int | None = None,
        num_workers: int = 1,
        *,
        config: ParametrizedCONGO | None = None,
    ) -> None:
        super().__init__(parametrization, budget=budget, num_workers=num_workers)
        self._config = ParametrizedCONGO() if config is None else config
        d, c = self.dimension, self._config
        if c.sparsity is not None and c.sparsity > d:
            raise ValueError(
                f"sparsity is {c.sparsity}, above the dimension {d} of the parametrization: "
                f"choose at most {d}, or None"
            )
        self.sparsity = c.sparsity or max(1, min(d // 10, 10))
        m = c.num_measurements
        if m is None:
            m = max(1, math.ceil(2 * self.sparsity * math.log(d / self.sparsity)))
            if c.variant == "adaptive":
                # Idle workers measure too: the round fills its last batch of evaluations.
                m = math.ceil((m + 1) / num_workers) * num_workers - 1
            m = min(m, d)
        elif c.variant == "adaptive" and m == 1 < d:
            raise ValueError(
                f"num_measurements is 1 in dimension {d}: one difference tells no variable from "
                "another, nor from noise; variant 'adaptive' needs at least 2"
            )
        self.num_measurements = m
        self.evaluations_per_round = 1 + ((c.num_perturbations or 3 * m) if c.variant == "B" else m)
        if budget is not None and budget < self.evaluations_per_round:
            self._warn(
                f"budget is {budget}, but a round of {c.name} in dimension {d} takes "
                f"{self.evaluations_per_round} evaluations: no step will be taken. Raise the "
                "budget, or lower num_measurements",
                errors.InefficientSettingsWarning,
            )
        # Nevergrad keeps up to 1,000 points whatever their size; these fit in 256 MB.
        max_len = int(min(max((1 << 28) // (16 * d), 4), 1000))
        self.pruning = utils.Pruning(min_len=max(max_len // 3, 1), max_len=max_len)
        self.num_rounds = 0
        self.gradient: FloatArray | None = None
        self.last_round: Round | None = None
        self._lower, self._upper = standardized_bounds(self.parametrization)
        self._x = np.zeros(d)
        self._last_good = self._x
        self._x_loss = math.inf  # the last loss at an iterate
        self._unsure = False  # evaluations failed near the iterate, and it is not evaluated yet
        self._common = 0.0
        self._length = c.delta or (0.1 if c.variant == "adaptive" else 0.05)
        self._round_id = 0
        self._uids: list[str] = []
        self._old_uids: list[str] = []
        self._start_round()

    # -- a round -----------------------------------------------------------------------------

    def _start_round(self) -> None:
        """Forgets the measurements of the last round; its unanswered candidates become stale."""
        self._round_id += 1
        self._asked.difference_update(self._old_uids)  # or they would add up over lost workers
        self._old_uids, self._uids = self._uids, []
        self._rows: list[np.ndarray] = []
        self._lengths: list[float] = []
        self._sums: list[float] = []
        self._losses: dict[int, float] = {}
        self._mixing: FloatArray | None = None
        self._base_asked = 0

    def _internal_ask_candidate(self) -> ng.p.Parameter:
        everything_out = len(self._rows) >= self.evaluations_per_round - 1
        # Beyond a round's worth of asks some answers are late or lost: first the base point is
        # asked again, on which all differences rest, then fresh perturbations stand in.
        extra = len(self._rows) - (self.evaluations_per_round - 1)
        if not self._base_asked or (
            everything_out and 0 not in self._losses and self._base_asked <= extra + 1
        ):
            index, point = 0, self._x
            self._base_asked += 1
        else:
            index = len(self._rows) + 1
            point = self._x + self._draw_row()
        candidate = self.parametrization.spawn_child().set_standardized_data(point)
        candidate._meta[_META] = (self._round_id, index)
        self._uids.append(candidate.uid)
        return candidate

    def _draw_row(self) -> FloatArray:
        """Draws the next row; returns its perturbation, ``[d]``."""
        d, variant = self.dimension, self._config.variant
        j = len(self._rows)
        length = self._length
        if variant == "B":
            if self._mixing is None:
                self._mixing = self._rng.standard_normal((self.num_measurements, d))
            row = sensing.expand(
                sensing.rademacher(self._rng, self.num_measurements), self.num_measurements
            )
            length /= float(np.square(row @ self._mixing).sum())
        elif self.num_measurements >= d:
            if j % d == 0:
                self._mixing = sensing.orthogonal(self._rng, d)
            assert self._mixing is not None
            row = self._mixing[j % d]
            length /= 1 if variant == "adaptive" else d
        elif variant == "E":
            row = sensing.gaussian(self._rng, d)
            length /= float(row @ row)
        else:
            row = sensing.rademacher(self._rng, d)
            if variant == "Z":
                length /= d
            else:
                # Two lengths a round: comparing their residuals tells noise from curvature.
                length *= math.sqrt(2) if j % 2 else math.sqrt(0.5)
        self._rows.append(row)
        self._lengths.append(length)
        step = self._perturbation(j + 1)
        self._sums.append(float(step.sum()))
        return step

    def _row(self, index: int) -> FloatArray:
        row = self._rows[index - 1]
        if self._config.variant == "B":
            assert self._mixing is not None
            return row @ self._mixing
        return sensing.expand(row, self.dimension)

    def _perturbation(self, index: int) -> FloatArray:
        """The step from the iterate to measurement ``index`` (1 is the first), ``[d]``."""
        step = self._lengths[index - 1] * self._row(index)
        return self._clip(self._x + step, slice(None)) - self._x if self._bounded else step

    @property
    def _bounded(self) -> bool:
        return self._lower is not None or self._upper is not None

    def _clip(self, points: FloatArray, part: slice | np.ndarray) -> FloatArray:
        if self._lower is not None:
            points = np.maximum(points, self._lower[part])
        if self._upper is not None:
            points = np.minimum(points, self._upper[part])
        return points

    def _internal_tell_candidate(self, candidate: ng.p.Parameter, loss: float) -> None:
        round_id, index = candidate._meta.get(_META, (0, 0))
        if round_id != self._round_id or index in self._losses:
            return  # an answer to a round that is over, or a second one
        self._losses[index] = loss if abs(loss) < _FAILED else math.nan
        if index == 0 and abs(loss) < _FAILED:
            self._x_loss = loss
            self._unsure = False
        if 0 in self._losses and len(self._losses) >= self.evaluations_per_round:
            self._finish_round()

    def _internal_tell_not_asked(self, candidate: ng.p.Parameter, loss: float) -> None:
        """A better point from outside becomes the iterate: the warm start."""
        if _META in candidate._meta or not abs(loss) < _FAILED:
            return  # told twice, or too late; or failed
        if loss < self._x_loss:
            self._x_loss = loss
            data = candidate.get_standardized_data(reference=self.parametrization)
            self._x = self._project(np.array(data, dtype=float))
            self._start_round()

    def _finish_round(self) -> None:
        told = np.array(sorted(i for i, loss in self._losses.items() if i and loss == loss), int)
        base_loss = self._losses[0]
        issued = len(self._rows) + self._base_asked
        differences = np.array([self._losses[i] for i in told]) - base_loss
        skipped, residual, self._common = "", 0.0, 0.0
        gradient = np.zeros(self.dimension)
        support = np.zeros(0, dtype=np.int64)
        before = self._x
        if base_loss != base_loss:
            skipped = "the loss at the iterate is not a number"
        elif told.size < max(1, (self.evaluations_per_round - 1) // 2):
            skipped = f"only {told.size} of {self.evaluations_per_round - 1} measurements succeeded"
        elif not differences.any():
            skipped = _PLATEAU
        else:
            estimate = {"B": self._estimate_b, "adaptive": self._estimate_adaptive}.get(
                self._config.variant, self._estimate_cosamp
            )
            if self.num_measurements >= self.dimension:
                estimate = self._least_squares
            gradient, support, residual = estimate(told, differences)
        lengths = [float(np.linalg.norm(self._perturbation(i))) for i in told[:2]]
        if skipped and self._config.variant == "adaptive":
            # Failures ask for smaller perturbations, a plateau (of integers, say) for larger ones.
            self._scale_length(2.0 if skipped == _PLATEAU else 0.5)
        if not skipped:
            skipped = self._step(gradient)
        if base_loss != base_loss:
            self._x = self._last_good
        else:
            self._last_good = before
        self._unsure = any(loss != loss for loss in self._losses.values())
        self.gradient = gradient
        self.num_rounds += 1
        order = support[np.argsort(-np.abs(gradient[support]), kind="stable")]
        self.last_round = Round(
            number=self.num_rounds,
            support={
                coordinate_name(self.parametrization, int(i)): float(gradient[i]) for i in order
            },
            common=self._common,
            residual=residual,
            measurements=told.size + (base_loss == base_loss),
            lost=issued - told.size - (base_loss == base_loss),
            perturbation=float(np.mean(lengths)) if lengths else 0.0,
            step=float(np.linalg.norm(self._x - before)),
            skipped=skipped,
        )
        self._start_round()

    # -- the estimates -----------------------------------------------------------------------

    def _estimate_cosamp(
        self, told: np.ndarray, differences: FloatArray
    ) -> tuple[FloatArray, np.ndarray, float]:
        """Variants E and Z (CONGO-E, CONGO-Z): directional derivatives, then CoSaMP."""
        lengths = np.array([self._lengths[i - 1] for i in told])
        if self._bounded:  # a perturbation that a bound cut is measured as cut
            rows = np.stack([self._perturbation(int(i)) for i in told]) / lengths[:, None]
        else:
            rows = sensing.expand(np.stack([self._rows[i - 1] for i in told]), self.dimension)
        y = differences / lengths
        found = recovery.cosamp(rows, y, self.sparsity)
        return found.dense(self.dimension), found.support, _ratio(found.residual, y)

    def _least_squares(
        self, told: np.ndarray, differences: FloatArray
    ) -> tuple[FloatArray, np.ndarray, float]:
        """As many measurements as dimensions: no sparsity is needed."""
        steps = np.stack([self._perturbation(int(i)) for i in told])
        gradient = np.linalg.lstsq(steps, differences, rcond=None)[0]
        left = float(np.linalg.norm(differences - steps @ gradient))
        return gradient, np.flatnonzero(gradient), _ratio(left, differences)

    def _estimate_b(
        self, told: np.ndarray, differences: FloatArray
    ) -> tuple[FloatArray, np.ndarray, float]:
        """Variant B (CONGO-B): averaged simultaneous perturbations, then basis pursuit.

        The error allowed is the standard error of the averages, taken from their spread.
        """
        assert self._mixing is not None
        signs = np.stack([self._rows[i - 1] for i in told])
        slopes = differences / np.array([self._lengths[i - 1] for i in told])
        terms = signs * slopes[:, None]
        y = terms.mean(axis=0)
        error = math.sqrt(terms.var(axis=0).sum() / len(told))
        found = recovery.basis_pursuit(self._mixing, y, error)
        return found.dense(self.dimension), found.support, _ratio(found.residual, y)

    def _estimate_adaptive(
        self, told: np.ndarray, differences: FloatArray
    ) -> tuple[FloatArray, np.ndarray, float]:
        """Sparse regression in which the data choose the sparsity.

        The model of measurement ``j`` is ``f(x + p) = f0 + g.p + u sum(p) + c |p|^2 + b j +
        noise`` with a sparse ``g``. The loss at the base point is one more measurement, not the
        truth: ``f0`` is fitted. ``u`` is a slope common to all variables, as a price of resources
        is; with signs as rows ``c`` takes the whole diagonal of the Hessian with it; ``b`` is the
        drift of the cost during a round. ``u``, ``c`` and ``b`` enter only if the data want them.
        """
        d, n = self.dimension, len(told) + 1
        rows = np.stack([self._rows[i - 1] for i in told])
        lengths = np.array([self._lengths[i - 1] for i in told])
        losses = np.concatenate([[0.0], differences])

        def centred(values: FloatArray) -> FloatArray:
            # Fitting f0 is centring, the base point (whose perturbation is zero) included.
            return values - values.sum(axis=0) / n

        def steps_of(signs: FloatArray, part: slice | np.ndarray) -> FloatArray:
            steps = lengths[:, None] * signs
            if self._bounded:
                steps = self._clip(self._x[part] + steps, part) - self._x[part]
            return steps

        def columns_of(part: np.ndarray) -> FloatArray:
            shifts = (7 - part % 8).astype(np.uint8)
            signs = ((rows[:, part // 8] >> shifts) & 1) * 2.0 - 1.0
            out = np.zeros((n, part.size))
            out[1:] = steps_of(signs, part)
            return centred(out)

        def match(values: FloatArray) -> FloatArray:
            # |correlation| of every column with ``values``, which are centred.
            out = np.empty(d)
            for part, signs in sensing.blocks(rows, d):
                steps = steps_of(signs, part)
                squares = np.square(steps).sum(axis=0) - np.square(steps.sum(axis=0)) / n
                out[part] = np.abs(values[1:] @ steps) / np.sqrt(
                    np.where(squares > 0, squares, np.inf)
                )
            return out

        y = centred(losses)
        sums = [self._sums[i - 1] for i in told]
        extra = np.zeros((n, 3))
        extra[1:] = np.column_stack([sums, np.square(lengths), told])
        extra = centred(extra)
        limit = max(512, 4 * n)
        working = np.arange(d)
        left, kept = y, np.zeros(0, dtype=np.int64)
        for _ in range(3 if d > limit else 1):
            if d > limit:
                top = np.argpartition(match(left), d - limit)[d - limit :]
                working = np.union1d(top, kept)
            columns = np.hstack([columns_of(working), extra])
            mean, inclusion = recovery.sparse_regression(
                columns, y, d, extra.shape[1], intercept=True
            )
            coefficients, probability = mean[:-3], inclusion[:-3]
            left = centred(y - columns @ mean)
            signal = left + columns[:, :-2] @ mean[:-2]  # without curvature and drift
            before, kept = kept, working[probability > 0.01]
            if np.array_equal(kept, before):
                break
        self._common = float(mean[-3])
        gradient = np.full(d, self._common)
        gradient[working] += coefficients
        support = working[probability > 0.5]
        residual = _ratio(float(np.linalg.norm(left)), signal)
        self._balance_length(left, lengths, residual)
        return gradient, support, residual

    def _balance_length(self, left: FloatArray, lengths: FloatArray, residual: float) -> None:
        """Lengthens perturbations under noise, shortens them under curvature.

        Residuals of the long rows over those of the short ones (lengths 2 to 1), as mean squares:
        1 if noise dominates, 16 if curvature does, 4 where the two balance. A fit that is good
        already is left alone: longer perturbations cost a live system more.
        """
        if residual < 0.3:
            return
        squares = np.square(left[1:])
        long = lengths > self._length
        if long.sum() < 3 or (~long).sum() < 3:
            return
        short_mean, long_mean = squares[~long].mean(), squares[long].mean()
        if short_mean > 0 and long_mean > 0:
            ratio = math.log2(long_mean / short_mean)
            self._scale_length(2.0 ** min(max(0.25 * (2.0 - ratio), -0.5), 0.5))

    def _scale_length(self, factor: float) -> None:
        # From Nevergrad's standard mutation down to where a difference is mostly round-off.
        self._length = min(max(self._length * factor, 1e-6), 1.0)

    # -- the step ----------------------------------------------------------------------------

    def _step(self, gradient: FloatArray) -> str:
        c = self._config
        norm = float(np.linalg.norm(gradient))
        if not math.isfinite(norm):
            return "the gradient estimate is not finite"
        if norm == 0:
            return ""
        if c.max_gradient_norm is not None and norm > c.max_gradient_norm:
            return f"gradient norm {norm:.3g} is above max_gradient_norm {c.max_gradient_norm:.3g}"
        rate = c.learning_rate
        rate = float(rate(self.num_rounds) if callable(rate) else rate)
        x = self._project(self._x - (rate / norm if c.normalize else rate) * gradient)
        if not self.parametrization.can_skip_constraints():
            # Nevergrad rejects candidates that violate a cheap constraint; at an iterate that does,
            # no round could begin.
            halvings = 0
            while (
                not self.parametrization.spawn_child()
                .set_standardized_data(x)
                .satisfies_constraints()
            ):
                x, halvings = (x + self._x) / 2, halvings + 1
                if halvings == 20:
                    return "no part of the step satisfies the constraints"
        self._x = x
        return ""

    def _project(self, x: FloatArray) -> FloatArray:
        """The nearest point in the box, then toward the initial point until it is in the ball."""
        x = self._clip(x, slice(None))
        norm = float(np.linalg.norm(x))
        if self._config.radius is not None and norm > self._config.radius:
            x = x * (self._config.radius / norm)
        return x

    def _internal_provide_recommendation(self) -> FloatArray:
        return self._last_good if self._unsure else self._x

    def _info(self) -> dict[str, tp.Any]:
        """Nevergrad's debug information: the last round, flat."""
        return {} if self.last_round is None else dataclasses.asdict(self.last_round)


def _check_options(options: dict[str, tp.Any]) -> None:
    variant = options["variant"]
    if variant not in ("B", "Z", "E", "adaptive"):
        raise ValueError(f"variant is {variant!r}: expected 'B', 'Z', 'E' or 'adaptive'")
    for name in ("sparsity", "num_measurements", "num_perturbations"):
        count = options[name]
        if count is not None and (isinstance(count, bool) or count != int(count) or count < 1):
            raise ValueError(f"{name} is {count!r}: expected a whole number of at least 1, or None")
    for name in ("learning_rate", "delta", "radius", "max_gradient_norm"):
        size = options[name]
        if size is not None and not callable(size) and not 0 < size < math.inf:
            raise ValueError(f"{name} is {size!r}: expected a finite number above 0")
    if options["num_perturbations"] is not None and variant != "B":
        raise ValueError(
            f"num_perturbations is {options['num_perturbations']} for variant {variant!r}: only "
            "variant 'B' averages perturbations; set num_measurements"
        )


class ParametrizedCONGO(base.ConfiguredOptimizer):
    """Sparse-gradient descent by compressive sensing (CONGO, arXiv 2407.06325).

    Each round evaluates the iterate and ``m`` random perturbations of it, recovers the gradient
    from the differences and steps against it. The evaluations of a round are independent: with
    ``num_workers`` up to ``evaluations_per_round`` they all run at once. An optimizer runs online,
    for as long as it is asked (``budget=None``), and recommends its current iterate.

    Lengths and gradients are in Nevergrad's standardised space: unit 1 is the standard deviation of
    a mutation, a sixth of the range of a variable with two bounds.

    Args:
        variant: ``"E"``: Gaussian rows and CoSaMP; ``"Z"``: random signs and CoSaMP (ZORO);
            ``"B"``: simultaneous perturbations and basis pursuit; the paper's three. They know the
            sparsity and keep the perturbation length. ``"adaptive"`` is ours: random signs,
            regression with the sparsity left to the data, and perturbations whose length balances
            noise and curvature. All use least squares where there are as many measurements as
            dimensions.
        sparsity: entries of the gradient that matter at a time. B, Z and E recover that many (B:
            only through ``num_measurements``). Default: a tenth of the dimension, 1 to 10.
        num_measurements: ``m``; default ``ceil(2 s ln(d / s))``, at most ``d``; the
            adaptive variant adds what fills the last batch of ``num_workers``, up to ``d``.
        num_perturbations: simultaneous perturbations of a round in variant B; default ``3 m``.
        learning_rate: step size, or a function of the number of completed rounds (a module-level
            function if the optimizer is to be pickled).
        delta: B, Z, E: a row ``p`` is measured at ``x + delta p / |p|^2``; default 0.05. Adaptive:
            the length per variable to begin with; default 0.1.
        radius: iterates stay in the ball of that radius around the initial point.
        normalize: step along the unit gradient (the paper's queueing runs).
        max_gradient_norm: an estimate beyond it is not followed: the round takes no step.

    Raises:
        ValueError: for an option out of its range.

    Example:
        >>> import nevergrad as ng
        >>> import trimtab.optimizers
        >>> optimizer = ng.optimizers.registry["CONGO"](parametrization=100, budget=2000)
        >>> recommendation = optimizer.minimize(lambda x: (x[0] - 1) ** 2 + (x[7] + 2) ** 2)
    """

    def __init__(
        self,
        *,
        variant: str = "E",
        sparsity: int | None = None,
        num_measurements: int | None = None,
        num_perturbations: int | None = None,
        learning_rate: float | tp.Callable[[int], float] = 0.1,
        delta: float | None = None,
        radius: float | None = None,
        normalize: bool = False,
        max_gradient_norm: float | None = None,
    ) -> None:
        _check_options(locals())
        self.variant = variant
        self.sparsity = sparsity
        self.num_measurements = num_measurements
        self.num_perturbations = num_perturbations
        self.learning_rate = learning_rate
        self.delta = delta
        self.radius = radius
        self.normalize = normalize
        self.max_gradient_norm = max_gradient_norm
        super().__init__(_CONGO, locals(), as_config=True)


CONGO = ParametrizedCONGO(variant="adaptive").set_name("CONGO", register=True)
CONGO_B = ParametrizedCONGO(variant="B").set_name("CONGO_B", register=True)
CONGO_Z = ParametrizedCONGO(variant="Z").set_name("CONGO_Z", register=True)
CONGO_E = ParametrizedCONGO(variant="E").set_name("CONGO_E", register=True)
