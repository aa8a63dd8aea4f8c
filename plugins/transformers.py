"""MAVIS in transformers: a logits processor for `generate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor
from transformers.utils import logging

from .adapters import load_value_models
from .engine import GIB, ValueEngine
from .guide import Guide
from .heads import HeadGuide, MAVISValueHeads, are_heads
from .hidden_states import OutputLayerInput, check_checkpoint
from .params import GuidanceParams, check_number, parse_weights
from .value_config import base_model_fingerprint, tokenizer_fingerprint
from .value_model import MAVISValueModel

logger = logging.get_logger(__name__)


class MAVISLogitsProcessor(LogitsProcessor):
    """Tilts the next-token distribution of every sequence in the batch by its candidates' values:
    `pi(a | s) ∝ pi_ref(a | s) * exp(beta * sum_i w_i Q_i(s, a))` (arXiv 2508.13415).

    Greedy search, sampling, beam search and assisted decoding all work: a row whose tokens are not
    last step's with one more is taken up from where they differ. One object serves any number of
    `generate` calls, one at a time. Heads on the base model's hidden state need the `model`, and
    guide all of that but assisted decoding, which they refuse.

    Args:
        value_models: Value models, or folders or hub ids of them; or just one.
        weights: Weight of each objective by name, absent ones 0; or a list in the models' order.
        beta: Strength of the guidance, in nats per standard deviation of a reward.
        top_k: Number of candidates at each step; by default the number the models were made for.
        kl_budget: Most nats per step that guidance may move the distribution, at temperature 1:
            `generate` applies its own afterwards, and a lower one moves it further.
        attention_mask: `[batch, prompt_length]`, the mask given to `generate`. Needed when prompts
            are padded on the left, and then set anew before each call.
        tokenizer: The base model's, to check that the value models were trained with it.
        model: The base model, whose hidden states heads read. With these, no `attention_mask` is
            needed.
        prune_eps: Candidates of a state head that cannot become likelier than this are not valued;
            0 is exact. See [`count_likely`][trimtab.plugins.policy.count_likely].
        dtype: Of the value models; by default float32 on a CPU and bfloat16 elsewhere.
        kv_cache_memory_gib: Upper bound of the value models' key-value store.

    Raises:
        ValueError: A value model cannot be loaded or does not fit, or a parameter is out of range.

    Example:

    ```python
    >>> from trimtab.plugins.transformers import MAVISLogitsProcessor
    >>> weights = {"readability": 1.0, "positivity": 0.5}
    >>> guide = MAVISLogitsProcessor("VALUE_MODEL", weights=weights, beta=4.0, model=model)
    >>> output = model.generate(
    ...     **inputs, do_sample=True, top_k=0, max_new_tokens=8, logits_processor=[guide]
    ... )
    >>> texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    ```
    """

    # Its rows are those of one `generate` call, not of requests that come and go.
    supports_continuous_batching = False

    def __init__(
        self,
        value_models: Sequence[MAVISValueModel | MAVISValueHeads | str] | MAVISValueModel | str,
        *,
        weights: Mapping[str, float] | Sequence[float],
        beta: float = 1.0,
        top_k: int | None = None,
        kl_budget: float | None = None,
        attention_mask: torch.Tensor | None = None,
        tokenizer: Any = None,
        model: Any = None,
        prune_eps: float = 0.0,
        dtype: torch.dtype | None = None,
        kv_cache_memory_gib: float = 1.0,
    ) -> None:
        self._models = open_value_models(value_models, dtype or torch.float32)
        configs = [model.config for model in self._models]
        self.objectives = tuple(name for config in configs for name in config.objectives or ())
        for config in configs:
            if tokenizer is None or config.tokenizer_fingerprint is None:
                continue
            if config.tokenizer_fingerprint != tokenizer_fingerprint(tokenizer):
                raise ValueError(
                    f"the value model for {config.objectives} was trained with the tokenizer of "
                    f"{config.base_model!r}, not with the one given: train it on this base model"
                )
        self.params = GuidanceParams(
            weights=parse_weights(weights, self.objectives),
            beta=beta,
            top_k=max(config.top_k for config in configs) if top_k is None else top_k,
            kl_budget=kl_budget,
        )
        self.attention_mask = attention_mask
        self._prompts: torch.Tensor | None = None  # that the mask was first seen with
        self._prune_eps = prune_eps
        self._dtype = dtype
        memory = check_number("kv_cache_memory_gib", kv_cache_memory_gib, 1e-6, 1e6)
        self._kv_cache_memory = int(memory * GIB)
        self._guide: Guide | None = None
        self._heads: HeadGuide | None = None
        self._watched: OutputLayerInput | None = None
        if are_heads(self._models):
            if model is None:
                raise ValueError(
                    "these value models are heads on the base model's hidden state: pass it as "
                    "MAVISLogitsProcessor(..., model=model)"
                )
            if prune_eps:
                raise ValueError(
                    f"prune_eps {prune_eps} is for value models with a backbone, heads read all "
                    "candidates at once: leave it at 0"
                )
            for config in configs:
                check_base_model(config, model)
            self._watched = OutputLayerInput(model)
        self._forget()

    def _forget(self) -> None:
        """Begin again: no row's tokens are known."""
        self._tokens = torch.zeros((0, 0), dtype=torch.int64)  # [batch, length] of the last step
        self._padding = np.zeros(0, dtype=np.int64)
        self._shape = (0, 0)  # of the last step, with heads

    @property
    def attention_mask(self) -> torch.Tensor | None:
        """`[batch, prompt_length]`, of the prompts that `generate` is called with next."""
        return self._attention_mask

    @attention_mask.setter
    def attention_mask(self, mask: torch.Tensor | None) -> None:
        self._attention_mask = mask
        self._prompts = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the guided policy.

        Args:
            input_ids: `[batch, length]` int64, prompts and what was generated so far.
            scores: `[batch, vocab]` float32, the base model's.

        Returns:
            `[batch, vocab]` float32, normalised; `-inf` for all but the candidates.

        Raises:
            ValueError: Another vocabulary, a prefix beyond the value models' context, prompts that
                look padded without an `attention_mask`, or an `attention_mask` of other prompts.
        """
        if not self.params.guides:
            return scores
        if self._watched is not None:
            return self._read_heads(self._watched, input_ids, scores)
        batch, length = input_ids.shape
        guide = self._guide_for(batch, scores)
        tokens = input_ids.cpu()
        padding = self._leading_padding(tokens)
        if len(tokens) == len(self._tokens):
            known = min(length, self._tokens.shape[1])
            same = (tokens[:, :known] == self._tokens[:, :known]).cumprod(1).sum(1).numpy()
            same = np.where(padding == self._padding, np.maximum(same - padding, 0), 0)
        else:
            same = np.zeros(batch, dtype=np.int64)
        # Nothing is known again until this step has succeeded.
        self._forget()
        for row in range(batch):
            guide.engine.truncate(row, int(same[row]))
        candidates, log_policy, _ = guide.log_probs(
            scores,
            np.arange(batch),
            length - padding,
            input_ids[:, -1],
            lambda slot, start, stop: tokens[slot, padding[slot] + start : padding[slot] + stop],
        )
        self._tokens, self._padding = tokens, padding
        return torch.full_like(scores, -torch.inf).scatter_(1, candidates, log_policy)

    def _read_heads(
        self, watched: OutputLayerInput, input_ids: torch.Tensor, scores: torch.Tensor
    ) -> torch.Tensor:
        batch, length = input_ids.shape
        goes_on = (batch, length) == (self._shape[0], self._shape[1] + 1)
        self._shape = (batch, length)
        hidden = watched.of_step(len(scores), goes_on)
        heads = self._heads
        if heads is None or heads.device != scores.device:
            self._check_vocabulary(scores)
            heads = self._heads = HeadGuide(self._models, 1, scores.device)
            heads.start(0, self.params)
        rows = heads.plan(np.zeros(len(scores), dtype=np.int64))[0]
        candidates, log_policy, _ = heads.log_probs(scores, hidden.to(scores.device), rows)
        return torch.full_like(scores, -torch.inf).scatter_(1, candidates, log_policy)

    def _guide_for(self, batch: int, scores: torch.Tensor) -> Guide:
        """The guide, with a slot for every row."""
        if self._guide is not None and len(self._guide.guided) >= batch:
            return self._guide
        configs = [model.config for model in self._models]
        self._check_vocabulary(scores)
        default = torch.float32 if scores.device.type == "cpu" else torch.bfloat16
        engine = ValueEngine(
            self._models,
            num_slots=batch,
            max_length=min(config.text_config.max_position_embeddings for config in configs),
            device=scores.device,
            dtype=self._dtype or default,
            kv_cache_memory=self._kv_cache_memory,
        )
        self._guide = Guide(engine, batch, self._prune_eps)
        for slot in range(batch):
            self._guide.start(slot, self.params)
        self._forget()
        return self._guide

    def _check_vocabulary(self, scores: torch.Tensor) -> None:
        for config in (model.config for model in self._models):
            if config.vocab_size != scores.shape[-1]:
                raise ValueError(
                    f"the value model for {config.objectives} has a vocabulary of "
                    f"{config.vocab_size} tokens, the base model has {scores.shape[-1]}"
                )

    def _leading_padding(self, tokens: torch.Tensor) -> np.ndarray:
        """Number of padding tokens before each row's prompt, `[batch]` int64."""
        batch = len(tokens)
        if self.attention_mask is None:
            pads = {model.config.text_config.pad_token_id for model in self._models}
            if batch > 1 and any((tokens[:, 0] == pad).any() for pad in pads if pad is not None):
                raise ValueError(
                    "a prompt starts with the padding token: pass the attention_mask that "
                    "generate gets to MAVISLogitsProcessor, or set it before each call"
                )
            return np.zeros(batch, dtype=np.int64)
        mask = self.attention_mask.cpu()
        width = mask.shape[1]
        remedy = "set processor.attention_mask to the mask given to generate, before each call"
        if batch % len(mask) or width > tokens.shape[1]:
            raise ValueError(
                f"attention_mask of shape {list(mask.shape)} does not belong to input_ids of shape "
                f"{list(tokens.shape)}: {remedy}"
            )
        padding = left_padding(mask)
        # Beam search and num_return_sequences repeat every prompt.
        prompts = tokens[:: batch // len(mask), :width]
        if self._prompts is None:
            if tokens.shape[1] != width or len(prompts[mask == 0].unique()) > 1:
                raise ValueError(
                    f"attention_mask of shape {list(mask.shape)} hides other tokens than padding, "
                    f"or not the whole prompt, of input_ids of shape {list(tokens.shape)}: {remedy}"
                )
            self._prompts = prompts
        copies = self._prompts.repeat_interleave(batch // len(mask), 0)
        if copies.shape != tokens[:, :width].shape or not copies.equal(tokens[:, :width]):
            raise ValueError(
                f"attention_mask of shape {list(mask.shape)} was set for other prompts: {remedy}"
            )
        return np.repeat(padding, batch // len(mask))


def check_base_model(config: Any, model: Any) -> None:
    """Refuses heads of another checkpoint than `model` was loaded from."""
    name = model.config.name_or_path
    if config.base_model_fingerprint != base_model_fingerprint(model.config):
        raise ValueError(
            f"the value heads for {config.objectives} read the hidden states of "
            f"{config.base_model!r}, and {name!r} is of another architecture: train heads on it"
        )
    changed = None
    if getattr(model.config, "quantization_config", None) is not None:
        changed = "a quantisation"
    elif getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "peft_config"):
        changed = "an adapter"
    revision = getattr(model.config, "_commit_hash", None)
    warning = check_checkpoint(config, name, changed, revision)
    if warning:
        logger.warning(warning)


def open_value_models(
    value_models: Sequence[MAVISValueModel | MAVISValueHeads | str]
    | MAVISValueModel
    | MAVISValueHeads
    | str,
    dtype: torch.dtype,
) -> list[Any]:
    """Value models that guide together, loaded where they are given by folder or hub id.

    Raises:
        ValueError: There is none, one cannot be loaded, or two have an objective of one name.
    """
    if isinstance(value_models, (str, MAVISValueModel, MAVISValueHeads)):
        value_models = [value_models]
    loaded = iter(load_value_models([m for m in value_models if isinstance(m, str)], dtype))
    models = [next(loaded) if isinstance(m, str) else m for m in value_models]
    if not models:
        raise ValueError("value_models is empty: give at least one value model")
    objectives = [name for model in models for name in model.config.objectives or ()]
    if len(set(objectives)) < len(objectives):
        raise ValueError(f"two value models have an objective of one name: {objectives}")
    return models


def left_padding(attention_mask: torch.Tensor) -> np.ndarray:
    """Number of padding tokens before each row's prompt, `[batch]` int64.

    Raises:
        ValueError: The padding is not all on the left.
    """
    real = attention_mask.cpu() != 0
    padding = real.long().argmax(1)
    if (real.sum(1) + padding != real.shape[1]).any():
        raise ValueError("attention_mask is not a left-padded batch: set padding_side='left'")
    return padding.numpy()
