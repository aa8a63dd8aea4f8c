"""The loop: ask, apply, settle, measure, tell; and back to the last good point when in doubt.

The optimizer is not stored. Its asks follow from its seed and from what it was told, so a restart
replays the log of both; where the replay asks for another point than the log has (another version
of numpy, say), the run begins afresh from the last good point.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import typing as tp
import warnings

import nevergrad as ng
from nevergrad.common import errors

from ..congo import ParametrizedCONGO
from . import knobs as spaces
from .commands import Failed, Stop, Stopped
from .config import SLO, Config, ConfigError
from .journal import Lines
from .sources import measure

log = logging.getLogger("trimtab.tune")

# Seconds between two tries to restore a system that does not take its knobs; doubled up to 60.
_RETRY = 1.0
# Tries to restore when told to end.
_LAST_TRIES = 3
# Measured points that are remembered as free of breaches.
_REMEMBERED = 10_000


@dataclasses.dataclass
class Status:
    """Where the loop is, for metrics and views.

    Attributes:
        phase: what it does now.
        evaluations: points told to the optimizer.
        outcomes: how many of them were ``ok``, ``failed`` and ``breach``.
        cost: the last measured; None before the first.
        recommended: the optimizer's estimate at its recommendation.
        rounds: rounds completed.
        rollbacks: times that the system was put back.
        outage: whether even the last good point cannot be measured or breaches.
        now: values that are applied.
        good: the last good point.
    """

    phase: str = "starting"
    evaluations: int = 0
    outcomes: dict[str, int] = dataclasses.field(
        default_factory=lambda: {"ok": 0, "failed": 0, "breach": 0}
    )
    cost: float | None = None
    recommended: float | None = None
    rounds: int = 0
    rollbacks: int = 0
    outage: bool = False
    now: spaces.Values = dataclasses.field(default_factory=dict)
    good: spaces.Values = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Outcome:
    """What became of one point.

    Attributes:
        kind: ``ok``, ``failed`` or ``breach``.
        cost: in the cost's unit; None where it is not known.
        violation: how far the SLO's value is above its bound, in units of the bound.
        why: what failed.
    """

    kind: str
    cost: float | None = None
    violation: float | None = None
    why: str = ""


class Breach(Failed):
    """The SLO's value is above its bound before the window is over."""


class Tuner:
    """Tunes one system.

    Args:
        config: see ``Config``.
        stop: told by signals; the loop then restores the system and returns.
        observe: called with the ``Status`` whenever it changes.

    Raises:
        Failed: a knob of Kubernetes without a configuration to reach it.
    """

    def __init__(
        self,
        config: Config,
        stop: Stop | None = None,
        observe: tp.Callable[[Status], None] = lambda status: None,
    ) -> None:
        self.config = config
        self.stop = Stop() if stop is None else stop
        self.status = Status()
        self._observe = observe
        self.system = spaces.System(config, lambda **change: self._audit.append(**change))
        self._state: Lines
        self._audit: Lines
        self._fine: dict[tuple[tp.Any, ...], None] = {}
        self._pending: ng.p.Parameter | None = None
        self._optimizer: tp.Any = None

    # -- beginning ---------------------------------------------------------------------------

    def dry_run(self) -> list[str]:
        """Checks everything and changes nothing.

        Returns:
            Lines that say what was measured and what the first round would apply.

        Raises:
            Failed: what could not be checked or measured.
        """
        start = {knob.name: knob.start for knob in self.config.knobs}
        self.system.check(start)
        cost = self._measure_start()
        self._build(start, cost)
        lines = [f"cost now: {cost:g}"]
        if self.config.limits.slo is not None:
            lines.append(f"slo now: {measure(self.config.limits.slo, self.config, self.stop):g}")
        for number in range(self._optimizer.evaluations_per_round):
            point = spaces.values(self.config.knobs, self._optimizer.ask())
            lines.append(f"point {number + 1} of the first round:")
            lines += [f"  {line}" for line in self.system.describe(point)]
        return lines

    def _measure_start(self) -> float:
        """The cost as the system runs now, and proof that it and the SLO can be measured."""
        try:
            cost = measure(self.config.cost, self.config, self.stop)
        except Failed as e:
            raise Failed(f"cost: {e}") from None
        slo = self.config.limits.slo
        if slo is not None:
            try:
                value = measure(slo, self.config, self.stop)
            except Failed as e:
                raise Failed(f"limits.slo: {e}") from None
            if value > slo.bound:
                raise Failed(
                    f"limits.slo.bound is {slo.bound:g}, and the system is at {value:g} before "
                    "anything was changed: raise the bound, or make this the cost"
                )
        return cost

    def _build(self, start: spaces.Values, cost: float) -> None:
        """Makes the optimizer that starts at a point of a known cost."""
        config = self.config
        limit = config.limits.max_regression
        if isinstance(limit, str):
            limit = float(limit[:-1]) / 100 * abs(cost)
            if not limit:
                raise Failed(
                    f"limits.max_regression is {config.limits.max_regression!r} of a cost of 0: "
                    "give a number"
                )
        parameter = spaces.parametrization(config.knobs, start)
        parameter.random_state.seed(config.seed)
        share = config.limits.max_change
        if share is not None:

            def allowed(value: spaces.Values) -> bool:
                if self._optimizer is None:
                    return True
                center = self._optimizer.recommend().value
                return spaces.within(config.knobs, value, center, share)

            parameter.register_cheap_constraint(allowed)
        self._optimizer = None
        self._optimizer = ParametrizedCONGO(
            num_measurements=config.optimizer.num_measurements,
            delta=config.optimizer.delta,
            max_regression=limit,
        )(parameter)
        least = self._optimizer.evaluations_per_round
        if config.evaluations is not None and config.evaluations < least:
            raise Failed(
                f"evaluations is {config.evaluations}, and one round takes {least}: allow several "
                "rounds, or lower optimizer.num_measurements"
            )

    def _begin(self, start: spaces.Values) -> None:
        """A new run from a point that the system is at."""
        cost = self._measure_start()
        self._build(start, cost)
        self.system.apply(start, "start")  # a system that is there already, as it should be
        self._state.append(
            kind="begin", fingerprint=self.config.fingerprint, seed=self.config.seed, start=start,
            cost=cost,
        )  # fmt: skip
        self.status.good = dict(start)
        self._remember(start)

    def _resume(self) -> None:
        """Restores the last good point, then rebuilds the optimizer by replay."""
        lines = self._state.found
        begin = max(i for i, line in enumerate(lines) if line["kind"] == "begin")
        told = [line for line in lines[begin:] if line["kind"] == "tell"]
        good = told[-1]["good"] if told else lines[begin]["start"]
        log.info("found %d evaluations: restoring the last good point", len(told))
        self.status.good = spaces.fitted(self.config.knobs, good)
        gone = sorted(set(good) - set(self.status.good))
        if gone:
            log.warning("knobs %s are no longer configured and stay where they are", gone)
        self._restore("resume")
        difference = self._replay(lines[begin:])
        if difference is None:
            log.info("goes on after evaluation %d", self.status.evaluations)
            return
        log.warning("%s: beginning afresh from the last good point", difference)
        self._pending = None
        self.status = Status(good=spaces.fitted(self.config.knobs, good), now=self.system.now)
        self._wait_until_good()
        self._begin(self.status.good)

    def _replay(self, lines: list[dict[str, tp.Any]]) -> str | None:
        """Asks and tells what a log has; what differs, or None."""
        begin, config = lines[0], self.config
        if begin["fingerprint"] != config.fingerprint:
            return "knobs, cost, limits or options differ from those of the log"
        self._build(begin["start"], begin["cost"])
        self._remember(begin["start"])
        asked = None
        for line in lines[1:]:
            if line["kind"] == "ask" and asked is None:
                asked = self._optimizer.ask()
                if spaces.values(config.knobs, asked) != line["values"]:
                    return f"the replay asks for another point after {self.status.evaluations}"
            elif line["kind"] == "tell" and asked is not None:
                self._tell(asked, Outcome(line["outcome"], line["cost"], line["violation"]))
                asked = None
        self._pending = asked
        return None

    # -- the loop ----------------------------------------------------------------------------

    def run(self) -> bool:
        """Tunes until told to stop, or until the evaluations are used up.

        Returns:
            Whether the system was left at the last good point.

        Raises:
            ConfigError: the state or audit file cannot be used.
            Failed: a target is missing, or the cost, the SLO or the start is not as it must be;
                nothing was changed.
        """
        with (
            Lines(self.config.state, "state", read=True) as self._state,
            Lines(self.config.audit, "audit", read=False) as self._audit,
        ):
            return self._run()

    def _run(self) -> bool:
        resumed = bool(self._state.found)
        if resumed and not any(line.get("kind") == "begin" for line in self._state.found):
            raise ConfigError(
                f"state is {self.config.state!r}: holds no run of a tuner: name another file"
            )
        start = {knob.name: knob.start for knob in self.config.knobs}
        try:
            if not resumed:  # else the way back is tried for as long as it takes
                self.system.check(start)
                self._begin(start)
        except Stopped:
            return True
        restored = True
        try:
            if resumed:
                self._resume()
            budget = self.config.evaluations
            while budget is None or self.status.evaluations < budget:
                self.stop.check()
                self._evaluate_next()
        except Stopped:
            log.info("told to stop")
        finally:
            restored = self._restore("exit")
            self._phase("ended")
        return restored

    def _phase(self, phase: str) -> None:
        self.status.phase = phase
        self.status.now = dict(self.system.now)
        self._observe(self.status)

    def _evaluate_next(self) -> None:
        config, status = self.config, self.status
        if self._pending is None:
            self._pending = self._optimizer.ask()
            point = spaces.values(config.knobs, self._pending)
            self._state.append(kind="ask", number=status.evaluations + 1, values=point)
        point = spaces.values(config.knobs, self._pending)
        outcome = self._evaluate(point)
        if outcome.kind != "ok":
            log.warning("evaluation %d: %s: %s", status.evaluations + 1, outcome.kind, outcome.why)
            status.rollbacks += 1
            self._restore("breach" if outcome.kind == "breach" else "failure")
            if self._wait_until_good():
                return  # an outage: it was not the point's fault, and is measured again
        self._tell(self._pending, outcome)
        self._pending = None
        self._state.append(
            kind="tell", number=status.evaluations, outcome=outcome.kind, cost=outcome.cost,
            violation=outcome.violation, why=outcome.why, good=status.good,
        )  # fmt: skip
        log.info(
            "evaluation %d, round %d: %s, cost %s, recommended %s", status.evaluations,
            status.rounds, outcome.kind, _shown(outcome.cost), _shown(status.recommended),
        )  # fmt: skip
        self._observe(status)

    def _tell(self, candidate: ng.p.Parameter, outcome: Outcome) -> None:
        """Tells the optimizer, and moves the last good point to what it recommends."""
        status, optimizer = self.status, self._optimizer
        cost = float("nan") if outcome.cost is None else outcome.cost
        violation = None if outcome.violation is None else [outcome.violation]
        with warnings.catch_warnings():  # NaN is how CONGO is told of a failure
            warnings.simplefilter("ignore", errors.BadLossWarning)
            optimizer.tell(candidate, cost, constraint_violation=violation)
        point = spaces.values(self.config.knobs, candidate)
        if outcome.kind == "ok":
            self._remember(point)
        else:
            self._fine.pop(tuple(point.values()), None)
        recommendation = optimizer.recommend()
        best = spaces.values(self.config.knobs, recommendation)
        if tuple(best.values()) in self._fine:
            status.good = best
        status.evaluations += 1
        status.outcomes[outcome.kind] += 1
        status.rounds = optimizer.num_rounds
        status.cost = status.cost if outcome.cost is None else outcome.cost
        status.recommended = recommendation.loss

    def _remember(self, point: spaces.Values) -> None:
        if len(self._fine) >= _REMEMBERED:
            del self._fine[next(iter(self._fine))]
        self._fine[tuple(point.values())] = None

    def _evaluate(self, point: spaces.Values) -> Outcome:
        config, slo = self.config, self.config.limits.slo
        try:
            self._phase("applying")
            self.system.apply(point, "measure")
            self._phase("settling")
            self._wait(config.settle)
            self._phase("measuring")
            self._wait(config.window)
            cost = measure(config.cost, config, self.stop)
            value = None if slo is None else measure(slo, config, self.stop)
        except Breach as e:
            return Outcome("breach", why=str(e))
        except Failed as e:
            return Outcome("failed", why=str(e))
        if slo is None or value is None:
            return Outcome("ok", cost)
        violation = max(value - slo.bound, 0.0) / (abs(slo.bound) or 1.0)
        if violation:
            return Outcome("breach", cost, violation, _breach(slo, value))
        return Outcome("ok", cost, 0.0)

    def _wait(self, seconds: float) -> None:
        """Sleeps, and looks at the SLO on the way where it is to be watched.

        Raises:
            Breach: its value is above the bound.
            Failed: it cannot be measured.
            Stopped: the tuner was told to end.
        """
        slo = self.config.limits.slo
        end = time.monotonic() + seconds
        while slo is not None and slo.every is not None and end - time.monotonic() > slo.every:
            self.stop.wait(slo.every)
            value = measure(slo, self.config, self.stop)
            if value > slo.bound:
                raise Breach(_breach(slo, value))
        self.stop.wait(max(end - time.monotonic(), 0.0))

    # -- the last good point -----------------------------------------------------------------

    def _restore(self, reason: str) -> bool:
        """Puts the system back to the last good point, however long that takes.

        Returns:
            Whether it is there; False only when told to stop.
        """
        self._phase("restoring")
        wait, tries = _RETRY, 0
        while True:
            try:
                self.system.apply(self.status.good, reason)
                return True
            except Failed as e:
                log.error("cannot restore the last good point: %s", e)
                tries += self.stop.told
            if tries >= _LAST_TRIES:
                log.error("the system is NOT at the last good point %s", self.status.good)
                return False
            try:
                self.stop.wait(wait)
            except Stopped:
                time.sleep(_RETRY)
            wait = min(2 * wait, 60.0)

    def _wait_until_good(self) -> bool:
        """Measures the last good point until it answers and keeps the SLO.

        Returns:
            Whether it did not at first: an outage, and no fault of the point before it.
        """
        outage = False
        while True:
            outcome = self._evaluate(self.status.good)
            self.status.outage = outcome.kind != "ok"
            if not self.status.outage:
                if outage:
                    log.info("the outage is over")
                return outage
            if not outage:
                log.warning("outage: %s at the last good point: waiting there", outcome.why)
            outage = True
            self._phase("waiting for the end of an outage")
            self._restore("outage")
            self.stop.wait(max(_RETRY, self.config.window))


def _breach(slo: SLO, value: float) -> str:
    return f"slo is {value:g}, above its bound {slo.bound:g}"


def _shown(cost: float | None) -> str:
    return "none" if cost is None else f"{cost:.6g}"
