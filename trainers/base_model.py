"""The base model that a trainer's arguments name: its source, its weights, its end tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from trimtab.plugins.value_config import MAVISValueConfig

from .samplers import load_causal_lm


def precision_of(kwargs: Mapping[str, Any] | None) -> dict[str, str]:
    """Those arguments of a model that change what it computes."""
    names = ("dtype", "torch_dtype", "quantization", "quantization_config", "revision",
             "subfolder", "hf_overrides", "kv_cache_dtype")  # fmt: skip
    return {name: str(kwargs[name]) for name in names if kwargs and name in kwargs}


def is_value_model(name: str) -> bool:
    """Whether a name is the folder of a value model, and not of a base model."""
    config = Path(name) / "config.json"
    try:
        found = json.loads(config.read_text()).get("model_type")
    except (OSError, ValueError, AttributeError):
        return False
    return bool(found == MAVISValueConfig.model_type)


def source_of(args: Any) -> dict[str, Any]:
    """Those arguments of a model that say where it is from, which count for its tokenizer, too."""
    given = args.model_init_kwargs or {}
    return {name: given[name] for name in ("revision", "trust_remote_code") if name in given}


def vllm_source_of(args: Any) -> dict[str, Any]:
    """The same for `vllm.LLM`."""
    source = source_of(args)
    if "revision" in source:
        source["tokenizer_revision"] = source["revision"]
    return source


def end_tokens(
    base_model: str, tokenizer: PreTrainedTokenizerBase, revision: str = "main"
) -> set[int]:
    """Tokens that end a response: the generation config's, and the tokenizer's."""
    try:
        configured = GenerationConfig.from_pretrained(base_model, revision=revision).eos_token_id
    except OSError:  # it has none
        configured = None
    ends = set(configured if isinstance(configured, list) else [configured])
    ends = (ends | {tokenizer.eos_token_id}) - {None}
    if not ends:
        raise ValueError(
            f"neither the tokenizer nor the generation config of {base_model!r} names an "
            "end-of-sequence token; set the tokenizer's `eos_token`"
        )
    return ends


def load_base_model(name: str, args: Any) -> PreTrainedModel:
    """The base model, in the precision that it was saved in unless `args` says otherwise."""
    return load_causal_lm(name, args.model_init_kwargs)
