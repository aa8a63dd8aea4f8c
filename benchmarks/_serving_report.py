"""The tables and the figure of `serving.py`, from what it measured."""

from __future__ import annotations

import typing as tp
from pathlib import Path

import numpy as np

SHOWN = (
    "vLLM",
    "heads, 4 objectives",
    "state head, pruned, 3 objectives",
    "state head, 3 objectives",
    "published, tree, 3 objectives",
)


def markdown(result: dict[str, tp.Any]) -> str:
    """The tables: every arm and load, then the comparisons, then the processes' memory."""
    lines = [
        "| arm | requests | prompt | k (left) | tokens/s (min to max) | of unguided "
        "| first token, ms | between tokens, ms, p50 / p99 | best of N at equal time |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in result["rows"]:
        rate, ratio = r["tokens_per_s"], r.get("relative_to_unguided")
        of = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else ""
        left = r["candidates_left"]
        k = f"{r['k']} ({left:.0f})" if 0 < left < r["k"] else r["k"]
        lines.append(
            f"| {r['arm']} | {r['load']} | {r['prompt']} | {k} | {rate['median']:.1f} "
            f"({rate['min']:.1f} to {rate['max']:.1f}) | {of} | {r['ttft_ms']['median']:.0f} "
            f"| {r['itl_p50_ms']:.1f} / {r['itl_p99_ms']:.1f} "
            f"| {r.get('best_of_at_equal_time', '')} |"
        )
    lines += [
        "",
        "| what | requests | measured (min to max) | target |",
        "| --- | --- | --- | --- |",
    ]
    for r in result["comparisons"]:
        ratio, target = r["ratio"], f"at least {r['at_least']}" if r["at_least"] else "1"
        lines.append(
            f"| {r['arm']} / {r['relative_to']} | {r['load']} | {ratio['median']:.2f} "
            f"({ratio['min']:.2f} to {ratio['max']:.2f}) | {target} |"
        )
    lines += [
        "",
        "| process | value weights + store, MB | resident at start, GB | after each repetition, GB "
        "| peak, GB | above that of vLLM, MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    plain = result["memory"].get("vLLM")
    for name, row in result["memory"].items():
        above = f"{1e3 * (row['peak'] - plain['peak']):.0f}" if plain else ""
        stated = [row[key] for key in ("value weights, MB", "value store, MB") if key in row]
        after = ", ".join(f"{x:.3f}" for x in row["after_each_repetition"])
        lines.append(
            f"| {name} | {' + '.join(f'{x:.1f}' for x in stated)} | {row['start']:.3f} | {after} "
            f"| {row['peak']:.3f} | {above} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, tp.Any]], path: Path) -> None:
    """Growth with the load, the prompt and k, and where a step's time goes."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    common = {"load": 8, "prompt": 32, "k": 40}

    def at(name: str, free: str | None = None) -> list[dict[str, tp.Any]]:
        """The arm's rows at the common load, or at any value of one of its fields."""
        fixed = {field: value for field, value in common.items() if field != free}
        return [r for r in rows if r["arm"] == name and fixed.items() <= r.items()]

    def lines(axis: tp.Any, field: str, x: str) -> None:
        ticks = set()
        for name in SHOWN:
            points = sorted(
                (r[x], r[field]["median"] if isinstance(r[field], dict) else r[field])
                for r in at(name, x)
            )
            axis.loglog(*zip(*points), "o-", label=name)
            ticks |= {point[0] for point in points}
        axis.set_xticks(sorted(ticks), [str(t) for t in sorted(ticks)])
        axis.minorticks_off()
        axis.grid(alpha=0.3)

    lines(axes[0, 0], "tokens_per_s", "load")
    axes[0, 0].set(xlabel="requests at once", ylabel="output tokens/s")
    axes[0, 0].legend(fontsize=8)
    lines(axes[0, 1], "itl_p50_ms", "prompt")
    axes[0, 1].set(xlabel="prompt tokens, 8 requests", ylabel="ms between tokens, median")
    lines(axes[1, 0], "itl_p50_ms", "k")
    axes[1, 0].set(xlabel="candidates k, 8 requests", ylabel="ms between tokens, median")
    parts = ("base model", "value model", "candidates", "guidance, other", "sampling", "rest")
    bars = {name: at(name)[0]["ms_per_step_by_part"] for name in SHOWN}
    left = np.zeros(len(bars))
    for part in parts:
        widths = np.array([bar.get(part, 0.0) for bar in bars.values()])
        axes[1, 1].barh(list(bars), widths, left=left, label=part)
        left += widths
    axes[1, 1].set(xlabel="ms a step after the first, 8 requests")
    axes[1, 1].invert_yaxis()
    axes[1, 1].legend(fontsize=8)
    figure.savefig(path, dpi=120)
