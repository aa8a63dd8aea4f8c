"""Responses sampled in rounds, between which those whose value has fallen behind are dropped.

Heads on the base model's hidden state say, at no further pass, how a response that is being sampled
will be rewarded. A host, transformers or vLLM, takes responses up where they are and reads their
values; `sample` decides which go on.
"""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import LogitsProcessor

from ..heads import MAVISValueHeads, value_of_code
from ..hidden_states import OutputLayerInput
from ..transformers import MAVISLogitsProcessor
from ..value_config import MAVISValueConfig
from .interface import as_list, cache_name, left_padded

# What a host counts from where a call begins, which a round is not the first token of.
COUNTED = {
    "transformers": (
        "min_new_tokens", "exponential_decay_length_penalty", "begin_suppress_tokens",
        "stop_strings",
    ),
    "vllm": ("min_tokens", "presence_penalty", "frequency_penalty", "structured_outputs", "stop"),
}  # fmt: skip


@dataclass(eq=False)
class Response:
    """A response in the making.

    Attributes:
        prompt: Index of its prompt.
        tokens: What there is of it, with the token that ended it.
        ended: Whether it has ended by itself.
        values: `[objectives]` float32, of its last token at its prefix; empty until they are read.
        row: Its row among those of the host's last round.
    """

    prompt: int
    tokens: list[int] = field(default_factory=list)
    ended: bool = False
    values: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    row: int = -1


class Host(Protocol):
    """What samples."""

    def go_on(self, responses: list[Response], count: int | None) -> None:
        """Lengthens responses, in place.

        Args:
            responses: At first empty ones, as many of each prompt, prompt by prompt; then some of
                the last round's that have not ended.
            count: At most so many tokens each; None for as many as the caller's options allow.
        """

    def read(self, responses: list[Response]) -> None:
        """Sets the `values` of responses of the last round."""


def sample(
    host: Host,
    num_prompts: int,
    n: int,
    keep: Sequence[tuple[int, int]],
    weight: torch.Tensor,
    read_all: bool,
) -> tuple[list[list[Response]], torch.Tensor]:
    """Samples `n` responses to every prompt, fewer and fewer of which go on.

    Args:
        host: Where they are sampled.
        num_prompts: Number of prompts.
        n: Number of responses to each that begin.
        keep: After how many tokens how many of a prompt's responses go on: those of the highest
            weighted value, the first of equals. Those that have ended cost nothing more; they stay,
            and take no other's place.
        weight: `[objectives]` float32.
        read_all: Whether the values of those that are returned are read, too.

    Returns:
        Of every prompt the responses that were not dropped, and the number of tokens of all that
        began, `[num_prompts]` int64.
    """
    kept = [[Response(i) for _ in range(n)] for i in range(num_prompts)]
    begun, length = [list(of) for of in kept], 0
    for checkpoint, count in [*keep, (None, n)]:
        live = [response for of in kept for response in of if not response.ended]
        if not live:
            break
        host.go_on(live, None if checkpoint is None else checkpoint - length)
        host.read([r for r in live if read_all or (checkpoint is not None and not r.ended)])
        if checkpoint is None:
            break
        length = checkpoint
        for of in kept:
            going_on = [response for response in of if not response.ended]
            going_on.sort(key=lambda r: float(r.values.nan_to_num() @ weight), reverse=True)
            for response in going_on[count:]:
                of.remove(response)
    tokens = [sum(len(response.tokens) for response in of) for of in begun]
    return kept, torch.tensor(tokens)


class TransformersHost:
    """Sampling by `model.generate`, each call with the key-value store of the last.

    Args:
        model: A causal decoder.
        prompts: Token ids.
        heads: Heads on its hidden state whose values are read; none if they are not.
        rounds: See `sample`; empty if all responses go on to the end.
        options: For `generate`.

    Raises:
        ValueError: Options do not go with rounds.
    """

    def __init__(
        self,
        model: Any,
        prompts: list[list[int]],
        heads: Sequence[MAVISValueHeads],
        rounds: Sequence[tuple[int, int]],
        options: dict[str, Any],
    ) -> None:
        self.model, self.prompts, self.rounds = model, prompts, bool(rounds)
        self.heads = [head.eval().requires_grad_(False).to(model.device) for head in heads]
        self.options = {"do_sample": True, **options}
        self.limit: Any = options.get("max_new_tokens")
        if rounds:
            _refuse_counted("transformers", options)
            if self.limit is None:
                raise ValueError("keep needs max_new_tokens, of which it takes a part")
            _check_last(rounds, self.limit)
        eos = self.options.get("eos_token_id", model.generation_config.eos_token_id)
        self.eos = as_list(eos)
        if self.eos:  # never seen: what follows the end is cut off
            self.options.setdefault("pad_token_id", self.eos[0])
        self.cache_name = cache_name(model)
        self.cache: Any = None
        self.ids = self.mask = torch.zeros((0, 0), dtype=torch.int64)  # [rows, length]
        self.hidden = torch.zeros((0, 0))  # [rows, hidden_size], of each row's last token
        self.done = 0

    def go_on(self, responses: list[Response], count: int | None) -> None:
        """See [`Host`]."""
        options = dict(self.options)
        if not self.done:
            texts = [self.prompts[response.prompt] for response in responses]
            self.ids, self.mask = left_padded(texts, self.model.device)
        else:
            rows = torch.tensor([r.row for r in responses], device=self.model.device)
            self.ids, self.mask = self.ids[rows], self.mask[rows]
            if self.cache is not None:
                self.cache.reorder_cache(rows)
                options[self.cache_name] = self.cache
        if count is not None or self.done:
            options["max_new_tokens"] = self.limit - self.done if count is None else count
        processors = list(options.pop("logits_processor", None) or ())
        for processor in processors:
            if isinstance(processor, MAVISLogitsProcessor):
                processor.attention_mask = self.mask
        reader = _Reader(self.model, self.eos) if self.heads else None
        output = self.model.generate(
            input_ids=self.ids,
            attention_mask=self.mask,
            logits_processor=[*processors, reader] if reader else processors,
            **{**options, "return_dict_in_generate": True},
        )
        width = self.ids.shape[1]
        self.ids = output.sequences
        self.mask = torch.nn.functional.pad(self.mask, (0, self.ids.shape[1] - width), value=1)
        self.cache = output.get(self.cache_name) if self.rounds else None
        if reader is not None:
            self.hidden = reader.of(self.ids)
        for row, (response, new) in enumerate(zip(responses, self.ids[:, width:].tolist())):
            response.row = row
            ends = next((i for i, token in enumerate(new, start=1) if token in self.eos), None)
            response.tokens += new[:ends]
            response.ended = ends is not None
        self.done += self.ids.shape[1] - width

    @torch.inference_mode()
    def read(self, responses: list[Response]) -> None:
        """See [`Host`]."""
        if not responses:
            return
        hidden = self.hidden[torch.tensor([r.row for r in responses], device=self.hidden.device)]
        last = torch.tensor([[r.tokens[-1]] for r in responses], device=hidden.device)
        values = torch.cat([h.candidate_values(hidden, last)[:, 0] for h in self.heads], dim=1)
        for response, of_objective in zip(responses, values.cpu()):
            response.values = of_objective


class _Reader(LogitsProcessor):
    """Keeps of every row the hidden state that its newest token is sampled from, or its last was.

    Args:
        model: The base model.
        eos: Tokens that end a row.
    """

    def __init__(self, model: Any, eos: list[int]) -> None:
        self.watched = OutputLayerInput(model)
        self.eos = torch.tensor(eos, dtype=torch.int64, device=model.device)
        self.hidden: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores` as they are."""
        hidden = self.watched.of_step(len(scores), goes_on=self.hidden is not None)
        if self.hidden is None:
            self.hidden, self.ended = hidden, torch.zeros_like(input_ids[:, 0], dtype=torch.bool)
        else:
            self.ended |= torch.isin(input_ids[:, -1], self.eos)
            self.hidden = torch.where(self.ended[:, None], self.hidden, hidden)
        return scores

    def of(self, sequences: torch.Tensor) -> torch.Tensor:
        """The hidden states `[rows, hidden_size]` of what `generate` has returned."""
        if self.hidden is None or len(self.hidden) != len(sequences):
            raise ValueError(
                f"generate returned {len(sequences)} sequences of other rows than it has computed: "
                "values are read of responses that are sampled, without num_beams"
            )
        return self.hidden


class VLLMHost:
    """Sampling by `llm.generate`; a round's prompts are the texts so far, over the prefix cache.

    Values come from the heads that the engine guides by: a request with `mavis_value_of` is
    answered with a token that says the value, so that any executor, parallelism and runner will do.

    Args:
        llm: A `vllm.LLM`.
        prompts: Token ids.
        n: Responses to each.
        configs: Of the heads whose values are read; none if they are not.
        weight: `[objectives]`, of theirs; those of weight 0 are not read, and stay NaN.
        rounds: See `sample`; empty if all responses go on to the end.
        options: For `generate`; `sampling_params` among them.

    Raises:
        ValueError: Sampling parameters do not go with rounds, or the engine has other heads.
    """

    def __init__(
        self,
        llm: Any,
        prompts: list[list[int]],
        n: int,
        configs: Sequence[MAVISValueConfig],
        weight: torch.Tensor,
        rounds: Sequence[tuple[int, int]],
        options: dict[str, Any],
    ) -> None:
        self.llm, self.prompts, self.n, self.weight = llm, prompts, n, weight
        self.options = dict(options)
        params = self.options.pop("sampling_params", None) or llm.get_default_sampling_params()
        self.params = params.clone()
        if rounds:
            _refuse_counted("vllm", {name: getattr(params, name) for name in COUNTED["vllm"]})
            if params.max_tokens is not None:
                _check_last(rounds, params.max_tokens)
        self.limit, self.seed = params.max_tokens, params.seed
        self.one_hot = _served_objectives(llm, configs) if configs else []
        self.done = self.round = 0

    def go_on(self, responses: list[Response], count: int | None) -> None:
        """See [`Host`]."""
        left = None if self.limit is None else self.limit - self.done
        self.params.max_tokens = left if count is None else count
        params: Any = self.params
        if not self.round:
            params.n = self.n
            texts = self.prompts
        else:
            texts = [self.prompts[r.prompt] + r.tokens for r in responses]
            params = [self.params.clone() for _ in responses]
            for i, of_response in enumerate(params):
                of_response.n = 1
                if self.seed is not None:  # each other than any before, as vLLM adds to it, too
                    of_response.seed = self.seed + self.round * len(self.prompts) * self.n + i
        outputs = self.llm.generate(
            [{"prompt_token_ids": text} for text in texts], params, **self.options
        )
        found = [completion for output in outputs for completion in output.outputs]
        longest = self.llm.llm_engine.model_config.max_model_len
        for response, completion in zip(responses, found, strict=True):
            response.tokens += completion.token_ids
            full = len(self.prompts[response.prompt]) + len(response.tokens) >= longest
            response.ended = full or completion.finish_reason != "length"
        self.done += count or 0
        self.round += 1

    def read(self, responses: list[Response]) -> None:
        """See [`Host`]."""
        from vllm import SamplingParams

        asked = [(r, i) for r in responses for i in self.weight.nonzero()[:, 0].tolist()]
        if not asked:
            return
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=1,
                ignore_eos=True,
                detokenize=False,
                # What it is answered with where a step has failed: the end that no value reaches.
                allowed_token_ids=[0],
                extra_args={
                    "mavis_weights": self.one_hot[i],
                    "mavis_value_of": response.tokens[-1],
                },
            )
            for response, i in asked
        ]
        texts = [{"prompt_token_ids": self.prompts[r.prompt] + r.tokens[:-1]} for r, _ in asked]
        outputs = self.llm.generate(texts, params, **{**self.options, "use_tqdm": False})
        vocab_size = self.llm.llm_engine.model_config.get_vocab_size()
        for response in responses:
            response.values = torch.full(self.weight.shape, torch.nan)
        for (response, i), output in zip(asked, outputs, strict=True):
            value = value_of_code(output.outputs[0].token_ids[0], vocab_size)
            if value == -math.inf:
                raise RuntimeError("vLLM's engine has not read a value; its log says why")
            response.values[i] = value


def _served_objectives(llm: Any, configs: Sequence[MAVISValueConfig]) -> list[list[float]]:
    """For each objective of heads, weights in the server's order of which its own is 1.

    Raises:
        ValueError: The engine does not guide by these heads.
    """
    from ..vllm import MAVISLogitsProcessor as Processor
    from ..vllm import serving

    config = llm.llm_engine.vllm_config
    remedy = (
        "start it with LLM(..., logits_processors=['trimtab.plugins.vllm:MAVISLogitsProcessor'], "
        "additional_config={'mavis': {'value_models': [...]}})"
    )
    loaded = [
        pkgutil.resolve_name(processor) if isinstance(processor, str) else processor
        for processor in config.model_config.logits_processors or ()
    ]
    if not any(issubclass(processor, Processor) for processor in loaded):
        raise ValueError(
            "over vLLM, values are read in the engine, and this LLM does not have "
            f"MAVISLogitsProcessor: {remedy}"
        )
    served = serving(config)
    first, starts = 0, []
    for of_model in served.configs:
        starts.append((of_model, first))
        first += len(of_model.objectives or ())
    one_hot = []
    for wanted in configs:
        start = next((at for of_model, at in starts if _alike(of_model, wanted)), None)
        if start is None:
            raise ValueError(
                f"this LLM guides by other value models than the heads for {wanted.objectives}: "
                f"{remedy}"
            )
        for i in range(len(wanted.objectives or ())):
            one_hot.append([float(at == start + i) for at in range(first)])
    return one_hot


def _alike(one: MAVISValueConfig, other: MAVISValueConfig) -> bool:
    """Whether two configurations are of the same training."""
    fields = ("objectives", "base_checkpoint_fingerprint", "head_type", "reward_mean", "reward_std",
              "provenance", "candidate_scale")  # fmt: skip
    return all(getattr(one, name) == getattr(other, name) for name in fields)


def _refuse_counted(host: str, options: dict[str, Any]) -> None:
    for name in COUNTED[host]:
        if options.get(name):
            raise ValueError(
                f"{name} {options[name]!r} holds from where a call of generate begins, and keep "
                "goes on with a response in further calls: leave one of the two out"
            )


def _check_last(rounds: Sequence[tuple[int, int]], limit: int) -> None:
    if rounds[-1][0] >= limit:
        raise ValueError(
            f"keep[{rounds[-1][0]}] is to drop responses after that many tokens, and they have at "
            f"most {limit}: choose fewer"
        )
