"""Value models: what MAVIS guides with, as ordinary transformers models saved to safetensors.

A value model is a causal decoder with the base model's tokenizer and a linear head of one output
per objective. It predicts, at every position, the standardised reward that the response will end
with (arXiv 2508.13415, section 4). This file defines, saves and loads it; `engine` runs it fast.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import ModelOutput

from .cards import model_card
from .heads import MAVISValueHeads
from .params import quote
from .value_config import (
    MAVISValueConfig,
    base_model_fingerprint,
    load_config,
    tokenizer_fingerprint,
)


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
    """A causal decoder with a value head: `V_i(s)` of every prefix, `Q_i(s, a)` of candidates
    (arXiv 2508.13415, section 4).

    Args:
        config: Its `backbone_config` and `objectives` must be set.

    Raises:
        ValueError: The configuration names no backbone or no objective.

    Example:

    ```python
    >>> from trimtab.plugins import MAVISValueModel
    >>> new = MAVISValueModel.from_base_model(
    ...     model, ["readability"], num_hidden_layers=2, tokenizer=tokenizer
    ... )
    >>> new.save_pretrained("new_value_model")
    >>> value_model = MAVISValueModel.load("new_value_model")
    >>> value_model(**inputs).logits.shape  # [batch, length, n_objectives]
    torch.Size([2, 3, 1])
    ```
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

        Returns:
            `logits`, and `candidate_logits` where there are `candidates`, both float32.

        Raises:
            ValueError: The backbone's attention takes no mask of the candidates' own.
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


AutoModel.register(MAVISValueConfig, MAVISValueModel)
