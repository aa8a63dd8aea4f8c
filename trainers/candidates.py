"""The base model's likeliest next tokens along trees of responses, and how far values part them.

Guidance chooses among these candidates, so distillation compares its models at them, and candidate
pruning needs the range of their values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from trimtab.plugins.value_model import MAVISValueModel

RANGE_SEQUENCES = 48  # sequences and positions in each that a candidate range is measured on
RANGE_POSITIONS = 32


@torch.no_grad()
def add_candidates(
    sequences: Sequence[dict[str, Any]],
    base_model: Any,
    collate: Any,
    top_k: int,
    eos_token_ids: set[int],
    accelerator: Any,
) -> None:
    """
    Adds to sequences of [`pack_tree`] the base model's candidates after every prefix.

    The processes share the work. With 40 candidates a token takes 240 bytes.

    Args:
        sequences (`list[dict[str, Any]]`):
            Each gets `candidates`, `[length, top_k]` int32, likeliest first, and
            `candidate_log_probs`, `[length, top_k]` float16, normalised over them. Where no
            response goes on (in the prompt but for its last token, after its end) the candidates
            are -1.
        base_model ([`~transformers.PreTrainedModel`]):
            A causal decoder that follows a mask of branches.
        collate ([`DataCollatorForTrees`]):
            Makes that mask.
        top_k (`int`):
            Number of candidates.
        eos_token_ids (`set[int]`):
            Tokens that end a response.
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's.
    """
    base_model = base_model.eval().to(accelerator.device)
    mine = range(accelerator.process_index, len(sequences), accelerator.num_processes)
    found = {}
    for i in tqdm(
        mine, desc="Candidates of the base model", disable=not accelerator.is_main_process
    ):
        tokens, depths = sequences[i]["input_ids"], sequences[i]["depths"]
        prefixes = (depths > 0) & ~np.isin(tokens, list(eos_token_ids))
        prefixes[np.flatnonzero(sequences[i]["segments"] == 0)[-1]] = True
        rows = torch.from_numpy(np.flatnonzero(prefixes))
        batch = collate([sequences[i]])
        logits = base_model(
            **{
                name: batch[name].to(accelerator.device)
                for name in ("input_ids", "attention_mask", "position_ids")
            },
            use_cache=False,
            logits_to_keep=rows.to(accelerator.device),
        ).logits[0]
        top, likeliest = logits.float().topk(min(top_k, logits.shape[-1]))
        candidates = np.full((len(tokens), top.shape[1]), -1, dtype=np.int32)
        log_probs = np.zeros(candidates.shape, dtype=np.float16)
        candidates[rows] = likeliest.cpu()
        log_probs[rows] = top.log_softmax(-1).cpu()
        found[i] = candidates, log_probs
    for part in gather_object([found]):
        for i, (candidates, log_probs) in part.items():
            sequences[i]["candidates"], sequences[i]["candidate_log_probs"] = candidates, log_probs


def choose_positions(known: torch.Tensor, count: int, shuffle: bool) -> torch.Tensor:
    """
    Some of the prefixes of every sequence.

    Args:
        known (`torch.Tensor`):
            Whether a prefix with candidates ends here, `[batch, length]` bool.
        count (`int`):
            Number of positions per sequence.
        shuffle (`bool`):
            Whether to choose at random or evenly.

    Returns:
        `torch.Tensor`: `[batch, count]` int64. A sequence that has fewer is filled with positions
        that are not `known`.
    """
    if shuffle:
        order = torch.rand(known.shape, device=known.device)
    else:  # every n-th first
        ranks = known.cumsum(-1) - 1
        order = 1 - ranks % (known.sum(-1, keepdim=True) / count).ceil().clamp(min=1)
    return order.masked_fill(~known, -torch.inf).topk(min(count, known.shape[1])).indices


@torch.no_grad()
def candidate_differences(
    model: MAVISValueModel, sequences: Sequence[dict[str, Any]], collate: Any
) -> torch.Tensor:
    """
    Largest difference between the values of two candidates of one prefix, at some of the prefixes.

    Args:
        model ([`~trimtab.plugins.MAVISValueModel`]):
            Either head.
        sequences (`list[dict[str, Any]]`):
            What [`add_candidates`] made.
        collate ([`DataCollatorForTrees`]):
            Makes their batches.

    Returns:
        `torch.Tensor`: `[n_prefixes, n_objectives]` float32. Its maximum is the model's
        `candidate_range`.
    """
    training = model.training
    model.eval()
    device = model.head.weight.device
    ranges = []
    for sequence in sequences:
        batch = {name: tensor.to(device) for name, tensor in collate([sequence]).items()}
        known = batch["candidates"][..., 0] >= 0
        positions = choose_positions(known, RANGE_POSITIONS, shuffle=False)
        positions = positions[known.gather(1, positions)][None]
        values = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            position_ids=batch["position_ids"],
            candidates=batch["candidates"][:, positions[0]],
            candidate_positions=positions,
        ).candidate_logits[0]
        ranges.append(values.amax(1) - values.amin(1))
    model.train(training)
    return torch.cat(ranges)
