"""Value heads without a backbone: they read the hidden state that the served model has computed.

`V_i(s) = v_i(h(s))`, linear, and `A_i(s, a) = <U_i(h(s)), P(e(a))> + b_i(e(a))`, with `h(s)` what
the base model's output layer reads after the prefix `s` and `e(a)` the base model's embedding of a
token, so that `Q_i = V_i + A_i`. `A` is the mean of an ensemble, whose members are trained each by
itself: their noise averages out, and is most of what they say of an objective that is hard to tell.
A decoding step costs no pass of a network, and nothing is kept between steps. `hidden_states` finds
`h(s)` in the host engines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .cards import model_card
from .devices import to_device
from .hidden_states import checkpoint_fingerprint
from .params import GuidanceParams
from .policy import guided_policy, top_candidates
from .value_config import MAVISValueConfig, base_model_fingerprint, tokenizer_fingerprint

if TYPE_CHECKING:
    from .value_model import MAVISValueModel

DROPOUT = 0.1
MIN_STD = 1e-6  # of a feature: one that never changes says nothing
GUIDED, VALUED = 1, 2  # what a slot asks for, 0 for nothing


class Ensemble(nn.Module):
    """Networks of two layers that read the same: `[..., inputs]` to `[..., members, outputs]`."""

    def __init__(self, members: int, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.expand = nn.Linear(inputs, members * width)
        self.weight = nn.Parameter(torch.empty(members, width, outputs))
        self.bias = nn.Parameter(torch.empty(members, outputs))
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.dropout(nn.functional.gelu(self.expand(x)))
        inner = inner.unflatten(-1, self.weight.shape[:2])
        return torch.einsum("...mi,mio->...mo", inner, self.weight) + self.bias


class MAVISValueHeads(PreTrainedModel):
    """Heads on the base model's own hidden state, of any number of objectives.

    What a token contributes is a function of the token alone, so it is saved, and served, as a
    table, of which a step reads the candidates' rows.

    Args:
        config: Of `head_type` `"hidden"`, with `objectives` and the base model's sizes.

    Raises:
        ValueError: The configuration names no objective, or is of another head type.

    Example:

    ```python
    >>> from trimtab.plugins import MAVISValueHeads, MAVISValueModel
    >>> new = MAVISValueHeads.from_base_model(model, ["readability"], tokenizer=tokenizer)
    >>> new.save_pretrained("new_heads")
    >>> heads = MAVISValueModel.load("new_heads")
    >>> hidden = model.base_model(**inputs).last_hidden_state[:, -1]
    >>> candidates = model(**inputs).logits[:, -1].topk(40).indices
    >>> heads.candidate_values(hidden, candidates).shape  # [batch, k, n_objectives]
    torch.Size([2, 40, 1])
    ```
    """

    config: MAVISValueConfig
    config_class = MAVISValueConfig
    base_model_prefix = ""

    hidden_mean: torch.Tensor  # [hidden_size] float32
    hidden_std: torch.Tensor
    action_table: torch.Tensor  # [vocab, ensemble_size * rank + n_objectives] float16

    def __init__(self, config: MAVISValueConfig) -> None:
        super().__init__(config)
        if config.head_type != "hidden" or not config.objectives:
            raise ValueError(
                "MAVISValueHeads needs a MAVISValueConfig with head_type 'hidden' and objectives; "
                "MAVISValueHeads.from_base_model makes it from a base model"
            )
        read, width, rank = config.base_hidden_size, config.head_width, config.action_rank
        count, members = len(config.objectives), config.ensemble_size
        assert read and config.base_embedding_size and config.base_vocab_size  # the config checks
        self.register_buffer("hidden_mean", torch.zeros(read))
        self.register_buffer("hidden_std", torch.ones(read))
        table = torch.zeros(config.base_vocab_size, members * rank + count, dtype=torch.float16)
        self.register_buffer("action_table", table)
        self.value = nn.Linear(read, count)  # v
        self.query = Ensemble(members, read, width, count * rank)  # U, of all objectives
        self.action = Ensemble(members, config.base_embedding_size, width, rank + count)  # P, b
        self.post_init()
        # Nothing is said of any prefix or token before training. Not in `_init_weights`: there
        # transformers passes over weights that it has loaded, and over no slice of them.
        with torch.no_grad():
            nn.init.zeros_(self.value.weight)
            nn.init.zeros_(self.query.weight)
            nn.init.zeros_(self.action.weight[..., rank:])

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)
        elif isinstance(module, Ensemble):
            nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
            nn.init.zeros_(module.bias)

    def standardize(self, hidden: torch.Tensor) -> torch.Tensor:
        """Features of unit scale: `[..., hidden_size]` of any floating dtype, float32 returned."""
        return (hidden.float() - self.hidden_mean) / self.hidden_std

    def read_values(self, hidden: torch.Tensor) -> torch.Tensor:
        """`V_i(s)`: `[..., hidden_size]` to `[..., n_objectives]` float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.value(self.standardize(hidden))

    def read_queries(self, hidden: torch.Tensor) -> torch.Tensor:
        """`U_i(h(s))` of every member: `[..., hidden_size]` to
        `[..., n_objectives, ensemble_size * rank]` float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            query = self.query(self.standardize(hidden))
        query = query.unflatten(-1, (-1, self.config.action_rank))
        return query.transpose(-2, -3).flatten(-2)

    def read_actions(self, embedding: torch.Tensor) -> torch.Tensor:
        """`P(e(a))`, then `b_i(e(a))`, of every member: `[..., embedding_size]` to
        `[..., ensemble_size, rank + n_objectives]` float32."""
        with torch.autocast(embedding.device.type, enabled=False):
            x = embedding.float()
            return self.action(nn.functional.rms_norm(x, x.shape[-1:]))

    def forward(
        self, hidden: torch.Tensor, embedding: torch.Tensor, candidates: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Values of prefixes, and advantages of candidates, from the parameters and not the table.

        Args:
            hidden: `[n, hidden_size]`, any floating dtype.
            embedding: `[m, embedding_size]`, the base model's embedding of some tokens.
            candidates: `[n, k]` int64, rows of `embedding`.

        Returns:
            `V_i(s)` `[n, n_objectives]`, and `A_i(s, a)` of every member,
            `[ensemble_size, n, k, n_objectives]`, both float32.
        """
        members, rank = self.config.ensemble_size, self.config.action_rank
        actions = self.read_actions(embedding).flatten(-2)
        actions = nn.functional.embedding(candidates, actions).unflatten(-1, (members, -1))
        query = self.read_queries(hidden).unflatten(-1, (members, rank))
        with torch.autocast(hidden.device.type, enabled=False):
            advantages = torch.einsum("nker,noer->enko", actions[..., :rank], query)
        return self.read_values(hidden), advantages + actions[..., rank:].permute(2, 0, 1, 3)

    def candidate_values(self, hidden: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """`Q_i(s, a)` from the table, as it is served.

        Args:
            hidden: `[n, hidden_size]`, any floating dtype.
            candidates: `[n, k]` int64 token ids.

        Returns:
            `[n, k, n_objectives]` float32.
        """
        actions = nn.functional.embedding(candidates, self.action_table).float()
        advantages = _advantages(self.read_queries(hidden), actions)
        return self.read_values(hidden)[:, None] + advantages

    @torch.no_grad()
    def set_statistics(self, hidden: Iterable[torch.Tensor]) -> None:
        """Standardises by the mean and standard deviation of hidden states, `[n, hidden_size]` each
        part, of which one at a time is held."""
        count, shift = 0, torch.empty(0)
        total = squares = torch.zeros(1, dtype=torch.float64)
        for part in hidden:
            shift = shift if count else part[0].double()  # a sum of squares would cancel
            moved = part.double() - shift
            count, total = count + len(part), total + moved.sum(0)
            squares = squares + moved.square().sum(0)
        variance = (squares / count - (total / count).square()).clamp(min=0)
        self.hidden_mean.copy_(shift + total / count)
        self.hidden_std.copy_(variance.sqrt().clamp(min=MIN_STD))

    @torch.no_grad()
    def write_table(self, embedding: torch.Tensor) -> None:
        """Computes the table, from the base model's `embedding` `[vocab, embedding_size]`.

        Raises:
            ValueError: The embedding has fewer rows than the model has tokens.
        """
        vocab = self.config.vocab_size
        if len(embedding) < vocab:
            raise ValueError(
                f"the embedding has {len(embedding)} rows for a vocabulary of {vocab} tokens"
            )
        training = self.training
        self.eval()
        members, rank = self.config.ensemble_size, self.config.action_rank
        for rows in torch.arange(vocab).split(8192):  # bounds the memory it takes
            actions = self.read_actions(embedding[rows].to(self.hidden_mean.device))
            # The mean over members: a sum of products with P, each a share, and the mean of b.
            factors, own = actions[..., :rank] / members, actions[..., rank:].mean(-2)
            table = torch.cat((factors.flatten(-2), own), dim=-1)
            self.action_table[rows] = table.to(self.action_table.dtype)
        self.train(training)

    @classmethod
    def from_base_model(
        cls,
        base_model: str | PreTrainedModel,
        objectives: Sequence[str],
        *,
        tokenizer: Any = None,
        **config_fields: Any,
    ) -> MAVISValueHeads:
        """New heads for a base model; they say nothing until they are trained.

        Args:
            base_model: A loaded causal decoder, or a name or path to load one from.
            objectives: One output of the heads each.
            tokenizer: The base model's tokenizer, for the fingerprint that serving checks.
            config_fields: Other fields of [`MAVISValueConfig`].

        Raises:
            ValueError: The base model has no output layer whose input could be read.
        """
        full: Any = base_model
        if isinstance(base_model, str):
            full = AutoModelForCausalLM.from_pretrained(base_model, dtype="auto")
        output, name = full.get_output_embeddings(), full.config.name_or_path
        if output is None:
            raise ValueError(f"{name!r} has no output layer: heads read the hidden state before it")
        config = MAVISValueConfig(
            head_type="hidden",
            objectives=list(objectives),
            base_hidden_size=output.weight.shape[1],
            base_vocab_size=full.config.get_text_config().vocab_size,
            base_embedding_size=full.get_input_embeddings().weight.shape[1],
            base_model=name,
            base_model_fingerprint=base_model_fingerprint(full.config),
            base_checkpoint_fingerprint=checkpoint_fingerprint(
                name, getattr(full.config, "_commit_hash", None)
            ),
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer) if tokenizer else None,
            **config_fields,
        )
        return cls(config)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Write config, safetensors weights and a model card into `save_directory`."""
        super().save_pretrained(save_directory, **kwargs)
        if kwargs.get("is_main_process", True):
            (Path(save_directory) / "README.md").write_text(model_card(self.config))


def _advantages(query: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """`A_i(s, a)` `[n, k, n_objectives]` of `U_i(h(s))` `[n, n_objectives, rank]` and `P`, `b`."""
    rank = query.shape[-1]
    return actions[..., :rank] @ query.transpose(-1, -2) + actions[..., rank:]


def value_code(values: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Tokens that say `values`, `[...]` float32, in an answer of one token: `[...]` int64.

    They order all values. A value of `v` standard deviations is said within
    `pi (1 + v^2) / (2 vocab_size)`: 0.0003 at 3, with 100,000 tokens.
    """
    return ((values.atan() / math.pi + 0.5) * (vocab_size - 1)).round().long()


def value_of_code(token: int, vocab_size: int) -> float:
    """The value that a token of [`value_code`] says; infinite at the ends of the vocabulary."""
    share = token / (vocab_size - 1) - 0.5
    return math.copysign(math.inf, share) if abs(share) == 0.5 else math.tan(math.pi * share)


def are_heads(models: Sequence[MAVISValueModel | MAVISValueHeads]) -> bool:
    """Whether value models that guide together read the base model's hidden state.

    Raises:
        ValueError: Some do and some do not.
    """
    heads = [model.config.head_type == "hidden" for model in models]
    if any(heads) and not all(heads):
        names = [list(m.config.objectives or ()) for m, h in zip(models, heads) if not h]
        raise ValueError(
            "value heads on the base model's hidden state do not guide together with value models "
            f"that have a backbone, here those of {names}: serve one kind"
        )
    return all(heads)


@dataclass(frozen=True)
class Rows:
    """Logits rows that are guided together.

    Args:
        index: `[n]` int64, which rows of the logits; None for all of them.
        slots: `[n]` integer, the slot of each.
        max_k: Largest number of candidates of a row; 0 for rows that ask for a value.
        alike: Whether all rows have that many.
        limited: Whether some row has a KL budget.
        every: Whether all rows are guided, or ask for a value; else others stay as they are.
    """

    index: torch.Tensor | None
    slots: torch.Tensor
    max_k: int
    alike: bool
    limited: bool
    every: bool = True


class HeadGuide:
    """Tilts logits rows by heads on the hidden states of the same rows.

    A row's parameters lie in a *slot*, an index that the caller chooses. Nothing else is kept.

    Args:
        models: Heads; their objectives are concatenated.
        num_slots: Number of slots.
        device: Of the logits.

    Attributes:
        watch: Told of every group of rows `log pi` and `log pi_ref`, `[n, k]`, and which of them
            are guided, `[n]` bool, None if all are; it must not wait.
    """

    def __init__(
        self, models: Sequence[MAVISValueHeads], num_slots: int, device: torch.device
    ) -> None:
        self.device = device
        self.watch: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], None] | None = None
        self.objectives = tuple(name for model in models for name in model.config.objectives or ())
        self.hidden_size: int = models[0].config.base_hidden_size or 0
        self.models = [model.eval().requires_grad_(False).to(device) for model in models]
        self.weight_bytes = sum(x.nbytes for m in self.models for x in m.state_dict().values())
        self._scale = np.array(
            [
                scale
                for config in (model.config for model in models)
                for scale in config.candidate_scale or [1.0] * len(config.objectives or ())
            ],
            dtype=np.float32,
        )
        # A slot's weights; then beta, top_k, the KL budget, its temperature, and what it asks for.
        self._params = np.zeros((num_slots, len(self.objectives) + 5), dtype=np.float32)
        self._params[:, -4:-1] = 1, np.inf, 1
        self._on_device: torch.Tensor | None = None

    def start(self, slot: int, params: GuidanceParams) -> bool:
        """Begin a new sequence in `slot`; returns whether it is guided at all."""
        budget = np.inf if params.kl_budget is None else params.kl_budget
        asked = (params.beta, params.top_k, budget, params.temperature, params.guides * GUIDED)
        self._params[slot] = (*np.multiply(params.weights, self._scale), *asked)
        if params.value_of is not None:  # in the place of beta; a value has no scale
            self._params[slot] = (*params.weights, params.value_of, 1, np.inf, 1, VALUED)
        self._on_device = None
        return params.guides

    def stop_all(self) -> None:
        """Guide no slot until it is begun again."""
        self._params[:, -1] = 0
        self._on_device = None

    def plan(self, slots: np.ndarray) -> list[Rows]:
        """How to guide logits of which each row's slot, `[n]` int64, is known on the host.

        Rows go together with those whose number of candidates has the same next power of two, so
        that none pays for a much larger one.
        """
        asks, top_k = self._params[slots, -1], self._params[slots, -4].astype(np.int64)
        sizes = np.where(asks == GUIDED, np.ceil(np.log2(top_k)), -1 - asks)
        plans = []
        for size in np.unique(sizes[asks > 0]):
            index = np.flatnonzero(sizes == size)
            whole = len(index) == len(slots)
            plans.append(
                Rows(
                    None if whole else self._to_device(index),
                    self._to_device(slots[index].astype(np.int64)),
                    int(top_k[index].max()) if size >= 0 else 0,
                    bool((top_k[index] == top_k[index[0]]).all()),
                    bool(np.isfinite(self._params[slots[index], -3]).any()),
                )
            )
        return plans

    def plan_on_device(self, slots: torch.Tensor, among: np.ndarray) -> list[Rows]:
        """How to guide rows whose slots `[n]` only the device knows, to be `among` these."""
        guided, valued = (self._params[among, -1] == asks for asks in (GUIDED, VALUED))
        plans = []
        if guided.any():
            top_k = self._params[among, -4]
            largest = top_k[guided].max()
            limited = bool(np.isfinite(self._params[among, -3]).any())
            alike = bool((top_k[guided] == largest).all())
            plans.append(Rows(None, slots, int(largest), alike, limited, bool(guided.all())))
        if valued.any():
            plans.append(Rows(None, slots, 0, True, False, bool(valued.all())))
        return plans

    @torch.inference_mode()
    def log_probs(
        self, logits: torch.Tensor, hidden: torch.Tensor, rows: Rows
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The guided distribution of rows over their candidates.

        Args:
            logits: `[n, vocab]` float32, the base model's, masked entries `-inf`.
            hidden: `[n, hidden_size]`, what the output layer has read for them.
            rows: Their slots.

        Returns:
            `candidates` `[n, k]` int64, `log pi` `[n, k]` float32, normalised, and the log-sum-exp
            of the row's own candidates' logits `[n, 1]`.
        """
        params = self._params_of(rows)
        weights, (beta, top_k, budget, temperature, asks) = params[:, :-5], params[:, -5:].unbind(1)
        candidates, log_probs = top_candidates(
            logits, rows.max_k, None if rows.alike else top_k.long()
        )
        scores = self.scores(hidden, candidates, weights)[..., None]
        one, limit = torch.ones_like(weights[:, :1]), budget if rows.limited else None
        log_policy = guided_policy(log_probs, scores, one, beta, limit, temperature)
        if self.watch is not None:
            self.watch(log_policy, log_probs, None if rows.every else asks == GUIDED)
        # The first candidate is every row's own, whatever the largest k of the batch.
        scale = logits.gather(1, candidates[:, :1]) - log_probs[:, :1]
        return candidates, log_policy, scale

    @torch.inference_mode()
    def values(self, hidden: torch.Tensor, rows: Rows) -> torch.Tensor:
        """The weighted value `[n]` float32 of the token that each row asks of, after its prefix.

        Args:
            hidden: `[n, hidden_size]`.
            rows: Of `max_k` 0.
        """
        params = self._params_of(rows)
        # Rows that ask for no value may have any number there; what is read for them is not used.
        tokens = params[:, -5].long().clamp(0, len(self.models[0].action_table) - 1)[:, None]
        values = [model.candidate_values(hidden, tokens)[:, 0] for model in self.models]
        return (torch.cat(values, dim=1) * params[:, :-5]).sum(1)

    def _params_of(self, rows: Rows) -> torch.Tensor:
        if self._on_device is None:
            self._on_device = self._to_device(self._params.copy())
        return self._on_device[rows.slots]

    def scores(
        self, hidden: torch.Tensor, candidates: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """`sum_i w_i A_i(s, a)`, which guides as `Q` does.

        Args:
            hidden: `[n, hidden_size]`.
            candidates: `[n, k]` int64.
            weights: `[n, n_objectives]` float32.

        Returns:
            `[n, k]` float32.
        """
        total = torch.zeros(candidates.shape, device=candidates.device)
        start = 0
        for model in self.models:
            query = model.read_queries(hidden)  # [n, n_objectives, rank]
            chosen = weights[:, start : start + query.shape[1]]
            start += query.shape[1]
            # One vector for all objectives: weighted U against P, and the weights against b
            direction = torch.cat(((chosen[:, :, None] * query).sum(1), chosen), dim=1)
            rows = nn.functional.embedding(candidates, model.action_table).float()
            total += torch.bmm(rows, direction[:, :, None])[..., 0]
        return total

    def apply(
        self, logits: torch.Tensor, hidden: torch.Tensor, plans: Sequence[Rows]
    ) -> torch.Tensor:
        """Tilt the planned rows of `logits` `[n, vocab]` in place, of `hidden` `[n, hidden_size]`.

        Other rows stay bit-identical. The candidates keep their joint log-sum-exp, so that
        penalties which the host applies afterwards see logits of the scale that they were made for.
        Rows that ask for a value are left the one token that says it.
        """
        for rows in plans:
            part = logits if rows.index is None else logits[rows.index]
            read = hidden if rows.index is None else hidden[rows.index]
            if rows.max_k:
                candidates, log_policy, scale = self.log_probs(part, read, rows)
                tilted = log_policy + scale
            else:
                candidates = value_code(self.values(read, rows), part.shape[1])[:, None]
                tilted = torch.zeros_like(part[:, :1])
            if rows.every:
                part.fill_(-torch.inf).scatter_(1, candidates, tilted)
            else:
                asks = self._params_of(rows)[:, -1] == (GUIDED if rows.max_k else VALUED)
                new = torch.full_like(part, -torch.inf).scatter_(1, candidates, tilted)
                torch.where(asks[:, None], new, part, out=part)
            if rows.index is not None:
                logits[rows.index] = part
        return logits

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return to_device(torch.from_numpy(array), self.device)
