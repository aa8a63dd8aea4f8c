"""CUDA graphs of the engine's passes: what a step launches, recorded once and replayed by one call.

A pass over few tokens of each sequence takes the device less time than the host needs to launch its
kernels one by one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from .attention import Step

# Sequences of a pass, and most tokens: with more the device takes longer than the host.
BATCHES = (1, 2, 4, *range(8, 64, 8), *range(64, 257, 32))
MAX_TOKENS = 2048

# run(tokens, step): last hidden states `[total, hidden]` of each model of a pass.
Run = Callable[[torch.Tensor, Step], list[torch.Tensor]]


@dataclass(frozen=True)
class Indices:
    """A `Step` on the host, of int64 arrays, its table of blocks at full width."""

    write: np.ndarray  # [batch, written]
    read: np.ndarray  # [batch, blocks]
    positions: np.ndarray  # [batch, queries]
    lengths: np.ndarray  # [batch]


class PassGraphs:
    """One kind of pass, recorded for several batch sizes; other sizes are padded up.

    Args:
        run: The pass; it reads its inputs from the device alone.
        written: Of `Step`.
        queries: Of `Step`.
        blocks: Width of the table of blocks.
        num_slots: Largest batch there can be.
        device: A CUDA device.
    """

    def __init__(
        self,
        run: Run,
        written: int,
        queries: int,
        blocks: int,
        num_slots: int,
        device: torch.device,
    ) -> None:
        self._queries, self._device = queries, device
        largest = min(num_slots, MAX_TOKENS // queries)
        self.batches = [size for size in BATCHES if size < largest]
        if 0 < largest <= BATCHES[-1]:
            self.batches.append(largest)
        self._recorded: dict[int, tuple] = {}
        pool = None
        for batch in reversed(self.batches):  # the smaller ones use the largest one's memory
            shapes = ((batch, written), (batch, blocks), (batch, queries), (batch,))
            sizes = [int(np.prod(shape)) for shape in shapes]
            inputs = torch.zeros(sum(sizes), dtype=torch.long, device=device)
            inputs[-batch:] = 1  # a length of 0 would be no prefix
            write, read, positions, lengths = inputs.split(sizes)
            tokens = torch.zeros(batch * queries, dtype=torch.long, device=device)
            # A new one for each run: it keeps what layers share.
            step = partial(
                Step, written, write, read.view(batch, -1), positions.view(batch, -1), lengths
            )
            replay, outputs, pool = record(lambda t=tokens, s=step: run(t, s()), pool)  # type: ignore[misc]
            self._recorded[batch] = inputs, tokens, replay, outputs

    def __call__(self, tokens: torch.Tensor, indices: Indices) -> list[torch.Tensor] | None:
        """The pass over `tokens` `[batch * queries]`, or None where the batch is too large.

        What it returns is overwritten by the next call.
        """
        count = len(indices.lengths)
        place = bisect_left(self.batches, count)
        if place == len(self.batches):
            return None
        padding = self.batches[place] - count
        inputs, static_tokens, replay, outputs = self._recorded[self.batches[place]]

        def flat(array: np.ndarray, padded_with: int = 0) -> np.ndarray:
            rows = np.full((padding, *array.shape[1:]), padded_with)
            return np.concatenate((array, rows)).ravel()

        parts = (indices.write, indices.read, indices.positions)
        host = np.concatenate([*map(flat, parts), flat(indices.lengths, 1)])
        inputs.copy_(pinned(torch.from_numpy(host), self._device), non_blocking=True)
        static_tokens[: len(tokens)].copy_(tokens)
        replay()
        return [hidden[: count * self._queries] for hidden in outputs]


def pinned(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`host` where a copy to `device` does not make the host wait."""
    return host.pin_memory() if device.type == "cuda" else host


def record(
    once: Callable[[], list[torch.Tensor]], pool: object
) -> tuple[Callable[[], None], list[torch.Tensor], object]:
    """Record what `once` launches.

    Returns:
        What launches it again, the tensors that it then writes, and the pool of its memory.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        once()  # compiles kernels, and makes what is made once, outside of the graph's memory
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # type: ignore[arg-type]
        outputs = once()
    return graph.replay, outputs, graph.pool()
