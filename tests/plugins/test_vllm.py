"""A real vLLM engine (V1 runner) against guidance computed the plain way.

The engine is made as hostile as it gets: prompts prefilled in chunks, too few key-value blocks for
its requests (so that they are preempted), and a value cache that holds little more than one.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from tests.conftest import EOS, VOCAB_SIZE, make_base_model, make_value_model
from tests.reference import Reference

MAX_LENGTH, TOP_K, BETA = 160, 8, 3.0
WEIGHTS = [(1.0, 0.0), (0.0, 1.0), (0.5, -1.0), (0.0, 0.0)]


@pytest.fixture(scope="module")
def reference(base_model, value_model):
    return Reference(base_model, [value_model])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, base_model):
    """A LoRA adapter that changes the base model, and the merged model as its reference."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder, merged = tmp_path_factory.mktemp("lora"), tmp_path_factory.mktemp("merged")
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    torch.manual_seed(5)
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    model.merge_and_unload().save_pretrained(merged)
    return folder, merged


def schedule_asynchronously(patch: pytest.MonkeyPatch) -> None:
    """Leave asynchronous scheduling on, which vLLM's CPU platform turns off whatever is asked."""
    from vllm.platforms import current_platform

    update = current_platform.check_and_update_config

    def keeping(config: Any) -> None:
        update(config)
        config.scheduler_config.async_scheduling = True

    patch.setattr(type(current_platform), "check_and_update_config", staticmethod(keeping))


@pytest.fixture(scope="module", params=[True, False], ids=["async", "sync"])
def llm(request, base_model, value_model):
    from vllm import LLM

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        if request.param:
            schedule_asynchronously(patch)
        llm = LLM(
            str(base_model),
            logits_processors=["trimtab.plugins.vllm:MAVISLogitsProcessor"],
            additional_config={
                "mavis": {
                    "value_models": [str(value_model)],
                    "beta": BETA,
                    "top_k": TOP_K,
                    "kv_cache_memory_gib": 7 * 32 * 1024 / 2**30,  # blocks x tokens x bytes
                }
            },
            dtype="float32",
            enforce_eager=True,
            max_model_len=MAX_LENGTH,
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
    assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling == request.param
    yield llm
    llm.llm_engine.engine_core.shutdown()


def sampling(weights, max_tokens=20, temperature=0.0, **options):
    from vllm import SamplingParams

    extra = {"mavis_weights": list(weights), **options.pop("extra_args", {})}
    return SamplingParams(
        temperature=temperature, max_tokens=max_tokens, extra_args=extra, **options
    )


def tokens(prompts):
    return [{"prompt_token_ids": prompt} for prompt in prompts]


def generate(llm, prompts, params, **options):
    outputs = llm.generate(tokens(prompts), params, use_tqdm=False, **options)
    return [list(output.outputs[0].token_ids) for output in outputs]


def random_prompts(seed, count, longest=60):
    rng = random.Random(seed)
    return [
        [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randrange(1, longest))]
        for _ in range(count)
    ]


def plain_greedy(reference, prompt, weights, max_tokens, top_k=TOP_K, beta=BETA):
    if not any(weights):
        top_k = 1  # unguided greedy is the base model's argmax
    return reference.greedy(prompt, max_tokens, weights, beta, top_k, eos=EOS)


def preemptions(llm):
    return sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")


def test_greedy_batches_of_any_mix_equal_the_plain_computation(llm, reference):
    prompts = random_prompts(0, 16)
    weights = [WEIGHTS[i % 4] for i in range(16)]
    options = [{"mavis_top_k": 4}, {"mavis_beta": 7}, {}, {}]
    params = [sampling(w, extra_args=options[i // 4]) for i, w in enumerate(weights)]
    for i, (prompt, out) in enumerate(zip(prompts, generate(llm, prompts, params))):
        top_k, beta = (4 if i // 4 == 0 else TOP_K), (7.0 if i // 4 == 1 else BETA)
        assert out == plain_greedy(reference, prompt, weights[i], 20, top_k, beta)


def test_random_operations(llm, reference):
    """Requests arrive, are preempted and aborted; what finishes equals what it is alone."""
    engine, rng = llm.llm_engine, random.Random(7)
    before = preemptions(llm)
    expected, finished, running, added = {}, {}, set(), 0
    prompts = random_prompts(3, 40, longest=80)
    while added < 40 or running:
        for _ in range(rng.choice([0, 0, 1, 3])):
            if added == 40:
                break
            weights, length = rng.choice(WEIGHTS), rng.randrange(5, 70)
            name, prompt = f"r{added}", prompts[added]
            engine.add_request(name, tokens([prompt])[0], sampling(weights, length))
            expected[name] = (prompt, weights, length)
            running.add(name)
            added += 1
        if running and rng.random() < 0.04:
            victim = rng.choice(sorted(running))
            engine.abort_request([victim])
            running.discard(victim)
        for output in engine.step():
            if output.finished and output.request_id in running:
                finished[output.request_id] = list(output.outputs[0].token_ids)
                running.discard(output.request_id)
    assert len(finished) >= 25 and preemptions(llm) > before
    for name, out in finished.items():
        assert out == plain_greedy(reference, *expected[name]), name


def test_chunks_of_a_prompt_are_stored_and_not_valued(llm, monkeypatch):
    from trimtab.plugins import ValueEngine

    seen: dict[str, list[int]] = {"store": [], "values": []}

    def noting(name, call):
        def called(engine, slots, lengths, *arguments, **options):
            seen[name] += lengths.tolist()
            return call(engine, slots, lengths, *arguments, **options)

        monkeypatch.setattr(ValueEngine, name, called)

    for name in seen:
        noting(name, getattr(ValueEngine, name))
    prompt = [(7 * i) % 90 + 3 for i in range(60)]
    out = generate(llm, [prompt], sampling((1.0, 0.0), 3, ignore_eos=True))
    assert seen == {"store": [24, 48], "values": [60, 61, 62]} and len(out[0]) == 3


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampled_first_tokens_have_the_guided_distribution(llm, reference, temperature):
    from scipy.stats import chisquare
    from vllm import SamplingParams

    prompt, weights, count = random_prompts(11, 1)[0], (0.5, -1.0), 1200
    raw = llm.generate(
        tokens([prompt]), SamplingParams(max_tokens=1, logprobs=TOP_K), use_tqdm=False
    )[0]
    log_ref = sorted(
        ((t, x.logprob) for t, x in raw.outputs[0].logprobs[0].items() if x.rank <= TOP_K)
    )
    with torch.no_grad():
        continued = torch.tensor([[*prompt, token] for token, _ in log_ref])
        values = reference.values[0](continued).logits[:, -1].double()
    scores = torch.tensor([x for _, x in log_ref], dtype=torch.float64)
    scores = (scores + BETA * values @ torch.tensor(weights, dtype=torch.float64)) / temperature
    expected = torch.softmax(scores, 0) * count
    params = sampling(weights, 1, temperature, n=count)
    drawn = [
        o.token_ids[0] for o in llm.generate(tokens([prompt]), params, use_tqdm=False)[0].outputs
    ]
    observed = [drawn.count(token) for token, _ in log_ref]
    assert sum(observed) == count
    assert chisquare(observed, expected.tolist()).pvalue > 1e-3


def test_returned_logprobs_are_the_base_models(llm, reference):
    prompt = random_prompts(12, 1)[0]
    out = llm.generate(tokens([prompt]), sampling((1.0, 0.0), 3, logprobs=1), use_tqdm=False)[
        0
    ].outputs[0]
    prefix = list(prompt)
    for token, logprobs in zip(out.token_ids, out.logprobs):
        with torch.no_grad():
            raw = reference.base(torch.tensor([prefix])).logits[0, -1].log_softmax(-1)
        assert logprobs[token].logprob == pytest.approx(raw[token].item(), abs=1e-3)
        prefix.append(token)


def test_seeds_repeat_and_parallel_samples_differ(llm):
    # vLLM's CPU runner fails on a seeded prompt that it prefills in chunks: four fit into one.
    prompt = [5, 6, 7, 8]
    params = sampling((1.0, 0.0), 12, 1.0, n=4, seed=5)
    one, two = (
        [
            list(o.token_ids)
            for o in llm.generate(tokens([prompt]), params, use_tqdm=False)[0].outputs
        ]
        for _ in range(2)
    )
    assert one == two and len({tuple(o) for o in one}) > 1


def test_masks_of_the_host_hold(llm, reference):
    """min_tokens and allowed_token_ids mask logits before guidance, top-p and min-p cut after."""
    prompt = random_prompts(14, 1)[0]
    allowed = [EOS, 30, 31, 32]
    out = generate(llm, [prompt], sampling((1.0, 0.0), 30, 1.0, allowed_token_ids=allowed))
    assert set(out[0]) <= set(allowed)
    out = generate(
        llm, [prompt], sampling((1.0, 0.0), 20, 0.0, allowed_token_ids=allowed, min_tokens=20)
    )
    prefix, others = list(prompt), [t for t in range(VOCAB_SIZE) if t not in allowed[1:]]
    for token in out[0]:
        policy = reference.distribution(prefix, (1.0, 0.0), BETA, 3, masked=others)
        assert token == max(policy, key=policy.__getitem__)
        prefix.append(token)
    policy = reference.distribution(prompt, (1.0, 0.0), BETA, TOP_K)
    likeliest = max(policy.values())
    for options, kept in (
        ({"min_p": 0.3}, {t for t, p in policy.items() if p >= 0.3 * likeliest}),
        ({"top_p": 1e-6}, {t for t, p in policy.items() if p == likeliest}),
    ):
        drawn = generate(llm, [prompt] * 50, sampling((1.0, 0.0), 1, 1.0, **options))
        assert {out[0] for out in drawn} <= kept


def test_stop_tokens_end_the_response(llm, reference):
    prompt = random_prompts(15, 1)[0]
    full = plain_greedy(reference, prompt, (0.0, 1.0), 20)
    stop = full[4]
    out = generate(llm, [prompt], sampling((0.0, 1.0), 20, stop_token_ids=[stop]))
    assert out[0] == full[: full.index(stop) + 1]


def test_a_base_model_with_lora_is_guided_from_its_own_distribution(llm, adapter, value_model):
    from vllm.lora.request import LoRARequest

    folder, merged = adapter
    adapted = Reference(merged, [value_model])
    prompts = random_prompts(16, 4)
    out = generate(
        llm,
        prompts,
        sampling((1.0, 0.0), 10),
        lora_request=LoRARequest("adapter", 1, str(folder)),
    )
    assert out == [plain_greedy(adapted, p, (1.0, 0.0), 10) for p in prompts]


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        ({"mavis_weights": "salty=1"}, "mavis_weights: unknown objective 'salty'"),
        ({"mavis_weights": [math.nan, 0]}, r"mavis_weights\[0\] must be a number from"),
        ({"mavis_beta": -1}, "mavis_beta must be a number from 0 to"),
        ({"mavis_top_k": 1000}, "mavis_top_k must be an integer from 1 to 128"),
        ({"mavis_kl": 1}, "unknown argument 'mavis_kl'"),
    ],
)
def test_a_bad_request_is_refused_and_the_engine_lives_on(llm, extra_args, message):
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=message):
        llm.generate(tokens([[5, 6]]), SamplingParams(extra_args=extra_args), use_tqdm=False)
    assert generate(llm, [[5, 6]], sampling((1.0, 0.0), 2))


def vllm_config(base_model, mavis, **model_config):
    """vLLM's configuration of a small server, without an engine."""
    from vllm.config import ModelConfig, SchedulerConfig, VllmConfig
    from vllm.platforms import current_platform  # noqa: F401  (must be resolved before the config)

    return VllmConfig(
        model_config=ModelConfig(
            str(base_model), dtype="float32", max_model_len=64, **model_config
        ),
        scheduler_config=SchedulerConfig.default_factory(max_num_seqs=4, max_model_len=64),
        additional_config={"mavis": mavis},
    )


def v1_processor(base_model, mavis, **model_config):
    """The processor as the V1 runner makes it, without an engine around it."""
    from trimtab.plugins.vllm import MAVISLogitsProcessor

    config = vllm_config(base_model, mavis, **model_config)
    return MAVISLogitsProcessor(config, torch.device("cpu"), False)


def test_unguided_rows_are_bit_identical(base_model, value_model):
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate

    processor = v1_processor(base_model, {"value_models": [str(value_model)]})
    logits = torch.randn(3, VOCAB_SIZE)
    assert processor.apply(logits.clone()).equal(logits)
    guided = sampling((1.0, 0.0))
    update = BatchUpdate(
        batch_size=3,
        removed=[],
        added=[
            (0, SamplingParams(), [5], []),
            (1, guided, [6], []),
            (2, SamplingParams(), [7], []),
        ],
        moved=[],
    )
    processor.update_state(update)
    out = processor.apply(logits.clone())
    assert out[[0, 2]].equal(logits[[0, 2]]) and not out[1].equal(logits[1])


def test_a_rows_logits_do_not_depend_on_its_neighbours(base_model, value_model):
    """To the scale, which the penalties that vLLM applies afterwards depend on."""
    from vllm.v1.sample.logits_processor import BatchUpdate

    torch.manual_seed(0)
    logits = torch.randn(2, VOCAB_SIZE)
    requests = [
        (i, sampling((1.0, 0.0), extra_args={"mavis_top_k": k}), [5, 6 + i], [])
        for i, k in enumerate((3, 40))
    ]
    rows = []
    for added in (requests, requests[:1]):
        processor = v1_processor(base_model, {"value_models": [str(value_model)]})
        processor.update_state(BatchUpdate(len(added), [], added, []))
        rows.append(processor.apply(logits[: len(added)].clone())[0])
    torch.testing.assert_close(rows[0], rows[1], rtol=0, atol=1e-5)
    kept = logits[0].topk(3).values
    torch.testing.assert_close(rows[0].logsumexp(0), kept.logsumexp(0))


@pytest.mark.parametrize(
    ("mavis", "message"),
    [
        ({"value_models": ["{base}"]}, "is not a value model"),
        ({"value_models": ["{value}"], "weights": {"salty": 1}}, "unknown objective 'salty'"),
        ({"value_models": ["{value}"], "tok_k": 3}, "unknown key 'tok_k'"),
        ({"value_models": ["{value}", "{value}"]}, "objective of the same name"),
        ({"value_models": ["{value}"], "kv_cache_memory_gib": 1e-6}, "it needs at least"),
        ({"value_models": ["{other}"]}, "was trained with the tokenizer of"),
        ({"value_models": ["{smaller}"]}, "has a vocabulary of 90 tokens"),
    ],
)
def test_a_server_that_cannot_guide_right_does_not_start(
    tmp_path, base_model, value_model, mavis, message
):
    import json

    from trimtab.plugins import MAVISValueConfig, MAVISValueModel

    model = MAVISValueModel.load(str(value_model))
    model.config.tokenizer_fingerprint = "0" * 64
    model.save_pretrained(tmp_path / "other")
    model.config.backbone_config.vocab_size = 90
    MAVISValueModel(MAVISValueConfig.from_dict(model.config.to_dict())).save_pretrained(
        tmp_path / "smaller"
    )
    places = {
        "{base}": base_model,
        "{value}": value_model,
        "{other}": tmp_path / "other",
        "{smaller}": tmp_path / "smaller",
    }
    text = json.dumps(mavis)
    for name, folder in places.items():
        text = text.replace(name, str(folder))
    with pytest.raises(ValueError, match=message):
        v1_processor(base_model, json.loads(text))


def test_a_key_names_a_single_objective_model(tmp_path, base_model, value_model):
    single = make_value_model(tmp_path / "single", base_model, ["reward"])
    processor = v1_processor(
        make_base_model(tmp_path / "base"),
        {"value_models": {"kind": str(single), "taste": str(value_model)}, "weights": {"kind": 2}},
    )
    assert processor._serving.objectives == ("kind", "sweet", "sour")
    assert processor._serving.defaults.weights == (2.0, 0.0, 0.0)
