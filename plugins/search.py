"""Search with value models: best-of-N, and beams ranked by log-probability plus value.

Token-level guidance tilts every step of one response; search compares whole responses, or prefixes
of several. Both functions take a batch of prompts and a transformers model or a `vllm.LLM`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from .engine import GIB, ValueEngine
from .heads import MAVISValueHeads, are_heads
from .params import GuidanceParams, parse_weights
from .policy import top_candidates
from .sampling import TransformersHost, VLLMHost, as_list, left_padded, sample
from .transformers import check_base_model, left_padding, open_value_models
from .value_config import MAVISValueConfig, load_config
from .value_model import MAVISValueModel


@dataclass(frozen=True)
class SearchOutput:
    """The responses to every prompt, best first.

    Attributes:
        sequences: `[batch][n]` lists of token ids, without the prompt, with the end-of-sequence
            token of those that ended. A search that found or kept fewer than `n` returns fewer.
        scores: `[batch, n]` float32, by which they are ranked; `-inf` where there is none.
        values: `[batch, n, objectives]` float32, of the finished response under every objective,
            in standard deviations of its reward; NaN where it was not judged.
        log_probs: `[batch, n]` float32, of the response under the base model (beam search only).
        num_tokens: `[batch]` int64, tokens of all responses that were begun (best-of-N only).

    Example:

    ```python
    >>> from trimtab.plugins import best_of_n
    >>> asked = {"value_models": "VALUE_MODEL", "weights": {"readability": 1.0}}
    >>> found = best_of_n(model, **inputs, **asked, n=4, max_new_tokens=8)
    >>> best = [ranked[0] for ranked in found.sequences]
    >>> found.scores.shape, found.values.shape
    (torch.Size([2, 4]), torch.Size([2, 4, 2]))
    ```
    """

    sequences: list[list[list[int]]]
    scores: torch.Tensor
    values: torch.Tensor
    log_probs: torch.Tensor | None = None
    num_tokens: torch.Tensor | None = None


def best_of_n(
    generator: Any,
    input_ids: torch.Tensor | Sequence[Sequence[int]],
    attention_mask: torch.Tensor | None = None,
    *,
    n: int,
    value_models: Sequence[MAVISValueModel | MAVISValueHeads | str]
    | MAVISValueModel
    | MAVISValueHeads
    | str,
    weights: Mapping[str, float] | Sequence[float] | str,
    keep: Mapping[int, int] | None = None,
    reward_funcs: Mapping[str, Callable[..., Sequence[float]]] | None = None,
    tokenizer: Any = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
    dtype: torch.dtype | None = None,
    **generate_kwargs: Any,
) -> SearchOutput:
    """Sample `n` responses to every prompt and rank them by their weighted value or reward.

    Responses come from the base model, or from the token-guided policy if `generate_kwargs` say so.
    Value heads say on the way which of them fall behind: those are dropped as `keep` says, for
    about the best reward of all `n` at a part of their tokens.

    Args:
        generator: A transformers model, a `vllm.LLM`, or a function of the prompts' token ids and
            `n` that returns `[batch][n]` responses.
        input_ids: `[batch, length]` int64, padded on the left, or a list of token ids per prompt.
        attention_mask: `[batch, length]`, 1 for tokens and 0 for padding; with a padded tensor.
        n: Number of responses to a prompt.
        value_models: Value models, or folders or hub ids of them. The value of a response is that
            of its last token as the candidate at its prefix, whatever the head. Those of heads are
            read while the responses are sampled: with vLLM, from an `LLM` that guides by them.
        weights: Weight of each objective by name, absent ones 0; or a list in the models' order.
        keep: Early rejection, for heads: `{12: 8, 24: 4}` goes on after 12 tokens with the 8
            responses to a prompt that have the highest weighted value, after 24 with 4. Those that
            have ended by then stay, and take no other's place. Needs `max_new_tokens` with
            transformers. With vLLM a response goes on in a further request, so the `LLM` should
            have `enable_prefix_caching` on.
        reward_funcs: By objective, functions with the signature of TRL's GRPO reward functions,
            `f(prompts, completions, completion_ids, **columns)`: judge by them instead,
            standardised with the value models' `reward_mean` and `reward_std`.
        tokenizer: Decodes the responses for the reward functions.
        columns: For the reward functions, further arguments with one entry per prompt. `prompts`
            among them replaces the decoded prompts; where they are conversations, completions are
            conversations too.
        dtype: Of the value models; by default float32 on a CPU and bfloat16 elsewhere. Heads are
            float32.
        generate_kwargs: For `generator.generate`. With transformers sampling is on unless they say
            otherwise, and a `MAVISLogitsProcessor` among `logits_processor` is given the batch's
            mask. With vLLM: `sampling_params`, a `SamplingParams` whose `n` is replaced.

    Returns:
        All `n` responses of every prompt, or those that were kept, ranked.

    Raises:
        ValueError: An argument is out of range or missing, an objective is unknown or has no reward
            function, or a value model does not fit.
        TypeError: `generator` is none of the three.

    Example:

    ```python
    >>> from trimtab.plugins import best_of_n
    >>> found = best_of_n(
    ...     model, **inputs, n=24, value_models="VALUE_MODEL", weights={"readability": 1.0},
    ...     keep={3: 10, 6: 8, 12: 6}, max_new_tokens=48, top_k=40,
    ... )
    >>> texts = tokenizer.batch_decode([ranked[0] for ranked in found.sequences])
    ```
    """
    _at_least_one("n", n)
    prompts = _prompts(input_ids, attention_mask)
    if isinstance(value_models, (str, MAVISValueModel, MAVISValueHeads)):
        value_models = [value_models]
    if not value_models:
        raise ValueError("value_models is empty: give at least one value model")
    configs = [load_config(m) if isinstance(m, str) else m.config for m in value_models]
    objectives = [name for config in configs for name in config.objectives or ()]
    weight = torch.tensor(parse_weights(weights, objectives))
    if not weight.any():
        raise ValueError(f"weights are all 0: give at least one of {objectives} another weight")
    if reward_funcs is not None:
        weighted = [name for name, w in zip(objectives, weight.tolist()) if w]
        if missing := [name for name in weighted if name not in reward_funcs]:
            raise ValueError(f"reward_funcs has no function for {missing}, got {[*reward_funcs]}")
        if tokenizer is None:
            raise ValueError("reward_funcs judge text: give the tokenizer that decodes it")
    if keep is not None and any(config.head_type != "hidden" for config in configs):
        raise ValueError(
            "keep drops responses by values that cost nothing, and the value models for "
            f"{objectives} have a backbone: train heads (head_type 'hidden')"
        )
    rounds = _rounds(keep, n)
    models: list[Any] = []
    if reward_funcs is None or rounds:  # else no value is read
        make_engine, models = _open(value_models, dtype, generator)
    heads = models if are_heads(models) else []
    host = _host(generator, prompts, n, heads, weight, rounds, generate_kwargs)
    if host is not None:
        read_all = bool(heads) and reward_funcs is None
        found, num_tokens = sample(host, len(prompts), n, rounds, weight, read_all)
        responses = [[response.tokens for response in of_prompt] for of_prompt in found]
    else:
        responses = generator(prompts, n)
        if len(responses) != len(prompts) or any(len(of_prompt) != n for of_prompt in responses):
            raise ValueError(
                f"the generator must return {n} responses to each of {len(prompts)} prompts, got "
                f"{[len(of_prompt) for of_prompt in responses]}"
            )
        num_tokens = torch.tensor([sum(map(len, of_prompt)) for of_prompt in responses])
    flat = [(i, response) for i, of_prompt in enumerate(responses) for response in of_prompt]
    if reward_funcs is not None:
        judged = _rewards(reward_funcs, configs, tokenizer, columns or {}, prompts, flat)
    elif heads:
        judged = torch.stack([r.values for of_prompt in found for r in of_prompt])
    else:
        judged = _final_values(make_engine, [prompts[i] + response for i, response in flat])
    values = torch.full((len(prompts), n, len(objectives)), math.nan)
    scores = torch.full((len(prompts), n), -math.inf)
    rows = torch.tensor([i for i, _ in flat])
    ranks = torch.tensor([rank for of_prompt in responses for rank in range(len(of_prompt))])
    values[rows, ranks] = judged
    scores[rows, ranks] = judged.nan_to_num() @ weight
    order = scores.argsort(dim=1, descending=True, stable=True)
    return SearchOutput(
        sequences=[
            [of[i] for i in ranks[: len(of)]] for of, ranks in zip(responses, order.tolist())
        ],
        scores=scores.gather(1, order),
        values=values.gather(1, order[..., None].expand_as(values)),
        num_tokens=num_tokens,
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
    _at_least_one("num_beams", num_beams)
    _at_least_one("max_new_tokens", max_new_tokens)
    prompts = _prompts(input_ids, attention_mask)
    make_engine, models = _open(value_models, dtype, model)
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
    propose = (_VLLMProposer if _is_vllm(model) else _TransformersProposer)(model, params.top_k)
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
        parameters = inspect.signature(model.forward).parameters
        self.cache_name = "cache" if "cache" in parameters else "past_key_values"  # before 5.24
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


def _host(
    generator: Any,
    prompts: list[list[int]],
    n: int,
    heads: list[MAVISValueHeads],
    weight: torch.Tensor,
    rounds: list[tuple[int, int]],
    options: dict[str, Any],
) -> TransformersHost | VLLMHost | None:
    """What samples, None if the generator is a function."""
    if _is_vllm(generator):
        configs = [model.config for model in heads]
        return VLLMHost(generator, prompts, n, configs, weight, rounds, options)
    if hasattr(generator, "generate"):
        return TransformersHost(generator, prompts, heads, rounds, options)
    if not callable(generator):
        raise TypeError(
            "generator must be a transformers model, a vllm.LLM or a function of the prompts and "
            f"n, got {generator!r}"
        )
    if options:
        raise ValueError(f"{sorted(options)} are for `generate`, which a function does not have")
    if heads:
        raise ValueError(
            "value heads read the model that samples, which a function does not show: give a "
            "transformers model or a vllm.LLM, or judge by reward_funcs without keep"
        )
    return None


def _rounds(keep: Mapping[int, int] | None, n: int) -> list[tuple[int, int]]:
    """`keep` in order, without what drops nothing."""
    rounds: list[tuple[int, int]] = []
    if not isinstance(keep, (Mapping, type(None))):
        raise ValueError(f"keep must map numbers of tokens to numbers of responses, got {keep!r}")
    for length, count in (keep or {}).items():
        _at_least_one("a number of tokens in keep", length)
        _at_least_one(f"keep[{length}]", count)
    before = n
    for length, count in sorted((keep or {}).items()):
        if count > before:
            raise ValueError(
                f"keep[{length}] must be at most {before}, the number of responses that there are "
                f"by then, got {count}"
            )
        if count < before:
            rounds.append((length, count))
        before = count
    return rounds


def _final_values(make_engine: Callable[..., ValueEngine], texts: list[list[int]]) -> torch.Tensor:
    """Values `[len(texts), objectives]` float32 of finished texts."""
    lengths = np.array([len(text) - 1 for text in texts])
    engine = make_engine(num_slots=len(texts), max_length=int(lengths.max()))
    last = torch.tensor([text[-2:] for text in texts], device=engine.device)
    values = engine.values(
        np.arange(len(texts)),
        lengths,
        last[:, 0],
        last[:, 1:],
        lambda slot, start, stop: texts[slot][start:stop],
    )
    return values[:, 0].cpu()


def _rewards(
    reward_funcs: Mapping[str, Callable[..., Sequence[float]]],
    configs: Sequence[MAVISValueConfig],
    tokenizer: Any,
    columns: Mapping[str, Sequence[Any]],
    prompts: list[list[int]],
    responses: list[tuple[int, list[int]]],
) -> torch.Tensor:
    """Standardised rewards `[len(responses), objectives]`, float32; NaN where there is no function.

    `responses` are pairs with the index of the prompt.
    """
    columns = {"prompts": tokenizer.batch_decode(prompts, skip_special_tokens=True), **columns}
    for name, column in columns.items():
        if len(column) != len(prompts):
            raise ValueError(
                f"columns[{name!r}] has {len(column)} entries for {len(prompts)} prompts"
            )
    repeated = {name: [column[i] for i, _ in responses] for name, column in columns.items()}
    completion_ids = [response for _, response in responses]
    completions = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    if not isinstance(columns["prompts"][0], str):
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    judged = []
    for config in configs:
        for name, mean, std in zip(config.objectives, config.reward_mean, config.reward_std):  # type: ignore[arg-type]
            if name not in reward_funcs:
                judged.append([math.nan] * len(responses))
                continue
            rewards = reward_funcs[name](
                completions=completions, completion_ids=completion_ids, **repeated
            )
            rewards = [float(reward) for reward in rewards]
            if len(rewards) != len(responses) or not all(map(math.isfinite, rewards)):
                raise ValueError(
                    f"reward function {name!r} must return a finite number for each of "
                    f"{len(responses)} completions, got {rewards}"
                )
            judged.append([(reward - mean) / std for reward in rewards])
    return torch.tensor(judged).T


def _prompts(
    input_ids: torch.Tensor | Sequence[Sequence[int]], attention_mask: torch.Tensor | None
) -> list[list[int]]:
    """The prompts without their padding."""
    if not isinstance(input_ids, torch.Tensor):
        if attention_mask is not None:
            raise ValueError("attention_mask belongs to a padded tensor, but input_ids is a list")
        prompts = [list(prompt) for prompt in input_ids]
    elif attention_mask is None and len(input_ids) > 1:
        # Padding tokens do not tell: they may be the end-of-sequence token.
        raise ValueError("input_ids of several prompts need the attention_mask that belongs to it")
    elif attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask of shape {list(attention_mask.shape)} does not belong to input_ids of "
            f"shape {list(input_ids.shape)}"
        )
    else:
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = zip(input_ids.tolist(), left_padding(real).tolist())
        prompts = [row[padding:] for row, padding in rows]
    if not prompts or not all(prompts):
        raise ValueError("input_ids must hold at least one prompt, and each at least one token")
    return prompts


def _open(
    value_models: Sequence[MAVISValueModel | MAVISValueHeads | str]
    | MAVISValueModel
    | MAVISValueHeads
    | str,
    dtype: torch.dtype | None,
    generator: Any,
) -> tuple[Callable[..., ValueEngine], list[Any]]:
    """What makes an engine of the value models beside the generator, and they themselves."""
    if hasattr(generator, "device"):
        device = torch.device(generator.device)
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    models = open_value_models(value_models, dtype)
    vocab_size = None
    if _is_vllm(generator):
        vocab_size = generator.llm_engine.model_config.get_vocab_size()
    elif hasattr(generator, "config"):
        vocab_size = generator.config.get_text_config().vocab_size
    for model in models:
        if vocab_size not in (None, model.config.vocab_size):
            raise ValueError(
                f"the value model for {model.config.objectives} has a vocabulary of "
                f"{model.config.vocab_size} tokens, the base model has {vocab_size}: "
                "train value models on this base model"
            )
        if model.config.head_type == "hidden" and hasattr(generator, "config"):
            check_base_model(model.config, generator)
    make_engine = partial(ValueEngine, models, device=device, dtype=dtype, kv_cache_memory=GIB)
    return make_engine, models


def _is_vllm(generator: Any) -> bool:
    return hasattr(generator, "llm_engine")


def _eos_token_ids(model: Any) -> list[int]:
    if _is_vllm(model):
        stop = model.get_default_sampling_params().stop_token_ids or []
        return [model.get_tokenizer().eos_token_id, *stop]
    return as_list(model.generation_config.eos_token_id)


def _at_least_one(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
