"""What responses bear out of advantages, against a plain computation and a known world."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from trimtab.trainers.candidates import PART_POSITIONS, add_candidates, advantage_slopes
from trimtab.trainers.packing import DataCollatorForTrees, TreeDataset
from trimtab.trainers.rollouts import TreeConfig

from .conftest import END, make_model
from .test_distillation import branches, candidates_of, plain, value_model
from .test_mavis_trainer import prompts, trainer
from .test_rollouts import grow

K = 6


def with_candidates(trees, max_length=1000):
    for tree in trees:
        for i, name in enumerate("ab"):
            rng = np.random.default_rng([tree.prompt_index, i])
            leaf = np.array([node.leaf for node in tree.nodes])
            tree.rewards[name] = np.where(leaf, rng.normal(size=len(leaf)), np.nan)
    dataset = TreeDataset(trees, ["a", "b"], np.zeros(2), np.ones(2), max_length)
    collate = DataCollatorForTrees(END)
    sequences = dataset.sequences
    add_candidates(sequences, make_model(), [], collate, K, None, {END}, Accelerator(cpu=True))
    return sequences, collate


@pytest.mark.parametrize(("head_type", "temperature"), [("state", 1.0), ("action", 0.7)])
def test_slopes_are_those_of_a_plain_computation(base_model, head_type, temperature):
    model = value_model(base_model, ["a", "b"], head_type=head_type)
    trees = grow(TreeConfig(max_completion_length=30, layers=3), end=0.1, count=6)
    sequences, collate = with_candidates(trees, max_length=80)
    assert len(sequences) > len(trees)  # some trees are cut in two
    assert max(len(s["candidate_positions"]) for s in sequences) > PART_POSITIONS
    found = advantage_slopes(model, sequences, collate, temperature)
    sums = np.zeros((2, 2))
    for sequence in sequences:
        texts = dict(branches(sequence))
        of_prefix = {tuple(prefix): (c, p) for prefix, c, p in candidates_of(sequence)}
        for token, text in texts.items():
            label = sequence["labels"][token]
            if not sequence["depths"][token] or np.isnan(label).all():
                continue
            candidates, log_probs = of_prefix[tuple(text[:-1])]
            if text[-1] not in candidates:
                continue
            value, values = plain(model, text[:-1], candidates)
            weights = (log_probs / temperature).softmax(0)[:, None]
            advantages = values - (weights * values).sum(0)
            advantage = advantages[candidates.index(text[-1])].numpy()
            sums[0] += advantage * (label - value.numpy())
            sums[1] += (weights * advantages**2).sum(0).numpy()
    for slope, expected in zip(found, temperature * sums[0] / sums[1]):
        assert slope["value"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert slope["low"] < slope["value"] < slope["high"]


def test_slopes_find_by_how_much_advantages_are_exaggerated(base_model, tmp_path):
    """Returns that are the predicted advantages, times a number for each objective, plus noise."""
    made = trainer(base_model, tmp_path, data=prompts(60), top_k=K, layers=2)
    made.collect_rollouts()
    model = value_model(base_model, ["a", "b"])
    sequences, collate = made.train_dataset.sequences, made.data_collator
    accelerator = Accelerator(cpu=True)
    add_candidates(sequences, make_model(), [model], collate, K, None, {END}, accelerator)
    rng = np.random.default_rng(0)
    for sequence in sequences:
        labels = np.full_like(sequence["labels"], np.nan)
        rows = zip(sequence["candidate_positions"], sequence["candidates"])
        at = {position: i for i, (position, _) in enumerate(rows)}
        for token in np.flatnonzero(sequence["depths"]):
            before = sequence["previous"][token]
            (hit,) = np.flatnonzero(
                sequence["candidates"][at[before]] == sequence["input_ids"][token]
            )
            values = sequence["teacher_candidate_values"][at[before]]
            weights = np.exp(sequence["candidate_log_probs"][at[before]])[:, None]
            advantage = values[hit] - (weights * values).sum(0)
            excess = np.array([0.25, -0.5]) * advantage + rng.normal(scale=0.5, size=2)
            labels[token] = sequence["teacher_values"][before] + excess
        sequence["labels"] = labels
    for slope, true in zip(advantage_slopes(model, sequences, collate), (0.25, -0.5)):
        assert slope["low"] < true < slope["high"]
        assert slope["high"] - slope["low"] < 0.2
    torch.nn.init.zeros_(model.head.weight)  # says nothing of any candidate
    (slope, _) = advantage_slopes(model, sequences, collate)
    assert slope == {"value": 0.0, "low": 0.0, "high": 0.0}
