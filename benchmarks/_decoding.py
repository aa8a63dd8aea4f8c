"""Sampling from mixtures of models in lockstep, token by token, for the arms of `pareto.py`.

Every policy here is a distribution over the `top_k` likeliest tokens of the base model, which is
MAVIS's own definition: then the KL to the base model is finite and exact at every step, for all.
`log pi(a | s) = const + sum_j c_j log p_j(a | s)` over members `p_j`, or a `Guide`'s policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from trimtab.plugins.guide import Guide
from trimtab.plugins.policy import step_kl, top_candidates


@dataclass(frozen=True)
class Member:
    """A model of a mixture, the prompts that it reads, and its coefficient."""

    model: Any
    prompts: Sequence[list[int]]
    coefficient: float


@dataclass
class Sample:
    """Tokens of a response, its log-ratio to the base model and the exact KL summed over steps."""

    token_ids: list[int]
    log_ratio: float
    kl: float


class Stream:
    """One model's reading of a batch of sequences: every prompt `repeats` times, left-padded."""

    def __init__(self, model: Any, prompts: Sequence[list[int]], repeats: int) -> None:
        self.model = model
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64, device=model.device)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, longest - len(prompt) :] = torch.tensor(prompt)
            mask[i, longest - len(prompt) :] = 1
        self.cache = DynamicCache(config=model.config)
        self.mask = mask
        self.logits = self._read(ids, (mask.cumsum(1) - 1).clamp(min=0))
        if repeats > 1:  # a prompt is read once, however many responses it gets
            self.cache.batch_repeat_interleave(repeats)
            self.mask = self.mask.repeat_interleave(repeats, 0)
            self.logits = self.logits.repeat_interleave(repeats, 0)

    def append(self, tokens: torch.Tensor) -> None:
        """Read one more token `[rows]` of every sequence."""
        positions = self.mask.sum(1, keepdim=True)
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        self.logits = self._read(tokens[:, None], positions)

    def _read(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        output = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()  # [rows, vocab]


@torch.inference_mode()
def sample(
    base: Any,
    prompts: Sequence[list[int]],
    members: Sequence[Member] = (),
    guide: Guide | None = None,
    *,
    eos_token_id: int,
    top_k: int,
    max_tokens: int,
    seed: int,
    repeats: int = 1,
) -> list[Sample]:
    """Responses of a mixture or of a guided base model; without either, of the base model.

    Args:
        base: Causal language model whose likeliest tokens are the candidates.
        prompts: Token ids.
        members: Of the mixture. One whose model and prompts are the base's costs nothing extra.
        guide: A slot for every row, started with the request's parameters.
        eos_token_id: Ends a response.
        top_k: Number of candidates.
        max_tokens: Longest response.
        seed: Of all draws of this batch.
        repeats: Responses to each prompt.

    Returns:
        `len(prompts) * repeats` samples, those of one prompt side by side.
    """
    generator = torch.Generator(base.device).manual_seed(seed)
    stream = Stream(base, prompts, repeats)
    others = [
        stream
        if member.model is base and member.prompts == prompts
        else Stream(member.model, member.prompts, repeats)
        for member in members
    ]
    rows = len(prompts) * repeats
    texts = [list(prompt) for prompt in prompts for _ in range(repeats)]
    lengths = np.array([len(text) for text in texts])
    last = torch.tensor([text[-1] for text in texts], device=base.device)
    running = torch.ones(rows, dtype=torch.bool, device=base.device)
    total = torch.zeros(2, rows, device=base.device)  # log-ratio and KL
    taken, alive = [], []
    for _ in range(max_tokens):
        if guide is not None:
            candidates, log_policy, scale = guide.log_probs(
                stream.logits,
                np.arange(rows),
                lengths,
                last,
                lambda slot, start, stop: texts[slot][start:stop],
            )
            log_base = stream.logits.gather(1, candidates) - scale
        else:
            candidates, log_base = top_candidates(stream.logits, top_k)
            log_policy = log_base
            if members:
                # Logits are log-probabilities up to a constant of the row.
                mixed = sum(
                    member.coefficient * other.logits.gather(1, candidates)
                    for member, other in zip(members, others)
                )
                log_policy = torch.log_softmax(mixed, dim=-1)
        choice = torch.multinomial(log_policy.exp(), 1, generator=generator)
        ratio = (log_policy.gather(1, choice) - log_base.gather(1, choice))[:, 0]
        total += torch.stack([ratio, step_kl(log_policy, log_base)]) * running
        last = candidates.gather(1, choice)[:, 0]
        taken.append(last)
        alive.append(running)
        running = running & (last != eos_token_id)
        if not running.any():
            break
        for reader in {id(s): s for s in (stream, *others)}.values():
            reader.append(last)
        lengths = lengths + 1
        for text, token in zip(texts, last.tolist()):
            text.append(token)
    counts = torch.stack(alive).sum(0).tolist()
    tokens = torch.stack(taken, 1).tolist()
    return [
        Sample(row[:count], log_ratio, kl)
        for row, count, log_ratio, kl in zip(tokens, counts, *total.tolist())
    ]


def add_adapters(base: Any, folders: dict[str, float]) -> Any:
    """A copy of the base model with LoRA updates added, each times its coefficient.

    With coefficients that sum to 1 these are Rewarded Soups: the average of the merged models.
    """
    import copy

    from peft import LoraConfig
    from safetensors.torch import load_file

    model = copy.deepcopy(base)
    for folder, coefficient in folders.items():
        config = LoraConfig.from_pretrained(folder)
        scale = coefficient * config.lora_alpha / config.r
        tensors = load_file(f"{folder}/adapter_model.safetensors", device=str(base.device))
        with torch.inference_mode():
            for name, down in tensors.items():
                if not name.endswith("lora_A.weight"):
                    continue
                up = tensors[name.replace("lora_A", "lora_B")]
                target = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                weight = model.get_submodule(target).weight
                # In float32: several small updates to a bfloat16 weight would round away.
                merged = weight.float() + scale * (up.float() @ down.float())
                weight.copy_(merged)
    return model
