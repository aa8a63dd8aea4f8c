"""Other people's problems and hostile services: CONGO as registered against peers.

Nevergrad's ``ArtificialFunction`` families with 5 useful variables of 200, one quadratic at costs
from 1e-9 to 1e9, and services that are noisy, drift, change, fail or have knobs in levels. Every
method gets the same evaluations on the same seeds. Two distances above the optimum are reported,
as shares of the start's: the recommended point's, and that of the measurements paid for in the last
quarter of the run, both without noise.

    python benchmarks/congo_problems.py              # about 10 minutes on one core
    python benchmarks/congo_problems.py --seeds 10
    python benchmarks/congo_problems.py --quick
"""

from __future__ import annotations

import dataclasses
import math
import time
import typing as tp

import nevergrad as ng
import numpy as np
from _congo_runs import DOCS, arguments, save
from nevergrad.functions import ArtificialFunction

from trimtab.optimizers import recovery

PEERS = ("OnePlusOne", "CMA", "TBPSA", "SPSA")
FAMILIES = {
    "sphere": ("sphere", False),
    "ellipsoid, rotated": ("ellipsoid", True),
    "cigar, rotated": ("cigar", True),
    "altcigar, rotated": ("altcigar", True),
    "rosenbrock": ("rosenbrock", False),
    "rosenbrock, rotated": ("rosenbrock", True),
    "multipeak": ("multipeak", False),
    "rastrigin": ("rastrigin", False),
    "griewank": ("griewank", False),
    "hm": ("hm", False),
    "deceptive, ill-conditioned": ("deceptiveillcond", True),
    "deceptive, multimodal": ("deceptivemultimodal", False),
}
SCALES = (1e-9, 1e-6, 1e-2, 1.0, 1e2, 1e6, 1e9)


@dataclasses.dataclass
class Problem:
    """A cost to minimise.

    Attributes:
        knobs: makes the parametrization.
        cost: the cost of a value at an evaluation's number, without noise.
        observe: what is measured: of the cost, the number, the value and a generator; NaN fails.
        optimum: the least cost, at the end of the run.
        budget: evaluations.
        workers: evaluations out at once.
    """

    knobs: tp.Callable[[], ng.p.Parameter]
    cost: tp.Callable[[tp.Any, int], float]
    observe: tp.Callable[[float, int, tp.Any, np.random.Generator], float]
    optimum: float
    budget: int = 3000
    workers: int = 8


def exact(cost: float, number: int, value: tp.Any, rng: np.random.Generator) -> float:
    return cost


def noise(size: float) -> tp.Callable:
    return lambda cost, number, value, rng: cost + size * rng.standard_normal()


def array(d: int) -> tp.Callable[[], ng.p.Parameter]:
    return lambda: ng.p.Array(shape=(d,))


def family(name: str, seed: int) -> Problem:
    core, rotation = FAMILIES[name]
    np.random.seed(seed)  # noqa: NPY002  (Nevergrad draws its functions' seeds from it)
    function = ArtificialFunction(core, 5, useless_variables=195, rotation=rotation)
    function.parametrization.random_state.seed(seed)
    return Problem(array(200), lambda x, _: float(function(x)), exact, 0.0, 2000, 1)


def scaled(scale: float, seed: int) -> Problem:
    i, j = np.random.default_rng(seed).choice(100, 2, replace=False)
    return Problem(
        array(100), lambda x, _: scale * float((x[i] - 1) ** 2 + (x[j] + 2) ** 2), exact, 0.0, 2000
    )


def services(seed: int) -> dict[str, Problem]:
    rng = np.random.default_rng([seed, 7])
    few = rng.choice(200, 5, replace=False)
    other = rng.choice(200, 5, replace=False)
    best = rng.choice([-1.0, 1.0], 5)
    pairs = rng.choice(200, (4, 2), replace=False)

    def quadratic(x: np.ndarray, _: int = 0) -> float:
        return 100 + 4 * float(np.sum((x[few] - best) ** 2))

    def blocks(x: np.ndarray, _: int) -> float:
        a, b = x[pairs[:, 0]], x[pairs[:, 1]]
        return 50 + float(np.sum(4 * (a + b - 1) ** 2 + (a - b - 1) ** 2))

    def drifting(x: np.ndarray, number: int) -> float:
        angle = 2 * math.pi * number / 3000
        level = 100 + 5 * math.sin(3 * angle)
        return level + 4 * float(np.sum((x[few] - best * math.cos(0.5 * angle)) ** 2))

    def changing(x: np.ndarray, number: int) -> float:
        return 100 + 4 * float(np.sum((x[few if number < 1500 else other] - best) ** 2))

    def outliers(cost: float, number: int, value: tp.Any, rng: np.random.Generator) -> float:
        return cost * (100 if rng.random() < 0.05 else 1) + rng.standard_normal()

    def heavy(cost: float, number: int, value: tp.Any, rng: np.random.Generator) -> float:
        return cost + rng.standard_t(1.5)

    def outage(cost: float, number: int, value: tp.Any, rng: np.random.Generator) -> float:
        return math.nan if 900 < number < 2000 else cost + rng.standard_normal()

    def penalised(x: np.ndarray, _: int) -> float:
        return 1e5 if x[other[0]] > 0.05 else quadratic(x)

    def latency(x: np.ndarray, _: int) -> float:
        return 50 + 100 * float((x[few[0]] - 0.8) ** 2 + (x[few[1]] - 0.2) ** 2)

    def units() -> ng.p.Parameter:
        knobs = {f"k{i:02d}": ng.p.Scalar(lower=0, upper=100) for i in range(20)}
        return ng.p.Dict(**knobs, free=ng.p.Scalar(init=1000.0))

    def in_units(v: dict[str, float], _: int) -> float:
        return (
            10
            + ((v["k03"] - 80) / 10) ** 2
            + ((v["k11"] - 20) / 10) ** 2
            + ((v["free"] - 900) / 50) ** 2
        )

    def database() -> ng.p.Parameter:
        knobs: dict[str, tp.Any] = {}
        for i in range(12):
            knobs[f"flag{i:02d}"] = ng.p.Choice([False, True])
            knobs[f"level{i:02d}"] = ng.p.Scalar(init=2, lower=1, upper=4).set_integer_casting()
            knobs[f"size{i:02d}"] = ng.p.Log(init=16, lower=1, upper=4096)
            knobs[f"count{i:02d}"] = ng.p.Scalar(init=8, lower=0, upper=64).set_integer_casting()
        return ng.p.Dict(**knobs)

    def slow(v: dict[str, tp.Any], _: int) -> float:
        log = math.log2(v["size05"])
        return (
            20 + 60 * (not v["flag03"]) + 20 * abs(v["level07"] - 4)
            + 5 * (log - 9) ** 2 + 0.05 * (v["count02"] - 40) ** 2
        )  # fmt: skip

    near = quadratic(np.zeros(200)) - 100
    return {
        "noisy200": Problem(array(200), quadratic, noise(4.0), 100.0),
        "blocks200": Problem(array(200), blocks, noise(2.0), 50.0),
        "lognormal": Problem(
            array(200),
            quadratic,
            lambda c, n, v, r: c * math.exp(0.05 * r.standard_normal()),
            100.0,
        ),
        "quantised": Problem(
            array(200), quadratic, lambda c, n, v, r: round(c + r.standard_normal()), 100.0
        ),
        "drift": Problem(array(200), drifting, noise(1.0), 100.0),
        "regime change": Problem(array(200), changing, noise(1.0), 100.0),
        "outliers": Problem(array(200), quadratic, outliers, 100.0),
        "heavy tails": Problem(array(200), quadratic, heavy, 100.0),
        "outage": Problem(array(200), quadratic, outage, 100.0),
        "failing region": Problem(array(200), penalised, noise(0.1 * near / 20), 100.0),
        "bounded latency": Problem(
            lambda: ng.p.Array(shape=(200,)).set_bounds(0, 1), latency, noise(0.5), 50.0
        ),
        "users' units": Problem(units, in_units, noise(0.2), 10.0, 600),
        "database settings": Problem(database, slow, noise(1.0), 20.0, 300),
    }


# -- peers that Nevergrad does not have --------------------------------------------------------


class Generated:
    """A method written as a generator of points that is sent their costs, one at a time."""

    def __init__(self, method: tp.Callable, parametrization: ng.p.Parameter, seed: int) -> None:
        self.parametrization = parametrization
        self.best = np.zeros(parametrization.dimension)
        self._method = method(self, parametrization.dimension, np.random.default_rng(seed))
        self._next = next(self._method)

    def ask(self) -> ng.p.Parameter:
        return self.parametrization.spawn_child().set_standardized_data(self._next)

    def tell(self, candidate: ng.p.Parameter, loss: float) -> None:
        self._next = self._method.send(loss if loss == loss else 1e12)

    def recommend(self) -> ng.p.Parameter:
        return self.parametrization.spawn_child().set_standardized_data(self.best)


def coordinates(state: Generated, d: int, rng: np.random.Generator) -> tp.Iterator[np.ndarray]:
    """One coordinate at a time by 0.1, then a step of length 1 against the gradient."""
    x = np.zeros(d)
    while True:
        start = yield x
        gradient = np.zeros(d)
        for i in range(d):
            gradient[i] = (yield x + 0.1 * (np.arange(d) == i)) - start
        x = x - gradient / max(float(np.linalg.norm(gradient)), 1e-300)
        state.best = x


def zoro_fa(state: Generated, d: int, rng: np.random.Generator) -> tp.Iterator[np.ndarray]:
    """ZORO-FA (arXiv 2501.11616): sparse gradients of doubling sparsity, then finite differences.

    A step is taken if the decrease is what its length and the gradient promise; else sparsity and
    inverse step length double, until there are as many measurements as dimensions. The first step
    has length 1.
    """
    x, inverse, accuracy = np.zeros(d), 0.0, 1e-4
    cost = yield x
    while True:
        sparsity, shrunk, full = 2, inverse, False
        for _ in range(60):
            if not full:
                m = math.ceil(2 * sparsity * math.log(d / sparsity)) if sparsity < d else d
                full = m >= d
                rows = np.eye(d) if full else rng.choice([-1.0, 1.0], (m, d))
                h = accuracy if full else accuracy / math.sqrt(d)
                y = np.zeros(len(rows))
                for j in range(len(rows)):
                    y[j] = ((yield x + h * rows[j]) - cost) / h
                gradient = y if full else recovery.cosamp(rows, y, sparsity).dense(d)
            size = float(np.linalg.norm(gradient))
            shrunk = shrunk or size or 1.0
            moved = x - gradient / shrunk
            after = yield moved
            if cost - after >= 0.1 * size**2 / shrunk:
                x, cost, inverse = moved, after, shrunk / 2
                state.best = x
                break
            sparsity, shrunk = min(2 * sparsity, d), 2 * shrunk
        else:
            cost, inverse = (yield x), 0.0


OWN = {"one coordinate": coordinates, "ZORO-FA": zoro_fa}


# -- runs ------------------------------------------------------------------------------------


def play(problem: Problem, method: str, seed: int) -> dict[str, float]:
    """Shares of the start's distance above the optimum, recommended and paid."""
    parametrization = problem.knobs()
    parametrization.random_state.seed(seed)
    start_value = parametrization.spawn_child().value
    optimizer: tp.Any
    workers = problem.workers
    if method in OWN:
        optimizer, workers = Generated(OWN[method], parametrization, seed), 1
    else:
        algorithm = ng.optimizers.registry[method]
        workers = 1 if algorithm.no_parallelization else workers
        optimizer = algorithm(parametrization, problem.budget, workers)
        start_value = optimizer.parametrization.value
    rng = np.random.default_rng([seed, 3])
    number, paid = 0, []
    start = problem.cost(start_value, problem.budget) - problem.optimum
    began = time.process_time()
    while number < problem.budget:
        out = [optimizer.ask() for _ in range(workers)]
        for candidate in out:
            cost = problem.cost(candidate.value, number)
            if number >= 0.75 * problem.budget:
                paid.append(cost)
            optimizer.tell(candidate, problem.observe(cost, number, candidate.value, rng))
            number += 1
    final = problem.cost(optimizer.recommend().value, problem.budget)
    return {
        "recommended": (final - problem.optimum) / start,
        "paid": (float(np.mean(paid)) - problem.optimum) / start,
        "seconds": time.process_time() - began,
    }


def quantiles(runs: list[dict[str, float]]) -> dict[str, tp.Any]:
    return {
        key: {"median": float(np.median(values)), "worst": float(np.max(values)), "all": values}
        for key in runs[0]
        for values in [[run[key] for run in runs]]
    }


def number(value: float) -> str:
    return f"{value:.2g}" if abs(value) < 1000 else f"{value:.0e}"


def table(rows: dict[str, dict[str, tp.Any]], key: str, methods: tp.Sequence[str]) -> list[str]:
    """Markdown, the rows in which CONGO is furthest behind the best peer first."""

    def behind(name: str) -> float:
        row = rows[name]
        peers = [row[m][key]["median"] for m in methods if m != "CONGO" and m in row]
        return math.log10(max(row["CONGO"][key]["median"], 1e-12)) - math.log10(
            max(min(peers, default=1.0), 1e-12)
        )

    lines = [f"| {key} | " + " | ".join(methods) + " |", "| --- " * (len(methods) + 1) + "|"]
    for name in sorted(rows, key=behind, reverse=True):
        cells = [
            f"{number(rows[name][m][key]['median'])} ({number(rows[name][m][key]['worst'])})"
            if m in rows[name]
            else ""
            for m in methods
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def plot(rows: dict[str, dict[str, tp.Any]], methods: tp.Sequence[str]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained", sharey=True)
    names = list(rows)
    for panel, key in zip(axes, ("recommended", "paid")):
        for k, method in enumerate(methods):
            values = [max(rows[name][method][key]["median"], 1e-6) for name in names]
            panel.plot(values, np.arange(len(names)), "o", label=method, zorder=10 - k)
        panel.set_xscale("log")
        panel.set_xlim(1e-4, 1e2)
        panel.axvline(1.0, color="grey", lw=0.8)
        panel.set_yticks(range(len(names)), names)
        panel.set_xlabel(f"{key}: distance above the optimum, share of the start's")
    axes[1].legend(fontsize=8)
    figure.savefig(DOCS / "congo_problems.png", dpi=120)


def main() -> None:
    options = arguments(__doc__.splitlines()[0], seeds=2)
    methods = ["CONGO", *PEERS, *OWN]
    groups: dict[str, dict[str, tp.Callable[[int], Problem]]] = {
        "families": {name: lambda s, n=name: family(n, s) for name in FAMILIES},
        "services": {name: lambda s, n=name: services(s)[n] for name in services(0)},
        "scales": {f"{scale:g}": lambda s, c=scale: scaled(c, s) for scale in SCALES},
    }
    if options.quick:
        groups = {name: dict(list(group.items())[:2]) for name, group in groups.items()}
    results: dict[str, tp.Any] = {}
    lines: list[str] = []
    for group, problems in groups.items():
        chosen = ["CONGO", "OnePlusOne"] if group == "scales" or options.quick else methods
        rows: dict[str, tp.Any] = {}
        for name, make in problems.items():
            rows[name] = {}
            for method in chosen:
                runs = []
                for seed in range(options.seeds):
                    problem = make(seed)
                    if options.quick:
                        problem.budget = 150
                    runs.append(play(problem, method, seed))
                rows[name][method] = quantiles(runs)
            print(f"{name:28s}", *(
                f"{m} {number(r['recommended']['median'])}/{number(r['paid']['median'])}"
                for m, r in rows[name].items()), sep="  ", flush=True)  # fmt: skip
        results[group] = rows
        for key in ("recommended", "paid") if group == "services" else ("recommended",):
            lines += ["", f"**{group}**, median (worst) of {options.seeds} seeds", ""]
            lines += table(rows, key, chosen)
    print("\n".join(lines))
    if not options.quick:
        save("congo_problems", results)
        (DOCS / "congo_problems.md").write_text(
            "\n".join(["# CONGO on other problems", *lines, ""])
        )
        plot(results["services"], methods)


if __name__ == "__main__":
    main()
