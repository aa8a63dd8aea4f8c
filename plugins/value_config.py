"""What a value model is, without its weights: its configuration, and what it belongs to."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, PreTrainedConfig

from .params import (
    MAX_STRENGTH,
    MAX_TOP_K,
    check_integer,
    check_number,
    check_objective_name,
    quote,
)

HEAD_TYPES = ("state", "hidden")
LARGEST, SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny


class MAVISValueConfig(PreTrainedConfig):
    r"""Configuration of a [`MAVISValueModel`].

    Args:
        backbone_config: Configuration of the causal decoder that reads the tokens; None where the
            heads read the base model's own hidden state.
        objectives: Name of each output of the head, in order.
        reward_mean: Mean of each objective's reward under the base model, in the reward's unit.
        reward_std: What a value of 1 stands for, in the reward's unit, positive: the standard
            deviation of each objective's reward between the base model's responses to one prompt.
            Models whose provenance has no `reward_std` were made with that of all responses.
        head_type: `"state"`: the value of a candidate is read at the candidate's own position.
            `"hidden"`: the values of all candidates are read from the hidden state that the base
            model's output layer reads, see [`MAVISValueHeads`][trimtab.plugins.heads].
        action_rank: Width of `U_i` and `P` of heads on the base model's hidden state.
        head_width: Width of the layers of heads on the base model's hidden state.
        ensemble_size: Number of such heads whose mean is taken.
        base_hidden_size: Width of that hidden state.
        base_embedding_size: Width of the base model's token embedding.
        base_vocab_size: Tokens that the base model has logits for.
        base_checkpoint_fingerprint: See
            [`checkpoint_fingerprint`][trimtab.plugins.hidden_states]; these heads fit one
            checkpoint.
        candidate_range: Largest difference between the values of two candidates of one prefix that
            was observed, per objective; candidate pruning relies on it. None if not measured.
        candidate_scale: Factor of the values where they guide, per objective, 0 to 1e6: how
            much of the differences that they predict between candidates responses bear out. None
            is 1.
        top_k: Number of candidates that the model was trained to guide among.
        base_model: Name or path of the base model whose responses it was trained on.
        base_model_fingerprint: See [`base_model_fingerprint`].
        tokenizer_fingerprint: See [`tokenizer_fingerprint`].
        provenance: Command, package versions and commit that made the weights.

    Raises:
        ValueError: A field is missing or does not fit the others.

    Example:

    ```python
    >>> from trimtab.plugins import MAVISValueConfig
    >>> config = MAVISValueConfig.from_pretrained("VALUE_MODEL")
    >>> config.head_type, config.objectives
    ('hidden', ['readability', 'positivity'])
    >>> config.reward_std  # what a value of 1 stands for
    [1.0, 1.0]
    ```
    """

    model_type = "mavis_value"
    sub_configs = {"backbone_config": AutoConfig}  # type: ignore[dict-item]  # noqa: RUF012

    backbone_config: dict | PreTrainedConfig | None = None
    objectives: list[str] | None = None
    reward_mean: list[float] | None = None
    reward_std: list[float] | None = None
    head_type: str = "state"
    action_rank: int = 32
    head_width: int = 128
    ensemble_size: int = 4
    base_hidden_size: int | None = None
    base_embedding_size: int | None = None
    base_vocab_size: int | None = None
    base_checkpoint_fingerprint: str | None = None
    candidate_range: list[float] | None = None
    candidate_scale: list[float] | None = None
    top_k: int = 40
    base_model: str | None = None
    base_model_fingerprint: str | None = None
    tokenizer_fingerprint: str | None = None
    provenance: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.backbone_config, dict):
            fields = dict(self.backbone_config)
            model_type = fields.pop("model_type", None)
            if model_type is None:
                raise ValueError("backbone_config has no model_type; save it with save_pretrained")
            self.backbone_config = AutoConfig.for_model(model_type, **fields)
        if not isinstance(self.backbone_config, (PreTrainedConfig, type(None))):
            raise ValueError(
                f"backbone_config must be an object, got {quote(self.backbone_config)}"
            )
        if self.objectives is not None:
            if not isinstance(self.objectives, Sequence) or isinstance(self.objectives, str):
                raise ValueError(
                    f"objectives must be a list of names, got {quote(self.objectives)}"
                )
            objectives = self.objectives = list(self.objectives)
            for name in objectives:
                check_objective_name("the value model", name)
            if not objectives or len(set(objectives)) != len(objectives):
                raise ValueError(
                    f"objectives must be distinct names, at least one, got {objectives}"
                )
            self.reward_mean = self._numbers("reward_mean", 0.0, -LARGEST, LARGEST)
            self.reward_std = self._numbers("reward_std", 1.0, SMALLEST, LARGEST)
            if self.candidate_range is not None:
                self.candidate_range = self._numbers("candidate_range", 0.0, 0, LARGEST)
            if self.candidate_scale is not None:
                self.candidate_scale = self._numbers("candidate_scale", 1.0, 0, MAX_STRENGTH)
        if self.head_type == "action":
            raise ValueError(
                "head_type 'action' is gone, its place is taken by heads on the base model's own "
                "hidden state: train with head_type='hidden', or a backbone with head_type='state'"
            )
        if self.head_type not in HEAD_TYPES:
            raise ValueError(f"head_type must be one of {HEAD_TYPES}, got {quote(self.head_type)}")
        check_integer("action_rank", self.action_rank, 1, MAX_TOP_K)
        check_integer("top_k", self.top_k, 1, MAX_TOP_K)
        if self.head_type == "hidden" and self.objectives is not None:
            sizes = ("head_width", "ensemble_size", "base_hidden_size", "base_embedding_size")
            for field in (*sizes, "base_vocab_size"):
                check_integer(field, getattr(self, field), 1, MAX_TOP_K)
        super().__post_init__(**kwargs)

    def _numbers(self, field: str, default: float, low: float, high: float) -> list[float]:
        """The field's number for each objective, all `default` if there is none."""
        objectives = self.objectives or []
        values = getattr(self, field)
        values = [default] * len(objectives) if values is None else values
        if not isinstance(values, Sequence) or len(values) != len(objectives):
            raise ValueError(
                f"{field} must be a list of a number for each of {objectives}, got {quote(values)}"
            )
        return [check_number(f"{field}[{i}]", x, low, high) for i, x in enumerate(values)]

    @property
    def text_config(self) -> Any:
        """The backbone's configuration, or the text part of it."""
        if not isinstance(self.backbone_config, PreTrainedConfig):
            raise AttributeError("there is no backbone")  # transformers asks whether there is one
        return self.backbone_config.get_text_config()

    @property
    def vocab_size(self) -> int:
        """Rows of the backbone's token embedding, or tokens of the base model that is read."""
        if self.head_type == "hidden":
            assert self.base_vocab_size is not None
            return self.base_vocab_size
        return self.text_config.vocab_size


def load_config(name_or_path: str) -> MAVISValueConfig:
    """The configuration of a value model, without its weights.

    Raises:
        ValueError: There is none at `name_or_path`, it is of another model type or contradicts
            itself.
    """
    try:
        fields, _ = PreTrainedConfig.get_config_dict(name_or_path)
        if not isinstance(fields, dict) or not fields:
            raise OSError("it has no config.json that can be read")
    except Exception as error:  # transformers raises many kinds
        raise ValueError(
            f"value model {quote(name_or_path)} cannot be loaded: {_why(name_or_path, error)}; "
            "give the folder or hub id that save_pretrained wrote"
        ) from error
    if fields.get("model_type") != MAVISValueConfig.model_type:
        raise ValueError(
            f"{quote(name_or_path)} is not a value model: its config has model_type "
            f"{quote(fields.get('model_type'))}, expected {MAVISValueConfig.model_type!r}"
        )
    try:
        return MAVISValueConfig.from_pretrained(name_or_path)
    except Exception as error:  # that of the backbone may have fields of any kind
        raise ValueError(
            f"value model {quote(name_or_path)}: its config is wrong: {error}"
        ) from error


def _why(name_or_path: str, error: Exception) -> str:
    """Why there is no config: of a mistyped folder the hub's own answer tells nothing."""
    if os.path.isdir(name_or_path):
        return "the folder has no config.json that can be read"
    if isinstance(error.__cause__, HFValidationError):  # no hub id
        return "there is no such folder"
    if isinstance(error.__cause__, LocalEntryNotFoundError):
        return (
            f"there is no such folder in {os.getcwd()}, and as a hub id it is not in the cache "
            "while the hub cannot be reached"
        )
    return f"there is no such folder, and as a hub id: {error}"


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of the tokenizer's (token, id) pairs: equal if and only if the vocabularies are."""
    return _digest(sorted(tokenizer.get_vocab().items()))


def base_model_fingerprint(config: PreTrainedConfig) -> str:
    """SHA-256 of what makes a base model's architecture: family, width, depth, vocabulary."""
    text = config.get_text_config()
    fields = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    return _digest([str(getattr(text, field, None)) for field in fields])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


AutoConfig.register(MAVISValueConfig.model_type, MAVISValueConfig)
