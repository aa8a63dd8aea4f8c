"""Early rejection against a plain loop of full forward passes, in transformers and in vLLM."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import EOS, make_heads, make_tokenizer, make_value_model
from tests.reference import Reference
from trimtab.plugins import MAVISValueHeads, best_of_n
from trimtab.plugins.heads import HeadGuide, value_code, value_of_code
from trimtab.plugins.search.interface import left_padded
from trimtab.plugins.transformers import MAVISLogitsProcessor

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20, 21], [33, 34, 35, 36]]
WEIGHTS = {"sweet": 1.0, "sour": -0.5}
KEEP = {2: 6, 5: 3, 7: 3, 9: 2}  # what drops nothing among it
LENGTH, N = 12, 8


@pytest.fixture(scope="module")
def base(base_model):
    return AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32).eval()


class Plain:
    """What `best_of_n` says that it does: every value and token by a full forward pass."""

    def __init__(self, base_model, heads, beta=0.0, top_k=96) -> None:
        self.reference = Reference(base_model, [heads])
        self.heads = self.reference.values[0]
        self.beta, self.top_k = beta, top_k

    @torch.no_grad()
    def values(self, text) -> torch.Tensor:
        """`V(s) + A(s, a)` of the last token `a` at its prefix `s`, `[objectives]` float64."""
        prefix, last = list(text[:-1]), torch.tensor([text[-1]])
        output = self.reference.base(torch.tensor([prefix]), output_hidden_states=True)
        hidden = output.hidden_states[-1][0, -1].double()
        weight = {name: w.double() for name, w in self.heads.state_dict().items()}
        standard = (hidden - weight["hidden_mean"]) / weight["hidden_std"]
        value = weight["value.weight"] @ standard + weight["value.bias"]
        return value + self.reference.head_values(self.heads, prefix, last)[0]

    def score(self, text) -> float:
        return float(self.values(text) @ torch.tensor([1.0, -0.5], dtype=torch.float64))

    def probabilities(self, text) -> torch.Tensor:
        policy = self.reference.distribution(text, (1.0, -0.5), self.beta, self.top_k)
        found = torch.zeros(96)
        found[list(policy)] = torch.tensor(list(policy.values())).float()
        return found

    def sample(self, prompts, n, keep, length):
        """Of every prompt the responses that are left; tokens that were sampled of it in all."""
        kept = [[[] for _ in range(n)] for _ in prompts]
        tokens = [0] * len(prompts)

        def going(of):
            return [r for r in of if EOS not in r]

        for step in range(length):
            if step in keep or step == 0:  # rows that have ended stay in the batch until then
                batch = [(i, r) for i, of in enumerate(kept) for r in going(of)]
            if not batch:
                break
            # A row that has ended is drawn for as well, and its draw has no effect.
            rows = [self.probabilities(prompts[i] + (r or [])) for i, r in batch]
            for (i, r), token in zip(batch, torch.multinomial(torch.stack(rows), 1)[:, 0].tolist()):
                if EOS not in r:
                    r.append(token)
                    tokens[i] += 1
            if step + 1 in keep:
                for i, of in enumerate(kept):
                    ranked = sorted(
                        going(of), key=lambda r, i=i: self.score(prompts[i] + r), reverse=True
                    )
                    dropped = ranked[keep[step + 1] :]
                    of[:] = [r for r in of if not any(r is d for d in dropped)]
        return kept, tokens


@pytest.mark.parametrize("guided", [False, True])
def test_early_rejection_equals_the_plain_algorithm(base, base_model, heads, guided):
    asked = {
        "n": N, "value_models": [str(heads)], "weights": WEIGHTS, "keep": KEEP,
        "max_new_tokens": LENGTH, "top_k": 0, "top_p": 1.0,
    }  # fmt: skip
    plain = Plain(base_model, heads)
    if guided:
        plain = Plain(base_model, heads, beta=2.0, top_k=70)
        asked["logits_processor"] = [
            MAVISLogitsProcessor([str(heads)], weights=WEIGHTS, beta=2.0, top_k=70, model=base)
        ]
    ended = 0
    for seed in range(4):  # the same processor and model, again and again
        torch.manual_seed(seed)
        kept, tokens = plain.sample(PROMPTS, N, {2: 6, 5: 3, 9: 2}, LENGTH)
        torch.manual_seed(seed)
        found = best_of_n(base, *left_padded(PROMPTS, base.device), **asked)
        assert found.num_tokens.tolist() == tokens
        for i, prompt in enumerate(PROMPTS):
            expected = sorted(kept[i], key=lambda r: plain.score(prompt + r), reverse=True)
            assert found.sequences[i] == expected
            scores = torch.tensor([plain.score(prompt + r) for r in expected])
            assert torch.allclose(found.scores[i, : len(expected)], scores, atol=1e-4)
            assert (found.scores[i, len(expected) :] == -math.inf).all()
            values = torch.stack([plain.values(prompt + r) for r in expected]).float()
            assert torch.allclose(found.values[i, : len(expected)], values, atol=1e-4)
            ended += sum(r[-1] == EOS for r in expected)
    assert ended or guided  # some end before the others, and stay


def test_a_schedule_that_drops_nothing_is_best_of_n_and_one_that_drops_samples_less(base, heads):
    asked = {
        "n": N, "value_models": [str(heads)], "weights": WEIGHTS, "max_new_tokens": LENGTH,
        "top_k": 0,
    }  # fmt: skip

    def found(**options):
        torch.manual_seed(0)
        return best_of_n(base, PROMPTS, **asked | options)

    every = found()
    assert [len(of) for of in every.sequences] == [N] * 3
    assert every.num_tokens.tolist() == [sum(map(len, of)) for of in every.sequences]
    nothing = found(keep={3: N, 6: N})
    assert nothing.sequences == every.sequences and nothing.scores.equal(every.scores)
    for keep in ({3: 1}, {1: 7}, {4: 4, 8: 2}, {11: 1}):
        fewer = found(keep=keep)
        live = [N, *(count for _, count in sorted(keep.items()))]
        spans = [b - a for a, b in zip([0, *sorted(keep)], [*sorted(keep), LENGTH])]
        most = sum(count * span for count, span in zip(live, spans))
        assert (fewer.num_tokens <= most).all() and most < N * LENGTH
        for i, of in enumerate(fewer.sequences):
            going_on = [r for r in of if len(r) > max(keep)]
            assert of and len(going_on) <= min(keep.values())
            # None is dropped where some had ended by themselves before.
            assert len(of) < N or min(map(len, of)) <= min(keep)
            assert sum(map(len, of)) <= fewer.num_tokens[i]
    # The beginnings of those that go on are those of best-of-N: they came from the same draws.
    begun = [{tuple(r[:4]) for r in of} for of in every.sequences]
    for i, of in enumerate(found(keep={4: 4}).sequences):
        assert {tuple(r[:4]) for r in of} <= begun[i]


def test_one_response_is_a_plain_sample(base, heads):
    ids, mask = left_padded(PROMPTS, base.device)
    torch.manual_seed(3)
    expected = base.generate(
        input_ids=ids, attention_mask=mask, do_sample=True, top_k=20, max_new_tokens=8,
        pad_token_id=EOS,
    )[:, ids.shape[1] :].tolist()  # fmt: skip
    torch.manual_seed(3)
    found = best_of_n(
        base, PROMPTS, n=1, value_models=MAVISValueHeads.from_pretrained(heads), weights=WEIGHTS,
        keep={4: 1}, max_new_tokens=8, top_k=20,
    )  # fmt: skip
    for (response,), row in zip(found.sequences, expected):
        assert response == row[: len(response)]
        assert len(response) == 8 or (
            response[-1] == EOS and row[len(response) :] == [EOS] * (8 - len(response))
        )


def test_rewards_judge_those_that_values_have_kept(base, heads):
    judged = []

    def sweet(completion_ids, topic, **kwargs):
        judged.extend(zip(topic, completion_ids))
        return [float(sum(ids)) for ids in completion_ids]

    torch.manual_seed(0)
    found = best_of_n(
        base, PROMPTS, n=N, value_models=[str(heads)], weights={"sweet": 1.0}, keep=KEEP,
        reward_funcs={"sweet": sweet}, tokenizer=make_tokenizer(), columns={"topic": [0, 1, 2]},
        max_new_tokens=LENGTH, top_k=0,
    )  # fmt: skip
    assert len(judged) == sum(map(len, found.sequences)) < 3 * N
    for i, of in enumerate(found.sequences):
        assert sorted(of) == sorted(ids for topic, ids in judged if topic == i)
        assert of == sorted(of, key=sum, reverse=True)
        assert found.scores[i, : len(of)].tolist() == [float(sum(r)) for r in of]
        assert found.values[i, : len(of), 1].isnan().all()


@pytest.mark.parametrize("vocab_size", [96, 49_152, 262_144])
def test_tokens_order_and_say_values(vocab_size):
    values = torch.linspace(-9, 9, 1001)
    codes = value_code(values, vocab_size)
    assert (codes.diff() >= 0).all() and codes.min() >= 0 and codes.max() < vocab_size
    said = torch.tensor([value_of_code(code, vocab_size) for code in codes.tolist()])
    # Half a token more at the edges of a cell: its width grows within it, and where it is widest.
    bound = math.pi * (1 + said.square().maximum(values.square())) / (2 * (vocab_size - 1))
    assert ((said - values).abs() <= bound * 1.01 + 1e-5).all()
    far = value_code(torch.tensor([-1e30, 1e30]), vocab_size)
    assert [value_of_code(code, vocab_size) for code in far.tolist()] == [-math.inf, math.inf]


@pytest.fixture(scope="module")
def salty_heads(tmp_path_factory, base_model):
    return make_heads(tmp_path_factory.mktemp("salty"), base_model, ["salty"], seed=8)


def make_llm(base_model, multiprocessing="1", **options):
    """An engine of its own process: the end of one within this process would be that of others."""
    from vllm import LLM

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", multiprocessing)
        return LLM(
            str(base_model), dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=16,
            enable_prefix_caching=True,  # vLLM's CPU runner fails on seeded prompts in chunks
            block_size=32, num_gpu_blocks_override=40, **options,
        )  # fmt: skip


@pytest.fixture(scope="module")
def llm(base_model, heads, salty_heads):
    """Of two models of heads, those that are asked for being the second."""
    config = {"value_models": [str(salty_heads), str(heads)], "beta": 2.0, "top_k": 20}
    llm = make_llm(
        base_model,
        logits_processors=["trimtab.plugins.vllm:MAVISLogitsProcessor"],
        additional_config={"mavis": config | {"weights": {"salty": 1.0}}},
    )
    yield llm
    llm.llm_engine.engine_core.shutdown()


@pytest.mark.parametrize("guided", [False, True])
def test_early_rejection_in_vllm(llm, base_model, heads, guided):
    from vllm import SamplingParams

    weights = WEIGHTS if guided else {}
    params = SamplingParams(
        temperature=1.0, top_k=20, max_tokens=LENGTH, seed=5, extra_args={"mavis_weights": weights}
    )
    asked = {
        "n": N, "value_models": [str(heads)], "weights": WEIGHTS, "sampling_params": params,
        "use_tqdm": False,
    }  # fmt: skip
    every = best_of_n(llm, PROMPTS, **asked)
    found = best_of_n(llm, PROMPTS, **asked, keep=KEEP)
    again = best_of_n(llm, PROMPTS, **asked, keep=KEEP)
    assert (params.n, params.max_tokens, params.seed) == (1, LENGTH, 5)
    assert again.sequences == found.sequences and again.scores.equal(found.scores)
    nothing = best_of_n(llm, PROMPTS, **asked, keep={3: N})
    assert nothing.sequences == every.sequences
    assert (found.num_tokens <= 2 * 8 + 3 * 6 + 4 * 3 + 3 * 2).all()
    plain = Plain(base_model, heads)
    for i, prompt in enumerate(PROMPTS):
        for output in (every, found):
            values = torch.stack([plain.values(prompt + r) for r in output.sequences[i]]).float()
            # A value is said by one of 96 tokens, whose neighbours are that far away.
            bound = math.pi * (1 + (values.abs() + 0.1).square()) / 96
            assert ((output.values[i, : len(values)] - values).abs() <= bound).all()
        # The first two tokens are best-of-N's, and of these the best six go on, or end at once.
        begun = [r[:2] for r in every.sequences[i]]
        short = [r for r in begun if EOS in r]
        ranked = sorted(
            (r for r in begun if EOS not in r),
            key=lambda r: plain.score(prompt + r),
            reverse=True,
        )
        at_least = plain.score(prompt + ranked[min(6, len(ranked)) - 1])
        for response in found.sequences[i]:
            beginning = response[:2]
            assert beginning in short or plain.score(prompt + beginning) >= at_least - 0.5
        if guided:
            for response in found.sequences[i]:
                for t, token in enumerate(response):
                    policy = plain.reference.distribution(
                        prompt + response[:t], (1.0, -0.5), 2.0, 20
                    )
                    assert token in policy


def test_a_value_that_vllm_has_not_read_is_no_value(base_model, heads, monkeypatch):
    from vllm import SamplingParams

    llm = make_llm(
        base_model,
        multiprocessing="0",  # so that the step can be made fail
        logits_processors=["trimtab.plugins.vllm:MAVISLogitsProcessor"],
        additional_config={"mavis": {"value_models": [str(heads)]}},
    )

    def fail(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(HeadGuide, "values", fail)
    params = SamplingParams(temperature=1.0, max_tokens=LENGTH)
    asked = {"value_models": [str(heads)], "weights": WEIGHTS, "sampling_params": params}
    with pytest.raises(RuntimeError, match="has not read a value; its log says why"):
        best_of_n(llm, PROMPTS, **asked, n=N, keep=KEEP)
    llm.llm_engine.engine_core.shutdown()


def test_vllm_goes_on_with_texts_to_their_end(llm, heads):
    """Responses of the likeliest tokens are the same in rounds as in one."""
    from vllm import SamplingParams

    params = SamplingParams(top_k=1, max_tokens=LENGTH, extra_args={"mavis_weights": {}})
    asked = {"value_models": [str(heads)], "weights": WEIGHTS, "use_tqdm": False}
    whole = best_of_n(llm, PROMPTS, n=1, sampling_params=params, **asked)
    cut = best_of_n(llm, PROMPTS, n=4, keep={1: 3, 5: 2}, sampling_params=params, **asked)
    for (response,), rounds in zip(whole.sequences, cut.sequences):
        assert all(r == response for r in rounds)
    # Up to the longest text that the engine takes.
    params = params.clone()
    params.max_tokens, params.ignore_eos = None, True
    full = best_of_n(llm, PROMPTS, n=2, keep={1: 1}, sampling_params=params, **asked)
    assert [len(p) + len(r) for p, (r,) in zip(PROMPTS, full.sequences)] == [64] * 3


def test_a_vllm_engine_without_these_heads_is_refused(llm, base_model, heads, tmp_path):
    other = make_heads(tmp_path, base_model, ["sweet", "sour"], reward_std=[2.0, 1.0])
    with pytest.raises(ValueError, match=r"guides by other value models than the heads for"):
        best_of_n(llm, PROMPTS, n=2, value_models=[str(other)], weights=WEIGHTS)
    plain = make_llm(base_model)
    try:
        with pytest.raises(ValueError, match="this LLM does not have MAVISLogitsProcessor: start"):
            best_of_n(plain, PROMPTS, n=2, value_models=[str(heads)], weights=WEIGHTS)
    finally:
        plain.llm_engine.engine_core.shutdown()


BAD = [
    ({"keep": [3]}, r"keep must map numbers of tokens to numbers of responses, got \[3\]"),
    ({"keep": {0: 2}}, "a number of tokens in keep must be an integer of at least 1, got 0"),
    ({"keep": {2.5: 2}}, "a number of tokens in keep must be an integer of at least 1, got 2.5"),
    ({"keep": {3: 0}}, r"keep\[3\] must be an integer of at least 1, got 0"),
    ({"keep": {3: 5}}, r"keep\[3\] must be at most 4, the number of responses that .* got 5"),
    ({"keep": {3: 2, 5: 3}}, r"keep\[5\] must be at most 2, the number of responses"),
    ({"keep": {3: 2}, "n": 1}, r"keep\[3\] must be at most 1, the number"),
    ({"keep": {8: 2}}, r"keep\[8\] is to drop .* they have at most 8: choose fewer"),
    ({"max_new_tokens": None}, "keep needs max_new_tokens"),
    ({"min_new_tokens": 4}, "min_new_tokens 4 holds from where a call of generate begins"),
    ({"generator": lambda prompts, n: []}, r"\['max_new_tokens', 'top_k'\] are for `generate`"),
    ({"weights": {"bitter": 1}}, "weights: unknown objective 'bitter'"),
    ({"num_beams": 2, "keep": None}, "values are read of responses that are sampled"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_schedules_are_refused_by_name(base, heads, options, message):
    asked = {
        "generator": base, "input_ids": PROMPTS, "n": 4, "value_models": [str(heads)],
        "weights": WEIGHTS, "keep": {3: 2}, "max_new_tokens": 8, "top_k": 20,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        best_of_n(**asked | options)


def test_vllm_refuses_what_a_round_would_count_anew(llm, heads):
    from vllm import SamplingParams

    asked = {"n": 4, "value_models": [str(heads)], "weights": WEIGHTS, "keep": {3: 2}}
    for options, message in (
        ({"min_tokens": 2}, "min_tokens 2 holds from where"),
        ({"presence_penalty": 0.5}, r"presence_penalty 0\.5 holds from where"),
        ({"max_tokens": 3}, r"keep\[3\] is to drop"),
    ):
        params = SamplingParams(**{"max_tokens": 8, **options})
        with pytest.raises(ValueError, match=message):
            best_of_n(llm, PROMPTS, sampling_params=params, **asked)


def test_models_that_cannot_say_values_on_the_way_are_refused(
    base, base_model, heads, value_model, tmp_path
):
    asked = {"n": 4, "weights": WEIGHTS, "keep": {3: 2}, "max_new_tokens": 8}
    with pytest.raises(ValueError, match=r"\['sweet', 'sour'\] have a backbone: train heads"):
        best_of_n(base, PROMPTS, value_models=[str(value_model)], **asked)
    both = [str(heads), str(make_value_model(tmp_path, base_model, ["bitter"]))]
    with pytest.raises(ValueError, match="have a backbone"):
        best_of_n(base, PROMPTS, value_models=both, **asked)
    with pytest.raises(ValueError, match="a function does not show: give a transformers model"):
        best_of_n(
            lambda prompts, n: [[[7]] * n for _ in prompts], PROMPTS, n=2, weights=WEIGHTS,
            value_models=[str(heads)],
        )  # fmt: skip
