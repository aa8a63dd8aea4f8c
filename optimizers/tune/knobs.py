"""Knobs: as Nevergrad's parameters, and as changes of the system."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import socket
import typing as tp
from urllib.parse import urlsplit

import nevergrad as ng

from . import cluster, commands
from .commands import Failed
from .config import Config, Knob, Request, Value

Values = dict[str, Value]


def parametrization(knobs: tp.Sequence[Knob], start: Values) -> ng.p.Dict:
    """The knobs as one parameter, whose first value is ``start``."""
    return ng.p.Dict(**{knob.name: _parameter(knob, start[knob.name]) for knob in knobs})


def _parameter(knob: Knob, start: Value) -> ng.p.Parameter:
    if knob.numeric:
        assert knob.low is not None and knob.high is not None
        scalar = ng.p.Log if knob.scale == "log" else ng.p.Scalar
        number = scalar(init=float(start), lower=knob.low, upper=knob.high)
        return number.set_integer_casting() if knob.type == "int" else number
    levels = _levels(knob)
    choice = ng.p.Choice(levels)
    choice.value = start
    return choice


def _levels(knob: Knob) -> list[Value]:
    return [False, True] if knob.choices is None else list(knob.choices)


def values(knobs: tp.Sequence[Knob], parameter: ng.p.Parameter) -> Values:
    """A parameter's value as it is applied and logged: floats with six digits."""
    found: Values = {}
    for knob in knobs:
        value = parameter.value[knob.name]
        if knob.type == "float":
            assert knob.low is not None and knob.high is not None
            value = min(max(float(f"{value:.6g}"), knob.low), knob.high)
        elif knob.type == "int":
            value = int(value)
        found[knob.name] = value
    return found


def fitted(knobs: tp.Sequence[Knob], last: Values) -> Values:
    """The nearest point that the knobs allow to one of other knobs; new ones at their start."""
    found: Values = {}
    for knob in knobs:
        value = last.get(knob.name, knob.start)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if knob.numeric and number:
            assert knob.low is not None and knob.high is not None
            value = min(max(float(value), knob.low), knob.high)
            value = round(value) if knob.type == "int" else value
        elif knob.numeric or value not in _levels(knob):
            value = knob.start
        found[knob.name] = value
    return found


def within(knobs: tp.Sequence[Knob], point: Values, center: Values, share: float) -> bool:
    """Whether every number is at most ``share`` of its range from ``center``, or one level."""
    for knob in knobs:
        if not knob.numeric:
            continue
        assert knob.low is not None and knob.high is not None
        a, b = float(point[knob.name]), float(center[knob.name])
        if knob.type == "int" and abs(a - b) <= 1:
            continue
        low, high = knob.low, knob.high
        if knob.scale == "log":
            a, b, low, high = math.log(a), math.log(b), math.log(low), math.log(high)
        if abs(a - b) > share * (high - low) * (1 + 1e-6):
            return False
    return True


class System:
    """The system's knobs as they stand now, and what changes them.

    Attributes:
        now: values known to be applied; a knob whose change failed is missing.
    """

    def __init__(self, config: Config, record: tp.Callable[..., None]) -> None:
        self.config = config
        self.now: Values = {}
        self._record = record
        self._cluster: cluster.Cluster | None = None
        if any(knob.kubernetes for knob in config.knobs):
            self._cluster = cluster.Cluster(config.timeout)

    def check(self, start: Values) -> None:
        """Finds what cannot work, before anything is changed.

        Args:
            start: values that the system should have now.

        Raises:
            Failed: a program, a host or an object is missing.
        """
        actions = [(f"knob {k.name!r}", k.command, k.http) for k in self.config.knobs]
        if self.config.after is not None:
            actions.append(("after", self.config.after.command, self.config.after.http))
        for where, command, request in actions:
            if command is not None and shutil.which(command[0]) is None:
                raise Failed(
                    f"{where}: command {command[0]!r} is not found: install it or give its path"
                )
            if request is not None:
                _connect(where, request, self.config.timeout)
        if self._cluster is not None:
            for item, knobs in self._objects(start).items():
                self._cluster.check(
                    item, [(k.name, k.kubernetes, start[k.name]) for k in knobs if k.kubernetes]
                )

    def _objects(self, changed: tp.Iterable[str]) -> dict[cluster.Object, list[Knob]]:
        found: dict[cluster.Object, list[Knob]] = {}
        for knob in self.config.knobs:
            if knob.kubernetes is not None and knob.name in changed:
                found.setdefault(cluster.target(knob.kubernetes), []).append(knob)
        return found

    def describe(self, point: Values) -> list[str]:
        """What ``apply`` would do from an unknown state, one line a change."""
        lines = []
        for knob in self.config.knobs:
            value = point[knob.name]
            if knob.command is not None:
                lines.append(
                    " ".join(map(commands.text, commands.fill(knob.command, knob.name, value)))
                )
            elif knob.http is not None:
                request = _filled(knob.http, knob.name, value)
                body = "" if request.body is None else " " + json.dumps(request.body)
                lines.append(f"{request.method} {request.url}{body}")
        for item, knobs in self._objects(point).items():
            patch = cluster.patch([(k.kubernetes, point[k.name]) for k in knobs if k.kubernetes])
            lines.append(f"PATCH {item[0]} {item[1]}/{item[2]} {json.dumps(patch)}")
        return lines

    def apply(self, point: Values, reason: str) -> None:
        """Changes the knobs that stand elsewhere, then runs ``after``.

        Raises:
            Failed: a knob cannot be applied; those before it are changed already.
        """
        unknown = object()
        changed = {
            name: value for name, value in point.items() if self.now.get(name, unknown) != value
        }
        if not changed:
            return
        for knob in self.config.knobs:
            if knob.name in changed and knob.kubernetes is None:
                with self._changing({knob.name: changed[knob.name]}, reason):
                    self._apply_one(knob, changed[knob.name])
        for item, knobs in self._objects(changed).items():
            with self._changing({k.name: changed[k.name] for k in knobs}, reason):
                assert self._cluster is not None
                self._cluster.apply(
                    item, [(k.kubernetes, changed[k.name]) for k in knobs if k.kubernetes]
                )
        after = self.config.after
        if after is not None:
            with self._changing(changed, reason, after=True):
                if after.command is not None:
                    commands.run(after.command, self.config.timeout)
                elif after.http is not None:
                    commands.send(after.http, self.config.timeout)

    @contextlib.contextmanager
    def _changing(self, changed: Values, reason: str, after: bool = False) -> tp.Iterator[None]:
        """Records a change before it is made, and what became of it if it failed."""
        before = {name: self.now.pop(name, None) for name in changed}
        if not after:
            for name, value in changed.items():
                self._record(reason=reason, knob=name, before=before[name], after=value)
        try:
            yield
        except Failed as e:
            names = ", ".join(changed)
            self._record(reason=reason, failed=names, error=str(e))
            raise Failed(f"{'after ' if after else ''}{names} cannot be applied: {e}") from None
        self.now.update(changed)

    def _apply_one(self, knob: Knob, value: Value) -> None:
        if knob.command is not None:
            argv = [commands.text(part) for part in commands.fill(knob.command, knob.name, value)]
            commands.run(argv, self.config.timeout)
        elif knob.http is not None:
            commands.send(_filled(knob.http, knob.name, value), self.config.timeout)


def _filled(request: Request, name: str, value: Value) -> Request:
    return request.model_copy(
        update={
            "url": commands.fill(request.url, name, value),
            "body": commands.fill(request.body, name, value),
        }
    )


def _connect(where: str, request: Request, timeout: float) -> None:
    url = urlsplit(request.url)
    try:
        port = url.port or {"http": 80, "https": 443}[url.scheme]
        socket.create_connection((url.hostname or "", port), timeout).close()
    except (OSError, ValueError) as e:
        raise Failed(f"{where}: url is {request.url!r}: nobody answers there: {e}") from None
