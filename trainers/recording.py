"""The vLLM side of sampling from a MAVIS policy: guides, and records every step of a rollout."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from trimtab.plugins.guide import Guide
from trimtab.plugins.heads import HeadGuide, Rows
from trimtab.plugins.vllm import MAVISLogitsProcessor

# Of every step: rollouts [n], lengths of their prefixes [n], candidates, log pi and log pi_ref,
# [n, k] each. A worker process holds one engine.
recorded: list[tuple[np.ndarray, ...]] = []


class RecordingGuide(Guide):
    """Keeps the candidates of every step with both policies' log-probabilities."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.rollouts = np.zeros(len(self.guided), dtype=np.int64)  # in each slot

    def log_probs(
        self, logits: torch.Tensor, slots: np.ndarray, lengths: np.ndarray, *args: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        candidates, log_policy, scale = super().log_probs(logits, slots, lengths, *args)
        columns = (candidates, log_policy, logits.gather(1, candidates) - scale)
        recorded.append((self.rollouts[slots], lengths.copy(), *(x.cpu().numpy() for x in columns)))
        return candidates, log_policy, scale


class RecordingHeadGuide(HeadGuide):
    """The same with heads on the base model's hidden state, which know of no sequence."""

    def __init__(self, models: Any, num_slots: int, device: torch.device) -> None:
        super().__init__(models, num_slots, device)
        self.rollouts = np.zeros(num_slots, dtype=np.int64)  # in each slot
        self.lengths = np.zeros(num_slots, dtype=np.int64)  # of their prefixes

    def log_probs(
        self, logits: torch.Tensor, hidden: torch.Tensor, rows: Rows
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        candidates, log_policy, scale = super().log_probs(logits, hidden, rows)
        slots = rows.slots.cpu().numpy()
        columns = (candidates, log_policy, logits.gather(1, candidates) - scale)
        arrays = (x.cpu().numpy() for x in columns)
        recorded.append((self.rollouts[slots], self.lengths[slots], *arrays))
        return candidates, log_policy, scale


class RecordingLogitsProcessor(MAVISLogitsProcessor):
    """A [`~trimtab.plugins.vllm.MAVISLogitsProcessor`] whose requests say which `rollout` they are
    in their `extra_args`."""

    guide_class = RecordingGuide
    heads_class = RecordingHeadGuide

    _guide: RecordingGuide

    def _new_request(self, sampling_params: Any, *args: Any) -> Any:
        request = super()._new_request(sampling_params, *args)
        if request is not None:
            request.rollout = sampling_params.extra_args["rollout"]  # type: ignore[attr-defined]
        return request

    def update_state(self, batch_update: Any) -> None:
        super().update_state(batch_update)
        if self._heads is not None:
            return
        for request in self._requests.values():
            self._guide.rollouts[request.slot] = request.rollout  # type: ignore[attr-defined]

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        guide: Any = self._guide if self._heads is None else self._heads
        # vLLM warms up and profiles with requests of its own, which are of no rollout.
        guide.rollouts[req_idx] = (sampling_params.extra_args or {}).get("rollout", -1)
        return super().add_request(req_idx, sampling_params)

    def _apply_heads(self, heads: Any, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        if ctx is None:  # slots are rows
            for row, request in self._requests.items():
                heads.rollouts[row] = request.rollout  # type: ignore[attr-defined]
                heads.lengths[row] = len(request.prompt) + len(request.output)
        else:
            heads.lengths[ctx.idx_mapping_np] = ctx.seq_lens_upper_bound_np
        return super()._apply_heads(heads, logits, ctx)


class RecordingWorker:
    """Extends vLLM's worker, see `worker_extension_cls` of `vllm.LLM`."""

    def take_recorded_steps(self) -> list[tuple[np.ndarray, ...]]:
        """What was recorded since the last call."""
        steps = recorded.copy()
        recorded.clear()
        return steps
