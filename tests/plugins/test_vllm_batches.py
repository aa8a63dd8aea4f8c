"""The processor's two protocols against a naive computation, over a persistent batch of requests.

What vLLM's own tests of logits processors do: requests join, grow, leave, are preempted and
resumed, and move between rows, for thousands of steps. No engine runs: every step can be checked.
"""

from __future__ import annotations

import random
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.conftest import VOCAB_SIZE
from tests.plugins.test_vllm import sampling, vllm_config
from tests.reference import Reference

ROWS, MAX_LENGTH, BETA = 4, 64, 2.0
WEIGHTS = [(1.0, 0.0), (0.5, -1.0), (0.0, 0.0), (0.0, 1.0)]


@dataclass(eq=False)
class Request:
    weights: tuple[float, ...]
    prompt: list[int]
    output: list[int] = field(default_factory=list)
    computed: int = 0  # tokens that the base model has seen
    top_k: int = 6

    @property
    def tokens(self):
        return self.prompt + self.output

    @property
    def guided(self):
        return any(self.weights)

    @property
    def samples(self):
        return self.computed == len(self.tokens)

    @property
    def params(self):
        return sampling(self.weights, extra_args={"mavis_top_k": self.top_k})


class Scheduler:
    """Which requests wait and run, and how much of each is computed in a step."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.waiting = []

    def new_request(self):
        text = random.Random(self.rng.randrange(3))  # many begin alike
        prompt = [text.randrange(3, VOCAB_SIZE) for _ in range(self.rng.randrange(1, 45))]
        return Request(self.rng.choice(WEIGHTS), prompt, top_k=self.rng.choice([6, 6, 3]))

    def next_request(self):
        if self.waiting and self.rng.random() < 0.5:
            return self.waiting.pop(self.rng.randrange(len(self.waiting)))
        return self.new_request()

    def leaves(self, request):
        """Whether a request is done, or preempted, to be computed again from its first token."""
        done = len(request.tokens) >= MAX_LENGTH - 1 or self.rng.random() < 0.05
        if not done and self.rng.random() < 0.05:
            request.computed = 0
            self.waiting.append(request)
            return True
        return done

    def compute(self, request):
        """The base model's share of a step."""
        left = len(request.tokens) - request.computed
        request.computed += left if self.rng.random() < 0.7 else self.rng.randint(1, left)


@contextmanager
def sometimes_failing(processor, rng):
    """One step in 20 runs out of memory after some of its passes; yields whether it did."""
    engine, failed = processor._guide.engine, []
    run, left = engine._run, rng.randrange(3) if rng.random() < 0.05 else 1 << 30

    def failing(*arguments):
        nonlocal left
        left -= 1
        if left < 0:
            failed.append(True)
            raise RuntimeError("out of memory")
        return run(*arguments)

    engine._run = failing
    yield failed
    engine._run = run


@torch.no_grad()
def check(reference, request, before, after, failed):
    """One row's logits, before and after the processor."""
    if not request.guided or not request.samples or failed:
        assert after.equal(before)
        return
    top, candidates = before.topk(request.top_k)
    prefix = torch.tensor(request.tokens)
    continued = torch.cat((prefix.expand(request.top_k, -1), candidates[:, None]), 1)
    values = reference.values[0](continued).logits[:, -1]
    policy = (top + BETA * values @ torch.tensor(request.weights)).softmax(0)
    expected = torch.zeros(VOCAB_SIZE).scatter(0, candidates, policy)
    torch.testing.assert_close(after.softmax(0), expected, rtol=1e-3, atol=1e-4)


def random_logits(rows, generator):
    logits = 2 * torch.randn(rows, VOCAB_SIZE, generator=generator)
    return logits.masked_fill(torch.rand(logits.shape, generator=generator) < 0.3, -torch.inf)


def config_of(base_model, value_model):
    return vllm_config(
        base_model,
        # Room for little more than one request, so that stored prefixes are evicted.
        {"value_models": [str(value_model)], "beta": BETA,
         "kv_cache_memory_gib": 5 * 32 * 1024 / 2**30},
    )  # fmt: skip


@pytest.fixture(scope="module")
def reference(base_model, value_model):
    return Reference(base_model, [value_model])


def steps():
    return 20 * settings.default.max_examples


def test_the_v1_protocol_over_thousands_of_steps(base_model, value_model, reference):
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

    from trimtab.plugins.vllm import MAVISLogitsProcessor

    processor = MAVISLogitsProcessor(config_of(base_model, value_model), torch.device("cpu"), False)
    scheduler, generator = Scheduler(0), torch.Generator().manual_seed(0)
    rng, batch = scheduler.rng, {}  # request by row
    processor._runner = SimpleNamespace(
        partial=lambda rows: (
            np.array([not batch[row].samples for row in rows]),
            np.array([batch[row].computed for row in rows]),
        )
    )
    for _ in range(steps()):
        removed = sorted((row for row in batch if scheduler.leaves(batch[row])), reverse=True)
        for row in removed:
            del batch[row]
        added, moved = [], []
        while len(batch) < ROWS and rng.random() < 0.6:
            # A new request takes the first free row, which is then not reported as removed.
            row = next(row for row in range(ROWS) if row not in batch)
            request = batch[row] = scheduler.next_request()
            removed = [r for r in removed if r != row]
            added.append((row, request.params, request.prompt, request.output))
        while batch and max(batch) >= len(batch):  # the batch is condensed
            last, hole = max(batch), next(row for row in range(ROWS) if row not in batch)
            batch[hole] = batch.pop(last)
            moved.append((last, hole, MoveDirectionality.UNIDIRECTIONAL))
        if len(batch) > 1 and rng.random() < 0.2:
            a, b = rng.sample(sorted(batch), 2)
            batch[a], batch[b] = batch[b], batch[a]
            moved.append((a, b, MoveDirectionality.SWAP))
        # The newest token is a placeholder until `apply`, where scheduling is asynchronous.
        hidden = {
            row: r.output.pop() for row, r in batch.items() if r.output and rng.random() < 0.5
        }
        for row in hidden:
            batch[row].output.append(-1)
        changed = removed or added or moved
        processor.update_state(BatchUpdate(len(batch), removed, added, moved) if changed else None)
        for row, token in hidden.items():
            batch[row].output[-1] = token
        if not batch:
            continue
        for request in batch.values():
            scheduler.compute(request)
        logits = random_logits(len(batch), generator)
        with sometimes_failing(processor, rng) as failed:
            out = processor.apply(logits.clone())
        for row, request in batch.items():
            check(reference, request, logits[row], out[row], failed)
            if request.samples:
                request.output.append(rng.randrange(3, VOCAB_SIZE))
    assert set(processor.failures) == {"RuntimeError"}


class V2Runner:
    """The state of vLLM's V2 runner that a processor reads, and its slots."""

    def __init__(self, device="cpu"):
        self.tokens = torch.zeros(ROWS, MAX_LENGTH, dtype=torch.int32)
        self.prefill = np.zeros(ROWS, dtype=np.int32)
        self.states = SimpleNamespace(
            device=torch.device(device),
            max_num_reqs=ROWS,
            vocab_size=VOCAB_SIZE,
            all_token_ids=SimpleNamespace(gpu=self.tokens),
            prefill_len=SimpleNamespace(np=self.prefill),
        )
        self.free = list(range(ROWS))

    def context(self, slots, requests, device="cpu"):
        lengths = np.array([request.computed for request in requests], dtype=np.int32)
        rows = torch.tensor(slots)
        return SimpleNamespace(
            expanded_idx_mapping=rows.to(device),
            idx_mapping=rows.to(device),
            idx_mapping_np=np.array(slots),
            input_ids=self.tokens[rows, torch.from_numpy(lengths - 1).long()].to(device),
            pos=torch.from_numpy(lengths - 1).to(device),
            seq_lens_upper_bound_np=lengths,
        )


def test_the_v2_protocol_over_thousands_of_steps(base_model, value_model, reference):
    from trimtab.plugins.vllm import MAVISLogitsProcessor

    runner = V2Runner()
    processor = MAVISLogitsProcessor(config_of(base_model, value_model), runner.states)
    scheduler, generator = Scheduler(1), torch.Generator().manual_seed(1)
    rng, running = scheduler.rng, {}  # request by slot
    for _ in range(steps()):
        for slot in [slot for slot in running if scheduler.leaves(running[slot])]:
            del running[slot]
            runner.free.insert(rng.randrange(len(runner.free) + 1), slot)
        while runner.free and rng.random() < 0.6:
            slot, request = runner.free.pop(), scheduler.next_request()
            running[slot] = request
            tokens = request.tokens
            runner.tokens[slot, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
            runner.prefill[slot] = len(tokens)
            assert processor.add_request(slot, request.params) == request.guided
        processor.apply_staged_writes()
        slots = [slot for slot in running if rng.random() < 0.8]
        rng.shuffle(slots)
        if not slots:
            continue
        requests = [running[slot] for slot in slots]
        for request in requests:
            scheduler.compute(request)
        logits = random_logits(len(slots), generator)
        with sometimes_failing(processor, rng) as failed:
            out = processor.apply(logits.clone(), runner.context(slots, requests))
        for row, (slot, request) in enumerate(zip(slots, requests)):
            check(reference, request, logits[row], out[row], failed)
            if request.samples:
                runner.tokens[slot, len(request.tokens)] = token = rng.randrange(3, VOCAB_SIZE)
                request.output.append(token)
    assert set(processor.failures) == {"RuntimeError"}


class BlockingCopies(TorchDispatchMode):
    """Notes what would make the host wait for a device: it stands in for one as `meta`.

    A copy from pageable memory, or an index of the host's into the device's tensor, waits until the
    device has done all that was launched before. What `devices.to_device` copies is pinned.
    """

    def __init__(self, monkeypatch):
        super().__init__()
        self.found, self.allowed = [], 0

        def to_device(host, device):
            self.allowed += 1
            copied = host.to(device)
            self.allowed -= 1
            return copied

        def to_host(tensor):
            self.on_host.append(tensor.shape)
            return torch.ones(tensor.shape), lambda: True

        self.on_host = []
        monkeypatch.setattr("trimtab.plugins.metrics.to_host", to_host)
        for module in ("engine", "guide", "vllm"):
            monkeypatch.setattr(f"trimtab.plugins.{module}.to_device", to_device)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        tensors = [x for x in tree_leaves((given, out)) if isinstance(x, torch.Tensor)]
        on_host = [x for x in given if x.device.type == "cpu" and x.ndim]
        if on_host and any(x.device.type == "meta" for x in tensors) and not self.allowed:
            self.found.append(str(op))
        return out


def on_meta(processor, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())  # it has none
    engine = processor._guide.engine
    meta = engine.device = torch.device("meta")
    for model in engine.models:
        model.to(meta)
    engine._stores = [[layer.to(meta) for layer in store] for store in engine._stores]
    processor._guide._prunes = False  # as on every device but a CPU


@pytest.mark.parametrize("guided", [[0, 1, 2], [0, 2]], ids=["all guided", "mixed"])
@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_no_batch_waits_for_the_device(base_model, value_model, monkeypatch, runner, guided):
    from vllm.v1.sample.logits_processor import BatchUpdate

    from trimtab.plugins.vllm import MAVISLogitsProcessor

    state = V2Runner()
    config = config_of(base_model, value_model)
    arguments = (torch.device("cpu"), False) if runner == "V1" else (state.states,)
    processor = MAVISLogitsProcessor(config, *arguments)
    on_meta(processor, monkeypatch)
    requests = [
        Request((float(i in guided), 0.0), [5, 6 + i, 7], computed=3, top_k=3 + i) for i in range(3)
    ]
    if runner == "V1":
        added = [(i, r.params, r.prompt, r.output) for i, r in enumerate(requests)]
        processor.update_state(BatchUpdate(3, [], added, []))
    else:
        for slot, request in enumerate(requests):
            processor.add_request(slot, request.params)
    copies = BlockingCopies(monkeypatch)
    for _ in range(3):
        context = state.context([0, 1, 2], requests, "meta") if runner == "V2" else None
        with copies:
            processor.apply(torch.empty(3, VOCAB_SIZE, device="meta"), context)
        for slot, request in enumerate(requests):
            request.output.append(9)
            request.computed += 1
            state.prefill[slot] = 3
    assert not copies.found and not processor.failures
    assert copies.on_host == [(2, len(guided))] * 3, "what metrics tell of"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_that_fails_is_unguided_and_counted(base_model, value_model, caplog, ranks):
    """Where there is no other rank that could have guided: ranks would drift apart in silence."""
    from vllm.v1.sample.logits_processor import BatchUpdate

    from trimtab.plugins.vllm import MAVISLogitsProcessor

    processor = MAVISLogitsProcessor(config_of(base_model, value_model), torch.device("cpu"), False)
    processor._ranks = ranks
    request = Request((1.0, 0.0), [5, 6, 7])
    processor.update_state(BatchUpdate(1, [], [(0, request.params, request.prompt, [])], []))
    logits, engine = torch.randn(1, VOCAB_SIZE), processor._guide.engine
    run = engine._run

    def out_of_memory(*arguments):
        raise RuntimeError("out of memory")

    engine._run = out_of_memory
    if ranks > 1:
        with pytest.raises(RuntimeError, match="out of memory"):
            processor.apply(logits.clone())
        return
    for _ in range(3):
        assert processor.apply(logits.clone()).equal(logits)
    assert processor.failures == {"RuntimeError": 3}
    engine._run = run
    expected = MAVISLogitsProcessor(config_of(base_model, value_model), torch.device("cpu"), False)
    expected.update_state(BatchUpdate(1, [], [(0, request.params, request.prompt, [])], []))
    torch.testing.assert_close(processor.apply(logits.clone()), expected.apply(logits.clone()))


def test_an_entry_point_under_asynchronous_scheduling_is_refused(base_model, value_model):
    """vLLM leaves placeholders in the token ids of processors that no flag names."""
    from trimtab.plugins.vllm import MAVISLogitsProcessor

    config = config_of(base_model, value_model)
    config.scheduler_config.async_scheduling = True
    with pytest.raises(ValueError, match="loaded as an entry point under asynchronous scheduling"):
        MAVISLogitsProcessor(config, torch.device("cpu"), False)
    config.model_config.logits_processors = ["trimtab.plugins.vllm:MAVISLogitsProcessor"]
    assert MAVISLogitsProcessor(config, torch.device("cpu"), False)
