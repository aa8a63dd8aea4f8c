"""Scaling: time and memory of a round against the dimension, of one recovery, and of many rounds.

Ten variables matter; a round has ``ceil(20 ln(d / 10)) + 1`` evaluations. Every optimizer gets as
many, in a process of its own, whose peak memory is read at the end; CPU time of ask and tell. The
long run is a noisy cost of one variable, two evaluations a round.

    python benchmarks/congo_scaling.py            # about 10 minutes on one core, 6 GB
    python benchmarks/congo_scaling.py --quick
"""

from __future__ import annotations

import json
import math
import pickle
import resource
import subprocess
import sys
import time
import typing as tp

import nevergrad as ng
import numpy as np
from _congo_runs import DOCS, arguments, save

from trimtab.optimizers import ParametrizedCONGO, basis_pursuit, cosamp

SPARSITY = 10
DIMENSIONS = (100, 1_000, 10_000, 100_000, 1_000_000)
ROUNDS = (1_000, 10_000, 100_000)
# The largest dimension that each is asked for: CMA's memory grows with the square of it.
OPTIMIZERS = {"CONGO": 10**6, "RandomSearch": 10**6, "SPSA": 10**6, "NGOpt": 10**5, "CMA": 10**4}


def measurements(dimension: int) -> int:
    return math.ceil(2 * SPARSITY * math.log(dimension / SPARSITY))


def one(label: str, dimension: int) -> dict[str, float]:
    """Rounds of one optimizer, in this process."""
    parametrization = ng.p.Array(shape=(dimension,))
    parametrization.random_state.seed(0)
    evaluations = measurements(dimension) + 1
    algorithm = (
        ParametrizedCONGO(variant="adaptive", sparsity=SPARSITY)
        if label == "CONGO"
        else ng.optimizers.registry[label]
    )
    optimizer = algorithm(parametrization, budget=100 * evaluations)
    support = np.random.default_rng(0).choice(dimension, SPARSITY, replace=False)
    rounds = []
    for _ in range(2 if dimension >= 10_000 else 6):
        spent = 0.0
        for _ in range(evaluations):
            start = time.process_time()
            candidate = optimizer.ask()
            spent += time.process_time() - start
            loss = float(np.sum((np.asarray(candidate.value)[support] - 1) ** 2))
            start = time.process_time()
            optimizer.tell(candidate, loss)
            spent += time.process_time() - start
        rounds.append(spent)
    return {
        "evaluations": evaluations,
        "round_s": float(np.median(rounds)),
        "ask_tell_ms": float(np.median(rounds)) / evaluations * 1e3,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def long_run(rounds: tp.Sequence[int]) -> dict[str, dict[str, float]]:
    """Size of the pickled optimizer and peak memory of the process after so many rounds."""
    parametrization = ng.p.Array(shape=(1,))
    parametrization.random_state.seed(0)
    optimizer = ParametrizedCONGO(variant="adaptive")(parametrization)
    rng = np.random.default_rng(0)
    start, found = time.process_time(), {}
    for target in rounds:
        largest = 0
        while optimizer.num_rounds < target:
            candidate = optimizer.ask()
            loss = float(candidate.value[0] ** 2 + 0.1 * rng.standard_normal())
            optimizer.tell(candidate, loss)
            # The archive moves between a third of its 1,000 points and all of them.
            if optimizer.num_tell % 100 == 0 and optimizer.num_rounds > target - 1000:
                largest = max(largest, len(pickle.dumps(optimizer)))
        found[str(target)] = {
            "largest_pickle_of_last_1000_rounds_kb": largest / 1e3,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
            "cpu_s": time.process_time() - start,
        }
    return found


def recoveries(dimension: int, repetitions: int) -> dict[str, tp.Any]:
    m = measurements(dimension)
    rng = np.random.default_rng(0)
    rows: dict[str, list] = {"CoSaMP": [], "basis pursuit": []}
    for _ in range(repetitions):
        a = rng.standard_normal((m, dimension))
        x = np.zeros(dimension)
        x[rng.choice(dimension, SPARSITY, replace=False)] = rng.standard_normal(SPARSITY)
        y = a @ x
        for label, recover in (
            ("CoSaMP", lambda a, y: cosamp(a, y, SPARSITY)),
            ("basis pursuit", basis_pursuit),
        ):
            start = time.process_time()
            found = recover(a, y)
            spent = time.process_time() - start
            error = np.linalg.norm(found.dense(dimension) - x) / np.linalg.norm(x)
            rows[label].append((spent * 1e3, error))
    return {
        label: {
            "m": m,
            "cpu_ms": float(np.median([row[0] for row in pairs])),
            "median_error": float(np.median([row[1] for row in pairs])),
            "failures": int(sum(row[1] > 1e-4 for row in pairs)),
            "n": len(pairs),
        }
        for label, pairs in rows.items()
    }


def plot(results: dict[str, tp.Any]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for label, rows in results.items():
        dimensions = [int(d) for d in rows]
        axes[0].loglog(dimensions, [row["ask_tell_ms"] for row in rows.values()], "o-", label=label)
        axes[1].loglog(dimensions, [row["peak_gb"] for row in rows.values()], "o-", label=label)
    axes[0].set_ylabel("ask + tell, CPU ms, mean of a round")
    axes[1].set_ylabel("peak memory of the process, GB")
    for axis in axes:
        axis.set_xlabel("dimension")
    axes[0].legend(fontsize=8)
    figure.savefig(DOCS / "congo_scaling.png", dpi=120)


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(sys.argv[2], int(sys.argv[3]))))
        return
    if sys.argv[1:2] == ["--long-run"]:
        print(json.dumps(long_run([int(rounds) for rounds in sys.argv[2:]])))
        return
    options = arguments(__doc__.splitlines()[0], seeds=20)
    dimensions = DIMENSIONS[:2] if options.quick else DIMENSIONS
    rounds: dict[str, tp.Any] = {}
    for label, largest in OPTIMIZERS.items():
        rounds[label] = {}
        for dimension in dimensions:
            if dimension > largest:
                continue
            command = [sys.executable, "-W", "ignore", __file__, "--one", label, str(dimension)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rounds[label][str(dimension)] = row = json.loads(done.stdout)
            print(
                f"{label:13s} d={dimension:8d}  round {row['round_s']:8.3f} s  ask + tell "
                f"{row['ask_tell_ms']:8.3f} ms  peak {row['peak_gb']:.2f} GB",
                flush=True,
            )
    lengths = ROUNDS[:1] if options.quick else ROUNDS
    command = [sys.executable, "-W", "ignore", __file__, "--long-run", *map(str, lengths)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    long = json.loads(done.stdout)
    print("long run", long, flush=True)
    found = {}
    for dimension in dimensions[:4]:
        found[str(dimension)] = recoveries(dimension, options.seeds if dimension < 10**5 else 3)
        print(dimension, found[str(dimension)], flush=True)
    if not options.quick:
        save(
            "congo_scaling",
            {"sparsity": SPARSITY, "rounds": rounds, "recovery": found, "long_run": long},
        )
        plot(rounds)


if __name__ == "__main__":
    main()
