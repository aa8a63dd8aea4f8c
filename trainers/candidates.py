"""The base model's likeliest next tokens along trees of responses, and what models value them at.

Guidance chooses among these candidates: candidate pruning needs the range of their values, and
responses tell how much of their differences to believe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from trimtab.plugins.value_model import MAVISValueModel

from .statistics import interval, prompt_draws

RANGE_SEQUENCES = 32  # that a candidate range is measured on
RANGE_POSITIONS = 32  # in each
PART_POSITIONS = 32  # whose candidates are read together: their mask is a square


@torch.no_grad()
def add_candidates(
    sequences: Sequence[dict[str, Any]],
    base_model: Any,
    collate: Any,
    top_k: int,
    positions_per_sequence: int | None,
    eos_token_ids: set[int],
    accelerator: Any,
) -> None:
    """
    Adds to sequences of [`pack_tree`] the base model's candidates after some of the prefixes. The
    processes share the work.

    Args:
        sequences (`list[dict[str, Any]]`):
            Each gets `candidate_positions` (of the prefixes' last tokens), `[n]` int64;
            `candidates`, `[n, k]` int64, likeliest first; and `candidate_log_probs`, `[n, k]`
            float32, normalised over them.
        base_model ([`~transformers.PreTrainedModel`]):
            A causal decoder that follows a mask of branches.
        collate ([`DataCollatorForTrees`]):
            Makes that mask.
        top_k (`int`):
            Number of candidates, `k`.
        positions_per_sequence (`int`, *optional*):
            Number of prefixes, drawn at random; fewer where a sequence has fewer. All if `None`.
        eos_token_ids (`set[int]`):
            Tokens that end a response: nothing follows them.
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's.
    """
    base_model = base_model.eval().to(accelerator.device)
    mine = range(accelerator.process_index, len(sequences), accelerator.num_processes)
    found = {}
    show = accelerator.is_main_process
    for i in tqdm(mine, desc="Candidates of the base model", disable=not show):
        tokens, depths = sequences[i]["input_ids"], sequences[i]["depths"]
        prefixes = (depths > 0) & ~np.isin(tokens, list(eos_token_ids))
        prefixes[np.flatnonzero(sequences[i]["segments"] == 0)[-1]] = True  # the prompt
        drawn = np.random.default_rng([0, i]).permutation(np.flatnonzero(prefixes))
        positions = np.sort(drawn[:positions_per_sequence])
        batch = {
            name: tensor.to(accelerator.device)
            for name, tensor in collate([sequences[i]]).items()
            if name in ("input_ids", "attention_mask", "position_ids")
        }
        at = torch.from_numpy(positions).to(accelerator.device)
        logits = base_model(**batch, use_cache=False, logits_to_keep=at).logits[0].float()
        top, candidates = logits.topk(min(top_k, logits.shape[-1]))
        columns = {
            "candidate_positions": at,
            "candidates": candidates,
            "candidate_log_probs": top.log_softmax(-1),
        }
        found[i] = {name: column.cpu().numpy() for name, column in columns.items()}
    for part in gather_object([found]):
        for i, arrays in part.items():
            sequences[i].update(arrays)


def read_candidates(model: Any, batch: dict[str, torch.Tensor]) -> Any:
    """The model's [`~trimtab.plugins.value_model.MAVISValueOutput`] on a batch with candidates."""
    names = ("input_ids", "attention_mask", "position_ids", "candidates", "candidate_positions")
    return model(**{name: batch[name] for name in names})


@torch.no_grad()
def candidate_differences(
    model: MAVISValueModel, sequences: Sequence[dict[str, Any]], collate: Any
) -> torch.Tensor:
    """
    Largest difference between the values of two candidates of one prefix.

    Args:
        model ([`~trimtab.plugins.MAVISValueModel`]):
            With a backbone.
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
        values = read_candidates(model, batch).candidate_logits[0]
        ranges.append(values.amax(1) - values.amin(1))
    model.train(training)
    return torch.cat(ranges)


@torch.no_grad()
def advantage_slopes(
    model: MAVISValueModel,
    sequences: Sequence[dict[str, Any]],
    collate: Any,
    temperature: float = 1.0,
    progress: bool = True,
) -> list[dict[str, float]]:
    """
    How much of the differences that a model predicts between candidates their returns bear out.

    The predicted advantage of a token that was sampled after a prefix is its value less the mean
    value of the candidates, and its return's excess is the label less the value of the prefix. The
    slope of the second on the first is the factor of the values with which a small `beta` gains
    most `reward - KL / beta`: the covariance of the two is the gain in reward, and the variance of
    the first twice the KL, each by its power of `beta` over the temperature, so that the slope
    counts `temperature` times. Noise in values lowers it.

    Args:
        model ([`~trimtab.plugins.MAVISValueModel`]):
            With a backbone.
        sequences (`list[dict[str, Any]]`):
            What [`add_candidates`] made of all prefixes of rollouts of the base model, which the
            model has not learnt from.
        collate ([`DataCollatorForTrees`]):
            Makes their batches.
        temperature (`float`, *optional*, defaults to `1.0`):
            Of the sampling.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show it.

    Returns:
        `list[dict[str, float]]`: `value`, `low` and `high` for every objective, a 95 % bootstrap
        interval over the trees.
    """
    training = model.training
    model.eval()
    device = model.head.weight.device
    sums = []  # covariances and variances of a sequence's tokens, [2, n_objectives]
    # Processes do not share the work: where they share the weights they have to go in step.
    for sequence in tqdm(sequences, desc="Advantages of tokens", disable=not progress):
        positions, labels = sequence["candidate_positions"], sequence["labels"]
        taken = np.flatnonzero((sequence["depths"] > 0) & ~np.isnan(labels).all(-1))
        prefixes = np.searchsorted(positions, sequence["previous"][taken])
        total = np.zeros((2, labels.shape[1]))
        for start in range(0, len(positions), PART_POSITIONS):
            part = slice(start, start + PART_POSITIONS)
            rows = ("candidate_positions", "candidates", "candidate_log_probs")
            batch = collate([sequence | {name: sequence[name][part] for name in rows}])
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            outputs = read_candidates(model, batch)
            values = outputs.candidate_logits[0].double().cpu().numpy()  # [n, k, n_objectives]
            weights = np.exp(sequence["candidate_log_probs"][part].astype(float) / temperature)
            weights = (weights / weights.sum(1, keepdims=True))[..., None]
            advantages = values - (weights * values).sum(1, keepdims=True)
            variances = (weights * advantages**2).sum(1)
            of_prefix = outputs.logits[0].double().cpu().numpy()[positions[part]]
            inside = (prefixes >= start) & (prefixes < start + PART_POSITIONS)
            tokens, at = taken[inside], prefixes[inside] - start
            hits = sequence["candidates"][part][at] == sequence["input_ids"][tokens, None]
            # A token that is no candidate here is one on the edge, by rounding.
            known = hits.any(1)[:, None] & ~np.isnan(labels[tokens])
            of_token = (advantages[at] * hits[..., None]).sum(1)
            excess = np.nan_to_num(labels[tokens]) - of_prefix[at]
            total += np.stack([of_token * excess * known, variances[at] * known]).sum(1)
        sums.append(total)
    model.train(training)
    trees, of_sequence = np.unique([s["tree"] for s in sequences], return_inverse=True)
    by_tree = np.zeros((len(trees), *sums[0].shape))
    np.add.at(by_tree, of_sequence, np.stack(sums))
    covariances, variances = np.moveaxis(by_tree[prompt_draws(len(trees))].sum(1), 1, 0)
    # A new head says nothing of any candidate: what is left is rounding.
    slopes = np.where(variances > 1e-9, covariances / np.maximum(variances, 1e-9), 0.0)
    slopes *= temperature
    return [interval(column) for column in slopes.T]
