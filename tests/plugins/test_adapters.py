"""Adapters of one backbone in one batch, against each of them merged and alone."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.conftest import VOCAB_SIZE
from trimtab.plugins import MAVISValueModel, ValueEngine
from trimtab.plugins.adapters import load_value_models


def save_adapter(folder, base, objectives, seed, **options):
    """An adapter with random weights, and the merged model."""
    model = MAVISValueModel.from_base_model(str(base), objectives, num_hidden_layers=2)
    options = {"target_modules": ["q_proj", "v_proj", "down_proj"], **options}
    adapted = get_peft_model(model, LoraConfig(modules_to_save=["head"], **options))
    torch.manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(folder)
    model.config.save_pretrained(folder)
    return adapted.merge_and_unload().eval()


def test_adapters_in_one_batch_agree_with_each_alone(tmp_path, base_model, value_model):
    merged = [
        save_adapter(tmp_path / "a", base_model, ["a"], 1, r=4),
        MAVISValueModel.load(str(value_model)).eval(),
        save_adapter(tmp_path / "b", base_model, ["b", "c"], 2, r=2, lora_alpha=9),
        save_adapter(tmp_path / "d", base_model, ["d"], 3, r=3, target_modules=["k_proj"]),
    ]
    paths = [str(p) for p in (tmp_path / "a", value_model, tmp_path / "b", tmp_path / "d")]
    models = load_value_models(paths, torch.float32)
    assert models[0].backbone is models[2].backbone is models[3].backbone
    engine = ValueEngine(models, num_slots=3, max_length=64)
    assert engine.objectives == ("a", "sweet", "sour", "b", "c", "d")
    assert engine.weight_bytes < sum(p.nbytes for m in merged for p in m.parameters()) * 0.7
    rng = np.random.default_rng(0)
    sequences = {s: rng.integers(3, VOCAB_SIZE, n).tolist() for s, n in enumerate((1, 35, 50))}
    for counts in (None, np.array([2, 4, 1])):
        candidates = torch.from_numpy(rng.integers(3, VOCAB_SIZE, (3, 4)))
        values = engine.values(
            np.arange(3),
            np.array([len(tokens) for tokens in sequences.values()]),
            torch.tensor([tokens[-1] for tokens in sequences.values()]),
            candidates,
            lambda slot, start, stop: sequences[slot][start:stop],
            counts,
        )
        for slot, tokens in sequences.items():
            with torch.no_grad():
                expected = [
                    model(
                        torch.tensor([tokens]),
                        candidates=candidates[slot].view(1, 1, -1),
                        candidate_positions=torch.tensor([[len(tokens) - 1]]),
                    ).candidate_logits[0, 0]
                    for model in merged
                ]
            n = 4 if counts is None else counts[slot]
            torch.testing.assert_close(
                values[slot, :n], torch.cat(expected, 1)[:n], rtol=1e-4, atol=1e-4
            )
            tokens.append(int(candidates[slot, 0]))


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"bias": "all"}, {"target_modules": ["embed_tokens"]}]
)
def test_what_is_not_plain_lora_is_refused(tmp_path, base_model, options):
    save_adapter(tmp_path, base_model, ["a"], 1, **options)
    with pytest.raises(ValueError, match="by more than plain LoRA"):
        load_value_models([str(tmp_path)], torch.float32)


@pytest.mark.parametrize(
    ("name", "message"),
    [("head.weight", "cannot be loaded: .*head"), ("lora_B", "lacks the weights .*lora_B")],
)
def test_an_adapter_that_lacks_weights_is_refused(tmp_path, base_model, name, message):
    save_adapter(tmp_path, base_model, ["a"], 1)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    kept = {key: weight for key, weight in weights.items() if name not in key}
    save_file(kept, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_value_models([str(tmp_path)], torch.float32)


def test_a_broken_adapter_is_refused(tmp_path, base_model):
    save_adapter(tmp_path / "a", base_model, ["a"], 1)
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"adapter '.*/a' of base model .* cannot be loaded"):
        load_value_models([str(tmp_path / "a")], torch.float32)
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(ValueError, match="pickled weights are never loaded"):
        load_value_models([str(tmp_path / "a")], torch.float32)
    (tmp_path / "a" / "adapter_model.bin").rename(tmp_path / "a" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**config, "base_model": None}))
    with pytest.raises(ValueError, match="names no base_model"):
        load_value_models([str(tmp_path / "a")], torch.float32)


def test_an_adapter_of_the_hub_is_one(tmp_path, base_model, monkeypatch):
    """From the cache, as a server without a network reads it."""
    expected = save_adapter(tmp_path / "local", base_model, ["a"], 1, r=4)
    cache, commit = tmp_path / "hub", "0" * 40
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    repo = cache / "models--org--adapter"
    shutil.copytree(tmp_path / "local", repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    whole = cache / "models--org--whole"
    expected.save_pretrained(whole / "snapshots" / commit)
    shutil.copytree(repo / "refs", whole / "refs")

    models = load_value_models(["org/adapter", "org/whole", str(tmp_path / "local")], torch.float32)
    assert models[0].backbone is models[2].backbone is not models[1].backbone
    ids, candidates = torch.arange(3, 9)[None], torch.tensor([[[5, 6]]])
    last = torch.tensor([[5]])
    torch.testing.assert_close(
        models[1](ids, candidates=candidates, candidate_positions=last).candidate_logits,
        expected(ids, candidates=candidates, candidate_positions=last).candidate_logits,
    )
    alone = load_value_models(["org/adapter"], torch.float32)[0]
    torch.testing.assert_close(alone(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-5)

    (repo / "snapshots" / commit / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"'org/adapter' has no adapter_model\.safetensors"):
        load_value_models(["org/adapter"], torch.float32)


def test_an_adapter_that_is_not_finite_is_refused_by_name(tmp_path, base_model):
    save_adapter(tmp_path, base_model, ["a"], 1)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    name = next(key for key in weights if key.endswith("1.mlp.down_proj.lora_B.weight"))
    broken = {**weights, name: weights[name].fill_diagonal_(float("nan"))}
    save_file(broken, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"1\.mlp\.down_proj\.lora_B\.default\.weight hold NaN"):
        load_value_models([str(tmp_path)], torch.float32)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1e300}))
    save_file(
        {**weights, name: torch.ones_like(weights[name])}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(
        ValueError, match=r"q_proj.*, scaled by its lora_alpha, are not finite in torch\.float32"
    ):
        load_value_models([str(tmp_path)], torch.float32)
