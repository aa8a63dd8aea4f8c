"""Pruning in the guide: what of the policy it may change."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from tests.plugins.test_engine import MAX_LENGTH, VOCAB, make_model
from trimtab.plugins import GuidanceParams, ValueEngine
from trimtab.plugins.guide import Guide

PREFIXES = {0: [3, 4, 5], 1: [6] * 40, 2: [7]}


def guided(prune_eps, logits, params, **fields):
    """The policies `[3, vocab]` of three prefixes, and the guide."""
    model = make_model("llama", ("a", "b"), **fields)
    guide = Guide(ValueEngine([model], num_slots=3, max_length=MAX_LENGTH), 3, prune_eps)
    for slot, one in enumerate(params):
        guide.start(slot, one)
    return policies_of(guide, logits), guide


def policies_of(guide, logits):
    candidates, log_policy, _ = guide.log_probs(
        logits,
        np.arange(3),
        np.array([len(tokens) for tokens in PREFIXES.values()]),
        torch.tensor([tokens[-1] for tokens in PREFIXES.values()]),
        lambda slot, start, stop: PREFIXES[slot][start:stop],
    )
    return torch.zeros(3, VOCAB).scatter(1, candidates, log_policy.exp())


@pytest.fixture
def logits():
    return torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0)) * 3


PARAMS = [
    GuidanceParams((1.0, 0.5), beta=0.3, top_k=20),
    GuidanceParams((-1.0, 0.0), beta=0.1, top_k=20),
    GuidanceParams((0.0, 1.0), beta=0.2, top_k=7, kl_budget=0.05),
]


@pytest.mark.parametrize("eps", [1e-3, 0.02])
def test_pruned_policies_differ_by_what_was_left_out(logits, eps):
    # A range that holds for this model: no two candidates differ by more.
    exact, full = guided(0.0, logits, PARAMS)
    pruned, guide = guided(eps, logits, PARAMS, candidate_range=[12.0, 12.0])
    assert full.rows == guide.rows == 3 and full.candidates == 20 + 20 + 7
    assert guide.candidates < full.candidates
    left_out = (pruned == 0) & (exact > 0)
    assert left_out.any() and (exact[left_out] <= eps).all()
    kept = exact.masked_fill(left_out, 0)
    expected = kept / kept.sum(1, keepdim=True)
    torch.testing.assert_close(pruned[:2], expected[:2], rtol=1e-3, atol=1e-5)


def test_at_eps_zero_masked_tokens_cost_nothing_and_change_nothing(logits):
    logits[0, torch.arange(VOCAB) != 9] = -torch.inf
    logits[1, 10:] = -torch.inf
    policy, guide = guided(0.0, logits, PARAMS)
    assert guide.candidates == 1 + 10 + 7
    alone, _ = guided(0.0, logits, PARAMS, candidate_range=[0.0, 0.0])
    assert policy[0, 9] == 1 and torch.equal(policy, alone)


@pytest.mark.parametrize("eps", [0.0, 0.02])
def test_a_scale_is_as_a_factor_of_the_weights(logits, eps):
    fields = {"candidate_range": [12.0, 12.0]}
    scaled, one = guided(eps, logits, PARAMS, candidate_scale=[0.5, 0.0], **fields)
    params = [
        dataclasses.replace(p, weights=(0.5 * p.weights[0], 0.0 * p.weights[1])) for p in PARAMS
    ]
    expected, other = guided(eps, logits, params[:2] + PARAMS[2:], **fields)
    assert one.candidates <= other.candidates
    torch.testing.assert_close(scaled[:2], expected[:2])
    top, at = logits[2].topk(7)  # its only objective has lost its say
    torch.testing.assert_close(scaled[2, at], top.softmax(0))


def test_pruning_without_a_known_range_is_refused(logits):
    with pytest.raises(ValueError, match="needs value models whose config has a candidate_range"):
        guided(0.01, logits, PARAMS)
    with pytest.raises(ValueError, match="prune_eps must be at least 0 and below 1, got 1"):
        guided(1, logits, PARAMS)


def test_a_step_never_waits_for_the_device(monkeypatch):
    """A meta device holds no data, so that reading any of it back is an error."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())  # it has none
    models = [make_model("llama", ("a", "b")), make_model("gemma2 softcap", ("c",))]
    engine = ValueEngine(models, num_slots=3, max_length=MAX_LENGTH)
    meta = engine.device = torch.device("meta")
    for model in models:
        model.to(meta)
        model.backbone.to(meta)
    engine._stores = [[layer.to(meta) for layer in store] for store in engine._stores]
    guide = Guide(engine, 3)
    for slot in range(3):
        guide.start(slot, GuidanceParams((1, 0.5, 1), top_k=7 + slot, kl_budget=0.1 * (1 + slot)))
    rows, lengths = np.array([0, 2]), np.array([5, 40])
    for _ in range(3):  # the first one stores the prefixes
        tokens = torch.empty(2, dtype=torch.int32, device=meta)
        logits = torch.empty(3, VOCAB, device=meta)
        history = lambda slot, start, stop: [1] * (stop - start)  # noqa: E731
        assert guide.apply(logits, rows, rows, lengths, tokens, history).device == meta
        lengths = lengths + 1
