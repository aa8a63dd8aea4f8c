"""What the value engine would compute wrongly is refused by name, before serving or training."""

from __future__ import annotations

import pytest
import torch
import transformers

from tests.plugins.test_engine import BACKBONES, MAX_LENGTH, make_model
from trimtab.plugins import MAVISValueConfig, MAVISValueModel, ValueEngine
from trimtab.plugins.engine import check_servable
from trimtab.plugins.probe import probe_length

SIZES = {
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def model_of(kind, **fields):
    torch.manual_seed(0)
    backbone = getattr(transformers, kind)(**{**SIZES, **fields})
    model = MAVISValueModel(MAVISValueConfig(backbone_config=backbone, objectives=["g"])).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        # In transformers 5.12 its attention is not exchangeable.
        ("DiffLlamaConfig", "'diffllama' is not supported: (after a prefix of 40 t|its attention)"),
        ("RecurrentGemmaConfig", "'recurrent_gemma' is not supported: "),
        ("GptOssConfig", "'gpt_oss' is not supported: its attention has sinks"),
        ("StableLmConfig", "'stablelm' is not supported: "),
        ("BloomConfig", "'bloom' is not supported: its attention is not exchangeable"),
        ("Qwen3NextConfig", "'qwen3_next' is not supported: it has layers of linear_attention"),
    ],
)
def test_a_backbone_that_would_be_valued_wrongly_is_refused(kind, message):
    fields = {"num_local_experts": 2} if kind == "GptOssConfig" else {}
    with pytest.raises(ValueError, match=message):
        check_servable(model_of(kind, **fields), 64)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_that_is_served_passes_and_stays_as_it_was(name):
    model = make_model(name)
    tokens = torch.arange(10)[None]
    before = model(tokens).logits
    check_servable(model, MAX_LENGTH)
    assert model(tokens).logits.equal(before)


def test_a_window_that_attention_is_not_told_of_is_found(monkeypatch):
    """A text longer than the window shows it, and no shorter one."""
    attend = "trimtab.plugins.attention._attend_last"
    from trimtab.plugins import attention

    plain = attention._attend_last

    def without_window(q, kv, k, v, mask, **options):
        # Everything stored is seen, whatever the mask says of the window.
        seen = torch.isfinite(mask).int().cumsum(-1)
        return plain(q, kv, k, v, torch.zeros_like(mask).masked_fill(seen < 0, 0.0), **options)

    monkeypatch.setattr(attend, without_window)
    with pytest.raises(ValueError, match="'mistral' is not supported: after a prefix of 40"):
        check_servable(make_model("mistral sliding"), MAX_LENGTH)


def test_the_probe_is_longer_than_whatever_changes_with_the_length():
    config = transformers.MistralConfig(**SIZES, sliding_window=300)
    assert probe_length(config, 200) == 40  # the window is never reached
    assert probe_length(config, 4000) == 308
    config = transformers.Phi3Config(**SIZES, original_max_position_embeddings=128)
    assert probe_length(config, 4000) > 128
    assert probe_length(config, 8) == 7


def test_a_kernel_that_computes_something_else_is_refused_at_start_up(monkeypatch):
    run = ValueEngine._run

    def wrong(engine, families, tokens, step):
        return [2 * hidden for hidden in run(engine, families, tokens, step)]

    monkeypatch.setattr(ValueEngine, "_run", wrong)
    with pytest.raises(ValueError, match="computes in the value engine other hidden states"):
        ValueEngine([make_model()], num_slots=1, max_length=MAX_LENGTH)
