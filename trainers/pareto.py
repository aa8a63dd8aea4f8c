"""Fronts of several rewards: sweeps of the weights, what each point gives and costs, hypervolume.

Any policy takes part, ours or another's: a callable from prompts, weights and a seed to responses.
Nothing is sampled here but by those callables. Judges that training never saw are reward functions,
or a language model behind an OpenAI-compatible endpoint ([`PairwiseJudge`]).
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import moocore
import numpy as np
from tqdm.auto import tqdm

from .files import write_json
from .rewards import compute_rewards, identify, load_reward_funcs
from .statistics import interval, prompt_draws


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


def simplex_weights(num_objectives: int, steps: int) -> np.ndarray:
    """
    All weights that are multiples of `1 / steps` and sum to 1.

    Args:
        num_objectives (`int`):
            Number of objectives.
        steps (`int`):
            Number of parts that the weight of 1 is dealt out in.

    Returns:
        `np.ndarray`: `[n, num_objectives]` float64, from all on the first to all on the last.

    Raises:
        ValueError: One of them is below 1.

    Example:

    ```python
    >>> from trimtab.trainers import simplex_weights
    >>> simplex_weights(2, steps=4).tolist()
    [[1.0, 0.0], [0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [0.0, 1.0]]
    ```
    """
    if num_objectives < 1 or steps < 1:
        raise ValueError(
            "`num_objectives` and `steps` must be at least 1, got "
            f"num_objectives={num_objectives} and steps={steps}"
        )
    bars = itertools.combinations(range(steps + num_objectives - 1), num_objectives - 1)
    edges = np.array([(-1, *bar, steps + num_objectives - 1) for bar in bars])
    return (np.diff(edges, axis=1) - 1)[::-1] / steps


def hypervolume(points: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """
    Volume that the points dominate above a reference, of many sets at once, by moocore.

    Args:
        points (`np.ndarray`):
            `[..., n, d]`, more is better. Those below the reference add nothing.
        reference (`np.ndarray`):
            `[d]`.

    Returns:
        `np.ndarray`: `[...]` float64.

    Raises:
        ValueError: The shapes do not fit, or a point is NaN.

    Example:

    ```python
    >>> import numpy as np
    >>> from trimtab.trainers import hypervolume
    >>> float(hypervolume(np.array([[2.0, 1.0], [1.0, 3.0]]), reference=np.zeros(2)))
    4.0
    ```
    """
    points, reference = np.asarray(points, float), np.asarray(reference, float)
    if points.ndim < 2 or points.shape[-1] != reference.size or not reference.size:
        raise ValueError(
            "`points` must be [..., n, d] for a `reference` of [d], got the shapes "
            f"{list(points.shape)} and {list(reference.shape)}"
        )
    if np.isnan(points).any():
        raise ValueError("`points` contains NaN: leave out what was not measured")
    sets = points.reshape(math.prod(points.shape[:-2]), *points.shape[-2:])
    volumes = [moocore.hypervolume(each, ref=reference, maximise=True) for each in sets]
    return np.reshape(volumes, points.shape[:-2])


def distinct_n(texts: Sequence[str], n: int) -> float:
    """
    Distinct n-grams of words per n-gram, of all texts together: low where a policy repeats itself.

    Args:
        texts (`list[str]`):
            Responses. Words are compared without case.
        n (`int`):
            Length of the n-grams.

    Returns:
        `float`: At most 1; 0 if no text has `n` words.

    Example:

    ```python
    >>> from trimtab.trainers import distinct_n
    >>> distinct_n(["tea is tea", "tea is a drink"], n=2)  # "tea is" twice
    0.8
    ```
    """
    words = [re.findall(r"\w+", text.lower()) for text in texts]
    grams = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def at_kl(kls: np.ndarray, gains: np.ndarray, kl: float) -> np.ndarray:
    """
    Gains of a method at a KL to the base model, along its strengths.

    Straight lines join the base model (no KL, no gain) and the points in the order of their KL. A
    method that does not reach `kl` keeps its last point: it has nothing more to give.

    Args:
        kls (`np.ndarray`):
            `[..., strengths]`.
        gains (`np.ndarray`):
            `[..., strengths, objectives]`.
        kl (`float`):
            Nats.

    Returns:
        `np.ndarray`: `[..., objectives]`.
    """
    order = np.argsort(kls, axis=-1)
    kls = np.take_along_axis(kls, order, axis=-1)
    gains = np.take_along_axis(gains, order[..., None], axis=-2)
    kls = np.concatenate([np.zeros_like(kls[..., :1]), np.maximum(kls, 0.0)], axis=-1)
    gains = np.concatenate([np.zeros_like(gains[..., :1, :]), gains], axis=-2)
    left = ((kls <= kl).sum(-1, keepdims=True) - 1).clip(0, kls.shape[-1] - 2)
    start, stop = (np.take_along_axis(kls, left + i, axis=-1) for i in (0, 1))
    share = ((kl - start) / np.maximum(stop - start, 1e-12)).clip(0.0, 1.0)
    before, after = (np.take_along_axis(gains, (left + i)[..., None], axis=-2) for i in (0, 1))
    return (before + share[..., None] * (after - before))[..., 0, :]


def sweep(
    policies: Sequence[Policy],
    prompts: Sequence[Any],
    weights: Sequence[Mapping[str, float]],
    reward_funcs: Mapping[str, Any],
    folder: str | Path,
    seeds: int = 3,
    judges: Mapping[str, Any] | None = None,
) -> list[Point]:
    """
    Responses of all policies under all weights, rewarded and judged.

    Every point of every seed is a file in `folder`, written whole: an interrupted sweep goes on
    where it stopped, several processes may share the folder, and a changed reward function scores
    the stored responses again. Seeds are the outer loop, so that a first front is complete early.

    Args:
        policies (`list[Policy]`):
            What is compared. A policy without weights of its own and whose `weights` is `[{}]` is
            one point, as an unguided base model is.
        prompts (`list`):
            Strings, or conversations.
        weights (`list[dict[str, float]]`):
            Weights of the objectives of every point.
        reward_funcs (`dict[str, Callable | str]`):
            One reward function, or reward model id, per objective.
        folder (`str` or `Path`):
            Where responses and rewards are kept.
        seeds (`int`, *optional*, defaults to `3`):
            Number of responses to each prompt, each from a sweep of its own.
        judges (`dict[str, Callable | str]`, *optional*):
            A second reward function for objectives, which training never saw.

    Returns:
        `list[Point]`: In the order of the policies, then of the weights.

    Raises:
        ValueError: There is no prompt or seed, an objective is unknown, two points are one, a
            policy does not return a response per prompt, or a reward function no number for each.
        RuntimeError: A reward function raises. What was sampled is kept.

    Example:

    ```python
    >>> from trimtab.trainers import sweep
    >>> points = sweep(
    ...     policies, prompts["prompt"], weights=[{"brief": 0.5}, {"brief": 1.0}],
    ...     reward_funcs={"brief": brief}, folder="sweep", seeds=2,
    ... )
    >>> [(point.method, point.weights) for point in points]
    [('unguided', {}), ('guided', {'brief': 0.5}), ('guided', {'brief': 1.0})]
    >>> points[1].rewards["brief"].mean(axis=0)  # of each prompt
    array([-3., -3., -3.])
    ```
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not prompts:
        raise ValueError("`prompts` is empty: give at least one prompt")
    if seeds < 1:
        raise ValueError(f"`seeds` must be at least 1, got {seeds}")
    scorers = {"rewards": load_reward_funcs(reward_funcs)}
    scorers["judged"] = load_reward_funcs(judges) if judges else {}
    for name in scorers["judged"]:
        if name not in scorers["rewards"]:
            raise ValueError(
                f"`judges` has {name!r}, which is no objective of `reward_funcs`: "
                f"{list(scorers['rewards'])}"
            )
    # Asked once, before they are called: what a function keeps from its calls is no part of it.
    identities = {
        kind: {name: identify(function) for name, function in functions.items()}
        for kind, functions in scorers.items()
    }
    points = []
    for policy in policies:
        for chosen in weights if policy.weights is None else policy.weights:
            if unknown := sorted(set(chosen) - set(scorers["rewards"])):
                raise ValueError(
                    f"`weights` of {policy.method!r} name {unknown[0]!r}; the objectives are "
                    f"{list(scorers['rewards'])}"
                )
            point = Point(policy.method, policy.strength, dict(chosen), kl_bound=policy.kl_bound)
            points.append((policy, point))
    keys = [(point.method, point.strength, _label(point.weights)) for _, point in points]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ValueError(f"`policies` has the point {twice[0]} twice: give another `method`")
    jobs = [
        (policy, point, seed)
        for seed in range(seeds)
        for policy, point in points
        if seed < (policy.seeds or seeds)
    ]
    progress = tqdm(jobs, desc="Sweeping the weights", unit="point")
    for policy, point, seed in progress:
        progress.set_postfix_str(f"{point.method} {_label(point.weights)}, seed {seed}")
        stored = _stored(folder, policy, point, prompts, seed)
        point.responses.append([Response(**row) for row in stored["responses"]])
        changed = False
        for kind, functions in scorers.items():
            kept = stored.setdefault(kind, {})
            for name, function in functions.items():
                if kept.get(name, {}).get("function") != identities[kind][name]:
                    values = _score(name, function, prompts, point.responses[-1])
                    kept[name] = {"function": identities[kind][name], "values": values}
                    changed = True
                column = np.array(kept[name]["values"], float)[None]
                scores = getattr(point, kind)
                scores[name] = np.concatenate([scores.get(name, column[:0]), column])
        if changed:
            write_json(stored.pop("path"), stored, indent=None)
    return [point for _, point in points]


def _label(weights: Mapping[str, float]) -> str:
    return " + ".join(f"{value:.3g} {name}" for name, value in weights.items() if value) or "none"


def _stored(
    folder: Path, policy: Policy, point: Point, prompts: Sequence[Any], seed: int
) -> dict[str, Any]:
    """The file of a point and seed, sampled if it is not there; `path` says where it is."""
    identity = {
        "method": policy.method,
        "strength": policy.strength,
        "weights": point.weights,
        "seed": seed,
        "identity": policy.identity,
        "prompts": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:16],
    }
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    name = re.sub(r"\W+", "-", f"{policy.method} {policy.strength:g} {_label(point.weights)}")
    path = folder / f"{name[:80]}-s{seed}-{digest}.json"
    if path.exists():
        return {**json.loads(path.read_text()), "path": path}
    started = time.monotonic()
    responses = policy.respond(prompts, point.weights, seed)
    if len(responses) != len(prompts):
        raise ValueError(
            f"policy {policy.method!r} returned {len(responses)} responses for {len(prompts)} "
            "prompts; it must return one for each"
        )
    share = (time.monotonic() - started) / len(prompts)
    for response in responses:
        response.seconds = share if response.seconds is None else response.seconds
    stored = {
        **identity,
        "responses": [asdict(response) for response in responses],
    }
    write_json(path, stored, indent=None)
    return {**stored, "path": path}


def _score(
    name: str, function: Any, prompts: Sequence[Any], responses: Sequence[Response]
) -> list[float]:
    texts: list[Any] = [response.text for response in responses]
    if not isinstance(prompts[0], str):
        texts = [[{"role": "assistant", "content": text}] for text in texts]
    ids = [response.token_ids for response in responses]
    rewards = compute_rewards(name, function, prompts, texts, ids, {})
    for prompt, reward in zip(prompts, rewards):
        if reward != reward:
            raise ValueError(
                f"reward function {name!r} returned None for the prompt {prompt!r}: points are "
                "compared on the same prompts, leave those out that it does not apply to"
            )
    return rewards


def evaluate(
    points: Sequence[Point],
    planes: Sequence[Sequence[str]] = (),
    kl_budgets: Sequence[float] = (),
    baseline: str = "unguided",
    against: tuple[str, float] | None = None,
    references: Sequence[float] = (1.0,),
    draws: int = 2000,
) -> dict[str, Any]:
    """
    What every point gives and costs, and the hypervolume of every method, with intervals.

    Gains are in standard deviations of the baseline's reward. Medians over the seeds; 95 %
    bootstrap intervals over the prompts, paired between methods.

    Args:
        points (`list[Point]`):
            Of [`sweep`], the baseline's among them.
        planes (`list[list[str]]`, *optional*):
            Sets of objectives to measure hypervolumes in, from the points that give no weight to
            any other. All objectives together always are one.
        kl_budgets (`list[float]`, *optional*):
            KL to the base model, in nats a response, at which to compare methods: each of their
            points is read off at this KL along its strengths, see [`at_kl`].
        baseline (`str`, *optional*, defaults to `"unguided"`):
            Method of the base model itself.
        against (`tuple[str, float]`, *optional*):
            Method and strength that the others are subtracted from, their hypervolumes paired by
            prompt: positive where it is ahead. Each is subtracted from the method's whole front,
            of all its strengths, too. At equal KL the method alone counts.
        references (`list[float]`, *optional*, defaults to `[1.0]`):
            Where a hypervolume begins: so many standard deviations below the baseline's mean, in
            every objective. Points beyond it in one objective count for nothing, so a nearer
            reference asks that no objective is given up. Further ones show what depends on it.
        draws (`int`, *optional*, defaults to `2000`):
            Bootstrap samples.

    Returns:
        `dict[str, Any]`: `objectives`, `unguided` (mean and standard deviation of each reward),
        `points`, `planes`, `judged_planes` (the same by the held-out judges, where every objective
        has one), `judges` and `against`, ready for JSON.

    Raises:
        ValueError: `baseline` is the method of no point or of several, `against` of none, or
            `planes` names an objective that is unknown.

    Example:

    ```python
    >>> from trimtab.trainers import evaluate, sweep
    >>> points = sweep(
    ...     policies, prompts["prompt"], [{"brief": 1.0}], {"brief": brief}, folder="sweep"
    ... )
    >>> _, guided = evaluate(points, kl_budgets=[2.0])["points"]
    >>> guided["gain"]["brief"]["value"], guided["kl"]["value"]
    (4.0, 2.0)
    ```
    """
    base = [point for point in points if point.method == baseline]
    if len(base) != 1:
        raise ValueError(
            f"`baseline` must be the method of one point, got {baseline!r} with {len(base)}"
        )
    objectives = list(base[0].rewards)
    if against is not None and against not in {(p.method, p.strength) for p in points}:
        raise ValueError(f"`against` must be a method and strength of a point, got {against!r}")
    planes = [list(plane) for plane in planes] + [objectives]
    for plane in planes:
        if unknown := sorted(set(plane) - set(objectives)):
            raise ValueError(f"`planes` names {unknown[0]!r}; the objectives are {objectives}")
    order = prompt_draws(base[0].rewards[objectives[0]].shape[1], draws)
    gains = _gains(points, base[0], "rewards", order)
    kls = [p.kl()[:, order].mean(-1) for p in points]  # [seeds, draws]
    entries = []
    for point, gain in zip(points, gains):
        texts = [[response.text for response in row] for row in point.responses]
        lengths = [[len(r.token_ids) for r in row] for row in point.responses]
        ratios = [[r.log_ratio for r in row] for row in point.responses]
        cost = sum(r.cost for row in point.responses for r in row)
        speed = [
            sum(length) / max(1e-9, sum(r.seconds or 0.0 for r in row))
            for length, row in zip(lengths, point.responses)
        ]
        entry: dict[str, Any] = {
            "method": point.method,
            "strength": point.strength,
            "weights": point.weights,
            "seeds": len(point.responses),
            "gain": {o: interval(np.median(gain[..., i], 0)) for i, o in enumerate(objectives)},
            "kl": None if point.kl_kind == "unknown" else _mean(point.kl(), order),
            "kl_kind": point.kl_kind,
            "log_ratio": None if ratios[0][0] is None else _mean(np.array(ratios, float), order),
            "distinct_1": float(np.median([distinct_n(row, 1) for row in texts])),
            "distinct_2": float(np.median([distinct_n(row, 2) for row in texts])),
            "length": float(np.mean(lengths)),
            "cost": cost / sum(map(len, point.responses)),
            "tokens_per_second": float(np.median(speed)),
        }
        entries.append(entry)
    fronts = {}
    for name, kind in (("planes", "rewards"), ("judged_planes", "judged")):
        judged = [o for o in objectives if o in getattr(base[0], kind)]
        seen = gains if kind == "rewards" else _gains(points, base[0], kind, order)
        fronts[name] = [
            {
                **_plane(
                    plane, judged, points, seen, kls, kl_budgets, baseline, against, references[0]
                ),
                "other_references": [
                    _plane(plane, judged, points, seen, kls, (), baseline, against, below)
                    for below in references[1:]
                ],
            }
            for plane in planes
            if set(plane) <= set(judged)
        ]
    return {
        "objectives": objectives,
        "unguided": {
            o: {"mean": float(base[0].rewards[o].mean()), "std": _spread(base[0].rewards[o])}
            for o in objectives
        },
        "against": None if against is None else {"method": against[0], "strength": against[1]},
        "prompts": order.shape[1],
        "points": entries,
        **fronts,
        "judges": _agreement(points, base[0], objectives, order),
    }


def _gains(points: Sequence[Point], base: Point, kind: str, order: np.ndarray) -> list[np.ndarray]:
    """Standardised gains over the baseline, `[seeds, draws, objectives]` of every point."""

    def means(point: Point) -> np.ndarray:
        columns = [scores[:, order].mean(-1) for scores in getattr(point, kind).values()]
        return np.stack(columns, axis=-1) if columns else np.zeros((1, len(order), 0))

    scale = np.array([_spread(scores) for scores in getattr(base, kind).values()])
    # The baseline is drawn too, since its mean is a measurement.
    plain = means(base).mean(0)
    return [(means(point) - plain) / scale for point in points]


def _spread(values: np.ndarray) -> float:
    """Standard deviation, 1 for constant values."""
    std = float(values.std())
    return std if std > 1e-12 * max(1.0, abs(float(values.mean()))) else 1.0


def _mean(values: np.ndarray, order: np.ndarray) -> dict[str, float]:
    return interval(values.mean(0)[order].mean(-1))


def _plane(
    plane: list[str],
    objectives: list[str],
    points: Sequence[Point],
    gains: Sequence[np.ndarray],
    kls: Sequence[np.ndarray],
    kl_budgets: Sequence[float],
    baseline: str,
    against: tuple[str, float] | None,
    below: float,
) -> dict[str, Any]:
    """Hypervolumes in the space of some objectives, of every method, and at equal KL."""
    columns = [objectives.index(o) for o in plane]
    reference = np.full(len(plane), -below)
    inside = [
        i
        for i, point in enumerate(points)
        if point.method != baseline and not {o for o, w in point.weights.items() if w} - {*plane}
    ]
    volumes: dict[tuple[str, float], np.ndarray] = {}  # median over seeds, [draws]
    whole: dict[str, np.ndarray] = {}  # of all strengths together
    matched: dict[float, dict[str, np.ndarray]] = {budget: {} for budget in kl_budgets}
    for method in dict.fromkeys(points[i].method for i in inside):
        own = [i for i in inside if points[i].method == method]
        strengths = sorted({points[i].strength for i in own})
        for strength in strengths:
            chosen = [gains[i][..., columns] for i in own if points[i].strength == strength]
            front = np.stack(chosen, axis=-2)  # [seeds, draws, points, objectives]
            volumes[method, strength] = np.median(hypervolume(front, reference), 0)
        seeds = min(len(gains[i]) for i in own)
        front = np.stack([gains[i][:seeds][..., columns] for i in own], axis=-2)
        whole[method] = np.median(hypervolume(front, reference), 0)
        for budget in kl_budgets:
            lines = []
            for label in dict.fromkeys(_label(points[i].weights) for i in own):
                line = [i for i in own if _label(points[i].weights) == label]
                seeds = min(len(kls[i]) for i in line)
                lines.append(
                    at_kl(
                        np.stack([kls[i][:seeds] for i in line], axis=-1),
                        np.stack([gains[i][:seeds][..., columns] for i in line], axis=-2),
                        budget,
                    )
                )
            seeds = min(map(len, lines))
            stacked = np.stack([gain[:seeds] for gain in lines], axis=-2)
            if not np.isnan(stacked).any():
                matched[budget][method] = np.median(hypervolume(stacked, reference), 0)
    center = np.array([np.median(gains[i][:, 0, columns], axis=0) for i in inside])
    best = moocore.is_nondominated(center, maximise=True, keep_weakly=True) if inside else ()
    on_front = dict(zip(inside, best))
    result: dict[str, Any] = {
        "objectives": plane,
        "reference": -below,
        "unguided": float(hypervolume(np.zeros((1, len(plane))), reference)),
        "hypervolume": [],
        "fronts": [],
        "matched": [],
    }
    reached = None if against is None else whole.get(against[0])
    for key, volume in volumes.items():
        own = [i for i in inside if (points[i].method, points[i].strength) == key]
        row: dict[str, Any] = {"method": key[0], "strength": key[1], "points": len(own)}
        row["on_joint_front"] = int(sum(on_front[i] for i in own))
        row |= interval(volume)
        if against in volumes:
            row["behind"] = interval(volumes[against] - volume)
        if reached is not None:
            row["behind_front"] = interval(reached - volume)
        result["hypervolume"].append(row)
    for method, volume in whole.items():
        points_of = sum(points[i].method == method for i in inside)
        row = {"method": method, "points": points_of, **interval(volume)}
        if reached is not None:
            row["behind"] = interval(reached - volume)
        result["fronts"].append(row)
    for budget, by_method in matched.items():
        for method, volume in by_method.items():
            row = {"kl": budget, "method": method, **interval(volume)}
            if against is not None and against[0] in by_method:
                row["behind"] = interval(by_method[against[0]] - volume)
            result["matched"].append(row)
    return result


def _agreement(
    points: Sequence[Point], base: Point, objectives: list[str], order: np.ndarray
) -> list[dict[str, Any]]:
    """Gain by the training reward and by the judge, of the points with all weight on one."""
    found = []
    for point in points:
        named = [o for o, weight in point.weights.items() if weight]
        if len(named) != 1 or named[0] not in point.judged:
            continue
        o = named[0]
        both = {}
        for kind in ("rewards", "judged"):
            ours, plain = getattr(point, kind)[o], getattr(base, kind)[o]
            drawn = ours.mean(0)[order].mean(-1) - plain.mean(0)[order].mean(-1)
            both[kind] = interval(drawn / _spread(plain))
        found.append(
            {
                "method": point.method,
                "strength": point.strength,
                "objective": o,
                "reward": both["rewards"],
                "judge": both["judged"],
                "agrees": both["rewards"]["value"] * both["judged"]["value"] > 0,
            }
        )
    return found


def judge_points(
    judge: PairwiseJudge,
    criteria: Mapping[str, str],
    points: Sequence[Point],
    prompts: Sequence[Any],
    baseline: str = "unguided",
    draws: int = 2000,
) -> list[dict[str, Any]]:
    """
    Win rates over the baseline, of the points with all weight on one objective.

    Args:
        judge ([`PairwiseJudge`]):
            Language model that compares.
        criteria (`dict[str, str]`):
            What to ask for each objective, for example `{"positivity": "is more positive"}`.
        points (`list[Point]`):
            Of [`sweep`], the baseline's among them.
        prompts (`list`):
            Of the sweep.
        baseline (`str`, *optional*, defaults to `"unguided"`):
            Method to compare with.
        draws (`int`, *optional*, defaults to `2000`):
            Bootstrap samples of the prompts.

    Returns:
        `list[dict[str, Any]]`: `method`, `strength`, `objective`, and the win rate, ties half, with
        its 95 % interval: `value`, `low` and `high`.

    Raises:
        ValueError: `baseline` is the method of no point.

    Example:

    ```python
    >>> from trimtab.trainers import PairwiseJudge, judge_points, sweep
    >>> judge = PairwiseJudge("http://localhost:8000/v1", "my-judge", "judgements.jsonl")
    >>> points = sweep(
    ...     policies, prompts["prompt"], [{"brief": 1.0}], {"brief": brief}, folder="sweep"
    ... )
    >>> (row,) = judge_points(judge, {"brief": "is shorter"}, points, prompts["prompt"])
    >>> row["method"], row["objective"], row["value"]
    ('guided', 'brief', 1.0)
    ```
    """
    base = next((point for point in points if point.method == baseline), None)
    if base is None:
        raise ValueError(f"`baseline` is the method of no point: {baseline!r}")
    order = prompt_draws(len(prompts), draws)
    rows = []
    for point in points:
        named = [o for o, weight in point.weights.items() if weight]
        if len(named) != 1 or named[0] not in criteria:
            continue
        wins = [
            judge.compare(
                criteria[named[0]], prompts, [r.text for r in ours], [r.text for r in plain]
            )
            for ours, plain in zip(point.responses, base.responses)
        ]
        rows.append(
            {
                "method": point.method,
                "strength": point.strength,
                "objective": named[0],
                **_mean(np.array(wins), order),
            }
        )
    return rows


class PairwiseJudge:
    """
    A language model that says which of two responses meets a criterion better.

    Each pair is asked in both orders. A response wins only if both answers name it; answers that
    disagree are a tie, which cancels a preference for the first or the second place. Answers are
    kept on disk: a question is asked once.

    Args:
        base_url (`str`):
            An OpenAI-compatible endpoint, for example `"http://localhost:8000/v1"`.
        model (`str`):
            Name of the model there.
        cache (`str` or `Path`):
            File of the answers, a JSON object in each line.
        api_key (`str`, *optional*, defaults to `"none"`):
            Key of the endpoint.
        concurrency (`int`, *optional*, defaults to `8`):
            Number of questions that wait at once.
        max_retries (`int`, *optional*, defaults to `5`):
            Of a question, with growing pauses.

    Raises:
        ValueError: `concurrency` is below 1.

    Example:

    ```python
    >>> from trimtab.trainers import PairwiseJudge
    >>> judge = PairwiseJudge("http://localhost:8000/v1", "my-judge", "judgements.jsonl")
    >>> guided, unguided = ["A drink.", "Rails."], ["It is a drink.", "Steel."]
    >>> wins = judge.compare("is shorter", ["What is tea?", "What are tracks?"], guided, unguided)
    >>> float(wins.mean())  # the win rate: one won, one tied
    0.75
    ```
    """

    TEMPLATE = (
        "Two assistants answered the same prompt.\n\nPrompt:\n{prompt}\n\nAnswer A:\n{a}\n\n"
        "Answer B:\n{b}\n\nWhich answer {criterion}? Reply with one word: A, B or tie."
    )

    def __init__(
        self,
        base_url: str,
        model: str,
        cache: str | Path,
        api_key: str = "none",
        concurrency: int = 8,
        max_retries: int = 5,
    ) -> None:
        if concurrency < 1:
            raise ValueError(f"`concurrency` must be at least 1, got {concurrency}")
        self.base_url = base_url
        self.model = model
        self.cache = Path(cache)
        self.api_key = api_key
        self.concurrency = concurrency
        self.max_retries = max_retries

    def compare(
        self, criterion: str, prompts: Sequence[Any], first: Sequence[str], second: Sequence[str]
    ) -> np.ndarray:
        """
        Compares two responses to each prompt.

        Args:
            criterion (`str`):
                Ends the question "Which answer …?", for example `"is more positive"`.
            prompts (`list`):
                Strings, or conversations, whose last message is shown.
            first (`list[str]`):
                Responses.
            second (`list[str]`):
                The other responses.

        Returns:
            `np.ndarray`: `[n]` float64: 1 where `first` wins, 0 where it loses, 0.5 for a tie.

        Raises:
            ValueError: `prompts`, `first` and `second` are not of one length.
            ModuleNotFoundError: openai is not installed.
            openai.OpenAIError: The endpoint refuses, or fails `max_retries` times; answers that
                came are kept.
        """
        if not len(prompts) == len(first) == len(second):
            raise ValueError(
                "`prompts`, `first` and `second` must be of one length, got "
                f"{len(prompts)}, {len(first)} and {len(second)}"
            )
        shown = [p if isinstance(p, str) else p[-1]["content"] for p in prompts]
        questions = [
            self.TEMPLATE.format(prompt=prompt, a=a, b=b, criterion=criterion)
            for prompt, one, other in zip(shown, first, second)
            for a, b in ((one, other), (other, one))
        ]
        answers = asyncio.run(self._ask(questions))
        wins = np.full(len(prompts), 0.5)
        for i, pair in enumerate(zip(answers[::2], answers[1::2])):
            if pair == ("A", "B"):
                wins[i] = 1.0
            elif pair == ("B", "A"):
                wins[i] = 0.0
        return wins

    async def _ask(self, questions: Sequence[str]) -> list[str]:
        """`"A"`, `"B"` or `"tie"` for every question, from the cache where it is there."""
        try:
            from openai import AsyncOpenAI
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "PairwiseJudge needs openai; pip install openai", name="openai"
            ) from error

        def key(question: str) -> str:
            return hashlib.sha256(json.dumps([self.model, question]).encode()).hexdigest()

        text = self.cache.read_text() if self.cache.exists() else ""
        complete = text[: text.rfind("\n") + 1]  # without the line that an interruption cut off
        if complete != text:
            self.cache.write_text(complete)
        known = {row["question"]: row["answer"] for row in map(json.loads, complete.splitlines())}
        open_questions = [q for q in dict.fromkeys(questions) if key(q) not in known]
        gate = asyncio.Semaphore(self.concurrency)

        async def one(client: Any, question: str) -> tuple[str, str]:
            async with gate:
                reply = await client.chat.completions.create(
                    model=self.model,
                    messages=[{"role": "user", "content": question}],
                    temperature=0.0,
                    max_tokens=8,
                )
            return key(question), verdict(reply.choices[0].message.content or "")

        if open_questions:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            async with AsyncOpenAI(
                base_url=self.base_url, api_key=self.api_key, max_retries=self.max_retries
            ) as client:
                tasks = [asyncio.create_task(one(client, q)) for q in open_questions]
                with self.cache.open("a") as out:
                    for task in tqdm(asyncio.as_completed(tasks), total=len(tasks), desc="Judging"):
                        question, answer = await task
                        known[question] = answer
                        out.write(json.dumps({"question": question, "answer": answer}) + "\n")
                        out.flush()
        return [known[key(question)] for question in questions]


def verdict(reply: str) -> str:
    """
    Reads a judge's reply.

    Args:
        reply (`str`):
            What the judge wrote.

    Returns:
        `str`: `"A"` or `"B"` if the reply names one of them and not the other, else `"tie"`.
    """
    named = set(re.findall(r"\b[AB]\b", reply))
    return named.pop() if len(named) == 1 else "tie"
