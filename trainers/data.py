"""Responses that are there already, with scores: datasets, and files of another tool's rollouts.

A prompt and its responses are a tree of depth one, in the same Parquet store as sampled trees; a
response in steps with labels is a branch of a node for each. Responses are taken for the base
model's only where every one of them says so.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, IterableDataset, Value
from transformers.utils import logging

from trimtab.plugins.params import check_objective_name

from .files import replacing, write_json
from .preferences import WIN
from .responses import SOURCE, Responses, ResponseTrees, TokenLists
from .samplers import SERVER_TOLERANCE, prompt_log_probs
from .trees import FORMAT, MARGIN, write_trees

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.get_logger(__name__)

PAIR = ("chosen", "rejected")  # columns of a pair
PREFERENCE = "preference"  # the objective of pairs
STEPS, LABELS = "completions", "labels"  # columns of responses in steps; the latter the objective
NUMERIC = re.compile(r"u?int\d+|float\d+|double|bool")
# Columns that are no scores
RESPONSE = ("completion", "completion_ids", STEPS)
ROLES = ("prompt", "prompt_ids", *RESPONSE, "model", "log_probs", "tools")
FILES = (".jsonl", ".parquet")
REFERENCES = 8  # responses whose log-probabilities are compared with the base model's


def score_columns(dataset: Dataset) -> list[str]:
    """
    The objectives of a dataset of responses: its columns of numbers or truth values. Columns that
    are no objectives are dropped before, with `dataset.select_columns` or `remove_columns`.
    """
    if set(PAIR) & set(dataset.column_names):
        return [PREFERENCE]
    if STEPS in dataset.column_names:
        return [LABELS]
    others = [column for column in dataset.column_names if column not in ROLES]
    scores = [column for column in others if _is_numeric(dataset, column)]
    if not scores:
        raise ValueError(
            "`train_dataset` has responses and no column of numbers to learn from, one for each "
            f"objective; it has {dataset.column_names}. Add the scores, or give "
            "`reward_funcs` to sample and reward responses of the base model"
        )
    for name in scores:
        check_objective_name("`train_dataset`", name)
    if left := [column for column in others if column not in scores]:
        logger.warning(f"the columns {left} hold no numbers, so that they are no objectives")
    return scores


def named_sets(train_dataset: Any, eval_dataset: Any) -> dict[str, Any]:
    """The trainer's datasets by the names of their folders: `"train"`, and `"eval"`, or of several
    `"eval_<name>"` each."""
    if eval_dataset is None:
        return {"train": train_dataset}
    if not isinstance(eval_dataset, Mapping):
        return {"train": train_dataset, "eval": eval_dataset}
    for name in eval_dataset:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(
                f"`eval_dataset` has the name {name!r}, which is to be that of a folder, too: give "
                "letters, digits, '_', '.' and '-'"
            )
    return {"train": train_dataset, **{f"eval_{name}": x for name, x in eval_dataset.items()}}


def as_given(sets: Mapping[str, Any]) -> Any:
    """Of [`named_sets`] those to evaluate on, as they were given: one, several by name, or None."""
    if "eval" in sets:
        return sets["eval"]
    return {n.removeprefix("eval_"): x for n, x in sets.items() if n != "train"} or None


def store_stream(dataset: IterableDataset, folder: Path, name: str, write: bool) -> Dataset:
    """
    A dataset that is streamed, as a Parquet file: what is trained on is read more than once.

    Args:
        dataset ([`~datasets.IterableDataset`]):
            Read to its end.
        folder (`Path`):
            Where the file, and what [`~datasets.Dataset.from_parquet`] makes of it, are kept.
        name (`str`):
            Of the dataset.
        write (`bool`):
            Whether this is the process that writes it.
    """
    path, read = folder / f"{name}.parquet", folder / name
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(read, ignore_errors=True)  # of an earlier stream
        partial = path.with_name(f".{path.name}.partial")
        if not (rows := list(dataset)):
            raise ValueError(f"`{name}_dataset` is empty")
        if dataset.features is None:  # those of all rows: in the first ones a score may be None
            whole = _dataset_of(rows, f"`{name}_dataset`")
        else:
            whole = Dataset.from_list(rows, dataset.features)
        whole.to_parquet(partial)
        partial.replace(path)
    stored: Any = Dataset.from_parquet(str(path), cache_dir=str(read))
    return stored


def scored_in_data(reward_funcs: Any) -> list[str]:
    """Objectives that have `None` in the place of a reward function."""
    if not isinstance(reward_funcs, Mapping):
        return []
    return [name for name, func in reward_funcs.items() if func is None]


def once_each(
    dataset: Dataset, prompt_ids: Sequence[list[int]], objectives: Sequence[str]
) -> tuple[Dataset, TokenLists]:
    """
    The prompts of a dataset of responses, to sample from: the first row of each, without its
    response and the scores of these `objectives`.
    """
    rows = list({tuple(ids): row for row, ids in reversed([*enumerate(prompt_ids)])}.values())[::-1]
    own = {*RESPONSE, "prompt_ids", "model", "log_probs", *objectives}
    kept = [column for column in dataset.column_names if column not in own]
    return dataset.select_columns(kept).select(rows), TokenLists(prompt_ids[row] for row in rows)


def with_prompts(dataset: Any) -> Any:
    """Pairs with their prompt in a column of its own, where it is in both responses (TRL's implicit
    prompts); any other dataset as it is."""
    columns = set(getattr(dataset, "column_names", None) or ())
    if not set(PAIR) <= columns or {"prompt", "prompt_ids"} & columns:
        return dataset
    return dataset.map(_split_prompt)


def _split_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """What both responses of a pair begin with is their prompt: text up to a space, which goes to
    the responses, since a token may begin with it and none ends with it."""
    if not isinstance(row["chosen"], str):
        from trl import extract_prompt

        return extract_prompt(row)
    common = row["chosen"][: _common_length(row["chosen"], row["rejected"])]
    end = common.rfind(" ") if " " in common else len(common)
    responses = {name: row[name][end:] for name in PAIR}
    return {"prompt": common[:end], **responses}


def _common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    differing = (i for i, (x, y) in enumerate(zip(a, b)) if x != y)
    return next(differing, min(len(a), len(b)))


def _is_numeric(dataset: Dataset, column: str) -> bool:
    feature = dataset.features[column]
    return isinstance(feature, Value) and NUMERIC.fullmatch(feature.dtype) is not None


def row_kwargs(
    kwargs: Mapping[str, Any] | None, tools: Sequence[Any] | None, row: int
) -> dict[str, Any]:
    """For the chat template of a row: those of all, and its tools, where the dataset has some."""
    return {**(kwargs or {}), **({} if tools is None else {"tools": tools_of(tools[row])})}


def tools_of(tools: Any) -> Any:
    """A row's tools for the chat template: JSON schemas, of which `datasets` fills in fields that
    other rows have; or JSON text, as in TRL."""

    def without_none(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: without_none(x) for key, x in value.items() if x is not None}
        return [without_none(x) for x in value] if isinstance(value, list) else value

    return without_none(json.loads(tools) if isinstance(tools, str) else tools)


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
        special = not _begins(tokenizer, prompt)
        ids: Any = tokenizer(prompt + (completion or ""), add_special_tokens=special)["input_ids"]
        return ids
    return tokenizer.apply_chat_template(  # type: ignore[return-value]
        prompt + (completion or []),
        add_generation_prompt=completion is None,
        tokenize=True,
        return_dict=False,
        **kwargs,
    )


def _begins(tokenizer: PreTrainedTokenizerBase, prompt: str) -> bool:
    """Whether a prompt begins with its special token already, as a chat template has written it."""
    bos: Any = getattr(tokenizer, "bos_token", None)
    return bos is not None and prompt.startswith(bos)


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
    if not isinstance(completion, (str, list)) or type(prompt) is not type(completion):
        raise ValueError(
            "the prompt and the response must both be strings or both lists of messages"
        )
    if not isinstance(completion, str) and len(completion) != 1:
        raise ValueError(
            f"the response has {len(completion)} messages and is to have one; put earlier turns "
            "into the prompt"
        )
    whole = tokenize(tokenizer, prompt, completion, template_kwargs)
    ids = _after_prompt(tokenizer, whole, prompt_ids)
    end = next((i for i, token in enumerate(ids) if token in eos_token_ids), None)
    if end is None:
        own = tokenizer.eos_token_id
        return [*ids, own if own in eos_token_ids else min(eos_token_ids)]
    # What a chat template writes after the end is sampled by no one.
    after = str(tokenizer.decode(ids[end + 1 :], skip_special_tokens=True))
    if after.strip():
        raise ValueError(
            f"{after!r} follows the end-of-sequence token in the response, which ends there"
        )
    return ids[: end + 1]


def _after_prompt(
    tokenizer: PreTrainedTokenizerBase, whole: list[int], prompt_ids: list[int]
) -> list[int]:
    """The response's part of the tokens of both."""
    if whole[: len(prompt_ids)] != prompt_ids:
        common = _common_length(prompt_ids, whole)
        raise ValueError(
            "the tokens of the prompt are not those that prompt and response begin with: the "
            f"prompt goes on with {tokenizer.decode(prompt_ids[common:])!r}, both together with "
            f"{tokenizer.decode(whole[common : len(prompt_ids) + 1])!r}. Move the space between "
            "them to the beginning of the response, or use a chat template that writes a prompt "
            "alike in both"
        )
    return whole[len(prompt_ids) :]


def tokenize_steps(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Any,
    steps: Any,
    prompt_ids: list[int],
    template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[int], list[int]]:
    """
    Tokens of a response in steps, and how many of them there are up to the end of each: the token
    of a step's last character that is no white space. No end-of-sequence token is added, since
    nobody says that the last step is the last. Steps without white space between them are on lines
    of their own, as in TRL.

    Raises `ValueError`, without saying in which row, where steps cannot be found in the tokens.
    """
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        raise ValueError("the steps of a response must be a list of strings")
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say which characters a token is of; responses in "
            "steps need a fast tokenizer"
        )
    text, marks = "", []
    for step in steps:
        joined = not text or text[-1].isspace() or step[:1].isspace()
        text += step if joined else f"\n{step}"
        marks.append(len(text.rstrip()))
    if isinstance(prompt, str):
        whole, start, special = prompt + text, len(prompt), not _begins(tokenizer, prompt)
    else:
        turns, kwargs = [*prompt, {"role": "assistant", "content": text}], template_kwargs or {}
        rendered: Any = tokenizer.apply_chat_template(turns, tokenize=False, **kwargs)
        whole, special = rendered, False  # the template has written the special tokens
        # Many templates strip what they write.
        start = whole.rfind(text.strip()) - (len(text) - len(text.lstrip()))
        if start < 0:
            raise ValueError("the chat template does not write a response as it is; use another")
    encoded = tokenizer(whole, add_special_tokens=special, return_offsets_mapping=True)
    ids = _after_prompt(tokenizer, encoded["input_ids"], prompt_ids)
    firsts = [first for first, _ in encoded["offset_mapping"][len(prompt_ids) :]]
    ends = [sum(first < start + mark for first in firsts) for mark in marks]
    for i, (before, end) in enumerate(zip([0, *ends], ends)):
        if end <= before:
            raise ValueError(f"step {i} has no token of its own, {steps[i]!r}; leave it out")
    return ids[: ends[-1]], ends


def _pieces(
    tokens: list[int], ends: list[int], labels: np.ndarray
) -> list[tuple[list[int], float]]:
    """
    Tokens and label of every step that has one. A step without belongs to the next that has one,
    which is what is known of it; what follows the last one that has one is left out.
    """
    pieces, start = [], 0
    for end, label in zip(ends, labels):
        if not np.isnan(label) and start < end:
            pieces.append((tokens[start:end], float(label)))
            start = end
    return pieces


def check_tokens(field: str, ids: Sequence[int], vocab_size: int) -> None:
    """Raises `ValueError` where these are no tokens of the base model."""
    if wrong := [token for token in ids if not 0 <= token < vocab_size]:
        raise ValueError(
            f"{field!r} has the token {wrong[0]}, the base model's tokenizer has {vocab_size}; "
            "give tokens of the base model, or text"
        )


def check_completion_ids(ids: Sequence[int], eos_token_ids: set[int]) -> list[int]:
    """Raises `ValueError` where these cannot be the tokens of one response."""
    if not ids:
        raise ValueError("'completion_ids' is empty; a response has a token at least")
    if any(token in eos_token_ids for token in ids[:-1]):
        raise ValueError("it goes on after an end-of-sequence token; a response ends there")
    return list(ids)


def sampled_from(name: str, dataset: Dataset, base_model: str) -> bool:
    """
    Whether every response of a dataset says, in its column `"model"`, that the base model sampled
    it. Raises `ValueError` where one names another model.
    """
    if "model" not in dataset.column_names:
        return False
    models = list(dataset["model"])
    for row, model in enumerate(models):
        if model is not None and model != base_model:
            raise ValueError(
                f"row {row} of `{name}_dataset` was sampled from {model!r}, and values are to be "
                f"of {base_model!r}: sample from that, or remove the column 'model' to learn from "
                "these responses as of an unknown writer"
            )
    return None not in models


def _scores(name: str, dataset: Dataset, objectives: Sequence[str]) -> dict[str, np.ndarray]:
    """Of every response, `[n_rows, 1]` for each objective."""
    scores = {}
    for column in objectives:
        if not _is_numeric(dataset, column):
            raise ValueError(
                f"the column {column!r} of `{name}_dataset` holds "
                f"{dataset.features[column]}, an objective is numbers"
            )
        values = np.array(dataset[column], dtype=float)
        if np.isnan(values).all():
            raise ValueError(
                f"`{name}_dataset` has no score in its column {column!r}: remove the column"
            )
        if np.isinf(values).any():
            raise ValueError(
                f"row {int(np.isinf(values).argmax())} of `{name}_dataset` has an infinite "
                f"{column!r}; give a number, or None where it is not known"
            )
        scores[column] = values[:, None]
    return scores


def _step_labels(name: str, dataset: Dataset) -> list[np.ndarray]:
    """Of every response, one for each step, `[n_steps]`."""
    inner = getattr(dataset.features[LABELS], "feature", None)
    if not isinstance(inner, Value) or NUMERIC.fullmatch(inner.dtype) is None:
        raise ValueError(
            f"the column {LABELS!r} of `{name}_dataset` holds {dataset.features[LABELS]}, it must "
            "hold a list of numbers or truth values, one for each step, None where it is not known"
        )
    found = []
    for row, (steps, labels) in enumerate(zip(dataset[STEPS], dataset[LABELS])):
        labels = np.array([] if labels is None else labels, dtype=float)
        if len(labels) != len(steps or ()):
            raise ValueError(
                f"row {row} of `{name}_dataset` has {len(steps or ())} steps in {STEPS!r} and "
                f"{len(labels)} {LABELS!r}; give one for each step, None where it is not known"
            )
        if np.isinf(labels).any():
            raise ValueError(
                f"row {row} of `{name}_dataset` has an infinite number in {LABELS!r}; give None "
                "where it is not known"
            )
        found.append(labels)
    if not any((~np.isnan(labels)).any() for labels in found):
        raise ValueError(f"`{name}_dataset` has no number in its column {LABELS!r}: give some")
    return found


def _preferences(name: str, dataset: Dataset, objectives: Sequence[str]) -> dict[str, np.ndarray]:
    """What both responses of a pair are worth, and its margin if there are any, `[n_rows, 2]`."""
    found = {objectives[0]: np.tile([WIN, -WIN], (len(dataset), 1))}
    if "margin" in dataset.column_names:
        if not _is_numeric(dataset, "margin"):
            raise ValueError(
                f"the column 'margin' of `{name}_dataset` holds {dataset.features['margin']}, it "
                "must hold numbers, log-odds; or leave it out"
            )
        margins = np.array(dataset["margin"], dtype=float)
        if not np.isfinite(margins).all():
            raise ValueError(
                f"row {int((~np.isfinite(margins)).argmax())} of `{name}_dataset` has no finite "
                "'margin'; give a number, 0 for none"
            )
        found[MARGIN] = np.stack([margins, np.zeros(len(margins))], axis=1)
    return found


def read_responses(
    name: str,
    dataset: Dataset,
    objectives: Sequence[str],
    prompt_ids: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    eos_token_ids: set[int],
    max_completion_length: int,
    base_model: str,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Responses:
    """
    Reads scored responses, steps or pairs: of several rows with the same prompt one tree is made.

    A response longer than `max_completion_length` is cut: its first tokens are learnt from, with
    the score of the whole response, which is what is known of what they lead to.

    Args:
        name (`str`):
            Of the dataset, for messages.
        dataset ([`~datasets.Dataset`]):
            With the columns of [`write_rollouts`], of which those of the objectives are learnt;
            rows of which none is known are left out. Or with `"prompt"`, `"completions"` and
            `"labels"`; or with `"prompt"`, `"chosen"`, `"rejected"` and, optional, `"margin"`, in
            log-odds, and `"model"`.
        objectives (`list[str]`):
            Columns to learn.
        prompt_ids ([`TokenLists`]):
            Of the prompts, by row.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The base model's.
        eos_token_ids (`set[int]`):
            Tokens that end a response.
        max_completion_length (`int`):
            Maximum number of tokens of a response.
        base_model (`str`):
            Id or path of the base model.
        template_kwargs (`dict[str, Any]`, *optional*):
            For the chat template.

    Returns:
        [`Responses`]: with the scores as rewards, or in their place `WIN` for a preferred response
        and `-WIN` for the other; of a step its label. Raises `ValueError` with the row.
    """
    given = set(dataset.column_names)
    tokens_given = "completion_ids" in given
    columns: tuple[str, ...] = ("completion_ids" if tokens_given else "completion",)
    in_steps = STEPS in given
    if set(PAIR) & given:
        columns = PAIR
    elif in_steps:
        columns, tokens_given = (STEPS,), False
    needed = {*columns} if columns == PAIR else {*columns, *objectives}
    if missing := needed - given:
        raise ValueError(
            f"`{name}_dataset` has no column {min(missing)!r}, it has {dataset.column_names}; it "
            f"must have {sorted(needed)}"
        )
    if columns == PAIR and len(objectives) != 1:
        raise ValueError(
            f"pairs are of one objective, and the value model has {list(objectives)}; give one of "
            "a single objective, or the base model"
        )
    if in_steps and list(objectives) != [LABELS]:
        raise ValueError(
            f"responses in steps are of the objective {LABELS!r}, and the value model has "
            f"{list(objectives)}; give one of {LABELS!r} alone, or the base model"
        )
    labels: list[np.ndarray] = []
    rewards: dict[str, np.ndarray] = {}
    if in_steps:
        labels = _step_labels(name, dataset)
        told = np.array([bool((~np.isnan(of_row)).any()) for of_row in labels])
    else:
        rewards = (_preferences if columns == PAIR else _scores)(name, dataset, objectives)
        told = ~np.isnan(np.stack(list(rewards.values()))).all((0, 2))
    from_base = sampled_from(name, dataset, base_model)
    log_probs: Any = dataset["log_probs"] if "log_probs" in given else []
    referred = np.linspace(0, len(dataset) - 1, REFERENCES, dtype=int)
    trees = ResponseTrees(prompt_ids, list(rewards) or [LABELS])
    tools = dataset["tools"] if "tools" in given else None
    cut, references = 0, []
    prompts = dataset["prompt"] if "prompt" in given else [None] * len(dataset)
    for row, (prompt, *completions) in enumerate(zip(prompts, *(dataset[c] for c in columns))):
        if not told[row]:
            continue
        for place, (column, completion) in enumerate(zip(columns, completions)):
            ends: list[int] = []
            try:
                if tokens_given:
                    tokens = check_completion_ids(completion, eos_token_ids)
                    check_tokens("completion_ids", tokens, len(tokenizer))
                elif prompt is None:
                    raise ValueError("it is text and 'prompt_ids' is not; give both as one")
                elif in_steps:
                    kwargs = row_kwargs(template_kwargs, tools, row)
                    tokens, ends = tokenize_steps(
                        tokenizer, prompt, completion, prompt_ids[row], kwargs
                    )
                    check_completion_ids(tokens, eos_token_ids)
                else:
                    tokens = tokenize_completion(
                        tokenizer,
                        prompt,
                        completion,
                        prompt_ids[row],
                        eos_token_ids,
                        row_kwargs(template_kwargs, tools, row),
                    )
                if from_base and row in referred and len(log_probs) and log_probs[row] is not None:
                    if len(log_probs[row]) != len(tokens):
                        raise ValueError(
                            f"'log_probs' has {len(log_probs[row])} numbers for {len(tokens)} "
                            "tokens"
                        )
                    references.append((prompt_ids[row], tokens, log_probs[row]))
            except ValueError as error:
                raise ValueError(f"row {row} of `{name}_dataset`, {column!r}: {error}") from error
            cut += len(tokens) > max_completion_length
            tokens = tokens[:max_completion_length]
            if in_steps:
                ends = [min(end, max_completion_length) for end in ends]
                steps = _pieces(tokens, ends, labels[row])
                trees.add(row, [(piece, [label]) for piece, label in steps])
            else:
                trees.add(row, [(tokens, [values[row, place] for values in rewards.values()])])
    if not told.all():
        logger.warning(
            f"{(~told).sum()} of the {len(dataset)} rows of `{name}_dataset` have no score of any "
            "objective and are left out"
        )
    if cut:
        logger.warning(
            f"{cut} of the {told.sum() * len(columns)} responses of `{name}_dataset` are longer "
            f"than max_completion_length={max_completion_length} tokens: of these the first tokens "
            "are learnt from, with the score of the whole response"
        )
    return Responses(trees, cut, from_base, references)


def check_log_probs(responses: Responses, model: Any) -> None:
    """
    Compares the log-probabilities of some responses that are said to be the base model's with what
    it computes.

    Args:
        responses ([`Responses`]):
            With `references`.
        model (`PreTrainedModel`):
            The base model.
    """
    differences = []
    for prompt, tokens, log_probs in responses.references:
        computed = prompt_log_probs(model, prompt + tokens)[-len(tokens) :]
        differences += np.abs(np.subtract(computed, log_probs)).tolist()
    if not np.mean(differences) <= SERVER_TOLERANCE:
        raise ValueError(
            "the responses say that the base model sampled them, and their 'log_probs' differ from "
            f"its own by {np.mean(differences):.2g} a token, more than the {SERVER_TOLERANCE:g} "
            "of rounding: they are of other weights, or not of the plain softmax at temperature 1. "
            "Remove the column 'model' to learn from them as of an unknown writer, or 'log_probs' "
            "if these are of something else"
        )


def write_rollouts(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """
    Writes responses with their scores to a file that [`read_rollouts`] reads, whole or not at all.

    A row is a response, with

    - `prompt_ids` and `completion_ids`, tokens of the base model, the last with its end-of-sequence
      token if it ended; or `prompt` and `completion`, both strings or both lists of messages
    - numbers or truth values in any other columns: its scores, by objective; `None` where one is
      not known
    - `model`, optional: id or path of the model that sampled it, as the trainer has it. Where all
      rows name the base model they are learnt from as sampled ones, with the trainer's
      `temperature` and `top_k`; a row that names another is refused there
    - `log_probs`, optional: of its tokens, at temperature 1 over the whole vocabulary, as many as
      `completion_ids`

    Args:
        path (`str` or `Path`):
            Ends in `.jsonl`, an object on each line, or `.parquet`.
        rows (`Iterable[dict[str, Any]]`):
            A `list` of these, a [`~datasets.Dataset`] or what makes them one by one.

    Raises:
        ValueError: A row is no such thing, and the message has its number; there is none; or the
            path ends otherwise.

    Example:

    ```python
    >>> from trimtab.trainers import read_rollouts, write_rollouts
    >>> response = {"prompt": "Tell me about tea.", "completion": " It is brewed.", "helpful": 0.7}
    >>> write_rollouts("responses.parquet", [response])
    >>> read_rollouts("responses.parquet")[0] == response
    True
    ```
    """
    path, found = Path(path), []
    _check_name(path)
    for number, row in enumerate(rows):
        _check_row(row, f"row {number}")
        # JSON knows no NaN.
        unknown = {n for n, x in row.items() if isinstance(x, float) and math.isnan(x)}
        found.append({n: None if n in unknown else x for n, x in row.items()})
    if not found:
        raise ValueError(f"there are no rollouts to write to {str(path)!r}")
    dataset = _dataset_of(found, "the rollouts")
    with replacing(path) as file:
        if path.suffix == ".jsonl":
            for row in found:
                file.write(json.dumps(row).encode() + b"\n")
        else:
            pq.write_table(dataset.data.table, file)


def read_rollout_file(path: Path) -> Dataset:
    """Of [`read_rollouts`]: the rows of a file, each of them checked."""
    _check_name(path)
    rows = []
    if path.suffix == ".parquet":
        try:
            rows = pq.read_table(path).to_pylist()
        except pa.ArrowException as error:
            raise ValueError(
                f"{str(path)!r} is cut off or no Parquet ({error}); write it again"
            ) from error
        for number, row in enumerate(rows):
            _check_row(row, f"{str(path)!r}, row {number}")
    else:
        with path.open() as file:
            for number, line in enumerate(file, start=1):
                where = f"{str(path)!r}, line {number}"
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(
                        f"{where} is cut off or no JSON ({error}); write the file again, or remove "
                        "that line"
                    ) from error
                _check_row(row, where)
                rows.append(row)
    if not rows:
        raise ValueError(f"{str(path)!r} holds no rollouts; write it again")
    return _dataset_of(rows, repr(str(path)))


def _check_name(path: Path) -> None:
    if path.suffix not in FILES:
        raise ValueError(f"{str(path)!r} must end in one of {FILES}")


def _dataset_of(rows: Sequence[dict[str, Any]], where: str) -> Dataset:
    for column in sorted({name for row in rows for name in row} - set(ROLES)):
        kinds = {isinstance(row.get(column), str) for row in rows if row.get(column) is not None}
        if len(kinds) > 1:
            raise ValueError(f"{where}: {column!r} is text in some rows and a number in others")
    columns = {name: [row.get(name) for row in rows] for name in {n: 0 for r in rows for n in r}}
    try:
        return Dataset.from_dict(columns)
    except (pa.ArrowException, TypeError) as error:
        raise ValueError(
            f"{where}: values of a column are of different types ({error}); make them one"
        ) from error


def _check_row(row: Any, where: str) -> None:
    """Raises `ValueError` unless it is a row of [`write_rollouts`]."""

    def refuse(field: str, expected: str) -> None:
        value = repr(row.get(field))
        value = value if len(value) < 80 else f"{value[:77]}..."
        raise ValueError(f"{where}: {field!r} must be {expected}, got {value}")

    if not isinstance(row, Mapping):
        raise ValueError(f"{where} must be an object of names and values, got {row!r:.80}")
    if row.get("prompt_ids") is not None or row.get("completion_ids") is not None:
        for name in ("prompt_ids", "completion_ids"):
            ids = row.get(name)
            if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
                refuse(name, "a list of one or more tokens, whole numbers")
            if min(row[name]) < 0:
                refuse(name, "a list of tokens, which are not negative")
    else:
        for name in ("prompt", "completion"):
            text = row.get(name)
            turns = text if isinstance(text, list) else []
            messages = [turn for turn in turns if isinstance(turn, Mapping) and "role" in turn]
            if not isinstance(text, str) and (not turns or len(messages) < len(turns)):
                refuse(name, f"text or a list of messages (or '{name}_ids' tokens)")
    if not isinstance(row.get("model"), (str, type(None))):
        refuse("model", "the id or path of a model, or None")
    given = row.get("log_probs")
    if given is not None:
        count = len(row.get("completion_ids") or ())
        if not isinstance(given, list) or len(given) != count:
            refuse("log_probs", f"a number for each of the {count} tokens of 'completion_ids'")
        if not all(isinstance(x, (int, float)) and math.isfinite(x) and x <= 0 for x in given):
            refuse("log_probs", "finite numbers of at most 0")
    scores = [value for name, value in row.items() if name not in ROLES]
    if not any(value is None or isinstance(value, (int, float)) for value in scores):
        raise ValueError(f"{where} has no score, in a column that is named by its objective")
    for name, value in row.items():
        if name not in ROLES and isinstance(value, float) and math.isinf(value):
            refuse(name, "a finite number, or None where it is not known")


def store_responses(folder: Path, responses: Responses, batch_size: int, base_model: str) -> None:
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
        base_model (`str`):
            Id or path of the model whose tokens they are.
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
    described = {"format": FORMAT, "base_model": base_model, **responses.describe()}
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
