"""The hidden states that the base model's output layer reads, in transformers.

In vLLM they are found by `vllm_internals`. This file also tells checkpoints apart, since these
features belong to one.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from pathlib import Path
from typing import Any

import torch

SAMPLED = 64  # numbers of every tensor that a fingerprint is of


class OutputLayerInput:
    """What the output layer of a transformers model reads at the last position of every sequence.

    Args:
        model: A causal decoder. It is watched for as long as this object lives.

    Raises:
        ValueError: It has no output layer.
    """

    def __init__(self, model: Any) -> None:
        layer = model.get_output_embeddings()
        if layer is None:
            raise ValueError(
                f"{type(model).__name__} has no output layer (get_output_embeddings() is None): "
                "value heads read the hidden state before it"
            )
        self.passes = 0  # since the rows were taken
        self._rows: torch.Tensor | None = None
        this = weakref.ref(self)

        def hook(module: Any, args: tuple[Any, ...]) -> None:
            watcher = this()
            if watcher is not None:
                watcher._rows = args[0][:, -1].detach()
                watcher.passes += 1

        weakref.finalize(self, layer.register_forward_pre_hook(hook).remove)

    def take(self) -> torch.Tensor | None:
        """The newest rows `[batch, hidden_size]`; None if the model did not run since."""
        rows, self._rows, self.passes = self._rows, None, 0
        return rows

    def of_step(self, num_rows: int, goes_on: bool) -> torch.Tensor:
        """The rows of a decoding step.

        Within a `generate` call the model runs once a step. It does not in assisted decoding, nor
        with a processor that runs it (classifier-free guidance): the rows are others then.

        Args:
            num_rows: Number of the step's rows of scores.
            goes_on: Whether it is not the first step of its call.

        Returns:
            `[num_rows, hidden_size]`, in the model's dtype.

        Raises:
            ValueError: The model ran not once, or with other rows.
        """
        passes, hidden = self.passes, self.take()
        if hidden is None or len(hidden) != num_rows or (goes_on and passes > 1):
            read = None if hidden is None else len(hidden)
            raise ValueError(
                f"value heads read the model's hidden state once a step, and for {num_rows} rows "
                f"of scores it ran {passes} times, the last time with {read} rows: assisted "
                "decoding and processors that run the model do not go with heads; use a value "
                "model that has a backbone (head_type 'state')"
            )
        return hidden


def checkpoint_fingerprint(name_or_path: str, revision: str | None = None) -> str | None:
    """SHA-256 of a sample of every tensor of a checkpoint on disk, rounded to bfloat16.

    Args:
        name_or_path: A folder or a hub id in the local cache.
        revision: Of a hub id; by default its main branch.

    Returns:
        The same for copies of other precision or sharding; None if there are no safetensors.
    """
    from safetensors import safe_open

    files = _weight_files(name_or_path, revision)
    digests = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dictionary)
                part = tensors.get_slice(name)
                shape = part.get_shape()
                middle = shape[0] // 2 if len(shape) > 1 else 0
                rows = part[middle : middle + 1] if len(shape) > 1 else part[:SAMPLED]
                sample = rows.flatten()[:SAMPLED].to(torch.bfloat16).view(torch.int16)
                digests[name] = hashlib.sha256(sample.numpy().tobytes()).hexdigest()
    if not digests:
        return None
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()


def _weight_files(name_or_path: str, revision: str | None) -> list[Path]:
    from transformers.utils import cached_file

    def find(file: str) -> Path | None:
        if Path(name_or_path).is_dir():
            path = Path(name_or_path) / file
            return path if path.exists() else None
        try:
            found = cached_file(name_or_path, file, local_files_only=True, revision=revision)
        except OSError:
            return None
        return Path(found) if found else None

    index = find("model.safetensors.index.json")
    names = ["model.safetensors"]
    if index is not None:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    found = [find(name) for name in names]
    return [] if None in found else [path for path in found if path is not None]


def check_checkpoint(
    config: Any, base_model: str, changed: str | None, revision: str | None = None
) -> str | None:
    """Refuses heads that were trained on another checkpoint than the one they are to read.

    Args:
        config: The heads', a [`MAVISValueConfig`].
        base_model: Folder or hub id of the base model that runs.
        changed: What makes its hidden states differ from its checkpoint's, for example a
            quantisation.
        revision: Of a hub id; by default its main branch.

    Returns:
        What to warn of, if anything.

    Raises:
        ValueError: It is another checkpoint.
    """
    names = f"the value heads for {config.objectives} were trained on {config.base_model!r}"
    if changed:
        return (
            f"{names}; {base_model!r} runs with {changed}, so that they read features that they "
            "were not trained on: measure what they still gain"
        )
    found = checkpoint_fingerprint(base_model, revision)
    if found is None or config.base_checkpoint_fingerprint is None:
        return f"{names}; whether {base_model!r} is that checkpoint could not be checked"
    if found != config.base_checkpoint_fingerprint:
        raise ValueError(
            f"{names}, and {base_model!r} has other weights: heads read the hidden states of one "
            "checkpoint only; train them on this one"
        )
    return None
