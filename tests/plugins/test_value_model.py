"""Value models as files: what is saved comes back, and whatever is broken is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tests.conftest import VOCAB_SIZE, make_tokenizer, make_value_model
from trimtab.plugins import MAVISValueConfig, MAVISValueModel
from trimtab.plugins.cards import provenance
from trimtab.plugins.value_config import load_config, tokenizer_fingerprint

IDS = torch.arange(3, 13)[None]


@pytest.fixture
def copied(value_model, tmp_path):
    return shutil.copytree(value_model, tmp_path / "copy")


@torch.no_grad()
def test_the_backbone_is_the_base_models_first_blocks(base_model):
    base = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    model = MAVISValueModel.from_base_model(base, ["a"], num_hidden_layers=2)
    hidden = base.model(IDS, output_hidden_states=True).hidden_states[2]
    expected = base.model.norm(hidden)
    torch.testing.assert_close(model.backbone(IDS).last_hidden_state, expected)
    assert model(IDS).logits.abs().max() == 0  # an untrained model guides nowhere
    whole = MAVISValueModel.from_base_model(base, ["a"], num_hidden_layers=None)
    assert whole.config.backbone_config.num_hidden_layers == 3


@pytest.mark.parametrize("layers", [0, 4, -1])
def test_a_depth_that_the_base_model_lacks_is_refused(base_model, layers):
    with pytest.raises(ValueError, match="num_hidden_layers must be 1 to 3"):
        MAVISValueModel.from_base_model(str(base_model), ["a"], num_hidden_layers=layers)


@torch.no_grad()
def test_saved_models_come_back_whole(tmp_path, base_model):
    folder = make_value_model(
        tmp_path,
        base_model,
        ["a", "b"],
        reward_mean=[1.0, 2.0],
        reward_std=[3.0, 4.0],
        candidate_range=[0.5, 2.0],
        candidate_scale=[1.0, 0.25],
        top_k=17,
        provenance=provenance(note="test"),
    )
    model = MAVISValueModel.load(str(folder))
    again = AutoModel.from_pretrained(folder)
    assert type(again) is MAVISValueModel
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=0, atol=0)
    config = AutoConfig.from_pretrained(folder)
    assert (config.objectives, config.reward_mean, config.reward_std, config.top_k) == (
        ["a", "b"],
        [1.0, 2.0],
        [3.0, 4.0],
        17,
    )
    assert (config.candidate_range, config.candidate_scale) == ([0.5, 2.0], [1.0, 0.25])
    assert config.tokenizer_fingerprint == tokenizer_fingerprint(make_tokenizer())
    assert config.provenance["note"] == "test" and "torch" in config.provenance["packages"]
    card = (folder / "README.md").read_text()
    assert "| b | 2 | 4 |" in card and "--logits-processors" in card


@torch.no_grad()
def test_padding_that_is_the_end_of_sequence_token_changes_nothing(value_model):
    model = MAVISValueModel.load(str(value_model))
    response = torch.tensor([[5, 6, 7, 2]])  # the last token is a real end of sequence
    alone = model(response).logits
    for padded, mask, where in (
        ([[2, 2, 5, 6, 7, 2]], [[0, 0, 1, 1, 1, 1]], slice(2, 6)),
        ([[5, 6, 7, 2, 2, 2]], [[1, 1, 1, 1, 0, 0]], slice(0, 4)),
    ):
        values = model(torch.tensor(padded), attention_mask=torch.tensor(mask)).logits
        torch.testing.assert_close(values[:, where], alone, rtol=0, atol=1e-5)
    assert (alone[0, -1] - alone[0, -2]).abs().max() > 1e-3


@torch.no_grad()
def test_values_are_float32_in_half_precision_too(value_model):
    model = MAVISValueModel.load(str(value_model), dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.backbone(IDS).last_hidden_state
        values = model.read_head(hidden)
    assert values.dtype == torch.float32
    expected = hidden.double() @ model.head.weight.double().T + model.head.bias.double()
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)


def test_another_model_type_is_refused(base_model):
    with pytest.raises(ValueError, match="is not a value model: its config has model_type 'llama'"):
        MAVISValueModel.load(str(base_model))


@pytest.mark.parametrize(
    "path",
    ["./valu_model", "{folder}/nothing", "artifacts/x", "valu_model", "~/x", "a\0b", "a" * 9999],
)
def test_a_mistyped_folder_is_said_to_be_missing(tmp_path, path):
    with pytest.raises(ValueError, match="there is no such folder") as caught:
        load_config(path.replace("{folder}", str(tmp_path)))
    message = str(caught.value)
    assert message.startswith("value model '") and len(message) < 400
    assert "connect to" not in message and "huggingface.co" not in message


def test_a_folder_without_a_config_is_named(tmp_path):
    for text in (None, "{", "[1]", "\0"):
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"the folder has no config\.json that can be read"):
            load_config(str(tmp_path))


def test_a_config_that_is_wrong_in_its_file_is_refused_with_the_folder(copied):
    config = json.loads((copied / "config.json").read_text())
    for wrong in ({"objectives": ["", "b"]}, {"backbone_config": {"model_type": "none"}}):
        (copied / "config.json").write_text(json.dumps({**config, **wrong}))
        with pytest.raises(ValueError, match="copy': its config is wrong"):
            load_config(str(copied))


def test_a_model_of_a_head_that_is_gone_says_what_to_train(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "head_type": "action"}))
    with pytest.raises(ValueError, match=r"copy'.*'action' is gone.*head_type='hidden'"):
        MAVISValueModel.load(str(copied))


@pytest.mark.parametrize("broken", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(copied, broken):
    from safetensors.torch import load_file, save_file

    name = "backbone.layers.1.mlp.down_proj.weight"
    weights = load_file(copied / "model.safetensors")
    weights[name][3, 5] = broken
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"the weights {name} hold NaN or infinity in float32"):
        MAVISValueModel.load(str(copied))


def test_weights_beyond_the_dtype_that_serves_them_are_refused(copied):
    from safetensors.torch import load_file, save_file

    weights = load_file(copied / "model.safetensors")
    weights["head.weight"][0, 0] = 1e5
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    MAVISValueModel.load(str(copied), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"the weights head\.weight hold .*in float16"):
        MAVISValueModel.load(str(copied), dtype=torch.float16)


def test_pickled_weights_are_refused(copied):
    weights = copied / "model.safetensors"
    torch.save(torch.zeros(1), copied / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ValueError, match=r"no .safetensors weights .* pickled weights are never"):
        MAVISValueModel.load(str(copied))


@pytest.mark.parametrize("keep", [0, 7, 1000])
def test_corrupted_weights_are_refused(copied, keep):
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"weights cannot be read .*copy or train it again"):
        MAVISValueModel.load(str(copied))


def test_weights_that_lack_a_tensor_are_refused(copied):
    from safetensors.torch import load_file, save_file

    weights = load_file(copied / "model.safetensors")
    del weights["head.weight"]
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit its config .*head\.weight"):
        MAVISValueModel.load(str(copied))


def test_weights_of_another_shape_are_refused(copied):
    config = json.loads((copied / "config.json").read_text())
    config["objectives"].append("third")
    config["reward_mean"].append(0.0)
    config["reward_std"].append(1.0)
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="copy or train it again"):
        MAVISValueModel.load(str(copied))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objectives": []}, "at least one"),
        ({"objectives": ["a", "a"]}, "distinct"),
        ({"objectives": "abc"}, "objectives must be a list of names"),
        ({"objectives": ["a", 1]}, "the value model has the objective 1"),
        ({"objectives": ["a", ""]}, "the value model has the objective ''"),
        ({"objectives": ["a=b,c"]}, "the value model has the objective 'a=b,c'"),
        ({"objectives": ["a"], "reward_std": [0.0]}, r"reward_std\[0\] must be a number from 1"),
        ({"objectives": ["a"], "reward_std": [float("nan")]}, r"reward_std\[0\] must be a number"),
        ({"objectives": ["a"], "reward_std": [1e-300]}, r"reward_std\[0\] must be a number"),
        ({"objectives": ["a"], "reward_std": ["1"]}, r"reward_std\[0\] must be a number"),
        ({"objectives": ["a"], "reward_mean": [1e39]}, r"reward_mean\[0\] must be a number"),
        (
            {"objectives": ["a"], "reward_mean": [0.0, 1.0]},
            "reward_mean must be a list of a number",
        ),
        ({"objectives": ["a"], "head_type": "magic"}, "head_type must be one of"),
        ({"objectives": ["a"], "top_k": "40"}, "top_k must be an integer"),
        ({"objectives": ["a"], "backbone_config": [1]}, "backbone_config must be"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MAVISValueConfig(**fields)


def test_the_fingerprint_tells_vocabularies_apart():
    words = [f"w{i}" for i in range(3, VOCAB_SIZE)]
    assert tokenizer_fingerprint(make_tokenizer()) == tokenizer_fingerprint(make_tokenizer(words))
    swapped = [words[1], words[0], *words[2:]]
    assert tokenizer_fingerprint(make_tokenizer()) != tokenizer_fingerprint(make_tokenizer(swapped))


def test_importing_the_package_is_light():
    code = (
        "import sys, trimtab.plugins\n"
        "heavy = {'torch', 'transformers', 'vllm', 'nevergrad', 'trl'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [0, 3])
def test_candidates_are_valued_as_if_each_were_next(value_model, attention, padding):
    model = MAVISValueModel.load(str(value_model), attn_implementation=attention).eval()
    ids = torch.cat((torch.full((1, padding), 2), IDS), dim=1)
    mask = (torch.arange(ids.shape[1]) >= padding).long()[None]
    positions = torch.tensor([[padding, padding + 4, padding + 9]])
    candidates = torch.randint(VOCAB_SIZE, (1, 3, 4))
    output = model(ids, mask, candidates=candidates, candidate_positions=positions)
    torch.testing.assert_close(output.logits[:, padding:], model(IDS).logits)
    for n, position in enumerate((0, 4, 9)):
        for j, token in enumerate(candidates[0, n]):
            continued = torch.cat((IDS[:, : position + 1], token.view(1, 1)), dim=1)
            torch.testing.assert_close(
                output.candidate_logits[0, n, j],
                model(continued).logits[0, -1],
                rtol=1e-4,
                atol=1e-5,
            )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("action_rank", 0, "action_rank must be an integer from 1"),
        ("candidate_range", [1.0], "candidate_range must be a list"),
        ("candidate_range", [1.0, -1.0], r"candidate_range\[1\] must be"),
        ("candidate_range", [float("inf"), 1.0], r"candidate_range\[0\] must be"),
        ("candidate_scale", [1.0], "candidate_scale must be a list"),
        ("candidate_scale", [1.0, -0.5], r"candidate_scale\[1\] must be a number from 0"),
        ("candidate_scale", [1.0, float("nan")], r"candidate_scale\[1\] must be"),
    ],
)
def test_wrong_head_fields_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        MAVISValueConfig(objectives=["a", "b"], **{field: value})
