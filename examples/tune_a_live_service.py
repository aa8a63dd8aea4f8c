"""CONGO tunes a live application while it serves: six HTTP services, twelve knobs, one cost.

The services run as processes of their own on loopback and call each other; each has a worker pool
and a limit on its queue, changed while it runs. A seventh process sends requests at a bounded rate.
The cost is measured: mean latency of the requests, plus a price for every worker and queue slot.
Half-way the mix of requests turns from browsing to buying. Takes about four minutes, stops by
itself and leaves no process behind.

    python examples/tune_a_live_service.py [--rounds 40] [--plot live_service.png]
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import multiprocessing
import os
import random
import time
import typing as tp
from multiprocessing.connection import Connection

import nevergrad as ng
import numpy as np

from trimtab.optimizers import ParametrizedCONGO

# Seconds that a worker is busy with one request, the services that it then calls excluded.
SERVICES = {
    "gateway": 0.004,
    "auth": 0.008,
    "catalog": 0.015,
    "search": 0.030,
    "orders": 0.015,
    "payments": 0.030,
}
ROUTES = {
    "browse": ("gateway", "catalog", "search"),
    "buy": ("gateway", "auth", "orders", "payments"),
}
REQUESTS_PER_SECOND = 80
WINDOW, SETTLE = 0.35, 0.1  # seconds measured, and before that
FAILED_MS = 500.0  # what a refused request is said to have taken
PRICE = {"pool": 3.0, "queue": 0.2}  # ms a request that a worker and a queue slot are worth


class Service:
    """A worker pool and a bounded queue in front of it."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.pool, self.queue, self.busy = 12, 40, 0
        self.waiting: collections.deque[asyncio.Future] = collections.deque()

    def resize(self, pool: int, queue: int) -> None:
        self.pool, self.queue = pool, queue
        self._wake()

    def _wake(self) -> None:
        while self.waiting and self.busy < self.pool:
            self.busy += 1
            self.waiting.popleft().set_result(None)

    async def handle(self, path: str, ports: dict[str, int]) -> int:
        """Serves ``/call/<the services still to be called>`` or ``/resize/<pool>/<queue>``."""
        _, verb, *rest = path.split("/")
        if verb == "resize":
            self.resize(int(rest[0]), int(rest[1]))
            return 200
        if self.busy < self.pool:
            self.busy += 1
        elif len(self.waiting) < self.queue:
            turn = asyncio.get_running_loop().create_future()
            self.waiting.append(turn)
            await turn
        else:
            return 503
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.busy -= 1
            self._wake()
        return await get(ports[rest[0]], "/call/" + "/".join(rest[1:])) if rest[0] else 200


async def get(port: int, path: str) -> int:
    """The status of an HTTP GET on loopback; 503 where nobody answers."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        status = await reader.readline()
        writer.close()
        return int(status.split()[1])
    except (OSError, IndexError):
        return 503


def serve(name: str, pipe: Connection) -> None:
    """Process of one service: binds a port, tells it, learns the others', serves."""

    async def run() -> None:
        service, ports = Service(SERVICES[name]), {}

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            request = await reader.readline()
            status = await service.handle(request.split()[1].decode(), ports)
            writer.write(f"HTTP/1.0 {status} -\r\n\r\n".encode())
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=256)
        pipe.send(server.sockets[0].getsockname()[1])
        ports.update(pipe.recv())
        await live_as_long_as_the_parent()

    asyncio.run(run())


async def live_as_long_as_the_parent() -> None:
    parent = os.getppid()
    while os.getppid() == parent:
        await asyncio.sleep(0.5)


def load(pipe: Connection) -> None:
    """Process of the clients: for every order of work, the latencies in ms, one a request."""

    async def send(ports: dict[str, int], kind: str, out: list[float]) -> None:
        start = time.perf_counter()
        status = await get(ports["gateway"], "/call/" + "/".join(ROUTES[kind][1:]) + "/")
        spent = (time.perf_counter() - start) * 1e3
        out.append(spent if status == 200 else FAILED_MS)

    async def window(ports: dict[str, int], mix: dict[str, float], seed: int) -> list[float]:
        rng, settling, measured, sent = random.Random(seed), [], [], []
        start = time.perf_counter()
        due = start
        while (due := due + rng.expovariate(REQUESTS_PER_SECOND)) < start + SETTLE + WINDOW:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            kind = rng.choices(list(mix), list(mix.values()))[0]
            out = measured if due > start + SETTLE else settling
            sent.append(asyncio.create_task(send(ports, kind, out)))
        await asyncio.gather(*sent)
        return measured

    ports = pipe.recv()
    while (order := pipe.recv()) is not None:
        pipe.send(asyncio.run(window(ports, *order)))


class Application:
    """The running processes; use it as a context manager, which ends them."""

    def __enter__(self) -> Application:
        context = multiprocessing.get_context("spawn")
        self.processes, pipes = [], {}
        for name in [*SERVICES, "load"]:
            pipes[name], theirs = context.Pipe()
            target, args = (load, (theirs,)) if name == "load" else (serve, (name, theirs))
            self.processes.append(context.Process(target=target, args=args, daemon=True))
            self.processes[-1].start()
        self.ports = {name: pipes[name].recv() for name in SERVICES}
        for pipe in pipes.values():
            pipe.send(self.ports)
        self.load, self.windows = pipes["load"], 0
        return self

    def __exit__(self, *_: tp.Any) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join(5)

    def measure(self, knobs: dict[str, int], mix: dict[str, float]) -> float:
        """Sets the knobs, sends a window of requests, returns the cost in ms."""

        async def resize() -> None:
            for name, port in self.ports.items():
                status = await get(
                    port, f"/resize/{knobs[f'{name}_pool']}/{knobs[f'{name}_queue']}"
                )
                assert status == 200, f"service {name} did not take its new sizes: {status}"

        asyncio.run(resize())
        self.windows += 1
        self.load.send((mix, self.windows))
        latencies = self.load.recv()
        return float(np.mean(latencies)) + sum(
            PRICE[knob.rsplit("_", 1)[1]] * size for knob, size in knobs.items()
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--plot", help="file for a plot of cost and sizes over time")
    options = parser.parse_args()
    knobs: dict[str, ng.p.Scalar] = {}
    for name in SERVICES:
        knobs[f"{name}_pool"] = ng.p.Scalar(init=12, lower=1, upper=24).set_integer_casting()
        knobs[f"{name}_queue"] = ng.p.Scalar(init=40, lower=1, upper=80).set_integer_casting()
    parametrization = ng.p.Dict(**knobs)
    parametrization.random_state.seed(0)
    # Online: no budget. Nine evaluations a round; steps of a fixed length, in units of a sixth of
    # each knob's range. Knobs are whole numbers: perturbations begin at 0.4 of such a unit, one or
    # two workers.
    optimizer = ParametrizedCONGO(
        variant="adaptive", num_measurements=8, learning_rate=0.8, normalize=True, delta=0.4
    )(parametrization)
    history: list[tuple[float, float, dict[str, int]]] = []
    start = time.monotonic()
    with Application() as application:
        untouched = dict(parametrization.value)
        for half, mix in enumerate(({"browse": 0.8, "buy": 0.2}, {"browse": 0.2, "buy": 0.8})):
            before = np.mean([application.measure(untouched, mix) for _ in range(5)])
            for _ in range(options.rounds // 2):
                completed = optimizer.num_rounds
                while optimizer.num_rounds == completed:
                    candidate = optimizer.ask()
                    optimizer.tell(candidate, application.measure(candidate.value, mix))
                sizes = dict(optimizer.recommend().value)
                cost = application.measure(sizes, mix)
                history.append((time.monotonic() - start, cost, sizes))
                report = optimizer.last_round
                names = ", ".join(list(report.support)[:3])
                print(f"round {report.number:3d}  cost {cost:6.1f} ms  moved by: {names}")
            after = [cost for _, cost, _ in history[-5:]]
            print(
                f"mix {half + 1}: untouched {before:.1f} ms, tuned {np.mean(after):.1f} ms "
                f"(mean of the last {len(after)} rounds)"
            )
    print(f"pools: { {name: sizes[f'{name}_pool'] for name in SERVICES} }")
    print(f"{application.windows} windows in {time.monotonic() - start:.0f} s")
    if options.plot:
        plot(history, options.plot)


def plot(history: list[tuple[float, float, dict[str, int]]], path: str) -> None:
    import matplotlib.pyplot as plt

    times = [moment for moment, _, _ in history]
    figure, axes = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    axes[0].plot(times, [cost for _, cost, _ in history])
    axes[0].set_ylabel("cost, ms")
    axes[0].set_ylim(bottom=0)
    for name in SERVICES:
        axes[1].plot(times, [sizes[f"{name}_pool"] for _, _, sizes in history], label=name)
    axes[1].set_ylabel("workers")
    axes[1].set_xlabel("seconds; the mix of requests changes at the dotted line")
    axes[1].legend(fontsize=8, ncols=3)
    middle = len(times) // 2
    for axis in axes:
        axis.axvline((times[middle - 1] + times[middle]) / 2, color="grey", linestyle=":")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
