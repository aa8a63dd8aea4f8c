"""Best-of-N: whole responses, ranked by their final value or by reward functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..engine import ValueEngine
from ..heads import MAVISValueHeads, are_heads
from ..params import parse_weights
from ..value_config import MAVISValueConfig, load_config
from ..value_model import MAVISValueModel
from .interface import SearchOutput, at_least_one, is_vllm, open_beside, read_prompts
from .sampling import TransformersHost, VLLMHost, sample


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
    at_least_one("n", n)
    prompts = read_prompts(input_ids, attention_mask)
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
        make_engine, models = open_beside(value_models, dtype, generator)
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
    if is_vllm(generator):
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
        at_least_one("a number of tokens in keep", length)
        at_least_one(f"keep[{length}]", count)
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
