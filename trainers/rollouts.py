"""Trees of responses sampled from the base model, rewarded and kept as they come."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm
from transformers.utils import logging

from .fingerprints import Unknown, columns_read, digest_of, identify
from .rewards import RewardFunc, RewardLog, compute_rewards
from .samplers import Sampler
from .trees import FORMAT, Node, StoredTrees, Tree, TreeConfig, read_trees, write_trees

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.get_logger(__name__)


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


def read_rollouts(folder: str | Path) -> Any:
    """
    Reads all trees that were collected into a folder so far, or a file of responses.

    Args:
        folder (`str` or `Path`):
            Where [`collect_rollouts`] wrote, or a file of [`write_rollouts`], `.jsonl` or
            `.parquet`.

    Returns:
        A sequence of `Tree` of a folder, in the order of their prompts, which reads a file of them
        at a time as they are asked for; of a file, a [`~datasets.Dataset`] for [`MAVISTrainer`]
        without `reward_funcs`.

    Raises:
        ValueError: A file is damaged, or has a row that is no response with scores. The message
            has the file, the row and the remedy.

    Example:

    ```python
    >>> from trimtab.trainers import read_rollouts
    >>> trees = read_rollouts("VALUE_MODEL/rollouts/train")  # where `output_dir` was VALUE_MODEL
    >>> sum(len(tree.leaves()) for tree in trees)  # responses
    4
    ```
    """
    if Path(folder).suffix in (".jsonl", ".parquet"):
        from .data import read_rollout_file

        return read_rollout_file(Path(folder))
    return StoredTrees(sorted(Path(folder).glob("trees-*.parquet")))


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
) -> StoredTrees:
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
        `StoredTrees`: One tree per prompt of this process, in order.
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
            "prompts": prompts_digest(prompt_ids),
        },
    )
    reward_ids = reward_ids or {name: identify(func) for name, func in reward_funcs.items()}
    read = {name: columns_read(func, columns) for name, func in reward_funcs.items()}
    decoder = digest_of(tokenizer)
    sampler = None
    collected: list[Path] = []
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
            collected.append(path)
            progress.update(len(rows))
    finally:
        progress.close()
    return StoredTrees(collected)


def prompts_digest(prompt_ids: Sequence[list[int]]) -> str:
    """Digest of prompts' tokens as JSON, which is not made as a whole."""
    digest = hashlib.sha256()
    for i, ids in enumerate(prompt_ids):
        digest.update(f"{', ' if i else '['}{json.dumps(ids)}".encode())
    digest.update(b"]")
    return digest.hexdigest()


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
