"""Responses that are there already, with scores: datasets instead of rollouts.

A prompt and its responses are a tree of depth one, in the same Parquet store as sampled trees. Who
wrote the responses is not known, so that nothing here takes them for the base model's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, Value
from transformers.utils import logging

from trimtab.plugins.params import check_objective_name

from .rollouts import FORMAT, Node, Tree, write_trees
from .run_state import trees_fingerprint, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.get_logger(__name__)

SOURCE = "data"  # in a folder's rollouts.json
NUMERIC = re.compile(r"u?int\d+|float\d+|double|bool")
ROLES = ("prompt", "completion")  # of columns that are no scores


@dataclass
class Responses:
    """
    A dataset of scored responses, as trees.

    Args:
        trees (`list[Tree]`):
            One for every distinct prompt, in order of appearance, with a leaf for every row. Its
            `prompt_index` is the prompt's first row.
        cut (`int`):
            Number of responses longer than `max_completion_length`.
    """

    trees: list[Tree]
    cut: int

    def describe(self) -> dict[str, Any]:
        """For the provenance of what is trained from them."""
        return {
            "source": SOURCE,
            "prompts": len(self.trees),
            "responses": sum(len(tree.nodes) - 1 for tree in self.trees),
            "cut": self.cut,
            "fingerprint": trees_fingerprint(self.trees),
        }


def score_columns(dataset: Dataset) -> list[str]:
    """
    The objectives of a dataset of responses: its columns of numbers or truth values. Columns that
    are no objectives are dropped before, with `dataset.select_columns` or `remove_columns`.
    """
    others = [column for column in dataset.column_names if column not in ROLES]
    scores = [column for column in others if _is_numeric(dataset, column)]
    if not scores:
        raise ValueError(
            "`train_dataset` has a column 'completion' and no column of numbers to learn from, "
            f"one for each objective; it has {dataset.column_names}. Add the scores, or give "
            "`reward_funcs` to sample and reward responses of the base model"
        )
    for name in scores:
        check_objective_name("`train_dataset`", name)
    if left := [column for column in others if column not in scores]:
        logger.warning(f"the columns {left} hold no numbers, so that they are no objectives")
    return scores


def _is_numeric(dataset: Dataset, column: str) -> bool:
    feature = dataset.features[column]
    return isinstance(feature, Value) and NUMERIC.fullmatch(feature.dtype) is not None


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Any,
    completion: Any = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Tokens of a prompt, ready for a response, or of a prompt with its response; both are strings,
    or lists of messages."""
    kwargs: Any = template_kwargs or {}
    if isinstance(prompt, str):
        # A prompt that a chat template has written begins with the token already.
        bos = getattr(tokenizer, "bos_token", None)
        whole = bos is not None and prompt.startswith(bos)
        ids: Any = tokenizer(prompt + (completion or ""), add_special_tokens=not whole)["input_ids"]
        return ids
    return tokenizer.apply_chat_template(  # type: ignore[return-value]
        prompt + (completion or []),
        add_generation_prompt=completion is None,
        tokenize=True,
        return_dict=False,
        **kwargs,
    )


def tokenize_completion(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Any,
    completion: Any,
    prompt_ids: list[int],
    eos_token_ids: set[int],
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """
    Tokens of a response as the served model would sample them after its prompt, up to its
    end-of-sequence token, which is added where there is none.

    Raises `ValueError`, without saying in which row, where the prompt's tokens are not those that
    prompt and response begin with, or something follows the end.
    """
    if isinstance(prompt, str) != isinstance(completion, str):
        raise ValueError("'prompt' and 'completion' must both be strings or both lists of messages")
    if not isinstance(completion, str) and len(completion) != 1:
        raise ValueError(
            f"'completion' has {len(completion)} messages, a response is one message; put earlier "
            "turns into 'prompt'"
        )
    whole = tokenize(tokenizer, prompt, completion, template_kwargs)
    if whole[: len(prompt_ids)] != prompt_ids:
        common = next(
            (i for i, (a, b) in enumerate(zip(prompt_ids, whole)) if a != b),
            min(len(prompt_ids), len(whole)),
        )
        raise ValueError(
            "the tokens of the prompt are not those that prompt and completion begin with: the "
            f"prompt goes on with {tokenizer.decode(prompt_ids[common:])!r}, both together with "
            f"{tokenizer.decode(whole[common : len(prompt_ids) + 1])!r}. Move the space between "
            "them to the beginning of the completion, or use a chat template that writes a prompt "
            "alike in both"
        )
    ids = whole[len(prompt_ids) :]
    end = next((i for i, token in enumerate(ids) if token in eos_token_ids), None)
    if end is None:
        own = tokenizer.eos_token_id
        return [*ids, own if own in eos_token_ids else min(eos_token_ids)]
    # What a chat template writes after the end is sampled by no one.
    after = str(tokenizer.decode(ids[end + 1 :], skip_special_tokens=True))
    if after.strip():
        raise ValueError(
            f"{after!r} follows the end-of-sequence token in 'completion'; a response ends there"
        )
    return ids[: end + 1]


def read_responses(
    name: str,
    dataset: Dataset,
    objectives: Sequence[str],
    prompt_ids: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    eos_token_ids: set[int],
    max_completion_length: int,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Responses:
    """
    Reads scored responses: of several rows with the same prompt one tree is made.

    A response longer than `max_completion_length` is cut: its first tokens are learnt from, with
    the score of the whole response, which is what is known of what they lead to.

    Args:
        name (`str`):
            Of the dataset, for messages.
        dataset ([`~datasets.Dataset`]):
            With the columns `"prompt"`, `"completion"` and one for each objective, in which `None`
            or NaN is a score that is not known.
        objectives (`list[str]`):
            Columns to learn.
        prompt_ids (`list[list[int]]`):
            Tokens of the prompts, by row.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The base model's.
        eos_token_ids (`set[int]`):
            Tokens that end a response.
        max_completion_length (`int`):
            Maximum number of tokens of a response.
        template_kwargs (`dict[str, Any]`, *optional*):
            For the chat template.

    Returns:
        [`Responses`]: with the scores as rewards. Raises `ValueError` with the row.
    """
    if missing := {"completion", *objectives} - set(dataset.column_names):
        raise ValueError(
            f"`{name}_dataset` has no column {min(missing)!r}, it has {dataset.column_names}; it "
            "must have a column 'completion' and one for each of the objectives "
            f"{list(objectives)}"
        )
    scores = {}
    for column in objectives:
        if not _is_numeric(dataset, column):
            raise ValueError(
                f"the column {column!r} of `{name}_dataset` holds "
                f"{dataset.features[column]}, an objective is numbers"
            )
        values = scores[column] = np.array(dataset[column], dtype=float)
        if np.isnan(values).all():
            raise ValueError(
                f"`{name}_dataset` has no score in its column {column!r}: remove the column"
            )
        if np.isinf(values).any():
            raise ValueError(
                f"row {int(np.isinf(values).argmax())} of `{name}_dataset` has an infinite "
                f"{column!r}; give a number, or None where it is not known"
            )
    trees: dict[tuple[int, ...], Tree] = {}
    rows: dict[tuple[int, ...], list[int]] = {}
    cut = 0
    for row, (prompt, completion) in enumerate(zip(dataset["prompt"], dataset["completion"])):
        try:
            tokens = tokenize_completion(
                tokenizer, prompt, completion, prompt_ids[row], eos_token_ids, template_kwargs
            )
        except ValueError as error:
            raise ValueError(f"row {row} of `{name}_dataset`: {error}") from error
        cut += len(tokens) > max_completion_length
        key = tuple(prompt_ids[row])
        tree = trees.setdefault(key, Tree(row, [Node(-1, 0, prompt_ids[row])]))
        tree.nodes.append(Node(0, 1, tokens[:max_completion_length], leaf=True))
        rows.setdefault(key, []).append(row)
    for key, tree in trees.items():
        tree.rewards = {c: np.r_[np.nan, values[rows[key]]] for c, values in scores.items()}
    if cut:
        logger.warning(
            f"{cut} of the {len(dataset)} responses of `{name}_dataset` are longer than "
            f"max_completion_length={max_completion_length} tokens: of these the first ones are "
            "learnt from, with the score of the whole response"
        )
    return Responses(list(trees.values()), cut)


def store_responses(folder: Path, responses: Responses, batch_size: int) -> None:
    """
    Writes the trees to a folder that [`read_rollouts`] reads, in the place of those of other data.

    Nothing of an earlier run is kept but hidden states, which say themselves what they are of.

    Args:
        folder (`Path`):
            Where to store them.
        responses ([`Responses`]):
            What to store.
        batch_size (`int`):
            Number of prompts in a file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "rollouts.json"
    paths = sorted(folder.glob("trees-*.parquet"))
    found = json.loads(settings.read_text()) if settings.exists() else {}
    if (found or paths) and found.get("source") != SOURCE:
        raise ValueError(
            f"{str(folder)!r} holds rollouts that were sampled, and data would take their place; "
            "give another `rollout_dir`"
        )
    described = {"format": FORMAT, **responses.describe()}
    write_json(settings, {"format": FORMAT, "source": SOURCE})  # of which data, once it is written
    stamp = json.dumps(described["fingerprint"])
    kept = set()
    for number, start in enumerate(range(0, len(responses.trees), batch_size)):
        path = folder / f"trees-{number:05d}.parquet"
        trees = responses.trees[start : start + batch_size]
        write_trees(path, trees, dict.fromkeys(trees[0].rewards, f"data {stamp}"))
        kept.add(path)
    for path in paths:
        if path not in kept:
            path.unlink()
            path.with_suffix(".hidden.safetensors").unlink(missing_ok=True)
    write_json(settings, described)
