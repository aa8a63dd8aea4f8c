"""What guidance costs a vLLM server: tokens/s, latencies and memory, guided and not, side by side.

Every arm is a process of its own that sleeps until it is its turn, so that only one computes at a
time and its memory is its own. Each repetition visits every arm at every load with prompts that no
arm has seen, in rotated order. How it is measured and how to read it: docs/serving.md.

    python benchmarks/serving.py            # about 25 minutes on two cores, 16 GB
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
from dataclasses import asdict, astuple, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from _serving_report import markdown, plot

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
BETA = 8.0
UNGUIDED = "vLLM"  # what every ratio is relative to
OBJECTIVES = ("first", "second", "third")  # of the models with random heads

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


@dataclass(frozen=True)
class Arm:
    """What answers the requests.

    Attributes:
        name: As in the tables.
        worker: The process that it runs in.
        objectives: How many the guided requests weigh; 0 is no guidance.
        half: Only every other request is guided, and only the others are measured.
        any_token: Unguided sampling from all tokens rather than the `k` likeliest.
        n: Responses to each request, of which one is delivered.
        form: Of the published loop, "tree" or "copies"; empty for vLLM.
        tokens: Of each response; the slow arms' times are extrapolated to the common number.
    """

    name: str
    worker: str
    objectives: int = 0
    half: bool = False
    any_token: bool = False
    n: int = 1
    form: str = ""
    tokens: int | None = None


MAIN = (Cell(1), Cell(8), Cell(32))
PROMPTS = (Cell(8, 256), Cell(8, 1024))
CANDIDATES = (Cell(8, k=10), Cell(8, k=100))
GRIDS = (*MAIN, *PROMPTS, *CANDIDATES)
SLOW = 10  # tokens of the slow loops' responses

ARMS: dict[Arm, tuple[Cell, ...]] = {
    Arm(UNGUIDED, "vLLM"): GRIDS,
    Arm("vLLM, sampling from all tokens", "vLLM", any_token=True): MAIN,
    Arm("plugin loaded, nobody guided", "action"): MAIN,
    Arm("unguided requests beside guided ones", "action", 3, half=True): MAIN[1:],
    Arm("action head, 1 objective", "action", 1): MAIN,
    Arm("action head, 2 objectives", "action", 2): MAIN,
    Arm("action head, 3 objectives", "action", 3): GRIDS,
    Arm("action head, 3 models of 1 objective", "3 action models", 3): MAIN,
    Arm("state head, 1 objective", "state", 1): MAIN[1:2],
    Arm("state head, 2 objectives", "state", 2): MAIN[1:2],
    Arm("state head, 3 objectives", "state", 3): (*MAIN, *CANDIDATES),
    Arm("state head, pruned, 1 objective", "pruned", 1): MAIN[1:2],
    Arm("state head, pruned, 2 objectives", "pruned", 2): MAIN[1:2],
    Arm("state head, pruned, 3 objectives", "pruned", 3): GRIDS,
    Arm("base-sized action head, 3 objectives", "base-sized", 3): MAIN[:2],
    Arm("3 base-sized action models of 1 objective", "3 base-sized", 3): MAIN[:2],
    Arm("published, tree, 1 objective", "loop", 1, form="tree", tokens=16): MAIN[:2],
    Arm("published, tree, 2 objectives", "loop", 2, form="tree", tokens=16): MAIN[:2],
    Arm("published, tree, 3 objectives", "loop", 3, form="tree", tokens=16): GRIDS,
    Arm("published, copies, 3 objectives", "loop", 3, form="copies", tokens=SLOW): (
        Cell(1),
        Cell(1, 1024),
    ),
    Arm("published, tree, base-sized, 3 objectives", "base-sized loop", 3, form="tree",
        tokens=SLOW): MAIN[:2],
    Arm("published, copies, base-sized, 3 objectives", "base-sized loop", 3, form="copies",
        tokens=SLOW): MAIN[:1],
    Arm("best of 2", "vLLM", n=2): MAIN[:2],
    Arm("best of 4", "vLLM", n=4): MAIN[:2],
    Arm("best of 8", "vLLM", n=8): MAIN[:1],
}  # fmt: skip
# What is compared in output tokens/s, where, and the ratio aimed at (None: 1, within the noise).
COMPARISONS: tuple[tuple[str, str, tuple[Cell, ...], float | None], ...] = (
    ("action head, 3 objectives", UNGUIDED, MAIN[1:], 0.85),
    ("state head, pruned, 3 objectives", UNGUIDED, MAIN[1:], 0.4),
    ("action head, 3 objectives", "published, tree, 3 objectives", MAIN[1:2], 3),
    ("base-sized action head, 3 objectives", "published, tree, base-sized, 3 objectives",
        MAIN[1:2], 10),
    ("3 base-sized action models of 1 objective", "published, tree, base-sized, 3 objectives",
        MAIN[1:2], 10),
    ("plugin loaded, nobody guided", UNGUIDED, MAIN, None),
    ("unguided requests beside guided ones", UNGUIDED, MAIN[1:], None),
)  # fmt: skip
# The cells that cost most are visited this often at the most.
MOST_REPETITIONS = {cell: 2 for cell in PROMPTS}


class Clock:
    """Exclusive seconds spent under each label: a call within a call stops the outer's clock."""

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()
        self._labels = ["rest"]
        self._since = time.perf_counter()

    def lap(self) -> None:
        now = time.perf_counter()
        self.spent[self._labels[-1]] += now - self._since
        self._since = now

    def restart(self) -> None:
        self.lap()
        self.spent.clear()

    def watch(self, owner: tp.Any, name: str, label: str) -> None:
        """Replace a function of a module, class or object by a timed one."""
        inner = getattr(owner, name)

        def timed(*args: tp.Any, **kwargs: tp.Any) -> tp.Any:
            self.lap()
            self._labels.append(label)
            try:
                return inner(*args, **kwargs)
            finally:
                self.lap()
                self._labels.pop()

        setattr(owner, name, timed)


class Job(tp.NamedTuple):
    """What a worker is asked for: responses to some prompts."""

    prompts: list[list[int]]
    max_tokens: int
    k: int
    arm: Arm


class Done(tp.NamedTuple):
    """What it answers."""

    times: list[list[float]]  # of each prompt's tokens, seconds since all were submitted
    spent: dict[str, float]  # seconds by label, after all had their first token
    memory: dict[str, float]  # GB
    candidates: float = 0.0  # of a guided row after pruning, mean


def memory() -> dict[str, float]:
    """Resident memory of this process in GB, now and at its peak."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {key: int(lines[key].split()[0]) / 1e6 for key in ("VmRSS", "VmHWM")}


def start_vllm(base: str, mavis: dict[str, tp.Any] | None, quick: bool) -> tp.Any:
    """An engine of vLLM in this process; returns the function that serves a job, and its facts."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind")
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    clock = Clock()
    options: dict[str, tp.Any] = {}
    facts: dict[str, tp.Any] = {}
    guides: list[tp.Any] = []
    if mavis is not None:
        import trimtab.plugins.guide
        from trimtab.plugins import ValueEngine
        from trimtab.plugins.guide import Guide
        from trimtab.plugins.vllm import MAVISLogitsProcessor

        name = "trimtab.plugins.vllm:MAVISLogitsProcessor"
        options = {"logits_processors": [name], "additional_config": {"mavis": mavis}}
        for method in ("update_state", "apply"):
            clock.watch(MAVISLogitsProcessor, method, "guidance, other")
        clock.watch(trimtab.plugins.guide, "top_candidates", "candidates")
        for method, function in list(vars(ValueEngine).items()):
            if callable(function) and not method.startswith("_"):
                clock.watch(ValueEngine, method, "value model")
        build = Guide.__init__

        def remember(guide: tp.Any, *args: tp.Any, **kwargs: tp.Any) -> None:
            build(guide, *args, **kwargs)
            guides.append(guide)

        Guide.__init__ = remember
    llm = LLM(
        base, dtype="float32" if quick else "bfloat16", enforce_eager=True, max_num_seqs=32,
        max_model_len=256 if quick else 1152, kv_cache_memory_bytes=(16 if quick else 256) << 20,
        distributed_executor_backend="uni", enable_prefix_caching=False, skip_tokenizer_init=True,
        **options,
    )  # fmt: skip
    engine: tp.Any = llm.llm_engine
    for guide in guides:
        facts["objectives"] = list(guide.engine.objectives)
        facts["value weights, GB"] = guide.engine.weight_bytes / 1e9
        facts["value store, GB"] = guide.engine.kv_cache_bytes / 1e9
    runner = engine.model_executor.driver_worker.worker.model_runner
    clock.watch(runner, "_model_forward", "base model")
    clock.watch(runner.model, "compute_logits", "base model")
    clock.watch(runner, "_sample", "sampling")
    submitted = 0

    def serve(job: Job) -> Done:
        nonlocal submitted
        guidance: dict[str, tp.Any] = {"mavis_beta": BETA, "mavis_top_k": job.k}
        if job.arm.objectives:
            chosen = facts["objectives"][: job.arm.objectives]
            guidance["mavis_weights"] = {name: 1 / len(chosen) for name in chosen}
        requests: dict[str, int] = {}
        times: list[list[float]] = [[] for _ in job.prompts]
        for guide in guides:
            guide.rows = guide.candidates = 0
        start = time.perf_counter()
        for i, prompt in enumerate(job.prompts):
            guided = job.arm.objectives > 0 and not (job.arm.half and i % 2)
            # The unguided sample from as many candidates as the guided ones choose from.
            params = SamplingParams(
                n=job.arm.n, max_tokens=job.max_tokens, ignore_eos=True, temperature=1.0,
                top_k=0 if guided or job.arm.any_token else job.k, detokenize=False,
                output_kind=RequestOutputKind.DELTA,
                extra_args=guidance if guided else None,
            )  # fmt: skip
            requests[str(submitted)] = i
            engine.add_request(str(submitted), {"prompt_token_ids": prompt}, params)
            submitted += 1
        while engine.has_unfinished_requests():
            prefilling = not all(times)
            for output in engine.step():
                now = time.perf_counter() - start
                for response in output.outputs:
                    if response.index == 0:  # of best-of-N, one; it ends with the others
                        times[requests[output.request_id]] += [now] * len(response.token_ids)
            if prefilling:
                clock.restart()
        clock.lap()
        left = sum(g.candidates for g in guides) / max(1, sum(g.rows for g in guides))
        return Done(times, dict(clock.spent), memory(), left)

    return serve, facts


def start_loop(base: str, layers: int | None, quick: bool) -> tp.Any:
    """The published algorithm on transformers, with one value model for each objective."""
    import _published
    import torch
    from transformers import AutoModelForCausalLM

    from trimtab.plugins import MAVISValueModel

    # The served model's, as trimtab's value models have it.
    dtype = torch.float32 if quick else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
    models = []
    for name in OBJECTIVES:
        value_model = MAVISValueModel.from_base_model(
            model, [name], num_hidden_layers=layers, dtype=dtype
        )
        random_heads(value_model)
        models.append(value_model.eval())
    clock = Clock()
    clock.watch(model, "forward", "base model")
    for form in _published.FORMS.values():
        clock.watch(form, "values", "value model")

    def serve(job: Job) -> Done:
        times: list[list[float]] = [[] for _ in job.prompts]
        count = job.arm.objectives
        start = time.perf_counter()
        for _ in _published.generate(
            model, models[:count], job.prompts, weights=[1 / count] * count, beta=BETA,
            top_k=job.k, max_tokens=job.max_tokens, form=job.arm.form,
        ):  # fmt: skip
            now = time.perf_counter() - start
            if not times[0]:
                clock.restart()
            for of_prompt in times:
                of_prompt.append(now)
        clock.lap()
        return Done(times, dict(clock.spent), memory())

    return serve, {}


def random_heads(model: tp.Any) -> None:
    """Heads start at zero, which guides nowhere."""
    import torch

    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if not name.startswith("backbone."):
            torch.nn.init.normal_(parameter, std=0.02)


def make_models(folder: str, base: str, quick: bool) -> None:
    """Value models with random heads into `folder`, where speed is all that is asked of them."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from trimtab.plugins import MAVISValueModel

    def make(name: str, objectives: tp.Sequence[str], layers: int | None, head_type: str) -> None:
        value_model = MAVISValueModel.from_base_model(
            model,
            objectives,
            num_hidden_layers=layers,
            dtype=dtype,
            head_type=head_type,
            candidate_range=[1.0] * len(objectives),
        )
        random_heads(value_model)
        value_model.save_pretrained(Path(folder, name))

    if quick:
        config = LlamaConfig(
            vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=3, head_dim=32,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
        )  # fmt: skip
        model, dtype, layers = LlamaForCausalLM(config), torch.float32, 2
        model.save_pretrained(base)
        make("state", OBJECTIVES, layers, "state")
        make("action", OBJECTIVES, layers, "action")
        return
    dtype = torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    make("base-sized", OBJECTIVES, None, "action")
    for name in OBJECTIVES:
        make(f"action-{name}", [name], 4, "action")
        make(f"base-sized-{name}", [name], None, "action")


def work(pipe: tp.Any, log: str, start: tp.Callable[..., tp.Any], *arguments: tp.Any) -> None:
    """A worker: starts, then serves the jobs that come through the pipe until None comes."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    serve, facts = start(*arguments)
    pipe.send((facts, memory()))
    while (job := pipe.recv()) is not None:
        pipe.send(serve(job))


class Worker:
    """A process and the pipe to it; it sleeps between jobs."""

    def __init__(self, name: str, folder: str, start: tp.Callable[..., tp.Any], *args: tp.Any):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.log = Path(folder, f"{name}.log")
        self.process = context.Process(
            target=work, args=(other, str(self.log), start, *args), daemon=True
        )
        self.process.start()
        other.close()

    def receive(self) -> tp.Any:
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])
            raise RuntimeError(f"a worker ended, its log:\n{tail}") from None

    def ask(self, job: Job) -> Done:
        self.pipe.send(job)
        return self.receive()

    def end(self) -> None:
        self.pipe.send(None)
        self.process.join()


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
    for (arm, cell), rows in sorted(
        runs.items(),
        key=lambda item: (astuple(item[0][1])[1:], item[0][1].load, order.index(item[0][0])),
    ):
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


def processes(options: argparse.Namespace, folder: str) -> dict[str, tuple[tp.Any, ...]]:
    """What each worker starts with: the function and its arguments."""
    base, quick = options.base, options.quick

    def vllm(*models: str, **config: tp.Any) -> tuple[tp.Any, ...]:
        return start_vllm, base, {"value_models": list(models), **config}, quick

    def made(name: str) -> list[str]:
        return [str(Path(folder, f"{name}-{objective}")) for objective in OBJECTIVES]

    every: dict[str, tuple[tp.Any, ...]] = {
        "vLLM": (start_vllm, base, None, quick),
        "action": vllm(options.action_model),
        "pruned": vllm(options.state_model, prune_eps=options.prune_eps),
        "loop": (start_loop, base, 2 if quick else 4, quick),
    }
    if quick:
        return every
    return every | {
        "state": vllm(options.state_model),
        "3 action models": vllm(*made("action")),
        "base-sized": vllm(str(Path(folder, "base-sized"))),
        "3 base-sized": vllm(*made("base-sized")),
        "base-sized loop": (start_loop, base, None, quick),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="a smoke test: tiny models, writes no file")
    add("--base", default=str(ROOT / "artifacts" / "smollm2"))
    add("--state-model", default=str(ROOT / "artifacts" / "value_model"))
    add("--action-model", default=str(ROOT / "artifacts" / "action_model"))
    add("--prune-eps", type=float, default=0.001)
    add("--repetitions", type=int, default=3)
    add("--tokens", type=int, default=32, help="of each response (default: %(default)s)")
    add("--only", default="", help="comma-separated workers; then writes no file")
    options = parser.parse_args()
    for path in (options.base, options.state_model, options.action_model):
        if not options.quick and not Path(path, "config.json").exists():
            parser.error(f"there is no model in {path}; examples/demo.py makes them (`make demo`)")
    return options


def main() -> None:
    options = arguments()
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    arms, tokens, repetitions = ARMS, options.tokens, options.repetitions
    with tempfile.TemporaryDirectory() as folder:
        if options.quick:
            tokens, repetitions, options.base = 6, 2, str(Path(folder, "base"))
            options.state_model, options.action_model = f"{folder}/state", f"{folder}/action"
            arms = {arm: (Cell(2, 12, 10),) for arm in ARMS}
        spawn = multiprocessing.get_context("spawn")
        maker = spawn.Process(target=make_models, args=(folder, options.base, options.quick))
        maker.start()
        maker.join()
        starts = processes(options, folder)
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
