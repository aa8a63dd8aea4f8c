"""Candidates along trees, and what responses bear out of their advantages, against plain
computations over every branch alone and a known world."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from trimtab.plugins.value_model import MAVISValueModel
from trimtab.trainers.candidates import (
    PART_POSITIONS,
    add_candidates,
    advantage_slopes,
    candidate_differences,
    read_candidates,
)
from trimtab.trainers.packing import DataCollatorForTrees, TreeDataset
from trimtab.trainers.trees import TreeConfig

from .conftest import END, make_model, make_tokenizer
from .test_mavis_trainer import prompts, trainer
from .test_rollouts import grow

K = 6


def value_model(base_model, objectives, seed=1):
    model = MAVISValueModel.from_base_model(
        base_model, objectives, num_hidden_layers=2, tokenizer=make_tokenizer()
    )
    torch.manual_seed(seed)
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def branches(sequence):
    """Every position of a packed tree with the tokens of its prefix."""
    for end in range(len(sequence["input_ids"])):
        index, prefix = end, []
        while True:
            prefix.append(int(sequence["input_ids"][index]))
            if sequence["position_ids"][index] == 0:
                break
            index = sequence["previous"][index]
        yield end, prefix[::-1]


def plain(model, prefix, candidates):
    """Values of the prefix and of its candidates, without a tree."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prefix, a] for a in candidates])).logits
    return logits[0, -2], logits[:, -1]


def candidates_of(sequence):
    """Every prefix with candidates: its tokens, its candidates and their log-probabilities."""
    prefixes = dict(branches(sequence))
    for i, position in enumerate(sequence["candidate_positions"]):
        log_probs = torch.from_numpy(sequence["candidate_log_probs"][i])
        yield prefixes[position], sequence["candidates"][i].tolist(), log_probs


def with_candidates(trees, max_length=1000, positions=None):
    for tree in trees:
        for i, name in enumerate("ab"):
            rng = np.random.default_rng([tree.prompt_index, i])
            leaf = np.array([node.leaf for node in tree.nodes])
            tree.rewards[name] = np.where(leaf, rng.normal(size=len(leaf)), np.nan)
    dataset = TreeDataset(trees, ["a", "b"], np.zeros(2), np.ones(2), max_length)
    collate = DataCollatorForTrees(END)
    sequences = dataset.sequences
    accelerator = Accelerator(cpu=True)
    add_candidates(sequences, make_model(), collate, K, positions, {END}, accelerator)
    return sequences, collate


def some_trees():
    return grow(TreeConfig(max_completion_length=14, layers=3), end=0.1, count=12)


def test_candidates_are_the_base_models_after_every_prefix():
    sequences, _ = with_candidates(some_trees())
    base = make_model()
    for sequence in sequences[:4]:
        for prefix, candidates, log_probs in candidates_of(sequence):
            top, expected = base(torch.tensor([prefix])).logits[0, -1].topk(K)
            assert candidates == expected.tolist()
            torch.testing.assert_close(log_probs, top.log_softmax(-1), atol=1e-4, rtol=1e-4)
        # The prompts have 3 tokens; nothing follows the end.
        expected = [e for e, p in branches(sequence) if len(p) >= 3 and p[-1] != END]
        assert sequence["candidate_positions"].tolist() == expected


def test_some_prefixes_are_drawn_and_the_same_again():
    drawn = [
        [s["candidate_positions"].tolist() for s in with_candidates(some_trees(), positions=5)[0]]
        for _ in range(2)
    ]
    assert drawn[0] == drawn[1] and {len(set(d)) for d in drawn[0]} == {5}
    assert len(set(map(tuple, drawn[0]))) > 6


def test_differences_are_the_largest_between_candidates_of_a_prefix(base_model):
    model = value_model(base_model, ["a", "b"])
    sequences, collate = with_candidates(some_trees())
    expected = []
    for sequence in sequences:
        for prefix, candidates, _ in candidates_of(sequence):
            values = plain(model, prefix, candidates)[1]
            expected.append(values.amax(0) - values.amin(0))
    found = candidate_differences(model, sequences, collate)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_slopes_are_those_of_a_plain_computation(base_model, temperature):
    model = value_model(base_model, ["a", "b"])
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
    add_candidates(sequences, make_model(), collate, K, None, {END}, accelerator)
    rng = np.random.default_rng(0)
    for sequence in sequences:
        with torch.inference_mode():
            predicted = read_candidates(model, collate([sequence]))
        of_prefix, of_candidates = (
            x[0].numpy() for x in (predicted.logits, predicted.candidate_logits)
        )
        labels = np.full_like(sequence["labels"], np.nan)
        rows = zip(sequence["candidate_positions"], sequence["candidates"])
        at = {position: i for i, (position, _) in enumerate(rows)}
        for token in np.flatnonzero(sequence["depths"]):
            before = sequence["previous"][token]
            (hit,) = np.flatnonzero(
                sequence["candidates"][at[before]] == sequence["input_ids"][token]
            )
            values = of_candidates[at[before]]
            weights = np.exp(sequence["candidate_log_probs"][at[before]])[:, None]
            advantage = values[hit] - (weights * values).sum(0)
            excess = np.array([0.25, -0.5]) * advantage + rng.normal(scale=0.5, size=2)
            labels[token] = of_prefix[before] + excess
        sequence["labels"] = labels
    for slope, true in zip(advantage_slopes(model, sequences, collate), (0.25, -0.5)):
        assert slope["low"] < true < slope["high"]
        assert slope["high"] - slope["low"] < 0.2
    torch.nn.init.zeros_(model.head.weight)  # says nothing of any candidate
    (slope, _) = advantage_slopes(model, sequences, collate)
    assert slope == {"value": 0.0, "low": 0.0, "high": 0.0}
