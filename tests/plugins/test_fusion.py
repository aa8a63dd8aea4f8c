"""Fused decoder layers against transformers' own."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from tests.plugins.test_engine import (
    BACKBONES,
    MAX_LENGTH,
    VOCAB,
    engine_values,
    full_forward,
    make_model,
    plain,
)
from trimtab.plugins import MAVISValueConfig, MAVISValueModel, ValueEngine
from trimtab.plugins.adapters import LoRALinear
from trimtab.plugins.fusion import FusedLayer, Joined, RMSNorm, fuse, join

PLAIN = ("llama", "llama without groups", "qwen2", "qwen3", "mistral sliding")


def fused_layers(engine: ValueEngine) -> int:
    return sum(isinstance(module, FusedLayer) for module in engine.models[0].modules())


@pytest.mark.parametrize("name", BACKBONES)
def test_only_plain_decoders_are_fused(name):
    engine = ValueEngine([make_model(name)], num_slots=1, max_length=MAX_LENGTH)
    assert fused_layers(engine) == (3 if name in PLAIN else 0)


def random_weights(model: nn.Module) -> nn.Module:
    """Norms and biases too, which transformers leaves at one and zero."""
    torch.manual_seed(5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
    return model


@pytest.fixture(params=["PyTorch", "vLLM"])
def kernels(request, monkeypatch):
    """Whose operators the layers are made of."""
    if request.param == "vLLM":
        return pytest.importorskip("vllm._custom_ops")
    monkeypatch.setattr("trimtab.plugins.fusion.vllm_kernels", lambda: None)
    return None


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_layers_give_the_values_of_unfused_ones(monkeypatch, kernels, name, dtype):
    monkeypatch.setattr("trimtab.plugins.fusion.MLP_ROWS_CPU", 7)
    options = {"hidden_size": 64, "head_dim": 32} if kernels else {}
    model = random_weights(make_model(name, options=options))
    unfused, exact = copy.deepcopy(model), copy.deepcopy(model)
    options = {"num_slots": 3, "max_length": MAX_LENGTH, "prefill_tokens": 16}
    engine = ValueEngine([model], dtype=dtype, **options)
    monkeypatch.setattr("trimtab.plugins.engine.fuse", lambda *args, **kwargs: False)
    reference = ValueEngine([unfused], dtype=dtype, **options)
    exact = ValueEngine([exact], **options)
    assert fused_layers(engine) == 3 and not fused_layers(reference)
    assert engine.models[0].backbone.norm.kernels is kernels
    rng = np.random.default_rng(0)
    sequences = {s: rng.integers(0, VOCAB, n).tolist() for s, n in enumerate((1, 31, 70))}
    for _ in range(3):
        candidates = rng.integers(0, VOCAB, (3, 4))
        fused, theirs, expected = (
            engine_values(e, sequences, [0, 1, 2], candidates) for e in (engine, reference, exact)
        )
        # In half precision, as near to float32 as the unfused layers are.
        tolerance = 1e-5 * expected.norm() + 3 * (theirs - expected).norm()
        assert (fused - expected).norm() < tolerance
        for slot in sequences:
            sequences[slot].append(int(candidates[slot, 0]))


def test_a_longer_engine_takes_over_fused_layers():
    model = make_model("llama")
    reference = plain(model)
    ValueEngine([model], num_slots=1, max_length=8)
    engine = ValueEngine([model], num_slots=1, max_length=MAX_LENGTH)
    sequences, candidates = {0: list(range(40))}, [[1, 2, 3, 4]]
    values = engine_values(engine, sequences, [0], candidates)
    expected = full_forward([reference], sequences[0], candidates[0])
    torch.testing.assert_close(values[0], expected, rtol=1e-4, atol=1e-4)


class Refuses:
    def rms_norm(self, *args):
        raise RuntimeError("hidden size must be a multiple of 16")


class Differs:
    def rms_norm(self, out, x, weight, eps):
        out.copy_(x)

    def fused_add_rms_norm(self, x, residual, weight, eps):
        residual.add_(x)

    def rotary_embedding(self, *args):
        pass


@pytest.mark.parametrize("found", [Refuses(), Differs(), object()])
def test_kernels_that_do_not_fit_are_not_used(monkeypatch, found):
    warnings: list[str] = []
    monkeypatch.setattr("trimtab.plugins.fusion.vllm_kernels", lambda: found)
    monkeypatch.setattr("trimtab.plugins.fusion.logger.warning", warnings.append)
    model = make_model("llama")
    reference = plain(model)
    engine = ValueEngine([model], num_slots=1, max_length=MAX_LENGTH)
    assert fused_layers(engine) == 3 and model.backbone.norm.kernels is None
    assert len(warnings) == 1 and "vLLM" in warnings[0]
    sequences, candidates = {0: list(range(40))}, [[1, 2, 3, 4]]
    values = engine_values(engine, sequences, [0], candidates)
    expected = full_forward([reference], sequences[0], candidates[0])
    torch.testing.assert_close(values[0], expected, rtol=1e-4, atol=1e-4)


def test_a_backbone_with_learnt_positions_keeps_its_layers():
    backbone = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    torch.manual_seed(0)
    model = MAVISValueModel(MAVISValueConfig(backbone_config=backbone, objectives=["a"])).eval()
    nn.init.normal_(model.head.weight)
    reference = plain(model)
    engine = ValueEngine([model], num_slots=1, max_length=MAX_LENGTH)
    assert fused_layers(engine) == 0
    sequences, candidates = {0: list(range(40))}, [[1, 2, 3, 4]]
    values = engine_values(engine, sequences, [0], candidates)
    expected = full_forward([reference], sequences[0], candidates[0])
    torch.testing.assert_close(values[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind, fused", [("dynamic", 0), ("linear", 3), ("yarn", 3)])
def test_scaled_positions_keep_their_values(kind, fused):
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    model = random_weights(make_model(options={"rope_parameters": rope}))
    reference = plain(model)
    engine = ValueEngine([model], num_slots=1, max_length=MAX_LENGTH)
    assert fused_layers(engine) == fused
    sequences, candidates = {0: list(range(40))}, [[1, 2, 3, 4]]
    values = engine_values(engine, sequences, [0], candidates)
    expected = full_forward([reference], sequences[0], candidates[0])
    assert (values[0] - expected).norm() < 1e-4 * expected.norm()


def test_layers_of_another_function_are_left_alone(monkeypatch):
    model = make_model("llama")
    model.backbone.set_attn_implementation("mavis_paged")
    layer = type(model.backbone.layers[0])
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda self, x, **kwargs: 2 * forward(self, x, **kwargs))
    assert not fuse(model.backbone, MAX_LENGTH)
    assert all(type(found) is layer for found in model.backbone.layers)
    assert "forward" not in vars(model.backbone)


@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config, Qwen3Config])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_is_transformers_own(config, dtype):
    backbone = config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=0.1,
    )  # fmt: skip
    model = MAVISValueModel(MAVISValueConfig(backbone_config=backbone, objectives=["a"]))
    norm = random_weights(model).to(dtype).backbone.norm
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    rtol = 1e-6 if dtype == torch.float32 else 2**-7  # a unit in the last place
    torch.testing.assert_close(RMSNorm(norm)(x), norm(x), rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("biases", [(False, False), (True, True), (False, True)])
def test_joined_layers_give_their_outputs_side_by_side(biases):
    torch.manual_seed(0)
    layers = [nn.Linear(8, 3 + i, bias=bias) for i, bias in enumerate(biases)]
    x = torch.randn(5, 8)
    expected = torch.cat([layer(x) for layer in layers], dim=-1)
    joined = join(layers)
    assert type(joined) is nn.Linear and (joined.bias is not None) == any(biases)
    torch.testing.assert_close(joined(x), expected)
    adapted = LoRALinear(layers[0], [(torch.randn(2, 8), torch.randn(3, 2))])
    joined = join([adapted, layers[1]])
    assert type(joined) is Joined
    expected = torch.cat([adapted(x), layers[1](x)], dim=-1)
    torch.testing.assert_close(joined(x), expected)
