"""The value engine: values of the `k` candidate next tokens of many sequences, incrementally.

Keys and values of every prefix stay in a paged store of fixed size, so a step costs one new token
plus `k` candidates a sequence, in one forward pass for all sequences whatever their lengths. The
store is only a cache: whatever was evicted is computed again from the token ids that the caller
gives. The engine knows nothing of requests, weights or host engines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface

from .value_model import MAVISValueModel

BLOCK_SIZE = 32
ATTENTION = "mavis_paged"
GIB = 1 << 30

# history(slot, start, stop): the token ids at those positions of the slot's prefix.
History = Callable[[int, int, int], "Sequence[int] | torch.Tensor"]


@dataclass(frozen=True)
class Step:
    """What attention needs to know of one forward pass over `batch * queries` tokens.

    Of every sequence's `queries` tokens the first `written` belong to the prefix and enter the
    store; the others are candidates, each of which sees the prefix and itself.
    """

    stores: list[tuple[torch.Tensor, torch.Tensor]]  # a layer: keys, values [tokens, kv_heads, dim]
    written: int
    write: torch.Tensor  # [batch * written] int64, where the new prefix tokens go in the store
    read: torch.Tensor  # [batch, length] int64, where the prefixes are in the store
    positions: torch.Tensor  # [batch, queries] int64
    lengths: torch.Tensor  # [batch] int64, prefix tokens in the store once `write` is done
    ragged: bool  # whether some prefix is shorter than `length`
    masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)  # by window

    def mask(self, window: int | None, groups: int, dtype: torch.dtype) -> torch.Tensor | None:
        """The layers' additive mask, made once for each window of attention.

        Returns:
            `[batch, 1, groups * queries or 1, length]`, or None if every key is visible.
        """
        if window not in self.masks:
            visible = self._visible(window)
            if visible is not None and visible.shape[2] > 1:
                visible = visible.repeat(1, 1, groups, 1)
            self.masks[window] = (
                None
                if visible is None
                else torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)
            )
        return self.masks[window]

    def _visible(self, window: int | None) -> torch.Tensor | None:
        """Whether a query sees a stored key, `[batch, 1, queries or 1, length]`."""
        keys = torch.arange(self.read.shape[1], device=self.read.device)
        if self.written == 1 and window is None:
            if not self.ragged:
                return None
            return (keys < self.lengths[:, None])[:, None, None]
        last = torch.minimum(self.positions + 1, self.lengths[:, None])
        visible = keys < last[..., None]
        if window is not None:
            visible &= keys > self.positions[..., None] - window
        return visible[:, None]


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,  # [1, heads, batch * queries, dim]
    key: torch.Tensor,  # [1, kv_heads, batch * queries, dim]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    mavis_step: Step | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over stored prefixes with `queries` tokens a sequence, as transformers calls it.

    Candidates do not see each other: attention over the prefix gives an output and its
    log-sum-exp, and the candidate's own key and value are merged in analytically.
    """
    if mavis_step is None:
        raise RuntimeError(
            "this value model belongs to a ValueEngine; load another copy for plain forward passes"
        )
    assert s_aux is None  # attention sinks are refused by the engine
    step = mavis_step
    batch, queries = step.positions.shape
    kv_heads, dim = key.shape[1], key.shape[3]
    groups = query.shape[1] // kv_heads
    keys, values = step.stores[module.layer_idx]  # type: ignore[index]

    # Query heads that share a key head become further queries of it: nothing is repeated.
    q = query.view(kv_heads, groups, batch, queries, dim).permute(2, 0, 1, 3, 4)
    k_new = key.view(kv_heads, batch, queries, dim).transpose(0, 1)  # [batch, kv_heads, queries, d]
    v_new = value.view(kv_heads, batch, queries, dim).transpose(0, 1)
    new = slice(0, step.written)
    keys.index_copy_(0, step.write, k_new[:, :, new].transpose(1, 2).reshape(-1, kv_heads, dim))
    values.index_copy_(0, step.write, v_new[:, :, new].transpose(1, 2).reshape(-1, kv_heads, dim))

    k = keys[step.read].transpose(1, 2)  # [batch, kv_heads, length, dim]
    v = values[step.read].transpose(1, 2)
    mask = step.mask(sliding_window, groups, q.dtype)
    folded = q.reshape(batch, kv_heads, groups * queries, dim)
    out, lse = _attend(folded, k, v, mask, scaling, softcap)
    out = out.view(batch, kv_heads, groups, queries, dim)

    if queries > step.written:
        candidates = slice(step.written, queries)
        score = (q[:, :, :, candidates] * k_new[:, :, None, candidates]).sum(-1).float() * scaling
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        prefix = lse.view(batch, kv_heads, groups, queries)[..., candidates]
        share = torch.sigmoid(score - prefix).to(out.dtype)[..., None]
        merged = torch.lerp(out[:, :, :, candidates], v_new[:, :, None, candidates], share)
        out = torch.cat((out[:, :, :, : step.written], merged), dim=3)
    # [1, batch * queries, heads, dim]
    return out.permute(0, 3, 1, 2, 4).reshape(1, batch * queries, kv_heads * groups, dim), None


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention `[batch, kv_heads, queries, dim]` and its float32 log-sum-exp (without `dim`)."""
    if q.device.type == "cpu" and softcap is None and q.dtype != torch.float16:
        # The CPU flash kernel is the one public form that also returns the log-sum-exp.
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=mask, scale=scaling
        )
    score = torch.matmul(q, k.transpose(2, 3)).float() * scaling
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    if mask is not None:
        score = score + mask.float()
    lse = torch.logsumexp(score, dim=-1)
    return torch.matmul((score - lse[..., None]).exp().to(v.dtype), v), lse


AttentionInterface.register(ATTENTION, paged_attention)


class ValueEngine:
    """Values `[batch, k, objectives]` of candidates, with a bounded cache of the prefixes.

    A sequence lives in a *slot*, an index that the caller chooses. The caller says what the prefix
    is at every call; `truncate` or `release` a slot when its earlier tokens change.

    Args:
        models: Value models; their objectives are concatenated. The engine takes them over.
        num_slots: Number of sequences that may be known at once.
        max_length: Longest prefix, in tokens.
        device: Where to compute.
        dtype: float32, bfloat16 or float16, of weights and store. Values are always float32.
        kv_cache_memory: Upper bound of the store, in bytes; by default, room for every slot at full
            length. Whatever does not fit is evicted, least recently used first, and recomputed.
        prefill_tokens: Upper bound of the tokens in one pass over new prefixes.

    Raises:
        ValueError: A backbone cannot be cached, is too short for `max_length`, or the store cannot
            hold one sequence of `max_length`.
    """

    def __init__(
        self,
        models: Sequence[MAVISValueModel],
        *,
        num_slots: int,
        max_length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        kv_cache_memory: int | None = None,
        prefill_tokens: int = 1024,
    ) -> None:
        self.objectives = tuple(name for model in models for name in model.config.objectives or ())
        self.device = torch.device(device)
        self.max_length = max_length
        self.prefill_tokens = prefill_tokens
        self.models = list(models)
        bytes_per_token = 0
        for model in self.models:
            config = _cacheable(model, max_length)
            nn.Module.to(model.eval(), device=self.device, dtype=dtype)
            model.backbone.set_attn_implementation(ATTENTION)
            bytes_per_token += config.num_hidden_layers * 2 * _kv_width(config) * dtype.itemsize

        blocks_each = -(-max_length // BLOCK_SIZE)
        num_blocks = num_slots * blocks_each
        if kv_cache_memory is not None:
            # One block more, the first, takes the writes of padding.
            num_blocks = min(num_blocks, kv_cache_memory // (BLOCK_SIZE * bytes_per_token) - 1)
        if num_blocks < blocks_each:
            needed = (blocks_each + 1) * BLOCK_SIZE * bytes_per_token
            raise ValueError(
                f"the value models' key-value store of {(kv_cache_memory or 0) / GIB:.3g} GiB "
                f"(kv_cache_memory_gib) cannot hold one sequence of {max_length} tokens; it needs "
                f"at least {needed / GIB:.3g} GiB"
            )
        tokens = (num_blocks + 1) * BLOCK_SIZE
        self.kv_cache_bytes = tokens * bytes_per_token
        self.weight_bytes = sum(p.nbytes for model in self.models for p in model.parameters())
        self._stores = []
        for model in self.models:
            config = model.config.text_config
            shape = (tokens, _kv_heads(config), _head_dim(config))
            self._stores.append(
                [
                    (
                        torch.zeros(shape, dtype=dtype, device=self.device),
                        torch.zeros(shape, dtype=dtype, device=self.device),
                    )
                    for _ in range(config.num_hidden_layers)
                ]
            )
        self._free = list(range(num_blocks, 0, -1))
        self._num_blocks = num_blocks
        # A slot's blocks, in order, and the number of them.
        self._table = np.zeros((num_slots, blocks_each), dtype=np.int64)
        self._held = np.zeros(num_slots, dtype=np.int64)
        self._cached = np.zeros(num_slots, dtype=np.int64)  # prefix tokens whose keys are stored
        self._used = np.zeros(num_slots, dtype=np.int64)  # last step that needed the slot
        self._clock = 0

    def truncate(self, slot: int, length: int) -> None:
        """Forget what is stored of `slot` from position `length` on."""
        keep = min(-(-length // BLOCK_SIZE), self._held[slot])
        self._free.extend(self._table[slot, keep : self._held[slot]].tolist())
        self._held[slot] = keep
        self._cached[slot] = min(self._cached[slot], length)

    def release(self, slot: int) -> None:
        """Forget `slot` and give its memory back."""
        self.truncate(slot, 0)

    @torch.inference_mode()
    def values(
        self,
        slots: np.ndarray,
        lengths: np.ndarray,
        last_tokens: torch.Tensor,
        candidates: torch.Tensor,
        history: History,
    ) -> torch.Tensor:
        """Value of every candidate as the next token of its prefix.

        Args:
            slots: `[batch]` int64, distinct.
            lengths: `[batch]` int64, length of each prefix, 1 to `max_length`.
            last_tokens: `[batch]` integer, last token of each prefix, on the engine's device.
            candidates: `[batch, k]` int64 token ids, on the engine's device.
            history: Asked for the earlier tokens that are not stored.

        Returns:
            `[batch, k, objectives]` float32.

        Raises:
            ValueError: A length is out of range.
        """
        if lengths.size and not 1 <= lengths.min() <= lengths.max() <= self.max_length:
            raise ValueError(
                f"prefix lengths must be 1 to {self.max_length}, got {lengths.tolist()}"
            )
        blocks = -(-lengths // BLOCK_SIZE)
        if (
            blocks.sum() > self._num_blocks
        ):  # prefixes that do not fit together go one after another
            cut = len(slots) // 2
            halves = (
                self.values(slots[h], lengths[h], last_tokens[h], candidates[h], history)
                for h in (slice(cut), slice(cut, None))
            )
            return torch.cat(tuple(halves))
        self._clock += 1
        self._used[slots] = self._clock
        self._allocate(slots, blocks)
        pending = np.flatnonzero(self._cached[slots] < lengths - 1)
        if pending.size:
            self._prefill(slots[pending], lengths[pending] - 1, history)
        tokens = torch.cat((last_tokens[:, None].to(candidates.dtype), candidates), dim=1)
        positions = np.repeat(lengths[:, None], tokens.shape[1], axis=1)
        positions[:, 0] -= 1
        write = self._places(slots, positions[:, :1])
        hidden = self._forward(tokens, positions, slots, lengths, write)
        self._cached[slots] = lengths
        return torch.cat([m.read_head(h[:, 1:]) for m, h in zip(self.models, hidden)], dim=-1)

    def _allocate(self, slots: np.ndarray, blocks: np.ndarray) -> None:
        """Give every slot its number of blocks, evicting slots of earlier steps, oldest first."""
        short = np.flatnonzero(blocks > self._held[slots])  # one step in BLOCK_SIZE, per sequence
        missing = int((blocks - self._held[slots])[short].sum())
        if missing > len(self._free):
            idle = np.flatnonzero((self._held > 0) & (self._used < self._clock))
            for slot in idle[np.argsort(self._used[idle])]:
                self.release(slot)
                if missing <= len(self._free):
                    break
        for i in short:
            slot, held, total = slots[i], self._held[slots[i]], blocks[i]
            self._table[slot, held:total] = [self._free.pop() for _ in range(total - held)]
            self._held[slot] = total

    def _prefill(self, slots: np.ndarray, lengths: np.ndarray, history: History) -> None:
        """Store the prefixes up to `lengths`, in passes of at most `prefill_tokens` tokens."""
        while slots.size:
            start = self._cached[slots]
            count = np.minimum(lengths - start, self.prefill_tokens)
            order = np.argsort(-count)
            batch = order[: max(1, self.prefill_tokens // count[order[0]])]
            first, n, rows = start[batch], count[batch], slots[batch]
            width = int(n.max())
            tokens = torch.zeros((len(batch), width), dtype=torch.int64)
            for i, (slot, a, m) in enumerate(zip(rows, first, n)):
                tokens[i, :m] = torch.as_tensor(history(int(slot), int(a), int(a + m)))
            offsets = np.arange(width)
            padding = offsets >= n[:, None]
            positions = np.where(padding, 0, first[:, None] + offsets)
            write = np.where(padding, 0, self._places(rows, positions))
            self._forward(tokens.to(self.device), positions, rows, first + n, write)
            self._cached[rows] = first + n
            left = self._cached[slots] < lengths
            slots, lengths = slots[left], lengths[left]

    def _places(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Where positions `[batch, n]` of the slots lie in the store, `[batch, n]` int64."""
        blocks = np.take_along_axis(self._table[slots], positions // BLOCK_SIZE, axis=1)
        return blocks * BLOCK_SIZE + positions % BLOCK_SIZE

    def _forward(
        self,
        tokens: torch.Tensor,
        positions: np.ndarray,
        slots: np.ndarray,
        lengths: np.ndarray,
        write: np.ndarray,
    ) -> list[torch.Tensor]:
        """Every model's last hidden states `[batch, queries, hidden]` of `tokens`."""
        batch, queries = tokens.shape
        longest = int(lengths.max())
        steps = np.broadcast_to(np.arange(longest), (batch, longest))
        read = self._places(slots, np.minimum(steps, lengths[:, None] - 1))
        ragged = bool((lengths < longest).any())
        placed = [self._to_device(a) for a in (write.reshape(-1), read, positions, lengths)]
        outputs = []
        for model, stores in zip(self.models, self._stores):
            step = Step(
                stores=stores,
                written=write.shape[1],
                write=placed[0],
                read=placed[1],
                positions=placed[2],
                lengths=placed[3],
                ragged=ragged,
            )
            hidden = model.backbone(
                input_ids=tokens.reshape(1, -1),
                position_ids=step.positions.reshape(1, -1),
                use_cache=False,
                mavis_step=step,
            ).last_hidden_state
            outputs.append(hidden.view(batch, queries, -1))
        return outputs

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()  # so that the copy does not wait for the device
        return tensor.to(self.device, non_blocking=True)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _kv_heads(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _kv_width(config: Any) -> int:
    return _kv_heads(config) * _head_dim(config)


def _cacheable(model: MAVISValueModel, max_length: int) -> Any:
    """The backbone's text config, if its attention can be cached by position."""
    config = model.config.text_config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    sinks = any(name.endswith(".sinks") for name, _ in model.named_parameters())
    pluggable = getattr(model.backbone, "_supports_attention_backend", False)
    if not kinds <= {"full_attention", "sliding_attention"} or sinks or not pluggable:
        raise ValueError(
            f"a backbone of type {config.model_type!r} (layers {sorted(kinds)}) is not supported: "
            "use a decoder whose layers are full or sliding-window attention without sinks"
        )
    if max_length > config.max_position_embeddings:
        raise ValueError(
            f"the value model for {model.config.objectives} reads at most "
            f"{config.max_position_embeddings} positions, fewer than the {max_length} needed: "
            "lower the maximum model length"
        )
    return config
