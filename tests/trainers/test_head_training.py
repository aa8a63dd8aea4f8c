"""Heads on the base model's hidden state: their rows, their measure, and `MAVISTrainer`."""

from __future__ import annotations

import json
import random
import shutil
import textwrap

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from trimtab.plugins import MAVISValueHeads, MAVISValueModel
from trimtab.trainers import MAVISConfig
from trimtab.trainers.head_training import (
    FOLDS,
    STRENGTHS,
    WIDEST_SUM,
    BranchFeatures,
    HeadTraining,
    add_baseline,
    add_excess,
    efficiency,
    efficiency_sums,
    fit_values,
    lambda_returns,
    sampled_shares,
)
from trimtab.trainers.hidden_states import (
    HeadDataset,
    cache_hidden_states,
    cache_path,
    collate_rows,
    read_tree,
    row_starts,
    tree_rows,
)
from trimtab.trainers.rollouts import read_rollouts
from trimtab.trainers.trees import Tree, TreeConfig

from .conftest import END, guided_texts, in_two_processes, make_model
from .test_mavis_trainer import prompts, redness, text_of, trainer
from .test_rollouts import add_rewards, grow


def rows_of(tree):
    values, known = tree.values("sum"), tree.known("sum")
    return tree_rows(tree, np.stack([values, -2 * values], -1), np.stack([known, known], -1))


def masked(tree, rng):
    """The tree without some of its rewards."""
    rewards = tree.rewards["sum"].copy()
    rewards[rng.random(len(rewards)) < rng.choice([0.3, 0.7])] = np.nan
    return Tree(tree.prompt_index, tree.nodes, {"sum": rewards})


@pytest.fixture(scope="module")
def trees():
    trees = grow(TreeConfig(max_completion_length=14, layers=3), end=0.15, count=5)
    for tree in trees:
        add_rewards(tree)
    return trees


def test_rows_follow_the_branches_of_the_tree(trees):
    for tree in trees:
        rows, starts = rows_of(tree), row_starts(tree)
        for leaf in tree.leaves():
            row, tokens, reach = starts[leaf + 1] - 1, [], 1.0
            assert rows["ends"][row] and rows["depths"][row] == len(tree.response(leaf))
            while row:
                tokens.append(rows["tokens"][row])
                reach *= rows["shares"][row, 0]
                assert rows["depths"][row] == rows["depths"][rows["previous"][row]] + 1
                row = rows["previous"][row]
            assert tokens[::-1] == tree.response(leaf)
            assert reach == pytest.approx(rows["reach"][starts[leaf], 0])
        assert rows["tokens"][0] == tree.nodes[0].tokens[-1]


def test_returns_lie_between_the_finished_responses_and_the_next_values(trees):
    """Against a recursion over the responses, and at both ends."""
    batch = collate_rows([rows_of(tree) for tree in trees])
    values = torch.randn(len(batch["tokens"]), 2)
    everything = lambda_returns(batch, values, 1.0)
    torch.testing.assert_close(everything, batch["labels"], rtol=1e-4, atol=1e-4)
    nothing = lambda_returns(batch, values, 0.0)
    expected = torch.where(batch["ends"][:, None], batch["labels"], values)
    torch.testing.assert_close(nothing, expected)
    half = lambda_returns(batch, values, 0.5)

    def naive(row):
        if batch["ends"][row]:
            return batch["labels"][row]
        after = [j for j in range(len(values)) if batch["previous"][j] == row and j != row]
        mean = sum(batch["shares"][j] * naive(j) for j in after)
        return 0.5 * values[row] + 0.5 * mean

    first = int((batch["trees"] == 0).sum())
    for row in range(0, first, 3):
        torch.testing.assert_close(half[row], naive(row), rtol=1e-4, atol=1e-4)


def test_returns_are_means_over_the_responses_that_have_a_reward(trees):
    rng = np.random.default_rng(0)
    some = [masked(tree, rng) for tree in trees]
    batch = collate_rows([rows_of(tree) for tree in some])
    values = torch.randn(len(batch["tokens"]), 2)
    whole = lambda_returns(batch, values, 1.0)
    assert batch["labels"].isnan().any()
    torch.testing.assert_close(whole, batch["labels"], rtol=1e-4, atol=1e-4, equal_nan=True)
    half = lambda_returns(batch, values, 0.5)
    assert half.isnan().equal(batch["labels"].isnan())
    # A response's reward counts by its share of those that have one.
    for tree in some:
        leaves = [i for i in tree.leaves() if not np.isnan(tree.rewards["sum"][i])]
        if not tree.shares()[leaves].any():
            continue
        expected = np.average(tree.rewards["sum"][leaves], weights=tree.shares()[leaves])
        rows = rows_of(tree)
        assert rows["labels"][0, 0] == pytest.approx(expected)
        assert rows["reach"][0, 0] == pytest.approx(tree.shares()[leaves].sum())
        ends = rows["ends"] & ~np.isnan(rows["labels"][:, 0])
        assert rows["reach"][ends, 0].sum() == pytest.approx(rows["reach"][0, 0])


def test_advantages_are_centred_under_what_is_sampled():
    log_probs = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, expected in (
        (1.0, [0.5, 0.3, 0.15, 0.05]),
        (0.81, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        (0.79, [0.625, 0.375, 0, 0]),
        (0.1, [1, 0, 0, 0]),
    ):
        found = sampled_shares(log_probs, top_p=top_p)
        torch.testing.assert_close(found, torch.tensor([expected]).float())


def test_an_unknown_reward_leaves_the_regression_and_the_measures_alone(trees):
    """Unknown responses of one objective: as if their rows were not there; the other's are."""
    rng = np.random.default_rng(0)
    items = random_items(trees)
    part = random_items([masked(tree, rng) for tree in trees])
    both = [
        {**item, **{k: np.stack([p[k][:, 0], item[k][:, 1]], -1) for k in ("labels", "reach")}}
        for item, p in zip(items, part)
    ]
    rows = [{k: x[k][x["reach"][:, 0] > 0] for k in ("hidden", "labels", "reach")} for x in part]
    features = lambda item: item["hidden"]  # noqa: E731
    weights, values = fit_values(both, features)
    alone, _ = fit_values(rows, features)
    torch.testing.assert_close(weights[:, 0], alone[:, 0], rtol=1e-4, atol=1e-4)
    full, of_full = fit_values(items, features)
    torch.testing.assert_close(weights[:, 1], full[:, 1])
    torch.testing.assert_close(values[2][:, 1], of_full[2][:, 1])

    both[0]["labels"][:, 0], both[0]["reach"][:, 0] = np.nan, 0  # nothing of this prompt
    for of_kind in (items, both):
        for item in of_kind:
            n = len(item["tokens"])
            item["baseline"] = np.zeros((n, 2), dtype=np.float32)
            item["candidates"] = torch.arange(32).expand(n, -1)
            item["log_probs"] = torch.zeros(n, 32)
    advantages = torch.randn(sum(len(x["tokens"]) for x in items), 32, 2)
    known = efficiency_sums(collate_rows(items), advantages[:, 0], advantages)
    found = efficiency_sums(collate_rows(both), advantages[:, 0], advantages)
    nothing = [not item["reach"][:, 0].any() for item in both]
    assert found[:, 0, 0].isnan().tolist() == nothing and 0 < sum(nothing) < 4
    torch.testing.assert_close(found[..., 1], known[..., 1])
    assert not np.isnan([x["value"] for x in efficiency(found.numpy())[0].values()]).any()


def test_values_are_those_of_regressions_that_have_not_seen_the_tree():
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(0)
    truth = rng.normal(size=(6, 2))
    items = []
    for _ in range(10):
        x = rng.normal(size=(30, 6))
        y = x @ truth + rng.normal(size=(30, 2)) * (0.1, 1.0) + rng.normal()
        items.append(
            {
                "hidden": torch.from_numpy(x).float(),
                "labels": torch.from_numpy(y).float(),
                "reach": rng.uniform(0.1, 1, (30, 1)).repeat(2, 1).astype(np.float32),
            }
        )
    weights, values = fit_values(items, lambda item: item["hidden"])
    np.testing.assert_allclose(weights[:-1, 0], truth[:, 0], atol=0.15)
    others = [item for i, item in enumerate(items) if i % FOLDS != 3]
    x, y, w = (np.concatenate([item[k] for item in others]) for k in ("hidden", "labels", "reach"))
    w, total = w[:, 0], sum(item["reach"][:, 0].sum() for item in items)
    close = []
    for strength in STRENGTHS:
        ridge = Ridge(alpha=strength * total).fit(x, y[:, 0], sample_weight=w)
        close.append(np.abs(ridge.predict(items[3]["hidden"]) - values[3][:, 0].numpy()).max())
    assert min(close) < 1e-3 < sorted(close)[1]


def random_items(trees, width=6):
    generator = torch.Generator().manual_seed(0)
    items = [dict(rows_of(tree)) for tree in trees]
    for item in items:
        item["hidden"] = torch.randn(len(item["tokens"]), width, generator=generator)
    return items


def test_the_baseline_reads_sums_over_the_response_so_far(trees):
    items, embedding = random_items(trees), torch.randn(32, 4)
    features = BranchFeatures(items, embedding, torch.device("cpu"))
    for item in items:
        read = features.read(item)
        assert read.shape == (len(item["tokens"]), 6 + 1 + 6 + 4)
        for row in range(0, len(read), 3):
            branch, at = [], row
            while at:
                branch.append(at)
                at = item["previous"][at]
            expected = [item["hidden"][row], torch.tensor([float(len(branch))])]
            expected += [item["hidden"][branch].sum(0), embedding[item["tokens"][branch]].sum(0)]
            torch.testing.assert_close(read[row], torch.cat(expected))
    together = torch.cat([features(item) for item in items])
    torch.testing.assert_close(together.mean(0), torch.zeros(17), rtol=0, atol=1e-4)
    torch.testing.assert_close(together.std(0), torch.ones(17), rtol=0.01, atol=0)


def test_sums_of_wide_models_are_projected(trees):
    items = random_items(trees, width=WIDEST_SUM + 1)
    features = BranchFeatures(items, torch.randn(32, 4), torch.device("cpu"))
    assert features(items[0]).shape[1] == WIDEST_SUM + 1 + 1 + WIDEST_SUM + 4
    again = BranchFeatures(items, features.embedding, torch.device("cpu"))
    torch.testing.assert_close(features(items[0]), again(items[0]), rtol=0, atol=0)


def test_a_reward_that_gathers_along_the_response_is_seen_by_the_baseline():
    """Rewards are sums of what each token is worth, of which the hidden states say nothing."""
    trees = grow(TreeConfig(max_completion_length=14, layers=3), end=0.15, count=40)
    worth, embedding = torch.linspace(-1, 1, 32), torch.eye(32)
    for tree in trees:
        tree.rewards["sum"] = np.full(len(tree.nodes), np.nan)
        for leaf in tree.leaves():
            tree.rewards["sum"][leaf] = worth[tree.response(leaf)].sum()
    items = random_items(trees)
    train, held_out = items[:30], items[30:]
    add_baseline(train, held_out, embedding, torch.device("cpu"))
    add_excess(train, 1.0)
    for part in (train, held_out):
        errors, spreads = 0.0, 0.0
        for item in part:
            ends = item["ends"]
            labels = item["labels"][ends]
            errors += np.square(item["baseline"][ends] - labels).sum(0)
            spreads += np.square(labels - labels.mean(0)).sum(0)
        assert (errors < 0.4 * spreads).all()
    for item in train:
        before = item["baseline"][item["previous"]]
        np.testing.assert_allclose(item["excess"] + before, item["labels"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("max_length", [1 << 20, 12])
def test_hidden_states_of_a_tree_are_those_of_each_response(trees, max_length):
    model = make_model()
    for tree in trees[:2]:
        read = read_tree(model, tree, 5, max_length, END)
        starts = row_starts(tree)
        for node in range(len(tree.nodes)):
            ids = torch.tensor([tree.nodes[0].tokens + tree.response(node)])
            with torch.no_grad():
                alone = model(ids, output_hidden_states=True)
            row = starts[node + 1] - 1
            hidden = alone.hidden_states[-1][0, -1]
            torch.testing.assert_close(read["hidden"][row], hidden, rtol=1e-4, atol=1e-4)
            top = alone.logits[0, -1].topk(5)
            assert read["candidates"][row].tolist() == top.indices.tolist()
            torch.testing.assert_close(
                read["log_probs"][row], top.values.log_softmax(-1), rtol=1e-4, atol=1e-4
            )


def test_efficiency_is_the_squared_gain_by_two_nats_of_weak_guidance():
    """A bandit of one token: gain and KL of the tilted policy, computed exactly."""
    rng = np.random.default_rng(0)
    log_probs = torch.log_softmax(torch.from_numpy(rng.normal(size=6)).float(), 0)
    reward = torch.from_numpy(rng.normal(size=(6, 1))).float()
    predicted = reward + torch.from_numpy(rng.normal(size=(6, 1))).float()
    probabilities = log_probs.exp()
    # A leaf for every token, which count as often as they are sampled.
    batch = {
        "tokens": torch.arange(-1, 6),
        "previous": torch.zeros(7, dtype=torch.int64),
        "depths": torch.tensor([0] + [1] * 6),
        "trees": torch.zeros(7, dtype=torch.int64),
        "reach": torch.cat((torch.ones(1), probabilities))[:, None],
        "labels": torch.cat(((probabilities[:, None] * reward).sum(0, keepdim=True), reward)),
        "candidates": torch.arange(6).expand(7, -1),
        "log_probs": log_probs.expand(7, -1),
    }
    values = batch["baseline"] = torch.zeros(7, 1)  # any baseline will do
    measured = efficiency(efficiency_sums(batch, values, predicted.expand(7, -1, -1)).numpy())[0]
    beta = 1e-3
    policy = torch.softmax(log_probs.double() + beta * predicted[:, 0].double(), 0)
    base = torch.softmax(log_probs.double(), 0)
    gain = ((policy - base) * reward[:, 0].double()).sum()
    kl = (policy * (policy / base).log()).sum()
    assert measured["kl_efficiency"]["value"] == pytest.approx(float(gain**2 / (2 * kl)), rel=1e-2)
    assert measured["scale"]["value"] == pytest.approx(float(gain * beta / (2 * kl)), rel=1e-2)


def goodness(completions, **kwargs):
    """More "good" than "bad", whatever the prompt."""
    return [float(text.count("good") - text.count("bad")) for text in map(text_of, completions)]


def badness(completions, **kwargs):
    return [-x for x in goodness(completions)]


FIELDS = {
    "head_type": "hidden",
    "top_k": 18,
    "learning_rate": None,
    "num_train_epochs": 6,
    "logging_steps": 1000,
}


@pytest.fixture(scope="module")
def trained(base_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    rewards = {"goodness": goodness, "badness": badness}
    made = trainer(base_model, folder, rewards, prompts(50), eval_dataset=prompts(30, 5), **FIELDS)
    made.train()
    made.save_model()
    return made, folder


def test_training_finds_which_tokens_raise_the_reward(trained, base_model):
    made, folder = trained
    saved = MAVISValueModel.load(str(folder))
    assert isinstance(saved, MAVISValueHeads)
    measured = saved.config.provenance["held_out"]
    for name in ("goodness", "badness"):
        assert measured[name]["kl_efficiency"]["low"] > 0
    assert all(scale > 0 for scale in saved.config.candidate_scale)
    assert "| goodness | 0." in (folder / "README.md").read_text()
    assert not list(folder.glob("*.bin"))
    logged = [x for x in made.state.log_history if "held_out/kl_efficiency/goodness" in x]
    assert len(logged) == 6
    # What is saved is the best epoch's.
    gains = [np.mean([np.sign(x[k]) * abs(x[k]) ** 0.5 for k in x if k in KEPT]) for x in logged]
    best = logged[int(np.argmax(gains))]
    kept = measured["goodness"]["kl_efficiency"]["value"]
    assert kept == pytest.approx(best["held_out/kl_efficiency/goodness"])


KEPT = ("held_out/kl_efficiency/goodness", "held_out/kl_efficiency/badness")


def test_trained_heads_guide(trained, base_model, tokenizer):
    _, folder = trained
    means = {}
    for name, weights in (("none", {}), ("good", {"goodness": 1.0}), ("bad", {"badness": 1.0})):
        texts = guided_texts(base_model, folder, tokenizer, weights)
        means[name] = np.mean(goodness(texts))
    assert means["good"] > means["none"] + 0.3
    assert means["bad"] < means["none"] - 0.3


def test_evaluate_gives_the_measures_of_the_saved_heads(trained):
    made, _ = trained
    metrics = made.evaluate()
    held_out = made.value_config.provenance["held_out"]["goodness"]
    assert metrics["eval_kl_efficiency/goodness"] == pytest.approx(
        held_out["kl_efficiency"]["value"], rel=1e-3
    )


def test_hidden_states_are_computed_once_and_again_if_they_do_not_fit(
    trained, base_model, tmp_path, caplog
):
    made, folder = trained
    rollouts = folder / "rollouts" / "train"
    files = sorted(rollouts.glob("*.hidden.safetensors"))
    before = [file.stat().st_mtime_ns for file in files]
    loads = []

    def cache(fingerprint="same", top_k=18):
        def load():
            loads.append(fingerprint)
            return AutoModelForCausalLM.from_pretrained(base_model)

        known = made.value_config.base_checkpoint_fingerprint
        cache_hidden_states(
            rollouts, load, known if fingerprint == "same" else fingerprint, top_k, 1024, END,
            Accelerator(cpu=True),
        )  # fmt: skip

    cache()
    assert not loads and before == [file.stat().st_mtime_ns for file in files]
    cache("another checkpoint")
    assert loads == ["another checkpoint"]
    one = cache_path(sorted(rollouts.glob("trees-*.parquet"))[0])
    one.unlink()
    cache("another checkpoint")  # only what is missing
    assert len(loads) == 2 and one.exists()
    one.write_bytes(one.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"are cut off or damaged .*; remove the file to compute"):
        cache("another checkpoint")
    one.unlink()
    cache()


def test_without_an_eval_dataset_some_prompts_are_held_out(base_model, tmp_path):
    made = trainer(base_model, tmp_path, {"goodness": goodness}, prompts(17), **FIELDS)
    made.collect_rollouts()
    assert (len(made.train_dataset), len(made.eval_dataset)) == (14, 3)
    held_out = {item["tree"] for item in made.eval_dataset}
    assert not held_out & {item["tree"] for item in made.train_dataset}


def test_two_processes_train_the_same_heads(base_model, tmp_path):
    program = tmp_path / "train.py"
    program.write_text(
        textwrap.dedent(
            f"""
            from safetensors.torch import save_file
            from tests.trainers.test_head_training import FIELDS, goodness
            from tests.trainers.test_mavis_trainer import prompts, trainer

            made = trainer({base_model!r}, {str(tmp_path / "two")!r}, {{"goodness": goodness}},
                           prompts(8), eval_dataset=prompts(5, 3), rollout_batch_size=3,
                           per_device_train_batch_size=2, **FIELDS | {{"num_train_epochs": 2}})
            assert made.accelerator.num_processes == 2
            made.train()
            made.save_model()
            weights = {{k: v.contiguous() for k, v in made.model.state_dict().items()}}
            rank = made.accelerator.process_index
            save_file(weights, {str(tmp_path)!r} + f"/rank-{{rank}}.safetensors")
            """
        )
    )
    in_two_processes(program)
    ranks = [load_file(tmp_path / f"rank-{i}.safetensors") for i in range(2)]
    torch.testing.assert_close(*ranks, rtol=0, atol=0)
    saved = MAVISValueModel.load(str(tmp_path / "two"))
    torch.testing.assert_close(saved.state_dict(), ranks[0])
    # Each process has computed some of the files, and measured some of the trees.
    assert len(list((tmp_path / "two" / "rollouts").rglob("trees-*.hidden.safetensors"))) == 5
    assert saved.config.candidate_scale != [0.0]


def test_a_resumed_training_keeps_the_best_epoch_of_all(base_model, tmp_path, monkeypatch):
    """The first epoch is the best, and lies before the checkpoint that is taken up."""

    measured = []

    def measure(self):
        epoch = round(self.trainer.state.epoch)
        measured.append(epoch)
        found = {"kl_efficiency": 1.0 / epoch, "scale": float(epoch), "explained_variance": 0.0}
        return {
            "goodness": {k: dict.fromkeys(("value", "low", "high"), v) for k, v in found.items()}
        }

    monkeypatch.setattr(HeadTraining, "measure", measure)
    fields = {**FIELDS, "num_train_epochs": 3, "save_strategy": "epoch"}

    def make(**more):
        return trainer(
            base_model, tmp_path, {"goodness": goodness}, prompts(8), eval_dataset=prompts(3, 3),
            **fields, **more,
        )  # fmt: skip

    whole = make()
    whole.train()
    assert whole.value_config.candidate_scale == [1.0]
    kept = {name: x.clone() for name, x in whole.model.state_dict().items()}
    folders = sorted(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    assert len(folders) == 3
    shutil.rmtree(folders[2])  # as if it had been stopped in the third epoch
    resumed = make(resume_from_checkpoint="true")  # as from a command line
    resumed.train()
    assert measured == [1, 2, 3, 2, 3]
    assert resumed.value_config.candidate_scale == [1.0]
    torch.testing.assert_close(resumed.model.state_dict(), kept)


@pytest.fixture(scope="module")
def iterated(base_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("iterated")
    rewards = {"goodness": goodness, "badness": badness}
    made = trainer(
        base_model, folder, rewards, prompts(60), eval_dataset=prompts(40, 5),
        **{**FIELDS, "num_iterations": 2, "beta": 2.0, "layers": 2, "num_train_epochs": 4},
    )  # fmt: skip
    made.train()
    made.save_model()
    return made, folder


def test_iterations_of_heads_improve_on_the_base_model(iterated):
    made, folder = iterated
    policies = json.loads((folder / "iterations.json").read_text())["policies"]
    assert len(policies) == 3
    for name in ("goodness", "badness"):
        for policy in policies[1:]:
            assert policy[name]["reward"]["low"] > policies[0][name]["reward"]["high"]
            assert policy[name]["kl"]["low"] > 0
        assert policies[1][name]["improvement"]["low"] > 0
    kept = made.value_config.provenance["iterations"]["kept"]
    of_kept = MAVISValueModel.load(str(folder / f"iteration-{kept}" / "value_model"))
    saved = MAVISValueModel.load(str(folder))
    torch.testing.assert_close(saved.state_dict(), of_kept.state_dict())
    assert saved.config.candidate_scale == of_kept.config.candidate_scale
    assert saved.config.provenance["held_out"] == of_kept.config.provenance["held_out"]


def test_what_a_policy_sampled_is_learnt_from_under_that_policy(iterated):
    """Its candidates have the policy's probabilities, token by token as it was sampled."""
    made, folder = iterated
    items = [x for x in made.train_dataset.items if np.isnan(x["labels"][0]).any()]
    assert len(made.train_dataset.items) == 60 + len(items) == 60 + 2 * 60
    for i, name in enumerate(("goodness", "badness")):
        rollouts = folder / "rollouts" / "iteration-1" / name / "train"
        of_base = HeadDataset([rollouts], [name], np.zeros(1), np.ones(1)).items
        own = items[60 * i : 60 * (i + 1)]
        for tree, item, base in zip(read_rollouts(rollouts)[:8], own, of_base):
            assert np.isnan(item["labels"][:, 1 - i]).all()
            assert not np.isnan(item["labels"][:, i]).any()
            assert np.isnan(np.asarray(item["excess"])[:, 1 - i]).all()
            ratios = [x for node in tree.nodes[1:] for x in node.log_ratios]
            previous = item["previous"][1:]
            hits = item["candidates"][previous] == torch.from_numpy(item["tokens"][1:])[:, None]
            assert hits.any(1).all()
            policy = item["log_probs"][previous][hits]
            ratio = policy - base["log_probs"][previous][hits]
            torch.testing.assert_close(ratio, torch.tensor(ratios), atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 0}, "`top_k` must be at least 1 with head_type='hidden'"),
        ({"gae_lambda": 1.5}, "`gae_lambda` must be within 0 and 1, got 1.5"),
        ({"num_hidden_layers": 2}, "`num_hidden_layers` is for head_type='state', got 2 with"),
        ({"num_hidden_layers": None}, "`num_hidden_layers` is for head_type='state', got None"),
        ({"leaf_fraction": 1.0}, "`leaf_fraction` is for head_type='state'"),
        ({"train_embeddings": True}, "leave it out, or set head_type='state'"),
        ({"merge_adapter": False}, "`merge_adapter` is for head_type='state', got False with"),
    ],
)
def test_arguments_that_heads_do_not_take_are_refused(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        MAVISConfig(str(tmp_path), head_type="hidden", use_cpu=True, **fields)


def test_what_came_before_training_leaves_no_trace_in_the_weights(base_model, tmp_path):
    """Engines and reward functions draw random numbers; stored rollouts need neither."""

    def careless(completions, **kwargs):
        torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
        return goodness(completions)

    def weights(name):
        fields = {**FIELDS, "rollout_dir": str(tmp_path / "rollouts"), "num_train_epochs": 2}
        made = trainer(base_model, tmp_path / name, {"goodness": careless}, prompts(9), **fields)
        made.train()
        return made.model.state_dict()

    torch.testing.assert_close(weights("sampled"), weights("stored"), rtol=0, atol=0)


def test_arguments_of_these_heads_are_refused_for_others(tmp_path):
    for name, value in (("gae_lambda", 0.9), ("action_rank", 8)):
        with pytest.raises(ValueError, match=f"`{name}` is for head_type='hidden', got {value}"):
            MAVISConfig(str(tmp_path), head_type="state", use_cpu=True, **{name: value})


def test_too_few_prompts_to_hold_any_out_are_refused_before_sampling(base_model, tmp_path):
    with pytest.raises(ValueError, match=r"`train_dataset` has 7 prompts.*at least 8"):
        trainer(base_model, tmp_path, data=prompts(7), **FIELDS)
    assert not list(tmp_path.rglob("trees-*"))
    trainer(base_model, tmp_path, data=prompts(7), eval_dataset=prompts(1), **FIELDS)


def test_a_value_model_of_another_kind_than_the_arguments_is_refused(base_model, tmp_path):
    model = MAVISValueModel.from_base_model(
        base_model, ["goodness", "badness"], num_hidden_layers=1
    )
    with pytest.raises(
        ValueError, match="`head_type` is 'hidden' and the value model's is 'state'"
    ):
        trainer(model, tmp_path, **FIELDS)


def test_defaults_depend_on_the_head(tmp_path):
    chosen = [
        (args.learning_rate, args.num_train_epochs)
        for args in (
            MAVISConfig(str(tmp_path), use_cpu=True),
            MAVISConfig(str(tmp_path), use_cpu=True, head_type="state"),
            MAVISConfig(str(tmp_path), use_cpu=True, learning_rate=5e-4),
        )
    ]
    assert chosen == [(1e-3, 3.0), (2e-4, 2.0), (5e-4, 3.0)]


@pytest.fixture(scope="module")
def extended(base_model, trained, tmp_path_factory):
    """The value model of `trained`, with redness added; and the trainer that added it."""
    _, folder = trained
    made = trainer(
        str(folder),
        tmp_path_factory.mktemp("extended"),
        {"redness": redness},
        prompts(60),
        **FIELDS,
        weight_decay=0.1,
    )
    made.train()
    made.save_model()
    return made, folder, made.args.output_dir


def test_objectives_that_are_there_stay_as_they_are(extended):
    _, folder, joined = extended
    before, after = (load_file(f"{x}/model.safetensors") for x in (folder, joined))
    config, rank = MAVISValueModel.load(str(joined)).config, 32
    assert config.objectives == ["goodness", "badness", "redness"]
    whole = ["hidden_mean", "hidden_std"]
    whole += [f"{x}.expand.{y}" for x in ("query", "action") for y in ("weight", "bias")]
    for name in whole:
        assert torch.equal(before.pop(name), after.pop(name)), name
    for name, there in before.items():
        axis = 0 if name.startswith("value.") else -1
        assert torch.equal(there, after[name].narrow(axis, 0, there.shape[axis])), name
        # One objective more, of which something was learnt
        added = after[name].narrow(
            axis, there.shape[axis], after[name].shape[axis] - there.shape[axis]
        )
        assert added.shape[axis] == (rank if name.startswith("query.") else 1), name
        assert added.any(), name
    old = MAVISValueModel.load(str(folder)).config
    for field in ("reward_mean", "reward_std", "candidate_scale"):
        assert getattr(config, field)[:2] == getattr(old, field), field
        assert len(getattr(config, field)) == 3
    assert config.provenance["held_out"].keys() == {"goodness", "badness", "redness"}
    assert config.provenance["added"][0]["objectives"] == ["redness"]
    assert config.provenance["rollouts"] == old.provenance["rollouts"]


def test_an_added_objective_guides_and_the_table_is_that_of_all(base_model, tokenizer, extended):
    made, _, folder = extended
    model = MAVISValueModel.load(str(folder))
    table = model.action_table.clone()
    embedding = made._training.embedding
    model.write_table(embedding)
    torch.testing.assert_close(model.action_table, table, rtol=0, atol=1e-3)
    plain, red = (
        share_of(base_model, folder, tokenizer, "red", weights) for weights in ({}, {"redness": 1})
    )
    assert red > plain + 0.2


def share_of(base_model, folder, tokenizer, word, weights):
    """Of responses that have a word."""
    texts = guided_texts(base_model, folder, tokenizer, weights)
    return np.mean([word in text for text in texts])


def test_an_interrupted_addition_goes_on(base_model, trained, tmp_path):
    _, folder = trained
    fields = {**FIELDS, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3}

    def adding(name, **more):
        rewards = {"redness": redness}
        return trainer(str(folder), tmp_path / name, rewards, prompts(16), **fields, **more)

    whole = adding("whole")
    adding("cut", callbacks=[StopAt(3)]).train()
    again = adding("cut")
    for made, resume in ((whole, None), (again, True)):
        made.train(resume_from_checkpoint=resume)
        made.save_model()
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("cut", "whole")]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


class StopAt(TrainerCallback):
    """Ends the training after some steps, as an interruption does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize(
    ("rewards", "fields", "message"),
    [
        (
            {"goodness": goodness, "redness": redness},
            {},
            r"has the objectives \['goodness', 'badne",
        ),
        ({"redness": redness}, {"top_k": 17}, "`top_k` is 17 and the value model's is 18"),
        ({"redness": redness}, {"num_iterations": 2}, "num_iterations=2 cannot add objectives"),
    ],
)
def test_objectives_that_cannot_be_added_are_named(trained, tmp_path, rewards, fields, message):
    _, folder = trained
    with pytest.raises(ValueError, match=message):
        trainer(str(folder), tmp_path, rewards, prompts(8), **{**FIELDS, **fields})


def test_a_state_head_takes_no_further_objectives(base_model, tmp_path):
    model = MAVISValueModel.from_base_model(base_model, ["goodness"], num_hidden_layers=1)
    with pytest.raises(ValueError, match="can be added with head_type='hidden' alone, got"):
        trainer(model, tmp_path, {"redness": redness})
