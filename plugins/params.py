"""What a server and a request may say about guidance, and nothing else is accepted.

`GuidanceConfig` is the server's `{"mavis": {...}}`, `GuidanceParams` one request's `mavis_*`
arguments. Both are validated where they are made, with a message that names the field.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
PREFIX = "mavis_"


@dataclass(frozen=True)
class GuidanceParams:
    """How one request is guided.

    Args:
        weights: One finite number per objective, in the server's order.
        beta: Strength of the guidance, finite and not negative.
        top_k: Number of candidates at each step, at least 1.
        kl_budget: Most nats per step that guidance may move the distribution, positive; None for
            no limit.

    Raises:
        ValueError: A field is out of range.
    """

    weights: tuple[float, ...]
    beta: float = 1.0
    top_k: int = 40
    kl_budget: float | None = None

    def __post_init__(self) -> None:
        for weight in self.weights:
            _number("weights", weight)
        if _number("beta", self.beta) < 0:
            raise ValueError(f"beta must not be negative, got {self.beta}")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 1:
            raise ValueError(f"top_k must be an integer of at least 1, got {self.top_k!r}")
        if self.kl_budget is not None and _number("kl_budget", self.kl_budget) <= 0:
            raise ValueError(
                f"kl_budget must be positive, in nats per step, got {self.kl_budget}; "
                "leave it out for no limit"
            )

    @property
    def guides(self) -> bool:
        """Whether the request's distribution changes at all."""
        return self.beta > 0 and any(self.weights)


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
        rerank: Number of candidates that an action head's model reads at their own position, as a
            state head does: the likeliest by the action head.
        prune_eps: Candidates of a state head that cannot become likelier than this are not valued;
            0 is exact. See [`count_likely`][trimtab.plugins.guidance.count_likely].
        dtype: Of the value models: float32, bfloat16, float16; by default the served model's.
        kv_cache_memory_gib: Upper bound of the value models' key-value store; by default room for
            `max_num_seqs` sequences of `max_model_len` tokens, at most 1 GiB.

    Raises:
        ValueError: A key is unknown or a value out of range.
    """

    value_models: tuple[tuple[str | None, str], ...]
    weights: Mapping[str, float] = field(default_factory=dict)
    beta: float = 1.0
    top_k: int | None = None
    kl_budget: float | None = None
    max_top_k: int = 128
    rerank: int = 0
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
        if unknown := sorted(set(config) - set(known)):
            raise ValueError(f"unknown key {unknown[0]!r} in the mavis config; known: {known}")
        models = config.get("value_models")
        if isinstance(models, str):
            models = [models]
        named: tuple[tuple[str | None, Any], ...] = ()
        if isinstance(models, Mapping):
            named = tuple((str(name), path) for name, path in models.items())
        elif isinstance(models, Sequence):
            named = tuple((None, path) for path in models)
        if not named or not all(isinstance(path, str) and path for _, path in named):
            raise ValueError(
                "mavis config: value_models must be a list of folders or hub ids, or an object "
                f"from names to them, got {models!r}"
            )
        return cls(**{**config, "value_models": named})

    def __post_init__(self) -> None:
        if not isinstance(self.weights, Mapping):
            raise ValueError(
                f"mavis config: weights must be an object by objective, got {self.weights!r}"
            )
        if isinstance(self.max_top_k, bool) or not isinstance(self.max_top_k, int):
            raise ValueError(f"mavis config: max_top_k must be an integer, got {self.max_top_k!r}")
        if isinstance(self.rerank, bool) or not isinstance(self.rerank, int) or self.rerank < 0:
            raise ValueError(
                "mavis config: rerank must be a number of candidates, an integer of at least 0, "
                f"got {self.rerank!r}"
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"mavis config: dtype must be one of {DTYPES}, got {self.dtype!r}")
        if not 0 <= _number("mavis config: prune_eps", self.prune_eps) < 1:
            raise ValueError(
                "mavis config: prune_eps must be a probability, at least 0 and below 1, "
                f"got {self.prune_eps}"
            )
        if _number("mavis config: kv_cache_memory_gib", self.kv_cache_memory_gib) <= 0:
            raise ValueError(
                "mavis config: kv_cache_memory_gib must be positive, "
                f"got {self.kv_cache_memory_gib}"
            )

    def default_params(self, objectives: Sequence[str], trained_top_k: int) -> GuidanceParams:
        """The parameters of a request that says nothing.

        Raises:
            ValueError: A default is out of range or names no objective.
        """
        try:
            params = GuidanceParams(
                weights=_weights_by_name(self.weights, objectives),
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
    extra_args: Mapping[str, Any] | None,
    objectives: Sequence[str],
    defaults: GuidanceParams,
    max_top_k: int,
) -> GuidanceParams:
    """One request's parameters from its `vllm_xargs` / `extra_args`.

    Args:
        extra_args: May hold `mavis_weights` (an object, the same as JSON text, `name=value,…`, or
            a list in the server's order; objectives it leaves out get 0), `mavis_beta`,
            `mavis_top_k` and `mavis_kl_budget`. Arguments of other names are not ours.
        objectives: The server's objectives, in order.
        defaults: Of what the request leaves out.
        max_top_k: Largest number of candidates that a request may ask for.

    Raises:
        ValueError: An argument is unknown, malformed or out of range. The message names it.
    """
    given = {k: v for k, v in (extra_args or {}).items() if k.startswith(PREFIX)}
    if not given:
        return defaults
    known = ("weights", "beta", "top_k", "kl_budget")
    if unknown := sorted(set(given) - {PREFIX + name for name in known}):
        raise ValueError(
            f"unknown argument {unknown[0]!r}; known: {', '.join(PREFIX + n for n in known)}"
        )
    values: dict[str, Any] = {name: getattr(defaults, name) for name in known}
    try:
        if "mavis_weights" in given:
            values["weights"] = parse_weights(given["mavis_weights"], objectives)
        for name in ("beta", "kl_budget"):
            if PREFIX + name in given:
                values[name] = _number(name, given[PREFIX + name])
        if "mavis_top_k" in given:
            top_k = _number("top_k", given["mavis_top_k"])
            if top_k != int(top_k) or not 1 <= top_k <= max_top_k:
                raise ValueError(
                    f"top_k must be an integer from 1 to {max_top_k}, got {given['mavis_top_k']!r}"
                )
            values["top_k"] = int(top_k)
        return GuidanceParams(**values)
    except ValueError as error:  # its message begins with the field's name
        raise ValueError(f"{PREFIX}{error}") from None


def parse_weights(value: object, objectives: Sequence[str]) -> tuple[float, ...]:
    """Weights in any of the forms that `request_params` lists, in the order of `objectives`.

    Raises:
        ValueError: Malformed, not finite, or of an unknown objective.
    """
    if isinstance(value, str):
        text = value.strip()
        if text.startswith(("{", "[")):
            try:
                value = json.loads(text)
            except ValueError as error:
                raise ValueError(f"weights is not valid JSON ({error}), got {value!r}") from None
        else:
            pairs = [part.partition("=") for part in text.split(",")]
            if not all(name.strip() and equals for name, equals, _ in pairs):
                raise ValueError(
                    "weights must be a JSON object, 'name=value,…' or a list of numbers, "
                    f"got {value!r}"
                )
            names = [name.strip() for name, _, _ in pairs]
            if len(set(names)) < len(names):
                raise ValueError(f"weights names an objective twice, got {value!r}")
            value = {name: number for name, (_, _, number) in zip(names, pairs)}
    if isinstance(value, Mapping):
        return _weights_by_name(value, objectives)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        if len(value) != len(objectives):
            raise ValueError(
                f"weights has {len(value)} numbers for {len(objectives)} objectives "
                f"{list(objectives)}"
            )
        return tuple(_number(f"weights[{i}]", w) for i, w in enumerate(value))
    raise ValueError(
        f"weights must be a JSON object, 'name=value,…' or a list of numbers, got {value!r}"
    )


def _weights_by_name(weights: Mapping[str, object], objectives: Sequence[str]) -> tuple[float, ...]:
    if unknown := sorted(set(weights) - set(objectives)):
        raise ValueError(
            f"weights: unknown objective {unknown[0]!r}; the value models have {list(objectives)}"
        )
    return tuple(_number(f"weights[{key!r}]", weights.get(key, 0.0)) for key in objectives)


def _number(name: str, value: object) -> float:
    """A finite float; text is accepted because HTTP clients send it."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, got {value!r}") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return number
