"""The mathematics of value guidance, as pure functions of tensors.

Notation of arXiv 2508.13415: at a prefix `s` the policy over the `k` likeliest next tokens is
`pi(a | s) ∝ pi_ref(a | s) * exp(beta * sum_i w_i Q_i(s, a))`. Adding a function of `s` to `Q`
changes nothing. Every function works row by row on `[batch, k]` float32 tensors, in which a
candidate with `log pi_ref = -inf` (masked by a grammar, or beyond a row's `k`) keeps probability 0.
"""

from __future__ import annotations

import math

import torch

ROUNDS, PARTS = 7, 8  # of the search for the strength, which is then known to 1e-5 of itself
STRIDES = 64  # groups of tokens whose maxima are looked at first


def top_candidates(
    logits: torch.Tensor, max_k: int, top_k: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest tokens of each row and their log-probabilities among themselves.

    Args:
        logits: `[batch, vocab]` float32, masked entries `-inf`.
        max_k: Number of candidates to return.
        top_k: `[batch]` int64, number of candidates of each row if they differ.

    Returns:
        `candidates` `[batch, max_k]` int64, likeliest first, and `log_probs` `[batch, max_k]`
        float32, normalised over the row's candidates, `-inf` beyond its `top_k`.
    """
    top, candidates = _top(logits, min(max_k, logits.shape[-1]))
    if top_k is not None:
        ranks = torch.arange(top.shape[-1], device=top.device)
        top = top.masked_fill(ranks >= top_k[:, None], -torch.inf)
    return candidates, torch.log_softmax(top, dim=-1)


def _top(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`torch.topk` of each row; on a CPU two to three times as fast for a large vocabulary.

    The `k` largest are among the columns of `STRIDES` tokens with the `k` largest maxima.
    """
    rows, vocab = logits.shape
    columns = vocab // STRIDES
    if logits.device.type != "cpu" or vocab % STRIDES or columns < 4 * k:
        return torch.topk(logits, k, dim=-1)
    groups = logits.view(rows, STRIDES, columns)
    best = torch.topk(groups.amax(1), k, sorted=False).indices  # [rows, k]
    among = groups.gather(2, best[:, None].expand(-1, STRIDES, -1)).flatten(1)
    top, at = torch.topk(among, k)
    return top, torch.div(at, k, rounding_mode="floor") * columns + best.gather(1, at % k)


def count_likely(log_probs: torch.Tensor, reach: torch.Tensor, eps: float) -> torch.Tensor:
    """How many candidates may become likelier than `eps` by guidance, whatever their values.

    If the exponents `beta * sum_i w_i Q_i` of two candidates never differ by more than `reach`, a
    candidate of probability `p` ends with at most `p / (p + (1 - p) exp(-reach))`: its own exponent
    the highest, all others' the lowest.

    Args:
        log_probs: `[batch, k]`, `log pi_ref` over the candidates, likeliest first.
        reach: `[batch]`, not negative.
        eps: Bound below which a candidate is not counted; 0 leaves out the impossible ones alone.

    Returns:
        `[batch]` int64, at least 1. The candidates beyond it are the ones that cannot exceed `eps`.
    """
    others = torch.log(-torch.expm1(log_probs)) - reach[:, None]
    bound = log_probs - torch.logaddexp(log_probs, others)
    return (bound > (math.log(eps) if eps else -math.inf)).sum(-1).clamp(min=1)


def tilt(log_probs: torch.Tensor, scores: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the guided policy, `log pi`.

    Args:
        log_probs: `[batch, k]`, `log pi_ref` over the candidates.
        scores: `[batch, k]`, `sum_i w_i Q_i`.
        beta: `[batch]`, strength of the guidance, not negative.

    Returns:
        `[batch, k]`, normalised.
    """
    return torch.log_softmax(log_probs + beta[..., None] * scores, dim=-1)


def step_kl(log_policy: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """`KL(pi || pi_ref)` of one step over the candidates, in nats.

    Args:
        log_policy: `[batch, k]`, `log pi`, normalised.
        log_probs: `[batch, k]`, `log pi_ref`, normalised.

    Returns:
        `[batch]`, not negative.
    """
    ratio = (log_policy - log_probs).masked_fill(log_policy == -torch.inf, 0.0)
    return (log_policy.exp() * ratio).sum(-1).clamp(min=0.0)


def limit_beta(
    log_probs: torch.Tensor, scores: torch.Tensor, beta: torch.Tensor, kl_budget: torch.Tensor
) -> torch.Tensor:
    """The largest `beta' <= beta` whose step stays within `kl_budget`, to a thousandth of it.

    The KL of a step grows with beta (its derivative is beta times the variance of the scores under
    the policy), so that halving the range finds it: of beta's logarithm, for the strength that is
    left may be any fraction of a large beta, and `PARTS` parts at once, for a step of a few large
    operations takes less time than one of many small ones.

    Args:
        log_probs: `[batch, k]`, `log pi_ref` over the candidates.
        scores: `[batch, k]`, `sum_i w_i Q_i`.
        beta: `[batch]`, the strength asked for.
        kl_budget: `[batch]`, nats per step, `inf` for no limit.

    Returns:
        `[batch]`, between 0 and `beta`.
    """
    budget = 0.999 * kl_budget  # rounding takes none above

    def within(strength: torch.Tensor) -> torch.Tensor:  # [batch, n]
        log_policy = tilt(log_probs[:, None], scores[:, None], strength)
        return step_kl(log_policy, log_probs[:, None]) <= budget[:, None]

    impossible = log_probs == -torch.inf
    spread = scores.masked_fill(impossible, -torch.inf).amax(-1)
    spread = spread - scores.masked_fill(impossible, torch.inf).amin(-1)
    # KL <= (beta * spread)^2 / 8 (Hoeffding): half the budget is a strength to begin with.
    low = torch.minimum(beta, (4 * budget).sqrt() / spread)
    parts = torch.linspace(0, 1, PARTS + 1, device=beta.device)
    edges = torch.stack((low, beta), dim=1)
    for _ in range(ROUNDS):
        log_edges = edges.log()
        strengths = (log_edges[:, :1] + (log_edges[:, 1:] - log_edges[:, :1]) * parts).exp()
        kept = within(strengths[:, 1:-1]).long().cumprod(-1).sum(-1, keepdim=True)
        edges = strengths.gather(1, torch.cat((kept, kept + 1), dim=1))
    fits = within(beta[:, None])[:, 0]
    return torch.where(fits, beta, torch.minimum(edges[:, 0], beta))


def guided_policy(
    log_probs: torch.Tensor,
    values: torch.Tensor,
    weights: torch.Tensor,
    beta: torch.Tensor,
    kl_budget: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-probabilities of the guided policy from candidate values.

    Args:
        log_probs: `[batch, k]`, `log pi_ref` over the candidates.
        values: `[batch, k, objectives]`, `Q_i(s, a)`; a row with one that is not finite is not
            guided.
        weights: `[batch, objectives]`.
        beta: `[batch]`.
        kl_budget: `[batch]`, nats per step, `inf` for no limit; None if no row has one.
        temperature: `[batch]`, at which the host samples from the returned policy, and the base
            model that the budget counts from; None is 1.

    Returns:
        `[batch, k]`, normalised, before the temperature.
    """
    scores = torch.einsum("bko,bo->bk", values, weights)
    # A network that overflows in half precision has nothing to say at this prefix.
    scores = torch.where(scores.isfinite().all(-1, keepdim=True), scores, 0.0)
    if kl_budget is not None:
        divisor = torch.ones_like(beta) if temperature is None else temperature
        tempered = torch.log_softmax(log_probs / divisor[:, None], dim=-1)
        beta = limit_beta(tempered, scores / divisor[:, None], beta, kl_budget)
    return tilt(log_probs, scores, beta)
