"""Heads on the base model's hidden state, and `generate` guided by them, computed the plain way."""

from __future__ import annotations

import copy
import json
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM

from tests.conftest import EOS, make_heads
from tests.plugins.test_transformers import PROMPTS, left_padded, on_each_device
from tests.reference import Reference
from trimtab.plugins import (
    GuidanceParams,
    MAVISValueConfig,
    MAVISValueHeads,
    MAVISValueModel,
    beam_search,
)
from trimtab.plugins.heads import HeadGuide, value_code
from trimtab.plugins.hidden_states import (
    OutputLayerInput,
    check_checkpoint,
    checkpoint_fingerprint,
)
from trimtab.plugins.transformers import MAVISLogitsProcessor

WEIGHTS, BETA, TOP_K = {"sweet": 1.0, "sour": -0.5}, 3.0, 8


@pytest.fixture(scope="module")
def base(base_model):
    return AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def reference(base_model, heads):
    return Reference(base_model, [heads])


@pytest.fixture
def processor(base, heads):
    return MAVISLogitsProcessor([str(heads)], weights=WEIGHTS, beta=BETA, top_k=TOP_K, model=base)


def copy_of(folder, to, **changes):
    """The heads in another folder, with other fields of their config."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text()) | changes
    (to / "config.json").write_text(json.dumps(config))
    return str(to)


def test_new_heads_say_nothing(base):
    model = MAVISValueHeads.from_base_model(base, ["sweet"])
    embedding = base.get_input_embeddings().weight
    values, advantages = model(torch.randn(4, 64), embedding, torch.randint(96, (4, 5)))
    assert not values.any() and not advantages.any()


def test_the_table_says_what_the_parameters_say(base, heads):
    model = MAVISValueModel.load(str(heads))
    assert isinstance(model, MAVISValueHeads)
    hidden, candidates = torch.randn(6, 64), torch.randint(96, (6, 5))
    values, advantages = model(hidden, base.get_input_embeddings().weight, candidates)
    served = model.candidate_values(hidden, candidates)
    expected = values[:, None] + advantages.mean(0)
    torch.testing.assert_close(served, expected, rtol=2e-3, atol=2e-3)


def test_initialisation_leaves_weights_that_were_loaded(heads):
    """As transformers 5.12 loads: all modules are initialised, but for weights that bear a mark."""
    from transformers.initialization import guard_torch_init_functions

    model = MAVISValueModel.load(str(heads))
    loaded = {name: weight.clone() for name, weight in model.state_dict().items()}
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    with guard_torch_init_functions():
        model.apply(model._init_weights)
    for name, weight in model.state_dict().items():
        assert weight.equal(loaded[name]), name


def test_statistics_standardise_the_features(heads):
    model = MAVISValueModel.load(str(heads))
    hidden = torch.randn(500, 64) * torch.linspace(0.1, 5, 64) + torch.linspace(-3, 3, 64)
    hidden[:, 3] = 1.0  # one that never changes
    model.set_statistics(hidden.split(70))
    torch.testing.assert_close(model.hidden_mean, hidden.mean(0), rtol=1e-4, atol=1e-4)
    std, mean = torch.std_mean(model.standardize(hidden), dim=0)
    assert mean.abs().max() < 1e-4 and (std[3], len(std)) == (0, 64)
    torch.testing.assert_close(std[4:], torch.ones(60), rtol=1e-3, atol=1e-3)


def test_heads_are_saved_small_and_whole(heads, base_model):
    files = {path.name for path in heads.iterdir()}
    assert files == {"config.json", "model.safetensors", "README.md"}
    config = MAVISValueModel.load(str(heads)).config
    assert config.base_model == str(base_model) and config.backbone_config is None
    assert config.base_checkpoint_fingerprint == checkpoint_fingerprint(str(base_model))
    card = (heads / "README.md").read_text()
    assert f"the hidden state of `{base_model}` itself, of width 64" in card


@on_each_device
def test_greedy_left_padded_batch_needs_no_mask(base, reference, heads, device):
    model = copy.deepcopy(base).to(device)
    processor = MAVISLogitsProcessor(
        [str(heads)], weights=WEIGHTS, beta=BETA, top_k=TOP_K, model=model
    )
    ids, mask = (x.to(device) for x in left_padded(PROMPTS))
    for _ in range(2):  # a processor serves many calls
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=12, do_sample=False,
            logits_processor=[processor],
        )  # fmt: skip
        for prompt, row in zip(PROMPTS, out[:, ids.shape[1] :].tolist()):
            expected = reference.greedy(prompt, 12, (1.0, -0.5), BETA, TOP_K, eos=EOS)
            assert row[: len(expected)] == expected
            assert set(row[len(expected) :]) <= {EOS}


def test_sampled_first_tokens_have_the_guided_distribution(base, reference, processor):
    torch.manual_seed(0)
    out = base.generate(
        torch.tensor(PROMPTS[:1]), max_new_tokens=1, do_sample=True, top_k=0,
        num_return_sequences=3000, logits_processor=[processor],
    )  # fmt: skip
    policy = reference.distribution(PROMPTS[0], (1.0, -0.5), BETA, TOP_K)
    counts = torch.bincount(out[:, -1], minlength=96)
    observed = [counts[token].item() for token in policy]
    assert sum(observed) == 3000
    assert chisquare(observed, [3000 * p for p in policy.values()]).pvalue > 1e-3


def test_beams_have_the_log_probabilities_of_the_guided_policy(base, reference, processor):
    out = base.generate(
        torch.tensor([PROMPTS[2]]), max_new_tokens=4, min_new_tokens=4, num_beams=5,
        num_return_sequences=5, do_sample=False, length_penalty=0.0,
        logits_processor=[processor], return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    for row, score in zip(out.sequences.tolist(), out.sequences_scores.tolist()):
        total = 0.0
        for n in range(len(PROMPTS[2]), len(row)):
            policy = reference.distribution(row[:n], (1.0, -0.5), BETA, TOP_K, masked=[EOS])
            total += np.log(policy[row[n]])
        assert score == pytest.approx(total, abs=1e-3)


def test_several_heads_and_a_kl_budget(tmp_path, base, base_model, heads):
    other = make_heads(tmp_path / "other", base_model, ["salty"], seed=9, candidate_scale=[0.5])
    processor = MAVISLogitsProcessor(
        [str(heads), str(other)], weights=[1.0, 0.0, 4.0], beta=50.0, top_k=TOP_K,
        kl_budget=0.05, model=base,
    )  # fmt: skip
    ids = torch.tensor(PROMPTS[:1])
    scores = base(ids).logits[:, -1].float()
    policy = processor(ids, scores)[0].softmax(-1).double()
    top, candidates = scores[0].double().topk(TOP_K)
    log_ref = torch.log_softmax(top, 0)
    ratio = policy[candidates].log() - log_ref
    assert (policy[candidates] * ratio).sum().item() == pytest.approx(0.05, abs=1e-3)
    # The scale counts: weights of 1 and 2. Log-ratios are linear in the weighted values.
    full = Reference(base_model, [heads, other]).distribution(
        PROMPTS[0], (1.0, 0.0, 2.0), 1.0, TOP_K
    )
    tilt = torch.tensor([full[c] for c in candidates.tolist()]).log() - log_ref
    assert torch.corrcoef(torch.stack((tilt, ratio)))[0, 1] > 0.9999


def test_rows_of_other_parameters_and_unguided_ones_share_a_batch(base, reference, heads):
    """Few candidates, many, none; by slots of the host and by slots that the device alone knows."""
    heads = MAVISValueModel.load(str(heads))
    heads.config.candidate_scale = [0.5, 2.0]  # of guidance only
    guide = HeadGuide([heads], 6, torch.device("cpu"))
    asked = [((1.0, 0.0), 3), ((0.5, -1.0), 40), ((0.0, 0.0), 8), ((0.0, 1.0), 4)]
    guide.start(5, GuidanceParams((1.0, -0.5), beta=0, top_k=1, value_of=17))
    for slot, (weights, top_k) in enumerate(asked, start=1):
        guided = guide.start(slot, GuidanceParams(weights, BETA, top_k))
        assert guided == any(weights)
    prefixes = [*PROMPTS, [50, 51], [7, 8, 9], [30, 31]]
    slots = np.array([2, 3, 1, 4, 2, 5])
    watched = OutputLayerInput(base)
    logits, hidden = [], []
    for prefix in prefixes:
        logits.append(base(torch.tensor([prefix])).logits[0, -1])
        hidden.append(watched.take()[0])
    raw, hidden = torch.stack(logits).detach(), torch.stack(hidden)
    plan = guide.plan(slots)
    assert sorted((rows.max_k, len(rows.slots)) for rows in plan) == [(0, 1), (4, 2), (40, 2)]
    on_device = guide.plan_on_device(torch.from_numpy(slots).int(), np.array([1, 2, 3, 4, 5]))
    value = heads.candidate_values(hidden[-1:], torch.tensor([[17]]))[0, 0]
    said = value_code(value @ torch.tensor([1.0, -0.5]), 96)
    for plans in (plan, on_device):
        out = guide.apply(raw.clone(), hidden, plans)
        for row, prefix, before, slot in zip(out, prefixes, raw, slots):
            if slot == 5:
                assert row.isfinite().nonzero().tolist() == [[said]]
                continue
            weights, top_k = asked[slot - 1]
            scaled = (0.5 * weights[0], 2 * weights[1])
            if not any(weights):
                assert row.equal(before)
                continue
            policy = reference.distribution(prefix, scaled, BETA, top_k)
            assert row.isfinite().sum() == top_k
            probabilities = row.softmax(0)
            for token, p in policy.items():
                assert probabilities[token].item() == pytest.approx(p, abs=1e-4)
            torch.testing.assert_close(row.logsumexp(0), before.topk(top_k).values.logsumexp(0))
    assert guide.plan(np.array([3, 3])) == []
    assert guide.plan_on_device(torch.tensor([3, 3]), np.array([3])) == []


def test_a_step_never_waits_for_the_device(heads, monkeypatch):
    """A meta device holds no data, so that reading any of it back is an error."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())  # it has none
    meta = torch.device("meta")
    guide = HeadGuide([MAVISValueModel.load(str(heads))], 5, meta)
    for slot in range(3):
        guide.start(slot, GuidanceParams((1, 0.5), top_k=7 + 9 * slot, kl_budget=0.1 + slot))
    guide.start(4, GuidanceParams((1, 0.5), value_of=9))
    logits, hidden = torch.empty(7, 96, device=meta), torch.empty(7, 64, device=meta)
    slots = np.array([2, 0, 3, 1, 0, 2, 4])
    mixed = guide.plan(slots)
    assert len(mixed) == 4
    on_device = torch.empty(7, dtype=torch.int32, device=meta)
    for plans in (mixed, guide.plan_on_device(on_device, np.arange(5))):
        assert guide.apply(logits, hidden, plans).device == meta


def test_assisted_decoding_is_refused(base, processor):
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    for options in ({"assistant_model": base}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(ValueError, match="assisted decoding and processors that run the model"):
            base.generate(ids, max_new_tokens=6, logits_processor=[processor], **options)


def test_a_processor_that_runs_the_model_is_refused(base, processor):
    with pytest.raises(ValueError, match="it ran 2 times"):
        base.generate(
            torch.tensor(PROMPTS[:1]), max_new_tokens=4, logits_processor=[processor],
            guidance_scale=1.5,
        )  # fmt: skip


def test_the_model_is_watched_no_longer_than_the_processor_lives(base, heads):
    layer = base.get_output_embeddings()
    before = len(layer._forward_pre_hooks)
    processor = MAVISLogitsProcessor([str(heads)], weights=WEIGHTS, model=base)
    assert len(layer._forward_pre_hooks) == before + 1
    del processor
    assert len(layer._forward_pre_hooks) == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_hidden_size": None}, "base_hidden_size must be an integer from 1"),
        ({"base_vocab_size": 0}, "base_vocab_size must be an integer from 1"),
        ({"head_width": 0}, "head_width must be an integer from 1"),
        ({"head_type": "state"}, "needs a MAVISValueConfig with head_type 'hidden'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(fields, message):
    sizes = dict.fromkeys(("base_hidden_size", "base_embedding_size", "base_vocab_size"), 64)
    with pytest.raises(ValueError, match=message):
        MAVISValueHeads(
            MAVISValueConfig(**{"objectives": ["a"], "head_type": "hidden", **sizes, **fields})
        )


def test_heads_of_another_checkpoint_are_refused(tmp_path, base, base_model, heads):
    other = tmp_path / "other"
    shutil.copytree(base_model, other)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] += 0.01  # a fine-tuned copy
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    tuned = AutoModelForCausalLM.from_pretrained(other)
    with pytest.raises(ValueError, match="has other weights: heads read the hidden states of one"):
        MAVISLogitsProcessor([str(heads)], weights=WEIGHTS, model=tuned)
    narrow = copy_of(heads, tmp_path / "narrow", base_model_fingerprint="0" * 64)
    with pytest.raises(ValueError, match="is of another architecture: train heads on it"):
        MAVISLogitsProcessor([narrow], weights=WEIGHTS, model=base)
    config = MAVISValueModel.load(str(heads)).config
    warning = check_checkpoint(config, str(other), "a quantisation")
    assert warning is not None and "runs with a quantisation" in warning
    warning = check_checkpoint(config, str(tmp_path), None)  # there are no weights
    assert warning is not None and "could not be checked" in warning
    assert check_checkpoint(config, str(base_model), None) is None


def test_a_copy_of_other_precision_and_sharding_is_the_same_checkpoint(tmp_path, base_model):
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    model.float().save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    same = checkpoint_fingerprint(str(tmp_path / "half"))
    assert checkpoint_fingerprint(str(tmp_path / "sharded")) == same
    assert same == checkpoint_fingerprint(str(base_model))
    assert checkpoint_fingerprint(str(tmp_path / "nothing")) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "pass it as MAVISLogitsProcessor"),
        ({"model": "base", "prune_eps": 0.1}, "prune_eps 0.1 is for value models with a backbone"),
        ({"model": "base", "mixed": True}, "do not guide together with value models that have a"),
    ],
)
def test_what_heads_do_not_do_is_refused(base, heads, value_model, tmp_path, options, message):
    models = [str(heads)]
    if options.pop("mixed", False):
        single = copy_of(heads, tmp_path / "renamed", objectives=["a", "b"])
        models = [single, str(value_model)]
    if "model" in options:
        options = {**options, "model": base}
    with pytest.raises(ValueError, match=message):
        MAVISLogitsProcessor(models, weights={}, **options)


def test_beams_refuse_heads(base, heads):
    with pytest.raises(ValueError, match=r"a backbone .*, and these are heads: \[\['sweet', 'sour"):
        beam_search(base, PROMPTS, value_models=[str(heads)], weights=WEIGHTS)


def test_a_truncated_file_is_refused(tmp_path, heads):
    folder = copy_of(heads, tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="its weights cannot be read"):
        MAVISValueModel.load(folder)
