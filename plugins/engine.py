"""The value engine: values of the `k` candidate next tokens of many sequences, incrementally.

Keys and values of every prefix stay in a paged store of fixed size, so a step costs one new token
and the candidates a sequence, in one forward pass for all sequences whatever their lengths.
Prefixes that begin alike share their full blocks. The store is only a cache: whatever was evicted
is computed again from the token ids that the caller gives. The engine knows nothing of requests,
weights or host engines.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from .attention import ATTENTION, BLOCK_SIZE, Step, Store, head_dim, kv_heads
from .devices import to_device
from .probe import Probe, refused
from .value_model import MAVISValueModel

GIB = 1 << 30

# history(slot, start, stop): the token ids at those positions of the slot's prefix.
History = Callable[[int, int, int], "Sequence[int] | torch.Tensor"]


class ValueEngine:
    """Values `[batch, k, objectives]` of candidates, with a bounded cache of the prefixes.

    A sequence lives in a *slot*, an index that the caller chooses. The caller says what the prefix
    is at every call; `truncate` or `release` a slot when its earlier tokens change. After a call
    that was interrupted everything stored is thrown away.

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
        ValueError: A backbone cannot be cached, does not compute here what it computes in
            transformers, or is too short for `max_length`; or the store cannot hold one sequence of
            `max_length`.

    Example:

    ```python
    >>> import numpy as np, torch
    >>> from trimtab.plugins import MAVISValueModel, ValueEngine
    >>> engine = ValueEngine([MAVISValueModel.load("STATE_MODEL")], num_slots=8, max_length=64)
    >>> prefix, candidates = [5, 6, 7], torch.tensor([[8, 9]])
    >>> values = engine.values(
    ...     np.array([0]), np.array([len(prefix)]), torch.tensor(prefix[-1:]), candidates,
    ...     history=lambda slot, start, stop: prefix[start:stop],
    ... )
    >>> values.shape  # [batch, k, objectives]
    torch.Size([1, 2, 2])
    >>> engine.release(0)
    ```
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
        for model in self.models:
            if model.config.head_type == "hidden":
                raise ValueError(
                    f"the value heads for {model.config.objectives} read the base model's hidden "
                    "state and run no model of their own: guide with them by a MAVISLogitsProcessor"
                )
        families: dict[int, list[int]] = {}
        for i, model in enumerate(self.models):
            families.setdefault(id(model.backbone), []).append(i)
        self._families = list(families.values())  # indices of the models of each backbone
        bytes_per_token = 0
        for model in self.models:
            config = model.config.text_config
            with refused(config):
                _check_attention(model)
                token = config.num_hidden_layers * 2 * kv_heads(config) * head_dim(config)
            longest = getattr(config, "max_position_embeddings", max_length)
            if max_length > longest:
                raise ValueError(
                    f"the value model for {model.config.objectives} reads at most {longest} "
                    f"positions, fewer than the {max_length} needed: lower the maximum model length"
                )
            nn.Module.to(model.eval(), device=self.device)
            # Rotary frequencies, a buffer, stay exact, and heads are read in float32.
            for name, parameter in model.named_parameters():
                kept = dtype if name.startswith("backbone.") else torch.float32
                parameter.data = parameter.data.to(kept)
            bytes_per_token += token * dtype.itemsize

        probes = [
            Probe(self.models[family[0]].backbone, len(family), max_length)
            for family in self._families
        ]
        for family in self._families:
            self.models[family[0]].backbone.set_attn_implementation(ATTENTION)

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
            for held in (model.parameters(), model.buffers()):
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

        self._num_blocks = num_blocks
        # A slot's blocks, in order.
        self._table = np.zeros((num_slots, blocks_each), dtype=np.int64)
        self._used = np.zeros(num_slots, dtype=np.int64)  # last step that needed the slot
        self._clock = 0
        self._forget()
        for number, probe in enumerate(probes):
            self._check(number, probe)

    @torch.inference_mode()
    def _check(self, family: int, probe: Probe) -> None:
        """Refuse a backbone that runs otherwise here than in transformers."""
        if probe.expected is None:
            return
        slots, lengths = np.zeros(1, dtype=np.int64), np.array([len(probe.prefix)])
        positions = np.array([[lengths[0] - 1, *[lengths[0]] * len(probe.candidates)]])
        tokens = torch.tensor([probe.prefix[-1], *probe.candidates], device=self.device)

        def run() -> torch.Tensor:
            history = lambda slot, start, stop: probe.prefix[start:stop]  # noqa: E731
            self._store_prefixes(slots, lengths - 1, history)
            hidden = self._pass([family], slots, lengths, positions, tokens)
            return torch.stack([hidden[i] for i in self._families[family]])

        try:
            probe.compare(run)
        finally:
            self._forget()

    def _forget(self) -> None:
        """Empty the store and everything that is known of it."""
        num_slots = len(self._table)
        # A block's users, and which prefix it holds if that may be shared: the prefix of its
        # parent, by number, and its own tokens. A free block keeps its content until it is taken.
        self._users = np.zeros(self._num_blocks + 1, dtype=np.int64)
        self._free = OrderedDict.fromkeys(range(1, self._num_blocks + 1))  # least recent first
        self._shared: dict[tuple[int, bytes], tuple[int, int]] = {}  # to block and prefix number
        self._content: dict[int, tuple[int, bytes]] = {}  # of a block: its key in `_shared`
        self._prefixes = 0  # numbers given so far; 0 is the empty prefix

        self._held = np.zeros(num_slots, dtype=np.int64)  # blocks of each slot
        self._cached = np.zeros(num_slots, dtype=np.int64)  # prefix tokens whose keys are stored
        self._changing = False  # whether what is above may be half done

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

    def truncate(self, slot: int, length: int) -> None:
        """Forget what is stored of `slot` from position `length` on."""
        before, self._changing = self._changing, True
        keep = min(-(-length // BLOCK_SIZE), self._held[slot])
        if length % BLOCK_SIZE and keep and int(self._table[slot, keep - 1]) in self._content:
            keep = length // BLOCK_SIZE  # others may read the block, so it is not written again
        for block in self._table[slot, keep : self._held[slot]].tolist():
            self._users[block] -= 1
            if not self._users[block]:
                self._free[block] = None
        self._held[slot] = keep
        self._cached[slot] = min(self._cached[slot], length, keep * BLOCK_SIZE)
        self._changing = before

    def release(self, slot: int) -> None:
        """Forget `slot` and give its memory back."""
        self.truncate(slot, 0)

    @torch.inference_mode()
    def store(self, slots: np.ndarray, lengths: np.ndarray, history: History) -> None:
        """Store the first `lengths` tokens of prefixes that are not complete yet.

        Args:
            slots: `[batch]` int64, distinct.
            lengths: `[batch]` int64, at least 1 and below `max_length`.
            history: Asked for the tokens that are not stored.
        """
        if self._changing:
            self._forget()
        self._changing = True
        for slot, length in zip(slots, lengths):  # they need not fit together
            self._clock += 1
            self._used[slot] = self._clock
            self._store_prefixes(np.array([slot]), np.array([length]), history)
        self._changing = False

    @torch.inference_mode()
    def values(
        self,
        slots: np.ndarray,
        lengths: np.ndarray,
        last_tokens: torch.Tensor,
        candidates: torch.Tensor,
        history: History,
        counts: np.ndarray | None = None,
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
        if self._changing:
            self._forget()
        self._changing = True
        if counts is None:
            counts = np.full(len(slots), candidates.shape[1])
        values = self._values(slots, lengths, last_tokens, candidates, history, counts)
        self._changing = False
        return values

    def _values(
        self,
        slots: np.ndarray,
        lengths: np.ndarray,
        last_tokens: torch.Tensor,
        candidates: torch.Tensor,
        history: History,
        counts: np.ndarray,
    ) -> torch.Tensor:
        if (-(-lengths // BLOCK_SIZE)).sum() > self._num_blocks:
            # Prefixes that do not fit together go one half after the other.
            halves = [
                self._values(
                    slots[h], lengths[h], last_tokens[h], candidates[h], history, counts[h]
                )
                for h in np.array_split(np.arange(len(slots)), 2)
            ]
            return torch.cat(halves)
        self._clock += 1
        self._used[slots] = self._clock
        self._store_prefixes(slots, lengths - 1, history)
        values = self._at_candidates(
            slots, lengths, last_tokens.to(candidates.dtype), candidates, counts
        )
        self._cached[slots] = lengths
        return values

    def _at_candidates(
        self,
        slots: np.ndarray,
        lengths: np.ndarray,
        last_tokens: torch.Tensor,
        candidates: torch.Tensor,
        counts: np.ndarray,
    ) -> torch.Tensor:
        """Values `[batch, k, objectives]`; the last tokens enter the store."""
        width = int(counts.max(initial=0))
        positions = np.repeat(lengths[:, None], 1 + width, axis=1)
        positions[:, 0] -= 1
        tokens = torch.cat((last_tokens[:, None], candidates[:, :width]), dim=1)
        packing = None
        if (counts < width).any():
            real = np.arange(1 + width) <= counts[:, None]
            padded = np.where(real, real.cumsum().reshape(real.shape) - 1, 0)
            packing = (
                self._to_device(np.flatnonzero(real)),
                self._to_device(padded.reshape(-1)),
            )
        values = {}
        families = range(len(self._families))
        hidden = self._pass(families, slots, lengths, positions, tokens.flatten(), packing)
        for i, of_model in hidden.items():
            read = self.models[i].read_head(of_model)
            if packing is not None:
                read = read.index_select(0, packing[1])
            read = read.view(len(slots), 1 + width, -1)[:, 1:]
            values[i] = nn.functional.pad(read, (0, 0, 0, candidates.shape[1] - width))
        return torch.cat([values[i] for i in range(len(self.models))], dim=-1)

    def _store_prefixes(self, slots: np.ndarray, lengths: np.ndarray, history: History) -> None:
        """Bring the store to `lengths` tokens of each prefix, with room for one more."""
        for i in np.flatnonzero(self._cached[slots] > lengths):
            self.truncate(int(slots[i]), int(lengths[i]))
        pending = self._cached[slots] < lengths
        self._allocate(slots[~pending], lengths[~pending] + 1)
        waiting = [(int(s), int(n)) for s, n in zip(slots[pending], lengths[pending])]
        while waiting:
            # Of prefixes that begin alike one is computed first, so that the others can share it.
            leaders, followers, missing, new = [], [], set(), {}
            for slot, length in waiting:
                start = int(self._cached[slot])
                tokens = np.asarray(history(slot, start, length), dtype=np.int64)
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
            self._allocate(chosen, np.array([length + 1 for _, length, _ in leaders]))
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
            step = self._step(rows, first + n, positions, width)
            step = replace(step, fresh=not first.any())
            self._run(range(len(self._families)), self._to_device(tokens.reshape(-1)), step)
            self._cached[rows] = first + n

    def _pass(
        self,
        families: Sequence[int],
        slots: np.ndarray,
        lengths: np.ndarray,
        positions: np.ndarray,
        tokens: torch.Tensor,
        packing: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> dict[int, torch.Tensor]:
        """Last hidden states `[total, hidden]` of each model of some families.

        `positions` `[batch, queries]` are those of `tokens` `[batch * queries]`, of which the pass
        runs over the `total` that `packing` keeps, see `Step`; each row's first enters the store.
        """
        step = replace(self._step(slots, lengths, positions, 1), packing=packing)
        hidden = self._run(families, tokens if packing is None else tokens[packing[0]], step)
        return dict(zip((i for f in families for i in self._families[f]), hidden))

    def _step(
        self, slots: np.ndarray, lengths: np.ndarray, positions: np.ndarray, written: int
    ) -> Step:
        """A pass over tokens at `positions` `[batch, queries]`, -1 where there is none."""
        table = self._table[slots]
        new = np.maximum(positions[:, :written], 0)
        write = table[np.arange(len(slots))[:, None], new // BLOCK_SIZE] * BLOCK_SIZE
        write = np.where(positions[:, :written] < 0, 0, write + new % BLOCK_SIZE)
        longest = -(-int(lengths.max(initial=1)) // BLOCK_SIZE)
        return Step(
            written=written,
            write=self._to_device(write.reshape(-1)),
            read=self._to_device(table[:, :longest]),
            positions=self._to_device(np.maximum(positions, 0)),
            lengths=self._to_device(lengths),
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

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return to_device(torch.from_numpy(np.ascontiguousarray(array)), self.device)


def check_servable(model: MAVISValueModel, max_length: int) -> None:
    """Try the engine on a copy of a value model, before hours are spent on training it.

    Args:
        model: A value model on a CPU, in float32 or bfloat16.
        max_length: Longest text, in tokens.

    Raises:
        ValueError: The value engine does not support its backbone; the message names its type.
    """
    with refused(model.config.text_config):
        model = copy.deepcopy(model)
    ValueEngine([model], num_slots=1, max_length=max_length)


def _check_attention(model: MAVISValueModel) -> None:
    """Raises if the attention of a backbone cannot be cached by position."""
    config = model.config.text_config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if other := sorted(kinds - {"full_attention", "sliding_attention"}):
        raise RuntimeError(f"it has layers of {', '.join(other)}")
    if any(name.endswith(".sinks") for name, _ in model.named_parameters()):
        raise RuntimeError("its attention has sinks")
    if not getattr(model.backbone, "_supports_attention_backend", False):
        raise RuntimeError("its attention is not exchangeable in transformers")
