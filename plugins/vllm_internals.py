"""What the plugin reads of vLLM that vLLM does not promise, all of it in this place.

Read in vLLM 0.32. Where another version has moved something, it says so once and what to do; the
plugin does without it where answers stay right, and else does not start.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger

logger = init_logger("vllm.trimtab")  # vLLM only shows loggers below its own

INSTALL = "install vLLM 0.32, or a later trimtab"
_newest = threading.local()  # `rows`: what vLLM's layer has read last in this thread


def calling(wanted: Callable[[Any], bool]) -> Any:
    """The nearest object, up the stack, whose method is running and that is `wanted`; else None."""
    frame = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if found is not None and wanted(found):
            return found
        frame = frame.f_back  # type: ignore[assignment]
    return None


def calling_config() -> VllmConfig | None:
    """The config of the vLLM engine that is calling `validate_params`, None if it is not found.

    vLLM passes the hook nothing but the request, and a process may hold several engines: the
    engine's input processor is looked for up the stack (vLLM 0.32: two or three frames).
    """
    found = calling(lambda caller: isinstance(getattr(caller, "vllm_config", None), VllmConfig))
    if found is None:
        logger.warning_once(
            "MAVIS: what admits requests in this vLLM does not show its configuration: requests "
            "are not counted, and one that names an unknown objective goes on unguided; %s",
            INSTALL,
        )
        return None
    return found.vllm_config


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
            logger.warning_once(
                "MAVIS: this vLLM does not show which prompts are not complete yet: their rows are "
                "guided for nothing, which takes time and changes no answer; %s",
                INSTALL,
            )
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


def part_of_step(slots: torch.Tensor) -> tuple[int, int]:
    """First row and number of rows of the step whose part the rows with these `slots` are.

    Under speculation a large batch is sampled in parts, whose tensors are views of the whole's
    (vLLM 0.32: `RejectionSampler._verify_in_chunks`).
    """
    return int(slots.storage_offset()), slots.untyped_storage().nbytes() // slots.itemsize


class MissingHiddenStates(RuntimeError):
    """vLLM's output layer has not read a row for each of the logits."""


def watch_vllm() -> None:
    """Keeps what vLLM's output layers read, from now on, in this process.

    Heads need the row of every row of logits, which vLLM does not hand to logits processors. Both
    model runners call this layer once for the rows that they sample, before the processors; for
    prompt log-probabilities and drafts they call it again afterwards.

    Raises:
        ValueError: This version of vLLM has no such layer.
    """
    from vllm.model_executor.custom_op import maybe_get_oot_by_class
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    layer: Any = maybe_get_oot_by_class(LogitsProcessor)  # a platform may have its own
    compute = layer.forward
    if hasattr(compute, "watched_by_trimtab"):
        return
    names = list(inspect.signature(compute).parameters)[:3]
    if names != ["self", "lm_head", "hidden_states"]:
        raise ValueError(
            "value heads read the hidden states that vLLM's layer LogitsProcessor gets, and this "
            f"version's has the arguments {names}: {INSTALL}"
        )

    @functools.wraps(compute)
    def forward(self: Any, lm_head: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any):  # type: ignore[no-untyped-def]
        logits = compute(self, lm_head, hidden_states, *args, **kwargs)
        _newest.rows = None if self.logits_as_input else hidden_states
        return logits

    forward.watched_by_trimtab = True  # type: ignore[attr-defined]
    layer.forward = forward


def forget_rows() -> None:
    """Drops what the last step has left: a step begins."""
    _newest.rows = None


def rows_of(
    num_rows: int, hidden_size: int, start: int = 0, total: int | None = None
) -> torch.Tensor:
    """The hidden states of the rows of logits that are sampled now.

    Args:
        num_rows: Number of those rows.
        hidden_size: Width that the heads read.
        start: First of them, where the step's rows are sampled part by part.
        total: Number of the step's rows.

    Returns:
        `[num_rows, hidden_size]`, in the base model's dtype.

    Raises:
        MissingHiddenStates: vLLM's layer was not called, or with other rows.
    """
    hidden = getattr(_newest, "rows", None)
    expected = (num_rows if total is None else total, hidden_size)
    if hidden is None or tuple(hidden.shape) != expected:
        found = "none" if hidden is None else f"{list(hidden.shape)}"
        raise MissingHiddenStates(
            f"value heads need hidden states of shape {list(expected)}, a row for each of the "
            f"logits, and vLLM's output layer has read {found}: this base model or runner computes "
            "logits in another way; serve it with a value model that has a backbone (head_type "
            "'state')"
        )
    return hidden[start : start + num_rows]


def check_rows(vllm_config: VllmConfig) -> None:
    """Refuses a server in which the rows of hidden states and logits cannot match.

    Raises:
        ValueError: The server is one; the message says why.
    """
    parallel = vllm_config.parallel_config
    reasons = {
        "a pooling model samples nothing": vllm_config.model_config.runner_type == "pooling",
        "batch-sharded sampling gives each rank other rows: remove "
        "--enable-batch-sharded-sampling": getattr(
            parallel, "enable_batch_sharded_sampling", False
        ),
        "with an external launcher, pipeline stages sample that have no hidden states: use another "
        "--distributed-executor-backend": parallel.pipeline_parallel_size > 1
        and parallel.distributed_executor_backend == "external_launcher",
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(f"value heads read the served model's hidden states: {reason}")
