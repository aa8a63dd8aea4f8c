"""Configuration of the [`MAVISDistillationTrainer`]."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments


@dataclass
class MAVISDistillationConfig(TrainingArguments):
    r"""
    Configuration class for the [`MAVISDistillationTrainer`].

    This class includes only the parameters that are specific to the distillation of value models.
    For a full list of training arguments, please refer to the [`~transformers.TrainingArguments`]
    documentation. Note that default values in this class may differ from those in
    [`~transformers.TrainingArguments`].

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be
    specified on the command line.

    Parameters:
        > Parameters that control the student

        head_type (`str`, *optional*, defaults to `"action"`):
            Head of the student, used when the `model` argument of the [`MAVISDistillationTrainer`]
            is provided as a string. `"action"` reads the values of all candidates at the prefix, so
            that a decoding step costs one token. `"state"` reads a candidate's value at the
            candidate's own position.
        num_hidden_layers (`int` or `None`, *optional*, defaults to `4`):
            Number of the base model's first blocks that make the student's backbone, used when
            `model` is a string. If `None`, all are kept.
        action_rank (`int`, *optional*, defaults to `128`):
            Rank of an action head's projections, used when `model` is a string.
        freeze_backbone (`bool`, *optional*, defaults to `False`):
            Whether to train the heads only: with a single teacher of equal depth cheap, and the
            values of prefixes stay the teacher's.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for [`~transformers.AutoModelForCausalLM.from_pretrained`], used to
            load the base model.

        > Parameters that control the distillation

        top_k (`int`, *optional*):
            Number of the base model's likeliest next tokens that make the candidates. If `None`, it
            defaults to what the teachers guide among.
        positions_per_sequence (`int`, *optional*, defaults to `48`):
            Number of prefixes of each training sequence, drawn at random, at which candidates are
            compared. The teachers value them once, before training: that costs more than several
            epochs of it.
        leaf_fraction (`float`, *optional*, defaults to `0.5`):
            Fraction of the bottom layer of every tree to use.
        uniform_weight (`float`, *optional*, defaults to `0.5`):
            Candidates are weighted by a mixture of the base model's probabilities and, in this
            share, the uniform distribution: guidance raises unlikely candidates.
        value_weight (`float`, *optional*, defaults to `0.1`):
            Weight of the error in the values of the prefixes themselves, which guide nothing.
        head_learning_rate (`float`, *optional*, defaults to `1e-3`):
            Learning rate of the heads, which start anew; `learning_rate` is the backbone's.
        max_length (`int`, *optional*, defaults to `1024`):
            Maximum number of tokens of a training sequence. A larger tree is cut into several
            sequences of whole responses, which repeat what these share.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `learning_rate`: Defaults to `2e-4` instead of `5e-5`.
    > - `per_device_train_batch_size`: Defaults to `2` instead of `8`; one item is a tree.
    > - `num_train_epochs`: Defaults to `4` instead of `3`.
    > - `logging_steps`: Defaults to `10` instead of `500`.
    > - `bf16`: Defaults to `True` if `fp16` is not set, instead of `False`.
    > - `remove_unused_columns`: Defaults to `False` instead of `True`.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]  # noqa: RUF012

    # Parameters whose default values are overridden from TrainingArguments
    learning_rate: float = field(
        default=2e-4,
        metadata={"help": "The initial learning rate for AdamW."},
    )
    per_device_train_batch_size: int = field(
        default=2,
        metadata={"help": "Number of training sequences, of a tree each, per device and step."},
    )
    num_train_epochs: float = field(
        default=4.0,
        metadata={"help": "Total number of training epochs to perform."},
    )
    logging_steps: float = field(
        default=10,
        metadata={
            "help": "Log every X updates steps. Should be an integer or a float in range `[0,1)`. "
            "If smaller than 1, will be interpreted as ratio of total training steps."
        },
    )
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Whether to use bf16 (mixed) precision instead of 32-bit. If not set, it "
            "defaults to `True` if `fp16` is not set."
        },
    )
    remove_unused_columns: bool = field(
        default=False,
        metadata={"help": "Whether to drop what the model's forward does not take."},
    )

    # Parameters that control the student
    head_type: str = field(
        default="action",
        metadata={
            "help": "Head of the student, used when the `model` argument of the "
            "`MAVISDistillationTrainer` is provided as a string. `'action'` reads the values of "
            "all candidates at the prefix, so that a decoding step costs one token. `'state'` "
            "reads a candidate's value at the candidate's own position.",
            "choices": ["state", "action"],
        },
    )
    num_hidden_layers: int | None = field(
        default=4,
        metadata={
            "help": "Number of the base model's first blocks that make the student's backbone, "
            "used when `model` is a string. If `None`, all are kept."
        },
    )
    action_rank: int = field(
        default=128,
        metadata={"help": "Rank of an action head's projections, used when `model` is a string."},
    )
    freeze_backbone: bool = field(
        default=False,
        metadata={
            "help": "Whether to train the heads only: with a single teacher of equal depth cheap, "
            "and the values of prefixes stay the teacher's."
        },
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for `AutoModelForCausalLM.from_pretrained`, used to load "
            "the base model."
        },
    )

    # Parameters that control the distillation
    top_k: int | None = field(
        default=None,
        metadata={
            "help": "Number of the base model's likeliest next tokens that make the candidates. "
            "If `None`, it defaults to what the teachers guide among."
        },
    )
    positions_per_sequence: int = field(
        default=48,
        metadata={
            "help": "Number of prefixes of each training sequence, drawn at random, at which "
            "candidates are compared. The teachers value them once, before training: that costs "
            "more than several epochs of it."
        },
    )
    leaf_fraction: float = field(
        default=0.5,
        metadata={"help": "Fraction of the bottom layer of every tree to use."},
    )
    uniform_weight: float = field(
        default=0.5,
        metadata={
            "help": "Candidates are weighted by a mixture of the base model's probabilities and, "
            "in this share, the uniform distribution: guidance raises unlikely candidates."
        },
    )
    value_weight: float = field(
        default=0.1,
        metadata={
            "help": "Weight of the error in the values of the prefixes themselves, which guide "
            "nothing."
        },
    )
    head_learning_rate: float = field(
        default=1e-3,
        metadata={
            "help": "Learning rate of the heads, which start anew; `learning_rate` is the "
            "backbone's."
        },
    )
    max_length: int = field(
        default=1024,
        metadata={
            "help": "Maximum number of tokens of a training sequence. A larger tree is cut into "
            "several sequences of whole responses, which repeat what these share."
        },
    )

    def __post_init__(self) -> None:
        self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
        # `TrainingArguments` takes bf16 on a CPU only when it is told to use the CPU.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        for name in ("action_rank", "positions_per_sequence", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if self.top_k is not None and self.top_k < 2:
            raise ValueError(f"`top_k` must be at least 2, got {self.top_k}")
        if self.head_type not in ("state", "action"):
            raise ValueError(
                f"`head_type` must be 'state' or 'action', got {self.head_type!r}; heads on the "
                "base model's hidden state are trained on its rewards by `MAVISTrainer`"
            )
        for name in ("uniform_weight", "leaf_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be within 0 and 1, got {getattr(self, name)}")
        for name in ("value_weight", "head_learning_rate"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}")
