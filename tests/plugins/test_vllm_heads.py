"""Heads in a real vLLM engine (V1 runner) against guidance computed the plain way.

Steps are scheduled asynchronously, prompts are prefilled in chunks and share their beginnings,
requests are preempted, and prompt log-probabilities make vLLM compute further logits within a step.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import make_base_model, make_heads
from tests.plugins.test_vllm import (  # noqa: F401 (a fixture)
    BETA,
    TOP_K,
    WEIGHTS,
    adapter,
    generate,
    plain_greedy,
    preemptions,
    random_prompts,
    sampling,
    schedule_asynchronously,
    tokens,
    v1_processor,
)
from tests.reference import Reference

PROCESSOR = "trimtab.plugins.vllm:MAVISLogitsProcessor"


@pytest.fixture(scope="module")
def salty_heads(tmp_path_factory, base_model):
    folder = tmp_path_factory.mktemp("salty")
    return make_heads(folder, base_model, ["salty"], seed=8)


@pytest.fixture(scope="module")
def llm(base_model, heads, salty_heads):
    from vllm import LLM

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        schedule_asynchronously(patch)
        llm = LLM(
            str(base_model),
            logits_processors=[PROCESSOR],
            additional_config={
                "mavis": {
                    "value_models": [str(heads), str(salty_heads)],
                    "beta": BETA,
                    "top_k": TOP_K,
                }
            },
            dtype="float32",
            enforce_eager=True,
            max_model_len=160,
            max_num_seqs=6,
            max_num_batched_tokens=24,
            enable_chunked_prefill=True,
            enable_prefix_caching=True,
            block_size=32,
            num_gpu_blocks_override=14,
            enable_lora=True,
            max_lora_rank=8,
            disable_log_stats=False,
            distributed_executor_backend="uni",
            seed=0,
        )
    assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling
    yield llm
    llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def reference(base_model, heads, salty_heads):
    return Reference(base_model, [heads, salty_heads])


def test_any_mix_of_requests_equals_the_plain_computation(llm, reference):
    """Preempted, prefilled in chunks, from the prefix cache."""
    before = preemptions(llm)
    shared = random_prompts(20, 1, longest=60)[0] + random_prompts(21, 1)[0]
    prompts = [*random_prompts(0, 12, longest=80), *([*shared, 7 + i] for i in range(6))]
    weights = [(*WEIGHTS[i % 4], float(i % 3 - 1) * (i % 4 < 3)) for i in range(18)]
    chosen = [{"mavis_top_k": 3}, {"mavis_beta": 5}, {}, {}]
    params = [sampling(w, 60, extra_args=chosen[i // 5]) for i, w in enumerate(weights)]
    for i, (prompt, out) in enumerate(zip(prompts, generate(llm, prompts, params))):
        top_k, beta = (
            chosen[i // 5].get("mavis_top_k", TOP_K),
            chosen[i // 5].get("mavis_beta", BETA),
        )
        assert out == plain_greedy(reference, prompt, weights[i], 60, top_k, beta), i
    assert preemptions(llm) > before


def test_sampled_first_tokens_have_the_guided_distribution(llm, reference):
    from scipy.stats import chisquare

    prompt, weights, count = random_prompts(11, 1)[0], (0.5, -1.0, 0.5), 1200
    params = sampling(weights, 1, 1.0, n=count)
    drawn = [
        o.token_ids[0] for o in llm.generate(tokens([prompt]), params, use_tqdm=False)[0].outputs
    ]
    policy = reference.distribution(prompt, weights, BETA, TOP_K)
    observed = [drawn.count(token) for token in policy]
    assert sum(observed) == count
    assert chisquare(observed, [count * p for p in policy.values()]).pvalue > 1e-3


def test_a_request_with_lora_is_guided_from_its_own_hidden_state(
    llm,
    adapter,  # noqa: F811
    heads,
    salty_heads,
):
    from vllm.lora.request import LoRARequest

    folder, merged = adapter
    adapted = Reference(merged, [heads, salty_heads])
    prompts = random_prompts(16, 4)
    weights = (1.0, 0.0, 0.5)
    out = generate(
        llm,
        prompts,
        sampling(weights, 10),
        lora_request=LoRARequest("adapter", 1, str(folder)),
    )
    assert out == [plain_greedy(adapted, prompt, weights, 10) for prompt in prompts]


def test_two_ranks_and_prompt_log_probabilities(monkeypatch, base_model, heads):
    from vllm import LLM

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    llm = LLM(
        str(base_model),
        logits_processors=[PROCESSOR],
        additional_config={"mavis": {"value_models": [str(heads)], "beta": BETA, "top_k": TOP_K}},
        tensor_parallel_size=2,
        dtype="float32",
        enforce_eager=True,
        max_model_len=96,
        max_num_seqs=6,
    )
    try:
        prompts = random_prompts(1, 4, longest=40)
        reference = Reference(base_model, [heads])
        # With LoRA, vLLM 0.32 on a CPU fails at prompt log-probabilities by itself.
        params = [sampling(WEIGHTS[i], prompt_logprobs=i % 2) for i in range(4)]
        for i, out in enumerate(generate(llm, prompts, params)):
            assert out == plain_greedy(reference, prompts[i], WEIGHTS[i], 20)
    finally:
        llm.llm_engine.engine_core.shutdown()


def test_a_server_in_which_heads_would_read_wrong_rows_does_not_start(
    tmp_path, base_model, heads, value_model
):
    other = make_base_model(tmp_path / "tuned")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"] *= 1.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    only = {"value_models": [str(heads)]}
    with pytest.raises(ValueError, match="has other weights: heads read the hidden states of one"):
        v1_processor(other, only)
    with pytest.raises(ValueError, match="prune_eps is for value models with a backbone"):
        v1_processor(base_model, {**only, "prune_eps": 0.01})
    renamed = {"a": str(make_heads(tmp_path / "one", base_model, ["x"])), "b": str(value_model)}
    with pytest.raises(ValueError, match="do not guide together with value models that have a"):
        v1_processor(base_model, {"value_models": renamed})


def test_rows_that_never_match_stop_the_engine_and_later_ones_go_on_unguided(base_model, heads):
    from vllm.v1.sample.logits_processor import BatchUpdate

    from trimtab.plugins import vllm_internals

    processor = v1_processor(base_model, {"value_models": [str(heads)]})
    added = [(i, sampling((1.0, 0.0)), [5, 6], []) for i in range(2)]
    processor.update_state(BatchUpdate(2, [], added, []))
    logits = torch.randn(2, 96)
    with pytest.raises(RuntimeError, match="output layer has read none"):
        processor.apply(logits.clone())
    vllm_internals._newest.rows = torch.randn(3, 64)
    with pytest.raises(RuntimeError, match=r"has read \[3, 64\]"):
        processor.apply(logits.clone())
    vllm_internals._newest.rows = torch.randn(2, 64)
    assert not processor.apply(logits.clone()).equal(logits)
    processor.update_state(None)  # a step begins: what the last one left is not taken for its own
    assert processor.apply(logits.clone()).equal(logits)
    assert processor.failures == {"MissingHiddenStates": 1}


def test_unguided_rows_are_bit_identical(base_model, heads):
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate

    from trimtab.plugins import vllm_internals

    processor = v1_processor(base_model, {"value_models": [str(heads)]})
    logits = torch.randn(3, 96)
    assert processor.apply(logits.clone()).equal(logits)
    guided = sampling((1.0, 0.0))
    added = [(0, SamplingParams(), [5], []), (1, guided, [6], []), (2, SamplingParams(), [7], [])]
    processor.update_state(BatchUpdate(3, [], added, []))
    vllm_internals._newest.rows = torch.randn(3, 64)
    out = processor.apply(logits.clone())
    assert out[[0, 2]].equal(logits[[0, 2]]) and not out[1].equal(logits[1])
    processor.update_state(BatchUpdate(2, [1], [], []))  # the guided one has left
    assert processor.apply(logits[:2].clone()).equal(logits[:2])
