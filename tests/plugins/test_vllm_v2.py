"""The same processor class under vLLM's V2 model runner, through Triton's interpreter.

The V2 runner is the default on GPUs. On a CPU its Triton kernels run interpreted: slow, but truly.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import EOS
from tests.reference import Reference

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU the V2 runner needs no interpreter"
)

SCRIPT = """
import json, sys, types
import triton.backends

class Driver:
    @staticmethod
    def is_active():
        return True

triton.backends.backends["cpu"] = types.SimpleNamespace(driver=Driver, compiler=None)
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

base, value = sys.argv[1:3]
jobs = json.loads(sys.argv[3])
llm = LLM(
    base,
    logits_processors=["trimtab.plugins.vllm:MAVISLogitsProcessor"],
    additional_config={"mavis": {"value_models": [value], "beta": 3.0, "top_k": 8}},
    dtype="float32",
    enforce_eager=True,
    max_model_len=96,
    max_num_seqs=3,
    max_num_batched_tokens=16,
    distributed_executor_backend="uni",
)
params = [
    SamplingParams(temperature=0, max_tokens=n, extra_args={"mavis_weights": w})
    for _, w, n in jobs
]
outputs = llm.generate([{"prompt_token_ids": p} for p, _, _ in jobs], params, use_tqdm=False)
try:
    llm.generate([{"prompt_token_ids": [5]}], SamplingParams(extra_args={"mavis_beta": -1}))
except VLLMValidationError as error:
    refusal = str(error)
from prometheus_client import REGISTRY
rows = REGISTRY.get_sample_value("mavis:guided_rows_total", {"model_name": base, "engine": "0"})
print("RESULT", json.dumps([[list(o.outputs[0].token_ids) for o in outputs], refusal, rows]))
"""


def test_v2_runner_gives_the_plain_computations_tokens(tmp_path, base_model, value_model):
    """More requests than slots (slots are used again), chunked prefill, guided and unguided."""
    jobs = [
        ([5, 6, 7], [1.0, 0.0], 6),
        (list(range(10, 50)), [0.0, 1.0], 4),
        ([8, 9], [0.0, 0.0], 3),
        ([60, 61, 62, 63], [0.5, -1.0], 5),
        ([70], [1.0, 1.0], 5),
    ]
    script = tmp_path / "v2.py"
    script.write_text(SCRIPT)
    env = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "PYTHONPATH": os.getcwd(),
        "VLLM_LOGGING_LEVEL": "INFO",  # importing TRL leaves another in the environment
    }
    run = subprocess.run(
        [sys.executable, script, base_model, value_model, json.dumps(jobs)],
        env=env,
        capture_output=True,
        text=True,
    )
    log = run.stdout + run.stderr
    assert run.returncode == 0, log[-4000:]
    assert "Using V2 Model Runner" in log
    result = next(line for line in run.stdout.splitlines() if line.startswith("RESULT "))
    tokens, refusal, rows = json.loads(result.removeprefix("RESULT "))
    assert refusal.startswith("mavis_beta must be a number from 0 to")
    reference = Reference(base_model, [value_model])
    for (prompt, weights, length), got in zip(jobs, tokens):
        top_k = 8 if any(weights) else 1
        assert got == reference.greedy(prompt, length, weights, 3.0, top_k, eos=EOS)
    guided = [got for (_, weights, _), got in zip(jobs, tokens) if any(weights)]
    assert rows == sum(map(len, guided))
