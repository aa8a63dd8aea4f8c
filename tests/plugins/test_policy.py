"""The mathematics against float64 formulas written out, and its stated properties."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy

from trimtab.plugins.policy import (
    count_likely,
    guided_policy,
    limit_beta,
    step_kl,
    tilt,
    top_candidates,
)


@st.composite
def steps(draw):
    """`log pi_ref` `[k]` with some candidates masked, and scores `[k]`."""
    k = draw(st.integers(1, 12))
    logits = draw(st.lists(st.floats(-20, 20), min_size=k, max_size=k))
    scores = draw(st.lists(st.floats(-5, 5), min_size=k, max_size=k))
    masked = draw(st.lists(st.booleans(), min_size=k, max_size=k))
    logits = [-math.inf if m and i else x for i, (x, m) in enumerate(zip(logits, masked))]
    log_probs = torch.log_softmax(torch.tensor([logits]), -1)
    return log_probs, torch.tensor([scores])


@given(st.integers(0, 999), st.sampled_from([1, 5, 40]), st.sampled_from([0.0, 0.5, 0.999]))
@settings(deadline=None)
def test_candidates_are_the_likeliest_tokens_of_a_large_vocabulary(seed, k, masked):
    rng = np.random.default_rng(seed)
    logits = np.round(rng.normal(size=(3, 64 * 200)), 2).astype(np.float32)  # with ties
    logits[rng.random(logits.shape) < masked] = -np.inf
    candidates, log_probs = top_candidates(torch.from_numpy(logits), k)
    chosen = np.take_along_axis(logits, candidates.numpy(), 1)
    np.testing.assert_array_equal(chosen, -np.sort(-logits, axis=1)[:, :k])
    assert all(len(set(row)) == k for row in candidates.tolist())
    np.testing.assert_allclose(np.exp(log_probs).sum(1), 1, rtol=1e-5)


@given(steps(), st.floats(0, 10))
@settings(deadline=None)
def test_tilt_is_the_formula(step, beta):
    log_probs, scores = step
    policy = tilt(log_probs, scores, torch.tensor([beta])).exp()[0].numpy()
    p = log_probs[0].double().exp().numpy()
    expected = p * np.exp(beta * (scores[0].double().numpy() - scores.max().item()))
    np.testing.assert_allclose(policy, expected / expected.sum(), rtol=2e-4, atol=1e-6)
    assert (policy[p == 0] == 0).all()


@given(steps(), st.floats(0, 5), st.floats(-3, 3))
@settings(deadline=None)
def test_a_function_of_the_prefix_changes_nothing(step, beta, shift):
    log_probs, scores = step
    one = tilt(log_probs, scores, torch.tensor([beta]))
    other = tilt(log_probs, scores + shift, torch.tensor([beta]))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@given(steps(), st.floats(0, 5))
@settings(deadline=None)
def test_kl_agrees_with_scipy(step, beta):
    log_probs, scores = step
    log_policy = tilt(log_probs, scores, torch.tensor([beta]))
    kept = log_probs[0] > -math.inf
    p, q = log_policy[0][kept].double().exp(), log_probs[0][kept].double().exp()
    kept = q > 0
    expected = entropy(p[kept].numpy(), q[kept].numpy())
    assert step_kl(log_policy, log_probs).item() == pytest.approx(expected, abs=2e-5, rel=1e-3)


@settings(max_examples=200, deadline=None)
@given(steps(), st.floats(0.01, 10), st.floats(1e-3, 2))
def test_the_limited_beta_is_the_largest_within_the_budget(step, beta, budget):
    log_probs, scores = step
    beta_, budget_ = torch.tensor([beta]), torch.tensor([budget])
    limited = limit_beta(log_probs, scores, beta_, budget_)

    def kl(strength):
        return step_kl(tilt(log_probs, scores, strength), log_probs).item()

    assert 0 <= limited.item() <= beta_.item()
    assert kl(limited) <= budget_.item()
    if limited.item() < beta_.item():
        more = limited + 1e-3 * beta
        assert kl(torch.minimum(more, beta_)) >= 0.999 * budget - 1e-4


def test_a_large_beta_guides_up_to_the_budget():
    """However large: the strength that is left may be any fraction of it."""
    torch.manual_seed(0)
    betas = torch.logspace(0, 30, 31, dtype=torch.float64).float()
    rows = len(betas)
    log_probs = torch.log_softmax(2 * torch.randn(1, 40), -1).expand(rows, -1)
    scores = torch.randn(1, 40).expand(rows, -1)
    for budget in (1e-3, 0.5):
        limited = limit_beta(log_probs, scores, betas, torch.full((rows,), budget))
        kl = step_kl(tilt(log_probs, scores, limited), log_probs)
        assert (kl[1:] <= budget).all() and (kl[1:] >= 0.997 * budget).all(), kl
        torch.testing.assert_close(limited[1:], limited[1].expand(rows - 1), rtol=1e-3, atol=0)


def test_guidance_grows_with_beta_under_a_budget():
    torch.manual_seed(1)
    betas = torch.linspace(0, 3, 200)
    log_probs = torch.log_softmax(torch.randn(1, 40), -1).expand(200, -1)
    scores = torch.randn(1, 40).expand(200, -1)
    limited = limit_beta(log_probs, scores, betas, torch.full((200,), 0.3))
    assert (limited.diff() >= -1e-4).all() and limited[0] == 0
    assert limited[1] == betas[1] and limited[-1] < 2


@pytest.mark.parametrize("temperature", [0.01, 0.5, 0.7, 1.0, 2.0])
def test_the_budget_holds_at_the_temperature_of_sampling(temperature):
    torch.manual_seed(2)
    log_probs = torch.log_softmax(2 * torch.randn(8, 40), -1)
    values, one = torch.randn(8, 40, 1), torch.ones(8, 1)
    at = torch.full((8,), temperature)
    beta, budget = torch.full((8,), 50.0), torch.full((8,), 0.1)
    policy = guided_policy(log_probs, values, one, beta, budget, at)
    sampled, base = ((x / temperature).log_softmax(-1) for x in (policy, log_probs))
    kl = step_kl(sampled, base)
    assert (kl <= 0.1).all() and (kl >= 0.0997).all(), kl
    free = guided_policy(log_probs, values, one, beta, torch.full((8,), math.inf), at)
    torch.testing.assert_close(free, guided_policy(log_probs, values, one, beta))
    if temperature == 1:
        torch.testing.assert_close(policy, guided_policy(log_probs, values, one, beta, budget))


@settings(max_examples=200, deadline=None)
@given(steps(), st.sampled_from([1e-30, 1.0, 1e6]), st.sampled_from([1e-6, 1e6, math.inf]))
def test_the_policy_is_a_distribution_at_any_strength_that_is_accepted(step, beta, budget):
    log_probs, scores = step
    values, weights = 1e6 * scores[..., None], torch.ones(1, 1)
    policy = guided_policy(log_probs, values, weights, torch.tensor([beta]), torch.tensor([budget]))
    assert policy.exp().sum().item() == pytest.approx(1, abs=1e-4)
    assert (policy[log_probs == -math.inf] == -math.inf).all()


def test_rows_of_different_top_k_and_budgets_do_not_touch_each_other():
    torch.manual_seed(0)
    logits, values = torch.randn(3, 50), torch.randn(3, 8, 2)
    weights, beta = torch.randn(3, 2), torch.tensor([1.0, 2.0, 3.0])
    budget = torch.tensor([math.inf, 0.1, 0.01])
    top_k = torch.tensor([8, 3, 5])
    candidates, log_probs = top_candidates(logits, 8, top_k)
    together = guided_policy(log_probs, values, weights, beta, budget)
    for i, k in enumerate(top_k.tolist()):
        alone_candidates, alone = top_candidates(logits[i : i + 1], k)
        row = slice(i, i + 1)
        alone = guided_policy(alone, values[row, :k], weights[row], beta[row], budget[row])
        assert candidates[i, :k].tolist() == alone_candidates[0].tolist()
        torch.testing.assert_close(together[i, :k], alone[0])
        assert (together[i, k:] == -math.inf).all()


def test_masked_tokens_stay_masked_even_when_fewer_than_k_are_left():
    logits = torch.full((1, 20), -math.inf)
    logits[0, [3, 7]] = torch.tensor([0.0, 1.0])
    candidates, log_probs = top_candidates(logits, 5)
    policy = guided_policy(log_probs, torch.randn(1, 5, 1) * 50, torch.ones(1, 1), torch.ones(1))
    allowed = {c: p for c, p in zip(candidates[0].tolist(), policy[0].exp().tolist()) if p > 0}
    assert set(allowed) <= {3, 7} and sum(allowed.values()) == pytest.approx(1)


def sorted_log_probs(logits) -> torch.Tensor:
    return torch.log_softmax(torch.tensor([logits], dtype=torch.float64), -1).sort(descending=True)[
        0
    ]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.floats(-15, 15), min_size=1, max_size=12),
    st.floats(0, 8),
    st.sampled_from([1e-6, 1e-3, 0.05, 0.3]),
    st.randoms(use_true_random=False),
)
def test_what_is_not_counted_cannot_exceed_eps(logits, reach, eps, random):
    log_probs = sorted_log_probs(logits)
    count = count_likely(log_probs, torch.tensor([reach]), eps).item()
    for _ in range(20):
        scores = torch.tensor(
            [[random.choice((0, reach, random.uniform(0, reach))) for _ in logits]]
        )
        policy = tilt(log_probs, scores, torch.ones(1)).exp()[0]
        assert (policy[count:] <= eps * (1 + 1e-6)).all()
    if count > 1:  # the bound is reached: the last one counted can indeed be likelier
        scores = torch.zeros(1, len(logits))
        scores[0, count - 1] = reach
        assert tilt(log_probs, scores, torch.ones(1)).exp()[0, count - 1] >= eps * (1 - 1e-6)


def test_at_eps_zero_only_impossible_candidates_are_left_out():
    log_probs = torch.tensor([[-1e-6, -90.0, -math.inf, -math.inf], [0.0, *[-math.inf] * 3]])
    assert count_likely(log_probs, torch.zeros(2), 0.0).tolist() == [2, 1]


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("budget", [None, torch.tensor([0.1, 0.1])])
def test_a_row_whose_values_are_not_finite_is_not_guided(broken, budget):
    log_probs = torch.randn(2, 5).log_softmax(-1)
    values, one = torch.randn(2, 5, 1), torch.ones(2, 1)
    values[0, 3] = broken
    policy = guided_policy(log_probs, values, one, torch.tensor([2.0, 2.0]), budget)
    torch.testing.assert_close(policy[0], log_probs[0])
    assert policy.isfinite().all() and not policy[1].allclose(log_probs[1])
