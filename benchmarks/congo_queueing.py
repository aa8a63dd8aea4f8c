"""Queueing networks: CONGO, its paper's variants, gradient baselines, PPO and Nevergrad.

The six settings of the CONGO paper (arXiv 2407.06325): jobs with Poisson arrivals are
routed by type through single-server first-come-first-served services of deterministic service time
``1 / (allocation + 0.1)``; the cost is the mean end-to-end latency plus the sum of the allocations.
The networks have no loops, so a window is simulated service by service with a vectorised Lindley
recursion: exact, and a hundred times faster than an event loop in Python.

The gradient methods of the paper (E, Z, B, one coordinate at a time, averaged perturbations) follow
its rule for an unstable system: a round with a window that no job left takes no gradient step but
raises every allocation by 1. All others are told the mean age of the jobs inside.

Two sets of rows. In the first every method is told the cost. The second has the rules by which the
published figures were made: E, Z and B are told the latency only and given the price's gradient, +1
in every entry, after the recovery; perturbations are five times as long.

    python benchmarks/congo_queueing.py            # about 30 minutes on two cores
    python benchmarks/congo_queueing.py --quick
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

from trimtab.optimizers import ParametrizedCONGO, recovery

ROUNDS = 100
SETTLE, MEASURE = 30.0, 10.0
# Empty networks run so long show an overload that a window is too short for.
LONG = 300.0
LOWER, UPPER, DELTA = 1.0, 60.0, 0.5
UNSTABLE_STEP = 1.0
NODES_1 = "ABCDEFGHIJKLMNO"
PATHS_1 = [
    [NODES_1.index(node) for node in path]
    for path in ("A", "ABE", "ABFGLM", "ABFGLNO", "ABF", "ACDH", "ACDIK", "ACDJ")
]
PATHS_2 = [
    [0, 33, 23, 38, 13, 16],
    [0, 41, 44, 26, 14, 10],
    [0, 28, 49, 17, 35, 42],
    [0, 37, 4, 1, 20, 47],
    [0, 34, 32, 45, 12, 30],
    [0, 40, 9, 5, 3, 48],
    [0, 18, 15, 31, 11, 6],
    [0, 46, 39, 25, 8, 22],
    [0, 36, 24, 2, 29, 27],
    [0, 7, 19, 21, 43],
]


class Setting(tp.NamedTuple):
    """One row of the table: the network, its workload in every round, and the step sizes."""

    paths: list[list[int]]
    nodes: int
    start: np.ndarray
    rate: tp.Callable[[int], float]
    mix: tp.Callable[[int], np.ndarray]
    learning_rate: tp.Callable[[int], float]
    m: int
    sparsity: int
    unstable_step: float  # by the paper's rules


def _only(kind: int, kinds: int) -> tp.Callable[[int], np.ndarray]:
    return lambda t: np.eye(kinds)[kind - 1]


def _drift(before: list[float], after: list[float]) -> tp.Callable[[int], np.ndarray]:
    """Linearly from one mix to the other between rounds 40 and 90."""

    def mix(t: int) -> np.ndarray:
        share = min(max((t - 40) / 50, 0.0), 1.0)
        return (1 - share) * np.array(before) + share * np.array(after)

    return mix


def _rate_1(t: int) -> float:
    return (5.0, 5.5, 6.0, 5.5)[min(t // 25, 3)]


def _rate_2(t: int) -> float:
    return (4.5, 4.75, 5.0, 5.25, 5.5, 5.25, 5.0, 4.75, 4.5, 4.75)[min(t // 10, 9)]


def decaying(t: int) -> float:
    return 0.7 ** (t // 25)


def halving(t: int) -> float:
    return 0.7 * 0.5 ** (t // 25)


def one(t: int) -> float:
    return 1.0


def lower(t: int) -> float:
    return 0.7


def _start(nodes: int, entry: float, others: float) -> np.ndarray:
    return np.concatenate([[entry], np.full(nodes - 1, others)]).astype(float)


SETTINGS = {
    "1 fixed": Setting(
        PATHS_1, 15, _start(15, 10, 10), lambda t: 5.0,
        lambda t: np.array([0.02, 0.44, 0.02, 0.02, 0.44, 0.02, 0.02, 0.02]), decaying, 8, 6, 1.0,
    ),
    "1 arrival rate": Setting(
        PATHS_1, 15, _start(15, 10, 10), _rate_1, _only(6, 8), decaying, 8, 6, 0.5
    ),
    "1 job mix": Setting(
        PATHS_1, 15, _start(15, 10, 7), lambda t: 5.0,
        _drift([0, 0.5, 0, 0, 0.5, 0, 0, 0], [0, 0.1, 0.3, 0, 0.6, 0, 0, 0]), halving, 8, 6, 0.5,
    ),
    "2 fixed": Setting(
        PATHS_2, 50, _start(50, 7, 7), lambda t: 5.0, _only(6, 10), one, 17, 10, 0.1
    ),
    "2 arrival rate": Setting(
        PATHS_2, 50, _start(50, 7, 7), _rate_2, _only(2, 10), one, 17, 10, 0.1
    ),
    "2 job mix": Setting(
        PATHS_2, 50, _start(50, 10, 4), lambda t: 4.0,
        _drift([0.5, 0, 0.5] + [0] * 7, [0.3, 0, 0.3, 0, 0, 0.2, 0, 0.2, 0, 0]), lower, 17, 10, 0.1,
    ),
}  # fmt: skip


class Network:
    """A network with its queues, simulated window by window.

    Jobs that a window leaves waiting or in service carry over, with whatever allocation comes
    next: a service that has begun keeps its duration.
    """

    def __init__(
        self,
        paths: list[list[int]],
        nodes: int,
        rng: np.random.Generator,
        whole_stays: bool = False,
    ) -> None:
        self.paths, self.nodes, self.rng = paths, nodes, rng
        self.whole_stays = whole_stays
        self.unstable = False  # some window had no job to measure
        depth = {node: k for path in paths for k, node in enumerate(path)}
        self.order = sorted(depth, key=depth.__getitem__)
        # The service after node n for kind k; -1 leaves the network.
        self.next = np.full((nodes, len(paths)), -1)
        for kind, path in enumerate(paths):
            for node, following in itertools.pairwise(path):
                self.next[node, kind] = following
        self.now = 0.0
        self.closed = False
        self.free = np.zeros(nodes)
        # Per service: rows of (arrival at the service, arrival at the network, kind).
        self.pending = [np.zeros((0, 3)) for _ in range(nodes)]

    def run(
        self,
        allocation: np.ndarray,
        rate: float,
        mix: np.ndarray,
        length: float = SETTLE + MEASURE,
    ) -> float:
        """The cost of ``length`` time units: mean latency plus allocations.

        The latency is that of the jobs that left in the last ``MEASURE`` units (with
        ``whole_stays``: of those that entered in them too). If none did, the network is marked
        unstable and the latency is the mean age of the jobs inside: what a monitor of an
        overloaded system would report.
        """
        end = self.now + length
        count = 0 if self.closed else self.rng.poisson(rate * (end - self.now))
        times = np.sort(self.rng.uniform(self.now, end, count))
        kinds = self.rng.choice(len(self.paths), size=count, p=mix)
        entry = self.paths[0][0]
        jobs = np.column_stack([times, times, kinds])
        inbox: list[list[np.ndarray]] = [[waiting] for waiting in self.pending]
        inbox[entry].append(jobs)
        latencies, inside = [np.zeros(0)], [np.zeros(0)]
        for node in self.order:
            jobs = np.concatenate(inbox[node])
            self.pending[node] = jobs
            if not len(jobs):
                continue
            jobs = jobs[np.argsort(jobs[:, 0], kind="stable")]
            service = 1.0 / (allocation[node] + 0.1)
            # Lindley: departure k is the largest arrival j plus the services j to k.
            ready = np.maximum(jobs[:, 0], max(self.free[node], self.now))
            step = service * np.arange(len(jobs))
            departures = np.maximum.accumulate(ready - step) + step + service
            begun = int(np.searchsorted(departures - service, end))
            self.pending[node] = jobs[begun:]
            inside.append(jobs[begun:, 1])
            if begun:
                self.free[node] = departures[begun - 1]
            moved = jobs[:begun].copy()
            moved[:, 0] = departures[:begun]
            following = self.next[node, moved[:, 2].astype(int)]
            for to in np.unique(following):
                part = moved[following == to]
                if to < 0:
                    since = part[:, 1] if self.whole_stays else part[:, 0]
                    left = (since > end - MEASURE) & (part[:, 0] <= end)
                    latencies.append(part[left, 0] - part[left, 1])
                    inside.append(part[part[:, 0] > end, 1])
                else:
                    inbox[to].append(part)
        self.now = end
        latency = np.concatenate(latencies)
        if not latency.size:
            self.unstable = True
            latency = end - np.minimum(np.concatenate(inside), end)
        return float(latency.mean() if latency.size else 0.0) + float(allocation.sum())


class Workload:
    """The evaluations of one seed; round ``t`` starts from an empty network."""

    def __init__(self, setting: Setting, seed: int, whole_stays: bool = False) -> None:
        self.setting, self.seed, self.whole_stays = setting, seed, whole_stays
        self.round, self.unstable_rounds = 0, 0
        self.after_long: list[float] = []  # cost after ``LONG`` units at points of the last rounds
        self.network: Network | None = None
        self.measured: list[list[float]] = [[] for _ in range(ROUNDS)]

    def start_round(self, t: int) -> None:
        self.round = t
        s = self.setting
        rng = np.random.default_rng([self.seed, t, 0])
        self.network = Network(s.paths, s.nodes, rng, self.whole_stays)

    def __call__(self, allocation: np.ndarray) -> float:
        assert self.network is not None
        s = self.setting
        cost = self.network.run(allocation, s.rate(self.round), s.mix(self.round))
        self.measured[self.round].append(cost)
        return cost

    def paid(self, first: int, last: int) -> float:
        """Mean cost of the measured windows of these rounds; NaN if there were none."""
        rounds = [np.mean(costs) for costs in self.measured[first:last] if costs]
        return float(np.mean(rounds)) if rounds else float("nan")

    def unstable(self) -> bool:
        """Whether some evaluation of this round found no job to measure; to be asked once."""
        assert self.network is not None
        self.unstable_rounds += self.network.unstable
        return self.network.unstable

    def played(self, t: int, allocation: np.ndarray) -> float:
        """The cost counted: an empty network and, for all algorithms, the same arrivals."""
        s = self.setting
        network = Network(s.paths, s.nodes, np.random.default_rng([self.seed, t, 1]))
        if t in (ROUNDS - 11, ROUNDS - 1):
            later = Network(s.paths, s.nodes, np.random.default_rng([self.seed, t, 2]))
            self.after_long.append(later.run(allocation, s.rate(t), s.mix(t), LONG))
        return network.run(allocation, s.rate(t), s.mix(t))


def descend(workload: Workload, estimate: tp.Callable) -> list[float]:
    s = workload.setting
    x, costs = s.start.copy(), []
    for t in range(ROUNDS):
        costs.append(workload.played(t, x))
        workload.start_round(t)
        gradient = estimate(workload, x)
        if workload.unstable():
            x = np.clip(x + UNSTABLE_STEP, LOWER, UPPER)
            continue
        norm = np.linalg.norm(gradient)
        if norm:
            x = np.clip(x - s.learning_rate(t) * gradient / norm, LOWER, UPPER)
    return costs


def one_coordinate_at_a_time(workload: Workload, x: np.ndarray) -> np.ndarray:
    start = workload(x)
    return np.array([(workload(x + DELTA * e) - start) / DELTA for e in np.eye(x.size)])


def averaged_perturbations(seed: int) -> tp.Callable:
    rng = np.random.default_rng([seed, 2])

    def estimate(workload: Workload, x: np.ndarray) -> np.ndarray:
        start, total = workload(x), np.zeros_like(x)
        step = DELTA / np.sqrt(x.size)
        for _ in range(workload.setting.m):
            signs = rng.choice([-1.0, 1.0], x.size)
            total += (workload(x + step * signs) - start) / step * signs
        return total / workload.setting.m

    return estimate


# -- the paper's rules -------------------------------------------------------------------------


class Told:
    """A round's evaluations by the paper's rules, around ``x``.

    The entry closes, for the round, before a window that begins with 1,000 jobs inside.
    """

    def __init__(self, workload: Workload, x: np.ndarray) -> None:
        self.workload, self.x = workload, x

    def cost(self, step: np.ndarray | float = 0.0, length: float = SETTLE + MEASURE) -> float:
        workload, network = self.workload, self.workload.network
        assert network is not None
        network.closed |= sum(map(len, network.pending)) >= 1000
        s, t = workload.setting, workload.round
        self.allocation = np.maximum(self.x + step, 0.001)
        cost = network.run(self.allocation, s.rate(t), s.mix(t), length)
        if length != SETTLE:  # what settles is not measured
            workload.measured[t].append(cost)
        return cost

    def latency(self, step: np.ndarray | float = 0.0) -> float:
        return self.cost(step) - float(self.allocation.sum())


def latency_e(told: Told, s: Setting, rng: np.random.Generator) -> np.ndarray:
    rows = rng.standard_normal((s.m, s.nodes))
    start = told.latency()
    y = np.array([told.latency(DELTA * row) - start for row in rows]) / DELTA
    return recovery.cosamp(rows, y, s.sparsity, max_iterations=51).dense(s.nodes)


def latency_z(told: Told, s: Setting, rng: np.random.Generator) -> np.ndarray:
    rows = rng.choice([-1.0, 1.0], (s.m, s.nodes))
    y = np.array([-told.latency() + told.latency(DELTA * row) for row in rows]) / DELTA
    return recovery.cosamp(rows, y, s.sparsity, max_iterations=51).dense(s.nodes)


def latency_b(told: Told, s: Setting, rng: np.random.Generator) -> np.ndarray:
    mixing, y = rng.standard_normal((s.m, s.nodes)), np.zeros(s.m)
    start = told.latency()
    for signs in rng.choice([-1.0, 1.0], (s.m, s.m)):
        y += (told.latency(DELTA * signs @ mixing) - start) / DELTA * signs / s.m
    return recovery.basis_pursuit(mixing, y, 0.01, max_iterations=50).dense(s.nodes)


def averaged(
    told: Told, s: Setting, rng: np.random.Generator, measure: tp.Callable = Told.cost
) -> np.ndarray:
    rows, start = rng.choice([-1.0, 1.0], (s.m, s.nodes)), measure(told)
    return sum((measure(told, DELTA * row) - start) / DELTA * row for row in rows) / s.m


def averaged_latency(told: Told, s: Setting, rng: np.random.Generator) -> np.ndarray:
    return averaged(told, s, rng, Told.latency)


def each_coordinate(told: Told, s: Setting, rng: np.random.Generator) -> np.ndarray:
    """Only the measured part of a window is perturbed."""
    start, gradient = told.cost(), np.zeros(s.nodes)
    for i, sign in enumerate(rng.choice([-1.0, 1.0], s.nodes)):
        told.cost(length=SETTLE)
        gradient[i] = (told.cost(sign * DELTA * np.eye(s.nodes)[i], MEASURE) - start) / DELTA * sign
    return gradient


def follow(
    workload: Workload, estimate: tp.Callable | None, price: bool, rng: np.random.Generator
) -> list[float]:
    """Descends by the paper's rules; without an estimate, along the price alone."""
    s = workload.setting
    x, costs = s.start.copy(), []
    for t in range(ROUNDS):
        costs.append(workload.played(t, x))
        gradient = np.zeros(s.nodes)
        if estimate is not None:
            workload.start_round(t)
            told = Told(workload, x)
            told.cost()  # the point played
            gradient = estimate(told, s, rng)
            if workload.unstable():
                x = np.clip(x + s.unstable_step, LOWER, UPPER)
                continue
        gradient = gradient + float(price)
        size = float(np.linalg.norm(gradient))
        if size:
            x = np.clip(x - s.learning_rate(t) * gradient / size, LOWER, UPPER)
    return costs


def papers_rules(s: Setting) -> dict[str, tuple[int, tp.Callable]]:
    """Evaluations a round, and the costs of a workload, of methods by the paper's rules."""
    methods: dict[str, tuple[int, tp.Callable | None, bool]] = {
        "CONGO_E, given the price": (s.m + 2, latency_e, True),
        "CONGO_Z, given the price": (2 * s.m + 1, latency_z, True),
        "CONGO_B, given the price": (s.m + 2, latency_b, True),
        "one coordinate at a time": (s.nodes + 2, each_coordinate, False),
        "averaged perturbations": (s.m + 2, averaged, False),
        "averaged, given the price": (s.m + 2, averaged_latency, True),
        "price only": (0, None, True),
    }
    return {
        label: (
            count,
            lambda w, e=estimate, p=price: follow(w, e, p, np.random.default_rng([w.seed, 4])),
        )
        for label, (count, estimate, price) in methods.items()
    }


# -- optimizers of Nevergrad, and PPO ----------------------------------------------------------


def play(
    workload: Workload, algorithm: tp.Any, evaluations: int, published: bool = False
) -> list[float]:
    """The costs of an optimizer of Nevergrad, with the paper's rule for an unstable system or not.

    Under the rule, the raised allocation is told as a better point from outside: a warm start.
    """
    s = workload.setting
    parametrization = ng.p.Array(init=s.start).set_bounds(LOWER, UPPER, method="clipping")
    parametrization.set_mutation(sigma=1.0)
    parametrization.random_state.seed(workload.seed)
    optimizer = algorithm(parametrization, budget=ROUNDS * evaluations)
    costs = []
    for t in range(ROUNDS):
        x = np.asarray(optimizer.recommend().value)
        costs.append(workload.played(t, x))
        workload.start_round(t)
        if published:
            asked = [optimizer.ask() for _ in range(evaluations)]
            losses = [workload(np.asarray(candidate.value)) for candidate in asked]
            if workload.unstable():
                raised = np.clip(x + UNSTABLE_STEP, LOWER, UPPER)
                outside = optimizer.parametrization.spawn_child(new_value=raised)
                optimizer.tell(outside, -1e9)
                continue
            for candidate, loss in zip(asked, losses):
                optimizer.tell(candidate, loss)
            continue
        for _ in range(evaluations):
            candidate = optimizer.ask()
            optimizer.tell(candidate, workload(np.asarray(candidate.value)))
    return costs


def train_ppo(setting: Setting, steps: int) -> tp.Any:
    """PPO that knows the workload: it observes allocations, rate and mix, and moves every node."""
    import gymnasium
    from stable_baselines3 import PPO

    class Environment(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(
            -10.0, 10.0, (setting.nodes + 1 + len(setting.paths),), np.float32
        )
        action_space = gymnasium.spaces.Box(-1.0, 1.0, (setting.nodes,), np.float32)

        def reset(self, *, seed: int | None = None, options: tp.Any = None) -> tp.Any:
            super().reset(seed=seed)
            self.workload = Workload(setting, int(self.np_random.integers(1 << 30)) + 1000)
            self.t, self.x = 0, setting.start.copy()
            return observe(setting, 0, self.x), {}

        def step(self, action: np.ndarray) -> tp.Any:
            self.x = np.clip(self.x + action, LOWER, UPPER)
            cost = self.workload.played(self.t, self.x)
            self.t += 1
            done = self.t >= ROUNDS
            reward = -cost / setting.start.sum()
            return observe(setting, min(self.t, ROUNDS - 1), self.x), reward, False, done, {}

    model = PPO("MlpPolicy", Environment(), seed=0, device="cpu", n_steps=min(1000, steps))
    return model.learn(steps)


def observe(setting: Setting, t: int, x: np.ndarray) -> np.ndarray:
    return np.concatenate([x / 10, [setting.rate(t) / 5], setting.mix(t)]).astype(np.float32)


def play_ppo(workload: Workload, model: tp.Any) -> list[float]:
    s = workload.setting
    x, costs = s.start.copy(), []
    for t in range(ROUNDS):
        costs.append(workload.played(t, x))
        action, _ = model.predict(observe(s, t, x), deterministic=True)
        x = np.clip(x + action, LOWER, UPPER)
    return costs


def published(s: Setting) -> dict[str, tuple[int, tp.Callable]]:
    """The paper's gradient methods: evaluations a round, and the costs of a workload."""
    told: dict[str, tp.Any] = {
        "learning_rate": s.learning_rate,
        "normalize": True,
        "sparsity": s.sparsity,
        "num_measurements": s.m,
        "delta": DELTA,
    }
    variant_b = ParametrizedCONGO(variant="B", num_perturbations=s.m + 1, **told)
    variants = {
        "CONGO_E": (s.m + 1, ParametrizedCONGO(variant="E", **told)),
        "CONGO_Z": (s.m + 1, ParametrizedCONGO(variant="Z", **told)),
        "CONGO_B": (s.m + 2, variant_b),
    }
    runs: dict[str, tuple[int, tp.Callable]] = {
        label: (samples, lambda w, a=algorithm, n=samples: play(w, a, n, published=True))
        for label, (samples, algorithm) in variants.items()
    }
    runs["one coordinate at a time"] = (
        s.nodes + 1,
        lambda w: descend(w, one_coordinate_at_a_time),
    )
    runs["averaged perturbations"] = (
        s.m + 1,
        lambda w: descend(w, averaged_perturbations(w.seed)),
    )
    return runs


def rows_of(
    name: str, runs: dict[str, tuple[int, tp.Callable]], seeds: int, whole_stays: bool = False
) -> dict[str, tp.Any]:
    rows = {}
    for label, (count, run) in runs.items():
        workloads = [Workload(SETTINGS[name], seed, whole_stays) for seed in range(seeds)]
        costs = np.array([run(workload) for workload in workloads])
        rows[label] = {
            "evaluations_a_round": count,
            "unstable_rounds": float(np.mean([w.unstable_rounds for w in workloads])),
            "first 20": summary(costs[:, :20].mean(axis=1)),
            "last 20": summary(costs[:, -20:].mean(axis=1)),
            "all": summary(costs.mean(axis=1)),
            "after 300": summary([float(np.mean(w.after_long)) for w in workloads]),
            "paid": {
                part: summary([w.paid(*rounds) for w in workloads])
                for part, rounds in (
                    ("first 20", (0, 20)),
                    ("last 20", (ROUNDS - 20, ROUNDS)),
                    ("all", (0, ROUNDS)),
                )
                if count
            },
            "curve": [round(float(c), 2) for c in costs.mean(axis=0)],
        }
        shown = "  ".join(
            f"{part} {rows[label][part]['mean']:7.1f} +- {rows[label][part]['standard_error']:4.1f}"
            for part in ("first 20", "last 20", "all", "after 300")
        )
        if count:
            shown += f"  paid, last 20 {rows[label]['paid']['last 20']['mean']:7.1f}"
        counted = ", those that entered and left" if whole_stays else ""
        print(f"{name + counted:15s} {label:26s} {count:3d}  {shown}", flush=True)
    return rows


def adaptive(s: Setting) -> dict[str, tuple[int, tp.Callable]]:
    samples = s.m + 2
    congo = ParametrizedCONGO(
        variant="adaptive",
        num_measurements=s.m + 1,
        learning_rate=s.learning_rate,
        normalize=True,
    )
    free = ParametrizedCONGO(num_measurements=s.m + 1)
    return {
        "CONGO": (samples, lambda w: play(w, congo, samples)),
        "CONGO, no learning rate": (samples, lambda w: play(w, free, samples)),
    }


def measure(name: str, seeds: int, ppo_steps: int) -> dict[str, tp.Any]:
    s = SETTINGS[name]
    samples = s.m + 2
    model = train_ppo(s, ppo_steps)
    runs: dict[str, tuple[int, tp.Callable]] = {
        **adaptive(s),
        **published(s),
        "PPO": (0, lambda w: play_ppo(w, model)),
    }
    for other in ("SPSA", "CMA", "TBPSA", "NGOpt"):
        registered = ng.optimizers.registry[other]
        runs[other] = (samples, lambda w, a=registered: play(w, a, samples))
    return rows_of(name, runs, seeds)


def entered_and_left(name: str, seeds: int) -> dict[str, tp.Any]:
    """The paper's methods where only jobs that entered and left in a window count.

    The published figures show a floor far above what the methods reach here. A backlog of more than
    a window, which evaluations without a reset build up, makes such a system unstable.
    """
    return rows_of(name, published(SETTINGS[name]), seeds, whole_stays=True)


def rows_by_rules(name: str, seeds: int) -> dict[str, tp.Any]:
    return rows_of(name, papers_rules(SETTINGS[name]), seeds)


def plot(results: dict[str, tp.Any], name: str) -> None:
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    figure, axes = plt.subplots(2, 3, figsize=(11, 7.5), layout="constrained", sharex=True)
    for axis, (setting, rows) in zip(axes.ravel(), results.items()):
        for k, (label, row) in enumerate(rows.items()):
            axis.plot(
                row["curve"], ("-", "--", ":")[k // 5], color=f"C{k % 5}", label=label, lw=1.8
            )
        axis.set_title(f"network {setting}", fontsize=13)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(ticker.ScalarFormatter())
        axis.yaxis.set_minor_locator(ticker.NullLocator())
        axis.tick_params(labelsize=12)
    for axis in axes[1]:
        axis.set_xlabel("round", fontsize=13)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=12
    )
    figure.supylabel("cost at the point played, mean over seeds", fontsize=13)
    figure.savefig(DOCS / f"{name}.png", dpi=100)


def main() -> None:
    options = arguments(__doc__.splitlines()[0], seeds=10)
    names, reproduced, ppo_steps = list(SETTINGS), ["1 fixed", "2 fixed"], 20_000
    if options.quick:
        global ROUNDS
        ROUNDS, names, reproduced, ppo_steps = 5, ["1 fixed"], ["1 fixed"], 100
    jobs: list[tuple[str, str, tp.Callable, tuple[int, ...]]] = [
        *(("settings", name, measure, (options.seeds, ppo_steps)) for name in reversed(names)),
        *(("papers_rules", name, rows_by_rules, (options.seeds,)) for name in reversed(names)),
        *(("entered_and_left", name, entered_and_left, (options.seeds,)) for name in reproduced),
    ]
    # What is measured are costs of simulated time, which processes beside each other do not change.
    with ProcessPoolExecutor(os.cpu_count(), get_context("fork")) as pool:
        found = [pool.submit(function, name, *more) for _, name, function, more in jobs]
        rows = {(group, name): each.result() for (group, name, *_), each in zip(jobs, found)}
    if options.quick:
        return
    results = {name: rows["settings", name] for name in names}
    by_rules = {
        name: {"CONGO": results[name]["CONGO"], **rows["papers_rules", name]} for name in names
    }
    save(
        "congo_queueing",
        {
            "rounds": ROUNDS,
            "ppo_steps": ppo_steps,
            "settings": results,
            "papers_rules": by_rules,
            "entered_and_left": {name: rows["entered_and_left", name] for name in reproduced},
        },
    )
    plot(results, "congo_queueing")
    plot(by_rules, "congo_queueing_rules")


if __name__ == "__main__":
    main()
