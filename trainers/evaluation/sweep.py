"""Sweeps of the weights: policies answer prompts, reward functions and held-out judges score.

Nothing is sampled here but by the policies' callables.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..files import write_json
from ..rewards import compute_rewards, identify, load_reward_funcs
from .points import Point, Policy, Response, weights_label


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
    keys = [(point.method, point.strength, weights_label(point.weights)) for _, point in points]
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
        progress.set_postfix_str(f"{point.method} {weights_label(point.weights)}, seed {seed}")
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
    name = re.sub(
        r"\W+", "-", f"{policy.method} {policy.strength:g} {weights_label(point.weights)}"
    )
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
