"""What guidance costs a vLLM server: tokens/s, latencies and memory, guided and not, side by side.

Every arm is a process of its own that sleeps until it is its turn, so that only one computes at a
time and its memory is its own. Each repetition visits every arm at every load with prompts that no
arm has seen, in rotated order. How it is measured and how to read it: docs/serving.md.

    python benchmarks/serving.py            # less than half an hour on two cores, 16 GB
    python benchmarks/serving.py --quick    # tiny random models; writes no file
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
import typing as tp
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from _serving_report import markdown, plot
from _serving_workers import (
    BETA,
    Arm,
    Done,
    Job,
    Worker,
    make_models,
    start_loop,
    start_vllm,
)

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
UNGUIDED = "vLLM"  # what every ratio is relative to

TOPICS = (
    "the sea", "a small town", "bread", "winter", "an old bridge", "jazz", "the night sky", "bees",
    "a long journey", "chess", "mountains", "coffee", "the library", "rain", "friendship", "maps",
    "a lighthouse", "gardens", "the future", "bicycles", "tea", "silence", "a river", "stories",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A load: requests at once, tokens of each prompt, candidates."""

    load: int
    prompt: int = 32
    k: int = 40


MAIN = (Cell(1), Cell(8), Cell(32))
PROMPTS = (Cell(8, 256), Cell(8, 1024))
CANDIDATES = (Cell(8, k=10), Cell(8, k=100))
GRIDS = (*MAIN, *PROMPTS, *CANDIDATES)
SLOW = 10  # tokens of the slow loops' responses

ARMS: dict[Arm, tuple[Cell, ...]] = {
    Arm(UNGUIDED, "vLLM"): GRIDS,
    Arm("vLLM, sampling from all tokens", "vLLM", any_token=True): MAIN,
    Arm("plugin loaded, nobody guided", "heads"): MAIN,
    Arm("unguided requests beside guided ones", "heads", 4, half=True): MAIN[1:],
    Arm("heads, 1 objective", "heads", 1): MAIN,
    Arm("heads, 4 objectives", "heads", 4): GRIDS,
    Arm("state head, 1 objective", "state", 1): MAIN[1:2],
    Arm("state head, 2 objectives", "state", 2): MAIN[1:2],
    Arm("state head, 3 objectives", "state", 3): (*MAIN, *CANDIDATES),
    Arm("state head, pruned, 1 objective", "pruned", 1): MAIN[1:2],
    Arm("state head, pruned, 2 objectives", "pruned", 2): MAIN[1:2],
    Arm("state head, pruned, 3 objectives", "pruned", 3): GRIDS,
    Arm("published loop without guidance", "loop", form="tree", tokens=16): MAIN[:2],
    Arm("published, tree, 1 objective", "loop", 1, form="tree", tokens=16): MAIN[:2],
    Arm("published, tree, 2 objectives", "loop", 2, form="tree", tokens=16): MAIN[:2],
    Arm("published, tree, 3 objectives", "loop", 3, form="tree", tokens=16): GRIDS,
    Arm("published, copies, 3 objectives", "loop", 3, form="copies", tokens=SLOW): (
        Cell(1),
        Cell(1, 1024),
    ),
    Arm("best of 2", "vLLM", n=2): MAIN[:2],
    Arm("best of 4", "vLLM", n=4): MAIN[:2],
    Arm("best of 8", "vLLM", n=8): MAIN[:1],
}  # fmt: skip
# What is compared in output tokens/s, where, and the ratio aimed at (None: 1, within the noise).
COMPARISONS: tuple[tuple[str, str, tuple[Cell, ...], float | None], ...] = (
    ("heads, 4 objectives", UNGUIDED, MAIN, 0.96),
    ("unguided requests beside guided ones", UNGUIDED, MAIN[1:], 0.97),
    ("plugin loaded, nobody guided", UNGUIDED, MAIN, None),
    ("state head, pruned, 3 objectives", UNGUIDED, MAIN[1:2], 0.4),
)
# The cells that cost most are visited this often at the most.
MOST_REPETITIONS = {cell: 2 for cell in PROMPTS}


class Prompts:
    """Chat prompts of an exact number of tokens, each different, the same for every arm."""

    def __init__(self, base: str, quick: bool) -> None:
        self.encode: tp.Any = None
        if not quick:
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(str(Path(base, "tokenizer.json")))
            self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
            self.filling = self.encode((ROOT / "LICENSE").read_text())

    def __call__(self, cell: Cell, seed: int) -> list[list[int]]:
        rng = np.random.default_rng((seed, cell.load, cell.prompt))
        if self.encode is None:
            return rng.integers(3, 512, (cell.load, cell.prompt)).tolist()
        prompts = []
        for topic in rng.choice(TOPICS, cell.load):
            ending = f"\n\nWrite a few sentences about {topic}.<|im_end|>\n<|im_start|>assistant\n"
            head, tail = self.encode("<|im_start|>user\n"), self.encode(ending)
            start, n = rng.integers(len(self.filling) - 1200), cell.prompt - len(head) - len(tail)
            prompts.append(head + self.filling[start : start + n] + tail)
        return prompts


def measured(arm: Arm, cell: Cell, done: Done, tokens: int) -> dict[str, tp.Any]:
    """One run: seconds until all requests had `tokens` tokens, latencies, where the time went."""
    times = [t for i, t in enumerate(done.times) if not arm.half or i % 2]
    gaps = np.diff(times, axis=1)
    wall = max(t[-1] for t in times)
    if len(times[0]) < tokens:
        wall += (tokens - len(times[0])) * float(gaps.mean())
    return {
        "wall_s": wall,
        # Of half of the requests, the rate that all would have had.
        "tokens_per_s": cell.load * tokens / wall,
        "ttft_ms": 1e3 * float(np.median([t[0] for t in times])),
        "gaps_ms": (1e3 * gaps).ravel(),
        "spent": done.spent,
        "steps": len(times[0]) - 1,
        "candidates": done.candidates,
    }


def spread(values: tp.Sequence[float]) -> dict[str, float]:
    return {"median": float(np.median(values)), "min": min(values), "max": max(values)}


def summarise(runs: dict[tuple[Arm, Cell], dict[int, tp.Any]]) -> list[dict[str, tp.Any]]:
    """A row for each arm and cell; ratios are of runs of the same repetition."""
    unguided = {cell: rows for (arm, cell), rows in runs.items() if arm.name == UNGUIDED}
    affordable: dict[Cell, list[tuple[int, dict[int, tp.Any]]]] = defaultdict(list)
    for (arm, cell), rows in runs.items():
        if arm.worker == "vLLM" and not arm.any_token:
            affordable[cell].append((arm.n, rows))
    table = []
    order = list(ARMS)
    for arm, cell in sorted(
        runs, key=lambda at: (at[1].prompt, at[1].k != 40, at[1].k, at[1].load, order.index(at[0]))
    ):
        rows = runs[arm, cell]
        gaps = np.concatenate([row["gaps_ms"] for row in rows.values()])
        steps = sum(row["steps"] for row in rows.values())
        spent: Counter[str] = Counter()
        for row in rows.values():
            spent.update(row["spent"])
        entry = {
            "arm": arm.name,
            **asdict(cell),
            "repetitions": len(rows),
            "tokens_per_s": spread([row["tokens_per_s"] for row in rows.values()]),
            "ttft_ms": spread([row["ttft_ms"] for row in rows.values()]),
            "itl_p50_ms": float(np.percentile(gaps, 50)),
            "itl_p99_ms": float(np.percentile(gaps, 99)),
            "candidates_left": float(np.mean([row["candidates"] for row in rows.values()])),
            "ms_per_step_by_part": {k: 1e3 * v / steps for k, v in sorted(spent.items())},
        }
        if cell in unguided:
            pairs = [(row, unguided[cell][i]) for i, row in rows.items()]
            ratios = [plain["wall_s"] / row["wall_s"] for row, plain in pairs]
            entry["relative_to_unguided"] = spread(ratios)
        points = sorted(affordable.get(cell, []), key=lambda point: point[0])
        if len(points) > 1 and arm.objectives and not arm.half:
            walls = [float(np.median([row["wall_s"] for row in r.values()])) for _, r in points]
            walls = np.maximum.accumulate(walls).tolist()  # more responses never take less
            own = float(np.median([row["wall_s"] for row in rows.values()]))
            n = float(np.interp(own, walls, [n for n, _ in points]))
            entry["best_of_at_equal_time"] = f"{'over ' if own > walls[-1] else ''}{n:.1f}"
        table.append(entry)
    return table


def compare(runs: dict[tuple[Arm, Cell], dict[int, tp.Any]]) -> list[dict[str, tp.Any]]:
    """The ratios that have a target, each of runs of the same repetition."""
    by_name = {(arm.name, cell): rows for (arm, cell), rows in runs.items()}
    found = []
    for name, other, cells, at_least in COMPARISONS:
        for cell in cells:
            rows, others = by_name.get((name, cell), {}), by_name.get((other, cell), {})
            if shared := sorted(rows.keys() & others.keys()):
                ratio = spread([others[i]["wall_s"] / rows[i]["wall_s"] for i in shared])
                entry = {"arm": name, "relative_to": other, **asdict(cell), "ratio": ratio}
                found.append({**entry, "at_least": at_least})
    return found


def processes(options: argparse.Namespace) -> dict[str, tuple[tp.Any, ...]]:
    """What each worker starts with: the function and its arguments."""
    base, quick = options.base, options.quick

    def vllm(model: str, **config: tp.Any) -> tuple[tp.Any, ...]:
        return start_vllm, base, {"value_models": [model], **config}, quick

    every: dict[str, tuple[tp.Any, ...]] = {
        "vLLM": (start_vllm, base, None, quick),
        "heads": vllm(options.heads_model),
        "pruned": vllm(options.state_model, prune_eps=options.prune_eps),
        "loop": (start_loop, base, 2 if quick else 4, quick),
    }
    if quick:
        return every
    return every | {"state": vllm(options.state_model)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="a smoke test: tiny models, writes no file")
    add("--base", default=str(ROOT / "artifacts" / "smollm2"))
    add("--state-model", default=str(ROOT / "artifacts" / "state"))
    add("--heads-model", default=str(ROOT / "artifacts" / "value_model"))
    add("--prune-eps", type=float, default=0.001)
    add("--repetitions", type=int, default=3)
    add("--tokens", type=int, default=32, help="of each response (default: %(default)s)")
    add("--only", default="", help="comma-separated workers; then writes no file")
    options = parser.parse_args()
    for path in (options.base, options.state_model, options.heads_model):
        if not options.quick and not Path(path, "config.json").exists():
            parser.error(
                f"there is no model in {path}: `make demo` makes the base model and the heads, and "
                "benchmarks/heads.py says how to train a state head"
            )
    return options


def main() -> None:
    options = arguments()
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    arms, tokens, repetitions = ARMS, options.tokens, options.repetitions
    with tempfile.TemporaryDirectory() as folder:
        if options.quick:
            tokens, repetitions, options.base = 6, 2, str(Path(folder, "base"))
            options.state_model, options.heads_model = f"{folder}/state", f"{folder}/heads"
            arms = {arm: (Cell(2, 12, 10),) for arm in ARMS}
            spawn = multiprocessing.get_context("spawn")
            maker = spawn.Process(target=make_models, args=(folder, options.base))
            maker.start()
            maker.join()
        starts = processes(options)
        only = [name for name in options.only.split(",") if name] or list(starts)
        workers = {name: Worker(name, folder, *starts[name]) for name in only}
        arms = {arm: cells for arm, cells in arms.items() if arm.worker in workers}
        facts = {}
        for name, worker in workers.items():
            fact, resident = worker.receive()
            facts[name] = {**fact, "start": resident["VmRSS"], "after_each_repetition": []}
        prompts = Prompts(options.base, options.quick)
        result = run(workers, facts, arms, prompts, tokens, repetitions)
        for worker in workers.values():
            worker.end()
    if options.quick or options.only:
        print(markdown(result))
        return
    save(result, options)


def run(
    workers: dict[str, Worker],
    facts: dict[str, dict[str, tp.Any]],
    arms: dict[Arm, tuple[Cell, ...]],
    prompts: Prompts,
    tokens: int,
    repetitions: int,
) -> dict[str, tp.Any]:
    """Every arm at every load, in turn."""
    cells = list(dict.fromkeys(cell for of_arm in arms.values() for cell in of_arm))
    for arm in arms:  # the first run of anything is slower
        cell = arms[arm][0]
        workers[arm.worker].ask(Job(prompts(cell, repetitions), 2, cell.k, arm))
    runs: dict[tuple[Arm, Cell], dict[int, tp.Any]] = defaultdict(dict)
    begin = time.monotonic()
    for repetition in range(repetitions):
        for number, cell in enumerate(cells):
            if repetition >= MOST_REPETITIONS.get(cell, repetitions):
                continue
            batch = prompts(cell, repetition)
            there = [arm for arm, of_arm in arms.items() if cell in of_arm]
            first = (repetition * len(there)) // repetitions + number  # another arm each time
            for arm in (*there[first % len(there) :], *there[: first % len(there)]):
                count = min(arm.tokens or tokens, tokens)
                done = workers[arm.worker].ask(Job(batch, count, cell.k, arm))
                runs[arm, cell][repetition] = row = measured(arm, cell, done, tokens)
                facts[arm.worker]["peak"] = done.memory["VmHWM"]
                facts[arm.worker]["now"] = done.memory["VmRSS"]
                print(
                    f"{time.monotonic() - begin:6.0f} s  {arm.name:45s} {cell.load:2d} x "
                    f"{cell.prompt:4d}  k {cell.k:3d}  {row['tokens_per_s']:7.1f} tokens/s",
                    flush=True,
                )
        for fact in facts.values():
            fact["after_each_repetition"].append(fact.get("now", fact["start"]))
    return {"rows": summarise(runs), "comparisons": compare(runs), "memory": facts}


def save(result: dict[str, tp.Any], options: argparse.Namespace) -> None:
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    packages = ("trimtab", "torch", "transformers", "vllm")
    content = {
        "versions": {name: version(name) for name in packages},
        "python": platform.python_version(),
        "cpu": cpu[0].split(":")[1].strip() if cpu else platform.machine(),
        "threads": int(os.environ["OMP_NUM_THREADS"]),
        "settings": {"beta": BETA, "tokens": options.tokens, "prune_eps": options.prune_eps},
        **result,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "serving.json").write_text(json.dumps(content, indent=1) + "\n")
    (RESULTS / "serving.md").write_text(markdown(result))
    print(markdown(result))
    plot(result["rows"], ROOT / "docs" / "serving.png")


if __name__ == "__main__":
    sys.exit(main())
