"""What is known of the measurements themselves: noise, excess cost, and failures in disguise."""

from __future__ import annotations

import math

import numpy as np

FloatArray = np.ndarray

# Evaluations that failures are judged by, at most; how often the base point fails where going far
# is the cause, as a share of how often perturbations do; and the evidence (nats) that drops it.
_LAST, _AT_BASE, _ACQUITTED = 1024, 0.1, 1.0


class Noise:
    """The standard deviation of one measurement, from repeats at one point and from fits.

    Attributes:
        size: the standard deviation; 0 where repeats agreed.
    """

    def __init__(self) -> None:
        self.differences: list[float] = []
        self.fits: list[float] = []
        self.size = 0.0

    def wanted(self, rounds: int, measurements: int) -> bool:
        """Whether a repeat is due: early, then seldom where it costs a lot or tells nothing."""
        if len(self.differences) < 3:
            return True
        every = max(1, 16 // (measurements + 1))
        return rounds % (every if any(self.differences) else 8 * every) == 0

    def learn(self, difference: float) -> None:
        if difference == difference:
            self.differences = [*self.differences[-19:], abs(difference)]
            self._update()

    def learn_fit(self, noise: float) -> float:
        if noise == noise:
            self.fits = [*self.fits[-4:], noise]
        self._update()
        return self.size

    @property
    def of_repeats(self) -> float:
        """The same from repeats alone, which see nothing of what a fit leaves; else NaN."""
        if not self.differences:
            return math.nan
        # |N(0, 2)| has its median at 0.954 and its mean at 1.128.
        found = float(np.median(self.differences)) / 0.954
        if len(self.differences) < 5:
            found = max(found, float(np.mean(self.differences)) / 1.128)
        return found

    def _update(self) -> None:
        fit = float(np.median(self.fits)) if self.fits else 0.0
        n = len(self.differences)
        if not n:
            self.size = fit
        elif not any(self.differences):
            self.size = 0.0
        elif n < 5:
            self.size = max(self.of_repeats, fit)
        else:
            self.size = self.of_repeats or fit


class Excess:
    """What perturbations cost, per squared length: an average with forgetting."""

    def __init__(self) -> None:
        self.bend, self.error = 0.0, math.inf

    def learn(self, bend: float, error: float) -> None:
        if error == 0 or not math.isfinite(self.error):
            self.bend, self.error = bend, error
            return
        # The weight of what was known, that of the new one being 1.
        ratio = min(error / self.error, 1e8) if self.error else 0.0
        weight = 0.8 * ratio * ratio
        self.bend = (weight * self.bend + bend) / (weight + 1.0)
        self.error = error / math.sqrt(weight + 1.0)


class Failures:
    """Whether evaluations fail because they go far, or whatever they are.

    Where going far is the cause, the base point hardly ever fails, and where few perturbations do
    these are the long ones: of those that fail, a share ``1 - 2.3 m`` is counted on where the share
    ``m`` of all fails. (Of a region of two knobs both lengths fail as often once both reach it, and
    then ``m`` is a quarter.) Failures of another cause do not ask how far they are.
    """

    def __init__(self) -> None:
        self.sizes, self.failed = np.zeros(0), np.zeros(0, dtype=bool)

    def learn(self, sizes: FloatArray, failed: np.ndarray) -> None:
        """Adds evaluations, ``[n]`` each: Euclidean sizes (0: the base point), and which failed."""
        self.sizes = np.concatenate([self.sizes, sizes])[-_LAST:]
        self.failed = np.concatenate([self.failed, failed])[-_LAST:]

    def often(self, count: int) -> bool:
        """Whether more than a tenth fails, of so many perturbations, or of the last 20 if fewer."""
        count = max(count, 20)
        return int(self.failed[self.sizes > 0][-count:].sum()) > 0.1 * count

    @property
    def of_size(self) -> bool:
        """Whether going less far may help, as far as is known."""
        moved = self.sizes > 0
        sizes, failed = self.sizes[moved], self.failed[moved]
        if not failed.any():
            return True
        share = float(failed.mean())
        at_base = int(self.failed[~moved].sum())
        answered = int((~moved).sum()) - at_base
        evidence = at_base * math.log(_AT_BASE) - answered * math.log(max(1.0 - share, 0.05))
        far = sizes > math.exp(float(np.mean(np.log(sizes))))
        chance = float(far.mean())  # that a failure of another cause is a far one
        if 0.0 < chance < 1.0:
            odds = min(max(1.0 - 2.3 * share, 0.55), 0.9)
            expected = odds * chance / (odds * chance + (1.0 - odds) * (1.0 - chance))
            evidence += int((failed & far).sum()) * math.log(expected / chance)
            evidence += int((failed & ~far).sum()) * math.log((1.0 - expected) / (1.0 - chance))
        return evidence > -_ACQUITTED


def penalties(costs: FloatArray) -> np.ndarray:
    """Costs that are no costs but a sign of failure, ``[n] bool``; the base point's is first.

    A group far above all others, the base point among these, at ten times the range that they
    span: the two lengths of perturbations leave no such gap in anything that a gradient could
    describe.
    """
    found = np.zeros(costs.size, dtype=bool)
    order = np.argsort(costs, kind="stable")
    values = costs[order]
    above = np.diff(values) > 10 * (values[:-1] - values[0])
    least = max(3, costs.size // 4, int(np.searchsorted(values, costs[0], "right")))
    for k in np.flatnonzero(above):
        if k + 1 >= least:
            found[order[k + 1 :]] = True
            break
    return found
