"""Trees as training sequences: all nodes of a tree in one sequence, under a mask of its branches.

Every token is computed once however many responses share it, and a token sees its own branch only,
at the positions that it has in its own response. The label of a token is the value of its node.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from .trees import MARGIN, Tree

CANDIDATE_COLUMNS = ("candidate_positions", "candidates", "candidate_log_probs")


def keep_leaves(tree: Tree, fraction: float, seed: int) -> set[int]:
    """Nodes to train on: all, but only a random fraction of the bottom layer."""
    bottom = max(node.layer for node in tree.nodes)
    rng = np.random.default_rng([seed, tree.prompt_index])
    drawn = rng.random(len(tree.nodes))  # also drawn for the others: what is kept is stable
    return {i for i, node in enumerate(tree.nodes) if node.layer < bottom or drawn[i] < fraction}


def pack_tree(
    tree: Tree,
    values: np.ndarray,
    max_length: int,
    kept: set[int] | None = None,
    kl_penalty: float = 0.0,
) -> list[dict[str, Any]]:
    """
    Cuts a tree into sequences of whole branches.

    Args:
        tree (`Tree`):
            Responses to one prompt.
        values (`np.ndarray`):
            Standardised value of every node, `[n_nodes, n_objectives]`; NaN for an objective that
            the tree says nothing about.
        max_length (`int`):
            Maximum number of tokens of a sequence that holds more than one response.
        kept (`set[int]`, *optional*):
            Nodes to use. A node comes with its parents. By default all.
        kl_penalty (`float`, *optional*, defaults to `0.0`):
            What a nat of KL in the rest of a node costs the values of the tokens before it.

    Returns:
        `list[dict[str, Any]]`: Sequences, each with

        - `input_ids`, `position_ids`, `segments` (which node of the sequence a token is in),
          `depths` (tokens since the prompt) and `previous` (index of the token before it on its
          branch, 0 for the first): `[length]` int64
        - `parents` (of the sequence's nodes, `-1` for the root): `[n_segments]` int64
        - `labels`: `[length, n_objectives]` float32; NaN at the prompt but for its last token, and
          at tokens that have their label in another sequence
        - `siblings` (indices of the first token and of the last token of two siblings):
          `[n_pairs, 4]` int64, and `sibling_labels` (difference of their values at their first and
          last tokens): `[n_pairs, 2, n_objectives]` float32
    """
    kept = set(range(len(tree.nodes))) if kept is None else kept
    inner = {tree.nodes[i].parent for i in kept}
    ends = sorted(tree.path(i) for i in kept if i not in inner)  # depth first
    groups: list[list[int]] = []
    length = 0
    for path in ends:
        new = [i for i in path if not groups or i not in groups[-1]]
        grown = sum(len(tree.nodes[i].tokens) for i in new)
        if not groups or length + grown > max_length:
            groups.append([])
            new, length = path, len(tree.nodes[0].tokens)
            grown = sum(len(tree.nodes[i].tokens) for i in new)
        groups[-1] += new
        length += grown

    token_values = []  # of each node, [n_tokens, n_objectives]
    for piece, value in zip(tree.nodes, values):
        ahead = np.zeros(len(piece.tokens))  # KL of the steps after each token
        if piece.kls:
            ahead[:-1] = np.cumsum(piece.kls[:0:-1])[::-1]
        token_values.append(value - kl_penalty * ahead[:, None])

    labelled: set[int] = set()
    paired: set[tuple[int, int]] = set()
    sequences = []
    for group in groups:
        nodes = [0, *group]
        local = {node: i for i, node in enumerate(nodes)}
        starts: dict[int, int] = {}
        columns: dict[str, list[Any]] = {
            name: [] for name in ("input_ids", "position_ids", "segments", "depths", "previous")
        }
        labels = []
        position = {0: 0}  # of a node's first token
        prompt_length = len(tree.nodes[0].tokens)
        for node in nodes:
            tokens = tree.nodes[node].tokens
            start = starts[node] = len(columns["input_ids"])
            before = 0
            if node:
                parent = tree.nodes[node].parent
                position[node] = position[parent] + len(tree.nodes[parent].tokens)
                before = starts[parent] + len(tree.nodes[parent].tokens) - 1
            positions = range(position[node], position[node] + len(tokens))
            columns["input_ids"] += tokens
            columns["position_ids"] += positions
            columns["segments"] += [local[node]] * len(tokens)
            columns["previous"] += [before, *range(start, start + len(tokens) - 1)]
            columns["depths"] += [max(0, p + 1 - prompt_length) for p in positions]
            label = np.full((len(tokens), values.shape[1]), np.nan, dtype=np.float32)
            if node not in labelled:
                known = slice(-1 if node == 0 else 0, None)
                label[known] = token_values[node][known]
                labelled.add(node)
            labels.append(label)
        pairs = []
        for a in group:
            for b in group:
                same = tree.nodes[a].parent == tree.nodes[b].parent
                if a < b and same and (a, b) not in paired:
                    paired.add((a, b))
                    pairs.append((a, b))
        columns["parents"] = [-1, *(local[tree.nodes[node].parent] for node in group)]
        columns["siblings"] = [
            (
                starts[a],
                starts[b],
                starts[a] + len(tree.nodes[a].tokens) - 1,
                starts[b] + len(tree.nodes[b].tokens) - 1,
            )
            for a, b in pairs
        ]
        difference = [token_values[a][[0, -1]] - token_values[b][[0, -1]] for a, b in pairs]
        sequences.append(
            {
                **{name: np.array(column, dtype=np.int64) for name, column in columns.items()},
                "siblings": np.array(columns["siblings"], dtype=np.int64).reshape(-1, 4),
                "labels": np.concatenate(labels),
                "sibling_labels": np.array(difference, dtype=np.float32).reshape(
                    len(pairs), 2, values.shape[1]
                ),
            }
        )
    return sequences


def pack_pairs(tree: Tree, values: np.ndarray) -> list[dict[str, Any]]:
    """A sequence of [`pack_tree`] for every two leaves of a tree of depth one, with `margins`."""
    margins = tree.rewards.get(MARGIN, np.zeros(len(tree.nodes))).astype(np.float32)
    sequences = []
    for chosen, rejected in zip(tree.leaves()[::2], tree.leaves()[1::2]):
        (sequence,) = pack_tree(tree, values, sys.maxsize, {chosen, rejected})
        sequences.append({**sequence, "margins": margins[[chosen]]})
    return sequences


class TreeDataset(Dataset):
    """
    Training sequences of many trees.

    Args:
        trees (`list[Tree]`):
            Trees with the rewards of some of the objectives.
        objectives (`list[str]`):
            Rewards to learn, in the order of the head's outputs.
        mean (`np.ndarray`):
            Subtracted from the rewards, `[n_objectives]`.
        std (`np.ndarray`):
            Divides the rewards, `[n_objectives]`.
        max_length (`int`):
            See [`pack_tree`].
        leaf_fraction (`float`, *optional*, defaults to `1.0`):
            Fraction of every tree's bottom layer to use.
        seed (`int`, *optional*, defaults to `0`):
            Chooses that fraction.
        kl_penalty (`float`, *optional*, defaults to `0.0`):
            What a nat of KL costs, in standardised rewards.
        pairs (`bool`, *optional*, defaults to `False`):
            Whether every two leaves of a tree are a pair, which is a sequence of its own, however
            long; it has `margins`, `[1]` float32, too.
        keep (`Callable[[np.ndarray], np.ndarray]`, *optional*):
            Of [`MappedArrays`], for the sequences' arrays; by default they are in memory.
    """

    def __init__(
        self,
        trees: Sequence[Tree],
        objectives: Sequence[str],
        mean: np.ndarray,
        std: np.ndarray,
        max_length: int,
        leaf_fraction: float = 1.0,
        seed: int = 0,
        kl_penalty: float = 0.0,
        pairs: bool = False,
        keep: Callable[[np.ndarray], np.ndarray] = np.asarray,
    ) -> None:
        self.sequences: list[dict[str, Any]] = []
        for tree in trees:
            values = np.full((len(tree.nodes), len(objectives)), np.nan)
            for i, name in enumerate(objectives):
                if name in tree.rewards:
                    values[:, i] = tree.values(name, kl_penalty * std[i])
            if np.isnan(values).all():  # no reward of any objective
                continue
            values = (values - mean) / std
            if pairs:
                packed = pack_pairs(tree, values)
            else:
                kept = keep_leaves(tree, leaf_fraction, seed)
                packed = pack_tree(tree, values, max_length, kept, kl_penalty)
            for sequence in packed:
                arrays = {name: keep(array) for name, array in sequence.items()}
                self.sequences.append({**arrays, "tree": tree.prompt_index})

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.sequences[index]


@dataclass
class DataCollatorForTrees:
    """
    Pads sequences of [`pack_tree`] on the right and makes the mask of their branches.

    Args:
        pad_token_id (`int`):
            Fills the padding. It may be the end-of-sequence token: only the mask tells them apart.
        additive_mask (`bool`, *optional*, defaults to `False`):
            Whether the mask is 0 and minus infinity, for eager attention, or boolean.
    """

    pad_token_id: int
    additive_mask: bool = False

    def __call__(self, sequences: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch, length = len(sequences), max(len(s["input_ids"]) for s in sequences)
        objectives = sequences[0]["labels"].shape[1]
        input_ids = torch.full((batch, length), self.pad_token_id)
        position_ids = torch.zeros(batch, length, dtype=torch.int64)
        depths = torch.zeros(batch, length, dtype=torch.int64)
        labels = torch.full((batch, length, objectives), torch.nan)
        mask = torch.eye(length, dtype=torch.bool).repeat(batch, 1, 1)  # no row without a key
        siblings, sibling_labels = [], []
        for i, sequence in enumerate(sequences):
            n = len(sequence["input_ids"])
            input_ids[i, :n] = torch.from_numpy(sequence["input_ids"])
            position_ids[i, :n] = torch.from_numpy(sequence["position_ids"])
            depths[i, :n] = torch.from_numpy(sequence["depths"])
            labels[i, :n] = torch.from_numpy(sequence["labels"])
            mask[i, :n, :n] = branch_mask(sequence["segments"], sequence["parents"])
            siblings.append(torch.from_numpy(sequence["siblings"]) + i * length)
            sibling_labels.append(torch.from_numpy(sequence["sibling_labels"]))
        attention_mask = mask[:, None]
        if self.additive_mask:
            attention_mask = torch.zeros(attention_mask.shape).masked_fill(
                ~attention_mask, torch.finfo(torch.float32).min
            )
        others: dict[str, torch.Tensor] = {}
        if "candidates" in sequences[0]:  # `add_candidates` was here
            others = {
                name: pad_sequence(
                    [torch.from_numpy(sequence[name]) for sequence in sequences], batch_first=True
                )
                for name in CANDIDATE_COLUMNS
            }
        if "margins" in sequences[0]:  # of pairs
            margins = np.concatenate([sequence["margins"] for sequence in sequences])
            others["margins"] = torch.from_numpy(margins)
        return {
            **others,
            "input_ids": input_ids,
            "position_ids": position_ids,
            "attention_mask": attention_mask,  # [batch, 1, length, length]
            "depths": depths,
            "labels": labels,
            "siblings": torch.cat(siblings),  # into the flattened batch
            "sibling_labels": torch.cat(sibling_labels),
        }


def branch_mask(segments: np.ndarray, parents: np.ndarray) -> torch.Tensor:
    """Which tokens a token sees, `[length, length]` bool: those before it on its own branch."""
    ancestors = np.eye(len(parents), dtype=bool)
    for segment, parent in enumerate(parents):
        if parent >= 0:
            ancestors[segment] |= ancestors[parent]
    mask = ancestors[segments[:, None], segments[None, :]]
    return torch.from_numpy(np.tril(mask))
