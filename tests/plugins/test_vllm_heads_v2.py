"""Heads under vLLM's V2 model runner, with and without speculation, in Triton's interpreter.

Under speculation every draft token has a row of logits and a hidden state of its own. With greedy
decoding the tokens have to be those without speculation, sampled ones have their distribution.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from scipy.stats import chisquare

from tests.conftest import EOS
from tests.reference import Reference
from trimtab.plugins.heads import value_code

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU the V2 runner needs no interpreter"
)

BETA, TOP_K = 3.0, 8
SCRIPT = """
import json, sys, types
import triton.backends

class Driver:
    @staticmethod
    def is_active():
        return True

triton.backends.backends["cpu"] = types.SimpleNamespace(driver=Driver, compiler=None)
from vllm import LLM, SamplingParams

base, heads = sys.argv[1:3]
speculation, jobs, draws = map(json.loads, sys.argv[3:])
llm = LLM(
    base,
    logits_processors=["trimtab.plugins.vllm:MAVISLogitsProcessor"],
    additional_config={"mavis": {"value_models": [heads], "beta": 3.0, "top_k": 8}},
    speculative_config=speculation,
    dtype="float32",
    enforce_eager=True,
    max_model_len=96,
    max_num_seqs=32,
    max_num_batched_tokens=128,
    distributed_executor_backend="uni",
    disable_log_stats=False,
)

def generate(jobs, **options):
    params = [
        SamplingParams(max_tokens=n, extra_args={"mavis_weights": w, "mavis_top_k": k, **more},
                       allowed_token_ids=[0] if more else None,
                       prompt_logprobs=1 if len(p) == 3 and not speculation else None, **options)
        for p, w, k, n, *more in jobs for more in [dict(*more)]
    ]
    prompts = [{"prompt_token_ids": p} for p, *_ in jobs]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [[list(o.token_ids) for o in output.outputs] for output in outputs]

greedy = [tokens for tokens, in generate(jobs, temperature=0)]
drawn, = generate(draws, temperature=1, seed=1, n=128) if draws else [[]]
accepted = {m.name: m.value for m in llm.get_metrics() if "spec_decode_num" in m.name
            and hasattr(m, "value")}
from prometheus_client import REGISTRY
labels = {"model_name": base, "engine": "0"}
for name in ("guided_rows_total", "guided_candidates_total", "step_kl_nats_count"):
    accepted[name] = REGISTRY.get_sample_value("mavis:" + name, labels)
print("RESULT", json.dumps([greedy, drawn, accepted]))
"""


def run(folder, base_model, heads, speculation, jobs, draws):
    script = folder / "v2.py"
    script.write_text(SCRIPT)
    env = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]),
        "VLLM_LOGGING_LEVEL": "INFO",  # importing TRL leaves another in the environment
    }
    arguments = map(json.dumps, (speculation, jobs, draws))
    done = subprocess.run(
        [sys.executable, script, base_model, heads, *arguments],
        env=env,
        capture_output=True,
        text=True,
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-6000:]
    assert "Using V2 Model Runner" in log
    result = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(result.removeprefix("RESULT "))


@pytest.mark.parametrize("method", [None, "draft_model"])
def test_tokens_are_those_of_the_plain_computation(tmp_path, base_model, heads, method):
    """Guided requests of several `top_k`, unguided ones and values; prompts repeat themselves."""
    jobs = [
        ([5, 6, 7], [1.0, 0.0], 8, 12),
        ([10, 11, 12, 13] * 4, [0.0, 1.0], 3, 12),
        ([8, 9] * 5, [0.0, 0.0], 8, 8),
        ([60, 61, 62, 60, 61, 62, 60], [0.5, -1.0], 20, 12),
        ([70] * 6, [1.0, 1.0], 8, 12),
        ([5, 6], [1.0, -0.5], 8, 1, {"mavis_value_of": 7}),
        ([20, 21] * 3, [0.0, 1.0], 8, 1, {"mavis_value_of": 20}),
    ]
    # vLLM 0.32's kernel for n-grams does not run in the interpreter.
    draft = {"model": str(base_model), "num_speculative_tokens": 2}
    speculation = {"method": method, **draft} if method else None
    draws = [([20, 21] * 3, [0.5, -1.0], 4, 2)] if method else []
    greedy, drawn, accepted = run(tmp_path, base_model, heads, speculation, jobs, draws)
    reference = Reference(base_model, [heads])
    for (prompt, weights, top_k, length, *value), got in zip(jobs, greedy):
        if value:
            hidden = reference.base(torch.tensor([prompt]), output_hidden_states=True)
            token = torch.tensor([[value[0]["mavis_value_of"]]])
            of_objective = reference.values[0].candidate_values(
                hidden.hidden_states[-1][:, -1], token
            )
            assert got == value_code(of_objective[0] @ torch.tensor(weights), 96).tolist()
            continue
        k = top_k if any(weights) else 1
        assert got == reference.greedy(prompt, length, weights, BETA, k, eos=EOS)
    guided = [(len(got), k) for (_, w, k, _, *v), got in zip(jobs, greedy) if any(w) and not v]
    rows = accepted["guided_rows_total"]
    assert rows == accepted["step_kl_nats_count"]
    if method is None:
        assert rows == sum(length for length, _ in guided)
        assert accepted["guided_candidates_total"] == sum(length * k for length, k in guided)
        return
    # Further rows are of drafts that were not accepted.
    assert rows >= sum(length for length, _ in guided) + sum(map(len, drawn))
    assert accepted["vllm:spec_decode_num_draft_tokens"] > 10, accepted
    prompt, weights, top_k, _ = draws[0]
    expected: dict[tuple[int, ...], float] = {}
    for token, p in reference.distribution(prompt, weights, BETA, top_k).items():
        if token == EOS:
            expected[(token,)] = p
            continue
        for after, q in reference.distribution([*prompt, token], weights, BETA, top_k).items():
            expected[token, after] = p * q
    pairs = [tuple(tokens) for tokens in drawn]
    assert set(pairs) <= set(expected)
    common = [pair for pair, p in expected.items() if p * len(pairs) >= 5]
    observed = [pairs.count(pair) for pair in common]
    likely = [expected[pair] * len(pairs) for pair in common]
    observed.append(len(pairs) - sum(observed))
    likely.append(len(pairs) - sum(likely))
    assert chisquare(observed, likely).pvalue > 1e-3
