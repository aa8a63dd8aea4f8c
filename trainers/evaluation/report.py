"""What [`evaluate`] found: JSON, Markdown tables, a PNG, and an HTML page that needs no network."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .points import weights_label


def write_report(result: Mapping[str, Any], path: str | Path, intro: str = "") -> list[Path]:
    """
    Writes `path` with the endings `.json`, `.md`, `.png` and `.html`.

    Args:
        result (`dict[str, Any]`):
            Of [`evaluate`]. `"language_model_judge"`, if there, is that of [`judge_points`]; other
            keys of the caller's own are kept in the JSON.
        path (`str` or `Path`):
            Where to write, without an ending.
        intro (`str`, *optional*, defaults to `""`):
            Markdown that the tables follow.

    Returns:
        `list[Path]`: The four files.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.

    Example:

    ```python
    >>> from trimtab.trainers import evaluate, sweep, write_report
    >>> points = sweep(
    ...     policies, prompts["prompt"], [{"brief": 1.0}], {"brief": brief}, folder="sweep"
    ... )
    >>> [path.name for path in write_report(evaluate(points), "report")]
    ['report.json', 'report.md', 'report.png', 'report.html']
    ```
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_name(path.name + ending) for ending in (".json", ".md", ".png", ".html")]
    files[0].write_text(json.dumps(result, indent=2) + "\n")
    files[1].write_text(intro + to_markdown(result))
    plot(result, files[2])
    files[3].write_text(to_html(result))
    return files


def _interval(x: Mapping[str, float], digits: int = 2, sign: str = "+") -> str:
    return (
        f"{x['value']:{sign}.{digits}f} [{x['low']:{sign}.{digits}f}, {x['high']:{sign}.{digits}f}]"
    )


def _kl(entry: Mapping[str, Any]) -> str:
    if entry["kl"] is None:
        return "?"
    return f"{'≤ ' if entry['kl_kind'] == 'bound' else ''}{entry['kl']['value']:.1f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def _by_budget(title: str, rows: Sequence[Mapping[str, Any]], sign: str = "") -> list[str]:
    """A column for every KL budget, a row for every method."""
    cells: dict[str, list[str]] = {}
    for row in rows:
        cells.setdefault(row["method"], []).append(_interval(row, sign=sign))
    if not cells:
        return []
    budgets = dict.fromkeys(f"{row['kl']:g}" for row in rows)
    return [
        f"{title}, with at most so many nats of KL to the base model a response:",
        "",
        *_table(["method", *budgets], [[method, *row] for method, row in cells.items()]),
    ]


def _plane(plane: Mapping[str, Any], against: Mapping[str, Any] | None) -> list[str]:
    """The hypervolumes of one plane."""
    one, whole = [], []  # headings of the columns that compare
    if against and all("behind" in row for row in plane["hypervolume"]):
        one = [f"{against['method']} {against['strength']:g} ahead by"]
        whole = [f"{against['method']}, all strengths, ahead by"]
    lines = [
        f"From {-plane['reference']:g} standard deviations below the unguided mean in every "
        f"objective; the unguided model is worth {plane['unguided']:g}.",
        "",
        *_table(
            ["method", "strength", "points", "on the joint front", "hypervolume", *one, *whole],
            [
                [
                    row["method"],
                    f"{row['strength']:g}",
                    str(row["points"]),
                    str(row["on_joint_front"]),
                    _interval(row, sign=""),
                    *(_interval(row["behind"]) for _ in one),
                    *(_interval(row["behind_front"]) for _ in whole),
                ]
                for row in plane["hypervolume"]
            ],
        ),
        "All strengths of a method together:",
        "",
        *_table(
            ["method", "points", "hypervolume", *whole],
            [
                [
                    row["method"],
                    str(row["points"]),
                    _interval(row, sign=""),
                    *(_interval(row["behind"]) for _ in whole),
                ]
                for row in plane["fronts"]
            ],
        ),
    ]
    for other in plane.get("other_references", []):
        lines += [f"From {-other['reference']:g} below, {other['unguided']:g} unguided:", ""]
        lines += _table(
            ["method", "strength", "hypervolume", *one],
            [
                [
                    row["method"],
                    f"{row['strength']:g}",
                    _interval(row, sign=""),
                    *(_interval(row["behind"]) for _ in one),
                ]
                for row in other["hypervolume"]
            ],
        )
    lines += _by_budget("Hypervolume", plane["matched"])
    if against:
        others = [
            {**row, **row["behind"]}
            for row in plane["matched"]
            if row["method"] != against["method"] and "behind" in row
        ]
        lines += _by_budget(f"{against['method']} ahead by", others, sign="+")
    return lines


def to_markdown(result: Mapping[str, Any]) -> str:
    """
    Tables of the hypervolumes, the judges and all points.

    Args:
        result (`dict[str, Any]`):
            Of [`evaluate`].

    Returns:
        `str`: Markdown.
    """
    objectives, against = result["objectives"], result["against"]
    lines = [
        f"{result['prompts']} prompts; gains in standard deviations of the unguided reward; "
        "medians over the seeds, 95 % bootstrap intervals over the prompts.",
        "",
    ]
    for plane in result["planes"]:
        lines += [f"## Hypervolume: {', '.join(plane['objectives'])}", ""]
        lines += _plane(plane, against)
    for plane in result["judged_planes"]:
        lines += [f"## Hypervolume by the held-out judges: {', '.join(plane['objectives'])}", ""]
        lines += _plane(plane, against)
    if result["judges"]:
        lines += ["## Held-out judges", ""]
        lines += _table(
            ["method", "strength", "objective", "training reward", "held-out judge", "same sign"],
            [
                [
                    row["method"],
                    f"{row['strength']:g}",
                    row["objective"],
                    _interval(row["reward"]),
                    _interval(row["judge"]),
                    "yes" if row["agrees"] else "**no**",
                ]
                for row in result["judges"]
            ],
        )
    if result.get("language_model_judge"):
        lines += ["## Win rate by a language model, both orders, ties half", ""]
        lines += _table(
            ["method", "strength", "objective", "win rate over unguided"],
            [
                [row["method"], f"{row['strength']:g}", row["objective"], _interval(row, sign="")]
                for row in result["language_model_judge"]
            ],
        )
    lines += ["## Points", ""]
    lines += _table(
        ["method", "strength", "weights", *objectives, "KL", "log-ratio", "distinct-1",
         "distinct-2", "length", "cost, tokens", "tokens/s"],
        [
            [
                p["method"],
                f"{p['strength']:g}",
                weights_label(p["weights"]),
                *(_interval(p["gain"][o]) for o in objectives),
                _kl(p),
                "" if p["log_ratio"] is None else f"{p['log_ratio']['value']:.1f}",
                f"{p['distinct_1']:.2f}",
                f"{p['distinct_2']:.2f}",
                f"{p['length']:.0f}",
                f"{p['cost']:.0f}",
                f"{p['tokens_per_second']:.0f}",
            ]
            for p in result["points"]
        ],
    )  # fmt: skip
    return "\n".join(lines)


def plot(result: Mapping[str, Any], path: Path) -> None:
    """
    A panel per plane of two objectives, and hypervolume against KL of every plane.

    Args:
        result (`dict[str, Any]`):
            Of [`evaluate`].
        path (`Path`):
            PNG file to write.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the plot of a front needs matplotlib; pip install matplotlib", name="matplotlib"
        ) from error

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pairs = [plane["objectives"] for plane in result["planes"] if len(plane["objectives"]) == 2]
    matched = [plane for plane in result["planes"] if plane["matched"]]
    panels = max(1, len(pairs) + len(matched))
    figure, axes = plt.subplots(
        1, panels, figsize=(5.4 * panels, 4.8), layout="constrained", squeeze=False
    )
    families = list(dict.fromkeys((p["method"], p["strength"]) for p in result["points"]))
    colours = {method: f"C{i}" for i, method in enumerate(dict.fromkeys(m for m, _ in families))}
    for axis, (x, y) in zip(axes[0], pairs):
        for method, strength in families:
            own = [
                p
                for p in result["points"]
                if (p["method"], p["strength"]) == (method, strength)
                and not {o for o, w in p["weights"].items() if w} - {x, y}
            ]
            own.sort(key=lambda p: p["weights"].get(x, 0.0))
            if not own:
                continue
            # [objectives, points, (value, low, high)]
            gains = np.array(
                [[[*map(p["gain"][o].get, ("value", "low", "high"))] for p in own] for o in (x, y)]
            )
            value, low, high = np.moveaxis(gains, -1, 0)
            # A median over seeds may lie outside the interval of its bootstrap.
            bars = np.maximum(np.stack([value - low, high - value], axis=1), 0)
            axis.errorbar(
                *value, xerr=bars[0], yerr=bars[1],
                fmt="o-", ms=4, lw=1.2, elinewidth=0.4, color=colours[method],
                alpha=0.45 + 0.55 * _rank(strength, [s for m, s in families if m == method]),
                label=f"{method}, {strength:g}",
            )  # fmt: skip
        axis.set_xlabel(f"gain in {x} (unguided sd)")
        axis.set_ylabel(f"gain in {y} (unguided sd)")
        axis.legend(fontsize=7)
    for axis, plane in zip(axes[0][len(pairs) :], matched):
        for method in dict.fromkeys(row["method"] for row in plane["matched"]):
            rows = [row for row in plane["matched"] if row["method"] == method]
            xs = [0.0, *(row["kl"] for row in rows)]
            value, low, high = (
                [plane["unguided"], *(row[key] for row in rows)] for key in ("value", "low", "high")
            )
            axis.plot(xs, value, "o-", ms=3, color=colours[method], label=method)
            axis.fill_between(xs, low, high, color=colours[method], alpha=0.12, lw=0)
        axis.set_xlabel("KL to the base model, at most, nats a response")
        axis.set_ylabel(f"hypervolume: {', '.join(plane['objectives'])}")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _rank(value: float, values: Sequence[float]) -> float:
    return (sorted(values).index(value) + 1) / len(values)


PAGE = """<!doctype html>
<meta charset="utf-8"><title>Pareto front</title>
<style>
body {{ font: 14px system-ui, sans-serif; margin: 2em; max-width: 70em }}
svg {{ border: 1px solid #ccc; display: block; margin: 1em 0 }}
table {{ border-collapse: collapse; font-size: 12px }}
td, th {{ border: 1px solid #ccc; padding: 3px 6px }}
label span {{ padding: 0 .5em 0 .2em }}
</style>
<h1>Gains over the unguided model</h1>
<p>In standard deviations of its reward. Choose axes and methods; a dot tells its figures.</p>
<p>x <select id="x"></select> y <select id="y"></select></p>
<p id="methods"></p>
<svg id="plot" width="760" height="520"></svg>
{table}
<script>
const data = {data};
const axes = [...data.objectives, "KL to the base model"];
const methods = [...new Set(data.points.map(p => p.method))];
const colour = m => `hsl(${{360 * methods.indexOf(m) / methods.length}} 70% 42%)`;
const value = (p, a) => a in p.gain ? p.gain[a].value : p.kl?.value;
const svg = document.getElementById("plot"), ns = svg.namespaceURI;
const add = (name, attributes, text) => {{
  const e = document.createElementNS(ns, name);
  for (const k in attributes) e.setAttribute(k, attributes[k]);
  if (text !== undefined) e.textContent = text;
  return svg.appendChild(e);
}};
const select = {{}};
["x", "y"].forEach((id, i) => {{
  select[id] = document.getElementById(id);
  axes.forEach(a => select[id].add(new Option(a)));
  select[id].value = data.first[i];
  select[id].onchange = draw;
}});
const shown = new Set(methods);
methods.forEach(m => {{
  const label = document.createElement("label"), box = document.createElement("input");
  const name = document.createElement("span");
  box.type = "checkbox"; box.checked = true; name.textContent = m; name.style.color = colour(m);
  box.onchange = () => {{ box.checked ? shown.add(m) : shown.delete(m); draw(); }};
  label.append(box, name);
  document.getElementById("methods").append(label);
}});
function draw() {{
  svg.replaceChildren();
  const known = p => ["x", "y"].every(id => Number.isFinite(value(p, select[id].value)));
  const points = data.points.filter(p => shown.has(p.method) && known(p));
  const scale = (a, low, high) => {{
    const v = points.map(p => value(p, a)), l = Math.min(0, ...v) - .1, h = Math.max(0, ...v) + .1;
    return [z => low + (z - l) / (h - l) * (high - low), l, h];
  }};
  const [x, xl, xh] = scale(select.x.value, 50, 740), [y, yl, yh] = scale(select.y.value, 480, 20);
  for (let i = 0; i <= 6; i++) {{
    const a = xl + i * (xh - xl) / 6, b = yl + i * (yh - yl) / 6;
    add("text", {{x: x(a), y: 500, "font-size": 11, "text-anchor": "middle"}}, a.toFixed(1));
    add("text", {{x: 44, y: y(b), "font-size": 11, "text-anchor": "end"}}, b.toFixed(1));
  }}
  add("line", {{x1: x(0), x2: x(0), y1: 20, y2: 480, stroke: "#ccc"}});
  add("line", {{x1: 50, x2: 740, y1: y(0), y2: y(0), stroke: "#ccc"}});
  add("text", {{x: 395, y: 516, "font-size": 12, "text-anchor": "middle"}}, select.x.value);
  add("text", {{x: 12, y: 250, "font-size": 12, "text-anchor": "middle",
    transform: "rotate(-90 12 250)"}}, select.y.value);
  for (const p of points) {{
    const [cx, cy] = [x(value(p, select.x.value)), y(value(p, select.y.value))];
    const dot = add("circle", {{cx, cy, r: 5, fill: colour(p.method), "fill-opacity": .75}});
    const title = document.createElementNS(ns, "title");
    title.textContent = p.label;
    dot.append(title);
  }}
}}
draw();
</script>
"""


def to_html(result: Mapping[str, Any]) -> str:
    """
    A page with a plot of any two objectives, or KL, and the table of hypervolumes.

    Args:
        result (`dict[str, Any]`):
            Of [`evaluate`].

    Returns:
        `str`: HTML with everything in it.
    """
    points = [
        {
            "method": p["method"],
            "gain": p["gain"],
            "kl": p["kl"],
            "label": f"{p['method']}, {p['strength']:g}: {weights_label(p['weights'])}\n"
            + "\n".join(f"{o} {_interval(p['gain'][o])}" for o in result["objectives"])
            + f"\nKL {_kl(p)} nats, distinct-2 {p['distinct_2']:.2f}, {p['length']:.0f} tokens",
        }
        for p in result["points"]
    ]
    pair = next((p["objectives"] for p in result["planes"] if len(p["objectives"]) == 2), None)
    first = pair or [*result["objectives"], "KL to the base model"][:2]
    data = {"objectives": result["objectives"], "points": points, "first": first}
    rows = [
        [
            ", ".join(plane["objectives"]),
            row["method"],
            f"{row['strength']:g}",
            _interval(row, sign=""),
        ]
        for plane in result["planes"]
        for row in plane["hypervolume"]
    ]
    cells = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    head = "".join(f"<th>{h}</th>" for h in ("objectives", "method", "strength", "hypervolume"))
    # "</" would end the script element, wherever it stands.
    text = json.dumps(data).replace("</", "<\\/")
    return PAGE.format(data=text, table=f"<table><tr>{head}</tr>{cells}</table>")
