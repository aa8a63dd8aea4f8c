"""Iterations of MAVIS: what they sample from, what they measure, and how they go on."""

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

from trimtab.plugins.value_config import load_config
from trimtab.plugins.value_model import MAVISValueModel
from trimtab.trainers import read_rollouts
from trimtab.trainers.iterations import PolicyHistory
from trimtab.trainers.trees import Node, Tree

from .conftest import ROOT, in_two_processes
from .test_mavis_trainer import REWARDS, config, goodness, prompts, trainer
from .test_rollouts import same

FIELDS = {
    "num_iterations": 2,
    "beta": 2.0,
    "top_k": 10,
    "layers": 2,
    "num_train_epochs": 2,
    "save_strategy": "steps",
    "save_steps": 1,
}


@pytest.fixture(scope="module")
def iterated(base_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("iterated")
    made = trainer(
        base_model, folder, data=prompts(60), eval_dataset=prompts(80, 5), num_iterations=3,
        beta=2.0, top_k=10, layers=2, num_train_epochs=6,
    )  # fmt: skip
    made.train()
    made.save_model()
    return made, folder


def test_policies_improve_on_the_base_model(iterated):
    made, folder = iterated
    written = json.loads((folder / "iterations.json").read_text())
    base, first = written["policies"][:2]
    assert len(written["policies"]) == 4
    for name in REWARDS:
        assert base[name]["kl"]["value"] == 0 and "improvement" not in base[name]
        assert first[name]["kl"]["low"] > 0
        assert first[name]["reward"]["low"] > base[name]["reward"]["high"]
        assert first[name]["improvement"]["low"] > 0
    assert (folder / "iterations.png").stat().st_size > 0
    logged = [log for log in made.state.log_history if "policy/objective/redness" in log]
    assert logged[-1]["iteration"] == 3


def test_a_policy_is_measured_by_its_own_rollouts(iterated):
    made, folder = iterated
    config = made.value_config
    measured = json.loads((folder / "iterations.json").read_text())["policies"][2]
    for i, name in enumerate(REWARDS):
        trees = read_rollouts(folder / "rollouts" / "iteration-2" / name / "eval")
        assert len(trees) == 80 and all(list(tree.rewards) == [name] for tree in trees)
        trees = trees[::2]  # the others are for the choice
        rewards, kls = [], []
        for tree in trees:  # leaf by leaf
            shares = tree.shares()[tree.leaves()]
            rewards.append(shares @ tree.rewards[name][tree.leaves()])
            of_leaf = [sum(sum(tree.nodes[n].kls) for n in tree.path(x)) for x in tree.leaves()]
            kls.append(shares @ of_leaf)
        reward = (np.mean(rewards) - config.reward_mean[i]) / config.reward_std[i]
        assert measured[name]["reward"]["value"] == pytest.approx(reward, rel=1e-5)
        assert measured[name]["kl"]["value"] == pytest.approx(np.mean(kls), rel=1e-5)
        objective = reward - np.mean(kls) / 2.0
        assert measured[name]["objective"]["value"] == pytest.approx(objective, rel=1e-5)
        # The log-ratios' mean is the KL, up to their noise.
        ratios = [sum(sum(n.log_ratios) for n in tree.nodes) for tree in trees]
        exact = [sum(sum(n.kls) for n in tree.nodes) for tree in trees]
        error = np.std(np.subtract(ratios, exact)) / np.sqrt(len(trees))
        assert abs(np.mean(ratios) - np.mean(exact)) < 4 * error


def test_values_guide_as_far_as_responses_bear_them_out(iterated):
    made, folder = iterated
    measured = json.loads((folder / "iterations.json").read_text())["policies"]
    for iteration in range(3):
        saved = load_config(str(folder / f"iteration-{iteration}" / "value_model"))
        scales = [measured[iteration + 1][name]["candidate_scale"] for name in REWARDS]
        assert saved.candidate_scale == scales and min(scales) > 0.3
    log = {k: v for entry in made.state.log_history for k, v in entry.items()}
    for name, scale in zip(REWARDS, scales):
        assert scale == np.clip(log[f"candidate_scale/{name}/value"], 0, 1)
        assert log[f"candidate_scale/{name}/low"] < log[f"candidate_scale/{name}/value"]
    kept = made.value_config.provenance["iterations"]["kept"]
    last = MAVISValueModel.load(str(folder))
    assert last.config.candidate_scale == made.value_config.candidate_scale
    assert last.config.candidate_scale == [
        measured[kept + 1][name]["candidate_scale"] for name in REWARDS
    ]


def test_a_scale_of_other_values_is_forgotten(base_model, tmp_path):
    model = MAVISValueModel.from_base_model(
        base_model, list(REWARDS), num_hidden_layers=2, candidate_scale=[0.1, 0.2]
    )
    made = trainer(model, tmp_path)
    made.train()
    made.save_model()
    assert load_config(str(tmp_path)).candidate_scale is None


def test_best_iteration_is_kept(iterated):
    made, folder = iterated
    iterations = made.value_config.provenance["iterations"]
    objectives = []
    for iteration in range(3):
        values = []
        for i, name in enumerate(REWARDS):
            trees = read_rollouts(
                folder / "rollouts" / f"iteration-{iteration + 1}" / name / "eval"
            )
            m, s = made.value_config.reward_mean[i], made.value_config.reward_std[i]
            values += [(t.values(name)[0] - m) / s - t.kl() / 2.0 for t in trees[1::2]]
        objectives.append(np.mean(values))
    assert iterations["choice"] == pytest.approx(objectives)
    assert iterations["kept"] == np.argmax(objectives)
    assert iterations["prompts"] == {"chosen on": 40, "reported on": 40}
    card = (folder / "README.md").read_text()
    assert "on 40 held-out prompts, not the 40 that the kept iteration was chosen on" in card
    kept = MAVISValueModel.load(str(folder / f"iteration-{iterations['kept']}" / "value_model"))
    saved = MAVISValueModel.load(str(folder))
    torch.testing.assert_close(saved.state_dict(), kept.state_dict())
    assert saved.config.candidate_range is not None
    assert "iterations" in (folder / "README.md").read_text()


def make_tree(reward, kl):
    tree = Tree(0, [Node(-1, 0, [1]), Node(0, 1, [2], leaf=True, log_ratios=[kl], kls=[kl])])
    tree.rewards["r"] = np.array([np.nan, reward])
    return [tree]


def test_choice_and_figures_are_of_different_prompts():
    history = PolicyHistory(beta=2.0)
    for held_back, reported in ((0.0, 0.0), (2.0, 1.0), (1.0, 5.0)):
        trees = [make_tree(reward, 0.0)[0] for reward in (reported, held_back) * 3]
        history.add({"r": trees}, [0.0], [1.0])
    assert history.best() == 0
    assert [p["r"]["reward"]["value"] for p in history.policies] == [0.0, 1.0, 5.0]
    assert history.to_json()["choice"] == [2.0, 1.0]


def test_worse_iteration_is_warned_of():
    history = PolicyHistory(beta=2.0)
    for reward, kl in ((0.0, 0.0), (1.0, 0.5), (1.2, 1.5)):
        history.add({"r": make_tree(reward, kl)}, [0.0], [1.0])
        if len(history.policies) == 2:
            assert history.warnings() == []
    assert history.best() == 0
    (message,) = history.warnings()
    assert "iteration 1 did not improve" in message and "smaller `beta`" in message
    assert history.policies[2]["r"]["improvement"]["value"] == pytest.approx(-0.3)


def test_monotonic_check_warns_through_the_logger(base_model, tmp_path, monkeypatch):
    monkeypatch.setattr(PolicyHistory, "warnings", lambda self: ["no better"])
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    transformers_logging.get_logger("trimtab.trainers.iterations").addHandler(handler)
    for check in (True, False):
        trainer(
            base_model, tmp_path / str(check), eval_dataset=prompts(2), monotonic_check=check,
            **{**FIELDS, "save_strategy": "no"},
        ).train()  # fmt: skip
        assert ("no better" in messages) is check
        messages.clear()


def script(base_model, folder, extra=""):
    return textwrap.dedent(
        f"""
        import time
        from tests.trainers.test_iterations import FIELDS, prompts, trainer
        from trimtab.trainers import rollouts, mavis_trainer
        {extra}
        made = trainer({base_model!r}, {str(folder)!r}, eval_dataset=prompts(6, 3),
                       rollout_batch_size=2, **FIELDS)
        made.train(resume_from_checkpoint=True)
        made.save_model()
        """
    )


def run(base_model, folder, extra=""):
    return subprocess.Popen(
        [sys.executable, "-c", script(base_model, folder, extra)],
        cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stderr=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(base_model, tmp_path_factory):
    """Folder of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(base_model, folder).wait() == 0
    return folder


SLOW_SAMPLING = """
grow = rollouts.grow_trees
rollouts.grow_trees = lambda *args: (time.sleep(0.3), grow(*args))[1]
"""
SLOW_TRAINING = """
step = mavis_trainer.MAVISTrainer.training_step
mavis_trainer.MAVISTrainer.training_step = lambda *args: (time.sleep(0.3), step(*args))[1]
"""


@pytest.mark.parametrize(
    ("slow", "reached"),
    [
        (SLOW_SAMPLING, "rollouts/iteration-1/goodness/train/trees-00001.parquet"),
        (SLOW_TRAINING, "iteration-1/checkpoint-2/trainer_state.json"),
    ],
    ids=["sampling", "training"],
)
def test_killed_run_resumes_in_its_iteration(base_model, whole, tmp_path, slow, reached):
    process = run(base_model, tmp_path / "killed", slow.replace("\n", "\n        "))
    deadline = time.monotonic() + 300
    while not (tmp_path / "killed" / reached).exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    folders = [p.parent for p in (tmp_path / "killed").glob("rollouts/**/rollouts.json")]
    left = {folder: list(read_rollouts(folder)) for folder in folders}  # files may be replaced
    assert run(base_model, tmp_path / "killed").wait() == 0
    finished = sorted(p.parent for p in whole.glob("rollouts/**/rollouts.json"))
    assert len(finished) == 2 + 4 + 2  # base; train and eval, then eval, of two objectives
    for folder in finished:
        there = tmp_path / "killed" / folder.relative_to(whole)
        resumed = read_rollouts(there)
        same(resumed, read_rollouts(folder))
        for tree, before in zip(resumed, left.get(there, [])):
            # It may have been killed before it rewarded its last batch.
            kept = {name: tree.rewards[name] for name in before.rewards}
            same([dataclasses.replace(tree, rewards=kept)], [before])
        assert [tree.prompt_index for tree in resumed] == list(range(len(resumed)))
    killed, expected = (MAVISValueModel.load(str(f)) for f in (tmp_path / "killed", whole))
    torch.testing.assert_close(killed.state_dict(), expected.state_dict())
    assert killed.config.candidate_scale == pytest.approx(expected.config.candidate_scale)


def test_merged_adapters_are_taken_up_again(base_model, tmp_path):
    """The next iteration trains the adapter, and samples with it merged."""
    fields = {**FIELDS, "peft_config": LoraConfig(r=4), "eval_dataset": prompts(4)}
    made = trainer(base_model, tmp_path, **fields)
    made.train()
    again = trainer(base_model, tmp_path, **fields)
    again.train(resume_from_checkpoint=True)
    torch.testing.assert_close(again.model.state_dict(), made.model.state_dict())
    assert again.state.global_step == 0, "nothing was left to train"


def test_objective_added_later_leaves_the_others_as_they_are(base_model, tmp_path):
    shared = {**FIELDS, "save_strategy": "no", "rollout_dir": str(tmp_path / "rollouts")}
    trainer(base_model, tmp_path / "a", {"goodness": goodness}, **shared).train()
    before = {
        path: (path.read_bytes(), path.stat().st_mtime)
        for path in [*(tmp_path / "a").rglob("*"), *(tmp_path / "rollouts").rglob("*")]
        if path.is_file() and path.parent != tmp_path / "rollouts" / "train"
    }
    added = trainer(base_model, tmp_path / "b", {"redness": REWARDS["redness"]}, **shared)
    added.train()
    assert {path: (path.read_bytes(), path.stat().st_mtime) for path in before} == before
    # The base model's responses were sampled once, for both.
    (tree, *_) = read_rollouts(tmp_path / "rollouts" / "train")
    assert set(tree.rewards) == {"goodness", "redness"}


def test_rollouts_of_another_value_model_are_refused(base_model, tmp_path):
    made = trainer(base_model, tmp_path, **{**FIELDS, "save_strategy": "no"})
    made.train()
    other = trainer(
        base_model, tmp_path / "other", rollout_dir=str(tmp_path / "rollouts"),
        **{**FIELDS, "save_strategy": "no", "learning_rate": 1e-3},
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"value_model was '\w+' and is '\w+'.*`rollout_dir`"):
        other.train()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_iterations": 0}, "`num_iterations` must be at least 1, got 0"),
        ({"beta": 0.0}, "`beta` must be positive, got 0.0"),
        ({"kl_penalty": -1.0}, "`kl_penalty` must not be negative, got -1.0"),
        ({"num_iterations": 2, "top_k": 0}, "`top_k` must be at least 1 with several iterations"),
        (
            {"num_iterations": 2, "top_k": 5, "vllm_server_base_url": "http://localhost:1"},
            "`vllm_server_base_url` cannot serve num_iterations=2",
        ),
    ],
)
def test_bad_settings_are_named(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **fields)


def test_kl_penalty_defaults_to_the_price_that_guidance_pays(tmp_path):
    assert config(tmp_path, beta=4.0).kl_penalty == 0.25
    assert config(tmp_path, beta=4.0, kl_penalty=0.0).kl_penalty == 0.0


def test_what_serves_one_training_is_refused(base_model, tmp_path):
    made = trainer(base_model, tmp_path, **FIELDS)
    with pytest.raises(ValueError, match="`resume_from_checkpoint` must be True"):
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_two_processes_share_the_work(base_model, tmp_path):
    """
    Launched as users do, over gloo: the rollouts are those of one process. The environment is that
    of FSDP, which would have one process read the weights (without a GPU there is no more of it).
    """
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            f"""
            from safetensors.torch import save_file
            from tests.trainers.test_iterations import FIELDS, prompts, trainer
            made = trainer({base_model!r}, {str(tmp_path / "two")!r}, eval_dataset=prompts(6, 3),
                           rollout_batch_size=2, per_device_train_batch_size=2, **FIELDS)
            assert made.accelerator.num_processes == 2
            made.train()
            made.save_model()
            rank = made.accelerator.process_index
            weights = {{k: v.contiguous() for k, v in made.model.state_dict().items()}}
            save_file(weights, {str(tmp_path)!r} + f"/rank-{{rank}}.safetensors")
            """
        )
    )
    in_two_processes(program, ACCELERATE_USE_FSDP="true", FSDP_CPU_RAM_EFFICIENT_LOADING="true")
    one = trainer(
        base_model, tmp_path / "one", eval_dataset=prompts(6, 3), rollout_batch_size=2, **FIELDS
    )
    one.collect_rollouts()
    for name in ("train", "eval"):
        same(
            read_rollouts(tmp_path / "two" / "rollouts" / name),
            read_rollouts(tmp_path / "one" / "rollouts" / name),
        )
    for objective in REWARDS:
        for name, count in (("train", 8), ("eval", 6)):
            trees = read_rollouts(tmp_path / "two" / "rollouts" / "iteration-1" / objective / name)
            assert [tree.prompt_index for tree in trees] == list(range(count))
    ranks = [load_file(tmp_path / f"rank-{i}.safetensors") for i in range(2)]
    torch.testing.assert_close(*ranks, rtol=0, atol=0)
    saved = MAVISValueModel.load(str(tmp_path / "two"))
    torch.testing.assert_close(saved.state_dict(), ranks[0])
