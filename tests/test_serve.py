"""The real thing: `vllm serve` with the flag, SmolLM2-135M-Instruct, and an OpenAI client."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import torch
from scipy.stats import chisquare

from tests.conftest import wait_until_up
from tests.reference import Reference

ROOT = Path(__file__).parents[1]
BETA, TOP_K = 3.0, 5
MESSAGES = [{"role": "user", "content": "Name a colour."}]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    folder = ROOT / "artifacts" / "smollm2"
    subprocess.run([sys.executable, ROOT / "examples" / "smollm2.py", folder], check=True)
    return folder


@pytest.fixture(scope="module")
def quality(smollm2, tmp_path_factory) -> Path:
    """A value model over SmolLM2 with a random head: guidance that no training explains."""
    from transformers import AutoTokenizer

    from trimtab.plugins import MAVISValueModel

    model = MAVISValueModel.from_base_model(
        str(smollm2),
        ["calm", "bold"],
        num_hidden_layers=2,
        tokenizer=AutoTokenizer.from_pretrained(smollm2),
    )
    torch.manual_seed(0)
    torch.nn.init.normal_(model.head.weight, std=0.02)
    folder = tmp_path_factory.mktemp("quality")
    model.save_pretrained(folder)
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(model: Path, config: dict, log: Path) -> tuple[subprocess.Popen, int]:
    port = free_port()
    command = [
        Path(sys.executable).with_name("vllm"), "serve", model,
        "--logits-processors", "trimtab.plugins.vllm:MAVISLogitsProcessor",
        "--additional-config", json.dumps({"mavis": config}),
        "--served-model-name", "smollm2", "--dtype", "float32", "--enforce-eager",
        "--max-model-len", "256", "--max-num-seqs", "8",
        "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_PLUGINS": "mavis"}
    with log.open("w") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env), port


@pytest.fixture(scope="module")
def client(smollm2, quality, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "vllm.log"
    config = {"value_models": {"taste": str(quality)}, "beta": BETA, "top_k": TOP_K}
    server, port = start(smollm2, config, log)
    try:
        wait_until_up(server, f"http://127.0.0.1:{port}", log)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=1800)
    finally:
        server.terminate()
        server.wait()


def ask(client, weights: str | None = None, **options):
    body = {"return_token_ids": True, **options.pop("extra_body", {})}
    if weights is not None:
        body["vllm_xargs"] = {"mavis_weights": weights}
    options = {"temperature": 0.0, "max_tokens": 12, **options}
    return client.chat.completions.create(
        model="smollm2", messages=MESSAGES, extra_body=body, **options
    )


def test_a_request_that_tries_to_be_guided_and_is_not_is_refused(client):
    """What a new user sends, each of which vLLM itself answers with unguided text."""
    weights = {"mavis_weights": "calm=1"}
    for extra_body in (
        weights,
        {"extra_body": {"vllm_xargs": weights}},
        {"extra_args": weights},
        {"vllm_xargs": {"weights": "calm=1"}},
        {"vllm_xargs": {"mavis_beta": 2}},
    ):
        with pytest.raises(openai.BadRequestError, match="mavis_weights"):
            ask(client, extra_body=extra_body)


def test_a_server_says_what_it_guides_by(client, quality):
    found = httpx.get(f"{client.base_url}mavis/objectives").json()
    assert [each["name"] for each in found["objectives"]] == ["calm", "bold"]
    assert found["objectives"][0]["value_model"] == str(quality)
    assert found["defaults"] == {"weights": {}, "beta": BETA, "top_k": TOP_K}
    body = {"model": "smollm2", "messages": MESSAGES, "max_tokens": 2}
    url = f"{client.base_url}chat/completions"
    guided = httpx.post(url, json={**body, "vllm_xargs": {"mavis_weights": "bold=2"}}, timeout=None)
    told = json.loads(guided.headers["x-mavis"])
    assert told == {"weights": {"bold": 2.0}, "beta": BETA, "top_k": TOP_K}
    assert "x-mavis" not in httpx.post(url, json=body, timeout=None).headers


def test_greedy_answers_equal_the_plain_computation(client, smollm2, quality):
    reference = Reference(smollm2, [quality])
    answers = {}
    for text, weights in (
        ("calm=1", (1.0, 0.0)),
        ('{"calm": -1, "bold": 1}', (-1.0, 1.0)),
        (None, (0.0, 0.0)),
    ):
        answer = ask(client, text)
        top_k = TOP_K if any(weights) else 1
        expected = reference.greedy(answer.prompt_token_ids, 12, weights, BETA, top_k, eos=2)
        assert answer.choices[0].token_ids == expected
        answers[text] = answer.choices[0].message.content
    assert len(set(answers.values())) == 3


def test_rollouts_are_sampled_over_http(client, smollm2, quality):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trimtab.trainers.samplers import ServerSampler, prompt_log_probs
    from trimtab.trainers.trees import TreeConfig

    tokens = list(range(1000, 1064))
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    arguments = (str(smollm2), str(client.base_url), TreeConfig(top_k=TOP_K), {2})
    sampler = ServerSampler(*arguments, (tokens, prompt_log_probs(base, tokens)))
    base.model.layers[10].mlp.up_proj.weight.data *= 1.5
    with pytest.raises(ValueError, match="other weights than those of the base model"):
        ServerSampler(*arguments, (tokens, prompt_log_probs(base, tokens)))
    prompt = AutoTokenizer.from_pretrained(smollm2).apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=False
    )
    seeds = list(range(300))
    pieces = sampler([prompt] * 300, [1] * 299 + [12], seeds)
    assert 1 < len(pieces[-1].tokens) <= 12
    policy = Reference(smollm2, [quality]).distribution(prompt, (0.0, 0.0), 0.0, TOP_K)
    counts = np.bincount([piece.tokens[0] for piece in pieces])
    observed = [counts[token] if token < len(counts) else 0 for token in policy]
    assert sum(observed) == 300, "only the base model's likeliest tokens are sampled"
    assert chisquare(observed, [300 * p for p in policy.values()]).pvalue > 1e-3
    assert sampler([prompt] * 2, [3, 3], [5, 5])[0] == sampler([prompt], [3], [5])[0]
    with pytest.raises(ValueError, match="base model only"):
        sampler([prompt], [3], [5], {"calm": 1.0})


def test_the_served_model_judges_pairs(client, tmp_path):
    from trimtab.trainers import PairwiseJudge

    judge = PairwiseJudge(str(client.base_url), "smollm2", tmp_path / "answers.jsonl")
    prompts = ["Name a colour.", [{"role": "user", "content": "Greet me."}]]
    shown, first, second = ("Name a colour.", "Greet me."), ("Blue!", "Hi, friend."), ("No.", "Go.")
    wins = judge.compare("is kinder", prompts, first, second)

    def verdict(prompt: str, a: str, b: str) -> str:
        question = judge.TEMPLATE.format(prompt=prompt, a=a, b=b, criterion="is kinder")
        messages = [{"role": "user", "content": question}]
        reply = client.chat.completions.create(
            model="smollm2", messages=messages, temperature=0.0, max_tokens=8
        )
        named = set(re.findall(r"\b[AB]\b", reply.choices[0].message.content))
        return "".join(sorted(named))

    for prompt, a, b, win in zip(shown, first, second, wins, strict=True):
        both = verdict(prompt, a, b), verdict(prompt, b, a)
        assert win == {("A", "B"): 1.0, ("B", "A"): 0.0}.get(both, 0.5), both
    assert (judge.compare("is kinder", prompts, second, first) == 1 - wins).all()
    assert len(judge.cache.read_text().splitlines()) == 4, "every question is asked once"


def test_streaming_and_parallel_samples(client):
    whole = ask(client, "calm=1").choices[0].message.content
    stream = ask(client, "calm=1", stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole
    both = ask(client, "bold=1", n=3, temperature=1.0, max_tokens=8)
    assert len(both.choices) == 3


def test_a_stop_string_ends_the_answer(client):
    whole = ask(client, "calm=1").choices[0].message.content
    stop = whole[len(whole) // 2 :][:3]
    cut = ask(client, "calm=1", stop=[stop]).choices[0].message.content
    assert cut == whole[: whole.index(stop)]


def test_a_grammar_holds_under_guidance(client):
    colours = ["red", "green", "blue"]
    for weights in ("calm=40", "bold=-40"):
        for seed in range(4):
            answer = ask(
                client, weights, temperature=1.0, seed=seed,
                extra_body={"structured_outputs": {"choice": colours}},
            )  # fmt: skip
            assert answer.choices[0].message.content in colours
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "maximum": 99}},
        "required": ["n"],
        "additionalProperties": False,
    }
    answer = ask(
        client, "bold=5", max_tokens=40,
        extra_body={"structured_outputs": {"json": schema}},
    )  # fmt: skip
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content)["n"], int)


@pytest.mark.parametrize(
    ("xargs", "message"),
    [
        ({"mavis_weights": "kind=1"}, "mavis_weights: unknown objective 'kind'"),
        (
            {"mavis_weights": "calm=nan"},
            "mavis_weights['calm'] must be a number from -1e+06 to 1e+06",
        ),
        ({"mavis_weights": "calm"}, "mavis_weights must be a JSON object"),
        ({"mavis_beta": -1}, "mavis_beta must be a number from 0 to 1e+06, got -1"),
        ({"mavis_beta": "strong"}, "mavis_beta must be a number"),
        ({"mavis_top_k": 0}, "mavis_top_k must be an integer from 1 to 128"),
        ({"mavis_kl_budget": 0}, "mavis_kl_budget must be a number from 1e-06"),
        ({"mavis_strength": 1}, "unknown argument 'mavis_strength'"),
        ({"mavis-beta": 1}, "unknown argument 'mavis-beta' (did you mean mavis_beta?)"),
        ({"mavis_beta": 1e300}, "mavis_beta must be a number from 0 to 1e+06, got 1e+300"),
        ({"mavis_beta": "9" * 100_000}, "mavis_beta must be a number from 0 to 1e+06, got '999"),
        ({"mavis_beta": 2**64}, "between -2**63 and 2**64 - 1"),  # by vLLM, before us
        ({"mavis_weights": "calm=1e39"}, "mavis_weights['calm'] must be a number"),
        ({"mavis_weights": '{"calm": 1, "calm": 2}'}, "an objective is named twice"),
        ({"mavis_weights": "[" * 100_000}, "mavis_weights cannot be read"),
    ],
)
def test_a_bad_request_is_http_400_and_the_server_lives_on(client, xargs, message):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, extra_body={"vllm_xargs": xargs})
    assert caught.value.status_code == 400 and message in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert ask(client, "calm=1", max_tokens=1).choices


def test_a_server_with_an_unknown_key_does_not_start(smollm2, quality, tmp_path):
    log = tmp_path / "vllm.log"
    server, _ = start(smollm2, {"value_models": [str(quality)], "betta": 2}, log)
    try:
        assert server.wait() != 0
    finally:
        server.kill()
    assert "unknown key 'betta' in the mavis config; known:" in log.read_text()
