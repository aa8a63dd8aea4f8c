"""Every benchmark and example that needs no model still runs, on a problem cut small."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import wordfreq

from benchmarks import _published, choose_trees, iterations, search
from tests.conftest import make_heads, make_tokenizer, make_value_model
from tests.reference import Reference
from tests.trainers.test_rollouts import grow
from trimtab.plugins import MAVISValueModel, ValueEngine
from trimtab.trainers.trees import TreeConfig, write_trees

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "command",
    [
        ["benchmarks/congo_problems.py", "--quick"],
        ["benchmarks/congo_quadratics.py", "--quick"],
        ["benchmarks/congo_queueing.py", "--quick"],
        ["benchmarks/congo_scaling.py", "--quick"],
        pytest.param(
            ["benchmarks/tune_postgres.py", "--quick"],
            marks=pytest.mark.skipif(
                not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")),
                reason="PostgreSQL is not installed: "
                "apt-get install --no-install-recommends postgresql",
            ),
        ),
        ["benchmarks/serving.py", "--quick"],
        ["benchmarks/engine_gpu.py", "--device", "cpu", "--quick"],
        ["examples/tune_a_live_service.py", "--rounds", "2"],
        ["examples/congo_on_dask.py"],
    ],
    ids=lambda command: Path(command[0]).stem,
)
def test_it_runs(command, tmp_path):
    run = subprocess.run(
        [sys.executable, ROOT / command[0], *command[1:]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    assert run.stdout.strip()
    assert not list(tmp_path.iterdir())  # a smoke test leaves nothing behind


PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [20, 21, 22, 23]]


@pytest.mark.parametrize("form", _published.FORMS)
def test_the_published_loop_equals_the_plain_computation(form, base_model, tmp_path):
    names, weights = ["one", "two", "three"], [1.0, -0.5, 0.7]
    folders = [make_value_model(tmp_path / n, base_model, [n], seed=i) for i, n in enumerate(names)]
    reference = Reference(base_model, folders)
    steps = _published.generate(
        reference.base, reference.values, PROMPTS, weights=weights, beta=2.0, top_k=7,
        max_tokens=10, form=form, greedy=True,
    )  # fmt: skip
    expected = [reference.greedy(prompt, 10, weights, 2.0, 7) for prompt in PROMPTS]
    assert torch.stack(list(steps), dim=1).tolist() == expected


@pytest.mark.parametrize("form", _published.FORMS.values())
@torch.inference_mode()
def test_the_published_values_equal_the_engines(form, base_model, tmp_path):
    folder = make_value_model(tmp_path / "value", base_model, ["sweet"])
    engine = ValueEngine([MAVISValueModel.load(str(folder))], num_slots=3, max_length=64)
    published = form(MAVISValueModel.load(str(folder)).eval())
    new, mask = _published.left_padded(PROMPTS)
    texts = [list(prompt) for prompt in PROMPTS]
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        candidates = torch.stack([torch.randperm(96, generator=generator)[:6] for _ in PROMPTS])
        expected = engine.values(
            np.arange(3),
            np.array([len(text) for text in texts]),
            torch.tensor([text[-1] for text in texts]),
            candidates,
            lambda slot, start, stop: texts[slot][start:stop],
        )
        found = published.values(new, mask, candidates)
        assert torch.allclose(found, expected[..., 0], atol=1e-4)
        new = candidates[:, 3:4]
        mask = torch.nn.functional.pad(mask, (0, 1), value=True)
        for text, token in zip(texts, new[:, 0].tolist()):
            text.append(token)


def test_best_of_n_is_the_mean_over_all_draws():
    rng = np.random.default_rng(0)
    values, rewards = rng.normal(size=(2, 3, 6))
    for n in (1, 2, 4, 6):
        draws = [list(draw) for draw in itertools.combinations(range(6), n)]
        expected = [
            np.mean([r[draw][v[draw].argmax()] for draw in draws]) for v, r in zip(values, rewards)
        ]
        assert search.best_of(values, rewards, n) == pytest.approx(expected)


def test_search_is_measured_once_and_read_again(tmp_path, base_model):
    words = [w for w in wordfreq.top_n_list("en", 200) if w.isalpha()][:93]
    base = shutil.copytree(base_model, tmp_path / "base")
    make_tokenizer(words).save_pretrained(base)
    values = make_value_model(tmp_path / "values", base_model, ["readability", "rarity"])
    heads = make_heads(tmp_path / "heads", base_model, ["readability", "rarity"])
    command = [
        sys.executable, ROOT / "benchmarks/search.py", "--base", base, "--heads", heads,
        "--beams-model", values,
        "--prompts", "3", "--plain-samples", "8", "--max-tokens", "26", "--top-k", "20",
        "--dtype", "float32", "--artifacts", tmp_path / "artifacts", "--out", tmp_path / "docs",
    ]  # fmt: skip
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr[-4000:]
    answers = (tmp_path / "artifacts/responses.jsonl").read_text()
    result = json.loads((tmp_path / "docs/search.json").read_text())["objectives"]
    assert (tmp_path / "docs/search.png").exists() and "4 beams" in first.stdout
    for entry in result.values():
        by_reward = [point["by_reward"]["mean"] for point in entry["best_of_n"]]
        assert by_reward[0] == pytest.approx(0, abs=1e-9) and by_reward == sorted(by_reward)
        assert entry["reward"]["gain"]["mean"] == pytest.approx(by_reward[3])
        assert entry["guided reward"]["gain"]["mean"] >= entry["guided"]["gain"]["mean"]
        assert entry["target"]["best_of"] == 8 and 0 < entry["target"]["tokens"] * 8 < 16
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.stdout == first.stdout
    assert (tmp_path / "artifacts/responses.jsonl").read_text() == answers


def test_trees_are_chosen_by_the_variance_of_a_pilot_that_is_not_trained_on():
    trees = grow(TreeConfig(max_completion_length=12, layers=3), end=0.1, count=20)
    rng = np.random.default_rng(0)
    for i, tree in enumerate(trees):
        leaf = np.array([node.leaf for node in tree.nodes])
        for name in choose_trees.OBJECTIVES:
            tree.rewards[name] = np.where(leaf, rng.normal(scale=i + 1, size=len(leaf)), np.nan)
    halves = [[choose_trees.below(tree, s) for s in (slice(0, 2), slice(2, 4))] for tree in trees]
    for tree, parts in zip(trees, halves):
        found = [(t.response(i), t.rewards["rarity"][i]) for t in parts for i in t.leaves()]
        expected = [(tree.response(i), tree.rewards["rarity"][i]) for i in tree.leaves()]
        assert sorted(found) == sorted(expected)
    std = np.ones(len(choose_trees.OBJECTIVES))
    tokens = sum(len(node.tokens) for _, rest in halves for node in rest.nodes[1:])
    for choice in choose_trees.CHOICES:
        chosen = choose_trees.choose(trees, std, choice, seed=0)
        used = sum(len(node.tokens) for half in chosen for node in half.nodes[1:])
        assert 0.4 * tokens < used <= 0.5 * tokens
        indices = [half.prompt_index for half in chosen]
        assert [half.nodes for half in chosen] == [halves[i][1].nodes for i in indices]
    assert np.mean(indices) > 13  # the scales grow with the index, whose mean is 9.5


def test_the_same_responses_are_learnt_from_as_each_type_of_data(base_model, tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("train", 10), ("eval", 4)):
        trees = grow(TreeConfig(max_completion_length=12, layers=2), end=0.1, count=count)
        for tree in trees:
            tree.nodes[0].tokens.append(20 + tree.prompt_index)  # prompts of their own
            leaf = np.array([node.leaf for node in tree.nodes])
            for objective in choose_trees.OBJECTIVES:
                tree.rewards[objective] = np.where(leaf, rng.normal(size=len(leaf)), np.nan)
        (tmp_path / "rollouts" / name).mkdir(parents=True)
        write_trees(tmp_path / "rollouts" / name / "trees-00000.parquet", trees, {})
    run = subprocess.run(
        [sys.executable, ROOT / "benchmarks/offline.py", "--base", base_model, "--seeds", "1",
         "--members", "1", "--rollouts", tmp_path / "rollouts", "--output", tmp_path / "out.json",
         "--table", tmp_path / "out.md"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    result = json.loads((tmp_path / "out.json").read_text())
    assert len(result["arms"]) == 5
    measured = [m["kl_efficiency"] for (curve,) in result["arms"].values() for m in curve[-1]]
    assert len(measured) == 5 * 4 and all(np.isfinite(list(m.values())).all() for m in measured)
    assert (tmp_path / "out.md").read_text() in run.stdout


def test_policies_are_summarised_by_the_seed_with_the_median_value():
    def measured(value):
        reward = {"value": value, "low": value - 1, "high": value + 2}
        return {"rarity": {"reward": reward, "candidate_scale": value}}

    seeds = [{"policies": [measured(value)]} for value in (3.0, 1.0, 2.0)]
    assert iterations.summarise(seeds) == [measured(2.0)]
