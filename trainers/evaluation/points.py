"""What a front is made of: policies, their responses, and the points that weights make of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Response:
    """
    A finished response of a policy.

    Args:
        text (`str`):
            The response without special tokens.
        token_ids (`list[int]`):
            Its tokens, with the end-of-sequence token if it ended.
        log_ratio (`float`, *optional*):
            `log pi - log pi_ref` of the response, in nats: a sample of the policy's KL to the base
            model.
        kl (`float`, *optional*):
            Exact `KL(pi || pi_ref)` of every step, summed along the response, in nats.
        cost (`int`, *optional*):
            Tokens sampled to get it. By default its own; best-of-N counts all N.
        seconds (`float`, *optional*):
            Time it took. By default its share of the time of its batch.

    Example:

    ```python
    >>> from trimtab.trainers import Response
    >>> response = Response("Tea is brewed.", token_ids=[8, 5, 9, 2], kl=0.7)
    >>> response.cost
    4
    ```
    """

    text: str
    token_ids: list[int]
    log_ratio: float | None = None
    kl: float | None = None
    cost: int = -1
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.cost < 0:
            self.cost = len(self.token_ids)


Respond = Callable[[Sequence[Any], Mapping[str, float], int], Sequence[Response]]


@dataclass(frozen=True)
class Policy:
    """
    One way to answer prompts under weights. Policies of one `method` differ in strength.

    Args:
        method (`str`):
            Name in tables and plots.
        respond (`Callable`):
            From prompts, the objectives' weights and a seed to one [`Response`] per prompt.
        strength (`float`, *optional*, defaults to `1.0`):
            What moves the method away from the base model: beta, N, a share of an update.
        weights (`list[dict[str, float]]`, *optional*):
            Weights that the method is made for, when it cannot take those of the sweep.
        seeds (`int`, *optional*):
            Number of seeds, when fewer than the sweep's.
        kl_bound (`float`, *optional*):
            Upper bound of the KL to the base model, used where responses carry no KL.
        identity (`str`, *optional*, defaults to `""`):
            Tells stored responses from those of another version of the method, such as the
            fingerprint of its value model: what `respond` computes with is not looked at.

    Example:

    ```python
    >>> from trimtab.trainers import Policy, Response
    >>> def respond(prompts, weights, seed):
    ...     count = 5 - round(4 * weights.get("brief", 0.0))  # stands for a model
    ...     return [Response("tea " * count, token_ids=[7] * count, kl=0.1) for _ in prompts]
    >>> policies = [Policy("unguided", respond, weights=[{}]), Policy("guided", respond)]
    ```
    """

    method: str
    respond: Respond
    strength: float = 1.0
    weights: Sequence[Mapping[str, float]] | None = None
    seeds: int | None = None
    kl_bound: float | None = None
    identity: str = ""


@dataclass
class Point:
    """
    A policy under one set of weights: its responses to all prompts, for every seed.

    Args:
        method (`str`):
            Of the [`Policy`].
        strength (`float`):
            Of the [`Policy`].
        weights (`dict[str, float]`):
            Weights of the objectives; those left out are 0.
        responses (`list[list[Response]]`):
            `[seeds][prompts]`.
        rewards (`dict[str, np.ndarray]`):
            Rewards, `[seeds, prompts]` float64 each.
        judged (`dict[str, np.ndarray]`):
            The same by the held-out judges.
        kl_bound (`float`, *optional*):
            Of the [`Policy`].

    Example:

    ```python
    >>> from trimtab.trainers import Point, Response
    >>> responses = [[Response("Tea.", [8, 2], kl=0.7), Response("A drink.", [5, 9, 2], kl=0.2)]]
    >>> point = Point("guided", 4.0, {"brief": 1.0}, responses)
    >>> point.kl(), point.kl_kind
    (array([[0.7, 0.2]]), 'exact')
    ```
    """

    method: str
    strength: float
    weights: dict[str, float]
    responses: list[list[Response]] = field(default_factory=list)
    rewards: dict[str, np.ndarray] = field(default_factory=dict)
    judged: dict[str, np.ndarray] = field(default_factory=dict)
    kl_bound: float | None = None

    @property
    def kl_kind(self) -> str:
        """Where [`Point.kl`] comes from: `"exact"`, `"sampled"`, `"bound"` or `"unknown"`."""
        first = self.responses[0][0]
        for kind, value in (("exact", first.kl), ("sampled", first.log_ratio)):
            if value is not None:
                return kind
        return "unknown" if self.kl_bound is None else "bound"

    def kl(self) -> np.ndarray:
        """KL to the base model in nats, `[seeds, prompts]`, by the best means there is."""
        kind = self.kl_kind
        if kind in ("exact", "sampled"):
            name = "kl" if kind == "exact" else "log_ratio"
            return np.array([[getattr(r, name) for r in row] for row in self.responses], float)
        bound = np.nan if self.kl_bound is None else self.kl_bound
        return np.full((len(self.responses), len(self.responses[0])), bound)


def single_objective(weights: Mapping[str, float]) -> str | None:
    """The objective that alone has weight, None where several have or none has."""
    named = [o for o, weight in weights.items() if weight]
    return named[0] if len(named) == 1 else None


def weights_label(weights: Mapping[str, float]) -> str:
    """Weights as tables and names of files write them."""
    return " + ".join(f"{value:.3g} {name}" for name, value in weights.items() if value) or "none"
