"""CONGO: compressive online gradient optimization, as optimizers of Nevergrad.

A round measures the current point and a few random perturbations of *all* variables at once,
recovers the sparse gradient from the differences and takes one projected descent step (Duggal et
al., "CONGO: Compressive Online Gradient Optimization", ICLR 2025, arXiv 2407.06325). Importing this
module registers ``CONGO``, ``CONGO_B``, ``CONGO_Z`` and ``CONGO_E``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing as tp

import nevergrad as ng
import numpy as np
from nevergrad.common import errors
from nevergrad.optimization import base, utils

from . import estimates, noises, rounds, sensing, spaces, step, walls

FloatArray = np.ndarray

# A loss that Nevergrad clips to (NaN and +inf become this number) is a failed evaluation.
_FAILED = 5.0e20
_META = "congo"
_VIOLATION = "congo_violation"
_PLATEAU = "all losses are equal"
# In rounds of more evaluations a repeat of the base point takes the place of a perturbation.
_REPEATS_COUNT = 8
# Halvings, at most, of the chance that a level is asked for which keeps failing, or costing a lot.
_AVOIDED = 4
# Standard errors that a difference of costs must exceed to count, and the largest of a round.
_CLEAR, _CLEAREST = 2.0, 4.0
# How far perturbations move integers: at most to begin with, and its limits, the upper one the
# whole range of an integer with two bounds. Some are moved by less, down to a share.
_REACH, _LEAST, _FARTHEST, _NEAREST = 1.0, 0.01, 6.0, 0.25
# Measurements of a round from which on its fit is believed.
_FEW = 8
# Steps of less than this share of a perturbation tell nothing of the model.
_SHORTEST = 0.01
# Where knobs have levels and a fit leaves this share of the squares, rises beyond the largest fall
# and so many median changes are cut off.
_UNFIT, _TYPICAL = 0.3, 3.0


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
        recommended: cost at the point that ``recommend()`` returns, as measured; NaN if unknown.
        paid: mean cost of the round's measurements, perturbed ones included.
        measurements: evaluations that the estimate rests on, the base point included.
        lost: evaluations asked for in the round and not used: unanswered, failed, or rejected by a
            cheap constraint.
        perturbation: mean Euclidean length of the perturbations, in standardised space.
        step: Euclidean length of the step taken; 0 for a skipped round.
        skipped: why no step was taken, or an empty string.

    Example:

    ```python
    >>> from trimtab.optimizers import CONGO
    >>> optimizer = CONGO(parametrization=100, budget=50)
    >>> recommendation = optimizer.minimize(lambda x: (x[0] - 1) ** 2 + (x[7] + 2) ** 2)
    >>> list(optimizer.last_round.support)[:2]
    ['x[7]', 'x[0]']
    ```
    """

    number: int
    support: dict[str, float]
    common: float
    residual: float
    recommended: float
    paid: float
    measurements: int
    lost: int
    perturbation: float
    step: float
    skipped: str


class _CONGO(base.Optimizer):
    """The optimizer behind ``ParametrizedCONGO``, where the options are documented.

    Attributes:
        num_measurements: perturbations that the recovery rests on (``m``).
        evaluations_per_round: tells that complete a round; without a learning rate, the probes of a
            step and repeats come on top.
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
        self._levels = spaces.Levels(self.parametrization)
        self.sparsity = c.sparsity or max(1, min(d // 10, 10))
        m = c.num_measurements
        if m is None:
            m = max(1, math.ceil(2 * self.sparsity * math.log(d / self.sparsity)))
            if c.variant == "adaptive":
                # Idle workers measure too: the round fills its last batch of evaluations.
                m = math.ceil((m + 1) / num_workers) * num_workers - 1
            m = min(m, d)
            if self._levels:  # a level that no perturbation visits is not known
                m = max(m, min(2 * d, 8))
        elif c.variant == "adaptive" and m == 1 < d:
            raise ValueError(
                f"num_measurements is 1 in dimension {d}: one difference tells no variable from "
                "another, nor from noise; variant 'adaptive' needs at least 2"
            )
        self.num_measurements = m
        # As many measurements as dimensions: least squares in orthogonal directions.
        self._dense = m >= d and not self._levels
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
        self._bounds = spaces.standardized_bounds(self.parametrization)
        self._walls = walls.Walls(self._bounds, d)
        self._beyond: walls.Probe | None = None  # of a wall, in this round
        self._x = self._levels.snap(np.zeros(d)) if self._levels else np.zeros(d)
        self._last_good = self._x
        self._x_loss = math.inf  # the last loss at an iterate
        self._unsure = False  # evaluations failed near the iterate, and it is not evaluated yet
        self._length = c.delta or (0.1 if c.variant == "adaptive" else 0.05)
        self._first_length = self._length
        self._reach = np.full(self._levels.positions.size, _REACH)  # of integers
        self._farthest = np.full(self._levels.positions.size, _FARTHEST)  # farther costs more
        self._sparing = 1.0  # what that share of the knobs is multiplied by that change levels
        self._moves = 0.0  # times that the cost was seen to have changed, lately
        self._longest = math.inf  # longer ones fail, as far as is known
        self._penalty = 0.0
        self._caution = 0.25  # with max_regression: what perturbations are multiplied by
        self._failures: dict[tuple[int, float], int] = {}  # of a level, since it last was fine
        self._failing = noises.Failures()
        self._noise = noises.Noise()
        self._value: rounds.Value | None = None
        self._slopes: FloatArray | None = None  # the gradient at the iterate
        self._bend = 0.0  # what perturbations add, per squared length
        self._excess = noises.Excess()
        self._rise = noises.Excess()
        self._curvature = step.Curvature()
        self._radius = 0.0
        self._plan: rounds.Plan | None = None
        self._round_number = 0
        self._count = 0
        self._stale: list[str] = []
        self._round: rounds.Open
        self._open(self._x)

    # -- a round -----------------------------------------------------------------------------

    @property
    def _searching(self) -> bool:
        """Without a learning rate: steps are tried, judged and taken back."""
        return self._config.learning_rate is None

    def _open(self, point: FloatArray) -> None:
        """Begins a round; the last one's unanswered candidates become stale."""
        self._round_number += 1
        self._asked.difference_update(self._stale)  # or they would add up over lost workers
        self._stale = list(self._round.uids.values()) if self._round_number > 1 else []
        measurements = estimates.Measurements(
            point,
            self._bounds,
            self._levels.positions,
            self._levels.positions[self._levels.integers],
        )
        self._round = rounds.Open(self._round_number, measurements)

    @property
    def _complete(self) -> bool:
        r = self._round
        told = r.told(repeats=self.evaluations_per_round > _REPEATS_COUNT)
        waiting = r.reference_wanted and not r.reference_asked
        return bool(r.base) and told >= self.evaluations_per_round and not waiting

    def _internal_ask_candidate(self) -> ng.p.Parameter:
        if not self.num_ask:
            self._start_feasible()
        r = self._round
        if self._complete:
            self._finish()  # others are still out; the one who asks is free
            r = self._round
        everything_out = len(r.measurements) >= self.evaluations_per_round - 1
        # Beyond a round's worth of asks some answers are late or lost: first the base point is
        # asked again, on which all differences rest, then fresh perturbations stand in.
        extra = len(r.measurements) - (self.evaluations_per_round - 1)
        if not r.base_asked or (everything_out and not r.base and r.base_asked <= extra + 1):
            kind, place, point = "base", 0, r.point
            r.base_asked += 1
        elif r.reference_wanted and not r.reference_asked:
            kind, place, point = "reference", 0, self._x
            r.reference_asked = True
        elif (
            self._searching
            and r.base_asked == 1
            and self._noise.wanted(self.num_rounds, self.num_measurements)
        ):
            kind, place, point = "base", 0, r.point
            r.base_asked += 1
        elif (beyond := self._beyond_wall()) is not None:
            kind, place, point = "beyond", 0, beyond
            r.beyond_asked = True
        else:
            kind, place = "row", self._draw()
            point = r.point + r.measurements.step(place)
        candidate = self.parametrization.spawn_child().set_standardized_data(point)
        self._count += 1
        candidate._meta[_META] = (r.number, kind, self._count)
        r.asked += 1
        r.uids[self._count] = candidate.uid
        if kind == "row":
            r.places[self._count] = place
        return candidate

    def _beyond_wall(self) -> FloatArray | None:
        """The base point with one coordinate beyond its wall, once in a round that goes on."""
        r, probe = self._round, self._beyond
        if probe is None or r.beyond_asked or 2 * len(r.measurements) < self.evaluations_per_round:
            return None
        point = r.point.copy()
        point[probe.coordinate] = probe.place
        move = point - self._x
        change = 0.0 if self._slopes is None else float(self._slopes @ move)
        if self._safe(move, change) and self._allowed(point):
            return point
        self._beyond = None
        return None

    @property
    def _most_rows(self) -> int:
        return 4 * (self.evaluations_per_round + self.num_workers) + 1000

    def _draw(self) -> int:
        """Draws the next perturbation; returns its place among the round's measurements."""
        r, d, variant = self._round, self.dimension, self._config.variant
        now, j = r.measurements, len(r.measurements)
        if j >= self._most_rows and r.places:  # never told: the oldest one's place is free again
            number, place = next(iter(r.places.items()))
            del r.places[number]
            self._asked.discard(r.uids.pop(number))
            return place
        length = self._length
        if variant == "B":
            if now.mixing is None:
                now.mixing = self._rng.standard_normal((self.num_measurements, d))
            row = sensing.expand(
                sensing.rademacher(self._rng, self.num_measurements), self.num_measurements
            )
            length /= float(np.square(row @ now.mixing).sum())
        elif self._dense:
            if j % d == 0:
                r.mixing = sensing.orthogonal(self._rng, d)
            assert r.mixing is not None
            row = r.mixing[j % d]
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
        now.rows.append(row)
        now.lengths.append(length)
        if self._levels:
            jumps = self._levels.draw(self._rng, r.point, *self._neighbours(), self._share)
            for level in self._levels.reached(r.point, jumps) if self._failures else ():
                if self._rng.random_sample() >= 0.5 ** self._failures.get(level, 0):
                    jumps = self._levels.without(jumps, level[0])
            if (spared := self._spared()) < 1:
                jumps = self._levels.thin(self._rng, jumps, spared)
            now.jumps.append(jumps.astype(np.float32))
        if not self.parametrization.can_skip_constraints():
            # The opposite side of a boundary, or closer to the base point.
            for _ in range(10):
                if self._allowed(r.point + now.step(j)):
                    break
                now.lengths[j] *= -1.0 if now.lengths[j] > 0 else -0.5
                if self._levels and now.lengths[j] > 0:
                    now.jumps[j] = self._levels.thin(self._rng, now.jumps[j], 0.5)
        if self._config.max_regression is not None:
            self._shorten(j)
        now.sums.append(float(now.step(j).sum()))
        return j

    def _spared(self) -> float:
        """What the share of the knobs that change levels is multiplied by for this round's rest."""
        r = self._round
        costs = [self._merit(told) for told in r.losses.values() if told.loss == told.loss]
        if not self._searching or not r.base or len(costs) < 4:
            return 1.0
        cost = self._merit(r.base[0])
        return self._worth(cost, np.array(costs), max(cost - min(costs), 0.0), 0.125)

    def _worth(self, cost: float, costs: FloatArray, gain: float, least: float) -> float:
        """1, or less if measurements cost more on average than a step would gain and than noise."""
        paid = float(np.mean(costs)) - cost
        if not paid > max(self._noise.size, gain):
            return 1.0
        return max(math.sqrt(max(gain, 0.0) / paid), least)

    def _shorten(self, j: int) -> None:
        """Shortens a perturbation until its predicted cost is within ``max_regression``.

        What the model has not seen it does not predict: perturbations begin small as well, grow
        from round to round, and shrink with each measurement above the limit.
        """
        r, limit = self._round, self._config.max_regression
        assert limit is not None
        now = r.measurements
        caution = min(self._caution, 0.25) if self._slopes is None else self._caution
        factor = caution * 0.5 ** sum(self._above(told) for told in r.losses.values())
        if factor < 1:
            now.lengths[j] *= factor
            if self._levels:
                now.jumps[j] = self._levels.thin(self._rng, now.jumps[j], factor)
        if self._slopes is None:
            return
        if r.slopes is None:
            toward = r.point - self._x
            turned = self._curvature.quadratic(self.dimension).product(toward)
            r.slopes, r.rise = self._slopes + turned, float((self._slopes + 0.5 * turned) @ toward)
        for _ in range(20):
            bent = max(self._bend, 0.0) * now.lengths[j] ** 2
            if r.rise + float(r.slopes @ now.step(j)) + bent <= limit:
                return
            now.lengths[j] *= 0.5
            if self._levels:
                now.jumps[j] = self._levels.thin(self._rng, now.jumps[j], 0.5)

    def _above(self, told: rounds.Loss) -> bool:
        """Whether a measurement cost more than ``max_regression`` above the iterate."""
        limit = self._config.max_regression
        start = self._x_loss if self._value is None else self._value.loss
        return limit is not None and told.loss > start + limit

    def _start_feasible(self) -> None:
        """Moves a start that violates a cheap constraint to a point nearby that does not."""
        if self._allowed(self._x):
            return
        start = self._x
        for trial in range(400):
            # From a tenth of a mutation to 2^6 of them, along all coordinates or along one.
            scale = 0.125 * 2.0 ** (trial % 10)
            direction = self._rng.standard_normal(self.dimension)
            if trial % 2:
                direction *= np.arange(self.dimension) == self._rng.randint(self.dimension)
            far = self._projected(start + scale * direction)
            if self._allowed(far):
                near = start
                for _ in range(6):
                    middle = self._projected(0.5 * (near + far))
                    near, far = (near, middle) if self._allowed(middle) else (middle, far)
                self._x = self._last_good = far
                self._open(far)
                return

    def _projected(self, x: FloatArray) -> FloatArray:
        x = self._project(x)
        return self._levels.snap(x) if self._levels else x

    def _neighbours(self) -> tuple[FloatArray, FloatArray]:
        """Steps of integers down and up, ``[n]`` each, that the round's perturbations take.

        Each integer has its own distance, drawn afresh, so that all are tried; cheap constraints
        shorten them.
        """
        r = self._round
        if r.neighbours is None:
            lengths = np.full(self._levels.positions.size, self._length)
            if self._searching and self._config.variant == "adaptive":
                lengths = self._reach * _NEAREST ** self._rng.random_sample(lengths.size)
            if self._config.max_regression is not None:
                lengths *= self._caution
            sides = []
            for side in (0, 1):
                near, point = lengths, r.point.copy()
                while True:
                    steps = self._levels.neighbours(r.point, near)[side]
                    point[self._levels.positions] = r.point[self._levels.positions] + steps
                    if (near <= self._length).all() or self._allowed(point):
                        break
                    near = np.minimum(near, np.maximum(0.5 * near, self._length))
                sides.append(steps)
            r.neighbours = sides[0], sides[1]
        return r.neighbours

    @property
    def _share(self) -> float:
        """Share of the knobs with levels that a perturbation moves."""
        share = min(0.5, max(math.sqrt(self._length), 4.0 / self.num_measurements))
        return max(self._sparing * share, min(share, 1.0 / self._levels.positions.size))

    # -- answers -----------------------------------------------------------------------------

    def tell(
        self,
        candidate: ng.p.Parameter,
        loss: tp.Any,
        constraint_violation: tp.Any = None,
        penalty_style: tp.Any = None,
    ) -> None:
        if constraint_violation is not None:
            # Nevergrad adds a penalty that grows with time to the loss; the fit needs both apart.
            candidate._meta[_VIOLATION] = float(np.sum(np.maximum(constraint_violation, 0.0)))
        super().tell(candidate, loss, constraint_violation, penalty_style)

    def _internal_tell_candidate(self, candidate: ng.p.Parameter, loss: float) -> None:
        round_number, kind, count = candidate._meta.get(_META, (0, "", 0))
        r = self._round
        if round_number != r.number or count not in r.uids:
            return  # an answer to a round that is over, or a second one
        del r.uids[count]
        told = self._as_loss(candidate, loss)
        if kind == "base":
            r.base.append(told)
            if len(r.base) == 2:
                self._noise.learn(r.base[0].loss - r.base[1].loss)
            if told.loss == told.loss:
                self._x_loss, self._unsure = told.loss, False
        elif kind == "reference":
            r.reference, r.reference_wanted = told, False
        elif kind == "beyond":
            r.beyond = told
        else:
            r.losses[r.places.pop(count)] = told
        if self._plan is not None and not self._plan.settled:
            self._judge_probe()
        if self._round is r and self._complete and not r.uids:
            self._finish()

    @staticmethod
    def _as_loss(candidate: ng.p.Parameter, loss: float) -> rounds.Loss:
        violation = candidate._meta.get(_VIOLATION, 0.0)
        if violation:
            assert candidate.loss is not None
            loss = candidate.loss
        return rounds.Loss(loss if abs(loss) < _FAILED else math.nan, violation)

    def _internal_tell_not_asked(self, candidate: ng.p.Parameter, loss: float) -> None:
        """A better point from outside becomes the iterate: the warm start."""
        if _META in candidate._meta or not abs(loss) < _FAILED:
            return  # told twice, or too late; or failed
        known = self._clearly_better() or self._value
        if loss < (self._x_loss if known is None else known.loss):
            self._x_loss = loss
            data = candidate.get_standardized_data(reference=self.parametrization)
            self._walls.release(np.array(data, dtype=float))
            self._bounds = self._walls.bounds
            self._x = self._projected(np.array(data, dtype=float))
            self._value, self._slopes, self._plan = None, None, None
            self._open(self._x)

    def _merit(self, told: rounds.Loss | rounds.Value) -> float:
        return told.loss + self._penalty * told.violation

    # -- probes ------------------------------------------------------------------------------

    def _judge_probe(self) -> None:
        """Goes on with the trial point, or leaves it before the round is spent on it."""
        r, plan = self._round, self._plan
        assert plan is not None and self._value is not None
        if not r.base or len(r.measurements) > (self.evaluations_per_round - 1) // 2:
            return
        if r.reference is not None and r.reference.loss == r.reference.loss:
            fresh = rounds.Value(*r.reference, self._noise.size)
            self._refresh(fresh)
        start = self._merit(self._value)
        cost = self._merit(r.base[0])
        failed = cost != cost
        error = _CLEAR * math.hypot(self._noise.size, self._value.error)
        if (failed or cost > start + error) and r.reference is None:
            r.reference_wanted = True  # the world may have moved, and not the step be wrong
            return
        if r.reference is not None and r.reference.loss != r.reference.loss:
            plan.settled = True  # nothing answers: the round will tell
            return
        plan.probes.append((plan.factor, math.inf if failed else cost, r.base[0]))
        if plan.measured:  # the best of many is lucky, too: most of what it gained must be there
            plan.settled = True
            if failed or cost > start - 0.5 * plan.switch_gain:
                self._plan = None
                self._open(self._x)
            return
        if failed:
            factor = 0.25 * plan.factor if len(plan.probes) < 8 else None
        else:
            factor = step.next_probe([probe[:2] for probe in plan.probes], start, plan.slope, error)
        if factor is not None and factor > plan.factor and self._restless:
            factor = None
        if factor is not None and not self._safe(factor * plan.step, plan.slope * factor):
            factor = None
        if factor is not None:
            if factor <= plan.factor or len(r.measurements) <= self.num_workers:
                plan.factor = factor
                trial = self._trial(plan)
                if trial is not None:
                    self._open(trial)
                    return
            elif factor > plan.factor:
                self._radius = max(self._radius, 2.0 * plan.factor * self._smooth(plan.step))
        best, lowest, told = min(plan.probes, key=lambda probe: probe[1])
        plan.settled = True
        if lowest > start + error:
            # So far below the perturbations the slope is wrong, not the length of the step.
            least = self._length * (1.0 if self._noise.size else _SHORTEST)
            shortest = min(p[0] for p in plan.probes)
            self._radius = max(shortest * self._smooth(plan.step), least)
            self._plan = None
            self._open(self._x)
        elif best != plan.factor:
            plan.factor = best
            trial = self._trial(plan)
            if trial is None:
                self._plan = None
                self._open(self._x)
                return
            self._open(trial)
            self._round.base_asked = 1
            self._round.base.append(told)

    def _smooth(self, move: FloatArray) -> float:
        """Length of a move, steps between levels left out."""
        return float(np.linalg.norm(np.delete(move, self._levels.positions)))

    def _refresh(self, fresh: rounds.Value) -> None:
        """Takes in a new measurement of the iterate; notices a world that has moved."""
        old = self._value
        if old is not None:
            change = abs(self._merit(fresh) - self._merit(old))
            if change <= 2 * _CLEAR * math.hypot(fresh.error, old.error):
                if old.error > 0 and fresh.error > 0:
                    weight = old.error**2 / (old.error**2 + fresh.error**2)
                    fresh = rounds.Value(
                        old.loss + weight * (fresh.loss - old.loss),
                        fresh.violation,
                        old.error * math.sqrt(1 - weight),
                    )
            elif old.error == old.error:
                self._moved()
        self._value = fresh

    def _moved(self) -> None:
        """The world has changed: what was learnt of it counts no more."""
        self._curvature = step.Curvature()
        self._excess = noises.Excess()
        self._rise = noises.Excess()
        self._sparing = 1.0
        self._lengthen_again(min(4.0, self._first_length / self._length))
        self._moves += 1.0
        if self._restless:
            self._radius = max(0.5 * self._radius, self._length)
        else:
            self._walls.hurry()  # failures are no costs: what failed may still fail
            self._radius = max(self._radius, self._length * math.sqrt(self.dimension))

    def _lengthen_again(self, factor: float) -> None:
        """Lengthens perturbations by a factor, if it is above 1, and those of integers as well."""
        self._farthest = np.maximum(self._farthest, _REACH)
        self._reach = np.maximum(self._reach, _REACH)
        self._scale_length(max(1.0, factor))

    @property
    def _restless(self) -> bool:
        """Whether the cost keeps changing: a step that pays now may not pay for long."""
        return self._moves > 1.5

    def _trial(self, plan: rounds.Plan) -> FloatArray | None:
        """The point of a plan, within bounds and cheap constraints; None if there is none."""
        for attempt in range(20):
            point = self._projected(self._x + plan.moved(plan.factor))
            if self._allowed(point):
                return None if np.array_equal(point, self._x) else point
            if attempt:
                plan.factor *= 0.5
                continue
            # A cheap constraint on one coordinate stops that one, not the others.
            for i in np.argsort(-np.abs(plan.step), kind="stable")[:10]:
                alone = self._x.copy()
                alone[i] = point[i]
                if not self._allowed(self._projected(alone)):
                    plan.step[i] = 0.0
        return None

    def _allowed(self, point: FloatArray) -> bool:
        if self.parametrization.can_skip_constraints():
            return True
        child = self.parametrization.spawn_child().set_standardized_data(point)
        return bool(child.satisfies_constraints())

    # -- the end of a round ------------------------------------------------------------------

    def _finish(self) -> None:
        r, c = self._round, self._config
        before, plan, self._plan = self._x, self._plan, None
        base_told = [told for told in r.base if told.loss == told.loss]
        places = sorted(i for i, told in r.losses.items() if told.loss == told.loss)
        paid = [told.loss for told in base_told] + [r.losses[i].loss for i in places]
        center = (
            rounds.Loss(
                sum(told.loss for told in base_told) / len(base_told),
                sum(told.violation for told in base_told) / len(base_told),
            )
            if base_told
            else rounds.Loss(math.nan, 0.0)
        )
        self._raise_penalty(center, [r.losses[i] for i in places])
        costs = np.array([self._merit(r.losses[i]) for i in places])
        told = np.array(places, dtype=np.int64)
        every = np.concatenate([[self._merit(center)], costs])
        if self._searching and base_told and told.size:
            plausible = ~noises.penalties(every)[1:]
            # Where most levels do not matter all costs are equal, and one that does is no failure.
            if not self._levels or (costs[plausible] != self._merit(center)).any():
                told, costs = told[plausible], costs[plausible]
        failed = np.setdiff1d(np.array(sorted(r.losses), dtype=np.int64), told)
        if base_told:
            failed = self._learn_walls(told, failed, every)
        if base_told or told.size:
            self._failing.learn(*self._sizes(told, failed))
        too_far = failed.size > 0 and self._failing.often(told.size + failed.size)
        if base_told and not self._failing.of_size:
            too_far = False
            if self._longest < math.inf:
                self._longest = math.inf
                self._lengthen_again(self._first_length / self._length)
                self._radius = max(self._radius, self._length * math.sqrt(self.dimension))
        above = {i for i, told in r.losses.items() if self._above(told)}
        if base_told:
            self._caution = max(0.5 * self._caution, 0.01) if above else min(2 * self._caution, 1.0)
        skipped, estimate = "", None
        if not base_told:
            skipped = "the loss at the iterate is not a number"
        elif told.size < max(1, (self.evaluations_per_round - 1) // 2):
            skipped = f"only {told.size} of {self.evaluations_per_round - 1} measurements succeeded"
        elif (costs == self._merit(center)).all() and not (
            self._curvature.pairs and told.size < _FEW
        ):
            # (Two or three points on either side of a minimum may well have one cost.)
            skipped = _PLATEAU
        else:
            losses = np.concatenate([[self._merit(center)], costs])
            estimate = self._estimate(told, losses)
        outage = not base_told and not told.size
        if not outage and c.variant == "adaptive":
            # Failures ask for smaller perturbations, a plateau (of integers, say) for larger ones.
            if skipped == _PLATEAU:
                self._scale_length(2.0)
                self._adapt_reach(None, costly=False)
            elif base_told and too_far:
                self._scale_length(0.5)
                self._adapt_reach(None, costly=True)
                self._longest = self._length
            elif base_told:
                self._longest *= 1.1
        if self._searching:
            if estimate is not None:
                self._judge(plan, estimate, center, told)
            elif base_told and (plan is None or skipped == _PLATEAU):
                if plan is None:
                    self._refresh(rounds.Value(*center, self._noise.size))
            elif plan is not None and not plan.measured:
                self._radius *= 0.25
            if self._levels and estimate is not None and not too_far:
                dear = float(np.median(costs)) > self._merit(center) + _CLEAR * self._noise.size
                self._adapt_reach(estimate, costly=dear)
            if estimate is not None and not skipped:
                if not self._levels and told.size < _FEW:
                    self._learn_rise(told, costs - self._merit(center))
                skipped = self._propose(estimate) if self._slopes is not None else ""
                if self._levels and not skipped and self._slopes is not None:
                    self._prefer_measured(self._merit(center), told, costs)
                if self._levels:
                    above |= self._spare(self._merit(center), told, costs)
        else:
            if estimate is not None:
                self._balance_length(estimate)
                skipped = self._descend(estimate.gradient)
            if not base_told:
                self._x = self._last_good
            else:
                self._last_good = before
            self._unsure = any(t.loss != t.loss for t in [*r.base, *r.losses.values()])
        if self._levels and base_told:
            self._blame(set(told.tolist()) - above)
        self.gradient = np.zeros(self.dimension) if estimate is None else estimate.gradient
        self.num_rounds += 1
        self._moves *= 0.9
        self._report(r, estimate, told.size + len(base_told), paid, before, skipped)
        trial = None if self._plan is None else self._trial(self._plan)
        if trial is None:
            self._plan = None
        self._open(self._x if trial is None else trial)

    def _sizes(self, told: np.ndarray, failed: np.ndarray) -> tuple[FloatArray, np.ndarray]:
        """Of the round's evaluations, the base point's first: how far they went, and which failed.

        Args:
            told: measurements that answered.
            failed: measurements that failed for a reason not known.
        """
        now = self._round.measurements
        every = [*told.tolist(), *failed.tolist()]
        squares = np.square([now.lengths[i] for i in every])
        if self._levels:
            squares *= self.dimension - self._levels.positions.size
            squares += [float(np.square(now.jumps[i]).sum()) for i in every]
        sizes = np.concatenate([np.zeros(len(self._round.base)), np.sqrt(squares)])
        base = [told.loss != told.loss for told in self._round.base]
        return sizes, np.array([*base, *np.repeat([False, True], [told.size, failed.size])])

    def _learn_walls(self, told: np.ndarray, failed: np.ndarray, every: FloatArray) -> np.ndarray:
        """Learns from what failed which coordinate may not go on; what that does not explain.

        Args:
            told: measurements that answered.
            failed: measurements that did not.
            every: the base point's cost and those of the measurements, implausible ones too.
        """
        r, probe = self._round, self._beyond
        self._beyond = None
        if not self._searching or r.measurements.mixing is not None:
            return failed
        failed = self._walls.learn(r.measurements, self._x, told, failed)
        if r.beyond is not None and probe is not None:
            cost = self._merit(r.beyond)
            fails = cost != cost or bool(noises.penalties(np.append(every, cost))[-1])
            # Where much else fails it tells nothing of the wall.
            clear = not fails or told.size >= 0.9 * (told.size + failed.size)
            if clear and self._walls.probed(probe, not fails, self.num_rounds):  # the way is free
                self._radius = max(self._radius, self._length * math.sqrt(self.dimension))
        self._bounds = self._walls.bounds
        return failed

    def _blame(self, fine: set[int]) -> None:
        """Counts the measurements in a row, of those that visited a level, that were not fine."""
        now = self._round.measurements
        for i in sorted(self._round.losses):
            for level in self._levels.reached(now.base, now.jumps[i]):
                count = self._failures.pop(level, 0)
                if i not in fine:
                    self._failures[level] = min(count + 1, _AVOIDED)
        while len(self._failures) > 1000:  # of integers there may be many
            del self._failures[next(iter(self._failures))]

    def _report(
        self,
        r: rounds.Open,
        estimate: estimates.Estimate | None,
        used: int,
        paid: list[float],
        before: FloatArray,
        skipped: str,
    ) -> None:
        support: dict[str, float] = {}
        if estimate is not None:
            g = estimate.gradient
            order = estimate.support[np.argsort(-np.abs(g[estimate.support]), kind="stable")]
            support = {
                spaces.coordinate_name(self.parametrization, int(i)): float(g[i]) for i in order
            }
        lengths = [float(np.linalg.norm(r.measurements.step(i))) for i in sorted(r.losses)[:2]]
        recommended = self._x_loss if self._value is None else self._value.loss
        self.last_round = Round(
            number=self.num_rounds,
            support=support,
            common=0.0 if estimate is None else estimate.common,
            residual=0.0 if estimate is None else estimate.residual,
            recommended=recommended if math.isfinite(recommended) else math.nan,
            paid=float(np.mean(paid)) if paid else math.nan,
            measurements=used,
            lost=max(r.asked - used, 0),
            perturbation=float(np.mean(lengths)) if lengths else 0.0,
            step=float(np.linalg.norm(self._x - before)),
            skipped=skipped,
        )

    def _estimate(self, told: np.ndarray, losses: FloatArray) -> estimates.Estimate:
        now = self._round.measurements
        estimator: tp.Callable[..., estimates.Estimate]
        if self._dense:
            estimator = estimates.least_squares
        elif self._config.variant == "B":
            estimator = estimates.averaged
        elif self._config.variant == "adaptive":
            estimator = estimates.sparse
        else:
            estimator = functools.partial(estimates.cosamp, sparsity=self.sparsity)
        if not self._searching:
            return estimator(now, told, losses)
        known = np.zeros(told.size)
        if self._curvature.pairs:
            known = self._known_bend(told)
            straight = losses - np.concatenate([[0.0], known])
            # With many measurements it shows whether the curvature still is what it was; with few
            # only if it is far from it.
            if np.var(straight) >= (1.0 if told.size >= _FEW else 4.0) * np.var(losses):
                known = np.zeros(told.size)
            else:
                losses = straight
        if self._config.variant == "adaptive":
            found = estimates.robust(estimator, now, told, losses)
            if self._levels and found.residual >= _UNFIT:  # what costs a lot hides what others gain
                rise = losses[1:] - losses[0]
                most = max(-float(rise.min()), _TYPICAL * float(np.median(np.abs(rise))))
                if float(rise.max()) > most:
                    losses = np.minimum(losses, losses[0] + most)
                    found = estimates.robust(estimator, now, told, losses)
            squares = np.square([now.lengths[i] for i in told])
            found.bend = (0.0 if found.bend != found.bend else found.bend) + float(
                np.mean(known / squares)
            )
            return found
        return estimator(now, told, losses)

    def _known_bend(self, told: np.ndarray) -> FloatArray:
        """What the curvature learnt so far adds to each measurement, ``[n]``."""
        model = self._curvature.quadratic(self.dimension)
        steps = self._round.measurements.steps(told, model.coupled)
        return 0.5 * ((steps @ model.matrix) * steps).sum(axis=1)

    def _raise_penalty(self, center: rounds.Loss, told: list[rounds.Loss]) -> None:
        """The price of a unit of violation: enough to turn the cost's slope around."""
        if not center.violation > 0 or len(told) < 2:
            return
        spread = float(np.std([t.violation for t in told]))
        if spread > 0:
            steep = 2.0 * float(np.std([t.loss for t in told])) / spread
            self._penalty = max(self._penalty, steep)
        if self._value is not None and 0 < 0.9 * self._value.violation < center.violation:
            self._penalty *= 2.0

    # -- the step without a learning rate ----------------------------------------------------

    def _judge(
        self,
        plan: rounds.Plan | None,
        estimate: estimates.Estimate,
        center: rounds.Loss,
        told: np.ndarray,
    ) -> None:
        """Moves the iterate to the round's base point, or leaves it where it was."""
        r = self._round
        noise = self._noise.learn_fit(estimate.noise)
        rounding = 4e-16 * abs(center.loss)
        exact = noise == 0
        value = rounds.Value(
            center.loss if exact else estimate.value - self._penalty * center.violation,
            center.violation,
            max(2.0 * noise / math.sqrt(told.size + 1), rounding),
        )
        repeats = self._noise.of_repeats
        if self._levels and estimate.residual >= _UNFIT and repeats == repeats:
            value = rounds.Value(*center, max(repeats, rounding))  # no fit tells it better
        slope_error = noise / (self._length * math.sqrt(told.size))
        if self._dense:  # twice that in a change: the base point is not fitted; and some to be sure
            slope_error *= 3.0
        if plan is None or self._value is None:
            self._refresh(value)
            self._slopes = estimate.gradient
            self._bend = estimate.bend if estimate.bend == estimate.bend else 0.0
            return
        moved = r.point - self._x
        length = self._smooth(moved)
        actual = self._merit(self._value) - self._merit(value)
        error = _CLEAR * math.hypot(value.error, self._value.error)
        predicted = plan.predicted(plan.factor)
        assert self._slopes is not None
        jumped = moved[self._levels.positions].any()
        restless = self._restless and not jumped
        if restless:
            # The costs of two rounds differ by more than the step gains: the slopes along it tell.
            actual = -0.5 * float((self._slopes + estimate.gradient) @ moved)
            error = _CLEAR * slope_error * length
        # Nothing shrinks the estimate of a dense round. Of a step shorter than the perturbations,
        # its noise would be taken for curvature, which corrects the next one, and so on.
        # Nor does a step that is nothing beside them tell anything of the curvature.
        least = self._length * (1.0 if self._dense and not exact else _SHORTEST)
        if not jumped and length >= least:
            self._curvature.learn(moved, estimate.gradient - self._slopes, slope_error)
        if actual < -error:
            if not plan.measured:
                self._radius = 0.25 * length
            if noise:
                # The iterate may only have been lucky: it is measured again before the next step.
                self._slopes, self._radius = None, max(self._radius, self._length)
            return
        if plan.measured:
            pass  # no model predicted it
        elif predicted > error:
            agreement = actual / predicted
            if agreement < 0.25:
                self._radius = 0.5 * length
            elif agreement > (0.75 if restless else 0.5) and length > 0.8 * self._radius:
                self._radius = 2.0 * length
        elif self._dense and noise and length > 0.8 * self._radius and not self._restless:
            # Noise hides what so short a step gains: the slope left along it tells if it was right.
            before, after = float(self._slopes @ moved), float(estimate.gradient @ moved)
            if after < 0.5 * before < 0:
                self._radius = 2.0 * length
        self._x, self._value, self._slopes = r.point, value, estimate.gradient
        self._bend = estimate.bend if estimate.bend == estimate.bend else 0.0

    def _propose(self, estimate: estimates.Estimate) -> str:
        """Plans the next step from the iterate."""
        gradient = self._slopes
        assert gradient is not None
        size = float(np.linalg.norm(gradient))
        if not math.isfinite(size):
            return "the gradient estimate is not finite"
        limit = self._config.max_gradient_norm
        if limit is not None and size > limit:
            return f"gradient norm {size:.3g} is above max_gradient_norm {limit:.3g}"
        d = self.dimension
        if not self._radius:
            self._radius = self._length * math.sqrt(d)
        free = np.ones(d, dtype=bool)
        lower, upper = self._bounds
        if lower is not None:
            free &= ~((self._x <= lower) & (gradient > 0))
        if upper is not None:
            free &= ~((self._x >= upper) & (gradient < 0))
        model = self._curvature.quadratic(d)
        move = model.minimise(gradient, self._radius, free)
        jump, jump_gain, switch, switch_gain = np.zeros(d), 0.0, np.zeros(d), 0.0
        if self._levels:
            move[self._levels.positions] = 0.0
            jump, jump_gain, switch, switch_gain = self._jumps(estimate)
        if len(self._walls):
            near = 0.5 * self._length
            self._beyond = self._walls.wanted(
                self._x, gradient, estimate.support, near, self.num_rounds
            )
        move = self._project(self._x + move) - self._x
        while not self._safe(move, float(gradient @ move)):
            move = 0.5 * move
        slope, quadratic = float(gradient @ move), float(move @ model.product(move))
        gain = 0.0
        if slope < 0 or jump_gain > 0 or switch_gain > 0:
            self._plan = rounds.Plan(move + jump, switch, slope - jump_gain, quadratic, switch_gain)
            gain = self._plan.predicted(1.0)
        self._adapt_length(estimate, gain)
        return ""

    def _prefer_measured(self, cost: float, told: np.ndarray, costs: FloatArray) -> None:
        """Plans a move to the best measurement if it gains more than the step is predicted to.

        What levels do together, two scans that are off or a delay that begins at a threshold, no
        sum of their effects tells; a measurement has seen it.
        """
        best = int(np.argmin(costs))
        gain = cost - float(costs[best])
        planned = 0.0 if self._plan is None else self._plan.predicted(1.0)
        if gain > max(planned, _CLEAREST * self._noise.of_repeats):
            move = self._round.measurements.step(int(told[best]))
            nothing = np.zeros(self.dimension)
            self._plan = rounds.Plan(nothing, move, 0.0, 0.0, gain, measured=True)

    def _spare(self, cost: float, told: np.ndarray, costs: FloatArray) -> set[int]:
        """Changes fewer levels at a time where that costs more than the next step would gain.

        Returns the measurements that cost clearly more: the levels that they visit are dear.
        """
        gain = 0.0 if self._plan is None else self._plan.predicted(1.0)
        worth = self._worth(cost, costs, gain, 0.5)
        self._sparing = min((2.0 if worth == 1 else worth) * self._sparing, 1.0)
        return set(told[costs - cost > max(_CLEAREST * self._noise.size, gain)].tolist())

    def _safe(self, move: FloatArray, change: float) -> bool:
        """Whether a move that changes the cost by ``change`` to first order respects the limit.

        To second order by at most ``bend |move|^2``: as if all curvature lay along the move.
        """
        limit = self._config.max_regression
        return limit is None or change + max(self._bend, 0.0) * float(move @ move) <= limit

    def _effects(self, estimate: estimates.Estimate) -> tuple[FloatArray, FloatArray]:
        """Cost of the round's steps of integers down and up, ``[n]`` each; inf where none is."""
        places = self._levels.positions
        bends = np.array([estimate.bends.get(int(i), 0.0) for i in places])
        down, up = (
            np.where(step != 0, estimate.gradient[places] * step + bends * np.abs(step), np.inf)
            for step in self._neighbours()
        )
        return down, up

    def _found(self, estimate: estimates.Estimate) -> np.ndarray:
        """Integers that the estimate says matter, ``[n] bool``."""
        matter = [*estimate.support, *estimate.bends]
        return np.isin(self._levels.positions, matter) & self._levels.integers

    def _jumps(self, estimate: estimates.Estimate) -> tuple[FloatArray, float, FloatArray, float]:
        """Moves to better levels, of each knob the one whose measured effect is best.

        Those of integers and what they gain, then those of choices.
        """
        d, gradient = self.dimension, estimate.gradient
        jump, switch, switch_gain = np.zeros(d), np.zeros(d), 0.0
        below, above = self._effects(estimate)
        better = np.minimum(below, above) < 0
        if estimate.shared <= 0.5:  # a slope that all share, a price, is every knob's
            better &= self._found(estimate)
        better &= self._levels.integers
        down, up = self._neighbours()
        jump[self._levels.positions] = np.where(below < above, down, up) * better
        gain = -float(np.minimum(below, above)[better].sum())
        # Two categories are two columns of opposite sign: neither is likely, their effect may be.
        visits = self._share * self._round.told(repeats=False)
        noise = self._noise.size if math.isnan(estimate.noise) else estimate.noise
        doubt = _CLEAR * noise * math.sqrt(2.0 / visits)
        for chosen, weights in self._levels.categories(self._x):
            best = int(weights[np.argmin(gradient[weights])])
            if best != chosen:
                places, steps = self._levels.switch(chosen, best)
                effect = float(gradient[places] @ steps)
                if effect < -doubt:
                    switch[places], switch_gain = steps, switch_gain - effect
        return jump, gain, switch, switch_gain

    def _adapt_reach(self, estimate: estimates.Estimate | None, costly: bool) -> None:
        """How far perturbations move integers: ever farther, until that is known to cost more.

        What matters many levels away only shows there; what a step to either side makes worse is
        looked for at half that distance.
        """
        if costly:
            self._reach = np.maximum(0.5 * self._reach, _LEAST)
            self._farthest = np.minimum(self._farthest, self._reach)
            return
        self._reach = np.minimum(2.0 * self._reach, self._farthest)
        self._farthest = np.minimum(1.1 * self._farthest, _FARTHEST)
        if estimate is not None:
            below, above = self._effects(estimate)
            worse = self._found(estimate) & (np.minimum(below, above) > 0)
            tried = np.maximum(*np.abs(self._neighbours()))
            self._reach[worse] = self._farthest[worse] = 0.5 * tried[worse]

    # -- the length of perturbations ---------------------------------------------------------

    def _learn_rise(self, told: np.ndarray, rises: FloatArray) -> None:
        """What measurements cost more than the iterate (``[n]``), whatever the fits say."""
        square = float(np.mean(np.square([self._round.measurements.lengths[i] for i in told])))
        if told.size > 1:
            error = float(np.std(rises, ddof=1)) / math.sqrt(told.size)
            self._rise.learn(float(np.mean(rises)) / square, error / square)

    def _adapt_length(self, estimate: estimates.Estimate, gain: float) -> None:
        """Perturbations as long as noise asks for and as short as what they cost allows.

        On average a perturbation costs ``bend * length^2`` more than the iterate. Where that is
        more than the step would gain, perturbations shorten; where it cannot be told from nothing
        and the noise hides the gradient, they lengthen.
        """
        if self._config.variant != "adaptive":
            return
        n = self._round.told(repeats=False)
        square = self._length**2
        noise = self._noise.size if math.isnan(estimate.noise) else estimate.noise
        self._excess.learn(estimate.bend, noise / math.sqrt(n) / square)
        # Of few measurements a fit may be perfect, and wrong. (Of many, the mean rises by drift.)
        clear = self._rise.bend - _CLEAR * self._rise.error
        paid = 1.25 * max(self._excess.bend, clear) * square  # the mean over the two lengths
        error = noise / math.sqrt(n)
        if paid > max(error, gain):
            self._scale_length(max(math.sqrt(max(gain, 0.0) / paid), 0.5))
        elif paid < max(0.5 * error, gain) and (
            estimate.residual >= 0.3 or noise >= 0.3 * estimate.signal > 0
        ):
            spread = estimate.spread if estimate.spread > 0 else 1.0
            lengthen = 0.25 * (2.0 - math.log2(spread))
            self._scale_length(2.0 ** min(max(lengthen, -0.5), 0.5))

    def _balance_length(self, estimate: estimates.Estimate) -> None:
        """Lengthens perturbations under noise, shortens them under curvature.

        Residuals of the long rows over those of the short ones (lengths 2 to 1), as mean squares:
        1 if noise dominates, 16 if curvature does, 4 where the two balance. A fit that is good
        already is left alone: longer perturbations cost a live system more.
        """
        if estimate.residual >= 0.3 and estimate.spread > 0:
            lengthen = 0.25 * (2.0 - math.log2(estimate.spread))
            self._scale_length(2.0 ** min(max(lengthen, -0.5), 0.5))

    def _scale_length(self, factor: float) -> None:
        # From Nevergrad's standard mutation down to where a difference is mostly round-off.
        self._length = min(max(self._length * factor, 1e-6), 1.0, max(self._longest, 1e-6))

    # -- the step with a learning rate -------------------------------------------------------

    def _descend(self, gradient: FloatArray) -> str:
        c = self._config
        norm = float(np.linalg.norm(gradient))
        if not math.isfinite(norm):
            return "the gradient estimate is not finite"
        if norm == 0:
            return ""
        if c.max_gradient_norm is not None and norm > c.max_gradient_norm:
            return f"gradient norm {norm:.3g} is above max_gradient_norm {c.max_gradient_norm:.3g}"
        rate = c.learning_rate
        assert rate is not None
        rate = float(rate(self.num_rounds) if callable(rate) else rate)
        x = self._project(self._x - (rate / norm if c.normalize else rate) * gradient)
        # Nevergrad rejects candidates that violate a cheap constraint; at an iterate that does, no
        # round could begin.
        halvings = 0
        while not self._allowed(x):
            x, halvings = (x + self._x) / 2, halvings + 1
            if halvings == 20:
                return "no part of the step satisfies the constraints"
        self._x = x
        return ""

    def _project(self, x: FloatArray) -> FloatArray:
        """The nearest point in the box, then toward the initial point until it is in the ball."""
        lower, upper = self._bounds
        if lower is not None:
            x = np.maximum(x, lower)
        if upper is not None:
            x = np.minimum(x, upper)
        norm = float(np.linalg.norm(x))
        if self._config.radius is not None and norm > self._config.radius:
            x = x * (self._config.radius / norm)
        return x

    def _clearly_better(self) -> rounds.Loss | None:
        """What was measured at the trial point, if it is clear before the round around it ends."""
        told = [t for t in self._round.base if t.loss == t.loss]
        if self._plan is None or not self._plan.settled or self._value is None or not told:
            return None
        mean = rounds.Loss(*(sum(part) / len(told) for part in zip(*told)))
        error = _CLEAREST * math.hypot(self._noise.size / math.sqrt(len(told)), self._value.error)
        return mean if self._merit(mean) < self._merit(self._value) - error else None

    def recommend(self) -> ng.p.Parameter:
        found = super().recommend()
        better = self._clearly_better()
        if better is not None:
            found.loss = better.loss
        elif self._value is not None:
            found.loss = self._value.loss
        elif math.isfinite(self._x_loss):
            found.loss = self._x_loss
        return found

    def _internal_provide_recommendation(self) -> FloatArray:
        if self._clearly_better() is not None:
            return self._round.point
        return self._last_good if self._unsure and not self._searching else self._x

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
    for name in ("learning_rate", "delta", "radius", "max_gradient_norm", "max_regression"):
        size = options[name]
        if size is not None and not callable(size) and not 0 < size < math.inf:
            raise ValueError(f"{name} is {size!r}: expected a finite number above 0")
    if options["max_regression"] is not None and options["learning_rate"] is not None:
        raise ValueError(
            f"max_regression is {options['max_regression']} with a learning_rate: steps of a given "
            "length are not held back; leave learning_rate out"
        )
    if options["normalize"] and options["learning_rate"] is None:
        raise ValueError("normalize is True without a learning_rate: set the length of a step")
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

    Without a learning rate a step minimises a quadratic model within a trust radius. It is tried
    by one evaluation before a round is spent on it, lengthened or shortened by what that tells, and
    taken back if it is measured to be worse beyond the noise. Multiplying the cost by a number
    changes nothing.

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
            and adaptive: only through ``num_measurements``). Default: a tenth of the dimension, 1
            to 10.
        num_measurements: ``m``; default ``ceil(2 s ln(d / s))``, at most ``d`` (with integers or
            choices at least 8, or ``2 d``); the adaptive variant adds what fills the last batch of
            ``num_workers``, up to ``d``.
        num_perturbations: simultaneous perturbations of a round in variant B; default ``3 m``.
        learning_rate: the paper's step: a size, or a function of the number of completed rounds (a
            module-level function if the optimizer is to be pickled). Steps are then not taken
            back. Default: none, the trust region.
        delta: B, Z, E: a row ``p`` is measured at ``x + delta p / |p|^2``; default 0.05. Adaptive:
            the length per variable to begin with; default 0.1. Without a learning rate it moves
            integers by up to 1 to begin with, then as far as costs nothing that can be told.
        radius: iterates stay in the ball of that radius around the initial point.
        normalize: with a learning rate, step along the unit gradient (the paper's queueing runs).
        max_gradient_norm: an estimate beyond it is not followed: the round takes no step.
        max_regression: without a learning rate: what a measurement may cost, in the cost's unit,
            above the iterate. Guaranteed: none is asked for that the last round's slopes and mean
            curvature put higher. Likely: few cost more. What was not measured yet has no slope, so
            perturbations begin a quarter as long, and with a quarter of the levels; they double
            after a round without a measurement above the limit and halve with each that is, and the
            levels visited by one above are asked for seldom. A level cannot begin small: that it
            costs more is known once it is measured.

    Raises:
        ValueError: for an option out of its range.

    Example:

    ```python
    >>> import nevergrad as ng
    >>> import trimtab.optimizers
    >>> optimizer = ng.optimizers.registry["CONGO"](parametrization=100, budget=400)
    >>> recommendation = optimizer.minimize(lambda x: (x[0] - 1) ** 2 + (x[7] + 2) ** 2)
    >>> recommendation.value[[0, 7]].round(3)
    array([ 1., -2.])
    ```

    With options, and driven from outside:

    ```python
    >>> from trimtab.optimizers import ParametrizedCONGO
    >>> optimizer = ParametrizedCONGO(max_regression=0.5)(parametrization=100)
    >>> candidate = optimizer.ask()
    >>> optimizer.tell(candidate, cost(candidate.value))
    ```
    """

    def __init__(
        self,
        *,
        variant: str = "adaptive",
        sparsity: int | None = None,
        num_measurements: int | None = None,
        num_perturbations: int | None = None,
        learning_rate: float | tp.Callable[[int], float] | None = None,
        delta: float | None = None,
        radius: float | None = None,
        normalize: bool = False,
        max_gradient_norm: float | None = None,
        max_regression: float | None = None,
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
        self.max_regression = max_regression
        super().__init__(_CONGO, locals(), as_config=True)


CONGO = ParametrizedCONGO().set_name("CONGO", register=True)
CONGO_B = ParametrizedCONGO(variant="B").set_name("CONGO_B", register=True)
CONGO_Z = ParametrizedCONGO(variant="Z").set_name("CONGO_Z", register=True)
CONGO_E = ParametrizedCONGO(variant="E").set_name("CONGO_E", register=True)
