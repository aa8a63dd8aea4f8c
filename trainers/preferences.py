"""What values learn from pairs of responses of which one was preferred (Bradley and Terry, 1952).

A response's utility is its score, in log-odds: `P(a preferred to b) = sigmoid(u(a) - u(b))`, which
is to say that a judge adds noise of a Gumbel distribution to each and takes the larger. That
noise's standard deviation, `pi / sqrt(6)`, is the unit of the values: in log-odds what a judge's
score of one response deviates by at least. Where judgements follow a score without noise, it is
within a tenth of that score's own standard deviation between two responses, as long as a prefix
tells little of it; where they are noisy, utilities of less than the noise have values below 1.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import softplus

UTILITY_STD = math.pi / math.sqrt(6)  # log-odds
# What a preferred response is worth where a number is asked for, the other its negative: of
# responses to compare with at random the mean is the utility, up to terms of third order, since
# `2 (2 sigmoid(u) - 1) = u + O(u^3)`.
WIN = 2.0


def pair_loss(
    values: torch.Tensor, ends: torch.Tensor, depths: torch.Tensor, margins: torch.Tensor
) -> torch.Tensor:
    """
    Mean negative log-likelihood of the preferences, half of it at the ends of both responses, half
    at all depths that both reach.

    Args:
        values (`torch.Tensor`):
            After every token, in the units of `UTILITY_STD`, `[n]`. The tokens of a response lie
            one behind the other.
        ends (`torch.Tensor`):
            Rows of the last tokens of every pair, the preferred one's first, `[n_pairs, 2]` int64.
        depths (`torch.Tensor`):
            Tokens since the prompt, `[n]` int64.
        margins (`torch.Tensor`):
            Log-odds by which the whole responses are to differ, `[n_pairs]`.
    """
    lengths = depths[ends]
    common = lengths.min(dim=1).values
    pair = torch.repeat_interleave(torch.arange(len(ends), device=ends.device), common)
    step = torch.arange(len(pair), device=ends.device) - (common.cumsum(0) - common)[pair]
    rows = (ends - lengths + 1)[pair] + step[:, None]  # [sum of common, 2]

    def log_odds(at: torch.Tensor) -> torch.Tensor:
        return UTILITY_STD * (values[at[:, 0]] - values[at[:, 1]])

    along = torch.zeros_like(margins).index_add(0, pair, softplus(-log_odds(rows)) / common[pair])
    return (along + softplus(margins - log_odds(ends))).mean() / 2


def running_sums(
    advantages: torch.Tensor, used: torch.Tensor, depths: torch.Tensor
) -> torch.Tensor:
    """
    Of advantages along every response: what its tokens so far add to the prompt's value.

    Args:
        advantages (`torch.Tensor`):
            Of every token, `[n]`. The tokens of a response lie one behind the other.
        used (`torch.Tensor`):
            Which of them count, `[n]` bool.
        depths (`torch.Tensor`):
            Tokens since the prompt, `[n]` int64.

    Returns:
        `torch.Tensor`: `[n]` float32.
    """
    # In double: over a batch the sum grows large, and differences of it are what is used.
    total = torch.where(used, advantages, 0.0).double().cumsum(0)
    return (total - total[torch.arange(len(total), device=total.device) - depths]).float()
