"""Samples with vLLM on a Ray cluster: every worker holds a [`~samplers.VLLMSampler`].

Ray is imported when a [`RaySampler`] is made, and nothing else here needs it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from .fingerprints import guidance_fingerprint, weights_fingerprint
from .samplers import Piece, VLLMSampler

logger = logging.get_logger(__name__)

CLOSE_TIMEOUT = 10.0  # seconds for an engine to end by itself


class Worker:
    """What a process of Ray runs."""

    sampler: VLLMSampler

    def start(self, expected: dict[str, str], source: Any, kwargs: dict[str, Any]) -> str:
        """Makes the sampler, of the weights that are `expected`, and returns where it is."""
        place = f"{socket.gethostname()}, process {os.getpid()}"
        self.sampler = VLLMSampler(**kwargs)  # which may have to download them
        for path, found in fingerprints(kwargs, source).items():
            if found != expected[path]:
                raise ValueError(
                    f"the Ray worker at {place} has other weights at {path!r} than the process "
                    "that trains: give every node the same files, by a shared file system or a hub "
                    "id with a `revision`"
                )
        return place

    def sample(self, *args: Any) -> list[Piece]:
        return self.sampler(*args)

    def close(self) -> None:
        self.sampler.close()


class RaySampler:
    """
    Samples with vLLM in the workers of a Ray cluster: that of `RAY_ADDRESS` or of this machine; if
    there is none, one of this machine is started.

    A call is shared among all workers, neighbours together, since they begin alike. A worker that
    dies is left out, with a warning, and the others do its work.

    Args:
        num_workers (`int`):
            Number of workers. Each takes `tensor_parallel_size` GPUs of a cluster that has any, and
            a CPU.
        model (`str`):
            Model id or path. A worker that finds other weights there than this process is refused.
        value_models (`list[str]`, *optional*):
            Folders of the value models of the MAVIS policy. The same holds for them.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Of which `revision`, `subfolder` and `cache_dir` say where the weights are.
        kwargs:
            Further arguments of [`~samplers.VLLMSampler`].

    Raises:
        ConnectionError: no worker is left.
        ValueError: a worker has other weights.
    """

    def __init__(
        self,
        num_workers: int,
        model: str,
        value_models: Sequence[str] = (),
        model_init_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        import ray
        from ray.exceptions import RayActorError

        kwargs |= {"model": absolute(model), "value_models": list(map(absolute, value_models))}
        expected = fingerprints(kwargs, model_init_kwargs)
        self.started = not ray.is_initialized()
        if self.started:
            ray.init()
        there = ray.cluster_resources()
        each = {"CPU": 1, "GPU": kwargs.get("tensor_parallel_size", 1) if there.get("GPU") else 0}
        for name, count in each.items():
            if num_workers * count > there.get(name, 0):
                logger.warning(
                    f"num_ray_workers={num_workers} take {num_workers * count} {name}s and the Ray "
                    f"cluster has {there.get(name, 0):g}: waiting for more"
                )
        remote: Any = ray.remote(num_cpus=each["CPU"], num_gpus=each["GPU"])(Worker)
        workers = [remote.remote() for _ in range(num_workers)]
        places = [w.start.remote(expected, model_init_kwargs, kwargs) for w in workers]
        self.workers: dict[str, Any] = {}  # by place
        dead: list[tuple[str, Exception]] = []
        try:
            for number, (worker, place) in enumerate(zip(workers, places)):
                try:
                    self.workers[ray.get(place)] = worker
                except RayActorError as error:
                    dead.append((f"number {number}", error))
            for name, death in dead:
                self._leave_out(name, death)
        except BaseException:
            for worker in workers:
                ray.kill(worker)
            self.close()
            raise

    def _leave_out(self, place: str, error: Exception) -> None:
        self.workers.pop(place, None)
        cause = str(error).partition("\n")[0]  # Ray goes on at length
        if not self.workers:
            raise ConnectionError(
                f"no Ray worker is left, the last one ({place}) died: {cause} Run again, which "
                "goes on where this stopped, or leave out `num_ray_workers` to sample in this "
                "process"
            ) from error
        logger.warning(
            f"the Ray worker at {place} is left out, its work goes to {len(self.workers)} others: "
            f"{cause}"
        )

    def __call__(
        self,
        prefixes: list[list[int]],
        lengths: list[int],
        seeds: list[int],
        weights: Mapping[str, float] | None = None,
    ) -> list[Piece]:
        import ray
        from ray.exceptions import RayActorError

        pieces: dict[int, Piece] = {}
        while waiting := [i for i in range(len(prefixes)) if i not in pieces]:
            asked = []
            for place, part in zip(self.workers, np.array_split(waiting, len(self.workers))):
                share = part.tolist()
                columns = ([column[i] for i in share] for column in (prefixes, lengths, seeds))
                if share:
                    asked.append(
                        (place, share, self.workers[place].sample.remote(*columns, weights))
                    )
            for place, share, answer in asked:
                try:
                    pieces.update(zip(share, ray.get(answer)))
                except RayActorError as error:
                    self._leave_out(place, error)
        return [pieces[i] for i in range(len(prefixes))]

    def close(self) -> None:
        """Ends the workers, and a cluster that was started for them."""
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError

        workers = list(self.workers.values())
        for worker, closed in zip(workers, [worker.close.remote() for worker in workers]):
            # Where this process was interrupted they are at work.
            with suppress(RayActorError, GetTimeoutError):
                ray.get(closed, timeout=CLOSE_TIMEOUT)
            ray.kill(worker)
        if self.started:
            ray.shutdown()


def absolute(name: str) -> str:
    """A path as workers elsewhere find it, and a hub id as it is."""
    return str(Path(name).absolute()) if Path(name).exists() else name


def fingerprints(kwargs: Mapping[str, Any], source: Mapping[str, Any] | None) -> dict[str, str]:
    """Of the weights at the paths in the arguments of a [`~samplers.VLLMSampler`]."""
    model = kwargs["model"]
    found = {folder: guidance_fingerprint(folder) for folder in kwargs["value_models"]}
    return found | {model: weights_fingerprint(model, source)}
