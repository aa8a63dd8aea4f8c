"""What the searches are given, prompts and value models for either host, and what they return."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..engine import GIB, ValueEngine
from ..heads import MAVISValueHeads
from ..transformers import check_base_model, left_padding, open_value_models
from ..value_model import MAVISValueModel


@dataclass(frozen=True)
class SearchOutput:
    """The responses to every prompt, best first.

    Attributes:
        sequences: `[batch][n]` lists of token ids, without the prompt, with the end-of-sequence
            token of those that ended. A search that found or kept fewer than `n` returns fewer.
        scores: `[batch, n]` float32, by which they are ranked; `-inf` where there is none.
        values: `[batch, n, objectives]` float32, of the finished response under every objective,
            in standard deviations of its reward; NaN where it was not judged.
        log_probs: `[batch, n]` float32, of the response under the base model (beam search only).
        num_tokens: `[batch]` int64, tokens of all responses that were begun (best-of-N only).

    Example:

    ```python
    >>> from trimtab.plugins import best_of_n
    >>> asked = {"value_models": "VALUE_MODEL", "weights": {"readability": 1.0}}
    >>> found = best_of_n(model, **inputs, **asked, n=4, max_new_tokens=8)
    >>> best = [ranked[0] for ranked in found.sequences]
    >>> found.scores.shape, found.values.shape
    (torch.Size([2, 4]), torch.Size([2, 4, 2]))
    ```
    """

    sequences: list[list[list[int]]]
    scores: torch.Tensor
    values: torch.Tensor
    log_probs: torch.Tensor | None = None
    num_tokens: torch.Tensor | None = None


def read_prompts(
    input_ids: torch.Tensor | Sequence[Sequence[int]], attention_mask: torch.Tensor | None
) -> list[list[int]]:
    """The prompts without their padding."""
    if not isinstance(input_ids, torch.Tensor):
        if attention_mask is not None:
            raise ValueError("attention_mask belongs to a padded tensor, but input_ids is a list")
        prompts = [list(prompt) for prompt in input_ids]
    elif attention_mask is None and len(input_ids) > 1:
        # Padding tokens do not tell: they may be the end-of-sequence token.
        raise ValueError("input_ids of several prompts need the attention_mask that belongs to it")
    elif attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask of shape {list(attention_mask.shape)} does not belong to input_ids of "
            f"shape {list(input_ids.shape)}"
        )
    else:
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = zip(input_ids.tolist(), left_padding(real).tolist())
        prompts = [row[padding:] for row, padding in rows]
    if not prompts or not all(prompts):
        raise ValueError("input_ids must hold at least one prompt, and each at least one token")
    return prompts


def open_beside(
    value_models: Sequence[MAVISValueModel | MAVISValueHeads | str]
    | MAVISValueModel
    | MAVISValueHeads
    | str,
    dtype: torch.dtype | None,
    generator: Any,
) -> tuple[Callable[..., ValueEngine], list[Any]]:
    """What makes an engine of the value models beside the generator, and they themselves."""
    if hasattr(generator, "device"):
        device = torch.device(generator.device)
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    models = open_value_models(value_models, dtype)
    vocab_size = None
    if is_vllm(generator):
        vocab_size = generator.llm_engine.model_config.get_vocab_size()
    elif hasattr(generator, "config"):
        vocab_size = generator.config.get_text_config().vocab_size
    for model in models:
        if vocab_size not in (None, model.config.vocab_size):
            raise ValueError(
                f"the value model for {model.config.objectives} has a vocabulary of "
                f"{model.config.vocab_size} tokens, the base model has {vocab_size}: "
                "train value models on this base model"
            )
        if model.config.head_type == "hidden" and hasattr(generator, "config"):
            check_base_model(model.config, generator)
    make_engine = partial(ValueEngine, models, device=device, dtype=dtype, kv_cache_memory=GIB)
    return make_engine, models


def is_vllm(generator: Any) -> bool:
    return hasattr(generator, "llm_engine")


def left_padded(texts: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, `[batch, longest]` int64."""
    longest = max(map(len, texts))
    input_ids = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    return input_ids.to(device), mask.to(device)


def as_list(eos_token_id: int | Sequence[int] | None) -> list[int]:
    """Tokens that end a response."""
    if eos_token_id is None:
        return []
    return [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)


def cache_name(model: Any) -> str:
    """What the key-value store is called in the model's input and output."""
    parameters = inspect.signature(model.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"  # transformers before 5.24


def at_least_one(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
