"""Metrics of guidance on vLLM's own `/metrics`, by prometheus_client, which vLLM serves them with.

Requests are counted where vLLM's frontend admits or refuses them, steps where they are sampled: in
another process, whose metrics the frontend shows if `PROMETHEUS_MULTIPROC_DIR` was set before the
start, as `trimtab serve` does. Names and labels are in vLLM's manner, beginning with `mavis:`.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from prometheus_client import Counter, Histogram, values

from .params import ARGUMENTS, PREFIX, GuidanceParams
from .policy import step_kl
from .vllm_internals import is_first_rank

KL_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # nats
TIME_BUCKETS = (
    1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0,
)  # fmt: skip


class _Histogram(Histogram):
    def observe_all(self, observed: np.ndarray) -> None:
        """As `observe` for each of `[n]` numbers: that takes microseconds for one."""
        counts = np.bincount(np.searchsorted(self._upper_bounds, observed))
        for bucket in np.flatnonzero(counts):
            self._buckets[bucket].inc(int(counts[bucket]))
        self._sum.inc(float(observed.sum()))


@lru_cache
def _registered() -> SimpleNamespace:
    """The metrics of this process: a registry takes a name once."""
    model, engine = ["model_name"], ["model_name", "engine"]
    return SimpleNamespace(
        requests=Counter(
            "mavis:requests",
            "Requests admitted: guided, unguided, or asking for a value.",
            [*model, "guidance"],
        ),
        refused=Counter(
            "mavis:refused_requests",
            "Requests refused for an argument of guidance; 'misplaced': outside vllm_xargs.",
            [*model, "argument"],
        ),
        rows=Counter("mavis:guided_rows", "Rows of logits guided, one a token.", engine),
        candidates=Counter(
            "mavis:guided_candidates", "Candidates of the guided rows that can be sampled.", engine
        ),
        kl=_Histogram(
            "mavis:step_kl_nats",
            "KL of a guided row's policy from the model, over its candidates, at temperature 1.",
            engine,
            buckets=KL_BUCKETS,
        ),
        seconds=Histogram(
            "mavis:step_time_seconds",
            "Time of the host in guiding a step; on a GPU that of launching its work.",
            engine,
            buckets=TIME_BUCKETS,
        ),
        failures=Counter(
            "mavis:failures",
            "Steps and requests that went unguided for a fault, which the log names.",
            [*engine, "kind"],
        ),
    )


def _model_name(vllm_config: Any) -> str:
    return getattr(getattr(vllm_config, "model_config", None), "served_model_name", "")


def start_at_zero(vllm_config: Any) -> None:
    """Shows the counts of requests before the first: a rate misses what a series begins with."""
    found, name = _registered(), _model_name(vllm_config)
    for asks in ("guided", "unguided", "value"):
        found.requests.labels(name, asks)
    for argument in (*(PREFIX + argument for argument in ARGUMENTS), "unknown", "misplaced"):
        found.refused.labels(name, argument)


def count_request(vllm_config: Any, params: GuidanceParams) -> None:
    """Counts a request that is admitted."""
    asks = "unguided" if not params.guides else "guided" if params.value_of is None else "value"
    _registered().requests.labels(_model_name(vllm_config), asks).inc()


def count_refusal(vllm_config: Any, argument: str) -> None:
    """Counts a request that is refused for an argument."""
    _registered().refused.labels(_model_name(vllm_config), argument).inc()


class StepMetrics:
    """What the steps of an engine did.

    Nothing waits for the device: what it knows is read at a later step, once it has been copied.

    Args:
        vllm_config: vLLM's configuration.
    """

    def __init__(self, vllm_config: Any) -> None:
        engine = str(vllm_config.parallel_config.data_parallel_index)
        labels, found = (_model_name(vllm_config), engine), _registered()
        self._rows, self._candidates = found.rows.labels(*labels), found.candidates.labels(*labels)
        self._kl, self._seconds = found.kl.labels(*labels), found.seconds.labels(*labels)
        self._failures = {k: found.failures.labels(*labels, k) for k in ("step", "request")}
        self._step: list[torch.Tensor] = []
        self._copies: deque[tuple[torch.Tensor, Callable[[], bool]]] = deque()

    @torch.inference_mode()
    def record(
        self,
        log_policy: torch.Tensor,
        log_probs: torch.Tensor,
        guided: torch.Tensor | None = None,
    ) -> None:
        """Keeps what rows of this step did, on their device.

        Args:
            log_policy: `[n, k]` float32, `log pi`.
            log_probs: `[n, k]` float32, `log pi_ref`, `-inf` beyond a row's candidates.
            guided: `[n]` bool, which rows count; None for all.
        """
        kl = step_kl(log_policy, log_probs)
        if guided is not None:
            kl = kl.masked_fill(~guided, torch.nan)
        count = (log_probs > -torch.inf).sum(-1, dtype=torch.float32)
        self._step.append(torch.stack((kl, count)))

    @torch.inference_mode()
    def end_step(self, seconds: float) -> None:
        """Counts the step, and those whose numbers have come to the host.

        Args:
            seconds: That the step has taken; not counted if it has guided nothing.
        """
        if self._step:
            self._seconds.observe(seconds)
            self._copies.append(to_host(torch.cat(self._step, dim=1)))
            self._step.clear()
        while self._copies and self._copies[0][1]():
            kl, candidates = self._copies.popleft()[0].numpy()
            known = np.isfinite(kl)
            self._rows.inc(int(known.sum()))
            self._candidates.inc(int(candidates[known].sum(dtype=np.float64)))
            self._kl.observe_all(kl[known])

    def fail(self, kind: str) -> None:
        """Counts a `step` or a `request`, and drops what the step has recorded."""
        self._step.clear()
        self._failures[kind].inc()


def step_metrics(vllm_config: Any) -> StepMetrics | None:
    """The metrics of a processor's steps; None where no one would see them, or another rank counts.

    In a process of vLLM's own, other than the server's, they are seen if prometheus_client keeps
    its values in files, which is settled when it is imported.
    """
    seen = multiprocessing.parent_process() is None or values.ValueClass._multiprocess
    return StepMetrics(vllm_config) if seen and is_first_rank() else None


def to_host(tensor: torch.Tensor) -> tuple[torch.Tensor, Callable[[], bool]]:
    """A copy on the host, and what says whether it is complete."""
    if tensor.device.type == "cpu":
        return tensor, lambda: True
    copy = tensor.to("cpu", non_blocking=True)  # PyTorch pins it
    event = torch.Event(tensor.device)
    event.record()
    return copy, event.query
