"""What requests and servers may say to vLLM's processor, without an engine around it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.conftest import VOCAB_SIZE
from tests.plugins.test_vllm import sampling, v1_processor, vllm_config

WRONG = [
    {"mavis_beta": -1},
    {"mavis_beta": "strong"},
    {"mavis_weights": "salty=1"},
    {"mavis_weights": "[" * 100_000},
    {"mavis_top_k": 1000},
    {"mavis-beta": 3},
]


def params(extra_args=None, **options):
    from vllm import SamplingParams

    return SamplingParams(extra_args=extra_args, **options)


@pytest.fixture(scope="module")
def warnings():
    """What the processor warns of, as text."""
    from trimtab.plugins import vllm

    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm.logger, "warning", lambda text, *args, **_: said.append(text % args))
        yield said


def v2_processor(base_model, mavis, recording=False):
    """The processor as the V2 runner makes it, and the request states that it reads."""
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcRequestState

    from trimtab.plugins.vllm import MAVISLogitsProcessor
    from trimtab.trainers.recording import RecordingLogitsProcessor

    def lengths():
        return SimpleNamespace(np=np.zeros(4, dtype=np.int32))

    state = LogitsProcRequestState(
        device=torch.device("cpu"),
        max_num_reqs=4,
        vocab_size=VOCAB_SIZE,
        all_token_ids=SimpleNamespace(gpu=torch.zeros(4, 64, dtype=torch.int32)),
        prompt_len=lengths(),
        prefill_len=lengths(),
        total_len=lengths(),
    )
    made = RecordingLogitsProcessor if recording else MAVISLogitsProcessor
    return made(vllm_config(base_model, mavis), state), state


def context(slots, lengths, tokens):
    """The layout of a V2 step with one row for each request."""
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext

    slots = np.array(slots)
    return LogitsContext(
        expanded_idx_mapping=torch.from_numpy(slots),
        idx_mapping=torch.from_numpy(slots),
        idx_mapping_np=slots,
        expanded_local_pos=torch.zeros(len(slots), dtype=torch.int32),
        input_ids=torch.tensor(tokens, dtype=torch.int32),
        pos=torch.tensor(lengths) - 1,
        seq_lens_upper_bound_np=np.array(lengths, dtype=np.int32),
    )


@pytest.mark.parametrize("extra_args", [w for w in WRONG if w not in (WRONG[2], WRONG[4])])
def test_what_needs_no_configuration_is_refused_without_one(extra_args):
    from trimtab.plugins.vllm import MAVISLogitsProcessor

    with pytest.raises(ValueError, match="mavis"):
        MAVISLogitsProcessor.validate_params(params(extra_args))


@pytest.mark.parametrize(
    "extra_args",
    [
        None,
        {"other": 1, 3: 4},
        {"mavis_beta": 2, "mavis_weights": "salty=1", "mavis_top_k": 5000},
        {"mavis_kl_budget": "0.5"},
    ],
)
def test_what_only_the_configuration_can_refuse_passes_without_one(extra_args):
    from trimtab.plugins.vllm import MAVISLogitsProcessor

    sampling_params = params()
    sampling_params.extra_args = extra_args  # vLLM's own constructor refuses some keys
    MAVISLogitsProcessor.validate_params(sampling_params)


@pytest.mark.parametrize("extra_args", WRONG)
def test_the_configuration_of_the_caller_is_used_where_it_is_seen(
    base_model, value_model, extra_args
):
    from vllm.config import VllmConfig

    from trimtab.plugins.vllm import MAVISLogitsProcessor

    class Frontend:
        vllm_config = VllmConfig(additional_config={"mavis": {"value_models": [str(value_model)]}})

        def admit(self, sampling_params):
            MAVISLogitsProcessor.validate_params(sampling_params)

    Frontend().admit(params({"mavis_weights": "sweet=1"}))
    with pytest.raises(ValueError, match="mavis_top_k must be an integer from 1 to 128, got 0"):
        Frontend().admit(params({"mavis_top_k": 0}))
    with pytest.raises(ValueError, match="mavis"):
        Frontend().admit(params(extra_args))


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_a_wrong_request_that_reaches_the_worker_goes_on_unguided(
    base_model, value_model, warnings, runner
):
    """Beside one that is guided, with one warning for each argument, and the engine lives on."""
    from vllm.v1.sample.logits_processor import BatchUpdate

    mavis = {"value_models": [str(value_model)], "weights": {"sweet": 1.0}}
    make = v1_processor if runner == "V1" else lambda *args: v2_processor(*args)[0]
    processor = make(base_model, mavis)
    torch.manual_seed(0)
    logits = torch.randn(4, VOCAB_SIZE)
    warnings.clear()
    for start in (0, 3):
        requests = [*map(params, WRONG[start : start + 3]), sampling((1.0, 0.0))]
        ctx = None
        if runner == "V1":
            added = [(i, request, [5, 6], []) for i, request in enumerate(requests)]
            processor.update_state(BatchUpdate(4, [], added, []))
        else:
            guided = [processor.add_request(i, request) for i, request in enumerate(requests)]
            assert guided == [False, False, False, True]
            processor.apply_staged_writes()
            ctx = context(range(4), [1] * 4, [5] * 4)
        out = processor.apply(logits.clone(), ctx)
        assert out[:3].equal(logits[:3]) and not out[3].equal(logits[3])
    counts = {"mavis_beta": 2, "mavis_weights": 2, "mavis_top_k": 1, "unknown": 1}
    assert processor.failures == counts
    said = [text for text in warnings if "goes on unguided" in text]
    assert len(said) == len(counts) and all(len(text) < 500 for text in said)
    assert "mavis_beta must be a number from 0 to 1e+06, got -1" in said[0]


def test_values_are_asked_of_heads_only(value_model, heads):
    from trimtab.plugins.vllm import serving

    def read(model, token):
        config = SimpleNamespace(additional_config={"mavis": {"value_models": [str(model)]}})
        return serving(config).params(sampling((1.0, -0.5), extra_args={"mavis_value_of": token}))

    found = read(heads, "95")
    assert (found.weights, found.value_of, found.guides) == ((1.0, -0.5), 95, True)
    with pytest.raises(ValueError, match="mavis_value_of must be a token below 96, got 96"):
        read(heads, 96)
    with pytest.raises(ValueError, match=r"mavis_value_of: .* value models have a backbone; serve"):
        read(value_model, 5)


def test_memory_profiling_guides_every_slot_at_once(base_model, value_model):
    """As vLLM 0.33's V2 runner does before the first request, with requests of its own."""
    from vllm import SamplingParams

    mavis = {"value_models": [str(value_model)], "weights": {"sweet": 1.0}, "kl_budget": 0.5}
    torch.manual_seed(0)
    logits = torch.randn(4, VOCAB_SIZE)
    prompt, steps = [9, 8, 7, 6], []
    for profiled in (False, True):
        processor, state = v2_processor(base_model, mavis)
        if profiled:
            warm_up = SamplingParams.for_sampler_warmup()
            assert all([processor.add_request(slot, warm_up) for slot in range(4)])
            processor.apply_staged_writes()
            out = processor.apply(logits.clone(), context(range(4), [1] * 4, [0] * 4))
            assert (out.isfinite().sum(1) == 40).all() and not processor.failures
        # A request takes one of the slots, and finds nothing of what was there.
        assert processor.add_request(2, params())
        state.all_token_ids.gpu[2, :4] = torch.tensor(prompt)
        state.prefill_len.np[2] = 4
        processor.apply_staged_writes()
        steps.append(processor.apply(logits[:1].clone(), context([2], [4], [6])))
    assert steps[0].equal(steps[1]) and not steps[0].equal(logits[:1])


def test_memory_profiling_reads_the_hidden_states_of_its_own_rows(base_model, heads):
    """As vLLM 0.33's V2 runner does: its requests and the step come after the output layer."""
    from vllm import SamplingParams

    from trimtab.plugins import vllm_internals

    mavis = {"value_models": [str(heads)], "weights": {"sweet": 1.0}}
    processor, _ = v2_processor(base_model, mavis)
    logits, every = torch.randn(4, VOCAB_SIZE), context(range(4), [1] * 4, [0] * 4)
    vllm_internals._newest.rows = torch.randn(4, 64)
    warm_up = SamplingParams.for_sampler_warmup()
    assert all([processor.add_request(slot, warm_up) for slot in range(4)])
    processor.apply_staged_writes()
    out = processor.apply(logits.clone(), every)
    assert (out.isfinite().sum(1) == 40).all() and not processor.failures
    # A step takes nothing that was read before it.
    processor.apply_staged_writes()
    assert processor.apply(logits.clone(), every).equal(logits)
    assert processor.failures == {"MissingHiddenStates": 1}


@pytest.mark.parametrize("kind", ["heads", "value_model"])
def test_requests_of_vllms_own_are_of_no_rollout(base_model, kind, request):
    from vllm import SamplingParams

    model = request.getfixturevalue(kind)
    processor, _ = v2_processor(base_model, {"value_models": [str(model)]}, recording=True)
    assert not processor.add_request(0, SamplingParams.for_sampler_warmup())
    mine = {"rollout": 3, "mavis_weights": {"sweet": 1.0}}
    assert processor.add_request(1, params(mine))
    guide = processor._guide if kind == "value_model" else processor._heads
    assert guide.rollouts.tolist()[:2] == [-1, 3]


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 1.7])
def test_a_budget_holds_at_the_temperature_of_the_request(base_model, value_model, temperature):
    """At temperature 0, where a divergence is 0 or infinite, as at temperature 1."""
    from vllm.v1.sample.logits_processor import BatchUpdate

    processor = v1_processor(base_model, {"value_models": [str(value_model)], "top_k": 20})
    torch.manual_seed(0)
    logits = 2 * torch.randn(1, VOCAB_SIZE)
    request = sampling(
        (1.0, -1.0), temperature=temperature, extra_args={"mavis_beta": 1e5, "mavis_kl_budget": 0.1}
    )
    processor.update_state(BatchUpdate(1, [], [(0, request, [5, 6], [])], []))
    out = processor.apply(logits.clone())
    at, kept = temperature or 1.0, out[0].isfinite()
    policy = (out[0, kept] / at).double().log_softmax(0)
    base = (logits[0, kept] / at).double().log_softmax(0)
    kl = (policy.exp() * (policy - base)).sum().item()
    assert kept.sum() == 20 and 0.0995 < kl <= 0.1


CIRCULAR: dict = {"value_models": ["m"]}
CIRCULAR["weights"] = CIRCULAR


@pytest.mark.parametrize(
    ("mavis", "message"),
    [
        ({"value_models": {1, 2}}, "what JSON can say"),
        ({("a", "b"): 1}, "what JSON can say"),
        (CIRCULAR, "what JSON can say"),
        ({"value_models": ["{value}"], "beta": "4"}, "mavis config: beta must be a number"),
        ({"value_models": ["{value}"], "beta": 1e39}, "mavis config: beta must be a number"),
        ({"value_models": ["{value}"], "prune_eps": "0.1"}, "prune_eps must be a number"),
        ({"value_models": ["{value}"], "kv_cache_memory_gib": 1e300}, "kv_cache_memory_gib must"),
        ({"value_models": ["{value}"], "kv_cache_memory_gib": "1"}, "kv_cache_memory_gib must"),
        ({"value_models": ["{value}"], "weights": {"sweet": 10**400}}, r"weights\['sweet'\] must"),
        ({"value_models": ["{value}"], "weights": {"sweet": 1e39}}, r"weights\['sweet'\] must"),
        ({"value_models": ["{value}"], "prune_eps": 1}, "prune_eps must be at least 0 and below 1"),
        ({"value_models": ["./valu_model"]}, "there is no such folder"),
        ({"value_models": ["\0"]}, "there is no such folder"),
        ({"value_models": ["x" * 10_000]}, "there is no such folder"),
        ({"value_models": {"a=b,c": "{value}"}}, "has the objective 'a=b,c'"),
        ([1], "--additional-config"),
        (None, "--additional-config"),
    ],
)
def test_a_hostile_server_config_stops_the_start(base_model, value_model, mavis, message):
    if isinstance(mavis, dict) and isinstance(mavis.get("value_models"), (dict, list)):
        models = mavis["value_models"]
        if isinstance(models, list):
            models = [path.replace("{value}", str(value_model)) for path in models]
        mavis = {**mavis, "value_models": models}
    with pytest.raises(ValueError, match=message) as caught:
        v1_processor(base_model, mavis)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("is_encoder_decoder", "is an encoder-decoder: value models read"),
        ("supports_multimodal_inputs", "takes images, audio or video.*--language-model-only"),
    ],
)
def test_a_base_model_that_reads_more_than_tokens_is_refused(
    base_model, value_model, monkeypatch, name, message
):
    from vllm.config import ModelConfig

    monkeypatch.setattr(ModelConfig, name, property(lambda self: True))
    with pytest.raises(ValueError, match=message):
        v1_processor(base_model, {"value_models": [str(value_model)]})
