"""`generate` with the processor against guidance computed the plain way."""

from __future__ import annotations

import contextlib
import copy

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM

from tests.conftest import EOS, make_tokenizer, make_value_model
from tests.plugins.test_engine import VOCAB, full_forward, make_model, plain
from tests.reference import Reference
from trimtab.plugins import MAVISValueModel
from trimtab.plugins.transformers import MAVISLogitsProcessor

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20, 21], [33, 34, 35, 36]]
WEIGHTS, BETA, TOP_K = {"sweet": 1.0, "sour": -0.5}, 3.0, 8
on_each_device = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ),
    ],
)


@pytest.fixture(scope="module")
def base(base_model):
    return AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def reference(base_model, value_model):
    return Reference(base_model, [value_model])


@pytest.fixture
def processor(value_model):
    return MAVISLogitsProcessor([str(value_model)], weights=WEIGHTS, beta=BETA, top_k=TOP_K)


def left_padded(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[EOS] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


@on_each_device
def test_greedy_left_padded_batch_equals_each_row_alone(base, reference, processor, device):
    model = copy.deepcopy(base).to(device)
    ids, mask = (x.to(device) for x in left_padded(PROMPTS))
    for _ in range(2):  # a processor serves many calls
        processor.attention_mask = mask
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=12, do_sample=False,
            logits_processor=[processor],
        )  # fmt: skip
        for prompt, row in zip(PROMPTS, out[:, ids.shape[1] :].tolist()):
            expected = reference.greedy(prompt, 12, (1.0, -0.5), BETA, TOP_K, eos=EOS)
            assert row[: len(expected)] == expected
            assert set(row[len(expected) :]) <= {EOS}


def test_sampled_first_tokens_have_the_guided_distribution(base, reference, processor):
    torch.manual_seed(0)
    ids = torch.tensor([PROMPTS[0]] * 3000)
    out = base.generate(
        ids, max_new_tokens=1, do_sample=True, top_k=0, logits_processor=[processor]
    )
    policy = reference.distribution(PROMPTS[0], (1.0, -0.5), BETA, TOP_K)
    counts = torch.bincount(out[:, -1], minlength=96)
    assert counts.sum() == sum(counts[token].item() for token in policy)
    observed = [counts[token].item() for token in policy]
    assert chisquare(observed, [3000 * p for p in policy.values()]).pvalue > 1e-3


def test_beam_search_equals_brute_force(base, reference, processor):
    """With as many beams as there are two-token continuations the best one must be found."""
    processor.params = type(processor.params)(weights=(1.0, -0.5), beta=BETA, top_k=4)
    prompt = PROMPTS[2]
    out = base.generate(
        torch.tensor([prompt]), max_new_tokens=3, min_new_tokens=3, num_beams=16,
        do_sample=False, logits_processor=[processor],
    )  # fmt: skip

    def best(prefix, depth):
        if not depth:
            return 0.0, []
        options = []
        policy = reference.distribution(prefix, (1.0, -0.5), BETA, 4, masked=[EOS])
        for token, p in policy.items():
            score, rest = best([*prefix, token], depth - 1)
            options.append((torch.tensor(p).log().item() + score, [token, *rest]))
        return max(options)

    assert out[0, len(prompt) :].tolist() == best(prompt, 3)[1]


def test_a_row_of_other_tokens_is_read_afresh(base, reference, processor):
    """Whatever the caller feeds, the values belong to the tokens that it fed."""
    torch.manual_seed(1)
    ids = torch.randint(3, 96, (3, 9))
    for length in (9, 4, 7):
        for rows in ([0, 1, 2], [2, 0, 1]):
            fed = ids[rows, :length]
            scores = base(fed).logits[:, -1].float()
            out = processor(fed, scores).softmax(-1)
            for row, probabilities in zip(fed.tolist(), out):
                policy = reference.distribution(row, (1.0, -0.5), BETA, TOP_K)
                for token, p in policy.items():
                    assert probabilities[token].item() == pytest.approx(p, abs=1e-4)


def test_several_models_and_a_kl_budget(tmp_path, base, base_model, value_model):
    other = make_value_model(tmp_path / "other", base_model, ["salty"], seed=3)
    processor = MAVISLogitsProcessor(
        [str(value_model), str(other)],
        weights=[1.0, 0.0, 2.0],
        beta=50.0,
        top_k=TOP_K,
        kl_budget=0.05,
    )
    ids = torch.tensor(PROMPTS[:1])
    scores = base(ids).logits[:, -1].float()
    policy = processor(ids, scores)[0].softmax(-1).double()
    top, candidates = scores[0].double().topk(TOP_K)
    log_ref = torch.log_softmax(top, 0)
    p = policy[candidates]
    kl = (p * (p.log() - log_ref)).sum().item()
    assert kl == pytest.approx(0.05, abs=1e-3)
    # The direction is that of both models' values: log-ratios are linear in the weighted values.
    reference = Reference(base_model, [value_model, other])
    full = reference.distribution(PROMPTS[0], (1.0, 0.0, 2.0), 1.0, TOP_K)
    tilt = torch.tensor([full[c] for c in candidates.tolist()]).log() - log_ref
    ratio = p.log() - log_ref
    assert torch.corrcoef(torch.stack((tilt, ratio)))[0, 1] > 0.9999


def test_one_value_model_need_not_be_in_a_list(value_model):
    ids, scores = torch.tensor([[5, 6, 7]]), torch.randn(1, 96)
    outcomes = [
        MAVISLogitsProcessor(models, weights={"sweet": 1.0})(ids, scores)
        for models in ([str(value_model)], str(value_model), MAVISValueModel.load(str(value_model)))
    ]
    assert outcomes[0].equal(outcomes[1]) and outcomes[0].equal(outcomes[2])


MODEL = make_model("llama", ("sweet", "sour"))
PLAIN = plain(MODEL)


def policy_of(prefix, scores):
    """The guided distribution `[vocab]` after one prefix, by a full forward pass."""
    top, candidates = scores.topk(TOP_K)
    values = full_forward([PLAIN], prefix, candidates.tolist())
    policy = (top + BETA * values @ torch.tensor([1.0, -0.5])).softmax(0)
    return torch.zeros_like(scores).scatter(0, candidates, policy)


class Calls(RuleBasedStateMachine):
    """One processor through batches of all sizes and paddings, going on, cut back, interrupted."""

    @initialize()
    def start(self):
        self.processor = MAVISLogitsProcessor([MODEL], weights=WEIGHTS, beta=BETA, top_k=TOP_K)
        self.rows = None

    @rule(
        # Short prefixes of one text, so that a batch's rows often resemble the last batch's.
        lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
        text=st.integers(0, 1),
        copies=st.sampled_from([1, 1, 2]),
        extra=st.integers(0, 3),
    )
    def begin(self, lengths, text, copies, extra):
        tokens = np.random.default_rng(text).integers(3, VOCAB, 40).tolist()
        self.rows = [tokens[:n] for n in lengths for _ in range(copies)]
        self.width = max(lengths) + extra
        mask = [[0] * (self.width - n) + [1] * n for n in lengths]
        self.processor.attention_mask = torch.tensor(mask)
        self.prompts = list(map(len, self.rows))
        self.call(0)

    @precondition(lambda self: self.rows)
    @rule(seed=st.integers(0, 99))
    def go_on(self, seed):
        tokens = np.random.default_rng(seed).integers(3, VOCAB, len(self.rows)).tolist()
        self.rows = [[*row, token] for row, token in zip(self.rows, tokens)]
        self.call(seed)

    @precondition(lambda self: self.rows)
    @rule(back=st.integers(1, 3), seed=st.integers(0, 99))
    def be_cut_back(self, back, seed):  # as in assisted decoding
        back = min(back, len(self.rows[0]) - self.prompts[0])
        self.rows = [row[: len(row) - back] for row in self.rows]
        self.call(seed)

    @precondition(lambda self: self.rows)
    @rule(passes=st.integers(0, 2))
    def be_interrupted(self, passes):
        engine = self.processor._guide.engine
        run, left = engine._run, [passes]

        def interrupted(*arguments):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return run(*arguments)

        engine._run = interrupted
        with contextlib.suppress(KeyboardInterrupt):
            self.rows = [[*row, 3] for row in self.rows]
            self.processor(self.ids(), torch.randn(len(self.rows), VOCAB))
        engine._run = run

    def ids(self):
        return torch.tensor(
            [[EOS] * (self.width - prompt) + row for row, prompt in zip(self.rows, self.prompts)]
        )

    def call(self, seed):
        scores = torch.randn(len(self.rows), VOCAB, generator=torch.Generator().manual_seed(seed))
        out = self.processor(self.ids(), scores.clone()).softmax(-1)
        for row, one, policy in zip(self.rows, scores, out):
            torch.testing.assert_close(policy, policy_of(row, one), rtol=1e-3, atol=1e-4)


TestAProcessorUsedAgainIsAsAFreshOne = Calls.TestCase
TestAProcessorUsedAgainIsAsAFreshOne.settings = settings(stateful_step_count=15)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[2, 2, 5], [8, 9, 10]], [[0, 0, 1], [0, 1, 1]], "hides other tokens than padding"),
        ([[2, 2, 5], [8, 9, 10]], [[0, 1], [1, 1]], "or not the whole prompt"),
        ([[8, 9, 10]], [[1], [1]], r"of shape \[2, 1\] does not belong to input_ids of shape"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(processor, ids, mask, message):
    processor.attention_mask = torch.tensor(mask)
    with pytest.raises(ValueError, match=message):
        processor(torch.tensor(ids), torch.randn(len(ids), 96))


def test_the_mask_of_an_earlier_batch_is_refused(processor):
    ids, mask = left_padded([[5, 6, 7], [8, 9, 10, 11, 12]])
    processor.attention_mask = mask
    processor(ids, torch.randn(2, 96))
    for later in ([[2, 2, 15, 16, 17], [8, 9, 10, 11, 12]], [[15, 16, 17, 18, 19, 20]] * 2):
        with pytest.raises(ValueError, match="was set for other prompts: set"):
            processor(torch.tensor(later), torch.randn(2, 96))


def test_zero_weights_leave_scores_alone(value_model):
    processor = MAVISLogitsProcessor([str(value_model)], weights={})
    scores = torch.randn(1, 96)
    assert processor(torch.tensor([[5]]), scores) is scores


def test_padding_without_a_mask_is_refused(base, processor):
    ids, mask = left_padded(PROMPTS)
    with pytest.raises(ValueError, match="starts with the padding token: pass the attention_mask"):
        base.generate(ids, attention_mask=mask, max_new_tokens=1, logits_processor=[processor])


def test_right_padding_is_refused(processor):
    processor.attention_mask = torch.tensor([[1, 1, 0]])
    with pytest.raises(ValueError, match="not a left-padded batch"):
        processor(torch.tensor([[5, 6, 2]]), torch.randn(1, 96))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"bitter": 1}}, "weights: unknown objective 'bitter'"),
        ({"weights": {"sweet": 1}, "beta": -1.0}, "beta must be a number from 0 to"),
        ({"weights": {"sweet": 1}, "beta": 1e300}, "beta must be a number from 0 to"),
        ({"weights": {"sweet": 1e300}}, r"weights\['sweet'\] must be a number from"),
        ({"weights": {"sweet": 5.0}, "beta": 1e6}, "beta times the sum of"),
        ({"weights": {"sweet": 1}, "top_k": 0}, "top_k must be an integer from 1 to"),
        ({"weights": [1.0]}, "weights has 1 numbers for 2 objectives"),
    ],
)
def test_bad_parameters_are_refused_by_name(value_model, options, message):
    with pytest.raises(ValueError, match=message):
        MAVISLogitsProcessor([str(value_model)], **options)


def test_another_tokenizer_and_another_vocabulary_are_refused(value_model, processor):
    other = make_tokenizer([f"v{i}" for i in range(3, 96)])
    with pytest.raises(ValueError, match="was trained with the tokenizer of"):
        MAVISLogitsProcessor([str(value_model)], weights={"sweet": 1}, tokenizer=other)
    with pytest.raises(ValueError, match="vocabulary of 96 tokens, the base model has 97"):
        processor(torch.tensor([[5]]), torch.randn(1, 97))
