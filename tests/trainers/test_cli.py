"""`trimtab train` and `trimtab rollouts`, from a YAML file to a saved value model."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from trl import GRPOConfig, ModelConfig

from trimtab.__main__ import main
from trimtab.plugins.hidden_states import checkpoint_fingerprint
from trimtab.plugins.value_config import load_config, tokenizer_fingerprint
from trimtab.plugins.value_model import MAVISValueModel
from trimtab.trainers import MAVISConfig, read_rollouts
from trimtab.trainers.cli import (
    INSTEAD,
    MEAN_OTHERS,
    TRAIN_HELP,
    MAVISScriptArguments,
    load_reward_func,
    make_trainer,
)

REWARDS = """
def goodness(completions, **kwargs):
    return [float(c[0]['content'].count('good')) for c in completions]


def badness(completions, **kwargs):
    return [float(c[0]['content'].count('bad')) for c in completions]


def nothing(completions, **kwargs):
    return []
"""
CONFIG = """
model_name_or_path: {base_model}
dataset_name: prompts.jsonl
reward_funcs: [goodness=cli_rewards:goodness]
output_dir: value_model
max_completion_length: 8
layers: 2
use_cpu: true
report_to: none
"""


@pytest.fixture
def folder(base_model, tmp_path, monkeypatch):
    """A working directory with prompts, and a YAML file and reward functions in a folder below."""
    rows = [
        {"prompt": [{"role": "user", "content": word}], "split": split}
        for split, words in (("train", "abcdef"), ("test", "gh"))
        for word in words
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "cli_rewards.py").write_text(REWARDS)
    (tmp_path / "below" / "config.yaml").write_text(CONFIG.format(base_model=base_model))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield tmp_path
    sys.modules.pop("cli_rewards", None)


def run(*arguments):
    """Exit code of a subcommand in this process."""
    try:
        return main(list(arguments))
    except SystemExit as ended:
        return ended.code


def test_train_from_yaml(folder):
    command = [sys.executable, "-m", "trimtab", "train", "--config", "below/config.yaml"]
    finished = subprocess.run(
        [*command, "--num_train_epochs", "1"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "trimtab inspect value_model" in finished.stdout
    model = MAVISValueModel.load("value_model")
    assert model.config.objectives == ["goodness"]
    assert "train --config below/config.yaml" in model.config.provenance["command"]
    assert len(read_rollouts(folder / "value_model" / "rollouts" / "train")) == 6
    metrics = json.loads((folder / "value_model" / "eval_results.json").read_text())
    assert "eval_explained_variance/goodness" in metrics


def test_train_on_scored_responses_needs_no_reward_function(folder, base_model, capsys):
    rows = [
        {"prompt": w, "completion": " good" if w < "d" else " bad", "mood": w < "d", "split": split}
        for split, words in (("train", "abcdef"), ("test", "ghab"))
        for w in words
    ]
    (folder / "logs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = {
        "model_name_or_path": base_model,
        "dataset_name": "logs.jsonl",
        "output_dir": "value_model",
        "max_completion_length": "8",
        "use_cpu": "true",
        "report_to": "none",
    }
    assert run("train", *(part for k, v in flags.items() for part in (f"--{k}", v))) == 0
    config = load_config(str(folder / "value_model"))
    assert config.objectives == ["mood"] and config.head_type == "hidden"
    stored = json.loads((folder / "value_model/rollouts/train/rollouts.json").read_text())
    assert stored["source"] == "data" and stored["responses"] == 6
    capsys.readouterr()
    assert run("rollouts", "show", "value_model/rollouts/train") == 0
    shown = capsys.readouterr().out
    assert f"6 prompts, 6 responses, 12 tokens given as data for {base_model}" in shown
    assert "mood 1: ' good'" in shown or "mood 1: 'good'" in shown


def test_rollouts_are_collected_scored_and_shown(folder, capsys):
    config = ["--config=below/config.yaml"]
    assert run("rollouts", "score", *config) == 2, "nothing is there to score"
    assert "`trimtab rollouts collect` samples them" in capsys.readouterr().err
    assert run("rollouts", "collect", *config) == 0
    first = list(read_rollouts("value_model/rollouts/train"))
    both = ["--reward_funcs", "goodness=cli_rewards:goodness", "badness=cli_rewards:badness"]
    assert run("rollouts", "score", *config, *both) == 0
    second = read_rollouts("value_model/rollouts/train")
    assert [tree.nodes for tree in second] == [tree.nodes for tree in first]
    assert list(second[0].rewards) == ["goodness", "badness"]

    capsys.readouterr()
    assert run("rollouts", "show", "value_model/rollouts/train") == 0
    shown = capsys.readouterr().out
    responses = [r for tree in second for r in tree.rewards["badness"][tree.leaves()]]
    assert f"6 prompts, {len(responses)} responses" in shown
    assert f"from {min(responses):.4g} to {max(responses):.4g}, of {len(responses)}" in shown
    assert "prompt 0: '<user> a <assistant>'" in shown
    assert run("rollouts", "show", "value_model") == 2
    error = capsys.readouterr().err
    assert "give one of value_model/rollouts/eval, value_model/rollouts/train" in error


def test_revision_is_that_of_all_that_is_read(folder, base_model):
    """Of a hub's repository whose main branch is another model with another tokenizer."""
    repository = folder / "hub" / "models--org--tiny"
    for branch, commit in (("main", "0" * 40), ("v2", "1" * 40)):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
        shutil.copytree(base_model, repository / "snapshots" / commit)
    main = repository / "snapshots" / ("0" * 40)
    vocabulary = (main / "tokenizer.json").read_text()
    (main / "tokenizer.json").write_text(vocabulary.replace('"good"', '"fine"'))
    (main / "generation_config.json").write_text('{"eos_token_id": 5}')
    weights = load_file(main / "model.safetensors")
    save_file({k: 2 * v for k, v in weights.items()}, main / "model.safetensors", {"format": "pt"})
    finished = subprocess.run(
        [
            sys.executable, "-m", "trimtab", "train", "--config", "below/config.yaml",
            "--model_name_or_path", "org/tiny", "--model_revision", "v2",
            "--head_type", "hidden", "--num_train_epochs", "1",
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    found = load_config("value_model")
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    assert found.tokenizer_fingerprint == tokenizer_fingerprint(tokenizer)
    assert found.base_checkpoint_fingerprint == checkpoint_fingerprint(base_model)
    made = json.loads((folder / "value_model" / "rollouts" / "train" / "rollouts.json").read_text())
    assert made["eos_token_ids"] == [0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dataset_name": "none.jsonl"}, ["dataset_name", "'none.jsonl'"]),
        ({"dataset_name": "below/config.yaml.jsonl"}, ["'below/config.yaml.jsonl'", "read"]),
        ({"dataset_train_split": "all"}, ["dataset_train_split", "'all'", "'train', 'test'"]),
        ({"reward_funcs": "[good]"}, ["name=module:function", "'good'"]),
        ({"reward_funcs": "[good=nowhere:f]"}, ["'good=nowhere:f'", "beside the YAML"]),
        ({"reward_funcs": "[good=cli_rewards:f]"}, ["'cli_rewards' has no 'f'"]),
        ({"model_name_or_path": "./none"}, ["./none"]),
        ({"model_name_or_path": None}, ["model_name_or_path is missing"]),
        ({"load_in_4bit": "true"}, ["load_in_4bit: "]),
        ({"layers": 0}, ["`layers` must be at least 1, got 0"]),
        ({"layer": 3}, ["unknown keys layer:", "--help-all"]),
        ({"num_hidden_layers": 2}, ["`num_hidden_layers` is for head_type='state', got 2 with"]),
        (
            {"num_generations": 8, "beta": 0.04},
            ["unknown keys num_generations:", "`root_children`", "beta, if it is there, is"],
        ),
    ],
)
def test_train_names_what_cannot_be_used(folder, capsys, change, named):
    (folder / "below" / "config.yaml.jsonl").write_text("{")
    text = (folder / "below" / "config.yaml").read_text()
    kept = [line for line in text.splitlines() if line.partition(":")[0] not in change]
    lines = [*kept, *(f"{key}: {value}" for key, value in change.items() if value is not None)]
    (folder / "below" / "config.yaml").write_text("\n".join(lines))
    assert run("train", "--config", "below/config.yaml") == 2
    _, said, error = capsys.readouterr().err.partition("trimtab train: error: ")
    assert said and "Traceback" not in error
    for text in named:
        assert text in error


def test_what_fails_while_it_works_keeps_its_trace(folder):
    """Arguments that are right are not to blame, whatever kind of error it is."""
    config = ["--config", "below/config.yaml", "--reward_funcs", "none=cli_rewards:nothing"]
    for command in (["train"], ["rollouts", "collect"]):
        with pytest.raises(ValueError, match="'none' returned 0 rewards for"):
            main([*command, *config])


def test_dtype_is_the_checkpoints_unless_given(folder):
    given = ["--config", "below/config.yaml"]
    for flags, expected in (([], None), (["--dtype", "float32"], {"dtype": "float32"})):
        made, _ = make_trainer("train", [*given, *flags])
        assert made.args.model_init_kwargs == expected


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--config", "none.yaml"], "none.yaml"),
        (["--config", "prompts.jsonl"], "--config"),
        (["--config", "below/config.yaml", "--layer", "3"], "unknown keys layer"),
        (["--config", "below/config.yaml", "--layers", "three"], "--layers"),
        (["--output_dir", "x"], "required: --dataset_name"),
    ],
)
def test_flags_that_cannot_be_used_are_named(folder, capsys, arguments, named):
    assert run("train", *arguments) == 2
    error = capsys.readouterr().err
    assert named in error and len(error.splitlines()) < 20


def test_help_names_keys_that_there_are(capsys):
    known = {
        field.name
        for config in (MAVISScriptArguments, MAVISConfig, ModelConfig)
        for field in fields(config)
    }
    listed = re.findall(r"[a-z]\w+", TRAIN_HELP.split("\n\n")[2])
    assert {"dataset_name", "layers", "use_vllm", "report_to"} <= set(listed)
    assert {key for key in listed if "_" in key and key != "lora_r"} <= known
    theirs = {field.name for field in fields(GRPOConfig)} | {"reward_model_name_or_path"}
    assert set(INSTEAD) <= theirs - known
    assert set(MEAN_OTHERS) <= theirs & known
    assert run("train", "--help-all") == 0
    assert "--leaf_fraction" in capsys.readouterr().out


@pytest.mark.parametrize("spec", ["goodness", "=my_rewards:goodness"])
def test_malformed_reward_is_refused(spec):
    with pytest.raises(ValueError, match="name=module:function or name=model_id"):
        load_reward_func(spec)
    assert load_reward_func("judge=some/model") == ("judge", "some/model")
    assert load_reward_func("size=builtins:len") == ("size", len)
