"""The configuration file: its fields, and errors that name the field, its value and the remedy.

Everything that can be known without touching the system is checked here, all at once.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import pathlib
import re
import string
import typing as tp

import pydantic
import yaml

Value = bool | int | float | str
_Text = tp.Annotated[str, pydantic.Field(min_length=1)]
_Seconds = tp.Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
_Finite = tp.Annotated[float, pydantic.Field(allow_inf_nan=False)]
_URL = tp.Annotated[str, pydantic.Field(pattern=r"^https?://[^/\s]+")]
_Argv = tp.Annotated[list[_Text], pydantic.Field(min_length=1)]


class ConfigError(ValueError):
    """The configuration cannot be used; nothing has been changed."""


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)


def _exactly_one(section: pydantic.BaseModel, *names: str) -> str:
    given = [name for name in names if getattr(section, name) is not None]
    if len(given) != 1:
        raise ValueError(f"has {given or 'none'} of {', '.join(names)}: give exactly one of them")
    return given[0]


def _expand(headers: dict[str, str]) -> dict[str, str]:
    """Replaces ``${NAME}`` by the environment's, so that no secret stands in the file."""
    found = {}
    for name, text in headers.items():
        try:
            found[name] = string.Template(text).substitute(os.environ)
        except KeyError as e:
            raise ValueError(
                f"header {name!r} needs ${{{e.args[0]}}}: set that environment variable"
            ) from None
        except ValueError:
            raise ValueError(f"header {name!r} has a lone '$': write '$$' for one") from None
    return found


_Headers = tp.Annotated[dict[str, str], pydantic.AfterValidator(_expand)]


class Request(_Section):
    """An HTTP call: any status of 200 to 299 is success.

    Attributes:
        method: the HTTP method.
        url: its address.
        body: sent as JSON; a string that is exactly ``"{value}"`` becomes the value itself.
        headers: ``${NAME}`` in them is taken from the environment.
    """

    method: tp.Literal["GET", "POST", "PUT", "PATCH"]
    url: _URL
    body: tp.Any = None
    headers: _Headers = {}


class Kubernetes(_Section):
    """A field of a Deployment or StatefulSet.

    Attributes:
        kind: of the object.
        namespace: of the object.
        name: of the object.
        field: ``replicas``, ``cpu`` (cores), ``memory`` (MiB) or ``env`` (an environment variable).
        container: whose CPU, memory or environment it is.
        resource: ``requests`` or ``limits``, for CPU and memory; None sets both.
        variable: the name of the environment variable.
    """

    kind: tp.Literal["Deployment", "StatefulSet"]
    namespace: _Text
    name: _Text
    field: tp.Literal["replicas", "cpu", "memory", "env"]
    container: str | None = None
    resource: tp.Literal["requests", "limits"] | None = None
    variable: str | None = None

    @pydantic.model_validator(mode="after")
    def _check(self) -> Kubernetes:
        if (self.container is None) != (self.field == "replicas"):
            raise ValueError(
                f"container is {self.container!r} for field {self.field!r}: name the container of "
                "cpu, memory and env, and none for replicas"
            )
        if (self.variable is None) == (self.field == "env"):
            raise ValueError(
                f"variable is {self.variable!r} for field {self.field!r}: give it for env only"
            )
        if self.resource is not None and self.field not in ("cpu", "memory"):
            raise ValueError(
                f"resource is {self.resource!r} for field {self.field!r}: give it for cpu and "
                "memory only"
            )
        return self


class Knob(_Section):
    """One setting of the system.

    Attributes:
        name: in logs and metrics; ``{name}`` in templates.
        type: what values it takes.
        low: lowest value of a number.
        high: highest value of a number.
        scale: steps of a number by a difference (linear) or a factor (log).
        choices: of a choice.
        start: what it is set to now.
        command: argument list that applies it, with ``{value}``; no shell.
        http: a request that applies it, with ``{value}`` in its URL or body.
        kubernetes: the field that it is.
    """

    name: tp.Annotated[str, pydantic.Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*$")]
    type: tp.Literal["float", "int", "bool", "choice"]
    low: _Finite | None = None
    high: _Finite | None = None
    scale: tp.Literal["linear", "log"] = "linear"
    choices: list[pydantic.StrictInt | pydantic.StrictFloat | pydantic.StrictStr] | None = None
    start: pydantic.StrictBool | pydantic.StrictInt | pydantic.StrictFloat | pydantic.StrictStr
    command: _Argv | None = None
    http: Request | None = None
    kubernetes: Kubernetes | None = None

    @property
    def numeric(self) -> bool:
        return self.type in ("float", "int")

    @pydantic.model_validator(mode="after")
    def _check(self) -> Knob:
        how = _exactly_one(self, "command", "http", "kubernetes")
        if self.numeric:
            self._check_number()
        elif (self.low, self.high, self.scale) != (None, None, "linear"):
            raise ValueError(
                f"low, high and scale are for numbers, type is {self.type!r}: drop them"
            )
        if (self.choices is None) != (self.type != "choice"):
            raise ValueError(
                f"choices is {self.choices!r} for type {self.type!r}: list them for a choice only"
            )
        if self.choices is not None and (
            len(set(self.choices)) < 2 or len(set(self.choices)) < len(self.choices)
        ):
            raise ValueError(f"choices is {self.choices!r}: list two or more different ones")
        if self.type == "bool" and not isinstance(self.start, bool):
            raise ValueError(f"start is {self.start!r}: expected true or false")
        if self.choices is not None and self.start not in self.choices:
            raise ValueError(f"start is {self.start!r}: expected one of {self.choices!r}")
        if how != "kubernetes":
            template = json.dumps(
                self.command if self.http is None else [self.http.url, self.http.body]
            )
            if "{value}" not in template:
                raise ValueError(f"{how} has no {{value}}: put it where the knob's value belongs")
        elif self.kubernetes is not None:
            self._check_kubernetes(self.kubernetes)
        return self

    def _check_number(self) -> None:
        if self.low is None or self.high is None or not self.low < self.high:
            raise ValueError(
                f"low is {self.low} and high is {self.high}: a number needs both, low below high"
            )
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"low is {self.low} with scale 'log': it must be above 0")
        if self.type == "int" and not (self.low == int(self.low) and self.high == int(self.high)):
            raise ValueError(f"low is {self.low} and high is {self.high}: expected whole numbers")
        kind = (int,) if self.type == "int" else (int, float)
        if (
            isinstance(self.start, bool)
            or not isinstance(self.start, kind)
            or not self.low <= self.start <= self.high
        ):
            raise ValueError(
                f"start is {self.start!r}: expected {'a whole' if self.type == 'int' else 'a'} "
                f"number from {self.low:g} to {self.high:g}"
            )

    def _check_kubernetes(self, target: Kubernetes) -> None:
        fits = {"replicas": self.type == "int", "env": True}.get(target.field, self.numeric)
        if not fits:
            raise ValueError(
                f"type is {self.type!r} for field {target.field!r}: replicas are int, cpu and "
                "memory float or int"
            )
        least = {"replicas": 0, "cpu": 0.001, "memory": 1, "env": -math.inf}[target.field]
        if self.low is not None and self.low < least:
            raise ValueError(f"low is {self.low:g}: {target.field} is at least {least:g}")


class Source(_Section):
    """Where a number comes from.

    Attributes:
        promql: an instant query of one value, asked when the window is over; ``{window}`` in it
            becomes the window in seconds, as in ``rate(errors_total[{window}])``.
        command: an argument list whose output is the number.
        http: a request whose answer is the number, or JSON that holds it.
        value: with http, where in the JSON: ``"latency.p99"``.
    """

    promql: _Text | None = None
    command: _Argv | None = None
    http: Request | None = None
    value: _Text | None = None

    @pydantic.model_validator(mode="after")
    def _check(self) -> Source:
        _exactly_one(self, "promql", "command", "http")
        if self.value is not None and self.http is None:
            raise ValueError(f"value is {self.value!r} without http: drop it")
        return self


class SLO(Source):
    """What must hold while tuning.

    Attributes:
        bound: the largest value allowed.
        every: seconds between checks while a point settles and is measured; None: one check, at
            the end of the window.
    """

    bound: _Finite
    every: tp.Annotated[float, pydantic.Field(gt=0)] | None = None


class Limits(_Section):
    """What tuning may do.

    Attributes:
        slo: see ``SLO``.
        max_change: the farthest a knob may be from the current recommendation, as a fraction of
            its range (in its scale).
        max_regression: passed to CONGO: in the cost's unit, or ``"10%"`` of the cost at the start.
    """

    slo: SLO | None = None
    max_change: tp.Annotated[float, pydantic.Field(gt=0, le=1)] | None = None
    max_regression: tp.Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)] | str | None = (
        None
    )

    @pydantic.field_validator("max_regression", mode="before")
    @classmethod
    def _check_regression(cls, given: tp.Any) -> tp.Any:
        if isinstance(given, str) and not (
            re.fullmatch(r"\d+(\.\d+)?%", given) and float(given[:-1]) > 0
        ):
            raise ValueError("expected a number above 0, or a percentage such as '10%'")
        return given


class Prometheus(_Section):
    """The server that answers PromQL."""

    url: _URL
    headers: _Headers = {}


class Action(_Section):
    """What to run once after knobs have changed: a reload, a restart."""

    command: _Argv | None = None
    http: Request | None = None

    @pydantic.model_validator(mode="after")
    def _check(self) -> Action:
        _exactly_one(self, "command", "http")
        return self


class Metrics(_Section):
    """Where the tuner's own Prometheus metrics are served."""

    port: tp.Annotated[int, pydantic.Field(ge=1, le=65535)]
    address: _Text = "127.0.0.1"


class Optimizer(_Section):
    """Options of ``ParametrizedCONGO``."""

    num_measurements: tp.Annotated[int, pydantic.Field(ge=2)] | None = None
    delta: tp.Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)] | None = None


class Config(_Section):
    """The whole file.

    Attributes:
        knobs: what may be changed.
        after: what to run once after each change.
        cost: what to minimise.
        prometheus: for ``promql``.
        settle: seconds between a change and the window.
        window: seconds measured.
        timeout: seconds that a command, a request or a rollout may take.
        limits: see ``Limits``.
        evaluations: points to measure, those of earlier runs included; None: go on for ever.
        seed: of CONGO's random numbers.
        optimizer: see ``Optimizer``.
        metrics: see ``Metrics``.
        state: file that a restart goes on from, relative to the configuration file.
        audit: file with one line for every change, relative to the configuration file.
    """

    knobs: tp.Annotated[list[Knob], pydantic.Field(min_length=1)]
    after: Action | None = None
    cost: Source
    prometheus: Prometheus | None = None
    settle: _Seconds
    window: _Seconds
    timeout: tp.Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)] = 60.0
    limits: Limits = Limits()
    evaluations: tp.Annotated[int, pydantic.Field(ge=1)] | None = None
    seed: tp.Annotated[int, pydantic.Field(ge=0, lt=2**32)] = 0
    optimizer: Optimizer = Optimizer()
    metrics: Metrics | None = None
    state: _Text = "tune.state.jsonl"
    audit: _Text = "tune.audit.jsonl"

    @pydantic.model_validator(mode="after")
    def _check(self) -> Config:
        names = [knob.name for knob in self.knobs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"knobs has {twice} twice: give every knob a name of its own")
        promql = [s for s in (self.cost, self.limits.slo) if s is not None and s.promql]
        if promql and self.prometheus is None:
            raise ValueError(
                f"promql is {promql[0].promql!r} without a server: add prometheus: {{url: …}}"
            )
        if self.state == self.audit:
            raise ValueError(f"state and audit are both {self.state!r}: give each its own file")
        if not self.window and any("{window}" in str(s.promql) for s in promql):
            raise ValueError("window is 0 and promql uses {window}: set the seconds to measure")
        return self

    @property
    def fingerprint(self) -> str:
        """Of what the measured costs depend on: with another one, a log of them is void."""
        knobs = [
            knob.model_dump(exclude={"start", "command", "http", "kubernetes"})
            for knob in self.knobs
        ]
        rest = self.model_dump(include={"cost", "optimizer", "limits", "seed"})
        rest["cost"]["http"] = self.cost.http and self.cost.http.url
        rest["limits"].pop("slo")
        text = json.dumps([knobs, rest], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def load(path: str | os.PathLike[str]) -> Config:
    """Reads and checks a configuration file.

    Args:
        path: of a YAML file.

    Raises:
        ConfigError: with one line for every fault: field, value, remedy.
    """
    path = pathlib.Path(path)
    try:
        content = yaml.load(path.read_text(), _UniqueKeys)
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read: {e.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(e).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds {content!r:.80}: expected keys such as knobs and cost")
    try:
        config = Config.model_validate(content)
    except pydantic.ValidationError as e:
        raise ConfigError("\n".join(f"{path}: {line}" for line in _explain(e.errors()))) from None
    folder = path.resolve().parent
    return config.model_copy(
        update={"state": str(folder / config.state), "audit": str(folder / config.audit)}
    )


class _UniqueKeys(yaml.SafeLoader):
    """YAML's own loader takes the last of two equal keys without a word."""

    def construct_mapping(self, node: tp.Any, deep: bool = False) -> dict[tp.Any, tp.Any]:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []  # else it raises below
        keys = [key.value for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1 and key != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands there twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def _explain(faults: tp.Sequence[tp.Any]) -> list[str]:
    """pydantic's faults in one line each; those of a union's members in one together."""
    lines: list[str] = []
    expected: dict[str, tuple[tp.Any, list[str]]] = {}
    for fault in faults:
        location, kind, given = fault["loc"], fault["type"], fault["input"]
        outside = kind in ("extra_forbidden", "missing")
        section, where = _follow(location[:-1] if outside else location)
        field = _dotted([*where, location[-1]] if outside else where)
        if kind == "extra_forbidden":
            known = sorted(section.model_fields)
            near = difflib.get_close_matches(str(location[-1]), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
            lines.append(f"{field} is {given!r:.60}: unknown key: {hint}")
        elif kind == "missing":
            lines.append(f"{field}: missing: add it")
        elif kind == "value_error":
            text = fault["msg"].removeprefix("Value error, ")
            if isinstance(given, dict):  # the fault of a whole section: its text has the field
                label = f" ({given['name']})" if isinstance(given.get("name"), str) else ""
                lines.append(f"{field}{label}: {text}")
            else:
                lines.append(f"{field} is {given!r:.80}: {text}")
        else:
            text = re.sub("^(Input|String) should ", "", fault["msg"]).removeprefix("be ")
            if isinstance(given, bool) and "choices" in where and "string" in text:
                text += " (YAML reads on, off, yes and no as true and false: quote them)"
            expected.setdefault(field, (given, []))[1].append(text)
    for field, (given, texts) in expected.items():
        lines.append(f"{field} is {given!r:.80}: expected {' or '.join(texts)}")
    return lines


def _follow(location: tp.Sequence[str | int]) -> tuple[type[pydantic.BaseModel], list[str | int]]:
    """The section that a fault's location is in, and the location without pydantic's union tags."""
    section: type[pydantic.BaseModel] = Config
    where: list[str | int] = []
    inside = True
    for part in location:
        if isinstance(part, int):
            where.append(part)
        elif inside and part in section.model_fields:
            where.append(part)
            found = re.findall(r"[A-Za-z]+", str(section.model_fields[part].annotation))
            below = [s for s in _SECTIONS if s.__name__ in found]
            inside = bool(below)
            section = below[0] if below else section
        elif not inside and isinstance(part, str) and where[-1] in ("headers", "body"):
            where.append(part)
    return section, where


_SECTIONS: tuple[type[pydantic.BaseModel], ...] = (
    Knob, Source, SLO, Limits, Prometheus, Action, Metrics, Optimizer, Kubernetes, Request,
)  # fmt: skip


def _dotted(where: tp.Sequence[str | int]) -> str:
    text = ""
    for part in where:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or "the file"
