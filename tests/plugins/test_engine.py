"""The incremental engine against a plain full forward over `prefix + candidate`."""

from __future__ import annotations

import contextlib
import copy

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from trimtab.plugins import MAVISValueConfig, MAVISValueModel, ValueEngine

VOCAB, MAX_LENGTH, K = 53, 96, 4
BACKBONES = {
    "llama": (LlamaConfig, {}),
    "llama without groups": (LlamaConfig, {"num_key_value_heads": 4}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
    "mistral sliding": (MistralConfig, {"sliding_window": 9}),
    "gemma2 softcap": (Gemma2Config, {"sliding_window": 7}),
    "gemma3 sliding": (Gemma3TextConfig, {"sliding_window": 5}),
}


def make_model(
    name: str = "llama", objectives=("a", "b"), seed: int = 0, options=None, **fields
) -> MAVISValueModel:
    torch.manual_seed(seed)
    kind, own = BACKBONES[name]
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    backbone = kind(
        vocab_size=VOCAB, max_position_embeddings=128, **{**sizes, **own, **(options or {})}
    )
    config = MAVISValueConfig(backbone_config=backbone, objectives=list(objectives), **fields)
    model = MAVISValueModel(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def plain(model: MAVISValueModel) -> MAVISValueModel:
    """A copy for full forward passes with transformers' plainest attention."""
    model = copy.deepcopy(model)
    model.backbone.set_attn_implementation("eager")
    return model


@torch.no_grad()
def full_forward(models, prefix, candidates) -> torch.Tensor:
    tokens = torch.tensor([[*prefix, c] for c in candidates])
    return torch.cat([model(tokens).logits[:, -1] for model in models], dim=1)


def engine_values(engine, sequences, slots, candidates, counts=None):
    return engine.values(
        np.array(slots),
        np.array([len(sequences[s]) for s in slots]),
        torch.tensor([sequences[s][-1] for s in slots]),
        torch.as_tensor(candidates),
        lambda slot, start, stop: sequences[slot][start:stop],
        counts,
    )


MODELS = [
    make_model("llama", ("a", "b")),
    make_model("mistral sliding", ("c",), seed=1),
    make_model("llama", ("d", "e"), seed=2),
]
PLAIN = [plain(model) for model in MODELS]
TOKEN_BYTES = 3 * 2 * 2 * 8 * 4 * len(MODELS)


class Sequences(RuleBasedStateMachine):
    """Sequences that join, grow, are cut, leave and move between slots, in a store too small.

    Many begin alike, and so share blocks. Passes are interrupted, and sequences shrink unannounced.
    """

    @initialize(
        blocks=st.integers(3, 9),
        prefill=st.sampled_from([7, 64]),
        used=st.lists(st.sampled_from(range(len(MODELS))), min_size=1, unique=True),
    )
    def start(self, blocks, prefill, used):
        self.reference = [PLAIN[i] for i in used]
        self.engine = ValueEngine(
            copy.deepcopy([MODELS[i] for i in used]),
            num_slots=5,
            max_length=MAX_LENGTH,
            kv_cache_memory=(blocks + 1) * 32 * TOKEN_BYTES * len(used) // len(MODELS),
            prefill_tokens=prefill,
        )
        self.sequences: dict[int, list[int]] = {}

    @rule(
        slot=st.integers(0, 4),
        length=st.integers(1, MAX_LENGTH),
        seed=st.integers(0, 1),
        differs=st.integers(0, MAX_LENGTH),
    )
    def join(self, slot, length, seed, differs):
        self.engine.release(slot)
        tokens = np.random.default_rng(seed).integers(0, VOCAB, MAX_LENGTH)
        tokens[differs:] = (tokens[differs:] + 1) % VOCAB
        self.sequences[slot] = tokens[:length].tolist()

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def leave(self, data):
        slot = data.draw(st.sampled_from(sorted(self.sequences)))
        self.engine.release(slot)
        del self.sequences[slot]

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), to=st.integers(0, 4))
    def move(self, data, to):
        slot = data.draw(st.sampled_from(sorted(self.sequences)))
        tokens = self.sequences.pop(slot)
        self.engine.release(slot)
        self.engine.release(to)
        self.sequences[to] = tokens

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def cut(self, data):
        slot = data.draw(st.sampled_from(sorted(self.sequences)))
        keep = data.draw(st.integers(1, len(self.sequences[slot])))
        self.engine.truncate(slot, keep)
        self.sequences[slot] = [*self.sequences[slot][:keep], 7][:MAX_LENGTH]

    @precondition(lambda self: self.sequences)
    @rule(
        data=st.data(),
        seed=st.integers(0, 999),
        grow=st.sampled_from([1, 1, 1, 0, 2, -1]),
    )
    def step(self, data, seed, grow):
        slots = data.draw(
            st.lists(st.sampled_from(sorted(self.sequences)), min_size=1, unique=True)
        )
        rng = np.random.default_rng(seed)
        candidates = rng.integers(0, VOCAB, (len(slots), K))
        counts = rng.integers(1, K + 1, len(slots)) if seed % 2 else None
        values = engine_values(self.engine, self.sequences, slots, candidates, counts)
        for i, slot in enumerate(slots):
            expected = full_forward(self.reference, self.sequences[slot], candidates[i])
            valued = slice(K if counts is None else counts[i])
            torch.testing.assert_close(values[i, valued], expected[valued], rtol=1e-4, atol=1e-4)
            room = MAX_LENGTH - len(self.sequences[slot])
            if grow >= 0:
                self.sequences[slot] += candidates[i, : min(grow, room)].tolist()
            elif len(self.sequences[slot]) > 1:
                self.sequences[slot].pop()

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), passes=st.integers(0, 3), before=st.booleans())
    def be_interrupted(self, data, passes, before):
        slots = data.draw(
            st.lists(st.sampled_from(sorted(self.sequences)), min_size=1, unique=True)
        )
        run, left = self.engine._run, [passes]

        def interrupted(*arguments):
            left[0] -= 1
            if left[0] < 0 and before:
                raise KeyboardInterrupt
            hidden = run(*arguments)
            if left[0] < 0:
                raise KeyboardInterrupt
            return hidden

        self.engine._run = interrupted
        with contextlib.suppress(KeyboardInterrupt):
            engine_values(self.engine, self.sequences, slots, np.full((len(slots), K), 3))
        self.engine._run = run

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def store(self, data):
        slot = data.draw(st.sampled_from(sorted(self.sequences)))
        length = data.draw(st.integers(1, len(self.sequences[slot])))
        if length < MAX_LENGTH:
            self.engine.store(
                np.array([slot]),
                np.array([length]),
                lambda slot, start, stop: self.sequences[slot][start:stop],
            )

    @invariant()
    def blocks_are_accounted_for(self):
        engine = getattr(self, "engine", None)
        if engine is None or engine._changing:
            return
        held = [block for slot in range(5) for block in engine._table[slot, : engine._held[slot]]]
        counted = np.bincount(held, minlength=engine._num_blocks + 1)
        assert (counted == engine._users).all()
        assert set(engine._free) == set(np.flatnonzero(counted == 0)) - {0}
        assert {block: key for key, (block, _) in engine._shared.items()} == engine._content


TestCandidateValuesMatchFullForward = Sequences.TestCase
TestCandidateValuesMatchFullForward.settings = settings(stateful_step_count=40)


@pytest.mark.parametrize("name", BACKBONES)
def test_candidate_values_match_full_forward_in_every_architecture(name):
    model = make_model(name)
    reference = plain(model)
    engine = ValueEngine([model], num_slots=3, max_length=MAX_LENGTH, prefill_tokens=16)
    rng = np.random.default_rng(0)
    sequences = {s: rng.integers(0, VOCAB, n).tolist() for s, n in enumerate((1, 20, 37))}
    for step in range(12):
        slots = [0, 1, 2] if step % 2 else [2, 0]
        candidates = rng.integers(0, VOCAB, (len(slots), K))
        values = engine_values(engine, sequences, slots, candidates)
        for i, slot in enumerate(slots):
            expected = full_forward([reference], sequences[slot], candidates[i])
            torch.testing.assert_close(values[i], expected, rtol=0, atol=1e-4)
            sequences[slot].append(int(candidates[i, 0]))


def check_values(model, reference):
    """A new engine's values behind a prefix of 40 tokens."""
    engine = ValueEngine([model], num_slots=1, max_length=MAX_LENGTH)
    sequences, candidates = {0: list(range(40))}, [[1, 2, 3, 4]]
    values = engine_values(engine, sequences, [0], candidates)
    expected = full_forward([reference], sequences[0], candidates[0])
    torch.testing.assert_close(values[0], expected, rtol=1e-4, atol=1e-4)


def test_learnt_positions_keep_their_values():
    backbone = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    torch.manual_seed(0)
    model = MAVISValueModel(MAVISValueConfig(backbone_config=backbone, objectives=["a"])).eval()
    torch.nn.init.normal_(model.head.weight)
    check_values(model, plain(model))


@pytest.mark.parametrize("kind", ["dynamic", "linear", "yarn"])
def test_scaled_positions_keep_their_values(kind):
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    model = make_model(options={"rope_parameters": rope})
    check_values(model, plain(model))


def test_a_longer_engine_takes_over_the_model_of_another():
    model = make_model()
    reference = plain(model)
    ValueEngine([model], num_slots=1, max_length=8)
    check_values(model, reference)


def test_models_that_share_their_keys_differently_keep_their_own_masks():
    models = [make_model("llama", ("a",)), make_model("llama without groups", ("b",), seed=1)]
    reference = [plain(model) for model in models]
    engine = ValueEngine(models, num_slots=2, max_length=MAX_LENGTH, prefill_tokens=16)
    sequences = {0: list(range(40)), 1: list(range(5, 30))}
    candidates = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    values = engine_values(engine, sequences, [0, 1], candidates)
    for slot in sequences:
        expected = full_forward(reference, sequences[slot], candidates[slot])
        torch.testing.assert_close(values[slot], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(dtype):
    model = make_model()
    reference = plain(model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    weights = sum(n * (2 if name.startswith("backbone.") else 4) for name, n in sizes.items())
    engine = ValueEngine([model], num_slots=2, max_length=MAX_LENGTH, dtype=dtype)
    rotations = sum(buffer.nbytes for buffer in engine.models[0].buffers())
    assert engine.weight_bytes == weights + rotations
    rng = np.random.default_rng(1)
    sequences = {s: rng.integers(0, VOCAB, 30 + 7 * s).tolist() for s in range(2)}
    candidates = rng.integers(0, VOCAB, (2, K))
    values = engine_values(engine, sequences, [0, 1], candidates)
    assert values.dtype == torch.float32
    for i in range(2):
        expected = full_forward([reference], sequences[i], candidates[i])
        scale = expected.abs().max().item()
        torch.testing.assert_close(values[i], expected, rtol=0, atol=0.06 * scale)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_a_full_forward():
    models = [make_model(), make_model("qwen3", ("c",))]
    references = list(map(plain, models))
    engine = ValueEngine(models, num_slots=3, max_length=MAX_LENGTH, device="cuda")
    rng = np.random.default_rng(0)
    sequences = {s: rng.integers(0, VOCAB, 20 + 20 * s).tolist() for s in range(3)}
    for slots in ([0, 1, 2], [2, 0], [1, 2, 0], [1]):
        lengths = np.array([len(sequences[s]) for s in slots])
        last_tokens = torch.tensor([sequences[s][-1] for s in slots], device="cuda")
        candidates = rng.integers(0, VOCAB, (len(slots), K))
        values = engine.values(
            np.array(slots),
            lengths,
            last_tokens,
            torch.from_numpy(candidates).cuda(),
            lambda slot, start, stop: sequences[slot][start:stop],
        ).cpu()
        for i, slot in enumerate(slots):
            expected = full_forward(references, sequences[slot], candidates[i])
            torch.testing.assert_close(values[i], expected, rtol=1e-3, atol=1e-3)
            sequences[slot].append(int(candidates[i, 0]))


def test_a_store_too_small_for_one_sequence_is_refused():
    with pytest.raises(ValueError, match="cannot hold one sequence of 96 tokens; it needs at"):
        ValueEngine([make_model()], num_slots=1, max_length=96, kv_cache_memory=1000)


def test_a_context_beyond_the_backbone_is_refused():
    with pytest.raises(ValueError, match="reads at most 128 positions, fewer than the 500"):
        ValueEngine([make_model()], num_slots=1, max_length=500)


def test_a_backbone_without_positional_attention_is_refused():
    from transformers import MambaConfig

    backbone = MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1)
    model = MAVISValueModel(MAVISValueConfig(backbone_config=backbone, objectives=["a"]))
    with pytest.raises(ValueError, match=r"backbone of type 'mamba'.*is not supported"):
        ValueEngine([model], num_slots=1, max_length=8)


def test_a_slot_that_shrank_gives_its_blocks_to_one_that_grew():
    model = make_model()
    engine = ValueEngine(
        [model], num_slots=2, max_length=128, kv_cache_memory=5 * 32 * 3 * 2 * 2 * 32
    )
    assert engine._num_blocks == 4
    reference = plain(make_model())
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 70)).tolist()
    for lengths in ((65, 32), (64, 33)):
        sequences = {slot: tokens[slot][:n] for slot, n in enumerate(lengths)}
        values = engine_values(engine, sequences, [0, 1], [[1, 2], [3, 4]])
        for slot, candidates in enumerate(([1, 2], [3, 4])):
            expected = full_forward([reference], sequences[slot], candidates)
            torch.testing.assert_close(values[slot], expected, rtol=1e-4, atol=1e-4)


def test_a_prefix_beyond_the_maximum_is_refused():
    engine = ValueEngine([make_model()], num_slots=1, max_length=8)
    with pytest.raises(ValueError, match=r"prefix lengths must be 1 to 8, got \[9\]"):
        engine_values(engine, {0: [1] * 9}, [0], [[1, 2]])


def test_a_value_model_in_an_engine_refuses_plain_forward_passes():
    model = make_model()
    ValueEngine([model], num_slots=1, max_length=8)
    with pytest.raises(RuntimeError, match="belongs to a ValueEngine"):
        model(torch.tensor([[1, 2]]))


def prefilled_tokens(engine, sequences, slots):
    """How many prefix tokens the engine computes when it values candidates of these slots."""
    computed = []
    run = engine._run

    def counting(families, tokens, step):
        if step.written == step.positions.shape[1] > 1:
            computed.append(int((step.write > 0).sum()))  # padding is written to place 0
        return run(families, tokens, step)

    engine._run = counting
    engine_values(engine, sequences, slots, [[1, 2]] * len(slots))
    engine._run = run
    return sum(computed)


def test_a_prefix_in_common_is_computed_once():
    system = list(range(3, 43))  # a block and a bit
    sequences = {slot: [*system, *[slot] * 40, 1, 2] for slot in range(3)}
    sequences[3] = sequences[0]  # two samples of one prompt
    engine = ValueEngine([make_model()], num_slots=5, max_length=MAX_LENGTH)
    assert prefilled_tokens(engine, sequences, [0, 1, 3]) == 81 + (81 - 32) + (81 - 64)
    assert prefilled_tokens(engine, sequences, [2]) == 81 - 32  # of requests before
    for slot in range(4):
        engine.release(slot)
    assert prefilled_tokens(engine, sequences, [1]) == 81 - 64  # even of finished ones
    assert prefilled_tokens(engine, {4: [9] * 82}, [4]) == 81


def test_counts_bound_what_is_computed():
    engine = ValueEngine([make_model()], num_slots=3, max_length=MAX_LENGTH)
    seen = []
    run = engine._run
    engine._run = lambda families, tokens, step: (
        seen.append(tokens.numel()),
        run(families, tokens, step),
    )[1]
    sequences = {0: [5], 1: [6], 2: [7]}
    engine_values(engine, sequences, [0, 1, 2], [[1, 2, 3]] * 3, np.array([1, 3, 2]))
    assert seen == [3 + 6]


def test_positions_stay_exact_in_half_precision():
    model = make_model()
    frequencies = model.backbone.rotary_emb.inv_freq.clone()
    engine = ValueEngine([model], num_slots=1, max_length=8, dtype=torch.bfloat16)
    found = engine.models[0].backbone.rotary_emb.inv_freq
    assert found.dtype == torch.float32 and torch.equal(found, frequencies)


@pytest.mark.parametrize("limit", [1, 3000])
def test_scores_in_pieces_give_the_same_values(monkeypatch, limit):
    reference = plain(model := make_model("llama"))
    engine = ValueEngine([model], num_slots=3, max_length=MAX_LENGTH)
    sequences = {0: list(range(40)), 1: [5], 2: list(range(7, 50))}
    candidates = np.array([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])
    monkeypatch.setattr("trimtab.plugins.attention.MAX_SCORES_CPU", limit)
    values = engine_values(engine, sequences, [0, 1, 2], candidates)
    for slot in sequences:
        expected = full_forward([reference], sequences[slot], candidates[slot])
        torch.testing.assert_close(values[slot], expected, rtol=1e-4, atol=1e-4)
