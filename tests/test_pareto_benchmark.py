"""The arms of `benchmarks/pareto.py`: what they sample, its KL, and a whole run on tiny models."""

from __future__ import annotations

import copy
import json
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from benchmarks import _decoding, _judges, _policies, fronts, pareto
from tests.conftest import make_heads, make_value_model
from tests.reference import Reference
from trimtab.plugins import GuidanceParams, MAVISValueModel, ValueEngine
from trimtab.plugins.guide import Guide
from trimtab.trainers.samplers import TransformersSampler

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [20, 21, 22, 23]]


def make_member(folder, seed):
    """Another tiny model of the same shape."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def plain_log_policy(base, members, prompt, answer, top_k):
    """`log pi` and `log pi_ref` of the candidates at the end of a text, one model at a time."""
    logits = base(torch.tensor([prompt + answer])).logits[0, -1].float()
    candidates = logits.topk(top_k).indices
    log_base = logits[candidates].log_softmax(-1)
    if not members:
        return candidates, log_base, log_base
    mixed = torch.zeros(top_k)
    for model, own_prompt, coefficient in members:
        own = model(torch.tensor([own_prompt + answer])).logits[0, -1].float().log_softmax(-1)
        mixed += coefficient * own[candidates]
    return candidates, mixed.log_softmax(-1), log_base


@torch.inference_mode()
def test_sampled_and_exact_kl_are_the_kl_of_whole_responses(base_model):
    base, other, third = (make_member(base_model, seed) for seed in (0, 1, 2))
    prompt, told, top_k, steps, eos = [5, 6, 7, 8], [9, 10], 3, 3, 2
    members = [(other, prompt, 0.7), (third, told, 0.5)]
    expected, mass = 0.0, 0.0
    unfinished = [([], 0.0, 0.0)]
    for step in range(steps):
        grown = []
        for answer, log_p, log_q in unfinished:
            candidates, log_policy, log_base = plain_log_policy(
                base, members, prompt, answer, top_k
            )
            for token, p, q in zip(candidates.tolist(), log_policy.tolist(), log_base.tolist()):
                path = ([*answer, token], log_p + p, log_q + q)
                if token == eos or step == steps - 1:
                    mass += np.exp(path[1])
                    expected += np.exp(path[1]) * (path[1] - path[2])
                else:
                    grown.append(path)
        unfinished = grown
    assert mass == pytest.approx(1.0, abs=1e-5) and expected > 0.02
    samples = _decoding.sample(
        base, [prompt], [_decoding.Member(m, [p], c) for m, p, c in members],
        eos_token_id=eos, top_k=top_k, max_tokens=steps, seed=0, repeats=4000,
    )  # fmt: skip
    for name in ("log_ratio", "kl"):
        values = np.array([getattr(s, name) for s in samples])
        assert values.mean() == pytest.approx(expected, abs=4 * values.std() / np.sqrt(4000))


@torch.inference_mode()
def test_log_ratios_of_a_padded_batch_equal_the_plain_computation(base_model):
    base, other = make_member(base_model, 0), make_member(base_model, 1)
    told = [[7, 7, *prompt] for prompt in PROMPTS]
    members = [_decoding.Member(other, told, 0.8), _decoding.Member(base, PROMPTS, 0.4)]
    samples = _decoding.sample(
        base, PROMPTS, members, eos_token_id=2, top_k=5, max_tokens=12, seed=3, repeats=2
    )
    assert len(samples) == 2 * len(PROMPTS)
    assert samples[0].token_ids != samples[1].token_ids
    for i, found in enumerate(samples):
        prompt = PROMPTS[i // 2]
        ratio = kl = 0.0
        for t, token in enumerate(found.token_ids):
            candidates, log_policy, log_base = plain_log_policy(
                base,
                [(other, told[i // 2], 0.8), (base, prompt, 0.4)],
                prompt,
                found.token_ids[:t],
                5,
            )
            row = candidates.tolist().index(token)
            ratio += float(log_policy[row] - log_base[row])
            kl += float((log_policy.exp() * (log_policy - log_base)).sum())
        assert found.log_ratio == pytest.approx(ratio, abs=1e-3)
        assert found.kl == pytest.approx(kl, abs=1e-3)


def test_guided_samples_follow_the_engine(base_model, value_model):
    base = make_member(base_model, 0)
    guide = Guide(
        ValueEngine([MAVISValueModel.load(str(value_model))], num_slots=3, max_length=64), 3
    )
    reference = Reference(base_model, [value_model])
    reference.base = base
    for slot in range(3):  # so strong that sampling is greedy
        guide.start(slot, GuidanceParams((1.0, -0.5), beta=1e5, top_k=7))
    samples = _decoding.sample(
        base, PROMPTS, guide=guide, eos_token_id=2, top_k=7, max_tokens=8, seed=0
    )
    for prompt, found in zip(PROMPTS, samples):
        expected = reference.greedy(prompt, 8, [1.0, -0.5], 1e5, 7)
        assert found.token_ids == expected[: len(found.token_ids)]


@torch.inference_mode()
def test_added_adapters_are_the_average_of_merged_models(base_model, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    base = make_member(base_model, 0)
    tokens = torch.tensor([PROMPTS[0]])
    merged = []
    for seed in (1, 2):
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
        model = get_peft_model(make_member(base_model, 0), config)
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.data.normal_(std=0.1)
        model.save_pretrained(tmp_path / str(seed))
        again = PeftModel.from_pretrained(make_member(base_model, 0), tmp_path / str(seed))
        merged.append(again.merge_and_unload())
    soup = _decoding.add_adapters(base, {str(tmp_path / "1"): 0.25, str(tmp_path / "2"): 0.75})
    expected = copy.deepcopy(base)
    for parameter, one, other in zip(
        expected.parameters(), merged[0].parameters(), merged[1].parameters()
    ):
        parameter.copy_(0.25 * one + 0.75 * other)
    assert torch.allclose(soup(tokens).logits, expected(tokens).logits, atol=1e-4)
    assert not torch.allclose(soup(tokens).logits, base(tokens).logits, atol=1e-2)


def test_fronts_of_tiny_models(base_model, tmp_path, monkeypatch):
    objectives = ["positivity", "relevance", "readability", "rarity"]
    values = make_value_model(tmp_path / "values", base_model, objectives)
    command = [
        "pareto.py", "--base", base_model, "--value-model", values,
        "--artifacts", tmp_path / "work", "--report", tmp_path / "front", "--prompts", "3",
        "--seeds", "2", "--betas", "1", "8", "--best-of", "2", "4", "--steps", "2",
        "--rollouts", tmp_path / "none",
        "--max-tokens", "3",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    for _ in range(2):  # the second time nothing is left to sample
        pareto.main()
        result = json.loads((tmp_path / "front.json").read_text())
        stored = sorted((tmp_path / "work").rglob("*.json"))
        before = {path: path.stat().st_mtime_ns for path in stored}
    assert before == {path: path.stat().st_mtime_ns for path in stored}
    counts = Counter((p["method"], p["strength"]) for p in result["points"])
    assert counts["unguided", 1.0] == 1 and counts["MORLHF", 2] == 4
    others = {("MAVIS", 1.0), ("MAVIS", 8.0), ("Rewarded Soups", 1), ("MOD", 2), ("prompting", 1.0)}
    assert {counts[other] for other in others} == {8}
    assert {p["seeds"] for p in result["points"] if p["strength"] == 4} == {1}  # one pool of 4
    assert set(result["training"]["policies"]) == set(_policies.POLICIES)
    monkeypatch.setattr(sys, "argv", [*map(str, command[:-1]), "4"])
    with pytest.raises(SystemExit, match="give another --artifacts"):
        pareto.main()


def test_heads_and_best_of_n_of_tiny_models(base_model, tmp_path, monkeypatch):
    heads = make_heads(tmp_path / "heads", base_model, list(pareto.OBJECTIVES))

    def sampler(model, config, ends, value_models, **kwargs):
        return TransformersSampler(model, config, ends, value_models)

    def rarity(prompts, completions, **columns):  # of words that are none
        return [float(sum(map(ord, c[0]["content"])) % 97) for c in completions]

    monkeypatch.setattr(fronts, "VLLMSampler", sampler)
    monkeypatch.setattr(fronts.rewards, "rarity", rarity)
    command = [
        "fronts.py", "--base", base_model, "--value-model", heads, "--artifacts", tmp_path / "work",
        "--report", tmp_path / "front", "--prompts", "3", "--betas", "1", "8", "--max-tokens", "4",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    fronts.main()
    result = json.loads((tmp_path / "front.json").read_text())
    of = {
        (p["method"], p["strength"], tuple(sorted(p["weights"].items()))): p
        for p in result["points"]
    }
    assert of["unguided", 1.0, ()]["kl"]["value"] == 0
    for beta in (1.0, 8.0):
        one = (("rarity", 1.0),)
        plain, best = of["heads", beta, one], of["heads, best of 4", beta, one]
        assert (plain["seeds"], best["seeds"]) == (4, 1)
        # The four responses that it chooses from are those of the guided arm.
        assert best["gain"]["rarity"]["value"] > plain["gain"]["rarity"]["value"]
        expected = plain["kl"]["value"] + np.log(4) - 0.75
        assert best["kl"]["value"] == pytest.approx(expected)
    assert of["best of 16", 16, one]["kl"]["value"] == pytest.approx(np.log(16) - 15 / 16)
    assert "| readability, rarity | 10 |" in (tmp_path / "front.md").read_text()
    monkeypatch.setattr(sys, "argv", [*map(str, command[:-1]), "5"])
    with pytest.raises(SystemExit, match="give another --artifacts"):
        fronts.main()


PARKS = [{"role": "user", "content": "Write two sentences about city parks."}]


@pytest.mark.parametrize(
    ("judge", "better", "worse"),
    [
        ("positivity", "What a lovely and happy day.", "What a horrible and sad day."),
        ("readability", "The cat sat. It ate.", "Municipal administrations necessitate it."),
        ("rarity", "Esoteric palimpsests obfuscate it.", "The children walked to the stores."),
        ("relevance", "Parks make a city green.", "Write two sentences, they said."),
    ],
)
def test_judges_tell_better_from_worse(judge, better, worse):
    chess = [{"role": "user", "content": "Write two sentences about chess."}]
    texts = [[{"role": "assistant", "content": text}] for text in (better, worse)]
    prompts = [PARKS, PARKS, chess, chess]
    high, low, *_ = getattr(_judges, judge)(prompts=prompts, completions=texts * 2)
    assert high > low
    assert np.isfinite(getattr(_judges, judge)(prompts=[PARKS], completions=[""])).all()


def test_a_child_knows_regular_endings():
    known = frozenset({"walk", "berry", "dance"})
    words = ["walks", "walked", "walking", "berries", "danced", "ferries"]
    assert [_judges.is_easy(word, known) for word in words] == [True] * 5 + [False]
