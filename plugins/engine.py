"""The value engine: values of the `k` candidate next tokens of many sequences, incrementally.

Keys and values of every prefix stay in a paged store of fixed size, so a step costs one new token
(with a state head, also the candidates) a sequence, in one forward pass for all sequences whatever
their lengths. Prefixes that begin alike share their full blocks. The store is only a cache:
whatever was evicted is computed again from the token ids that the caller gives. The engine knows
nothing of requests, weights or host engines.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from .attention import ATTENTION, BLOCK_SIZE, Step, Store, head_dim, kv_heads
from .fusion import PackedLinear, fuse, pack
from .graphs import Indices, PassGraphs, pinned
from .value_model import MAVISValueModel

GIB = 1 << 30

# history(slot, start, stop): the token ids at those positions of the slot's prefix.
History = Callable[[int, int, int], "Sequence[int] | torch.Tensor"]
# rerank(values, rows): for those rows `[n]` of the batch, from their values `[n, k, objectives]`,
# which candidates to read again, `[n, m]` int64, and how much each counts, `[n, m]`, together 1.
Rerank = Callable[[torch.Tensor, np.ndarray], tuple[torch.Tensor, torch.Tensor]]


class ValueEngine:
    """Values `[batch, k, objectives]` of candidates, with a bounded cache of the prefixes.

    A sequence lives in a *slot*, an index that the caller chooses. The caller says what the prefix
    is at every call; `truncate` or `release` a slot when its earlier tokens change.

    Args:
        models: Value models; their objectives are concatenated. The engine takes them over. Those
            that hold the same backbone object are its adapters, see `adapters`.
        num_slots: Number of sequences that may be known at once.
        max_length: Longest prefix, in tokens.
        device: Where to compute.
        dtype: float32, bfloat16 or float16, of the backbones' weights and the store. Heads and
            values are float32.
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
        families: dict[int, list[int]] = {}
        for i, model in enumerate(self.models):
            families.setdefault(id(model.backbone), []).append(i)
        self._families = list(families.values())  # indices of the models of each backbone
        # Of those, by number: whose models read candidates at the prefix, and at their own place.
        self._action, self._state = (
            [f for f, family in enumerate(self._families) if kind(self.models[family[0]])]
            for kind in (_is_action, lambda model: not _is_action(model))
        )
        bytes_per_token = 0
        for model in self.models:
            config = _cacheable(model, max_length)
            nn.Module.to(model.eval(), device=self.device)
            # Rotary frequencies, a buffer, stay exact, and heads are read in float32.
            for name, parameter in model.named_parameters():
                kept = dtype if name.startswith("backbone.") else torch.float32
                parameter.data = parameter.data.to(kept)
            bytes_per_token += config.num_hidden_layers * 2 * _kv_width(config) * dtype.itemsize

        for family in self._families:
            backbone = self.models[family[0]].backbone
            backbone.set_attn_implementation(ATTENTION)
            fuse(backbone, max_length + 1, adapters=len(family))
            if self.device.type == "cpu":
                pack(backbone)

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
        self.kv_cache_bytes = (num_blocks + 1) * BLOCK_SIZE * bytes_per_token
        weights: dict[int, int] = {}
        for model in self.models:
            packed = (m for m in model.modules() if isinstance(m, PackedLinear))
            for held in (model.parameters(), model.buffers(), packed):
                weights |= {id(x): x.nbytes for x in held}
        self.weight_bytes = sum(weights.values())
        self._stores: list[Store] = []  # of each family, its adapters' one behind the other
        for family in self._families:
            config = self.models[family[0]].config.text_config
            blocks = len(family) * (num_blocks + 1)
            shape = (2, blocks, kv_heads(config), BLOCK_SIZE, head_dim(config))
            self._stores.append(
                [
                    torch.zeros(shape, dtype=dtype, device=self.device)
                    for _ in range(config.num_hidden_layers)
                ]
            )
        with torch.inference_mode():
            self._action_tables = [
                model.action_table() if _is_action(model) else None for model in self.models
            ]
        self.weight_bytes += sum(t.nbytes for t in self._action_tables if t is not None)

        # A block's users, and which prefix it holds if that may be shared: the prefix of its
        # parent, by number, and its own tokens. A free block keeps its content until it is taken.
        self._num_blocks = num_blocks
        self._users = np.zeros(num_blocks + 1, dtype=np.int64)
        self._free = OrderedDict.fromkeys(range(1, num_blocks + 1))  # least recently used first
        self._shared: dict[tuple[int, bytes], tuple[int, int]] = {}  # to block and prefix number
        self._content: dict[int, tuple[int, bytes]] = {}  # of a block: its key in `_shared`
        self._prefixes = 0  # numbers given so far; 0 is the empty prefix

        # A slot's blocks, in order, and the number of them.
        self._table = np.zeros((num_slots, blocks_each), dtype=np.int64)
        self._held = np.zeros(num_slots, dtype=np.int64)
        self._cached = np.zeros(num_slots, dtype=np.int64)  # prefix tokens whose keys are stored
        self._used = np.zeros(num_slots, dtype=np.int64)  # last step that needed the slot
        self._clock = 0

        # Whether to call `launch_ahead`: elsewhere it would not run beside what the caller does.
        self.launches_ahead = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._ahead = np.full(num_slots, -1)  # a slot's row of what was launched ahead
        self._ahead_hidden: dict[int, torch.Tensor] = {}  # of each model
        self._graphs: dict[tuple[tuple[int, ...], int, int], PassGraphs] = {}

    @property
    def candidate_range(self) -> tuple[float, ...] | None:
        """Largest observed difference between two candidates' values, per objective; see
        [`MAVISValueConfig`]. None if some model has not measured it."""
        ranges = [model.config.candidate_range for model in self.models]
        return None if None in ranges else tuple(x for r in ranges for x in r or ())

    @property
    def candidate_scale(self) -> tuple[float, ...]:
        """Factor of the values where they guide, per objective; see [`MAVISValueConfig`]."""
        return tuple(
            scale
            for config in (model.config for model in self.models)
            for scale in config.candidate_scale or [1.0] * len(config.objectives or ())
        )

    @property
    def reads_candidates(self) -> bool:
        """Whether some model reads the candidates themselves, so that fewer of them cost less."""
        return bool(self._state)

    @property
    def has_action_heads(self) -> bool:
        """Whether some model reads its candidates at the prefix."""
        return bool(self._action)

    def truncate(self, slot: int, length: int) -> None:
        """Forget what is stored of `slot` from position `length` on."""
        keep = min(-(-length // BLOCK_SIZE), self._held[slot])
        if length % BLOCK_SIZE and keep and int(self._table[slot, keep - 1]) in self._content:
            keep = length // BLOCK_SIZE  # others may read the block, so it is not written again
        for block in self._table[slot, keep : self._held[slot]].tolist():
            self._users[block] -= 1
            if not self._users[block]:
                self._free[block] = None
        self._held[slot] = keep
        self._cached[slot] = min(self._cached[slot], length, keep * BLOCK_SIZE)

    def release(self, slot: int) -> None:
        """Forget `slot` and give its memory back."""
        self.truncate(slot, 0)

    @torch.inference_mode()
    def record_graphs(self, top_k: int, rerank: int = 0) -> int:
        """Record the passes of a decoding step as CUDA graphs.

        Args:
            top_k: Number of candidates whose passes are recorded; others are launched kernel by
                kernel.
            rerank: Likewise, of candidates that are read again.

        Returns:
            The number of graphs.
        """
        kinds = {(tuple(self._action), 1, 1)}
        kinds |= {(tuple(self._state), 1, 1 + top_k)}
        if self.launches_ahead:
            every = tuple(range(len(self._families)))
            kinds |= {(every, 1, 1), (tuple(self._state), 0, top_k)}
        if rerank:
            kinds |= {(tuple(self._action), 0, min(rerank, top_k))}
        self._graphs = {
            (families, written, queries): PassGraphs(
                partial(self._run, families),
                written,
                queries,
                self._table.shape[1],
                len(self._table),
                self.device,
            )
            for families, written, queries in sorted(kinds)
            if families
        }
        return sum(len(graphs.batches) for graphs in self._graphs.values())

    @torch.inference_mode()
    def launch_ahead(
        self, slots: np.ndarray, lengths: np.ndarray, last_tokens: torch.Tensor
    ) -> None:
        """Launch what the next `values` of these prefixes need whatever the candidates are.

        On a CUDA device it runs on a stream of its own, beside what the caller launches until then.
        A prefix of which more than the last token is missing is left to `values`, and asking for
        other prefixes then costs no more than this call.

        Args:
            slots: As `values` takes them.
            lengths: Likewise; those out of range are left out.
            last_tokens: Likewise.
        """
        ready = np.flatnonzero((self._cached[slots] == lengths - 1) & (lengths <= self.max_length))
        slots, lengths = slots[ready], lengths[ready]
        if not slots.size or (-(-lengths // BLOCK_SIZE)).sum() > self._num_blocks:
            return
        self._clock += 1
        self._used[slots] = self._clock
        self._allocate(slots, lengths)
        with self._beside(last_tokens):
            tokens = last_tokens[self._to_device(ready)].long()
            families = range(len(self._families))
            positions = lengths[:, None] - 1
            self._ahead_hidden = self._pass(families, slots, lengths, positions, 1, tokens)
        self._cached[slots] = lengths
        self._ahead[:] = -1
        self._ahead[slots] = np.arange(len(slots))

    @torch.inference_mode()
    def values(
        self,
        slots: np.ndarray,
        lengths: np.ndarray,
        last_tokens: torch.Tensor,
        candidates: torch.Tensor,
        history: History,
        counts: np.ndarray | None = None,
        rerank: Rerank | None = None,
    ) -> torch.Tensor:
        """Value of every candidate as the next token of its prefix.

        Args:
            slots: `[batch]` int64, distinct.
            lengths: `[batch]` int64, length of each prefix, 1 to `max_length`.
            last_tokens: `[batch]` integer, last token of each prefix, on the engine's device.
            candidates: `[batch, k]` int64 token ids, on the engine's device.
            history: Asked for the earlier tokens that are not stored.
            counts: `[batch]` int64, how many of a row's candidates to value, the first ones; by
                default all.
            rerank: Which candidates' values to read again at their own position, where an action
                head has valued them at the prefix's.

        Returns:
            `[batch, k, objectives]` float32; what it says of a candidate beyond its row's count
            means nothing.

        Raises:
            ValueError: A length is out of range.
        """
        if lengths.size and not 1 <= lengths.min() <= lengths.max() <= self.max_length:
            raise ValueError(
                f"prefix lengths must be 1 to {self.max_length}, got {lengths.tolist()}"
            )
        if counts is None:
            counts = np.full(len(slots), candidates.shape[1])
        if (-(-lengths // BLOCK_SIZE)).sum() > self._num_blocks:
            # Prefixes that do not fit together go one half after the other.
            halves = []
            for h in np.array_split(np.arange(len(slots)), 2):
                part = (slots[h], lengths[h], last_tokens[h], candidates[h], history, counts[h])
                of_half = rerank and partial(_of_part, rerank, h)
                halves.append(self.values(*part, of_half))
            return torch.cat(halves)
        self._clock += 1
        self._used[slots] = self._clock
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        ahead = np.where(self._cached[slots] == lengths, self._ahead[slots], -1)
        self._store_prefixes(slots, lengths, history)
        self._cached[slots] = lengths
        last_tokens = last_tokens.to(candidates.dtype)
        at_prefix = self._at_prefix(slots, lengths, last_tokens, ahead)
        values = {
            i: self.models[i].read_action_head(hidden, candidates, self._action_tables[i])
            for i, hidden in at_prefix.items()
        }
        if self._state:
            # If some ran ahead, `_at_prefix` has stored the others' last tokens.
            written = int((ahead < 0).all())
            values |= self._at_candidates(slots, lengths, last_tokens, candidates, counts, written)
        if rerank is not None and self._action:
            self._rerank(slots, lengths, candidates, values, rerank)
        self._ahead[:] = -1  # the next pass may overwrite what was launched ahead
        return torch.cat([values[i] for i in range(len(self.models))], dim=-1)

    def _at_prefix(
        self, slots: np.ndarray, lengths: np.ndarray, last_tokens: torch.Tensor, ahead: np.ndarray
    ) -> dict[int, torch.Tensor]:
        """Hidden states at the prefixes' last tokens `[batch, hidden]`, of every action head.

        `ahead` `[batch]` are the rows of what was launched ahead, -1 for a prefix that was not. If
        some were, the other prefixes' last tokens are stored for the state heads as well.
        """
        of_action = [i for f in self._action for i in self._families[f]]
        rest = np.flatnonzero(ahead < 0)
        positions = lengths[rest, None] - 1
        if len(rest) == len(slots):
            if not self._action:
                return {}
            return self._pass(self._action, slots, lengths, positions, 1, last_tokens)
        if not rest.size:
            rows = self._to_device(ahead)
            return {i: self._ahead_hidden[i][rows] for i in of_action}
        # The pass may overwrite what it returned when it ran ahead.
        before = {i: hidden.clone() for i, hidden in self._ahead_hidden.items()}
        hidden = self._pass(
            range(len(self._families)), slots[rest], lengths[rest], positions, 1,
            last_tokens[self._to_device(rest)],
        )  # fmt: skip
        order = ahead.copy()
        order[rest] = len(before[0]) + np.arange(len(rest))
        rows = self._to_device(order)
        return {i: torch.cat((before[i], hidden[i]))[rows] for i in of_action}

    def _at_candidates(
        self,
        slots: np.ndarray,
        lengths: np.ndarray,
        last_tokens: torch.Tensor,
        candidates: torch.Tensor,
        counts: np.ndarray,
        written: int,
    ) -> dict[int, torch.Tensor]:
        """Values `[batch, k, objectives]` of every state head.

        `written` is 1 if the prefixes' last tokens are still to be stored, else 0.
        """
        width = int(counts.max(initial=0))
        positions = np.repeat(lengths[:, None], written + width, axis=1)
        positions[:, :written] -= 1
        tokens = candidates[:, :width]
        if written:
            tokens = torch.cat((last_tokens[:, None], tokens), dim=1)
        packing = None
        if (counts < width).any():
            real = np.arange(written + width) < written + counts[:, None]
            padded = np.where(real, real.cumsum().reshape(real.shape) - 1, 0)
            packing = (
                self._to_device(np.flatnonzero(real)),
                self._to_device(padded.reshape(-1)),
            )
        values = {}
        hidden = self._pass(
            self._state, slots, lengths, positions, written, tokens.flatten(), packing
        )
        for i, of_model in hidden.items():
            read = self.models[i].read_head(of_model)
            if packing is not None:
                read = read.index_select(0, packing[1])
            read = read.view(len(slots), written + width, -1)[:, written:]
            values[i] = nn.functional.pad(read, (0, 0, 0, candidates.shape[1] - width))
        return values

    def _rerank(
        self,
        slots: np.ndarray,
        lengths: np.ndarray,
        candidates: torch.Tensor,
        values: dict[int, torch.Tensor],
        rerank: Rerank,
    ) -> None:
        """Read the values of some candidates at their own position, in place of an action head's.

        The others keep their action head's, moved by as much as those have moved in the mean.
        """
        merged = torch.cat([values[i] for i in range(len(self.models))], dim=-1)
        chosen, share = rerank(merged, np.arange(len(slots)))
        tokens = candidates.gather(1, chosen).flatten()
        positions = np.repeat(lengths[:, None], chosen.shape[1], axis=1)
        index = chosen[..., None]
        for i, hidden in self._pass(self._action, slots, lengths, positions, 0, tokens).items():
            own = self.models[i].read_head(hidden).view(*chosen.shape, -1)
            moved = own - values[i].gather(1, index.expand_as(own))
            moved = (share[..., None] * moved).sum(1, keepdim=True)
            values[i] = (values[i] + moved).scatter(1, index.expand_as(own), own)

    def _store_prefixes(self, slots: np.ndarray, lengths: np.ndarray, history: History) -> None:
        """Bring the store up to all but the last token of each prefix, with room for that one."""
        pending = self._cached[slots] < lengths - 1
        self._allocate(slots[~pending], lengths[~pending])
        waiting = [(int(s), int(n)) for s, n in zip(slots[pending], lengths[pending])]
        while waiting:
            # Of prefixes that begin alike one is computed first, so that the others can share it.
            leaders, followers, missing, new = [], [], set(), {}
            for slot, length in waiting:
                start = int(self._cached[slot])
                tokens = np.asarray(history(slot, start, length - 1), dtype=np.int64)
                key = None
                if start == 0:
                    key = self._share(slot, tokens)
                    new[slot], tokens = tokens, tokens[self._cached[slot] :]
                if key is not None and key in missing:
                    followers.append((slot, length))
                    self.release(slot)
                else:
                    missing.add(key)
                    leaders.append((slot, length, tokens))
            chosen = np.array([slot for slot, _, _ in leaders])
            self._allocate(chosen, np.array([length for _, length, _ in leaders]))
            self._prefill({slot: tokens for slot, _, tokens in leaders})
            for slot, _, _ in leaders:
                if slot in new:
                    self._offer(slot, new[slot])
            waiting = followers

    def _share(self, slot: int, tokens: np.ndarray) -> tuple[int, bytes] | None:
        """Begin an empty slot with the stored blocks that hold the same tokens.

        Returns:
            The key of the first full block that is missing, if there is one.
        """
        prefix = 0
        for held in range(len(tokens) // BLOCK_SIZE):
            key = (prefix, tokens[held * BLOCK_SIZE : (held + 1) * BLOCK_SIZE].tobytes())
            if key not in self._shared:
                return key
            block, prefix = self._shared[key]
            self._hold(slot, block)
            self._cached[slot] = self._held[slot] * BLOCK_SIZE
        return None

    def _offer(self, slot: int, tokens: np.ndarray) -> None:
        """Let other slots share the full blocks of a prefix that is stored from its beginning."""
        prefix = 0
        for i in range(len(tokens) // BLOCK_SIZE):
            key = (prefix, tokens[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE].tobytes())
            if key not in self._shared:
                block = int(self._table[slot, i])
                self._prefixes += 1
                self._shared[key] = (block, self._prefixes)
                self._content[block] = key
            prefix = self._shared[key][1]

    def _hold(self, slot: int, block: int) -> None:
        """Add `block` to those of the slot."""
        self._free.pop(block, None)
        self._users[block] += 1
        self._table[slot, self._held[slot]] = block
        self._held[slot] += 1

    def _allocate(self, slots: np.ndarray, lengths: np.ndarray) -> None:
        """Give every slot its blocks, evicting slots of earlier steps, oldest first."""
        wanted = -(-lengths // BLOCK_SIZE) - self._held[slots]
        short = np.flatnonzero(wanted > 0)  # one step in BLOCK_SIZE, per sequence
        missing = int(wanted[short].sum())
        if missing > len(self._free):
            idle = np.flatnonzero((self._held > 0) & (self._used < self._clock))
            for slot in idle[np.argsort(self._used[idle])]:
                self.release(slot)
                if missing <= len(self._free):
                    break
        for i in short:
            for _ in range(wanted[i]):
                block, _ = self._free.popitem(last=False)
                if block in self._content:
                    del self._shared[self._content.pop(block)]
                self._hold(slots[i], block)

    def _prefill(self, prefixes: dict[int, np.ndarray]) -> None:
        """Store the next tokens of the slots, in passes of at most `prefill_tokens` tokens."""
        slots = np.array(list(prefixes))
        start = self._cached[slots]
        end = start + [len(tokens) for tokens in prefixes.values()]
        while (left := np.flatnonzero(self._cached[slots] < end)).size:
            count = np.minimum((end - self._cached[slots])[left], self.prefill_tokens)
            order = np.argsort(-count)
            batch = order[: max(1, self.prefill_tokens // count[order[0]])]
            rows, n = slots[left[batch]], count[batch]
            first, done = self._cached[rows], self._cached[rows] - start[left[batch]]
            width = int(n.max())
            tokens = np.zeros((len(batch), width), dtype=np.int64)
            for i, row in enumerate(rows):
                tokens[i, : n[i]] = prefixes[row][done[i] : done[i] + n[i]]
            offsets = np.arange(width)
            positions = np.where(offsets < n[:, None], first[:, None] + offsets, -1)
            step = self._step(self._indices(rows, first + n, positions, width), width)
            step = replace(step, fresh=not first.any(), stores_only=True)
            self._run(range(len(self._families)), self._to_device(tokens.reshape(-1)), step)
            self._cached[rows] = first + n

    def _pass(
        self,
        families: Sequence[int],
        slots: np.ndarray,
        lengths: np.ndarray,
        positions: np.ndarray,
        written: int,
        tokens: torch.Tensor,
        packing: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> dict[int, torch.Tensor]:
        """Last hidden states `[total, hidden]` of each model of some families.

        `positions` `[batch, queries]` are those of `tokens` `[batch * queries]`, of which the pass
        runs over the `total` that `packing` keeps; see `Step`. What a recorded pass returns is
        overwritten when it is next replayed.
        """
        indices = self._indices(slots, lengths, positions, written)
        graphs = self._graphs.get((tuple(families), written, positions.shape[1]))
        hidden = None
        if graphs is not None and packing is None:
            hidden = graphs(tokens, indices)
        if hidden is None:
            step = replace(self._step(indices, written), packing=packing)
            hidden = self._run(families, tokens if packing is None else tokens[packing[0]], step)
        return dict(zip((i for f in families for i in self._families[f]), hidden))

    def _indices(
        self, slots: np.ndarray, lengths: np.ndarray, positions: np.ndarray, written: int
    ) -> Indices:
        """A pass over tokens at `positions` `[batch, queries]`, -1 where there is none."""
        table = self._table[slots]
        new = np.maximum(positions[:, :written], 0)
        write = table[np.arange(len(slots))[:, None], new // BLOCK_SIZE] * BLOCK_SIZE
        write = np.where(positions[:, :written] < 0, 0, write + new % BLOCK_SIZE)
        return Indices(write, table, np.maximum(positions, 0), lengths)

    def _step(self, indices: Indices, written: int) -> Step:
        longest = -(-int(indices.lengths.max(initial=1)) // BLOCK_SIZE)
        return Step(
            written=written,
            write=self._to_device(indices.write.reshape(-1)),
            read=self._to_device(indices.read[:, :longest]),
            positions=self._to_device(indices.positions),
            lengths=self._to_device(indices.lengths),
        )

    def _run(self, families: Sequence[int], tokens: torch.Tensor, step: Step) -> list[torch.Tensor]:
        """Last hidden states `[total, hidden]` of `tokens` `[total]`, of each model of families."""
        hidden: list[torch.Tensor] = []
        for family in families:
            adapters = len(self._families[family])
            repeated = step.repeated(adapters, self._num_blocks + 1)
            positions = repeated.positions.flatten()
            if repeated.packing is not None:
                positions = positions[repeated.packing[0]]
            output = self.models[self._families[family][0]].backbone(
                input_ids=(tokens if adapters == 1 else tokens.repeat(adapters))[None],
                position_ids=positions[None],
                use_cache=False,
                mavis_step=repeated,
                mavis_store=self._stores[family],
            )
            hidden += output[0][0].chunk(adapters)  # its first entry, the last hidden states
        return hidden

    @contextmanager
    def _beside(self, *inputs: torch.Tensor) -> Iterator[None]:
        """Launch on the engine's own stream, after what has been launched so far."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        for tensor in inputs:  # their memory is not to be used again before
            tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            yield

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        host = pinned(torch.from_numpy(np.ascontiguousarray(array)), self.device)
        return host.to(self.device, non_blocking=True)


def _of_part(
    rerank: Rerank, part: np.ndarray, values: torch.Tensor, rows: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rerank` where the rows are counted within a part of its batch."""
    return rerank(values, part[rows])


def _is_action(model: MAVISValueModel) -> bool:
    return model.config.head_type == "action"


def _kv_width(config: Any) -> int:
    return kv_heads(config) * head_dim(config)


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
