"""What the plugin reads of vLLM that vLLM does not promise, in one place.

Read in vLLM 0.32. Where another version has moved something, the functions say what they
cannot tell, and the plugin does without it.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np


def calling(wanted: Callable[[Any], bool]) -> Any:
    """The nearest object, up the stack, whose method is running and that is `wanted`; else None."""
    frame = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if found is not None and wanted(found):
            return found
        frame = frame.f_back  # type: ignore[assignment]
    return None


class ModelRunner:
    """The V1 model runner that makes a processor, as far as it is read.

    V1 gives a processor a request's token ids, not how many of them the step has computed: rows of
    prompts that are prefilled in chunks look like all others, and their samples are thrown away.
    """

    def __init__(self) -> None:
        runner = calling(
            lambda found: any(c.__name__ == "GPUModelRunner" for c in type(found).__mro__)
        )
        self._runner = weakref.ref(runner) if runner is not None else lambda: None

    def partial(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of `rows` `[n]` of the batch: which ones' samples are thrown away, `[n]` bool, and how
        many of their tokens the base model has computed, `[n]` int64.

        None is thrown away as far as is known where vLLM does not show it.
        """
        runner = self._runner()
        try:
            thrown_away = runner.discard_request_mask.np[rows]  # type: ignore[union-attr]
            computed = runner.optimistic_seq_lens_cpu.numpy()[rows]  # type: ignore[union-attr]
        except AttributeError:
            return np.zeros(len(rows), dtype=bool), np.zeros(len(rows), dtype=np.int64)
        return thrown_away.astype(bool), computed.astype(np.int64)


def samples() -> bool:
    """Whether this process samples: under pipeline parallelism only the last rank does."""
    from vllm.distributed import parallel_state

    if not parallel_state.model_parallel_is_initialized():  # a processor without an engine
        return True
    return parallel_state.get_pp_group().is_last_rank


def is_first_rank() -> bool:
    """Whether this process is the first of those that do the same: its tensor-parallel group's."""
    from vllm.distributed import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return True
    return parallel_state.get_tp_group().is_first_rank
