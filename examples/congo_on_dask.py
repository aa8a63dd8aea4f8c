"""CONGO over the workers of a Dask cluster: the evaluations of a round run at the same time.

Runs on a cluster in this machine's processes; give the address of a scheduler to run on yours:

    python examples/congo_on_dask.py
    python examples/congo_on_dask.py tcp://scheduler:8786
"""

from __future__ import annotations

import logging
import sys
import time

import nevergrad as ng
import numpy as np
from distributed import Client, LocalCluster

import trimtab.optimizers  # noqa: F401  (adds CONGO to Nevergrad's registry)

TARGET = {17: 2.0, 60: -1.5, 181: 1.0}


def simulate(knobs: np.ndarray) -> float:
    """A slow, noisy cost of 200 knobs, of which three matter."""
    time.sleep(0.02)
    noise = 0.01 * np.random.default_rng().standard_normal()
    return float(sum((knobs[k] - value) ** 2 for k, value in TARGET.items())) + noise


def main() -> None:
    address = sys.argv[1] if len(sys.argv) > 1 else None
    cluster = address or LocalCluster(
        n_workers=2, threads_per_worker=8, dashboard_address=None, silence_logs=logging.ERROR
    )
    with Client(cluster) as client:
        workers = sum(client.nthreads().values())
        optimizer = ng.optimizers.registry["CONGO"](
            parametrization=200, budget=2000, num_workers=workers
        )
        optimizer.parametrization.random_state.seed(0)
        start = time.monotonic()
        recommendation = optimizer.minimize(simulate, executor=client)
        seconds = time.monotonic() - start
    if isinstance(cluster, LocalCluster):
        cluster.close()
    print(
        f"{optimizer.num_tell} evaluations of 20 ms in {seconds:.1f} s on {workers} workers: "
        f"{optimizer.num_rounds} rounds of {optimizer.evaluations_per_round}"
    )
    for knob, value in TARGET.items():
        print(f"knob {knob:3d}: {recommendation.value[knob]:6.2f}, optimum {value:6.2f}")
    rest = np.delete(recommendation.value, list(TARGET))
    print(f"the other 197: at most {np.abs(rest).max():.2f} away from their start")


if __name__ == "__main__":
    main()
