"""Forty-odd settings of a real PostgreSQL, of which few matter, under pgbench on loopback.

CONGO against OnePlusOne and one setting at a time on the same evaluations, from a bad start (index
scans off, a delay before each commit) and from PostgreSQL's defaults. The cost is pgbench's mean
latency (TPC-B-like, 4 clients) in one window. Only settings that a reload applies: no restart.
Needs Debian's `postgresql`; the server is one of its own, in a temporary folder. Runs are kept one
by one: an interrupted command, or one of more seeds, goes on where the same code and options ended.

    python benchmarks/tune_postgres.py                   # 150 evaluations of 2 s, 3 seeds: 2 hours
    python benchmarks/tune_postgres.py --seeds 1 --evaluations 80 --window 1
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import typing as tp
import warnings
from pathlib import Path

import nevergrad as ng
import numpy as np
from _congo_runs import DOCS, RESULTS, save

from trimtab.optimizers import ParametrizedCONGO, noises
from trimtab.optimizers.tune import knobs as spaces
from trimtab.optimizers.tune.config import Knob, Value

BINARIES = "/usr/lib/postgresql"
CLIENTS = 4
# Name: type, low, high, scale, PostgreSQL's default, the bad start (where it differs).
NUMBERS: dict[str, tuple[str, float, float, str, float, float | None]] = {
    "work_mem": ("int", 64, 262144, "log", 4096, None),
    "maintenance_work_mem": ("int", 1024, 262144, "log", 65536, None),
    "temp_buffers": ("int", 100, 65536, "log", 1024, None),
    "effective_cache_size": ("int", 128, 2097152, "log", 524288, None),
    "commit_delay": ("int", 0, 20000, "linear", 0, 15000),
    "commit_siblings": ("int", 0, 20, "linear", 5, 0),
    "wal_writer_delay": ("int", 1, 10000, "log", 200, None),
    "bgwriter_delay": ("int", 10, 10000, "log", 200, None),
    "bgwriter_lru_maxpages": ("int", 0, 1000, "linear", 100, None),
    "bgwriter_lru_multiplier": ("float", 0, 10, "linear", 2, None),
    "checkpoint_timeout": ("int", 30, 3600, "log", 300, None),
    "checkpoint_completion_target": ("float", 0.1, 1, "linear", 0.9, None),
    "max_wal_size": ("int", 64, 4096, "log", 1024, None),
    "autovacuum_naptime": ("int", 1, 3600, "log", 60, None),
    "autovacuum_vacuum_cost_limit": ("int", 1, 10000, "log", 200, None),
    "default_statistics_target": ("int", 1, 1000, "log", 100, None),
    "from_collapse_limit": ("int", 1, 32, "log", 8, None),
    "join_collapse_limit": ("int", 1, 32, "log", 8, None),
    "geqo_threshold": ("int", 2, 32, "log", 12, None),
    "effective_io_concurrency": ("int", 0, 512, "linear", 1, None),
    "max_parallel_workers_per_gather": ("int", 0, 8, "linear", 2, 0),
    "random_page_cost": ("float", 0.1, 100, "log", 4, 40),
    "seq_page_cost": ("float", 0.01, 10, "log", 1, None),
    "cpu_tuple_cost": ("float", 0.001, 1, "log", 0.01, None),
    "cpu_index_tuple_cost": ("float", 0.0005, 0.5, "log", 0.005, None),
    "cpu_operator_cost": ("float", 0.00025, 0.25, "log", 0.0025, None),
    "hash_mem_multiplier": ("float", 1, 16, "log", 2, None),
    "cursor_tuple_fraction": ("float", 0.01, 1, "log", 0.1, None),
}
FLAGS: dict[str, tuple[bool, bool | None]] = {
    "enable_indexscan": (True, False),
    "enable_bitmapscan": (True, False),
    "enable_seqscan": (True, None),
    "enable_hashjoin": (True, None),
    "enable_mergejoin": (True, None),
    "enable_nestloop": (True, None),
    "enable_sort": (True, None),
    "enable_material": (True, None),
    "enable_hashagg": (True, None),
    "enable_memoize": (True, None),
    "enable_incremental_sort": (True, None),
    "geqo": (True, None),
    "jit": (True, None),
    "track_counts": (True, None),
    "track_io_timing": (False, None),
}


class Server:
    """A PostgreSQL server in a temporary folder; a context manager.

    Raises:
        FileNotFoundError: PostgreSQL is not installed.
    """

    def __init__(self) -> None:
        found = sorted(Path(BINARIES).glob("*/bin/initdb"))
        if not found or shutil.which("pgbench") is None:
            raise FileNotFoundError(
                "PostgreSQL is not installed: apt-get install --no-install-recommends postgresql"
            )
        self.binaries = found[-1].parent

    def __enter__(self) -> Server:
        self._stack = contextlib.ExitStack()
        folder = self._stack.enter_context(tempfile.TemporaryDirectory())
        # The server refuses to run as root; Debian's package makes a user for it.
        self._user = "postgres" if os.geteuid() == 0 else None
        if self._user:
            owner = pwd.getpwnam(self._user)
            os.chown(folder, owner.pw_uid, owner.pw_gid)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.environment = {
            **os.environ, "PGHOST": "127.0.0.1", "PGPORT": str(port), "PGUSER": "postgres",
            "PGDATABASE": "postgres",
        }  # fmt: skip
        data = f"{folder}/data"
        self._run(self.binaries / "initdb", "-D", data, "-U", "postgres", "-A", "trust")
        self._tuned = Path(data, "tuned.conf")
        self._tuned.touch()
        with Path(data, "postgresql.conf").open("a") as settings:
            settings.write("include 'tuned.conf'\n")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= "
        options += "-c shared_buffers=64MB -c max_connections=30"
        control = self.binaries / "pg_ctl"
        self._run(control, "-D", data, "-w", "-l", f"{folder}/log", "-o", options, "start")
        self._stack.callback(self._run, control, "-D", data, "-m", "immediate", "stop")
        return self

    def __exit__(self, *_: tp.Any) -> None:
        self._stack.close()

    def _run(self, *argv: tp.Any) -> str:
        return subprocess.run(
            [str(each) for each in argv],
            check=True, user=self._user, env=self.environment, cwd="/", text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        ).stdout  # fmt: skip

    def execute(self, *statements: str) -> str:
        """The output of some statements, each a transaction of its own."""
        return self._run("psql", "-qAtX", *(part for s in statements for part in ("-c", s)))

    def fill(self, scale: int) -> None:
        """Makes pgbench's tables afresh: 100,000 accounts for each unit of scale."""
        self._run("pgbench", "-i", "-q", "-s", scale)

    def latency(self, seconds: int) -> float:
        """Mean latency of a transaction in a window, ms.

        Where none ends within the window, its length: the latency is above that.
        """
        out = self._run("pgbench", "-n", "-c", CLIENTS, "-j", 1, "-T", seconds)
        found = re.search(r"latency average = ([\d.]+) ms", out)
        if "actually processed: 0\n" in out:
            return 1000.0 * seconds
        if found is None:
            raise ValueError(f"pgbench prints no latency: {out[-500:]}")
        return float(found[1])

    def set(self, values: tp.Mapping[str, Value]) -> None:
        """Applies settings by one file and one reload: new connections have them."""
        self._tuned.write_text("".join(f"{name} = '{value}'\n" for name, value in values.items()))
        self.execute("SELECT pg_reload_conf()")


def knobs(bad: bool) -> list[Knob]:
    """The settings, from the bad start or from PostgreSQL's defaults."""
    found = []
    for name, (kind, low, high, scale, default, worse) in NUMBERS.items():
        start = worse if bad and worse is not None else default
        found.append(
            {"name": name, "type": kind, "low": low, "high": high, "scale": scale, "start": start}
        )
    for name, (on, worse_flag) in FLAGS.items():
        found.append(
            {
                "name": name,
                "type": "bool",
                "start": worse_flag if bad and worse_flag is not None else on,
            }
        )
    return [Knob.model_validate({**each, "command": ["{name}", "{value}"]}) for each in found]


class OneAtATime:
    """One setting at a time, in random order: a unit step of its own, kept if measured better."""

    def __init__(self, parametrization: ng.p.Parameter, seed: int) -> None:
        self._parametrization = parametrization
        self._rng = np.random.default_rng(seed)
        self._best, self._cost = parametrization, math.inf
        self._left: list[str] = []

    def ask(self) -> ng.p.Parameter:
        if not self._left:
            self._left = [str(name) for name in self._rng.permutation(list(self._best.value))]
        if self._cost == math.inf:
            return self._parametrization
        name = self._left.pop()
        child = self._best.spawn_child()
        knob = child[name]
        if isinstance(knob, ng.p.Choice):
            knob.value = not knob.value
        else:
            step = self._rng.choice([-1.0, 1.0])  # a sixth of the range
            knob.set_standardized_data([step], reference=self._best[name])
        return child

    def tell(self, candidate: ng.p.Parameter, cost: float) -> None:
        if cost < self._cost:
            self._best, self._cost = candidate, cost

    def recommend(self) -> ng.p.Parameter:
        return self._best


def method(name: str, parametrization: ng.p.Parameter, start: float, seed: int) -> tp.Any:
    """An optimizer; ``start`` is the cost measured at the start, ms."""
    parametrization.random_state.seed(seed)
    if name == "one at a time":
        return OneAtATime(parametrization, seed)
    if name == "OnePlusOne":
        return ng.optimizers.registry[name](parametrization)
    limit = start if name.endswith("max_regression 100 %") else None
    return ParametrizedCONGO(max_regression=limit)(parametrization)


METHODS = ("CONGO", "CONGO, max_regression 100 %", "OnePlusOne", "one at a time")


def play(server: Server, name: str, bad: bool, seed: int, options: argparse.Namespace) -> dict:
    """One run: the start's cost, the costs paid, and the recommended point's cost, all in ms."""
    space = knobs(bad)
    initial = {knob.name: knob.start for knob in space}
    server.set({})
    server.fill(options.scale)
    server.set(initial)
    before = [server.latency(options.window) for _ in range(options.repeats)]
    optimizer = method(name, spaces.parametrization(space, initial), float(np.mean(before)), seed)
    paid = []
    for _ in range(options.evaluations):
        candidate = optimizer.ask()
        server.set(spaces.values(space, candidate))
        paid.append(server.latency(options.window))
        optimizer.tell(candidate, paid[-1])
    recommended = spaces.values(space, optimizer.recommend())
    server.set(recommended)
    after = [server.latency(options.window) for _ in range(options.repeats)]
    return {
        "method": name,
        "start_is": "bad" if bad else "default",
        "seed": seed,
        "start_ms": before,
        "paid_ms": paid,
        "recommended_ms": after,
        "changed": {k: v for k, v in recommended.items() if v != initial[k]},
    }


def made_by(version: str, options: argparse.Namespace) -> str:
    """A digest of all that runs rest on but their seed: methods are compared as of one code."""
    parts: list[tp.Any] = [version, ng.__version__, np.__version__]
    parts += [options.evaluations, options.window, options.scale, options.repeats]
    parts += [path.read_text() for path in sorted(Path(noises.__file__).parent.rglob("*.py"))]
    parts.append(Path(__file__).read_text())
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def plot(runs: list[dict]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 6), layout="constrained")
    for axis, start in zip(axes, ("bad", "default")):
        of_start = [r for r in runs if r["start_is"] == start]
        if not of_start:
            continue
        for color, name in enumerate(METHODS):
            chosen = [r for r in of_start if r["method"] == name]
            if not chosen:
                continue
            for run in chosen:
                axis.plot(run["paid_ms"], ".", color=f"C{color}", markersize=3, alpha=0.6)
            end = float(np.mean([np.mean(r["recommended_ms"]) for r in chosen]))
            axis.axhline(end, color=f"C{color}", label=f"{name}: recommended {end:.1f} ms")
        axis.axhline(
            float(np.mean([r["start_ms"] for r in of_start])),
            color="grey", linestyle=":", label="start",
        )  # fmt: skip
        axis.set(yscale="log", title=f"from a {start} start", xlabel="evaluation")
        axis.legend(fontsize=11, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    axes[0].set_ylabel("latency paid (dots), ms")
    figure.savefig(DOCS / "tune_postgres.png", dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evaluations", type=int, default=150)
    parser.add_argument("--window", type=int, default=2, help="seconds measured")
    parser.add_argument("--scale", type=int, default=5, help="pgbench's scale")
    parser.add_argument("--repeats", type=int, default=5, help="windows at the start and the end")
    parser.add_argument("--quick", action="store_true", help="a smoke test: writes no file")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.evaluations, options.window = 1, 2, 1
        options.scale = options.repeats = 1
    warnings.filterwarnings("ignore")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server stops with it
    path = RESULTS / "tune_postgres.json"
    with Server() as server:
        version = server.execute("SHOW server_version").strip()
        about = {
            "postgresql": version,
            "settings": len(NUMBERS) + len(FLAGS),
            "evaluations": options.evaluations,
            "window_s": options.window,
            "scale": options.scale,
            "repeats": options.repeats,
            "made_by": made_by(version, options),
        }
        kept = json.loads(path.read_text()) if path.exists() and not options.quick else {}
        runs = kept["runs"] if kept.get("made_by") == about["made_by"] else []
        done = {(run["seed"], run["start_is"], run["method"]) for run in runs}
        for seed, bad, name in itertools.product(range(options.seeds), (True, False), METHODS):
            if (seed, "bad" if bad else "default", name) in done:
                continue
            run = play(server, name, bad, seed, options)
            runs.append(run)
            above = max(run["paid_ms"]) / np.mean(run["start_ms"])
            print(
                f"{run['start_is']:8s}{name:30s}start {np.mean(run['start_ms']):7.1f}  "
                f"recommended {np.mean(run['recommended_ms']):7.1f}  "
                f"paid {np.mean(run['paid_ms']):7.1f} ms, at most {above:.1f} of the start",
                flush=True,
            )
            if not options.quick:
                save("tune_postgres", {**about, "runs": runs})
                plot(runs)


if __name__ == "__main__":
    main()
