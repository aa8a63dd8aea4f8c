"""Value models that are LoRA adapters of one backbone, run as one batch.

An adapter's folder is what [`MAVISTrainer`] saves with `merge_adapter=False`: PEFT's two files and
the value model's `config.json`. Adapters cut from the same base model share one backbone in memory,
and the engine reads its weights once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.utils import cached_file, find_adapter_config_file

from .value_config import load_config
from .value_model import MAVISValueModel, check_finite


class LoRALinear(nn.Module):
    """A linear layer under several adapters, each with an equal share of the rows, in order.

    Args:
        linear: The shared layer.
        deltas: For each adapter, `A` `[rank, in]` and `B` `[out, rank]`, scaled; None for zero.
    """

    def __init__(
        self, linear: nn.Linear, deltas: Sequence[tuple[torch.Tensor, torch.Tensor] | None]
    ) -> None:
        super().__init__()
        self.linear = linear
        rank = max(delta[0].shape[0] for delta in deltas if delta is not None)
        like: dict[str, Any] = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        down = torch.zeros(len(deltas), linear.in_features, rank, **like)
        up = torch.zeros(len(deltas), rank, linear.out_features, **like)
        for i, delta in enumerate(deltas):
            if delta is not None:
                down[i, :, : delta[0].shape[0]] = delta[0].T
                up[i, : delta[1].shape[1]] = delta[1].T
        self.down = nn.Parameter(down, requires_grad=False)
        self.up = nn.Parameter(up, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[1, adapters * tokens, in]` to `[1, adapters * tokens, out]`."""
        y, adapters = self.linear(x), len(self.down)
        low = torch.bmm(x.view(adapters, -1, x.shape[-1]), self.down)
        return torch.baddbmm(y.view(adapters, -1, y.shape[-1]), low, self.up).view_as(y)


def load_value_models(paths: Sequence[str], dtype: torch.dtype) -> list[MAVISValueModel]:
    """Load value models, whole ones and adapters, for a `ValueEngine`.

    Args:
        paths: Folders or hub ids of whole models and of adapters.
        dtype: Of the weights.

    Returns:
        One model for each path. Those of adapters of one backbone hold the same backbone object,
        whose layers run all of them.

    Raises:
        ValueError: A model or an adapter cannot be loaded, or is of an unsupported kind.
    """
    models: dict[int, MAVISValueModel] = {}
    families: dict[str, list[int]] = {}
    for i, path in enumerate(paths):
        config = load_config(path)
        if find_adapter_config_file(path) is None:
            models[i] = MAVISValueModel.load(path, dtype=dtype)
        else:
            backbone = config.text_config.to_json_string(use_diff=False)
            families.setdefault(f"{config.base_model} {backbone}", []).append(i)
    for members in families.values():
        tuned = [_load_adapter(paths[i], dtype) for i in members]
        models |= dict(zip(members, _share_backbone(tuned)))
    return [models[i] for i in range(len(paths))]


def _load_adapter(path: str, dtype: torch.dtype) -> MAVISValueModel:
    """A value model whose backbone has PEFT's layers in it."""
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the value model {path!r} is an adapter, which needs peft; pip install peft",
            name="peft",
        ) from error
    config = load_config(path)
    weights = cached_file(
        path,
        "adapter_model.safetensors",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if weights is None:
        raise ValueError(
            f"adapter {path!r} has no adapter_model.safetensors; pickled weights are never loaded: "
            "save it with save_pretrained"
        )
    if config.base_model is None:
        raise ValueError(f"adapter {path!r}: its config names no base_model to cut a backbone from")
    try:
        model = MAVISValueModel.from_base_model(
            config.base_model,
            config.objectives or [],
            num_hidden_layers=config.text_config.num_hidden_layers,
            dtype=dtype,
        )
        adapted: Any = PeftModel.from_pretrained(model, str(Path(weights).parent))
        with safe_open(weights, framework="pt") as file:
            stored = set(file.keys())
    except Exception as error:  # PEFT, transformers and safetensors raise many kinds
        raise ValueError(
            f"adapter {path!r} of base model {config.base_model!r} cannot be loaded: {error}"
        ) from error
    if missing := sorted(set(get_peft_model_state_dict(adapted)) - stored):  # PEFT only warns
        raise ValueError(f"adapter {path!r} lacks the weights {missing}; copy or train it again")
    tuned: Any = adapted.base_model.model
    check_finite(tuned, path)
    for name, module in list(tuned.named_children()):
        if name != "backbone" and hasattr(module, "modules_to_save"):
            setattr(tuned, name, module.modules_to_save["default"])
    tuned.config = config
    biased = adapted.peft_config["default"].bias != "none"
    for name, module in tuned.backbone.named_modules():
        plain = not hasattr(module, "lora_A") or isinstance(module.base_layer, nn.Linear)
        dora = any(getattr(module, "use_dora", {}).values())
        if biased or dora or not plain or hasattr(module, "modules_to_save"):
            raise ValueError(
                f"adapter {path!r} changes {name!r} by more than plain LoRA, which cannot run "
                "beside others: save it merged"
            )
        if hasattr(module, "lora_A"):
            scaled = module.lora_B["default"].weight * module.scaling["default"]
            if not scaled.isfinite().all():
                raise ValueError(
                    f"adapter {path!r}: the weights of {name!r}, scaled by its lora_alpha, are not "
                    f"finite in {dtype}; train it again"
                )
    return tuned


def _share_backbone(tuned: list[MAVISValueModel]) -> list[MAVISValueModel]:
    """Put all the adapters into the first model's backbone, and that into all the models."""
    backbone = tuned[0].backbone
    layers: dict[str, list[Any]] = {}
    for i, model in enumerate(tuned):
        for name, module in model.backbone.named_modules():
            if hasattr(module, "lora_A"):
                a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
                deltas = layers.setdefault(name, [None] * len(tuned))
                deltas[i] = (a.detach(), b.detach() * module.scaling["default"])
    for name, deltas in layers.items():
        parent, _, child = name.rpartition(".")
        linear: Any = backbone.get_submodule(name)
        linear = linear.base_layer if hasattr(linear, "base_layer") else linear
        setattr(backbone.get_submodule(parent), child, LoRALinear(linear, deltas))
    for model in tuned:
        model.backbone = backbone
    return tuned
