"""What a trainer learns from: prompts to sample responses to, responses with scores, or both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from transformers.utils import logging

from .data import (
    PAIR,
    RESPONSE,
    check_tokens,
    named_sets,
    once_each,
    read_responses,
    row_kwargs,
    score_columns,
    scored_in_data,
    store_stream,
    tokenize,
    with_prompts,
)
from .preferences import UTILITY_STD
from .responses import Responses, TokenLists
from .rewards import RewardFunc, load_reward_funcs, reward_statistics
from .trees import StoredTrees, TreeConfig

logger = logging.get_logger(__name__)


class Sources:
    """
    Datasets and reward functions, as [`MAVISTrainer`] takes them. Raises `ValueError` where they
    contradict each other.

    Args:
        args ([`MAVISConfig`]):
            Of the trainer.
        base_model (`str`):
            Id or path of the model that is sampled from.
        reward_funcs, reward_processing_classes, train_dataset, eval_dataset:
            Those of the trainer.
        known (`list[str]`):
            Objectives of the value model that is trained on.

    Attributes:
        sets (`dict[str, Dataset]`):
            The datasets by the names of their folders, as they are given.
        reward_funcs (`dict[str, Callable]`):
            By objective; empty where nothing is sampled.
        objectives (`list[str]`):
            Those of reward functions and of columns.
        in_data (`list[str]`):
            Those whose scores are in the datasets.
        pairs (`bool`):
            Whether the objective is learnt from pairs.
        prompts (`dict[str, Dataset]`), prompt_ids (`dict[str, TokenLists]`):
            To sample from, by dataset, once they are [`read`][Sources.read].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]), eos_token_ids (`set[int]`):
            The base model's, with which they are.
        responses (`dict[str, Responses]`):
            By dataset, if they are there already.
    """

    def __init__(
        self,
        args: Any,
        base_model: str,
        reward_funcs: Any,
        reward_processing_classes: Any,
        train_dataset: Any,
        eval_dataset: Any,
        known: list[str],
    ) -> None:
        self.args, self.base_model = args, base_model
        sets = named_sets(train_dataset, eval_dataset)
        for name, dataset in sets.items():
            if isinstance(dataset, IterableDataset):
                folder = rollout_dir(args) / "streamed"
                with args.main_process_first(desc=f"storing `{name}_dataset`"):
                    sets[name] = store_stream(dataset, folder, name, args.process_index == 0)
        columns = set(getattr(sets["train"], "column_names", None) or ())
        self._scored = scored_in_data(reward_funcs)
        named = list(reward_funcs) if self._scored else []
        if self._scored:
            reward_funcs = {n: f for n, f in reward_funcs.items() if f is not None} or None
            if columns & set(PAIR) or not columns & set(RESPONSE):
                raise ValueError(
                    f"`reward_funcs` has None for {self._scored}: their scores are those of "
                    "responses in `train_dataset`, which must have one of the columns "
                    f"{list(RESPONSE)}, and no pairs; it has {sorted(columns)}"
                )
        self.pairs = reward_funcs is None and bool(columns & set(PAIR))
        of_data = self.pairs or (reward_funcs is None and bool(columns & set(RESPONSE)))
        if self.pairs:
            sets = {name: with_prompts(dataset) for name, dataset in sets.items()}
        if (of_data or self._scored) and args.num_iterations > 1:
            raise ValueError(
                f"num_iterations={args.num_iterations} needs `reward_funcs`, for every objective: "
                "later iterations sample responses that no dataset has scored"
            )
        self.sets = sets
        self.reward_funcs: dict[str, RewardFunc] = {}
        if not of_data:
            self.reward_funcs = load_reward_funcs(reward_funcs or {}, reward_processing_classes)
        self.objectives = named or list(self.reward_funcs)
        if not self.objectives:
            self.objectives = known
            if (not self.pairs and not columns & set(known)) or not known:
                self.objectives = score_columns(sets["train"])
            elif not self.pairs and (left := set(score_columns(sets["train"])) - set(known)):
                logger.warning(
                    f"the columns {sorted(left)} are no objectives of the value model, which goes "
                    f"on with {known}: to add them to it, give a dataset without these"
                )
        self.in_data = [name for name in self.objectives if name not in self.reward_funcs]
        self.prompts: dict[str, Dataset] = {}
        self.prompt_ids: dict[str, TokenLists] = {}
        self.responses: dict[str, Responses] = {}

    def read(self, tokenizer: Any, eos_token_ids: set[int], context: int | None) -> None:
        """Tokenizes prompts and responses, for a model that reads `context` tokens; raises
        `ValueError` with the row that cannot be used."""
        self.tokenizer, self.eos_token_ids = tokenizer, eos_token_ids
        self.prompts = dict(self.sets)
        for name, dataset in self.sets.items():
            self.prompt_ids[name] = self._tokenize(name, dataset, context)
        if self.reward_funcs and not self._scored:
            return
        for name, prompt_ids in self.prompt_ids.items():
            self.responses[name] = read_responses(
                name,
                self.sets[name],
                self.in_data,
                prompt_ids,
                tokenizer,
                eos_token_ids,
                self.args.max_completion_length,
                self.base_model,
                self.args.chat_template_kwargs,
            )
        if self.reward_funcs:
            for name, prompt_ids in self.prompt_ids.items():
                self.prompts[name], self.prompt_ids[name] = once_each(
                    self.sets[name], prompt_ids, self._scored
                )

    def _tokenize(self, name: str, dataset: Any, context: int | None) -> TokenLists:
        args, tokenizer = self.args, self.tokenizer
        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"`{name}_dataset` must be a `datasets.Dataset` of prompts, got "
                f"{type(dataset).__name__}"
            )
        tokens_given = not self.reward_funcs and "prompt_ids" in dataset.column_names
        column = "prompt_ids" if tokens_given else "prompt"
        if column not in dataset.column_names:
            raise ValueError(
                f"`{name}_dataset` must have a column 'prompt', it has {dataset.column_names}: "
                "`dataset.rename_column` renames one"
            )
        if len(dataset) == 0:
            raise ValueError(f"`{name}_dataset` is empty")
        longest = args.max_prompt_length
        if context is not None and (
            longest is None or longest + args.max_completion_length > context
        ):
            longest = context - args.max_completion_length
            if longest < 1:
                raise ValueError(
                    f"`max_completion_length` is {args.max_completion_length}, which leaves no "
                    f"room for a prompt in the model's context of {context} tokens: lower it"
                )
        tools = dataset["tools"] if "tools" in dataset.column_names else None
        prompt_ids = TokenLists()
        for row, prompt in enumerate(dataset[column]):
            if prompt is None:
                raise ValueError(
                    f"row {row} of `{name}_dataset` has no {column}, but None: "
                    f"`dataset.filter(lambda row: row[{column!r}] is not None)` leaves it out"
                )
            if tokens_given:
                ids = prompt
                try:
                    check_tokens("prompt_ids", ids, len(tokenizer))
                except ValueError as error:
                    raise ValueError(f"row {row} of `{name}_dataset`: {error}") from error
            elif not isinstance(prompt, str) and tokenizer.chat_template is None:
                raise ValueError(
                    f"`{name}_dataset` has conversational prompts and the tokenizer of "
                    f"{self.base_model!r} no chat template; set its `chat_template`, or give "
                    "strings"
                )
            else:
                kwargs = row_kwargs(args.chat_template_kwargs, tools, row)
                ids = tokenize(tokenizer, prompt, template_kwargs=kwargs)
            if not ids or (longest is not None and len(ids) > longest):
                raise ValueError(
                    f"row {row} of `{name}_dataset` has a prompt of {len(ids)} tokens, 1 to "
                    f"{longest} are possible (max_prompt_length={args.max_prompt_length}, "
                    f"max_completion_length={args.max_completion_length}, context of the model "
                    f"{context}): {prompt!r}"
                )
            prompt_ids.append(ids)
        return prompt_ids

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and response."""
        prompts = max(len(ids) for of_set in self.prompt_ids.values() for ids in of_set)
        return prompts + self.args.max_completion_length

    @property
    def on_policy(self) -> bool:
        """Whether what is learnt from was sampled by the policy that it is taken to be of."""
        return all(responses.from_base for responses in self.responses.values())

    def split(self, trees: StoredTrees) -> tuple[StoredTrees, StoredTrees]:
        """Of trees those that were sampled, and those of a dataset's own responses."""
        return trees.split(self.reward_funcs)

    def statistics(self, trees: StoredTrees) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of every objective, which values are standardised by."""
        if self.pairs:
            return [0.0], [UTILITY_STD]
        mean, std = np.empty((2, len(self.objectives)))
        for part in self.split(trees):
            names = [name for name in self.objectives if part and name in part[0].rewards]
            at = [self.objectives.index(name) for name in names]
            mean[at], std[at] = reward_statistics(part, names)
        return mean.tolist(), std.tolist()

    def describe(self, trees: TreeConfig) -> tuple[dict[str, Any], str]:
        """For the provenance: what is learnt from, and what the standard deviations are of."""
        sampled: dict[str, Any] = {**vars(trees), "prompts": len(self.prompt_ids["train"])}
        within = "within a prompt"
        if not self.responses:
            return sampled, within
        found = self.responses["train"].describe()
        if self.pairs:
            within = "of the noise of a judgement, in log-odds"
        elif found["prompts"] == found["responses"]:
            within = "of all responses"
            if self.reward_funcs:
                within = f"within a prompt, of all responses for {', '.join(self.in_data)}"
        if self.reward_funcs:
            found = {**sampled, "responses": {"objectives": self.in_data, **found}}
        return found, within


def rollout_dir(args: Any) -> Path:
    """Where the rollouts are."""
    return Path(args.rollout_dir or Path(args.output_dir) / "rollouts")
