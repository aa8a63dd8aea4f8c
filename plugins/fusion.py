"""Decoder layers of value models in few operations.

A step of few tokens through transformers' layers is mostly the dispatch of small operations. The
layers of the plainest decoders (Llama and its like) are replaced by layers of the same function:
projections of one input are one matrix, and a pass is one loop. All others keep their own.
"""

from __future__ import annotations

import sys
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
# Tokens of a pass that the MLP takes at once on a CPU: what it makes of them stays in the cache,
# and is small enough that its memory is not given back to the system each time.
MLP_ROWS_CPU = 256
TRIED = 4  # tokens of the prefix that layers are tried on


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

    def __init__(self, norm: Any, kernels: Any = None) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon
        self.kernels = kernels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kernels is None:
            return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        out = torch.empty_like(x)
        self.kernels.rms_norm(out, x, self.weight, self.eps)
        return out

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of `x + residual`, and that sum; may overwrite both."""
        if self.kernels is None:
            residual = residual + x
            return self(residual), residual
        self.kernels.fused_add_rms_norm(x, residual, self.weight, self.eps)
        return x, residual


class Rotary(nn.Module):
    """Rotary embedding from a table of the angles at every position.

    Args:
        own: transformers' module of it.
        length: Number of positions.
        dtype: Of what is rotated.
        kernels: `vllm_kernels()` or None.
    """

    def __init__(self, own: Any, length: int, dtype: torch.dtype, kernels: Any = None) -> None:
        super().__init__()
        self.own, self.kernels = own, kernels
        positions = torch.arange(length, device=own.inv_freq.device)
        angles = positions[:, None].float() * own.inv_freq
        cos, sin = angles.cos() * own.attention_scaling, angles.sin() * own.attention_scaling
        # vLLM's holds half of it; one product with the second half of ours does both signs.
        parts = (cos, sin) if kernels is not None else (cos, cos, -sin, sin)
        self.table: torch.Tensor  # [length, dim or 2 * dim]
        self.register_buffer("table", torch.cat(parts, dim=-1).to(dtype), persistent=False)

    def at(self, positions: torch.Tensor) -> torch.Tensor:
        """What `rotate` needs for tokens at `positions` `[total]` int64."""
        return positions if self.kernels is not None else self.table[positions][:, None]

    def rotate(self, x: torch.Tensor, heads: int, at: torch.Tensor) -> None:
        """Rotate `x` `[total, heads + kv_heads, dim]`, queries and keys, in place."""
        dim = x.shape[-1]
        if self.kernels is not None:
            q, k = x[:, :heads].flatten(1), x[:, heads:].flatten(1)
            self.kernels.rotary_embedding(at, q, k, dim, self.table, True)
        else:
            cos, sin = at.chunk(2, dim=-1)
            torch.addcmul(x * cos, x.roll(dim // 2, -1), sin, out=x)


class FusedLayer(nn.Module):
    """A decoder layer of a plain kind, `[total, hidden]` to the same.

    What it adds to its input is returned beside the input, for the next norm to add in one call.
    """

    def __init__(self, layer: Any, config: Any, kernels: Any = None) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.dim, self.scaling = attention.head_dim, attention.scaling
        self.window = getattr(attention, "sliding_window", None)
        if config.model_type == "mistral":
            self.window = config.sliding_window
        self.heads, self.kv_heads = config.num_attention_heads, kv_heads(config)
        self.norm = RMSNorm(layer.input_layernorm, kernels)
        self.qkv = join((attention.q_proj, attention.k_proj, attention.v_proj))
        self.head_norms = nn.ModuleList(
            RMSNorm(getattr(attention, name))
            for name in ("q_norm", "k_norm")
            if hasattr(attention, name)
        )
        self.o = attention.o_proj
        self.mlp_norm = RMSNorm(layer.post_attention_layernorm, kernels)
        self.gate_up = join((mlp.gate_proj, mlp.up_proj))
        self.act, self.down = mlp.act_fn, mlp.down_proj
        # Adapters each take a share of the rows, so theirs stay together.
        self.splits = type(self.gate_up) is type(self.down) is nn.Linear

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,  # what is still to be added to x, if anything
        rotary: Rotary,
        at: torch.Tensor,
        step: Step,
        store: torch.Tensor,
        stores_only: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, residual = (self.norm(x), x) if residual is None else self.norm.add(x, residual)
        qkv = self.qkv(x).view(len(x), -1, self.dim)
        q, kv = qkv[:, : self.heads], qkv[:, self.heads :]
        for norm, part in zip(self.head_norms, (q, kv[:, : self.kv_heads])):
            part.copy_(norm(part))
        rotary.rotate(qkv[:, : self.heads + self.kv_heads], self.heads, at)
        if stores_only:
            write(kv, step, store)
            return x, residual
        x = self.o(attend(q, kv, step, store, self.scaling, self.window))
        x, residual = self.mlp_norm.add(x, residual)
        if self.splits and x.device.type == "cpu" and len(x) > MLP_ROWS_CPU:
            return torch.cat([self.mlp(rows) for rows in x.split(MLP_ROWS_CPU)]), residual
        return self.mlp(x), residual

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.act(gate).mul_(up))


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
    x, residual = backbone.embed_tokens(input_ids[0]), None
    rotary = backbone.rotary_emb
    at = rotary.at(position_ids[0])
    last = len(backbone.layers) - 1
    for i, layer in enumerate(backbone.layers):
        stores_only = mavis_step.stores_only and i == last
        x, residual = layer(x, residual, rotary, at, mavis_step, mavis_store[i], stores_only)
    return (backbone.norm.add(x, residual)[0][None],)


def vllm_kernels() -> Any:
    """vLLM's own kernels in a process that has loaded them, as one that serves has; else None.

    On a CPU its norms are three times as fast as PyTorch's operators, its rotation ten times.
    """
    return sys.modules.get("vllm._custom_ops")


def fuse(backbone: Any, length: int, adapters: int = 1) -> int:
    """Replace a backbone's layers by fused ones, if it is of a plain kind.

    That both give the same for a short prefix is tried first: another version of transformers may
    have changed a layer, another one of vLLM a kernel.

    Args:
        backbone: A decoder whose attention is `paged_attention`. It then only runs in an engine.
        length: Number of positions that it will be asked for.
        adapters: Number of adapters in it, each with an equal share of the rows.

    Returns:
        What its layers now run by: 0 for transformers' own, 1 for PyTorch's operators, 2 for
        vLLM's kernels.
    """
    config = backbone.config
    if config.model_type not in PLAIN:
        return 0
    if config.rope_parameters["rope_type"] in ("dynamic", "longrope"):
        return 0  # they rotate by the longest sequence of a batch
    layers, norm, rotary = backbone.layers, backbone.norm, backbone.rotary_emb
    length, dtype = max(length, TRIED), backbone.embed_tokens.weight.dtype
    if isinstance(layers[0], FusedLayer):  # by an engine before this one
        backbone.rotary_emb = Rotary(rotary.own, length, dtype, rotary.kernels)
        return 1 if rotary.kernels is None else 2
    expected = _try(backbone, adapters)
    tolerance = torch.finfo(dtype).eps ** 0.5 * expected.norm()
    vllm = vllm_kernels()
    for kernels in (None,) if vllm is None else (vllm, None):
        backbone.layers = nn.ModuleList(FusedLayer(layer, config, kernels) for layer in layers)
        backbone.norm = RMSNorm(norm, kernels)
        backbone.rotary_emb = Rotary(rotary, length, dtype, kernels)
        backbone.forward = partial(run, backbone)
        try:
            if (_try(backbone, adapters) - expected).norm() <= tolerance:
                return 1 if kernels is None else 2
            reason = "the result differs"
        except (AttributeError, RuntimeError, TypeError) as error:
            if kernels is None:
                raise
            reason = str(error)
        logger.warning(
            f"value models of type {config.model_type!r} run slower here than they could: layers "
            f"fused of {'vLLM' if kernels else 'PyTorch'}'s operators do not fit transformers' "
            f"own ({reason}); install the versions that trimtab was tested with"
        )
    backbone.layers, backbone.norm, backbone.rotary_emb = layers, norm, rotary
    del backbone.forward
    return 0


@torch.inference_mode()
def _try(backbone: Any, adapters: int) -> torch.Tensor:
    """Hidden states of a short prefix, under each adapter."""
    config, weight = backbone.config, backbone.embed_tokens.weight
    index = torch.arange(TRIED, device=weight.device)
    step = Step(
        written=TRIED,
        write=BLOCK_SIZE + index,
        read=index[None, 1:2],
        positions=index[None],
        lengths=index[:1] + TRIED,
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
