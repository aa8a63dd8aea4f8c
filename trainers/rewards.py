"""Reward functions of finished responses: validation, computation and standardisation.

A reward function has the signature of TRL's GRPO reward functions, or is the id of a sequence
classifier. Every failure names the function and the prompt.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers.utils import logging

from trimtab.plugins.params import check_objective_name

from .fingerprints import digest_of, identify

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .trees import Tree

__all__ = [
    "ClassifierReward", "RewardLog", "compute_rewards", "identify", "load_reward_funcs",
    "reward_statistics",
]  # fmt: skip

logger = logging.get_logger(__name__)

RewardFunc = Callable[..., list[float]]


class ClassifierReward:
    """
    Reward of a sequence classification model: its first logit for `prompt + completion`.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Model id, path, or a loaded sequence classifier with one label.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer. If `None`, it is loaded with the model's name.
        batch_size (`int`, *optional*, defaults to `16`):
            Number of responses scored at once.
    """

    def __init__(
        self, model: str | PreTrainedModel, processing_class: Any = None, batch_size: int = 16
    ) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.model: Any = model
        if isinstance(model, str):
            self.model = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
        self.model.eval()
        self.name = str(self.model.config.name_or_path)
        self.tokenizer = processing_class
        if processing_class is None:
            self.tokenizer = AutoTokenizer.from_pretrained(self.name)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.batch_size = batch_size

    @property
    def version(self) -> str:
        """The model's weights and its tokenizer: all that [`identify`] has to know."""
        return digest_of((self.model, self.tokenizer))

    def __call__(self, prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
        import torch

        texts = []
        for prompt, completion in zip(prompts, completions):
            if isinstance(prompt, str):
                texts.append(prompt + completion)
            else:
                texts.append(
                    self.tokenizer.apply_chat_template(prompt + completion, tokenize=False)
                )
        rewards: list[float] = []
        for start in range(0, len(texts), self.batch_size):
            batch = self.tokenizer(
                texts[start : start + self.batch_size],
                padding=True,
                padding_side="right",
                # A chat template has written the special tokens already.
                add_special_tokens=isinstance(prompts[0], str),
                return_tensors="pt",
            ).to(self.model.device)
            with torch.inference_mode():
                rewards += self.model(**batch).logits[:, 0].float().tolist()
        return rewards


class RewardLog:
    """
    The keyword arguments that TRL's GRPO gives a reward function beside the responses and columns:
    `trainer_state`, `log_extra(column, values)` and `log_metric(name, value)`.

    Args:
        trainer_state ([`~transformers.TrainerState`], *optional*):
            Of the trainer whose rollouts are rewarded.

    Attributes:
        metrics (`dict[str, list[float]]`):
            What was logged by `log_metric`, a value per call.
        extra (`dict[str, list]`):
            What was logged by `log_extra` since it was taken, a value per response.
    """

    def __init__(self, trainer_state: Any = None) -> None:
        self.trainer_state = trainer_state
        self.metrics: dict[str, list[float]] = defaultdict(list)
        self.extra: dict[str, list[Any]] = defaultdict(list)
        self.by_response: dict[str, dict[tuple[int, int], Any]] = defaultdict(dict)

    def keywords(self, func: RewardFunc) -> dict[str, Any]:
        """Those that a function takes; TRL's may be used without `**kwargs`, too."""
        offered: dict[str, Any] = {
            "trainer_state": self.trainer_state,
            "log_extra": lambda column, values: self.extra[column].extend(values),
            "log_metric": lambda name, value: self.metrics[name].append(float(value)),
        }
        try:
            parameters = inspect.signature(func).parameters
        except (TypeError, ValueError):  # of what is not written in Python
            return {}
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return offered
        return {name: value for name, value in offered.items() if name in parameters}

    def take_extra(self, responses: Sequence[tuple[int, int]]) -> None:
        """Assigns what was logged for a batch to its responses: prompt and leaf of each."""
        for column, values in self.extra.items():
            if len(values) == len(responses):
                self.by_response[column].update(zip(responses, values))
        self.extra.clear()


def load_reward_funcs(reward_funcs: Any, processing_classes: Any = None) -> dict[str, RewardFunc]:
    """
    Checks the names and loads the model ids.

    Args:
        reward_funcs (`dict[str, Callable | str | PreTrainedModel]`, or a `list` of these, or one):
            One reward function per objective. Without names, as in TRL, an objective is named by
            its function's `__name__`, or by the last part of its model's id.
        processing_classes (`list`, or `dict[str, PreTrainedTokenizerBase]`, or one, *optional*):
            Tokenizers of the reward models, in the order of `reward_funcs` or by objective; `None`
            for those that are loaded with the model's name, and for functions.

    Returns:
        `dict[str, Callable]`: The same objectives, in the same order.
    """
    if callable(reward_funcs) or isinstance(reward_funcs, str) or hasattr(reward_funcs, "config"):
        reward_funcs = [reward_funcs]
    if isinstance(reward_funcs, (list, tuple)):
        names = [_name_of(func) for func in reward_funcs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"`reward_funcs` has two functions named {twice[0]!r}: give a dict of objective "
                "names to reward functions"
            )
        reward_funcs = dict(zip(names, reward_funcs))
    if not isinstance(reward_funcs, Mapping) or not reward_funcs:
        raise ValueError(
            "`reward_funcs` must be a non-empty dict of objective names to reward functions or "
            f"model ids, for example {{'positivity': positivity}}, got {reward_funcs!r}; or leave "
            "it out, with a `datasets.Dataset` of responses and their scores"
        )
    tokenizers = processing_classes
    if not isinstance(tokenizers, Mapping):
        listed = tokenizers if isinstance(tokenizers, (list, tuple)) else [tokenizers]
        if tokenizers is None:
            listed = [None] * len(reward_funcs)
        if len(listed) != len(reward_funcs):
            raise ValueError(
                f"`reward_processing_classes` has {len(listed)} entries for the "
                f"{len(reward_funcs)} `reward_funcs`: give one for each, None for functions"
            )
        tokenizers = dict(zip(reward_funcs, listed))
    if unknown := sorted(set(tokenizers) - set(reward_funcs)):
        raise ValueError(
            f"`reward_processing_classes` names {unknown[0]!r}, which is no objective of "
            f"`reward_funcs`: {list(reward_funcs)}"
        )
    loaded: dict[str, RewardFunc] = {}
    for name, func in reward_funcs.items():
        check_objective_name("`reward_funcs`", name)
        if isinstance(func, str) or hasattr(func, "config"):
            loaded[name] = ClassifierReward(func, tokenizers.get(name))
        elif callable(func):
            loaded[name] = func
        else:
            raise ValueError(
                f"reward function {name!r} must be a callable or a model id, got {func!r}"
            )
    return loaded


def _name_of(func: Any) -> str:
    """The objective of a reward function that is given without a name."""
    model_id = func if isinstance(func, str) else None
    if hasattr(func, "config"):
        model_id = str(func.config.name_or_path)
    name = (
        getattr(func, "__name__", "") if model_id is None else model_id.rstrip("/").split("/")[-1]
    )
    if not name:
        raise ValueError(
            f"the reward function {func!r} has no name: give `reward_funcs` as a dict of objective "
            "names to reward functions"
        )
    return name


def _awaited(result: Any) -> Any:
    """What a reward function returns, or a coroutine of it, in an event loop of its own: the caller
    may be in one."""
    if not inspect.isawaitable(result):
        return result

    async def wait() -> Any:
        return await result

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(wait())).result()


def compute_rewards(
    name: str,
    func: RewardFunc,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[list[int]],
    columns: Mapping[str, Sequence[Any]],
    log: RewardLog | None = None,
) -> list[float]:
    """
    Calls one reward function on a batch and checks what it returns.

    Args:
        name (`str`):
            Objective, for the messages.
        func (`Callable`):
            Reward function, plain or `async`.
        prompts (`list`):
            Strings, or conversations for conversational datasets.
        completions (`list`):
            Strings, or conversations of one assistant message.
        completion_ids (`list[list[int]]`):
            Tokens of the completions, with the end-of-sequence token of those that ended.
        columns (`dict[str, list]`):
            Other columns of the dataset.
        log (`RewardLog`, *optional*):
            Gives the function the rest of TRL's keyword arguments.

    Returns:
        `list[float]`: A finite reward per completion, NaN where the function returned `None`, which
        is "not applicable" in TRL.
    """

    keywords = (log or RewardLog()).keywords(func)

    def call(rows: Sequence[int]) -> Any:
        result = func(
            prompts=[prompts[i] for i in rows],
            completions=[completions[i] for i in rows],
            completion_ids=[completion_ids[i] for i in rows],
            **{column: [values[i] for i in rows] for column, values in columns.items()},
            **keywords,
        )
        return _awaited(result)

    everything = range(len(prompts))
    try:
        returned = call(everything)
    except Exception as error:
        for i in everything:  # one by one, to name the prompt
            try:
                call([i])
            except Exception as single:
                raise RuntimeError(
                    f"reward function {name!r} raised {type(single).__name__}: {single}, for the "
                    f"prompt {prompts[i]!r} and the completion {completions[i]!r}"
                ) from single
        raise RuntimeError(
            f"reward function {name!r} raised {type(error).__name__}: {error}, for a batch of "
            f"{len(prompts)} completions that starts with the prompt {prompts[0]!r}, though not "
            "for any of them alone"
        ) from error
    try:
        rewards = list(returned)
    except TypeError:
        rewards = None
    if rewards is None or len(rewards) != len(prompts):
        count = "no list" if rewards is None else f"{len(rewards)} rewards"
        raise ValueError(
            f"reward function {name!r} returned {count} for {len(prompts)} completions, the first "
            f"of them of the prompt {prompts[0]!r}; it must return a float per completion"
        )
    for i, reward in enumerate(rewards):
        if reward is None:
            rewards[i] = math.nan
            continue
        try:
            rewards[i] = float(reward)
        except (TypeError, ValueError):
            rewards[i] = math.nan
        if not math.isfinite(rewards[i]):
            raise ValueError(
                f"reward function {name!r} returned {reward!r} for the prompt {prompts[i]!r} and "
                f"the completion {completions[i]!r}; it must return finite numbers, or None "
                "where it does not apply"
            )
    return rewards


def reward_statistics(
    trees: Sequence[Tree], objectives: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """
    Mean of every objective's reward under the base model, and its standard deviation within a
    prompt: between responses to one prompt, which is what guidance can choose among.

    A leaf counts with the probability that a single response, sampled from the root, would have
    taken its place: however a tree branches, the mean is that of plain sampling. Responses below
    different children of the root are independent, so that half their mean squared difference is an
    unbiased estimate of the variance, however few they are and whatever the others share.

    Responses without a reward are left out, and so are prompts of which no response has one.

    Args:
        trees (`list[Tree]`):
            Rollouts with rewards. Every prompt of which one is known counts the same.
        objectives (`list[str]`):
            Names of the rewards.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Mean and standard deviation, `[n_objectives]` each. Where
        the reward does not differ within prompts, or no tree has two children of its root, the
        deviation of all responses stands in, 1 if that is none, with a warning.

    Raises:
        ValueError: An objective has no reward of any response.
    """
    # Of each tree, [n_objectives]; NaN where it says nothing of an objective
    means, squares, within = np.full((3, len(trees), len(objectives)), np.nan)
    for row, tree in enumerate(trees):
        leaves, shares = np.array(tree.leaves()), tree.shares()
        children = np.array([tree.path(leaf)[0] for leaf in leaves])  # of the root
        for column, name in enumerate(objectives):
            # A sample of weight 0 is no response of plain sampling.
            known = ~np.isnan(tree.rewards[name][leaves]) & (shares[leaves] > 0)
            if not known.any():
                continue
            reward, share = tree.rewards[name][leaves][known], shares[leaves][known]
            child = children[known]
            means[row, column] = np.average(reward, weights=share)
            squares[row, column] = np.average(reward**2, weights=share)
            groups = [child == c for c in np.unique(child)]
            if len(groups) > 1:
                m = np.array([np.average(reward[g], weights=share[g]) for g in groups])
                q = np.array([np.average(reward[g] ** 2, weights=share[g]) for g in groups])
                pairs = len(m) * (len(m) - 1)
                within[row, column] = q.mean() - (m.sum() ** 2 - (m**2).sum()) / pairs
    for name, column in zip(objectives, means.T):
        if np.isnan(column).all():
            raise ValueError(
                f"reward function {name!r} returned None for every response: there is nothing to "
                "learn; return a number wherever it applies, or leave the objective out"
            )
    mean = np.nanmean(means, axis=0)
    total = np.sqrt(np.maximum(np.nanmean(squares, axis=0) - mean**2, 0.0))
    measured = ~np.isnan(within).all(axis=0)
    std = np.sqrt(np.maximum(np.nansum(within, axis=0), 0.0))
    std /= np.sqrt(np.maximum((~np.isnan(within)).sum(axis=0), 1))
    least = 1e-6 * np.maximum(1.0, np.abs(mean))
    for i, name in enumerate(objectives):
        if std[i] > least[i]:
            continue
        if total[i] <= least[i]:
            message = f"returned {mean[i]:.6g} for every response: a constant reward cannot guide"
        elif measured[i]:
            message = (
                "does not differ between the responses to one prompt: it cannot guide. Its values "
                f"are in standard deviations of all responses, {total[i]:.6g}"
            )
        else:
            message = (
                "has a single response, or one first piece, to every prompt, so that its deviation "
                f"within prompts is not known: values are in standard deviations of all responses, "
                f"{total[i]:.6g}. Set `root_children` to 2 or more, or give data with several "
                "responses to a prompt"
            )
        logger.warning(f"the reward {name!r} {message}")
        std[i] = total[i] if total[i] > least[i] else 1.0
    return mean, std
