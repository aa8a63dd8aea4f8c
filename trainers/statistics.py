"""Bootstrap intervals over prompts."""

from __future__ import annotations

import numpy as np


def prompt_draws(num_prompts: int, draws: int = 2000, seed: int = 0) -> np.ndarray:
    """
    Bootstrap samples of the prompts, the same for all policies, so that differences are paired.

    Args:
        num_prompts (`int`):
            Number of prompts.
        draws (`int`, *optional*, defaults to `2000`):
            Number of samples.
        seed (`int`, *optional*, defaults to `0`):
            Seed.

    Returns:
        `np.ndarray`: `[1 + draws, num_prompts]` int64 indices; the first row is the data itself.
    """
    drawn = np.random.default_rng(seed).integers(0, num_prompts, (draws, num_prompts))
    return np.concatenate([np.arange(num_prompts)[None], drawn])


def interval(samples: np.ndarray, level: float = 0.95) -> dict[str, float]:
    """
    The value on the data and its percentile interval.

    Args:
        samples (`np.ndarray`):
            `[1 + draws]`, a statistic of every row of [`prompt_draws`].
        level (`float`, *optional*, defaults to `0.95`):
            Share of the draws inside.

    Returns:
        `dict[str, float]`: `value`, `low` and `high`.
    """
    low, high = np.percentile(samples[1:], [50 * (1 - level), 50 * (1 + level)])
    return {"value": float(samples[0]), "low": float(low), "high": float(high)}
