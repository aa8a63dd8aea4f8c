"""Trees of responses sampled from the base model, and their storage as Parquet.

A tree's root is a prompt, its nodes are pieces of responses, its leaves finish them. The value of a
node is the mean reward of the responses below it: an unbiased sample of `V(prefix)` (arXiv
2508.13415, section 4). This file samples, stores and reads trees; `packing` trains on them.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm
from transformers.utils import logging

from .fingerprints import Unknown, columns_read, digest_of, identify
from .rewards import RewardFunc, RewardLog, compute_rewards
from .samplers import Sampler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.get_logger(__name__)

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
            Whether the response is finished: ended by itself or at `max_completion_length`.
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
    """

    prompt_index: int
    nodes: list[Node]
    rewards: dict[str, np.ndarray] = field(default_factory=dict)

    def leaves(self) -> list[int]:
        """Indices of the finished responses."""
        return [i for i, node in enumerate(self.nodes) if node.leaf]

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
        Value of every node at its last token, `[n_nodes]`: a leaf's reward, else the weighted mean
        over the children of their values less `kl_penalty` times the KL of their steps.

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
            elif node.weight:
                value = values[i] - kl_penalty * sum(node.kls)
                values[node.parent] += value * (node.weight * known[i]) / total[node.parent]
        if known[0] == 0:
            values[0] = np.nan
        return values

    def kl(self) -> float:
        """Mean KL of a response to the base model, in nats."""
        shares = self.shares()
        return float(sum(share * sum(node.kls) for share, node in zip(shares, self.nodes)))


def grow_trees(
    sampler: Sampler,
    prompts: Sequence[tuple[int, list[int]]],
    config: TreeConfig,
    eos_token_ids: set[int],
) -> list[Tree]:
    """
    Samples one tree per prompt, each layer of all of them in one call of the sampler.

    A piece's length is drawn before the piece, uniform around its share of what is left, so that
    nodes lie at every depth. A first piece that ends within its length would make the root's child
    a leaf: it is split at a random point. The rest that it was sampled with stays the split's only
    unbiased sample, since it is why there is a split; its new siblings get weight 0.

    Args:
        sampler (`Sampler`):
            Continues prefixes.
        prompts (`list[tuple[int, list[int]]]`):
            Dataset row and tokens of every prompt.
        config (`TreeConfig`):
            Shape of the trees.
        eos_token_ids (`set[int]`):
            Tokens that end a response.

    Returns:
        `list[Tree]`: The trees, without rewards.
    """
    trees = [Tree(index, [Node(-1, 0, list(tokens))]) for index, tokens in prompts]
    # A tree's random numbers depend on the seed and its row only, not on the batch it is in.
    rngs = [np.random.default_rng([config.seed, tree.prompt_index]) for tree in trees]
    frontiers = [[(0, config.root_children, 1.0)] for _ in trees]
    for layer in range(1, config.layers + 1):
        requests = []
        for number, (tree, rng) in enumerate(zip(trees, rngs)):
            for parent, count, weight in frontiers[number]:
                response = tree.response(parent)
                left = config.max_completion_length - len(response)
                prefix = tree.nodes[0].tokens + response
                for _ in range(count):
                    length = left
                    if layer < config.layers:
                        share = left / (config.layers - layer + 1)
                        length = min(int(rng.integers(1, max(2, round(2 * share)))), left)
                    seed = int(rng.integers(2**31))
                    requests.append((number, parent, weight, left, prefix, length, seed))
        if not requests:
            break
        pieces = sampler(
            [request[4] for request in requests],
            [request[5] for request in requests],
            [request[6] for request in requests],
        )
        frontiers = [[] for _ in trees]
        for (number, parent, weight, left, *_), piece in zip(requests, pieces):
            tree, frontier = trees[number], frontiers[number]
            length = len(piece.tokens)
            leaf = piece.tokens[-1] in eos_token_ids or length == left
            node = len(tree.nodes)
            if leaf and layer == 1 < config.layers and length > 1:
                cut = int(rngs[number].integers(1, length))
                tree.nodes.append(Node(parent, layer, weight=weight, **vars(piece[:cut])))
                tree.nodes.append(Node(node, layer + 1, leaf=True, **vars(piece[cut:])))
                frontier.append((node, config.children - 1, 0.0))
            else:
                tree.nodes.append(Node(parent, layer, weight=weight, leaf=leaf, **vars(piece)))
                if not leaf:
                    frontier.append((node, config.children, 1.0))
    return trees


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
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        pq.write_table(table, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


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


def read_rollouts(folder: str | Path) -> Any:
    """
    Reads all trees that were collected into a folder so far, or a file of responses.

    Args:
        folder (`str` or `Path`):
            Where [`collect_rollouts`] wrote, or a file of [`write_rollouts`], `.jsonl` or
            `.parquet`.

    Returns:
        `list[Tree]` of a folder, in the order of their prompts; of a file, a [`~datasets.Dataset`]
        for [`MAVISTrainer`] without `reward_funcs`. Raises `ValueError` with the file, the row and
        the remedy where a file is damaged or has a row that is no response with scores.
    """
    if Path(folder).suffix in (".jsonl", ".parquet"):
        from .data import read_rollout_file

        return read_rollout_file(Path(folder))
    return [
        tree
        for path in sorted(Path(folder).glob("trees-*.parquet"))
        for tree in read_trees(path)[0]
    ]


def collect_rollouts(
    folder: str | Path,
    prompts: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[list[int]],
    reward_funcs: Mapping[str, RewardFunc],
    config: TreeConfig,
    eos_token_ids: set[int],
    make_sampler: Callable[[], Any],
    identity: Mapping[str, Any],
    batch_size: int = 32,
    process_index: int = 0,
    num_processes: int = 1,
    reward_ids: Mapping[str, str] | None = None,
    reward_log: RewardLog | None = None,
) -> list[Tree]:
    """
    Samples and rewards one tree per prompt, or reads what an earlier run left and does the rest.

    A batch of prompts is one file. It is written when its trees are sampled and again when each
    reward is computed, so that neither an interruption nor a reward function that fails loses more
    than the batch being sampled.

    Args:
        folder (`str` or `Path`):
            Where to store the trees. It belongs to one configuration, kept in `rollouts.json`.
        prompts (`list`):
            Strings, or conversations.
        columns (`dict[str, list]`):
            Other columns of the dataset, for the reward functions.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Decodes the responses.
        prompt_ids (`list[list[int]]`):
            Tokens of the prompts.
        reward_funcs (`dict[str, Callable]`):
            One reward function per objective.
        config (`TreeConfig`):
            Shape of the trees.
        eos_token_ids (`set[int]`):
            Tokens that end a response.
        make_sampler (`Callable[[], Sampler]`):
            Called when something is left to sample. The caller closes what it returns.
        identity (`dict[str, Any]`):
            Names the base model and the tokenizer.
        batch_size (`int`, *optional*, defaults to `32`):
            Number of prompts per batch.
        process_index (`int`, *optional*, defaults to `0`):
            Which of the processes that share the work this is.
        num_processes (`int`, *optional*, defaults to `1`):
            Number of processes that share the batches, and the folder.
        reward_ids (`dict[str, str]`, *optional*):
            [`identify`] of the reward functions, where it was asked before they were called.
        reward_log ([`RewardLog`], *optional*):
            What reward functions are given beside the responses, and log. What is stored already is
            not scored again, and logs nothing.

    Returns:
        `list[Tree]`: One tree per prompt of this process, in order.
    """
    if taken := sorted({"prompts", "completions", "completion_ids"} & set(columns)):
        raise ValueError(
            f"the dataset has a column {taken[0]!r}, by which reward functions are given the "
            f"responses: rename it, `dataset.rename_column({taken[0]!r}, 'other')`"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shape = asdict(config)
    if config.top_p == 1:  # folders may be older than it
        del shape["top_p"]
    claim_folder(
        folder,
        {
            "format": FORMAT,
            **identity,
            **shape,
            "batch_size": batch_size,
            "prompts": hashlib.sha256(json.dumps(list(prompt_ids)).encode()).hexdigest(),
        },
    )
    reward_ids = reward_ids or {name: identify(func) for name, func in reward_funcs.items()}
    read = {name: columns_read(func, columns) for name, func in reward_funcs.items()}
    decoder = digest_of(tokenizer)
    sampler = None
    collected: list[Tree] = []
    starts = list(range(0, len(prompts), batch_size))[process_index::num_processes]
    batches = [range(start, min(start + batch_size, len(prompts))) for start in starts]
    progress = tqdm(
        total=sum(map(len, batches)), desc=f"Collecting {folder.name} rollouts", unit="prompt"
    )
    try:
        for rows in batches:
            path = folder / f"trees-{rows.start // batch_size:05d}.parquet"
            trees: list[Tree] = []
            stored: dict[str, str] = {}
            if path.exists():
                try:
                    trees, stored = read_trees(path)
                except (OSError, pa.ArrowException) as error:  # a disk was full, or cut off
                    logger.warning(f"{path} cannot be read ({error}): sampling its prompts again")
            if not trees:
                sampler = sampler or make_sampler()
                trees = grow_trees(
                    sampler, [(i, prompt_ids[i]) for i in rows], config, eos_token_ids
                )
                write_trees(path, trees, stored)
            for name, func in reward_funcs.items():
                # What is read of the dataset counts as well as the function.
                seen = {column: [columns[column][i] for i in rows] for column in read[name]}
                scored = (decoder, [prompts[i] for i in rows], seen)
                reward_id = f"{reward_ids[name]} {content_id(scored, name)}"
                if stored.get(name) == reward_id:
                    continue
                if name in stored:
                    logger.warning(f"reward function {name!r} has changed: scoring {path} again")
                score_trees(trees, name, func, prompts, columns, tokenizer, reward_log)
                stored[name] = reward_id
                write_trees(path, trees, stored)
            collected += trees
            progress.update(len(rows))
    finally:
        progress.close()
    return collected


def content_id(value: Any, name: str) -> str:
    """A digest of what a reward function is given; unlike all others where there is none."""
    try:
        return digest_of(value)[:16]
    except Unknown as error:
        logger.warning_once(
            f"reward function {name!r} reads {error} of the dataset, which cannot be compared with "
            "that of another run: its stored rewards are not used again"
        )
        return uuid.uuid4().hex


def switch_policy(folder: Path, value_model: str) -> None:
    """Sets rollouts of another value model's policy aside, and takes up those of this one."""
    path = folder / "rollouts.json"
    if path.exists() and (found := json.loads(path.read_text())["value_model"]) != value_model:
        aside = folder.with_name(f"{folder.name}-of-{found}")
        logger.warning(
            f"the rollouts in {str(folder)!r} are of the value model {found}, not of "
            f"{value_model}: they are kept in {str(aside)!r} and are not learnt from"
        )
        folder.rename(aside)
    own = folder.with_name(f"{folder.name}-of-{value_model}")
    if own.exists() and not folder.exists():
        own.rename(folder)


def claim_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Writes the settings into a new folder; refuses a folder that was made with others."""
    path = folder / "rollouts.json"
    if path.exists():
        found = json.loads(path.read_text())
        differing = [
            f"{key} was {found.get(key)!r} and is {settings.get(key)!r}"
            for key in sorted(found.keys() | settings.keys())
            if found.get(key) != settings.get(key)
        ]
        if differing:
            raise ValueError(
                f"the rollouts in {str(folder)!r} were made with other settings: "
                f"{'; '.join(differing)}. Give another `rollout_dir`, or remove that folder to "
                "sample again"
            )
        return
    if any(folder.glob("trees-*.parquet")):
        raise ValueError(
            f"{str(folder)!r} holds rollouts without their rollouts.json; give another "
            "`rollout_dir`"
        )
    partial = folder / f".rollouts.json.{os.getpid()}.partial"  # every process may write it
    partial.write_text(json.dumps(settings, indent=2) + "\n")
    partial.replace(path)


def score_trees(
    trees: Sequence[Tree],
    name: str,
    func: RewardFunc,
    prompts: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    tokenizer: PreTrainedTokenizerBase,
    log: RewardLog | None = None,
) -> None:
    """Computes one objective's reward of every finished response, in one call of its function."""
    leaves = [(tree, leaf) for tree in trees for leaf in tree.leaves()]
    rows = [tree.prompt_index for tree, _ in leaves]
    completion_ids = [tree.response(leaf) for tree, leaf in leaves]
    completions: list[Any] = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    if not isinstance(prompts[0], str):
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    rewards: Iterator[float] = iter(
        compute_rewards(
            name,
            func,
            [prompts[row] for row in rows],
            completions,
            completion_ids,
            {column: [values[row] for row in rows] for column, values in columns.items()},
            log,
        )
    )
    if log is not None:
        log.take_extra([(tree.prompt_index, leaf) for tree, leaf in leaves])
    for tree in trees:
        tree.rewards[name] = np.full(len(tree.nodes), np.nan)
    for tree, leaf in leaves:
        tree.rewards[name][leaf] = next(rewards)
