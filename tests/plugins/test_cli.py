"""`trimtab inspect`, `check` and `serve`."""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib.metadata import PackageNotFoundError, entry_points
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import make_base_model, make_tokenizer
from trimtab.__main__ import main
from trimtab.plugins import cli


def run(*arguments) -> int:
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as ended:
        return ended.code


def changed(folder: Path, to: Path, **fields) -> Path:
    """A value model in another folder, with other fields of its config."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text()) | fields
    (to / "config.json").write_text(json.dumps(config))
    return to


def test_inspect_shows_objectives_and_origin(value_model, heads, tmp_path, capsys):
    efficiency = {"value": 0.12, "low": 0.05, "high": 0.2}
    provenance = {
        "command": "trimtab train --seed 1",
        "packages": {"trimtab": "0.0.1"},
        "reward_std": "within a prompt",
        "held_out": {"sour": {"kl_efficiency": efficiency}},
    }
    told = changed(heads, tmp_path / "told", reward_mean=[0.25, 3], provenance=provenance)
    assert run("inspect", told) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("hidden" in line and "width 64" in line for line in lines)
    assert "made by      trimtab train --seed 1" in lines
    assert "made with    trimtab 0.0.1" in lines
    assert lines[-2].split() == ["sweet", "0.25", "1", "1", "-"]
    assert lines[-1].split() == ["sour", "3", "1", "1", "0.120", "[0.050,", "0.200]"]
    assert "std within a prompt" in lines[-3]
    assert run("inspect", value_model) == 0
    assert "a llama of 2 layers, width 64" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["value_model", "heads"])
def test_check_accepts_what_serves(request, base_model, kind, capsys):
    folder = request.getfixturevalue(kind)
    assert run("check", base_model, folder) == 0
    assert f"{folder} serves with {base_model}" in capsys.readouterr().out


def test_check_tells_what_does_not_serve(base_model, value_model, heads, tmp_path, capsys):
    other = make_base_model(tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file(
        {k: 1.5 * v for k, v in weights.items()}, other / "model.safetensors", {"format": "pt"}
    )
    assert run("check", other, heads) == 1
    assert f"{other}" in (out := capsys.readouterr().out) and "has other weights" in out
    assert run("check", other, value_model) == 0, "a backbone of its own guides any of its kind"

    words = make_base_model(tmp_path / "words")
    make_tokenizer([f"x{i}" for i in range(93)]).save_pretrained(words)
    assert run("check", words, value_model) == 1
    assert "was trained with the tokenizer of" in capsys.readouterr().out

    # A table that is not the parameters': what is served is not what was trained.
    broken = changed(heads, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["action_table"] = weights["action_table"].roll(1, 0)
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    assert run("check", base_model, broken) == 1
    assert "log-probabilities differ by" in capsys.readouterr().out


@pytest.fixture
def executed(monkeypatch):
    """Commands that `serve` became, as where vLLM is installed."""
    found: list[list[str]] = []
    monkeypatch.setattr(os, "execvpe", lambda file, command, env: found.append(command))
    monkeypatch.setattr(cli, "find_spec", lambda name: object())
    monkeypatch.setattr(cli, "version", lambda name: "0.32.0")
    return found


@pytest.mark.parametrize("command", ["inspect", "check", "serve"])
def test_what_is_no_value_model_is_named(
    base_model, value_model, tmp_path, capsys, executed, command
):
    first = [] if command == "inspect" else [base_model]
    for wrong, why in ((tmp_path / "none", "there is no such folder"), (base_model, "'llama'")):
        assert run(command, *first, wrong) == 2
        error = capsys.readouterr().err
        assert f"trimtab {command}: error: " in error and "Traceback" not in error
        assert str(wrong) in error and why in error
    assert run(command) == 2
    if command == "check":
        assert run("check", value_model, value_model) == 2
        assert "is a value model: give its base model" in capsys.readouterr().err


def serve(*arguments) -> None:
    with pytest.raises(TypeError):  # nothing comes after a process that was replaced
        run("serve", *arguments)


def test_serve_becomes_vllm_with_the_flags(base_model, value_model, salty_model, executed, capsys):
    further = ["--port", "8001", "--enforce-eager", "--max-model-len=256"]
    config = '{"mavis": {"beta": 4, "weights": {"salty": 1}}, "theirs": 1}'
    serve(base_model, value_model, salty_model, *further, "--additional-config", config)
    ((executable, name, model, *flags),) = executed
    assert Path(executable).name == "vllm" and (name, model) == ("serve", str(base_model))
    assert flags[:2] == ["--logits-processors", "trimtab.plugins.vllm:MAVISLogitsProcessor"]
    assert flags[2] == "--additional-config" and json.loads(flags[3]) == {
        "mavis": {
            "value_models": [str(value_model), str(salty_model)],
            "beta": 4,
            "weights": {"salty": 1},
        },
        "theirs": 1,
    }
    assert flags[4:] == further
    assert f"vllm serve {base_model}" in capsys.readouterr().out


def test_serve_loads_our_endpoint_and_what_vllm_would(base_model, value_model, monkeypatch):
    environments = []
    monkeypatch.setattr(os, "execvpe", lambda file, command, env: environments.append(env))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    serve(base_model, value_model)
    monkeypatch.setenv("VLLM_PLUGINS", "theirs")
    serve(base_model, value_model)
    named, given = (environment["VLLM_PLUGINS"] for environment in environments)
    general = {plugin.name for plugin in entry_points(group="vllm.general_plugins")}
    assert {"mavis", *general} <= set(named.split(","))
    assert given == "theirs"


def test_serve_gives_each_server_metrics_of_its_own(
    base_model, value_model, monkeypatch, tmp_path, capsys, executed
):
    folders = []
    monkeypatch.setattr(
        os, "execvpe", lambda file, command, env: folders.append(env["PROMETHEUS_MULTIPROC_DIR"])
    )
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    serve(base_model, value_model)
    serve(base_model, value_model)
    assert {path for path in map(str, tmp_path.iterdir())} == set(folders) and len(folders) == 2
    assert 'PROMETHEUS_MULTIPROC_DIR="$(mktemp -d)" ' in capsys.readouterr().out
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "theirs")
    serve(base_model, value_model)
    assert folders[2] == "theirs" and "mktemp" not in capsys.readouterr().out


def test_serve_does_without_the_command(base_model, value_model, executed, monkeypatch):
    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(cli, "version", version)
    serve(base_model, value_model, "--port", "8001")
    module = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    assert executed[0][:5] == [*module, str(base_model)] and executed[0][-2:] == ["--port", "8001"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (['--additional-config={"mavis": {"bet": 4}}'], "unknown key 'bet'"),
        (['--additional-config={"mavis": {"beta": -1}}'], "beta must be a number from 0"),
        (['--additional-config={"mavis": {"weights": {"hot": 1}}}'], "unknown objective 'hot'"),
        (['--additional-config={"mavis": {"value_models": []}}'], 'without "value_models"'),
        (["--additional_config", "beta=4"], "must be a JSON object, got 'beta=4'"),
        (["--logits_processors", "other:Processor"], "--logits_processors is set here"),
        (["--additional-config.mavis.beta", "4"], "--additional-config.mavis.beta is set here"),
    ],
)
def test_serve_refuses_what_the_server_would(
    base_model, value_model, executed, capsys, flags, named
):
    assert run("serve", base_model, value_model, *flags) == 2
    assert named in capsys.readouterr().err and not executed


def test_serve_asks_for_vllm(base_model, value_model, monkeypatch, capsys):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert run("serve", base_model, value_model) == 2
    assert "pip install 'trimtab[vllm]'" in capsys.readouterr().err
