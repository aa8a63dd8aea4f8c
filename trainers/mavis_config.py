"""Configuration of the [`MAVISTrainer`]."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from typing import Any

import torch
from transformers import TrainingArguments

from trimtab.plugins.value_config import HEAD_TYPES

# Fields that one head alone takes
OF_HEAD = {
    "state": ("num_hidden_layers", "train_embeddings", "merge_adapter", "leaf_fraction"),
    "hidden": ("action_rank", "gae_lambda"),
}


@dataclass
class MAVISConfig(TrainingArguments):
    r"""
    Configuration class for the [`MAVISTrainer`].

    This class includes only the parameters that are specific to the training of value models. For a
    full list of training arguments, please refer to the [`~transformers.TrainingArguments`]
    documentation. Note that default values in this class may differ from those in
    [`~transformers.TrainingArguments`].

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be
    specified on the command line.

    Parameters:
        > Parameters that control the model

        head_type (`str`, *optional*, defaults to `"hidden"`):
            Head of the value model. `"hidden"` reads the values of all candidates from the base
            model's own hidden state, without a backbone. `"state"`, the paper's, reads a
            candidate's value at the candidate's own position, in a backbone.
        num_hidden_layers (`int` or `None`, *optional*, defaults to `4`):
            Number of the base model's first blocks that make the backbone of `head_type="state"`,
            used when the `model` argument of the [`MAVISTrainer`] is provided as a string. If
            `None`, all are kept.
        action_rank (`int`, *optional*, defaults to `32`):
            Rank of the projections of heads on the base model's hidden state, used when `model` is
            a string.
        train_embeddings (`bool`, *optional*, defaults to `False`):
            With `head_type="state"`, whether to train the token embedding. Few of its rows are seen
            in the rollouts, and with a small backbone it holds most of the parameters.
        merge_adapter (`bool`, *optional*, defaults to `True`):
            With `head_type="state"`, whether `save_model` merges the adapter of `peft_config` into
            the backbone. Unmerged adapters of one base model are served as one batch, from one copy
            of its weights.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for [`~transformers.AutoModelForCausalLM.from_pretrained`], used to
            load the base model. Its `revision` and `trust_remote_code` count for the tokenizer, the
            configurations and vLLM, too.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for the chat template of conversational prompts, such as
            `{"enable_thinking": false}`: as the value model is to be served.

        > Parameters that control the iterations

        num_iterations (`int`, *optional*, defaults to `1`):
            Number of iterations. The first samples from the base model, each other one from the
            policies that the last one's values guide, one for every objective. All rollouts so far
            are learnt from.
        beta (`float`, *optional*, defaults to `1.0`):
            Strength of the guidance that later iterations sample with. They are measured by
            `reward - KL / beta`, in standardised rewards and nats.
        kl_penalty (`float`, *optional*):
            What a nat of KL to the base model costs a response, in standardised rewards. If `None`,
            it defaults to `1 / beta`.
        monotonic_check (`bool`, *optional*, defaults to `True`):
            Whether to warn when an iteration did not improve `reward - KL / beta` on the prompts of
            `eval_dataset`.

        > Parameters that control the rollouts

        max_completion_length (`int`, *optional*, defaults to `256`):
            Maximum length of a response.
        max_prompt_length (`int`, *optional*):
            Maximum length of a prompt. A longer one is an error. If `None`, a prompt and a response
            must fit the base model's context.
        layers (`int`, *optional*, defaults to `5`):
            Number of layers of a tree of responses, which has `root_children * children ** (layers
            - 1)` of them. With one layer the responses share nothing but the prompt.
        root_children (`int`, *optional*, defaults to `4`):
            Number of children of a tree's root, the prompt.
        children (`int`, *optional*, defaults to `2`):
            Number of children of every other node.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature for sampling. The value model predicts rewards under the policy that
            sampled.
        top_k (`int`, *optional*, defaults to `40`):
            Number of likeliest tokens to sample from, and of candidates that the value model guides
            among. Guidance chooses among the base model's `top_k` likeliest tokens, so that its
            reference policy is the base model with this `top_k`. If `0`, all tokens are sampled
            from.
        top_p (`float`, *optional*, defaults to `1.0`):
            Of the `top_k` tokens, the likeliest that have this probability together are sampled
            from. Guidance does not follow it, unless a request asks for the same: leave it at 1,
            which samples from all, to learn what is served. One iteration only.
        rollout_dir (`str`, *optional*):
            Where the rollouts are stored as Parquet. An interrupted collection resumes there. If
            `None`, it defaults to `"rollouts"` in `output_dir`.
        rollout_batch_size (`int`, *optional*, defaults to `32`):
            Number of prompts whose trees are sampled together and stored in one file.
        generation_batch_size (`int`, *optional*, defaults to `32`):
            Number of responses that transformers continues at once. Only used when `use_vllm` is
            `False`.

        log_completions (`bool`, *optional*, defaults to `False`):
            Whether to print a sample of responses with their rewards, and what reward functions
            have logged by `log_extra`, when a dataset's rollouts are collected. Requires `rich`.

        > Parameters that control generation acceleration powered by vLLM

        use_vllm (`bool`, *optional*, defaults to `False`):
            Whether to sample with vLLM, in this process, instead of `model.generate()`. Requires
            `vllm` to be installed.
        vllm_server_base_url (`str` or `list[str]`, *optional*):
            Base URL of a running `vllm serve` of the base model to sample from instead, for example
            `"http://localhost:8000"`, or those of several that share the requests. They can do the
            first iteration only.
        num_ray_workers (`int`, *optional*):
            Number of workers of a Ray cluster to sample with, each with an engine of vLLM, instead
            of in this process. The cluster is that of the environment variable `RAY_ADDRESS` or of
            this machine, where one is started if there is none. Requires `use_vllm`, and `ray` to
            be installed.
        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.3`):
            Control the GPU memory utilization for vLLM.
        vllm_tensor_parallel_size (`int`, *optional*, defaults to `1`):
            Control the tensor parallel size for vLLM.
        vllm_init_kwargs (`dict[str, Any]`, *optional*):
            Further keyword arguments for `vllm.LLM`, for example `{"enforce_eager": true}`.

        > Parameters that control the training

        leaf_fraction (`float`, *optional*, defaults to `0.5`):
            With `head_type="state"`, fraction of the bottom layer of every tree to train on, which
            would outnumber the rest. Of responses that are given as data all are used.
        gae_lambda (`float`, *optional*, defaults to `0.5`):
            With `head_type="hidden"`, what advantages are learnt from: 1 for the rewards of the
            finished responses alone, 0 for the predicted value of the next token, which is less
            noisy and biased.
        max_length (`int`, *optional*, defaults to `1024`):
            Maximum number of tokens of a training sequence. A larger tree is cut into several
            sequences of whole responses, which repeat what these share.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `learning_rate`: Defaults to `1e-3`, with `head_type="state"` to `2e-4`, instead of `5e-5`.
    > - `per_device_train_batch_size`: Defaults to `4` instead of `8`; one item is a tree.
    > - `num_train_epochs`: Defaults to `2` instead of `3` with `head_type="state"`.
    > - `logging_steps`: Defaults to `10` instead of `500`.
    > - `bf16`: Defaults to `True` if `fp16` is not set, instead of `False`.
    > - `remove_unused_columns`: Defaults to `False` instead of `True`; reward functions get all
    >   columns.

    Raises:
        ValueError: A parameter is out of range, or does not go with another.

    Example:

    ```python
    >>> from trimtab.trainers import MAVISConfig
    >>> args = MAVISConfig(output_dir="value_model", max_completion_length=48, layers=3)
    >>> args.root_children * args.children ** (args.layers - 1)  # responses to a prompt
    16
    ```
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "chat_template_kwargs",
        "vllm_init_kwargs",
    ]

    # Parameters whose default values are overridden from TrainingArguments
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "The initial learning rate for AdamW. If `None`, it defaults to `1e-3`, with "
            "`head_type='state'` to `2e-4`."
        },
    )
    per_device_train_batch_size: int = field(
        default=4,
        metadata={"help": "Number of training sequences, of a tree each, per device and step."},
    )
    num_train_epochs: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Total number of training epochs to perform. If `None`, it defaults to `3`, "
            "with `head_type='state'` to `2`."
        },
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
        metadata={"help": "Whether to drop the dataset's columns that reward functions may need."},
    )

    # Parameters that control the model
    head_type: str = field(
        default="hidden",
        metadata={
            "help": "Head of the value model. `'hidden'` reads the values of all candidates from "
            "the base model's own hidden state, without a backbone. `'state'`, the paper's, reads "
            "a candidate's value at the candidate's own position, in a backbone.",
            "choices": ["hidden", "state"],
        },
    )
    num_hidden_layers: int | None = field(
        default=4,
        metadata={
            "help": "Number of the base model's first blocks that make the backbone of "
            "`head_type='state'`, used when the `model` argument of the `MAVISTrainer` is provided "
            "as a string. If `None`, all are kept."
        },
    )
    action_rank: int = field(
        default=32,
        metadata={
            "help": "Rank of the projections of heads on the base model's hidden state, used when "
            "`model` is a string."
        },
    )
    train_embeddings: bool = field(
        default=False,
        metadata={
            "help": "With `head_type='state'`, whether to train the token embedding. Few of its "
            "rows are seen in the rollouts, and with a small backbone it holds most of the "
            "parameters."
        },
    )
    merge_adapter: bool = field(
        default=True,
        metadata={
            "help": "With `head_type='state'`, whether `save_model` merges the adapter of "
            "`peft_config` into the backbone. Unmerged adapters of one base model are served as "
            "one batch, from one copy of its weights."
        },
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for `AutoModelForCausalLM.from_pretrained`, used to load "
            "the base model."
        },
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for the chat template of conversational prompts, such as "
            '`{"enable_thinking": false}`: as the value model is to be served.'
        },
    )

    # Parameters that control the iterations
    num_iterations: int = field(
        default=1,
        metadata={
            "help": "Number of iterations. The first samples from the base model, each other one "
            "from the policies that the last one's values guide, one for every objective. All "
            "rollouts so far are learnt from."
        },
    )
    beta: float = field(
        default=1.0,
        metadata={
            "help": "Strength of the guidance that later iterations sample with. They are measured "
            "by `reward - KL / beta`, in standardised rewards and nats."
        },
    )
    kl_penalty: float | None = field(
        default=None,
        metadata={
            "help": "What a nat of KL to the base model costs a response, in standardised rewards. "
            "If `None`, it defaults to `1 / beta`."
        },
    )
    monotonic_check: bool = field(
        default=True,
        metadata={
            "help": "Whether to warn when an iteration did not improve `reward - KL / beta` on the "
            "prompts of `eval_dataset`."
        },
    )

    # Parameters that control the rollouts
    max_completion_length: int = field(
        default=256,
        metadata={"help": "Maximum length of a response."},
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={
            "help": "Maximum length of a prompt. A longer one is an error. If `None`, a prompt and "
            "a response must fit the base model's context."
        },
    )
    layers: int = field(
        default=5,
        metadata={
            "help": "Number of layers of a tree of responses, which has `root_children * children "
            "** (layers - 1)` of them. With one layer the responses share nothing but the prompt."
        },
    )
    root_children: int = field(
        default=4,
        metadata={"help": "Number of children of a tree's root, the prompt."},
    )
    children: int = field(
        default=2,
        metadata={"help": "Number of children of every other node."},
    )
    temperature: float = field(
        default=1.0,
        metadata={
            "help": "Temperature for sampling. The value model predicts rewards under the policy "
            "that sampled."
        },
    )
    top_k: int = field(
        default=40,
        metadata={
            "help": "Number of likeliest tokens to sample from, and of candidates that the value "
            "model guides among. Guidance chooses among the base model's `top_k` likeliest tokens, "
            "so that its reference policy is the base model with this `top_k`. If `0`, all tokens "
            "are sampled from."
        },
    )
    top_p: float = field(
        default=1.0,
        metadata={
            "help": "Of the `top_k` tokens, the likeliest that have this probability together are "
            "sampled from. If `1.0`, all are. One iteration only."
        },
    )
    rollout_dir: str | None = field(
        default=None,
        metadata={
            "help": "Where the rollouts are stored as Parquet. An interrupted collection resumes "
            "there. If `None`, it defaults to `'rollouts'` in `output_dir`."
        },
    )
    rollout_batch_size: int = field(
        default=32,
        metadata={
            "help": "Number of prompts whose trees are sampled together and stored in one file."
        },
    )
    generation_batch_size: int = field(
        default=32,
        metadata={
            "help": "Number of responses that transformers continues at once. Only used when "
            "`use_vllm` is `False`."
        },
    )

    log_completions: bool = field(
        default=False,
        metadata={
            "help": "Whether to print a sample of responses with their rewards, and what reward "
            "functions have logged by `log_extra`, when a dataset's rollouts are collected. "
            "Requires `rich`."
        },
    )

    # Parameters that control generation acceleration powered by vLLM
    use_vllm: bool = field(
        default=False,
        metadata={
            "help": "Whether to sample with vLLM, in this process, instead of `model.generate()`. "
            "Requires `vllm` to be installed."
        },
    )
    vllm_server_base_url: list[str] | None = field(
        default=None,
        metadata={
            "help": "Base URL of a running `vllm serve` of the base model to sample from instead, "
            "for example `'http://localhost:8000'`, or those of several that share the requests. "
            "They can do the first iteration only."
        },
    )
    num_ray_workers: int | None = field(
        default=None,
        metadata={
            "help": "Number of workers of a Ray cluster to sample with, each with an engine of "
            "vLLM, instead of in this process. The cluster is that of the environment variable "
            "`RAY_ADDRESS` or of this machine, where one is started if there is none. Requires "
            "`use_vllm`, and `ray` to be installed."
        },
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.3,
        metadata={"help": "Control the GPU memory utilization for vLLM."},
    )
    vllm_tensor_parallel_size: int = field(
        default=1,
        metadata={"help": "Control the tensor parallel size for vLLM."},
    )
    vllm_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Further keyword arguments for `vllm.LLM`, for example `{"enforce_eager": '
            "true}`."
        },
    )

    # Parameters that control the training
    leaf_fraction: float = field(
        default=0.5,
        metadata={
            "help": "With `head_type='state'`, fraction of the bottom layer of every tree to train "
            "on, which would outnumber the rest. Of responses that are given as data all are used."
        },
    )
    gae_lambda: float = field(
        default=0.5,
        metadata={
            "help": "With `head_type='hidden'`, what advantages are learnt from: 1 for the rewards "
            "of the finished responses alone, 0 for the predicted value of the next token, which "
            "is less noisy and biased."
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
        heads = self.head_type == "hidden"
        for name, default in (
            ("learning_rate", 1e-3 if heads else 2e-4),
            ("num_train_epochs", 3.0 if heads else 2.0),
        ):
            if getattr(self, name) is None:
                setattr(self, name, default)
        # `TrainingArguments` takes bf16 on a CPU only when it is told to use the CPU.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        if isinstance(self.vllm_server_base_url, str):
            self.vllm_server_base_url = [self.vllm_server_base_url]
        for name in (
            "num_iterations",
            "max_completion_length",
            "layers",
            "root_children",
            "children",
            "rollout_batch_size",
            "generation_batch_size",
            "action_rank",
            "max_length",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if self.remove_unused_columns:
            raise ValueError(
                "`remove_unused_columns` must be False: reward functions may need all columns; "
                "remove what they do not with `dataset.remove_columns`"
            )
        if self.log_completions and find_spec("rich") is None:
            raise ValueError("`log_completions` needs rich: pip install rich")
        if self.top_k < 0:
            raise ValueError(f"`top_k` must not be negative, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be above 0 and at most 1, got {self.top_p}")
        if self.top_p < 1 and self.num_iterations > 1:
            raise ValueError(
                "`top_p` must be 1 with several iterations, whose KL is that of the policy over "
                f"all candidates; got {self.top_p}"
            )
        if not self.beta > 0:
            raise ValueError(f"`beta` must be positive, got {self.beta}")
        if self.kl_penalty is None:
            self.kl_penalty = 1 / self.beta
        if not self.kl_penalty >= 0:
            raise ValueError(f"`kl_penalty` must not be negative, got {self.kl_penalty}")
        if self.num_iterations > 1 and not self.top_k:
            raise ValueError(
                "`top_k` must be at least 1 with several iterations: guidance chooses among that "
                "many candidates, got 0"
            )
        if self.num_iterations > 1 and self.vllm_server_base_url:
            raise ValueError(
                f"`vllm_server_base_url` cannot serve num_iterations={self.num_iterations}: later "
                "iterations sample with value models that servers have not loaded, and learn from "
                "both policies' probabilities of all candidates, which answers do not hold. "
                "Collect the first iteration's rollouts from the servers with num_iterations=1, "
                f"then set num_iterations={self.num_iterations} and `use_vllm` without the "
                "servers, which goes on from there; `num_ray_workers` spreads it"
            )
        if self.num_ray_workers is not None:
            if self.num_ray_workers < 1:
                raise ValueError(
                    f"`num_ray_workers` must be at least 1, got {self.num_ray_workers}: leave it "
                    "out to sample without Ray"
                )
            if self.vllm_server_base_url or not self.use_vllm:
                raise ValueError(
                    f"num_ray_workers={self.num_ray_workers} samples with engines of vLLM in Ray's "
                    "workers: set `use_vllm`, and leave out `vllm_server_base_url`"
                )
            if find_spec("ray") is None:
                raise ValueError("`num_ray_workers` needs ray: pip install 'trimtab[ray]'")
        if not self.temperature > 0:
            raise ValueError(f"`temperature` must be positive, got {self.temperature}")
        if self.head_type not in HEAD_TYPES:
            raise ValueError(f"`head_type` must be one of {HEAD_TYPES}, got {self.head_type!r}")
        if heads and not self.top_k:
            raise ValueError(
                "`top_k` must be at least 1 with head_type='hidden': advantages are learnt among "
                "that many candidates, got 0"
            )
        if not 0 <= self.gae_lambda <= 1:
            raise ValueError(f"`gae_lambda` must be within 0 and 1, got {self.gae_lambda}")
        if not 0 <= self.leaf_fraction <= 1:
            raise ValueError(f"`leaf_fraction` must be within 0 and 1, got {self.leaf_fraction}")
        defaults = {f.name: f.default for f in fields(self)}
        for head_type, names in OF_HEAD.items():
            for name in names if head_type != self.head_type else ():
                if getattr(self, name) != defaults[name]:
                    raise ValueError(
                        f"`{name}` is for head_type={head_type!r}, got {getattr(self, name)!r} "
                        f"with head_type={self.head_type!r}: leave it out, or set "
                        f"head_type={head_type!r}"
                    )
