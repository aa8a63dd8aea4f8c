"""Walls: the place from which on a coordinate fails, as the failures of few rounds tell.

Failures of measurements that move all coordinates at once are blamed on one: the one whose signs
separate what failed from what answered. Pure functions and one small class: nothing here knows of
asks and tells.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing as tp

import numpy as np

from . import estimates, sensing

FloatArray = np.ndarray
Bounds = tuple[FloatArray | None, FloatArray | None]

# Bits by which the evidence for a wall exceeds what chance shows among all that were looked for:
# failures that have no such cause make up a wall in one round of 2^10 at most.
_BITS = 10.0
# Measurements, at most, and bytes of rounds that are kept because a failure is not explained yet.
_MOST, _BYTES = 512, 1 << 26


@dataclasses.dataclass
class Seen:
    """A round, whose base point answered.

    Attributes:
        now: its measurements.
        fine: ``[n]`` those that answered.
        failed: ``[k]`` those that failed, for a reason not known yet.
    """

    now: estimates.Measurements
    fine: np.ndarray
    failed: np.ndarray


@dataclasses.dataclass(frozen=True)
class Rule:
    """Points ``x`` with ``side * x[coordinate] > side * fine`` fail.

    Attributes:
        coordinate: in standardised space.
        side: 1: upward; -1: downward.
        fine: the farthest place to that side that answered.
        failing: the nearest place beyond it that failed.
        bits: ``-log2`` of the chance that the signs of one coordinate fit as well.
        explained: of each round, the measurements that failed beyond.
    """

    coordinate: int
    side: int
    fine: float
    failing: float
    bits: float
    explained: list[np.ndarray]


@functools.lru_cache(maxsize=4096)
def _tail(n: int, k: int) -> float:
    """``-log2`` of the chance of ``k`` heads or more among ``n`` fair coins."""
    return n - math.log2(sum(math.comb(n, i) for i in range(k, n + 1)))


def rule(seen: tp.Sequence[Seen], x: FloatArray) -> Rule | None:
    """The one-sided rule that tells failures from answers best, if it beats chance.

    Were failures of another cause, each step would be as likely to have the opposite sign, its
    length and the failure being what they are. So a rule is as unlikely as its signs: those of
    answers whose step is long enough to fail all point away, those of failures mostly do not. The
    rules looked for are two a coordinate and length of perturbations.

    Args:
        seen: rounds; other causes may have added to their failures.
        x: ``[d]`` one more point that answered.

    Returns:
        The rule of most bits, None if these are below ``10 + log2`` of the number of rules.
    """
    told = [np.concatenate([s.fine, s.failed]) for s in seen]
    fails = np.concatenate([np.arange(t.size) >= s.fine.size for s, t in zip(seen, told)])
    if not fails.any():
        return None
    rows = np.stack([s.now.rows[i] for s, t in zip(seen, told) for i in t])
    lengths = np.array([s.now.lengths[i] for s, t in zip(seen, told) for i in t])
    thresholds = fails.size
    if rows.dtype == np.uint8:
        thresholds = sum(len({abs(s.now.lengths[i]) for i in t}) for s, t in zip(seen, told))
    needed = _BITS + math.log2(2 * x.size * thresholds)
    if fails.size < needed:
        return None
    ends = np.cumsum([t.size for t in told])[:-1]

    def places(steps: FloatArray, part: slice | np.ndarray) -> FloatArray:
        found = [
            s.now.clip(s.now.base[part] + p, part) for s, p in zip(seen, np.split(steps, ends))
        ]
        return np.concatenate(found)

    best: Rule | None = None
    for part, signs in sensing.blocks(rows, x.size):
        steps = lengths[:, None] * signs
        at = places(steps, part)
        answered, failed = at[~fails], at[fails]
        known = np.stack([x[part], *(s.now.base[part] for s in seen)])
        movable = ~np.isin(np.arange(part.start, part.stop), seen[0].now.leveled)
        for side in (1, -1):
            most = np.max if side > 0 else np.min
            fine = most(known, axis=0)
            if answered.size:
                fine = side * np.maximum(side * fine, side * most(answered, axis=0))
            beyond_all = side * most(failed, axis=0) > side * fine
            candidates = np.flatnonzero(movable & beyond_all)
            if not candidates.size:
                continue
            columns, fine = candidates + part.start, fine[candidates]
            # What would have been beyond with one sign of the step or with the other.
            able = side * places(side * np.abs(steps[:, candidates]), columns) > side * fine
            beyond = side * at[:, candidates] > side * fine
            counts = zip(able[fails].sum(axis=0), beyond[fails].sum(axis=0))
            bits = able[~fails].sum(axis=0) + np.array([_tail(int(n), int(k)) for n, k in counts])
            k = int(np.argmax(bits))
            if bits[k] >= needed and (best is None or bits[k] > best.bits):
                failing = side * float((side * at[beyond[:, k], candidates[k]]).min())
                explained = [t[b] for t, b in zip(told, np.split(beyond[:, k], ends))]
                best = Rule(
                    int(columns[k]), side, float(fine[k]), failing, float(bits[k]), explained
                )
    return best


@dataclasses.dataclass
class Wall:
    """A coordinate's bound to one side.

    Attributes:
        fine: the farthest place that answered: the bound.
        failing: the nearest beyond it that failed.
        wait: rounds between two probes of it.
        due: the round from which on it may be probed.
    """

    fine: float
    failing: float
    wait: int = 1
    due: int = 0


class Probe(tp.NamedTuple):
    """A measurement beyond a wall: of the base point with one coordinate elsewhere."""

    coordinate: int
    side: int
    place: float


class Walls:
    """The walls found so far, by coordinate and side.

    Attributes:
        bounds: the parametrization's lower and upper bounds cut by the walls, ``[d]`` each or None.
    """

    def __init__(self, bounds: Bounds, dimension: int) -> None:
        self._outer = self.bounds = bounds
        self._dimension = dimension
        self._walls: dict[tuple[int, int], Wall] = {}
        self._seen: list[Seen] = []

    def __len__(self) -> int:
        return len(self._walls)

    def learn(
        self, now: estimates.Measurements, x: FloatArray, fine: np.ndarray, failed: np.ndarray
    ) -> np.ndarray:
        """Adds the walls that the failures of a round tell of, one after the other.

        Failures that too few measurements explain are kept for the rounds to come.

        Args:
            now: the round's; its base point answered.
            x: ``[d]`` the iterate; it stays within.
            fine: ``[n]`` measurements that answered.
            failed: ``[k]`` measurements that did not.

        Returns:
            Those of the failures that the walls do not explain.
        """
        if not failed.size:
            return failed
        latest = Seen(now, fine, failed)
        self._seen.append(latest)
        counts = [s.fine.size + s.failed.size for s in self._seen]
        sizes = [n * now.rows[0].nbytes for n in counts]
        while len(counts) > 1 and (sum(counts) > _MOST or sum(sizes) > _BYTES):
            del self._seen[0], counts[0], sizes[0]
        while (found := rule(self._seen, x)) is not None:
            key = found.coordinate, found.side
            known = self._walls.get(key, Wall(0.0, 0.0))
            self._walls[key] = dataclasses.replace(known, fine=found.fine, failing=found.failing)
            for s, explained in zip(self._seen, found.explained):
                s.failed = np.setdiff1d(s.failed, explained)
            self._cut()
        self._seen = [s for s in self._seen if s.failed.size]
        return latest.failed

    def wanted(
        self, x: FloatArray, gradient: FloatArray, support: np.ndarray, near: float, number: int
    ) -> Probe | None:
        """Where to look whether a wall is still there: only if the model wants to go beyond it.

        Args:
            x: ``[d]`` the iterate.
            gradient: ``[d]`` the slopes there.
            support: coordinates that matter.
            near: the iterate is at a wall if it is so near; and where the nearest failure is so
                near to the wall it is tried itself, for it may have recovered.
            number: rounds completed.
        """
        steep, probe = 0.0, None
        for (i, side), wall in self._walls.items():
            outward = -side * float(gradient[i])
            at_wall = side * (wall.fine - x[i]) <= near
            if at_wall and outward > steep and number >= wall.due and i in support:
                narrow = abs(wall.failing - wall.fine) <= near
                place = wall.failing if narrow else 0.5 * (wall.fine + wall.failing)
                steep, probe = outward, Probe(i, side, place)
        return probe

    def probed(self, probe: Probe, answered: bool, number: int) -> bool:
        """Moves a wall by what a probe told; whether it is none, as its failing place answers."""
        i, side, place = probe
        wall = self._walls.get((i, side))
        if wall is None or side * place <= side * wall.fine:
            return False
        if not answered:
            wall.wait *= 2 if side * place < side * wall.failing else 4
            wall.failing = side * min(side * place, side * wall.failing)
            wall.due = number + wall.wait
            return False
        self._seen = []
        wall.fine = place
        gone = side * place >= side * wall.failing
        if gone:
            del self._walls[i, side]
        self._cut()
        return gone

    def release(self, point: FloatArray) -> None:
        """Takes down the walls that a point which answered lies beyond."""
        beyond = [k for k, wall in self._walls.items() if k[1] * (point[k[0]] - wall.fine) > 0]
        for k in beyond:
            del self._walls[k]
        if beyond:
            self._seen = []
            self._cut()

    def hurry(self) -> None:
        """Lets all walls be probed as if they were new."""
        for wall in self._walls.values():
            wall.wait, wall.due = 1, 0

    def _cut(self) -> None:
        lower, upper = self._outer
        up = [(i, wall.fine) for (i, side), wall in self._walls.items() if side > 0]
        down = [(i, wall.fine) for (i, side), wall in self._walls.items() if side < 0]
        if up:
            upper = np.full(self._dimension, np.inf) if upper is None else upper.copy()
            for i, place in up:
                upper[i] = min(upper[i], place)
        if down:
            lower = np.full(self._dimension, -np.inf) if lower is None else lower.copy()
            for i, place in down:
                lower[i] = max(lower[i], place)
        self.bounds = lower, upper
