"""What a server and a request may say about guidance, and nothing else is accepted.

`GuidanceConfig` is the server's `{"mavis": {...}}`, `GuidanceParams` one request's `mavis_*`
arguments. Both are validated where they are made, with a message that names the field.
"""

from __future__ import annotations

import difflib
import json
import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
PREFIX = "mavis_"
ARGUMENTS = ("weights", "beta", "top_k", "kl_budget", "value_of")
# Logits are float32. Rewards are standardised, so that values are of the order of 1 and a strength
# of 100 leaves next to one token; at this one values of up to 1e32 still give finite logits.
MAX_STRENGTH = 1e6
MIN_KL, MAX_KL = 1e-6, 1e6  # nats; float32 resolves no less
MAX_TOP_K = 1 << 20  # more than any vocabulary has, and exact in float32
QUOTED = 100  # characters


@dataclass(frozen=True)
class GuidanceParams:
    """How one request is guided.

    Args:
        weights: One number per objective, in the server's order, -1e6 to 1e6.
        beta: Strength of the guidance, in nats per standard deviation of a reward, 0 to 1e6, and
            no more times the sum of |weights|.
        top_k: Number of candidates at each step, 1 to 2**20.
        kl_budget: Most nats per step that guidance may move the distribution, 1e-6 to 1e6; None for
            no limit.
        temperature: At which `kl_budget` holds, 0.001 to 1,000: that at which the host samples.
            It changes nothing else.
        value_of: A token. The request is then answered with one that says this token's weighted
            value after the prompt, see [`value_code`][trimtab.plugins.heads]; None to guide.

    Raises:
        ValueError: A field is no number or out of range, or a value is asked for without weights.

    Example:

    ```python
    >>> from trimtab.plugins import GuidanceParams
    >>> params = GuidanceParams(weights=(1.0, -0.5), beta=4.0, kl_budget=0.2)
    >>> params.guides
    True
    >>> GuidanceParams(weights=(1.0, -0.5), beta=-4.0)
    Traceback (most recent call last):
        ...
    ValueError: beta must be a number from 0 to 1e+06, got -4.0
    ```
    """

    weights: tuple[float, ...]
    beta: float = 1.0
    top_k: int = 40
    kl_budget: float | None = None
    temperature: float = 1.0
    value_of: int | None = None

    def __post_init__(self) -> None:
        limit = MAX_STRENGTH
        weights = tuple(
            check_number(f"weights[{i}]", weight, -limit, limit)
            for i, weight in enumerate(self.weights)
        )
        beta = check_number("beta", self.beta, 0, limit)
        if (strength := beta * sum(map(abs, weights))) > limit:
            raise ValueError(
                f"beta times the sum of |weights| must be at most {limit:g}, got {strength:g}"
            )
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "beta", beta)
        object.__setattr__(self, "top_k", check_integer("top_k", self.top_k, 1, MAX_TOP_K))
        if self.kl_budget is not None:
            object.__setattr__(self, "kl_budget", _kl_budget(self.kl_budget))
        temperature = check_number("temperature", self.temperature, 1e-3, 1e3)
        object.__setattr__(self, "temperature", temperature)
        if self.value_of is not None:
            check_integer("value_of", self.value_of, 0, MAX_TOP_K)
            if not any(self.weights):
                raise ValueError("value_of needs weights, and they are all 0: give one another")

    @property
    def guides(self) -> bool:
        """Whether the request's distribution changes at all."""
        return (self.beta > 0 or self.value_of is not None) and any(self.weights)


@dataclass(frozen=True)
class GuidanceConfig:
    """A server's configuration of guidance, and the defaults of its requests.

    Args:
        value_models: Folders or hub ids of value models: a list, or an object whose keys name the
            objective of every model that has just one.
        weights: Default weight of each objective by name; absent ones are 0. Without it a request
            that sends no `mavis_weights` is not guided.
        beta: Default strength.
        top_k: Default number of candidates; by default the number the value models were made for.
        kl_budget: Default limit in nats per step.
        max_top_k: Largest `mavis_top_k` that a request may ask for: it is what the request costs.
        prune_eps: Candidates of a state head that cannot become likelier than this are not valued;
            0 is exact. See [`count_likely`][trimtab.plugins.policy.count_likely].
        dtype: Of the value models: float32, bfloat16, float16; by default the served model's.
        kv_cache_memory_gib: Upper bound of the value models' key-value store; by default room for
            `max_num_seqs` sequences of `max_model_len` tokens, at most 1 GiB.

    Raises:
        ValueError: A key is unknown, or a value of the wrong type or out of range. Numbers are
            numbers here, not text.
    """

    value_models: tuple[tuple[str | None, str], ...]
    weights: Mapping[str, float] = field(default_factory=dict)
    beta: float = 1.0
    top_k: int | None = None
    kl_budget: float | None = None
    max_top_k: int = 128
    prune_eps: float = 0.0
    dtype: str | None = None
    kv_cache_memory_gib: float = 1.0

    @classmethod
    def from_dict(cls, config: object) -> GuidanceConfig:
        """From the `"mavis"` object of vLLM's `--additional-config`."""
        if not isinstance(config, Mapping):
            raise ValueError(
                'no "mavis" object in the additional config: start with --additional-config '
                """'{"mavis": {"value_models": ["PATH"]}}'"""
            )
        known = [f.name for f in fields(cls)]
        for key in config:
            if key not in known:
                raise ValueError(f"unknown key {quote(key)} in the mavis config; known: {known}")
        models = config.get("value_models")
        if isinstance(models, str):
            models = [models]
        named: tuple[tuple[Any, Any], ...] = ()
        if isinstance(models, Mapping):
            named = tuple(models.items())
            for name in models:
                check_objective_name("mavis config: value_models", name)
        elif isinstance(models, Sequence):
            named = tuple((None, path) for path in models)
        if not named or not all(isinstance(path, str) and path for _, path in named):
            raise ValueError(
                "mavis config: value_models must be a list of folders or hub ids, or an object "
                f"from names to them, got {quote(models)}"
            )
        return cls(**{**config, "value_models": named})

    def __post_init__(self) -> None:
        if not isinstance(self.weights, Mapping):
            raise ValueError(
                f"mavis config: weights must be an object by objective, got {quote(self.weights)}"
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(
                f"mavis config: dtype must be one of {DTYPES}, got {quote(self.dtype)}"
            )
        for name, weight in self.weights.items():
            check_number(
                f"mavis config: weights[{quote(name)}]", weight, -MAX_STRENGTH, MAX_STRENGTH
            )
        check_integer("mavis config: max_top_k", self.max_top_k, 1, MAX_TOP_K)
        check_number("mavis config: prune_eps", self.prune_eps, 0, 1)
        check_number("mavis config: kv_cache_memory_gib", self.kv_cache_memory_gib, 1e-6, 1e6)
        self.default_params(tuple(self.weights), 1)  # all but the names, which the models tell

    def default_params(self, objectives: Sequence[str], trained_top_k: int) -> GuidanceParams:
        """The parameters of a request that says nothing.

        Raises:
            ValueError: A default is out of range or names no objective.
        """
        try:
            params = GuidanceParams(
                weights=_in_order(self.weights, objectives),
                beta=self.beta,
                top_k=trained_top_k if self.top_k is None else self.top_k,
                kl_budget=self.kl_budget,
            )
            if params.top_k > self.max_top_k:
                raise ValueError(f"top_k {params.top_k} is above max_top_k {self.max_top_k}")
        except ValueError as error:
            raise ValueError(f"mavis config: {error}") from None
        return params


def request_params(
    extra_args: Mapping[Any, Any] | None,
    objectives: Sequence[str],
    defaults: GuidanceParams,
    max_top_k: int,
) -> GuidanceParams:
    """One request's parameters from its `vllm_xargs` / `extra_args`.

    Args:
        extra_args: May hold `mavis_weights` (an object, the same as JSON text, `name=value,…`, or
            a list in the server's order; objectives it leaves out get 0), `mavis_beta`,
            `mavis_top_k`, `mavis_kl_budget` and `mavis_value_of`. Arguments of other names are not
            ours.
        objectives: The server's objectives, in order.
        defaults: Of what the request leaves out.
        max_top_k: Largest number of candidates that a request may ask for.

    Raises:
        ValueError: An argument is unknown, malformed or out of range. The message names it.
    """
    given = read_request(extra_args, max_top_k)
    if not given:
        return defaults
    try:
        if "weights" in given:
            given["weights"] = _in_order(given["weights"], objectives)
        elif not any(defaults.weights) and given.get("beta") != 0:
            raise ValueError(
                f"{next(iter(given))} alone guides nothing: this server has no default weights; "
                f"send {PREFIX}weights, of the objectives {list(objectives)}"
            )
        return replace(defaults, **given)
    except ValueError as error:  # its message begins with the field's name
        raise ValueError(f"{PREFIX}{error}") from None


def read_request(
    extra_args: Mapping[Any, Any] | None, max_top_k: int = MAX_TOP_K
) -> dict[str, Any]:
    """What a request says, checked as far as no server's configuration is needed.

    Returns:
        The fields of [`GuidanceParams`] that it gives; `weights` by objective or as a list.

    Raises:
        ValueError: An argument is unknown, malformed or out of range. The message names it.
    """
    if not isinstance(extra_args or {}, Mapping):
        raise ValueError(f"extra_args must be an object by argument, got {quote(extra_args)}")
    given: dict[str, Any] = {}
    for key, value in (extra_args or {}).items():
        if (name := argument(key)) is not None:
            given[name] = value
    try:
        if "weights" in given:
            given["weights"] = _read_weights(given["weights"])
        if "beta" in given:
            given["beta"] = check_number("beta", given["beta"], 0, MAX_STRENGTH, text=True)
        if "kl_budget" in given:
            given["kl_budget"] = _kl_budget(given["kl_budget"], text=True)
        if "top_k" in given:
            given["top_k"] = check_integer("top_k", given["top_k"], 1, max_top_k, text=True)
        if "value_of" in given:
            token = check_integer("value_of", given["value_of"], 0, MAX_TOP_K, text=True)
            given["value_of"] = token
    except ValueError as error:
        raise ValueError(f"{PREFIX}{error}") from None
    return given


def refused_argument(error: Exception) -> str:
    """The argument that `error`, raised for a request's, is about: its message begins with it."""
    return re.split(r"\W", str(error), maxsplit=1)[0]


def argument(key: object) -> str | None:
    """The argument that `key` names, None if it is not ours.

    Raises:
        ValueError: It is spelt like one of ours but is none: guidance would be left out in silence.
    """
    if not isinstance(key, str):
        return None
    if key.startswith(PREFIX) and key.removeprefix(PREFIX) in ARGUMENTS:
        return key.removeprefix(PREFIX)
    letters = {(PREFIX + name).replace("_", ""): PREFIX + name for name in ARGUMENTS}
    spelt = re.sub(r"[\W_]", "", key).casefold()
    if spelt not in letters and not re.match(r"[\W_]*mavis(?![^\W\d_])", key, re.IGNORECASE):
        return None
    near = difflib.get_close_matches(spelt[:QUOTED], letters, n=1)
    hint = f" (did you mean {letters[near[0]]}?)" if near else ""
    known = ", ".join(letters.values())
    raise ValueError(f"unknown argument {quote(key)}{hint}; known: {known}")


def parse_weights(value: object, objectives: Sequence[str]) -> tuple[float, ...]:
    """Weights in any of the forms that `request_params` lists, in the order of `objectives`.

    Raises:
        ValueError: Malformed, out of range, or of an unknown objective.
    """
    return _in_order(_read_weights(value), objectives)


def _read_weights(value: object) -> dict[str, float] | list[float]:
    given = value
    if isinstance(value, str):
        text = value.strip()
        try:
            if text.startswith(("{", "[")):
                value = json.loads(text, object_pairs_hook=_each_once)
            else:
                pairs = [part.partition("=") for part in text.split(",")]
                if all(name.strip() and equals for name, equals, _ in pairs):
                    value = _each_once([(name.strip(), number) for name, _, number in pairs])
        except (ValueError, RecursionError) as error:  # json raises both
            raise ValueError(f"weights cannot be read ({error}), got {quote(given)}") from None
    limit = MAX_STRENGTH
    if isinstance(value, Mapping):
        return {
            name: check_number(f"weights[{quote(name)}]", weight, -limit, limit, text=True)
            for name, weight in value.items()
        }
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [
            check_number(f"weights[{i}]", weight, -limit, limit, text=True)
            for i, weight in enumerate(value)
        ]
    raise ValueError(
        f"weights must be a JSON object, 'name=value,…' or a list of numbers, got {quote(given)}"
    )


def _each_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of pairs whose names differ: JSON would keep the last of two."""
    named = dict(pairs)
    if len(named) < len(pairs):
        raise ValueError("an objective is named twice")
    return named


def _in_order(
    weights: Mapping[str, float] | Sequence[float], objectives: Sequence[str]
) -> tuple[float, ...]:
    """`weights` in the order of `objectives`; of those by name, absent ones are 0."""
    if isinstance(weights, Mapping):
        for name in weights:
            if name not in objectives:
                raise ValueError(
                    f"weights: unknown objective {quote(name)}; the value models have "
                    f"{list(objectives)}"
                )
        return tuple(weights.get(name, 0.0) for name in objectives)
    if len(weights) != len(objectives):
        raise ValueError(
            f"weights has {len(weights)} numbers for {len(objectives)} objectives "
            f"{list(objectives)}"
        )
    return tuple(weights)


def check_objective_name(where: str, name: object) -> None:
    """Check that requests (`name=value,…`), metrics (`group/name`) and folders can have `name`.

    Args:
        where: What has the objective, with which the message begins.
        name: Of the objective.

    Raises:
        ValueError: It is no such name.
    """
    if not (
        isinstance(name, str) and re.fullmatch(r"\w[^\s=,/]{0,99}", name) and name.isprintable()
    ):
        raise ValueError(
            f"{where} has the objective {quote(name)}: a name begins with a letter, digit or "
            "underscore and has no '=', ',', '/' or white space, at most 100 characters"
        )


def quote(value: object) -> str:
    """`repr(value)` for a message, cut: what is refused comes back in an answer and in logs."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of too many digits, a list nested too deep
        text = f"a value of type {type(value).__name__} that cannot be shown"
    half = QUOTED // 2
    return text if len(text) <= QUOTED else f"{text[:half]}…{text[1 - half :]}"


def _kl_budget(value: object, *, text: bool = False) -> float:
    try:
        return check_number("kl_budget", value, MIN_KL, MAX_KL, text=text)
    except ValueError as error:
        raise ValueError(f"{error}; it is in nats per step, leave it out for no limit") from None


def check_number(name: str, value: object, low: float, high: float, *, text: bool = False) -> float:
    """`value` as a float from `low` to `high`; HTTP clients send `text`, too."""
    kinds: tuple[Any, ...] = (numbers.Real, str) if text else (numbers.Real,)
    try:
        if isinstance(value, kinds) and not isinstance(value, bool):
            number = float(value)
            if low <= number <= high:
                return number
    except (ValueError, OverflowError):  # no number in the text, or an integer beyond any float
        pass
    raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {quote(value)}")


def check_integer(name: str, value: object, low: int, high: int, *, text: bool = False) -> int:
    """`value` as an int from `low` to `high`; of HTTP clients text or a whole float as well."""
    try:
        number = check_number(name, value, low, high, text=text)
        if number.is_integer() and (text or isinstance(value, numbers.Integral)):
            return int(number)
    except ValueError:
        pass
    raise ValueError(f"{name} must be an integer from {low} to {high}, got {quote(value)}")
