"""Other people's problems and hostile services: CONGO as registered against peers.

Nevergrad's ``ArtificialFunction`` families with 5 useful variables of 200, one quadratic at costs
from 1e-9 to 1e9, experiments of `nevergrad.benchmark` that download nothing, services that are
noisy, drift, change or fail, and knobs of several kinds with few evaluations. Every method gets
the same evaluations on the same seeds. Two distances above the optimum are reported, as shares of
the start's: the recommended point's, and that of the measurements paid for in the last quarter of
the run, both without noise.

Optuna's TPE and CMA-ES and TuRBO are too slow for thousands of evaluations of 200 knobs: they play
where evaluations are few, in place of CMA, one coordinate at a time and ZORO-FA. Runs are kept one
by one in ``results/congo_problems.json``: an interrupted command goes on, and only what other
settings or other code have made is made again.

    python benchmarks/congo_problems.py              # 20 minutes on one core
    python benchmarks/congo_problems.py --quick
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import itertools
import json
import math
import typing as tp
from pathlib import Path

import _peers
import nevergrad as ng
import numpy as np
from _congo_runs import DOCS, RESULTS, arguments, save
from nevergrad.functions import ArtificialFunction
from nevergrad.functions.corefuncs import DiscreteFunction
from nevergrad.functions.mlda import Perceptron

from trimtab.optimizers import recovery

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
DISCRETE = ("onemax", "leadingones", "jump")
BUDGET = 2000
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
    budget: int = BUDGET
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
    return Problem(array(200), lambda x, _: float(function(x)), exact, 0.0, 1000, 1)


def experiment(name: str, seed: int) -> Problem:
    """Of nevergrad.benchmark: sequential_instrum_discrete, 50 variables of 3 values, and mlda."""
    kind, core = name.split(": ")
    if kind == "perceptron":
        np.random.seed(seed)  # noqa: NPY002
        perceptron = Perceptron.from_mlda(core)
        knobs = perceptron.parametrization.copy
        return Problem(knobs, lambda x, _: float(perceptron(x)), exact, 0.0, 800, 1)
    function = DiscreteFunction(core, 3)
    values = functools.partial(
        ng.p.TransitionChoice if kind == "ordered" else ng.p.Choice, range(3)
    )
    least = -(50 // 4) if core == "jump" else 0.0
    return Problem(lambda: values(repetitions=50), lambda v, _: function(v), exact, least, 500, 1)


def scaled(scale: float, seed: int) -> Problem:
    i, j = np.random.default_rng(seed).choice(100, 2, replace=False)
    return Problem(
        array(100), lambda x, _: scale * float((x[i] - 1) ** 2 + (x[j] + 2) ** 2), exact, 0.0, 1000
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
        angle = 2 * math.pi * number / BUDGET
        level = 100 + 5 * math.sin(3 * angle)
        return level + 4 * float(np.sum((x[few] - best * math.cos(0.5 * angle)) ** 2))

    def changing(x: np.ndarray, number: int) -> float:
        return 100 + 4 * float(np.sum((x[few if number < BUDGET // 2 else other] - best) ** 2))

    def outliers(cost: float, number: int, value: tp.Any, rng: np.random.Generator) -> float:
        return cost * (100 if rng.random() < 0.05 else 1) + rng.standard_normal()

    def heavy(cost: float, number: int, value: tp.Any, rng: np.random.Generator) -> float:
        return cost + rng.standard_t(1.5)

    def outage(cost: float, number: int, value: tp.Any, rng: np.random.Generator) -> float:
        return math.nan if 0.3 < number / BUDGET < 0.65 else cost + rng.standard_normal()

    def flaky(cost: float, number: int, value: tp.Any, rng: np.random.Generator) -> float:
        return math.nan if rng.random() < 0.1 else cost + rng.standard_normal()

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
        "random failures": Problem(array(200), quadratic, flaky, 100.0),
        "failing region": Problem(array(200), penalised, noise(0.1 * near / 20), 100.0),
        "bounded latency": Problem(
            lambda: ng.p.Array(shape=(200,)).set_bounds(0, 1), latency, noise(0.5), 50.0
        ),
        "users' units": Problem(units, in_units, noise(0.2), 10.0, 200),
        "database settings": Problem(database, slow, noise(1.0), 20.0, 150),
    }


EXPERIMENTS = [
    *(f"{kind}: {core}" for kind in ("choices", "ordered") for core in DISCRETE),
    *(f"perceptron: {core}" for core in ("quadratic", "sine", "abs", "heaviside")),
]
FEW = ("users' units", "database settings")
GROUPS: dict[str, dict[str, tp.Callable[[int], Problem]]] = {
    "few evaluations": {n: lambda s, n=n: services(s)[n] for n in FEW},
    "services": {n: lambda s, n=n: services(s)[n] for n in services(0) if n not in FEW},
    "experiments": {name: lambda s, n=name: experiment(n, s) for name in EXPERIMENTS},
    "scales": {f"{scale:g}": lambda s, c=scale: scaled(c, s) for scale in SCALES},
    "families": {name: lambda s, n=name: family(n, s) for name in FAMILIES},
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
OTHERS = {"Optuna CMA-ES": _peers.OptunaCMA, "Optuna TPE": _peers.TPE, "TuRBO": _peers.TuRBO}
METHODS = {
    "few evaluations": ("CONGO", "OnePlusOne", *OTHERS),
    "services": ("CONGO", "OnePlusOne", "CMA", *OWN),
    "experiments": ("CONGO", "OnePlusOne", "DiscreteOnePlusOne", "CMA"),
    "scales": ("CONGO", "OnePlusOne"),
    "families": ("CONGO", "OnePlusOne", "CMA", *OWN),
}


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
    elif method in OTHERS:
        optimizer = OTHERS[method](parametrization, workers, seed)
        start_value = parametrization.value  # of choices a child draws its own
    else:
        algorithm = ng.optimizers.registry[method]
        workers = 1 if algorithm.no_parallelization else workers
        optimizer = algorithm(parametrization, problem.budget, workers)
        start_value = optimizer.parametrization.value
    rng = np.random.default_rng([seed, 3])
    number, paid = 0, []
    start = problem.cost(start_value, problem.budget) - problem.optimum
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
    }


def made_by(problem: Problem, method: str) -> str:
    """A digest of all that a run rests on but its seed."""
    parametrization = problem.knobs()
    parametrization.random_state.seed(0)
    rng = np.random.default_rng(0)
    parts: list[tp.Any] = [problem.budget, problem.workers, problem.optimum]
    for n, value in itertools.product(
        (0, problem.budget // 2), (parametrization.value, parametrization.sample().value)
    ):
        parts.append(f"{problem.observe(problem.cost(value, n), n, value, rng):.9g}")
    packages = ["nevergrad", "numpy"]
    files = [Path(_peers.__file__)] if method in OTHERS else []
    if method in OTHERS:
        packages += ["optuna", "cmaes", "botorch", "gpytorch"]
    elif method == "CONGO":
        files = sorted(Path(recovery.__file__).parent.glob("*.py"))
    parts += [f"{name} {importlib.metadata.version(name)}" for name in packages]
    parts += [path.read_text() for path in files]
    parts += [inspect.getsource(f) for f in (play, Generated, OWN.get(method, play))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def played(seeds: int) -> dict[str, tp.Any]:
    """All runs, by group, problem and method; what the kept file has of them is not run again."""
    path = RESULTS / "congo_problems.json"
    kept = json.loads(path.read_text()).get("runs", {}) if path.exists() else {}
    total = sum(len(GROUPS[g]) * len(METHODS[g]) * seeds for g in GROUPS)
    done, wanted = 0, {}
    for group, problems in GROUPS.items():
        wanted[group] = {name: dict.fromkeys(METHODS[group]) for name in problems}
        for name, make in problems.items():
            of_problem = kept.setdefault(group, {}).setdefault(name, {})
            for method in METHODS[group]:
                digest = made_by(make(0), method)
                runs = of_problem.get(method, {})
                if runs.get("made_by") != digest:
                    runs = {"made_by": digest, "recommended": [], "paid": []}
                of_problem[method] = wanted[group][name][method] = runs
                for seed in range(len(runs["paid"]), seeds):
                    for key, value in play(make(seed), method, seed).items():
                        runs[key].append(float(f"{min(value, 1e300):.4g}"))
                    save("congo_problems", {"complete": False, "runs": kept})
                for key in ("recommended", "paid"):
                    runs[key] = runs[key][:seeds]
                done += seeds
                shown = (number(float(np.median(runs[key]))) for key in ("recommended", "paid"))
                print(f"{done:5d} of {total}  {name}, {method}:", *shown, flush=True)
    save("congo_problems", {"complete": True, "seeds": seeds, "runs": wanted})
    return wanted


TEXT = """\
Written by `python benchmarks/congo_problems.py`: distance above the optimum as a share of the
start's, without the noise that the methods saw, at the point recommended and as paid by the
measurements of the last quarter. 0 is the optimum, 1 no progress. The rows in which `CONGO` is
furthest behind the best peer come first.

![Recommended and paid cost](congo_problems.png)"""


def number(value: float) -> str:
    return f"{value:.2g}" if abs(value) < 1000 else f"{value:.0e}"


def table(rows: dict[str, dict[str, tp.Any]], key: str, methods: tp.Sequence[str]) -> list[str]:
    """Markdown, the rows in which CONGO is furthest behind the best peer first."""
    medians = {
        n: {m: float(np.median(runs[key])) for m, runs in r.items()} for n, r in rows.items()
    }

    def behind(name: str) -> float:
        best = min(median for m, median in medians[name].items() if m != "CONGO")
        return math.log10(max(medians[name]["CONGO"], 1e-12)) - math.log10(max(best, 1e-12))

    lines = [f"| {key} | " + " | ".join(methods) + " |", "| --- " * (len(methods) + 1) + "|"]
    for name in sorted(rows, key=behind, reverse=True):
        cells = [f"{number(medians[name][m])} ({number(max(rows[name][m][key]))})" for m in methods]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def plot(rows: dict[str, dict[str, tp.Any]]) -> None:
    """Medians; those beyond 0.0001 and 1000 are drawn there."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 8), layout="constrained", sharey=True)
    names = list(rows)[::-1]
    methods = dict.fromkeys(method for name in rows for method in rows[name])
    for panel, key in zip(axes, ("recommended", "paid")):
        for k, method in enumerate(methods):
            places = [i for i, name in enumerate(names) if method in rows[name]]
            panel.plot(
                np.clip([np.median(rows[names[i]][method][key]) for i in places], 1e-4, 1e3),
                np.array(places) + 0.3 - 0.6 * k / (len(methods) - 1),
                "*os^vDPXp"[k],
                markersize=11 if method == "CONGO" else 7,
                label=method,
            )
        panel.set_xscale("log")
        panel.set_xlim(5e-5, 2e3)
        panel.set_xticks([1e-4, 1e-3, 1e-2, 0.1, 1, 10, 100, 1e3])
        panel.axvline(1.0, color="grey", lw=0.8)
        for i in range(1, len(names)):
            panel.axhline(i - 0.5, color="lightgrey", lw=0.5)
        panel.set_yticks(range(len(names)), names, fontsize=13)
        panel.tick_params(axis="x", labelsize=13)
        panel.set_title(f"{key} cost, median", fontsize=14)
        panel.set_xlabel("distance above the optimum / the start's", fontsize=13)
    lines = axes[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=4, fontsize=13)
    figure.savefig(DOCS / "congo_problems.png", dpi=110)


def main() -> None:
    options = arguments(__doc__.splitlines()[0], seeds=10)
    if options.quick:
        for group, problems in GROUPS.items():
            name, make = next(iter(problems.items()))
            for method in METHODS[group]:
                problem = make(0)
                problem.budget = 60
                print(name, method, play(problem, method, 0), made_by(problem, method))
        return
    results = played(options.seeds)
    lines = ["# CONGO on other problems", "", TEXT]
    for group, rows in results.items():
        for key in ("recommended", "paid"):
            lines += ["", f"**{group}**, median (worst) of {options.seeds} seeds", ""]
            lines += table(rows, key, METHODS[group])
    print("\n".join(lines))
    (DOCS / "congo_problems.md").write_text("\n".join([*lines, ""]))
    plot({**results["services"], **results["few evaluations"]})


if __name__ == "__main__":
    main()
