"""Decoder layers of value models in few operations.

A step of few tokens through transformers' layers is mostly the dispatch of small operations. The
layers of the plainest decoders (Llama and its like) are replaced by layers of the same function:
projections of one input are one matrix, and a pass is one loop. All others keep their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .attention import BLOCK_SIZE, TAKEN, Step, Store, attend, head_dim, kv_heads, write

logger = logging.get_logger(__name__)

# Pre-norm decoders with rotary embeddings and a gated MLP, and nothing else.
PLAIN = ("llama", "mistral", "qwen2", "qwen3")


class PackedLinear(nn.Module):
    """A bfloat16 linear layer of a CPU whose weights lie as oneDNN multiplies them.

    `nn.Linear` brings its weights into that order at every call, which takes as long again as the
    product itself when a batch has few tokens. The operators are those of PyTorch's own compiler.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.nbytes = linear.weight.nbytes
        self.bias = linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def pack(module: nn.Module) -> None:
    """Replace the module's linear layers by packed ones, where this CPU can run them."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    for name, child in module.named_children():
        if type(child) is nn.Linear and child.weight.dtype == torch.bfloat16:
            setattr(module, name, PackedLinear(child))
        else:
            pack(child)


class Joined(nn.Module):
    """The outputs of several layers of one input, one behind the other."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x) for layer in self.layers], dim=-1)


def join(layers: Sequence[Any]) -> nn.Module:
    """One layer for several of one input: a single matrix unless some are not plain linear ones."""
    if any(type(layer) is not nn.Linear for layer in layers):
        return Joined(layers)
    weight = torch.cat([layer.weight.detach() for layer in layers])
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if any(layer.bias is not None for layer in layers):
        biases = [
            weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
            for layer in layers
        ]
        joined.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return joined


class RMSNorm(nn.Module):
    """Root mean square normalisation in one call; `norm` is transformers' module of it."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class FusedLayer(nn.Module):
    """A decoder layer of a plain kind, `[total, hidden]` to the same."""

    def __init__(self, layer: Any, config: Any) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.dim, self.scaling = attention.head_dim, attention.scaling
        self.window = getattr(attention, "sliding_window", None)
        if config.model_type == "mistral":
            self.window = config.sliding_window
        self.heads, self.kv_heads = config.num_attention_heads, kv_heads(config)
        self.norm = RMSNorm(layer.input_layernorm)
        self.qkv = join((attention.q_proj, attention.k_proj, attention.v_proj))
        self.head_norms = nn.ModuleList(
            RMSNorm(getattr(attention, name))
            for name in ("q_norm", "k_norm")
            if hasattr(attention, name)
        )
        self.o = attention.o_proj
        self.mlp_norm = RMSNorm(layer.post_attention_layernorm)
        self.gate_up = join((mlp.gate_proj, mlp.up_proj))
        self.act, self.down = mlp.act_fn, mlp.down_proj

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,  # [total, 1, dim]
        sin: torch.Tensor,  # the same, its first half negated
        step: Step,
        store: torch.Tensor,
        stores_only: bool,
    ) -> torch.Tensor:
        qkv = self.qkv(self.norm(x)).view(len(x), -1, self.dim)
        rotated = qkv[:, : self.heads + self.kv_heads]
        q, kv = qkv[:, : self.heads], qkv[:, self.heads :]
        for norm, part in zip(self.head_norms, (q, kv[:, : self.kv_heads])):
            part.copy_(norm(part))
        torch.addcmul(rotated * cos, rotated.roll(self.dim // 2, -1), sin, out=rotated)
        if stores_only:
            write(kv, step, store)
            return x
        x = x + self.o(attend(q, kv, step, store, self.scaling, self.window))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(self.act(gate).mul_(up))


def run(
    backbone: Any,
    *,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    mavis_step: Step | None = None,
    mavis_store: Store | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor]:
    """The forward pass of a backbone whose layers are fused, `[1, total]` to `[1, total, hidden]`.

    The last layer of a pass that `stores_only` ends with its keys and values.
    """
    if mavis_step is None or mavis_store is None:
        raise RuntimeError(TAKEN)
    x = backbone.embed_tokens(input_ids[0])
    rotary = backbone.rotary_emb
    angles = position_ids[0, :, None, None].float() * rotary.inv_freq
    cos, sin = angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling
    cos, sin = torch.cat((cos, cos), -1).to(x.dtype), torch.cat((-sin, sin), -1).to(x.dtype)
    last = len(backbone.layers) - 1
    for i, layer in enumerate(backbone.layers):
        x = layer(x, cos, sin, mavis_step, mavis_store[i], mavis_step.stores_only and i == last)
    return (backbone.norm(x)[None],)


def fuse(backbone: Any, adapters: int = 1) -> bool:
    """Replace a backbone's layers by fused ones, if it is of a plain kind.

    That both give the same for a short prefix is tried first: another version of transformers may
    have changed a layer.

    Args:
        backbone: A decoder whose attention is `paged_attention`. It then only runs in an engine.
        adapters: Number of adapters in it, each with an equal share of the rows.

    Returns:
        Whether the layers were replaced.
    """
    config = backbone.config
    if config.model_type not in PLAIN:
        return False
    if config.rope_parameters["rope_type"] in ("dynamic", "longrope"):
        return False  # they rotate by the longest sequence of a batch
    if isinstance(backbone.layers[0], FusedLayer):  # by an engine before this one
        return True
    expected = _try(backbone, adapters)
    layers, norm = backbone.layers, backbone.norm
    backbone.layers = nn.ModuleList(FusedLayer(layer, config) for layer in layers)
    backbone.norm = RMSNorm(norm)
    backbone.forward = partial(run, backbone)
    found = _try(backbone, adapters)
    tolerance = torch.finfo(backbone.embed_tokens.weight.dtype).eps ** 0.5
    if (found - expected).norm() <= tolerance * expected.norm():
        return True
    logger.warning(
        f"fused layers of {config.model_type!r} differ from transformers' own, which are used "
        "instead and are slower"
    )
    backbone.layers, backbone.norm = layers, norm
    del backbone.forward
    return False


@torch.inference_mode()
def _try(backbone: Any, adapters: int) -> torch.Tensor:
    """Hidden states of a prefix of four tokens, under each adapter."""
    config, weight = backbone.config, backbone.embed_tokens.weight
    index = torch.arange(4, device=weight.device)
    step = Step(
        written=4,
        write=BLOCK_SIZE + index,
        read=index[None, 1:2],
        positions=index[None],
        lengths=index[:1] + 4,
        fresh=True,
    ).repeated(adapters, 2)
    shape = (2, 2 * adapters, kv_heads(config), BLOCK_SIZE, head_dim(config))
    output = backbone(
        input_ids=index.repeat(adapters)[None],
        position_ids=step.positions.view(1, -1),
        use_cache=False,
        mavis_step=step,
        mavis_store=[weight.new_zeros(shape) for _ in backbone.layers],
    )
    return output[0].float()
