"""The Triton kernel, interpreted, against PyTorch's operators, and compiled for GPUs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")

INTERPRETED = "TRITON_INTERPRET"  # has to be in the environment before Triton is imported
CASES = {
    # batch lengths, queries, written, heads, key heads, dim, window, softcap, dtype
    "the prefix's token": ([1, 32, 50], 1, 1, 4, 2, 16, None, None, torch.float32),
    "and candidates": ([1, 33, 70], 5, 1, 9, 3, 64, None, None, torch.float32),
    "candidates alone": ([64, 5], 4, 0, 4, 4, 16, None, None, torch.float32),
    "more rows than a program has": ([40, 96], 41, 1, 6, 2, 16, None, None, torch.float32),
    "a head of no power of two": ([64, 5], 4, 0, 6, 2, 24, None, None, torch.float32),
    "a window": ([3, 40, 96], 6, 1, 4, 2, 16, 7, None, torch.float32),
    "a window of whole blocks": ([3, 65, 96], 2, 0, 4, 2, 16, 32, None, torch.float32),
    "a bound of the scores": ([40, 7], 3, 1, 4, 2, 16, 9, 2.0, torch.float32),
    "half precision": ([40, 96], 8, 1, 9, 3, 64, None, None, torch.float16),
}


def check(name: str, strided: bool) -> None:
    from trimtab.plugins.attention import BLOCK_SIZE, Step, attend, write
    from trimtab.plugins.attention_triton import attend_last

    lengths, queries, written, heads, kv_heads, dim, window, softcap, dtype = CASES[name]
    torch.manual_seed(0)
    batch, blocks = len(lengths), -(-max(lengths) // BLOCK_SIZE)
    store = torch.randn(2, 1 + batch * blocks, kv_heads, BLOCK_SIZE, dim).to(dtype)
    read = 1 + torch.randperm(batch * blocks).view(batch, blocks)
    of = torch.tensor(lengths)
    positions = of[:, None].repeat(1, queries)
    positions[:, :written] -= 1
    last = of - 1
    place = read[torch.arange(batch), last // BLOCK_SIZE] * BLOCK_SIZE + last % BLOCK_SIZE
    step = Step(written, place if written else place[:0], read, positions, of)
    total = batch * queries
    if strided:  # as the fused layers have them
        joined = torch.randn(total, heads + 2 * kv_heads, dim).to(dtype)
        q, kv = joined[:, :heads], joined[:, heads:]
    else:  # as transformers has them
        q = torch.randn(heads, total, dim).to(dtype).transpose(0, 1)
        kv = torch.randn(total, 2 * kv_heads, dim).to(dtype)
    expected = attend(q, kv, step, store.clone(), dim**-0.5, window, softcap)
    write(kv, step, store)
    got = attend_last(q, kv, step, store, dim**-0.5, window, softcap)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def check_engine() -> None:
    """A whole engine whose steps attend by the kernel against a full forward."""
    import numpy as np

    from tests.plugins.test_engine import K, engine_values, full_forward, make_model, plain
    from trimtab.plugins import ValueEngine, attention, attention_triton

    models = [
        make_model("mistral sliding", ("a",)),
        make_model("llama", ("b",), head_type="action"),
    ]
    references = list(map(plain, models))
    calls = []
    attend_last = attention_triton.attend_last
    attention_triton.attend_last = lambda *args: (calls.append(1), attend_last(*args))[1]
    attention._uses_triton = lambda device: True
    engine = ValueEngine(models, num_slots=2, max_length=96)
    sequences = {0: list(range(3, 43)), 1: [5, 6]}
    for token in (1, 2, 3):
        candidates = np.arange(2 * K).reshape(2, K)
        values = engine_values(engine, sequences, [1, 0], candidates)
        for i, slot in enumerate([1, 0]):
            expected = full_forward(references, sequences[slot], candidates[i])
            torch.testing.assert_close(values[i], expected, rtol=1e-4, atol=1e-4)
            sequences[slot].append(token)
    assert len(calls) == 3 * sum(m.config.text_config.num_hidden_layers for m in models)


def run(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"from tests.plugins.test_attention_triton import *; {code}"],
        env={**os.environ, INTERPRETED: "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def test_the_kernel_agrees_with_pytorch():
    run("[check(name, strided) for name in CASES for strided in (True, False)]")


def test_an_engine_that_attends_by_the_kernel_agrees_with_a_full_forward():
    run("check_engine()")


@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize(
    "heads, kv_heads, dim, queries, own, window, softcap",
    [
        (9, 3, 64, 1, False, None, False),
        (32, 4, 64, 41, True, None, False),
        (14, 2, 64, 8, True, None, False),
        (8, 4, 256, 41, True, 4096, True),
    ],
)
def test_the_kernel_compiles(
    capability, heads, kv_heads, dim, queries, own, window, softcap, monkeypatch, tmp_path
):
    """Down to machine code, which needs no GPU; the shared memory is what such a GPU has."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from trimtab.plugins.attention_triton import _attend, constants

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # or it would only be read
    fixed = constants(heads, kv_heads, dim, queries, own, window, softcap)
    kinds = {"q": "*bf16", "kv": "*bf16", "store": "*bf16", "out": "*bf16", "values": "i64"}
    kinds |= dict.fromkeys(("read", "positions", "lengths"), "*i64")
    kinds |= dict.fromkeys(("scaling", "softcap"), "fp32")
    ones = {"queries": queries, "written": 1, "width": 1}  # Triton compiles 1 as a constant
    fixed |= {name: 1 for name, value in ones.items() if value == 1 and not softcap}
    names = [name for name in _attend.arg_names if name not in fixed]
    signature = {name: kinds.get(name, "i32") for name in names}
    signature |= dict.fromkeys(fixed, "constexpr")
    source = ASTSource(fn=_attend, signature=signature, constexprs=fixed)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert compiled.asm["cubin"]
    assert "mma" in compiled.asm["ptx"]  # tensor cores
    assert compiled.metadata.shared <= 99 * 1024
