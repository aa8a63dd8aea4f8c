"""Beam search: prefixes, ranked by log-probability plus value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from ..engine import ValueEngine
from ..heads import are_heads
from ..params import GuidanceParams, parse_weights
from ..policy import top_candidates
from ..value_model import MAVISValueModel
from .interface import (
    SearchOutput,
    as_list,
    at_least_one,
    cache_name,
    is_vllm,
    left_padded,
    open_beside,
    read_prompts,
)


@torch.inference_mode()
def beam_search(
    model: Any,
    input_ids: torch.Tensor | Sequence[Sequence[int]],
    attention_mask: torch.Tensor | None = None,
    *,
    value_models: Sequence[MAVISValueModel | str] | MAVISValueModel | str,
    weights: Mapping[str, float] | Sequence[float] | str,
    beta: float = 1.0,
    num_beams: int = 4,
    max_new_tokens: int = 128,
    top_k: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> SearchOutput:
    """Search for the response of the highest `log pi_ref(y) + beta * sum_i w_i V_i(y)`.

    If the values are exact this is the mode of the policy that guidance samples from. A step values
    the `top_k` continuations of every beam in one pass. Of a prompt's, the `num_beams` best that go
    on are the next beams; those among the `num_beams` best that end are kept with their final
    value. A prompt is done when `num_beams` are kept and no beam is better.

    Beams compete with beams of their own length, and one that has ended takes no other's place:
    short responses, which are likelier, do not crowd out the others, and the ranking needs no
    length normalisation.

    Args:
        model: A transformers causal decoder, or a `vllm.LLM`. That one needs `max_logprobs` of at
            least `top_k` and is asked for one token of every beam at a time, so it should have
            `enable_prefix_caching` on.
        input_ids: `[batch, length]` int64, padded on the left, or a list of token ids per prompt.
        attention_mask: `[batch, length]`, 1 for tokens and 0 for padding; with a padded tensor.
        value_models: Value models, or folders or hub ids of them.
        weights: Weight of each objective by name, absent ones 0; or a list in the models' order.
        beta: Weight of the value against the log-probability, in nats per standard deviation.
        num_beams: Number of beams of a prompt.
        max_new_tokens: Longest response, in tokens.
        top_k: Candidates of a beam, over which `pi_ref` is normalised; by default the number the
            value models were made for.
        eos_token_id: Tokens that end a response; by default the model's.
        dtype: Of the value models; by default float32 on a CPU and bfloat16 elsewhere.

    Returns:
        Up to `num_beams` responses of every prompt, ranked.

    Raises:
        ValueError: An argument is out of range, an objective is unknown, or a value model does not
            fit or has no backbone.

    Example:

    ```python
    >>> from trimtab.plugins import beam_search
    >>> found = beam_search(
    ...     model, **inputs, value_models="STATE_MODEL", weights={"readability": 1.0}, beta=4.0,
    ...     num_beams=4, max_new_tokens=8,
    ... )
    >>> texts = tokenizer.batch_decode([ranked[0] for ranked in found.sequences])
    >>> found.log_probs.shape  # [batch, num_beams]
    torch.Size([2, 4])
    ```
    """
    at_least_one("num_beams", num_beams)
    at_least_one("max_new_tokens", max_new_tokens)
    prompts = read_prompts(input_ids, attention_mask)
    make_engine, models = open_beside(value_models, dtype, model)
    if are_heads(models):
        raise ValueError(
            "beam_search values candidates by a model that has a backbone (head_type 'state'), and "
            f"these are heads: {[list(m.config.objectives) for m in models]}"
        )
    configs = [m.config for m in models]
    objectives = [name for config in configs for name in config.objectives or ()]
    params = GuidanceParams(
        weights=parse_weights(weights, objectives),
        beta=beta,
        top_k=max(config.top_k for config in configs) if top_k is None else top_k,
    )
    eos_ids = _eos_token_ids(model) if eos_token_id is None else as_list(eos_token_id)
    eos = torch.tensor(eos_ids, dtype=torch.int64)
    engine = make_engine(
        num_slots=len(prompts) * num_beams, max_length=max(map(len, prompts)) + max_new_tokens
    )
    propose = (_VLLMProposer if is_vllm(model) else _TransformersProposer)(model, params.top_k)
    slots = _Slots(engine, prompts, num_beams)
    weight = beta * torch.tensor(params.weights) * torch.tensor(engine.candidate_scale)
    live = [_Beam(i, [], row=i) for i in range(len(prompts))]
    ended: list[list[_Beam]] = [[] for _ in prompts]  # the best `num_beams` of each, best first
    for length in range(1, max_new_tokens + 1):
        texts = [prompts[beam.prompt] + beam.response for beam in live]
        candidates, steps = propose(texts, [beam.row for beam in live])
        values = slots.values(live, texts, candidates).cpu()
        log_probs = torch.tensor([beam.log_prob for beam in live])[:, None] + steps.cpu()
        candidates = candidates.cpu()
        ends = torch.isin(candidates, eos) | (length == max_new_tokens)
        step = _Step(live, candidates, log_probs, values, log_probs + values @ weight, ends)
        live, first = [], 0
        for prompt, group in groupby(step.parents, key=attrgetter("prompt")):
            rows = slice(first, first + len(list(group)))
            first = rows.stop
            found = [beam for beam in step.best(rows, num_beams) if beam.ended]
            found += ended[prompt]
            ended[prompt] = sorted(found, key=attrgetter("score"), reverse=True)[:num_beams]
            going_on = step.best(rows, num_beams, going_on=True)
            full = len(ended[prompt]) == num_beams
            if going_on and not (full and going_on[0].score <= ended[prompt][-1].score):
                live += going_on
        if not live:
            break

    def table(rows: list[list[Any]], fill: Any) -> torch.Tensor:
        return torch.tensor([row + [fill] * (num_beams - len(row)) for row in rows])

    return SearchOutput(
        sequences=[[beam.response for beam in beams] for beams in ended],
        scores=table([[beam.score for beam in beams] for beams in ended], -math.inf),
        values=table(
            [[beam.values for beam in beams] for beams in ended],
            [math.nan] * len(objectives),
        ),
        log_probs=table([[beam.log_prob for beam in beams] for beams in ended], -math.inf),
    )


@dataclass
class _Beam:
    """A response in the making; `row` is its parent's among the beams of the step before."""

    prompt: int
    response: list[int]
    row: int
    log_prob: float = 0.0
    score: float = 0.0
    values: list[float] = field(default_factory=list)  # [objectives]
    ended: bool = False


@dataclass(frozen=True)
class _Step:
    """All continuations of the beams by a token, `[beams, k]` each."""

    parents: list[_Beam]
    candidates: torch.Tensor
    log_probs: torch.Tensor
    values: torch.Tensor  # [beams, k, objectives]
    scores: torch.Tensor
    ends: torch.Tensor

    def best(self, rows: slice, count: int, going_on: bool = False) -> list[_Beam]:
        """The `count` best continuations of some parents, best first; with `going_on`, of those
        that do not end."""
        scores = self.scores[rows]
        if going_on:
            scores = scores.masked_fill(self.ends[rows], -math.inf)
        top, index = scores.flatten().topk(min(count, scores.numel()))
        beams = []
        for i in index[top > -math.inf].tolist():
            at = rows.start + i // scores.shape[1], i % scores.shape[1]
            parent = self.parents[at[0]]
            beams.append(
                _Beam(
                    parent.prompt,
                    [*parent.response, int(self.candidates[at])],
                    at[0],
                    float(self.log_probs[at]),
                    float(self.scores[at]),
                    self.values[at].tolist(),
                    bool(self.ends[at]),
                )
            )
        return beams


class _Slots:
    """The engine's slots, `num_beams` a prompt, as beams fork and are dropped.

    One child of a beam goes on in its slot. Any other takes a slot of its prompt that is free, cut
    to what the two have in common; the engine reads the rest again, which is short, because the
    beams of a prompt soon have a common ancestor.
    """

    def __init__(self, engine: ValueEngine, prompts: list[list[int]], num_beams: int) -> None:
        self.engine, self.num_beams = engine, num_beams
        self.texts: dict[int, list[int]] = {}  # what the engine has read of every slot
        self.of_row: list[int] = [i * num_beams for i in range(len(prompts))]

    def values(
        self, beams: list[_Beam], texts: list[list[int]], candidates: torch.Tensor
    ) -> torch.Tensor:
        """Values `[beams, k, objectives]` of `candidates` `[beams, k]` after the beams' `texts`."""
        slots: dict[int, int] = {}  # to beam
        forks = []
        for i, beam in enumerate(beams):
            slot = self.of_row[beam.row]
            if slot in slots:
                forks.append(i)
            else:
                slots[slot] = i
        for i in forks:
            first = beams[i].prompt * self.num_beams
            slot = next(s for s in range(first, first + self.num_beams) if s not in slots)
            slots[slot] = i
            known = self.texts.get(slot, [])
            differs = (n for n, (a, b) in enumerate(zip(known, texts[i])) if a != b)
            self.engine.truncate(slot, next(differs, min(len(known), len(texts[i]))))
        self.of_row = sorted(slots, key=slots.__getitem__)
        self.texts.update(zip(self.of_row, texts))
        return self.engine.values(
            np.array(self.of_row),
            np.array([len(text) for text in texts]),
            torch.tensor([text[-1] for text in texts], device=self.engine.device),
            candidates.to(self.engine.device),
            lambda slot, start, stop: self.texts[slot][start:stop],
        )


class _TransformersProposer:
    """The likeliest next tokens by a transformers model, whose cache follows the beams."""

    def __init__(self, model: Any, top_k: int) -> None:
        self.model, self.top_k = model, top_k
        self.cache: Any = None
        self.cache_name = cache_name(model)
        self.mask = torch.zeros((0, 0))  # [rows, length] of the last step

    def __call__(
        self, texts: list[list[int]], parents: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Candidates `[rows, k]` of `texts`, and log-probabilities normalised over them.

        Args:
            texts: Prompts at first; then every text is one of the last call and a token more.
            parents: Which one.
        """
        if self.cache is None:
            input_ids, self.mask = left_padded(texts, self.model.device)
        else:
            input_ids = torch.tensor([text[-1:] for text in texts], device=self.model.device)
            if parents != list(range(len(self.mask))):
                rows = torch.tensor(parents, device=self.model.device)
                self.cache.reorder_cache(rows)
                self.mask = self.mask[rows]
            self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        output = self.model(
            input_ids=input_ids,
            attention_mask=self.mask,
            position_ids=(self.mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :],
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_name: self.cache},
        )
        self.cache = output[self.cache_name]
        return top_candidates(output.logits[:, -1].float(), self.top_k)


class _VLLMProposer:
    """The likeliest next tokens by vLLM: a request of one token a beam, over its prefix cache."""

    def __init__(self, llm: Any, top_k: int) -> None:
        from vllm import SamplingParams

        config = llm.llm_engine.model_config
        if 0 <= config.max_logprobs < top_k:
            raise ValueError(
                f"top_k {top_k} is above the LLM's max_logprobs {config.max_logprobs}: make it "
                f"with LLM(..., max_logprobs={top_k})"
            )
        if config.logprobs_mode != "raw_logprobs":
            raise ValueError(
                "beams are ranked by the base model's log-probabilities, which an LLM of "
                f"logprobs_mode {config.logprobs_mode!r} does not return: make it with "
                "'raw_logprobs'"
            )
        self.llm, self.top_k = llm, top_k
        self.params = SamplingParams(
            temperature=0,
            max_tokens=1,
            logprobs=top_k,
            detokenize=False,
            extra_args={"mavis_beta": 0},  # the server's own guidance, if any, is not asked for
        )

    def __call__(
        self, texts: list[list[int]], parents: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = [{"prompt_token_ids": text} for text in texts]
        outputs = self.llm.generate(inputs, self.params, use_tqdm=False)
        rows = [list(output.outputs[0].logprobs[0].items())[: self.top_k] for output in outputs]
        candidates = torch.tensor([[token for token, _ in row] for row in rows])
        steps = torch.tensor([[found.logprob for _, found in row] for row in rows])
        return candidates, steps.log_softmax(-1)


def _eos_token_ids(model: Any) -> list[int]:
    if is_vllm(model):
        stop = model.get_default_sampling_params().stop_token_ids or []
        return [model.get_tokenizer().eos_token_id, *stop]
    return as_list(model.generation_config.eos_token_id)
