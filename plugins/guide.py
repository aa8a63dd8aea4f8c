"""Guidance of a batch of logits rows: the per-request parameters, the engine and the mathematics.

Every host engine's adapter ends here; an adapter only says which row is which sequence.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from .devices import to_device
from .engine import History, ValueEngine
from .params import GuidanceParams
from .policy import count_likely, guided_policy, top_candidates


class Guide:
    """Tilts logits rows by the values of their likeliest tokens.

    Args:
        engine: Values of the candidates. A row's sequence lives in the engine's slot of the row.
        num_slots: Number of slots, as in the engine.
        prune_eps: Candidates that cannot become likelier than this, within the range of values
            that their model has shown, are not valued and get probability 0. At 0 the policy is
            exact. On a GPU it has to wait for the base model's logits each step.

    Attributes:
        rows: Rows guided so far.
        candidates: Candidates that remained in them after pruning.
        watch: Told of every step `log pi` and `log pi_ref`, `[batch, k]`; it must not wait.

    Raises:
        ValueError: `prune_eps` is out of range, or a value model does not state its range.
    """

    def __init__(self, engine: ValueEngine, num_slots: int, prune_eps: float = 0.0) -> None:
        if not 0 <= prune_eps < 1:
            raise ValueError(f"prune_eps must be at least 0 and below 1, got {prune_eps}")
        if prune_eps and engine.candidate_range is None:
            raise ValueError(
                f"prune_eps {prune_eps} needs value models whose config has a candidate_range: "
                "train them again, or leave prune_eps at 0"
            )
        self.engine = engine
        self.prune_eps = prune_eps
        self.rows = self.candidates = 0
        self.watch: Callable[[torch.Tensor, torch.Tensor], None] | None = None
        unused = [0.0] * len(engine.objectives)  # at prune_eps 0 it does not matter
        self._range = np.array(engine.candidate_range or unused, dtype=np.float32)
        # Impossible candidates cost nothing to leave out where their number is at hand.
        self._prunes = prune_eps > 0 or engine.device.type == "cpu"
        self.guided = np.zeros(num_slots, dtype=bool)
        # A slot's weights, then beta, top_k, the KL budget and its temperature: one copy to the
        # device a step.
        self._params = np.zeros((num_slots, len(engine.objectives) + 4), dtype=np.float32)

    def start(self, slot: int, params: GuidanceParams) -> bool:
        """Begin a new sequence in `slot`; returns whether it is guided at all."""
        self.engine.release(slot)
        self.guided[slot] = params.guides
        budget = np.inf if params.kl_budget is None else params.kl_budget
        weights = np.multiply(params.weights, self.engine.candidate_scale)
        self._params[slot] = (*weights, params.beta, params.top_k, budget, params.temperature)
        return params.guides

    @torch.inference_mode()
    def log_probs(
        self,
        logits: torch.Tensor,
        slots: np.ndarray,
        lengths: np.ndarray,
        last_tokens: torch.Tensor,
        history: History,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The guided distribution of every row over its candidates.

        Args:
            logits: `[batch, vocab]` float32, the base model's, masked entries `-inf`.
            slots: `[batch]` int64, the sequence of each row.
            lengths: `[batch]` int64, tokens in each prefix.
            last_tokens: `[batch]` integer, last token of each prefix.
            history: The earlier tokens of a slot's prefix, see `engine`.

        Returns:
            `candidates` `[batch, k]` int64, `log pi` `[batch, k]` float32, normalised, and the
            log-sum-exp of the row's own candidates' logits `[batch, 1]`.
        """
        chosen = self._params[slots]
        top_k = chosen[:, -3]
        max_k = int(top_k.max())
        params = to_device(torch.from_numpy(chosen), logits.device)
        weights, (beta, k, budget, temperature) = params[:, :-4], params[:, -4:].unbind(1)
        candidates, log_probs = top_candidates(
            logits, max_k, k.long() if (top_k < max_k).any() else None
        )
        counts = None
        if self._prunes:
            reach = torch.from_numpy(chosen[:, -4] * (np.abs(chosen[:, :-4]) @ self._range))
            likely = count_likely(log_probs, reach.to(log_probs), self.prune_eps)
            ranks = torch.arange(log_probs.shape[1], device=log_probs.device)
            log_probs = log_probs.masked_fill(ranks >= likely[:, None], -torch.inf)
            counts = likely.cpu().numpy()
        elif (top_k < max_k).any():
            counts = np.minimum(top_k, candidates.shape[1]).astype(np.int64)
        self.rows += len(slots)
        self.candidates += int(top_k.sum() if counts is None else counts.sum())

        values = self.engine.values(slots, lengths, last_tokens, candidates, history, counts)
        limited = np.isfinite(chosen[:, -2]).any()
        log_policy = guided_policy(
            log_probs, values, weights, beta, budget if limited else None, temperature
        )
        if self.watch is not None:
            self.watch(log_policy, log_probs)
        # The first candidate is every row's own, whatever the largest k of the batch.
        scale = logits.gather(1, candidates[:, :1]) - log_probs[:, :1]
        return candidates, log_policy, scale

    def apply(
        self,
        logits: torch.Tensor,
        rows: np.ndarray,
        slots: np.ndarray,
        lengths: np.ndarray,
        last_tokens: torch.Tensor,
        history: History,
    ) -> torch.Tensor:
        """Tilt `rows` of `logits` `[n, vocab]` in place; the other rows stay bit-identical.

        The candidates keep their joint log-sum-exp, so that penalties which the host applies
        afterwards see logits of the scale that they were made for.
        """
        if len(rows) == len(logits):
            guided = logits
        else:
            index = to_device(torch.from_numpy(rows), logits.device)
            guided = logits[index]
        candidates, log_policy, scale = self.log_probs(guided, slots, lengths, last_tokens, history)
        policy = log_policy + scale  # whatever may fail comes before the first write
        guided.fill_(-torch.inf).scatter_(1, candidates, policy)
        if guided is not logits:
            logits[index] = guided
        return logits
