"""MAVIS as its paper describes it (arXiv 2508.13415), plainly on transformers: the yardstick.

Every objective has a value model of its own with a state head; at each step they value the `k`
likeliest tokens one model after another. Both published forms: a cache of `k` copies of the
sequence, and one cache with the candidates behind it (tree attention). It has padding masks, and
leaves out what the published code wastes (`k` prefills of one prompt, the logits of all prompt
positions, values copied to the host), so it is a little faster than that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from trimtab.plugins import MAVISValueModel


class Tree:
    """Values by tree attention: each candidate sees the cached prefix and itself."""

    def __init__(self, model: MAVISValueModel) -> None:
        self.model = model
        self.cache = DynamicCache()

    def values(
        self, new: torch.Tensor, mask: torch.Tensor, candidates: torch.Tensor
    ) -> torch.Tensor:
        """Value of every candidate.

        Args:
            new: `[batch, n]`, the prefix's tokens since the last call.
            mask: `[batch, length]` bool, which tokens of the prefix are not padding.
            candidates: `[batch, k]`.

        Returns:
            `[batch, k]` float32.
        """
        (batch, n), length, k = new.shape, mask.shape[1], candidates.shape[1]
        visible = torch.zeros(batch, n + k, length + k, dtype=torch.bool, device=new.device)
        visible[:, :n, :length] = visible.new_ones(n, length).tril(length - n)
        visible[:, n:, :length] = True
        visible[:, :, :length] &= mask[:, None]
        visible[:, n:, length:] = torch.eye(k, dtype=torch.bool, device=new.device)
        dtype = self.model.dtype
        bias = torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
        hidden = self.model.backbone(
            input_ids=torch.cat((new, candidates), dim=1),
            attention_mask=bias[:, None],
            position_ids=torch.cat(
                (positions(mask)[:, -n:], mask.sum(1, keepdim=True).expand(-1, k)), dim=1
            ),
            past_key_values=self.cache,
        ).last_hidden_state[:, n:]
        self.cache.crop(length - self.cache.get_seq_length())  # negative: so many tokens fewer
        return self.model.read_head(hidden)[..., 0]


class Copies:
    """Values by `k` copies of the sequence, each with its cache; the chosen one is copied again."""

    def __init__(self, model: MAVISValueModel) -> None:
        self.model = model
        self.cache = DynamicCache()
        self.candidates: torch.Tensor | None = None

    def values(
        self, new: torch.Tensor, mask: torch.Tensor, candidates: torch.Tensor
    ) -> torch.Tensor:
        """As `Tree.values`; after the first call `new` is the chosen candidate of each row."""
        batch, k = candidates.shape
        if self.candidates is None:
            self.model.backbone(
                input_ids=new,
                attention_mask=mask.long(),
                position_ids=positions(mask),
                past_key_values=self.cache,
            )
        else:
            chosen = (self.candidates == new).long().argmax(1)
            first = torch.arange(batch, device=new.device) * self.candidates.shape[1]
            self.cache.batch_select_indices(first + chosen)
        self.cache.batch_repeat_interleave(k)
        self.candidates = candidates
        copies = torch.nn.functional.pad(mask, (0, 1), value=True).repeat_interleave(k, dim=0)
        hidden = self.model.backbone(
            input_ids=candidates.reshape(-1, 1),
            attention_mask=copies.long(),
            position_ids=positions(copies)[:, -1:],
            past_key_values=self.cache,
        ).last_hidden_state[:, 0]
        return self.model.read_head(hidden).view(batch, k)


FORMS = {"tree": Tree, "copies": Copies}


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Position of every token of left-padded rows `[batch, length]`."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens `[batch, length]` and which of them are not padding."""
    longest = max(map(len, prompts))
    rows = [[0] * (longest - len(p)) + list(p) for p in prompts]
    mask = [[False] * (longest - len(p)) + [True] * len(p) for p in prompts]
    return torch.tensor(rows), torch.tensor(mask)


@torch.inference_mode()
def generate(
    base: PreTrainedModel,
    models: Sequence[MAVISValueModel],
    prompts: Sequence[Sequence[int]],
    *,
    weights: Sequence[float],
    beta: float,
    top_k: int,
    max_tokens: int,
    form: str = "tree",
    greedy: bool = False,
) -> Iterator[torch.Tensor]:
    """The guided responses, a token `[batch]` of each at a time; none ends before `max_tokens`."""
    new, mask = left_padded(prompts)
    cache = DynamicCache()
    forms = [FORMS[form](model) for model in models]
    for _ in range(max_tokens):
        logits = base(
            input_ids=new,
            attention_mask=mask.long(),
            position_ids=positions(mask)[:, -new.shape[1] :],
            past_key_values=cache,
            logits_to_keep=1,
        ).logits[:, -1]
        scores, candidates = logits.float().topk(top_k)
        for weight, values in zip(weights, forms):  # one objective after another
            scores = scores + beta * weight * values.values(new, mask, candidates)
        if greedy:
            choice = scores.argmax(1, keepdim=True)
        else:
            choice = torch.multinomial(scores.softmax(1), 1)
        new = candidates.gather(1, choice)
        mask = torch.nn.functional.pad(mask, (0, 1), value=True)
        yield new[:, 0]
