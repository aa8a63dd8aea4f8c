"""`attend` for few tokens of each prefix as one Triton kernel, for GPUs.

Keys and values are read where they lie in the store: nothing is gathered, there are no masks, and
only the device needs to know the lengths, so that a pass fits a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .attention import BLOCK_SIZE, Step

MAX_ROWS = 64  # query rows of a program


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q,  # [batch * queries, heads, DIM], strides of a token and a head
    q_token,
    q_head,
    kv,  # [batch * queries, 2 * KV_HEADS, DIM], likewise
    kv_token,
    kv_head,
    store,  # [2, blocks, KV_HEADS, BLOCK_SIZE, DIM]
    values,  # where its second half begins
    read,  # [batch, width]
    width,
    positions,  # [batch, queries]
    lengths,  # [batch]
    out,  # [batch * queries, heads, DIM]
    queries,
    written,
    scaling,
    softcap,
    KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    WINDOW: tl.constexpr,  # 0 for none
    SOFTCAP: tl.constexpr,
    OWN: tl.constexpr,
):
    """`ROWS` query rows of one sequence and key head, in one walk over its blocks."""
    sequence = tl.program_id(0) // KV_HEADS
    head = tl.program_id(0) % KV_HEADS
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    real = row < queries * GROUPS
    query = row // GROUPS
    token = (sequence * queries + query).to(tl.int64)
    query_head = head * GROUPS + row % GROUPS
    dim = tl.arange(0, PADDED_DIM)
    inside = real[:, None] & (dim < DIM)[None, :]

    q_row = token * q_token + query_head * q_head
    query_rows = tl.load(q + q_row[:, None] + dim[None, :], mask=inside, other=0.0)
    position = tl.load(positions + token, mask=real, other=0)
    length = tl.load(lengths + sequence)
    end = tl.minimum(position + 1, length)

    # The softmax so far: its maximum, its sum, and the values that it weighs.
    if OWN:
        own = real & (query >= written)
        own_row = token * kv_token + head * kv_head
        own_at = kv + own_row[:, None] + dim[None, :]
        own_mask = own[:, None] & (dim < DIM)[None, :]
        own_key = tl.load(own_at, mask=own_mask, other=0.0).to(tl.float32)
        of_own = tl.sum(query_rows.to(tl.float32) * own_key, axis=1) * scaling
        if SOFTCAP:
            of_own = softcap * (2 * tl.sigmoid(2 * of_own / softcap) - 1)
        top = tl.where(own, of_own, -float("inf"))
        total = tl.where(own, 1.0, 0.0)
        own_value = own_at + KV_HEADS * kv_head
        weighed = tl.load(own_value, mask=own_mask, other=0.0).to(tl.float32)
    else:
        top = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        weighed = tl.zeros([ROWS, PADDED_DIM], tl.float32)

    first = 0
    if WINDOW > 0:
        earliest = tl.min(tl.where(real, position, length))
        first = tl.maximum(earliest - WINDOW + 1, 0) // BLOCK_SIZE
    offset = tl.arange(0, BLOCK_SIZE)
    for number in range(first, (length + BLOCK_SIZE - 1) // BLOCK_SIZE):
        block = tl.load(read + sequence * width + number).to(tl.int64)
        start = (block * KV_HEADS + head) * BLOCK_SIZE * DIM
        at = store + start + offset[:, None] * DIM + dim[None, :]
        known = (dim < DIM)[None, :]
        keys = tl.load(at, mask=known, other=0.0)
        score = tl.dot(query_rows, tl.trans(keys), input_precision="ieee") * scaling
        if SOFTCAP:
            score = softcap * (2 * tl.sigmoid(2 * score / softcap) - 1)
        key = number * BLOCK_SIZE + offset
        visible = key[None, :] < end[:, None]
        if WINDOW > 0:
            visible = visible & (key[None, :] > position[:, None] - WINDOW)
        score = tl.where(visible, score, -float("inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        shift = tl.where(higher == -float("inf"), 0.0, higher)  # nothing seen yet
        decay = tl.exp(top - shift)
        share = tl.exp(score - shift[:, None])
        total = total * decay + tl.sum(share, axis=1)
        rows = tl.load(at + values, mask=known, other=0.0)
        weighed = weighed * decay[:, None]
        weighed += tl.dot(share.to(rows.dtype), rows, input_precision="ieee")
        top = higher
    result = weighed / tl.where(total > 0, total, 1.0)[:, None]
    result_row = (token * (KV_HEADS * GROUPS) + query_head) * DIM
    tl.store(out + result_row[:, None] + dim[None, :], result.to(out.dtype.element_ty), mask=inside)


def constants(
    heads: int, kv_heads: int, dim: int, queries: int, own: bool, window: int | None, softcap: bool
) -> dict[str, Any]:
    """What the kernel is compiled for."""
    rows = queries * (heads // kv_heads)
    return {
        "KV_HEADS": kv_heads,
        "GROUPS": heads // kv_heads,
        "DIM": dim,
        "PADDED_DIM": max(16, triton.next_power_of_2(dim)),  # a matrix product's least
        "BLOCK_SIZE": BLOCK_SIZE,
        "ROWS": min(MAX_ROWS, max(16, triton.next_power_of_2(rows))),
        "WINDOW": window or 0,
        "SOFTCAP": softcap,
        "OWN": own,
    }


def attend_last(
    q: torch.Tensor,
    kv: torch.Tensor,
    step: Step,
    store: torch.Tensor,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """`attention.attend` for a pass that is not packed, once its new prefix tokens are stored.

    `q` `[batch * queries, heads, dim]` and `kv` `[batch * queries, 2 * kv_heads, dim]` may have any
    strides but the last; the step's tensors and the store are contiguous. Returns
    `[batch * queries, heads * dim]`.
    """
    batch, queries = step.positions.shape
    heads, dim = q.shape[1:]
    kv_heads = store.shape[2]
    own = queries > step.written
    fixed = constants(heads, kv_heads, dim, queries, own, window, softcap is not None)
    out = torch.empty(batch * queries, heads * dim, dtype=q.dtype, device=q.device)
    tiles = triton.cdiv(queries * fixed["GROUPS"], fixed["ROWS"])
    _attend[batch * kv_heads, tiles](
        q, q.stride(0), q.stride(1), kv, kv.stride(0), kv.stride(1), store, store.stride(0),
        step.read, step.read.shape[1], step.positions, step.lengths, out, queries, step.written,
        scaling, softcap or 0.0, **fixed,
    )  # fmt: skip
    return out
