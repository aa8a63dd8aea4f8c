"""The value model that training starts from: the one given, or one made for the base model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from trimtab.plugins.heads import MAVISValueHeads
from trimtab.plugins.value_config import MAVISValueConfig, tokenizer_fingerprint
from trimtab.plugins.value_model import MAVISValueModel

from .base_model import is_value_model, load_base_model, source_of
from .head_training import further_heads
from .mavis_config import MAVISConfig


def read_model(model: Any, args: Any) -> Any:
    """The `model` of [`MAVISTrainer`], of which the folder of a value model is loaded. Raises
    `TypeError` or `ValueError` where it is neither that nor a base model."""
    if isinstance(model, str) and is_value_model(model):
        model = MAVISValueModel.load(model)
    if not isinstance(model, (str, MAVISValueModel, MAVISValueHeads)):
        raise TypeError(
            "`model` must be the id or path of a base model, or a value model to train on, got "
            f"{type(model).__name__}: of a loaded base model, give the id or path, since "
            "rollouts are sampled from it by vLLM or in another process"
        )
    # Of the checkpoint in a `subfolder`, the folder itself need not be one.
    beside = "subfolder" in (getattr(args, "model_init_kwargs", None) or {})
    folder = Path(model) if isinstance(model, str) else None
    if folder and folder.is_dir() and not beside and not (folder / CONFIG_NAME).exists():
        raise ValueError(
            f"`model` {model!r} is a folder without {CONFIG_NAME}, and so neither a base model "
            "nor a value model: give the id or path of a base model, or the folder that "
            "`save_model` wrote"
        )
    if not isinstance(model, str) and getattr(model.config, "base_model", None) is None:
        raise ValueError(
            "`model` is a value model that names no base model to sample from; make it with "
            "MAVISValueModel.from_base_model, or pass the base model's id or path"
        )
    return model


def arguments_for(model: Any, args: MAVISConfig | None) -> MAVISConfig:
    """The arguments, or the default ones for a model. Raises `ValueError` where they contradict
    it."""
    if args is not None and not isinstance(args, MAVISConfig):
        raise TypeError(
            f"`args` must be a MAVISConfig, got {type(args).__name__}: `beta`, `temperature` "
            "and `num_iterations` mean other things there; give its fields to MAVISConfig"
        )
    if args is None:
        base_model, head_type = model, "hidden"
        if not isinstance(model, str):
            base_model, head_type = model.config.base_model, model.config.head_type
        args = MAVISConfig(f"{base_model.split('/')[-1]}-MAVIS", head_type=head_type)
    if not isinstance(model, str) and model.config.head_type != args.head_type:
        raise ValueError(
            f"`head_type` is {args.head_type!r} and the value model's is "
            f"{model.config.head_type!r}, with other default hyperparameters: set "
            f"head_type={model.config.head_type!r}"
        )
    if not args.merge_adapter and (not isinstance(model, str) or args.train_embeddings):
        raise ValueError(
            "`merge_adapter=False` saves what is added to the base model's own blocks: give "
            "`model` as the base model's id or path, and leave `train_embeddings` off"
        )
    return args


def starting_model(
    model: Any,
    args: MAVISConfig,
    objectives: list[str],
    processing_class: PreTrainedTokenizerBase,
) -> Any:
    """The value model of these objectives: `model` itself, or a new one, for a base model or for
    objectives to add. Raises `ValueError` where `model` has others, or another tokenizer."""
    value_model: Any = model
    known = [] if isinstance(model, str) else list(model.config.objectives or [])
    if isinstance(model, str):
        kind: Any = MAVISValueModel
        fields: dict[str, Any] = {"num_hidden_layers": args.num_hidden_layers}
        if args.head_type == "hidden":
            kind, fields = MAVISValueHeads, {"action_rank": args.action_rank}
        value_model = kind.from_base_model(
            load_base_model(model, args), objectives, tokenizer=processing_class, **fields
        )
    elif known and not set(known) & set(objectives):
        check_can_be_added(model.config, args, objectives)
        value_model = further_heads(model, objectives)
    elif known != objectives:
        raise ValueError(
            f"the value model has the objectives {known}, `reward_funcs` or the data "
            f"{objectives}; they must be the same in the same order, to go on with them, "
            "or all others, to be added to it"
        )
    if args.top_k:
        value_model.config.top_k = args.top_k
    vocabulary = tokenizer_fingerprint(processing_class)
    if (value_model.config.tokenizer_fingerprint or vocabulary) != vocabulary:
        raise ValueError(
            "`processing_class` has another vocabulary than the tokenizer that the value model "
            f"was made for; use the tokenizer of its base model {value_model.config.base_model!r}"
        )
    value_model.config.tokenizer_fingerprint = vocabulary
    return value_model


def context_of(config: MAVISValueConfig, base_model: str, args: MAVISConfig) -> int | None:
    """Tokens that a value model, or the base model that its heads read, has positions for."""
    reads: Any = config.backbone_config
    if reads is None:
        of_base: Any = AutoConfig.from_pretrained(base_model, **source_of(args))
        reads = of_base.get_text_config()
    return getattr(reads, "max_position_embeddings", None)


def check_can_be_added(config: MAVISValueConfig, args: MAVISConfig, added: list[str]) -> None:
    """Raises `ValueError` where objectives cannot be added to a value model."""
    names = f"{added}, beside the value model's {config.objectives}"
    if config.head_type != "hidden":
        raise ValueError(
            f"objectives can be added with head_type='hidden' alone, got {names}, with "
            f"head_type={config.head_type!r}: train a value model of its own for them, which is "
            "served together with this one"
        )
    if args.num_iterations > 1:
        raise ValueError(
            f"num_iterations={args.num_iterations} cannot add objectives, got {names}: add them "
            "with num_iterations=1"
        )
    if args.top_k != config.top_k:
        raise ValueError(
            f"`top_k` is {args.top_k} and the value model's is {config.top_k}, which it keeps when "
            f"objectives are added: set top_k={config.top_k}"
        )


def read_weights_in_every_process() -> None:
    """Turns off FSDP's reading of weights by one process for all, which leaves the others with
    nothing until training begins: every process samples and values before."""
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
