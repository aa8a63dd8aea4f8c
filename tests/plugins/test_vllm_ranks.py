"""Guidance on several ranks.

Under tensor parallelism each holds the value models and draws the same token; under pipeline
parallelism only the last rank guides.
"""

from __future__ import annotations

import pytest

from tests.plugins.test_vllm import (
    BETA,
    TOP_K,
    generate,
    random_prompts,
    sampling,
    v1_processor,
)
from tests.reference import Reference

WEIGHTS = [(1.0, 0.0, 0.0), (0.5, -1.0, 1.0), (0.0, 0.0, 2.0)]


@pytest.fixture
def two_ranks(monkeypatch, base_model, value_model, salty_model):
    from vllm import LLM

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    # A test reads the log: importing TRL leaves another level, which a forked process would keep.
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    engines = []

    def start(**options):
        llm = LLM(
            str(base_model),
            logits_processors=["trimtab.plugins.vllm:MAVISLogitsProcessor"],
            additional_config={
                "mavis": {
                    "value_models": [str(value_model), str(salty_model)],
                    "beta": BETA,
                    "top_k": TOP_K,
                }
            },
            dtype="float32",
            enforce_eager=True,
            max_model_len=96,
            max_num_seqs=6,
            **options,
        )
        engines.append(llm)
        return llm

    yield start
    for llm in engines:
        llm.llm_engine.engine_core.shutdown()


def check_greedy(llm, reference):
    prompts = random_prompts(1, 6, longest=40)
    params = [sampling(WEIGHTS[i % 3]) for i in range(6)]
    for prompt, one, out in zip(prompts, params, generate(llm, prompts, params)):
        weights = one.extra_args["mavis_weights"]
        assert out == reference.greedy(prompt, 20, weights, BETA, TOP_K, eos=2)
    return prompts


def test_two_tensor_parallel_ranks_guide_as_one(two_ranks, base_model, value_model, salty_model):
    llm = two_ranks(tensor_parallel_size=2)
    prompts = check_greedy(llm, Reference(base_model, [value_model, salty_model]))
    # Sampled tokens agree between the ranks too, or the next step's prefixes would differ.
    drawn = [sampling(WEIGHTS[i % 3], temperature=1.0, seed=i) for i in range(6)]
    assert generate(llm, prompts, drawn) == generate(llm, prompts, drawn)


def test_only_the_last_pipeline_rank_guides(two_ranks, capfd):
    """As far as a CPU goes: vLLM's own forward pass fails there with several pipeline ranks."""
    two_ranks(pipeline_parallel_size=2)
    log = "".join(capfd.readouterr())
    assert log.count("guides on the last pipeline rank, which samples") == 1
    assert log.count("GiB key-value store") == 1


def test_a_rank_that_does_not_sample_holds_no_value_models(base_model, value_model, monkeypatch):
    from vllm.v1.sample.logits_processor import BatchUpdate

    monkeypatch.setattr("trimtab.plugins.vllm.samples", lambda: False)
    processor = v1_processor(base_model, {"value_models": [str(value_model)]})
    assert not hasattr(processor, "_guide")
    processor.update_state(BatchUpdate(1, [], [(0, sampling((1.0, 0.0)), [5], [])], []))
    assert not processor.add_request(0, sampling((1.0, 0.0)))
