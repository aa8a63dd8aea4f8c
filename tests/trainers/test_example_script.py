"""The example script, from a YAML file to a saved value model."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.plugins.value_model import MAVISValueModel
from trimtab.trainers import read_rollouts

SCRIPT = Path(__file__).parents[2] / "examples" / "train_value_models.py"


def run(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_script_trains_from_yaml(base_model, tmp_path):
    (tmp_path / "my_rewards.py").write_text(
        "def goodness(completions, **kwargs):\n"
        "    return [float(c[0]['content'].count('good')) for c in completions]\n"
    )
    rows = [
        {"prompt": [{"role": "user", "content": word}], "split": split}
        for split, words in (("train", "abcdef"), ("test", "gh"))
        for word in words
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "config.yaml").write_text(
        f"""
model_name_or_path: {base_model}
dataset_name: prompts.jsonl
reward_funcs: [goodness=my_rewards:goodness]
output_dir: value_model
max_completion_length: 8
layers: 2
num_hidden_layers: 1
use_cpu: true
report_to: none
"""
    )
    finished = run(tmp_path, "--config", "config.yaml", "--num_train_epochs", "1")
    assert finished.returncode == 0, finished.stderr[-3000:]
    model = MAVISValueModel.load(str(tmp_path / "value_model"))
    assert model.config.objectives == ["goodness"]
    assert "train_value_models.py" in model.config.provenance["command"]
    assert len(read_rollouts(tmp_path / "value_model" / "rollouts" / "train")) == 6
    metrics = json.loads((tmp_path / "value_model" / "eval_results.json").read_text())
    assert "eval_explained_variance/goodness" in metrics


@pytest.mark.parametrize("spec", ["goodness", "=my_rewards:goodness"])
def test_malformed_reward_is_refused(spec):
    file = importlib.util.spec_from_file_location("script", SCRIPT)
    script = importlib.util.module_from_spec(file)
    sys.modules["script"] = script  # dataclasses look their module up
    file.loader.exec_module(script)
    with pytest.raises(ValueError, match="name=module:function or name=model_id"):
        script.load_reward_func(spec)
    assert script.load_reward_func("judge=some/model") == ("judge", "some/model")
    assert script.load_reward_func("size=builtins:len") == ("size", len)
