"""Attention over a paged store of prefixes, with candidates that see a prefix and themselves.

Tensors are token-major: `[total, heads, dim]` for all tokens of a pass, one sequence behind the
other. The store of a layer is `[2, blocks, kv_heads, BLOCK_SIZE, dim]`, keys then values, so that
whole blocks are copied and arrive in the order in which matrix products read them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

BLOCK_SIZE = 32
ATTENTION = "mavis_paged"
# Float32 scores held at once: to bound their memory, and on a CPU to stay in its cache.
MAX_SCORES, MAX_SCORES_CPU = 1 << 27, 1 << 18

TAKEN = "this value model belongs to a ValueEngine; load another copy for plain forward passes"

Store = list[torch.Tensor]  # a layer: [2, blocks, kv_heads, BLOCK_SIZE, dim]


@dataclass(frozen=True)
class Step:
    """What attention needs to know of one forward pass over `queries` tokens of each sequence.

    Of every sequence's `queries` tokens the first `written` belong to the prefix and enter the
    store; the others are candidates, each of which sees the prefix and itself. If some sequences
    have fewer tokens than others, the pass runs over the `total` real ones, and only attention
    over the padded rectangle.
    """

    written: int
    write: torch.Tensor  # [batch * written] int64, where the new prefix tokens go in the store
    read: torch.Tensor  # [batch, blocks] int64, the blocks that hold the prefixes
    positions: torch.Tensor  # [batch, queries] int64
    lengths: torch.Tensor  # [batch] int64, prefix tokens in the store once `write` is done
    fresh: bool = False  # whether these are the first tokens of every sequence
    # If packed: which cells of the rectangle hold a token [total], and the token in each cell
    # [batch * queries], both int64.
    packing: tuple[torch.Tensor, torch.Tensor] | None = None
    # What layers share, made when the first one asks for it.
    made: dict[Any, Any] = field(default_factory=dict)

    def repeated(self, copies: int, blocks: int) -> Step:
        """The same pass for each of several adapters, one behind the other, with own blocks."""
        if copies == 1:
            return self
        if ("copies", copies) not in self.made:

            def behind(index: torch.Tensor, size: int) -> torch.Tensor:
                offsets = torch.arange(copies, device=index.device) * size
                return (index + offsets.view(-1, *[1] * index.ndim)).flatten(0, 1)

            packing = self.packing
            if packing is not None:
                real, padded = packing
                packing = behind(real, len(padded)), behind(padded, len(real))
            self.made["copies", copies] = Step(
                written=self.written,
                write=behind(self.write, blocks * BLOCK_SIZE),
                read=behind(self.read, blocks),
                positions=self.positions.repeat(copies, 1),
                lengths=self.lengths.repeat(copies),
                fresh=self.fresh,
                packing=packing,
            )
        return self.made["copies", copies]

    def write_rows(self, store: torch.Tensor) -> torch.Tensor:
        """Where a layer's new keys and values go, `[batch * written * 2 * kv_heads]`: rows of one
        token and head of the store, in the order of the new tokens."""
        _, blocks, heads, _, _ = store.shape
        if ("write rows", blocks, heads) not in self.made:
            first = _rows_of_a_block(blocks, heads, self.write.device)
            # A block is `heads` times as many rows as it has tokens.
            write = self.write + self.write // BLOCK_SIZE * ((heads - 1) * BLOCK_SIZE)
            write = write[:, None] + first.flatten() * BLOCK_SIZE
            self.made["write rows", blocks, heads] = write.flatten()
        return self.made["write rows", blocks, heads]

    def read_rows(self, store: torch.Tensor) -> torch.Tensor:
        """Where a layer's keys and values are, `[2 * batch * kv_heads * blocks]`: rows of one block
        and head of the store."""
        _, blocks, heads, _, _ = store.shape
        if ("read rows", blocks, heads) not in self.made:
            first = _rows_of_a_block(blocks, heads, self.read.device)
            read = (self.read * heads)[:, None] + first[:, None, :, None]
            self.made["read rows", blocks, heads] = read.flatten()
        return self.made["read rows", blocks, heads]

    def visible(self, window: int | None) -> torch.Tensor:
        """Whether a query sees a stored key, `[batch, 1, queries or 1, blocks * BLOCK_SIZE]`."""
        if ("visible", window) not in self.made:
            keys = torch.arange(self.read.shape[1] * BLOCK_SIZE, device=self.read.device)
            if self.written == 1 and window is None:
                visible = keys < self.lengths[:, None, None]
            else:
                last = torch.minimum(self.positions + 1, self.lengths[:, None])
                visible = keys < last[..., None]
                if window is not None:
                    visible &= keys > self.positions[..., None] - window
            self.made["visible", window] = visible[:, None]
        return self.made["visible", window]

    def mask(self, window: int | None) -> torch.Tensor:
        """`visible` to be added to scores, `[batch, 1, queries or 1, 1, length]` float32."""
        if ("mask", window) not in self.made:
            visible = self.visible(window)[:, :, :, None]
            mask = torch.zeros(visible.shape, device=visible.device)
            self.made["mask", window] = mask.masked_fill_(~visible, -torch.inf)
        return self.made["mask", window]


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_heads(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


@lru_cache
def _rows_of_a_block(blocks: int, heads: int, device: torch.device) -> torch.Tensor:
    """Rows of block 0, `[2, heads]`: of its keys and its values."""
    heads_of_parts = torch.arange(2 * heads, device=device).view(2, heads)
    return heads_of_parts + torch.arange(2, device=device)[:, None] * (blocks - 1) * heads


def _write(kv: torch.Tensor, step: Step, store: torch.Tensor) -> None:
    """Store the new prefix tokens of `kv` `[batch * queries, 2 * kv_heads, dim]`."""
    batch, queries = step.positions.shape
    new = kv.view(batch, queries, *kv.shape[1:])[:, : step.written]
    store.view(-1, kv.shape[2]).index_copy_(0, step.write_rows(store), new.reshape(-1, kv.shape[2]))


def attend(
    q: torch.Tensor,
    kv: torch.Tensor,
    step: Step,
    store: torch.Tensor,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Store the new prefix tokens, then attend to the prefixes.

    Args:
        q: `[total, heads, dim]`.
        kv: `[total, 2 * kv_heads, dim]`, keys then values.
        step: The pass.
        store: Of the layer.
        scaling: Factor of the scores.
        window: Number of positions that a token sees, itself included; None for all.
        softcap: Bound of the scores, by a hyperbolic tangent.

    Returns:
        `[total, heads * dim]`.
    """
    batch, queries = step.positions.shape
    if step.packing is not None:
        q, kv = q.index_select(0, step.packing[1]), kv.index_select(0, step.packing[1])
    _write(kv, step, store)
    heads, dim = q.shape[1:]
    kv_heads = store.shape[2]
    q = q.view(batch, queries, heads, dim)
    kv = kv.view(batch, queries, 2 * kv_heads, dim)
    if step.written > 1 and softcap is None:
        out = _attend_prefix(q, kv, step, store, scaling, window)
    else:
        k, v = _read(step, store)
        mask = step.mask(window)
        limit = MAX_SCORES_CPU if q.device.type == "cpu" else MAX_SCORES
        piece = max(1, limit // (heads * queries * k.shape[2]))
        last = partial(_attend_last, scaling=scaling, softcap=softcap, written=step.written)
        if batch <= piece:
            out = last(q, kv, k, v, mask)
        else:
            pieces = zip(*(t.split(piece) for t in (q, kv, k, v, mask)))
            out = torch.cat([last(*tensors) for tensors in pieces])
    out = out.reshape(batch * queries, heads * dim)
    return out if step.packing is None else out.index_select(0, step.packing[0])


def _read(step: Step, store: torch.Tensor) -> torch.Tensor:
    """Keys and values of the prefixes, `[2, batch, kv_heads, length, dim]`."""
    _, _, heads, size, dim = store.shape
    rows = store.view(-1, size * dim).index_select(0, step.read_rows(store))
    return rows.view(2, len(step.read), heads, -1, dim)


def _attend_prefix(
    q: torch.Tensor,  # [batch, queries, heads, dim]
    kv: torch.Tensor,  # [batch, queries, 2 * kv_heads, dim]
    step: Step,
    store: torch.Tensor,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """Many tokens of each prefix, `[batch, queries, heads, dim]`."""
    queries, heads = q.shape[1:3]
    alone = step.fresh and (window is None or queries <= window)
    if alone:
        k, v = kv.transpose(1, 2).chunk(2, dim=1)
    else:
        k, v = _read(step, store)
    out = nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        k,
        v,
        attn_mask=None if alone else step.visible(window),
        is_causal=alone,
        scale=scaling,
        enable_gqa=heads > store.shape[2],
    )
    return out.transpose(1, 2)


def _attend_last(
    q: torch.Tensor,  # [batch, queries, heads, dim]
    kv: torch.Tensor,  # [batch, queries, 2 * kv_heads, dim]
    k: torch.Tensor,  # [batch, kv_heads, length, dim], as is v
    v: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    softcap: float | None,
    written: int,
) -> torch.Tensor:
    """Few tokens of each prefix, and candidates, `[batch, queries, kv_heads, groups, dim]`.

    A candidate's own key is one more column of the scores. On a CPU two matrix products are faster
    than the fused kernels, which make many small ones.
    """
    batch, kv_heads, length, dim = k.shape
    queries = q.shape[1]
    q = q.view(batch, queries, kv_heads, -1, dim)
    groups = q.shape[3]

    # Query heads that share a key head become further queries of it: nothing is repeated.
    folded = q.transpose(1, 2).reshape(batch * kv_heads, queries * groups, dim)
    score = torch.bmm(folded, k.flatten(0, 1).transpose(1, 2))
    score = score.view(batch, kv_heads, queries, groups, length)
    own = queries > written
    scores = torch.empty(*score.shape[:4], length + own, dtype=torch.float32, device=q.device)
    if softcap is None:
        torch.add(mask, score, alpha=scaling, out=scores[..., :length])
    else:
        torch.add(mask, _capped(score.float() * scaling, softcap), out=scores[..., :length])
    if own:
        own_k, own_v = kv.view(batch, queries, 2, kv_heads, 1, dim).unbind(2)
        score = (q * own_k).sum(-1, dtype=torch.float32) * scaling
        if softcap is not None:
            score = _capped(score, softcap)
        score[:, :written] = -torch.inf  # the prefix's own tokens are in the store
        scores[..., length] = score.transpose(1, 2)
    share = torch.softmax(scores, dim=-1)
    folded = share[..., :length].to(v.dtype).reshape(batch * kv_heads, queries * groups, length)
    out = torch.bmm(folded, v.flatten(0, 1)).view(batch, kv_heads, queries, groups, dim)
    out = out.transpose(1, 2)
    if own:
        out = torch.addcmul(out, share[..., length:].transpose(1, 2).to(v.dtype), own_v)
    return out


def _capped(score: torch.Tensor, softcap: float) -> torch.Tensor:
    return softcap * torch.tanh(score / softcap)


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,  # [1, heads, total, dim]
    key: torch.Tensor,  # [1, kv_heads, total, dim]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    mavis_step: Step | None = None,
    mavis_store: Store | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`attend`, as transformers calls attention; returns `[1, total, heads, dim]`."""
    if mavis_step is None or mavis_store is None:
        raise RuntimeError(TAKEN)
    assert s_aux is None  # attention sinks are refused by the engine
    kv = torch.cat((key, value), dim=1)[0].transpose(0, 1)
    store = mavis_store[module.layer_idx]  # type: ignore[index]
    q = query[0].transpose(0, 1)
    out = attend(q, kv, mavis_step, store, scaling, sliding_window, softcap)
    return out.view(1, *q.shape), None


AttentionInterface.register(ATTENTION, paged_attention)
