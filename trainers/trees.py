"""Trees of responses, and their files.

A tree's root is a prompt, its nodes are pieces of responses, its leaves finish them. The value of a
node is the mean reward of the responses below it: an unbiased sample of `V(prefix)` (arXiv
2508.13415, section 4).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .files import replacing

MARGIN = "margin of a pair"  # among the rewards, at the preferred response of pairs that have one
FORMAT = 2  # of the files; 1 did not tell base models by their weights


@dataclass(frozen=True)
class TreeConfig:
    """
    Shape of the trees and of their responses.

    Args:
        max_completion_length (`int`, *optional*, defaults to `256`):
            Maximum number of tokens of a response.
        layers (`int`, *optional*, defaults to `5`):
            Number of pieces of a response, so `root_children * children ** (layers - 1)` leaves.
        root_children (`int`, *optional*, defaults to `4`):
            Number of children of the root.
        children (`int`, *optional*, defaults to `2`):
            Number of children of every other node.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature for sampling.
        top_k (`int`, *optional*, defaults to `40`):
            Number of likeliest tokens to sample from; 0 samples from all.
        top_p (`float`, *optional*, defaults to `1.0`):
            Of those, the likeliest that have this probability together; 1 samples from all.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the split points and of the sampling.
    """

    max_completion_length: int = 256
    layers: int = 5
    root_children: int = 4
    children: int = 2
    temperature: float = 1.0
    top_k: int = 40
    top_p: float = 1.0
    seed: int = 42


@dataclass
class Node:
    """
    One piece of a response.

    Args:
        parent (`int`):
            Index of the node that it continues, `-1` for the root.
        layer (`int`):
            Depth in the tree, 0 for the root.
        tokens (`list[int]`):
            The prompt for the root, else the piece, with the end-of-sequence token if it ended.
        weight (`float`):
            Relative weight in its parent's mean: 1, or 0 for a sample that would bias it.
        leaf (`bool`):
            Whether its value is told: the response is finished, ended by itself or at
            `max_completion_length`, or a step of it with a label is.
        log_ratios (`list[float]`):
            See [`Piece`]. Empty for the root, and if the base model was sampled.
        kls (`list[float]`):
            See [`Piece`].
    """

    parent: int
    layer: int
    tokens: list[int]
    weight: float = 1.0
    leaf: bool = False
    log_ratios: list[float] = field(default_factory=list)
    kls: list[float] = field(default_factory=list)


@dataclass
class Tree:
    """
    All sampled responses to one prompt. Parents come before their children.

    Args:
        prompt_index (`int`):
            Row of the prompt in the dataset.
        nodes (`list[Node]`):
            The root first.
        rewards (`dict[str, np.ndarray]`):
            Reward of every objective, `[n_nodes]` float64 each, NaN at nodes that are not leaves,
            and at leaves that it does not apply to.

    Example:

    ```python
    >>> from trimtab.trainers import read_rollouts
    >>> tree = read_rollouts("VALUE_MODEL/rollouts/train")[0]
    >>> tree.leaves(), tree.path(4), tree.response(4)
    ([1, 2, 3, 4], [4], [10, 2])
    >>> tree.values("readability")  # of the prompt, and after each response
    array([2.5, 1. , 2. , 3. , 4. ])
    ```
    """

    prompt_index: int
    nodes: list[Node]
    rewards: dict[str, np.ndarray] = field(default_factory=dict)

    def leaves(self) -> list[int]:
        """Indices of the finished responses."""
        inner = {node.parent for node in self.nodes}
        return [i for i, node in enumerate(self.nodes) if node.leaf and i not in inner]

    def path(self, index: int) -> list[int]:
        """Indices from the root's child to the node itself."""
        path = []
        while index > 0:
            path.append(index)
            index = self.nodes[index].parent
        return path[::-1]

    def response(self, index: int) -> list[int]:
        """Tokens of the response up to the end of a node."""
        return [token for i in self.path(index) for token in self.nodes[i].tokens]

    def total_weights(self) -> np.ndarray:
        """Sum of the weights of every node's children, `[n_nodes]`."""
        total = np.zeros(len(self.nodes))
        for node in self.nodes[1:]:
            total[node.parent] += node.weight
        return total

    def shares(self) -> np.ndarray:
        """Probability that a single response would pass through a node's place, `[n_nodes]`."""
        total = self.total_weights()
        shares = np.ones(len(self.nodes))
        for i, node in enumerate(self.nodes[1:], start=1):
            shares[i] = shares[node.parent] * node.weight / total[node.parent]
        return shares

    def known(self, name: str) -> np.ndarray:
        """Share of the responses below every node that have a reward, `[n_nodes]`."""
        total = self.total_weights()
        known = np.zeros(len(self.nodes))
        for i in range(len(self.nodes) - 1, 0, -1):
            node = self.nodes[i]
            if node.leaf:
                known[i] = not np.isnan(self.rewards[name][i])
            else:
                known[i] /= total[i]
            known[node.parent] += node.weight * known[i]
        known[0] /= total[0]
        return known

    def values(self, name: str, kl_penalty: float = 0.0) -> np.ndarray:
        """
        Value of every node at its last token, `[n_nodes]`: a leaf's reward, whatever goes on after
        it, else the weighted mean over the children of their values less `kl_penalty` times the KL
        of their steps.

        Responses without a reward are left out: a child counts by its weight times the share of
        them that have one below it. NaN where none has.
        """
        known = self.known(name)
        total = self.total_weights() * known
        values = np.where([node.leaf for node in self.nodes], self.rewards[name], 0.0)
        for i in range(len(self.nodes) - 1, 0, -1):
            node = self.nodes[i]
            if known[i] == 0:
                values[i] = np.nan
            elif node.weight and not self.nodes[node.parent].leaf:
                value = values[i] - kl_penalty * sum(node.kls)
                values[node.parent] += value * (node.weight * known[i]) / total[node.parent]
        if known[0] == 0:
            values[0] = np.nan
        return values

    def kl(self) -> float:
        """Mean KL of a response to the base model, in nats."""
        shares = self.shares()
        return float(sum(share * sum(node.kls) for share, node in zip(shares, self.nodes)))


SCHEMA = [
    ("tree", pa.int32()),
    ("node", pa.int32()),
    ("parent", pa.int32()),
    ("layer", pa.int32()),
    ("tokens", pa.list_(pa.int32())),
    ("weight", pa.float64()),
    ("leaf", pa.bool_()),
]
# Of trees sampled from a MAVIS policy
DIVERGENCE_SCHEMA = [("log_ratios", pa.list_(pa.float32())), ("kls", pa.list_(pa.float32()))]


def write_trees(path: Path, trees: Sequence[Tree], reward_ids: Mapping[str, str]) -> None:
    """
    Writes trees to a Parquet file, whole or not at all: a row per node, a column per reward.

    Args:
        path (`Path`):
            File to write.
        trees (`list[Tree]`):
            Trees that all have the same rewards.
        reward_ids (`dict[str, str]`):
            What each reward was computed by, kept in the file's metadata.
    """
    rows = [(tree, i, node) for tree in trees for i, node in enumerate(tree.nodes)]
    schema = list(SCHEMA)
    if any(node.kls for _, _, node in rows):
        schema += DIVERGENCE_SCHEMA
    columns: dict[str, list[Any]] = {
        "tree": [tree.prompt_index for tree, _, _ in rows],
        "node": [i for _, i, _ in rows],
        **{name: [getattr(node, name) for _, _, node in rows] for name, _ in schema[2:]},
    }
    for name in trees[0].rewards:
        schema.append((f"reward/{name}", pa.float64()))
        columns[f"reward/{name}"] = np.concatenate([tree.rewards[name] for tree in trees])
    table = pa.table(columns, schema=pa.schema(schema, metadata=dict(reward_ids)))
    with replacing(path) as file:
        pq.write_table(table, file)


def read_trees(path: Path) -> tuple[list[Tree], dict[str, str]]:
    """The trees of a Parquet file, and what their rewards were computed by."""
    table = pq.read_table(path)
    columns = {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}
    trees = []
    starts = np.flatnonzero(columns["node"] == 0)
    for start, stop in zip(starts, [*starts[1:], table.num_rows]):
        nodes = [
            Node(
                int(columns["parent"][i]),
                int(columns["layer"][i]),
                columns["tokens"][i].tolist(),
                float(columns["weight"][i]),
                bool(columns["leaf"][i]),
                *(columns[name][i].tolist() for name, _ in DIVERGENCE_SCHEMA if name in columns),
            )
            for i in range(start, stop)
        ]
        rewards = {
            name.removeprefix("reward/"): column[start:stop].copy()
            for name, column in columns.items()
            if name.startswith("reward/")
        }
        trees.append(Tree(int(columns["tree"][start]), nodes, rewards))
    metadata = table.schema.metadata or {}
    return trees, {key.decode(): value.decode() for key, value in metadata.items()}


def _version(path: Path) -> tuple[int, int, int]:
    """Of a file, which is replaced as a whole."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


class StoredTrees(Sequence[Tree]):
    """
    Trees of files of [`write_trees`], which are read as they are asked for: one file's are in
    memory at a time, and those of a tree that is asked for twice may be two.

    Args:
        paths (`list[Path]`):
            The files, in order.

    Raises:
        ValueError: On reading, if a file has been written since.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths = list(paths)
        self._versions = [_version(path) for path in self.paths]
        counts = [
            np.sum(pq.read_table(path, columns=["node"])["node"].to_numpy() == 0)
            for path in self.paths
        ]
        self._ends = np.cumsum(counts, dtype=int).tolist()
        self._latest: tuple[int, list[Tree]] = (-1, [])

    def _of_file(self, number: int) -> list[Tree]:
        if self._latest[0] != number:
            path = self.paths[number]
            if _version(path) != self._versions[number]:
                raise ValueError(
                    f"{str(path)!r} has been written since it was found: give each run a "
                    "`rollout_dir` of its own, and read the folder again"
                )
            self._latest = number, read_trees(path)[0]
        return self._latest[1]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[Tree]:
        for number in range(len(self.paths)):
            yield from self._of_file(number)

    @overload
    def __getitem__(self, index: int) -> Tree: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tree]: ...
    def __getitem__(self, index: int | slice) -> Tree | list[Tree]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        number = bisect.bisect_right(self._ends, index)
        return self._of_file(number)[index - self._ends[number]]

    def __add__(self, other: StoredTrees) -> StoredTrees:
        return StoredTrees([*self.paths, *other.paths])

    def split(self, names: Iterable[str]) -> tuple[StoredTrees, StoredTrees]:
        """Those that have one of these rewards, and the others."""
        columns = {f"reward/{name}" for name in names}
        found = [bool(columns & set(pq.read_schema(path).names)) for path in self.paths]
        some, others = (
            StoredTrees([p for p, has in zip(self.paths, found) if has == which])
            for which in (True, False)
        )
        return some, others
