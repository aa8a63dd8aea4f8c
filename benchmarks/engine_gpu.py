"""One step of the value engine on a GPU against what the hardware allows, and the published form.

State heads of TinyLlama-1.1B's and Qwen2.5-0.5B's shape with random weights, bfloat16, `k` 40. The
floor of a step is the larger of two times measured on the same device in the same run: its weights
and cache over the bandwidth of a copy, its operations over the rate of a matrix product. The
published form is tree attention in plain transformers with a cache that grows by concatenation.
Needs torch, transformers and trimtab.plugins, and no download.

    python benchmarks/engine_gpu.py                        # on a CUDA machine, 30 GB
    python benchmarks/engine_gpu.py --device cpu --quick   # tiny shapes; writes no file
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import DynamicCache, LlamaConfig, Qwen2Config

from trimtab.plugins import MAVISValueConfig, MAVISValueModel, ValueEngine

RESULTS = Path(__file__).parent / "results"
SHAPES = {
    "TinyLlama-1.1B": LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
        num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048,
    ),
    "Qwen2.5-0.5B": Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=32768,
    ),
}  # fmt: skip
TINY = {
    "tiny": LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )
}  # fmt: skip
DTYPE = torch.bfloat16
WARM_UP, STEPS = 5, 20


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[int], Any], device: torch.device) -> dict[str, float]:
    """Medians over the steps: until the values are there, and until the call returned."""
    total, host = [], []
    for step in range(WARM_UP + STEPS):
        synchronize(device)
        start = time.perf_counter()
        call(step)
        host.append(time.perf_counter() - start)
        synchronize(device)
        total.append(time.perf_counter() - start)
    return {
        "step_ms": 1e3 * float(np.median(total[WARM_UP:])),
        "p90_ms": 1e3 * float(np.percentile(total[WARM_UP:], 90)),
        "host_ms": 1e3 * float(np.median(host[WARM_UP:])),
    }


def hardware(device: torch.device, quick: bool) -> dict[str, float]:
    """Best bytes/s of a copy and operations/s of a bfloat16 matrix product."""

    def best(call: Callable[[], Any]) -> float:
        times = []
        for _ in range(10):
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            times.append(time.perf_counter() - start)
        return min(times)

    size, n = (1 << 24, 512) if quick else (1 << 31, 8192)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device).to(DTYPE) for _ in range(2))
    return {
        "bytes_per_s": 2 * size / best(lambda: target.copy_(source)),
        "operations_per_s": 2 * n**3 / best(lambda: a @ b),
    }


def value_model(shape: Any, device: torch.device) -> MAVISValueModel:
    config = MAVISValueConfig(backbone_config=shape, objectives=["reward"])
    with torch.device(device):
        model = MAVISValueModel(config)
    return torch.nn.Module.to(model, DTYPE).eval()


def floor_ms(
    shape: Any, batch: int, context: int, k: int, peak: dict[str, float]
) -> dict[str, float]:
    """The least that a step can take; a candidate's own row of the embedding is left out."""
    dim = shape.hidden_size // shape.num_attention_heads
    kv_width = shape.num_key_value_heads * dim
    layer = shape.hidden_size * (2 * shape.hidden_size + 2 * kv_width + 3 * shape.intermediate_size)
    weights = shape.num_hidden_layers * layer
    cache = shape.num_hidden_layers * batch * context * 2 * kv_width
    tokens = batch * (k + 1)
    attention = 4 * shape.num_hidden_layers * shape.hidden_size * context * tokens
    memory = DTYPE.itemsize * (weights + cache) / peak["bytes_per_s"]
    arithmetic = (2 * weights * tokens + attention) / peak["operations_per_s"]
    return {
        "floor_ms": 1e3 * max(memory, arithmetic),
        "floor_memory_ms": 1e3 * memory,
        "floor_operations_ms": 1e3 * arithmetic,
    }


def engine_step(
    shape: Any, batch: int, context: int, k: int, device: torch.device
) -> dict[str, float]:
    """A step of trimtab's engine; the prefixes grow by a token each, up to `context`."""
    engine = ValueEngine(
        [value_model(shape, device)],
        num_slots=batch,
        max_length=context,
        device=device,
        dtype=DTYPE,
        prefill_tokens=8192,
    )
    text = torch.randint(shape.vocab_size, (batch, context))
    on_device = text.to(device)
    candidates = torch.randint(shape.vocab_size, (batch, k), device=device)
    slots, first = np.arange(batch), context - WARM_UP - STEPS

    def step(number: int) -> torch.Tensor:
        length = first + number + 1
        return engine.values(
            slots,
            np.full(batch, length),
            on_device[:, length - 1],
            candidates,
            lambda slot, start, stop: text[slot, start:stop],
        )

    return timed(step, device)


@torch.inference_mode()
def published_step(
    shape: Any, batch: int, context: int, k: int, device: torch.device
) -> dict[str, float]:
    """A step of tree attention in transformers: last token and `k` candidates behind a cache."""
    model = value_model(shape, device)
    first = context - WARM_UP - STEPS
    dim = shape.hidden_size // shape.num_attention_heads
    cache = DynamicCache()
    for layer in range(shape.num_hidden_layers):
        size = (batch, shape.num_key_value_heads, first, dim)
        # What is in the cache does not change the time.
        cache.update(*torch.randn(2, *size, dtype=DTYPE, device=device), layer)
    tokens = torch.randint(shape.vocab_size, (batch, k + 1), device=device)

    def step(number: int) -> torch.Tensor:
        length = first + number + 1
        visible = torch.zeros(k + 1, length + k, dtype=torch.bool, device=device)
        visible[:, :length] = True
        visible[1:, length:] = torch.eye(k, dtype=torch.bool, device=device)
        bias = torch.zeros_like(visible, dtype=DTYPE).masked_fill(~visible, torch.finfo(DTYPE).min)
        positions = torch.full((batch, k + 1), length, device=device)
        positions[:, 0] -= 1
        hidden = model.backbone(
            input_ids=tokens,
            attention_mask=bias.expand(batch, 1, -1, -1),
            position_ids=positions,
            past_key_values=cache,
        ).last_hidden_state[:, 1:]
        cache.crop(-k)
        return model.read_head(hidden)

    return timed(step, device)


def attempt(call: Callable[..., dict[str, float]], *args: Any) -> dict[str, Any]:
    """The measurement, or that it does not fit."""
    try:
        return call(*args)
    except torch.OutOfMemoryError:
        return {"step_ms": None}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| shape | batch | context | floor, ms | step, ms | of the floor | launching, ms "
        "| published tree, ms | published / ours |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        step, published = r["step_ms"], r["published_ms"]
        cells = [
            f"{r['floor_ms']:.3f}",
            "out of memory" if step is None else f"{step:.2f}",
            "" if step is None else f"{step / r['floor_ms']:.1f}",
            "" if step is None else f"{r['host_ms']:.2f}",
            "out of memory" if published is None else f"{published:.2f}",
            "" if None in (step, published) else f"{published / step:.1f}",
        ]
        name = f"{r['shape']} | {r['batch']} | {r['context']}"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="a smoke test: writes no file")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu --quick runs it small, for a test")
    if device.type != "cuda" and not options.quick:
        parser.error(f"the shapes are a GPU's; with --device {options.device} give --quick")
    shapes = TINY if options.quick else SHAPES
    batches, contexts, k = (
        ((1, 3), (32,), 5) if options.quick else ((1, 8, 32, 128), (512, 2048), 40)
    )
    peak = hardware(device, options.quick)
    print(f"copy {peak['bytes_per_s'] / 1e9:.0f} GB/s, matrix product "
          f"{peak['operations_per_s'] / 1e12:.2f} TFLOP/s", flush=True)  # fmt: skip
    rows: list[dict[str, Any]] = []
    print(table(rows), flush=True)
    for name, shape in shapes.items():
        for context in contexts:
            for batch in batches:
                published = attempt(published_step, shape, batch, context, k, device)
                row = {"shape": name, "batch": batch, "context": context, "k": k}
                row |= floor_ms(shape, batch, context, k, peak)
                row |= attempt(engine_step, shape, batch, context, k, device)
                rows.append(row | {"published_ms": published["step_ms"]})
                print(table(rows[-1:]).splitlines()[-1], flush=True)
    if not options.quick:
        content = {
            "device": torch.cuda.get_device_name(device),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "hardware": peak,
            "rows": rows,
        }
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "engine_gpu.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
