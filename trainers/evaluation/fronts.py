"""Fronts: gains over the unguided model, hypervolumes, and both at equal KL, with intervals."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import moocore
import numpy as np

from ..statistics import interval, prompt_draws
from .points import Point, single_objective, weights_label


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
            for label in dict.fromkeys(weights_label(points[i].weights) for i in own):
                line = [i for i in own if weights_label(points[i].weights) == label]
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
        o = single_objective(point.weights)
        if o is None or o not in point.judged:
            continue
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
