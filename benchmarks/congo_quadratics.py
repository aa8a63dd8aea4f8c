"""Sparse drifting quadratics: accumulated cost of CONGO, its paper's variants and Nevergrad.

``f_t(x) = x'D_t x + b_t'x + c_t`` with a new sparse ``D_t, b_t`` in each of 100 rounds; the setting
of the CONGO paper (arXiv 2407.06325) and the same with more noise and with half the
samples. Every algorithm sees the same functions on the same seeds; the cost counted is that of
the point played before a round's update, without noise, and beside it what is paid: the mean of the
points that the round evaluates, without noise too. Nevergrad's optimizers take part in the paper's
three settings.

    python benchmarks/congo_quadratics.py            # about 30 minutes on two cores
    python benchmarks/congo_quadratics.py --quick
"""

from __future__ import annotations

import itertools
import os
import typing as tp
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import nevergrad as ng
import numpy as np
from _congo_runs import DOCS, arguments, save, summary

from trimtab.optimizers import ParametrizedCONGO

ROUNDS, RADIUS, LEARNING_RATE = 100, 100.0, 0.1
# name: (dimension, sparsity, noise, perturbation, m, multiple of m for variant B)
SETTINGS = {
    "d=50, no noise": (50, 5, 0.0, 1e-5, 24, 3),
    "d=50, noise 0.001": (50, 5, 0.001, 0.05, 24, 3),
    "d=100, noise 0.001": (100, 5, 0.001, 0.05, 30, 6),
    "d=50, noise 0.01": (50, 5, 0.01, 0.05, 24, 3),
    "d=50, noise 0.1": (50, 5, 0.1, 0.05, 24, 3),
    "d=50, no noise, m/2": (50, 5, 0.0, 1e-5, 12, 3),
    "d=100, noise 0.001, m/2": (100, 5, 0.001, 0.05, 15, 6),
}
NEVERGRAD = ("SPSA", "OnePlusOne", "CMA", "TBPSA", "DE", "NGOpt")


class Problem:
    """The functions of one seed; ``noisy`` draws its noise from the generator it is given."""

    def __init__(self, seed: int, dimension: int, sparsity: int, noise: float) -> None:
        rng = np.random.default_rng([seed, dimension])
        self.noise = noise
        self.evaluated: list[list[float]] = [[] for _ in range(ROUNDS)]
        self.curvature = np.zeros((ROUNDS, dimension))
        self.slope = np.zeros((ROUNDS, dimension))
        self.offset = np.abs(rng.standard_normal(ROUNDS))
        for t in range(ROUNDS):
            support = rng.choice(dimension, sparsity, replace=False)
            self.curvature[t, support] = np.abs(rng.standard_normal(sparsity))
            self.slope[t, support] = rng.normal(-1.0, 2.0, sparsity)

    def cost(self, t: int, x: np.ndarray) -> float:
        return float(x @ (self.curvature[t] * x) + self.slope[t] @ x + self.offset[t])

    def noisy(self, t: int, x: np.ndarray, rng: np.random.Generator) -> float:
        self.evaluated[t].append(self.cost(t, x))
        return self.evaluated[t][-1] + self.noise * rng.standard_normal()

    def paid(self) -> float:
        return float(sum(np.mean(costs) for costs in self.evaluated if costs))

    def gradient(self, t: int, x: np.ndarray) -> np.ndarray:
        return 2 * self.curvature[t] * x + self.slope[t]


def descend(problem: Problem, dimension: int, estimate: tp.Callable) -> float:
    x, total = np.zeros(dimension), 0.0
    for t in range(ROUNDS):
        total += problem.cost(t, x)
        x = x - LEARNING_RATE * estimate(t, x)
        x *= min(1.0, RADIUS / max(float(np.linalg.norm(x)), 1e-300))
    return total


def random_directions(problem: Problem, m: int, delta: float, seed: int) -> tp.Callable:
    rng = np.random.default_rng([seed, 1])

    def estimate(t: int, x: np.ndarray) -> np.ndarray:
        # Unit directions: the average of d (f(x + delta u) - f(x)) / delta * u is unbiased to
        # first order in delta.
        start = problem.noisy(t, x, rng)
        total = np.zeros_like(x)
        for _ in range(m):
            u = rng.standard_normal(x.size)
            u /= np.linalg.norm(u)
            total += x.size * (problem.noisy(t, x + delta * u, rng) - start) / delta * u
        return total / m

    return estimate


def play(
    problem: Problem,
    algorithm: tp.Any,
    dimension: int,
    samples: int,
    seed: int,
    sigma: float = 1.0,
) -> float:
    """Accumulated cost of an optimizer of Nevergrad with ``samples`` evaluations a round."""
    parametrization = ng.p.Array(shape=(dimension,)).set_mutation(sigma=sigma)
    parametrization.random_state.seed(seed)
    optimizer = algorithm(parametrization, budget=ROUNDS * samples)
    rng = np.random.default_rng([seed, 1])
    total = 0.0
    for t in range(ROUNDS):
        x = np.asarray(optimizer.recommend().value)
        x = x * min(1.0, RADIUS / max(float(np.linalg.norm(x)), 1e-300))
        total += problem.cost(t, x)
        for _ in range(samples):
            candidate = optimizer.ask()
            optimizer.tell(candidate, problem.noisy(t, np.asarray(candidate.value), rng))
    return total


def measure(name: str, seeds: int) -> dict[str, tp.Any]:
    dimension, sparsity, noise, delta, m, multiple = SETTINGS[name]
    common = {"learning_rate": LEARNING_RATE, "radius": RADIUS, "num_measurements": m}
    told = {**common, "sparsity": sparsity, "delta": delta}
    perturbations = multiple * m
    runs: dict[str, tuple[int, tp.Callable]] = {
        "do nothing": (0, lambda p, s: float(p.offset.sum())),
        "exact gradient descent": (0, lambda p, s: descend(p, dimension, p.gradient)),
        "averaged random directions": (
            m + 1,
            lambda p, s: descend(p, dimension, random_directions(p, m, delta, s)),
        ),
    }
    optimizers = {
        "CONGO": (m + 1, ParametrizedCONGO(variant="adaptive", **common)),
        "CONGO, no learning rate": (
            m + 1,
            ParametrizedCONGO(radius=RADIUS, num_measurements=m),
        ),
        "CONGO_E": (m + 1, ParametrizedCONGO(variant="E", **told)),
        "CONGO_Z": (m + 1, ParametrizedCONGO(variant="Z", **told)),
        "CONGO_B": (
            perturbations + 1,
            ParametrizedCONGO(variant="B", num_perturbations=perturbations, **told),
        ),
    }
    sigmas = dict.fromkeys(optimizers, 1.0)
    if name in list(SETTINGS)[:3]:
        for other in NEVERGRAD:
            # With Nevergrad's standard mutation, 1, CMA and DE cost several times more.
            optimizers[other], sigmas[other] = (m + 1, ng.optimizers.registry[other]), 0.1
    for label, (samples, algorithm) in optimizers.items():
        runs[label] = (
            samples,
            lambda p, s, a=algorithm, n=samples, sigma=sigmas[label]: play(
                p, a, dimension, n, s, sigma
            ),
        )
    rows: dict[str, tp.Any] = {}
    descent: list[float] = []
    for label, (samples, run) in runs.items():
        problems = [Problem(seed, dimension, sparsity, noise) for seed in range(seeds)]
        costs = [run(problem, seed) for seed, problem in enumerate(problems)]
        rows[label] = {"samples_a_round": samples, **summary(costs)}
        if samples:
            rows[label]["paid"] = summary([problem.paid() for problem in problems])
        if label == "exact gradient descent":
            descent = costs
        if descent:
            above = [cost - least for cost, least in zip(costs, descent)]
            rows[label]["above_gradient_descent"] = summary(above)
        print(f"{name:26s} {label:28s} {rows[label]['mean']:12.1f} "
              f"+- {rows[label]['standard_error']:.1f}, paid "
              f"{rows[label].get('paid', rows[label])['mean']:.1f} ({seeds} seeds)",
              flush=True)  # fmt: skip
    return {
        "dimension": dimension,
        "sparsity": sparsity,
        "noise": noise,
        "perturbation_of_the_papers_variants": delta,
        "num_measurements": m,
        "algorithms": rows,
    }


def plot(results: dict[str, tp.Any]) -> None:
    import matplotlib.pyplot as plt

    shown = ("CONGO", "CONGO_E", "CONGO_Z", "CONGO_B", "averaged random directions")
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    for k, label in enumerate(shown):
        rows = [
            result["algorithms"][label]["above_gradient_descent"] for result in results.values()
        ]
        axes.bar(
            np.arange(len(rows)) + 0.16 * (k - 2),
            [max(row["mean"], 0.1) for row in rows],
            0.15,
            yerr=[row["standard_error"] for row in rows],
            label=label,
        )
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.1)
    axes.set_xticks(range(len(results)), [name.replace(", ", "\n") for name in results], fontsize=8)
    axes.set_ylabel("cost above exact gradient descent\n(0.1: no more)")
    axes.legend(fontsize=8)
    figure.savefig(DOCS / "congo_quadratics.png", dpi=120)


def main() -> None:
    options = arguments(__doc__.splitlines()[0], seeds=50)
    if options.quick:
        global ROUNDS
        ROUNDS = 5
    names = list(SETTINGS)[:2] if options.quick else list(SETTINGS)
    with ProcessPoolExecutor(os.cpu_count(), get_context("fork")) as pool:
        results = dict(zip(names, pool.map(measure, names, itertools.repeat(options.seeds))))
    if not options.quick:
        save("congo_quadratics", {"rounds": ROUNDS, "settings": results})
        plot(results)


if __name__ == "__main__":
    main()
