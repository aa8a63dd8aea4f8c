"""Guidance under tensor parallelism: each rank holds the value models and draws the same token."""

from __future__ import annotations

from tests.plugins.test_vllm import BETA, TOP_K, generate, random_prompts, sampling
from tests.reference import Reference

WEIGHTS = [(1.0, 0.0, 0.0), (0.5, -1.0, 1.0), (0.0, 0.0, 2.0)]


def test_two_ranks_guide_as_one(monkeypatch, base_model, value_model, action_model):
    from vllm import LLM

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    llm = LLM(
        str(base_model),
        logits_processors=["trimtab.plugins.vllm:MAVISLogitsProcessor"],
        additional_config={
            "mavis": {
                "value_models": [str(value_model), str(action_model)],
                "beta": BETA,
                "top_k": TOP_K,
            }
        },
        tensor_parallel_size=2,
        dtype="float32",
        enforce_eager=True,
        max_model_len=96,
        max_num_seqs=6,
    )
    try:
        prompts = random_prompts(1, 6, longest=40)
        params = [sampling(WEIGHTS[i % 3]) for i in range(6)]
        reference = Reference(base_model, [value_model, action_model])
        for prompt, one, out in zip(prompts, params, generate(llm, prompts, params)):
            weights = one.extra_args["mavis_weights"]
            assert out == reference.greedy(prompt, 20, weights, BETA, TOP_K, eos=2)
        # Sampled tokens agree between the ranks too, or the next step's prefixes would differ.
        drawn = [sampling(WEIGHTS[i % 3], temperature=1.0, seed=i) for i in range(6)]
        assert generate(llm, prompts, drawn) == generate(llm, prompts, drawn)
    finally:
        llm.llm_engine.engine_core.shutdown()
