import numpy as np
import pytest
import torch

from trimtab.plugins.value_model import MAVISValueModel
from trimtab.trainers.packing import DataCollatorForTrees, TreeDataset, keep_leaves, pack_tree
from trimtab.trainers.trees import TreeConfig

from .conftest import END, make_model
from .test_rollouts import add_rewards, grow


@pytest.fixture(scope="module")
def trees():
    trees = grow(TreeConfig(max_completion_length=14, layers=3), end=0.15, count=6)
    for tree in trees:
        add_rewards(tree)
    return trees


@pytest.fixture(scope="module")
def value_model():
    model = MAVISValueModel.from_base_model(make_model(), ["sum"], num_hidden_layers=2)
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


@pytest.fixture(scope="module")
def guided():
    """Trees of a policy other than the base model."""
    trees = grow(TreeConfig(max_completion_length=14, layers=3), end=0.15, count=6, guided=True)
    for tree in trees:
        add_rewards(tree)
    return trees


def two_objectives(tree, kl_penalty=0.0):
    values = tree.values("sum", kl_penalty)
    return np.stack([values, -2 * values], axis=-1)


def naive(tree, kept):
    """Label of every prefix of a kept response, from all the leaves below it."""
    labels = {}
    for i in kept:
        for _ in tree.nodes[i].tokens:
            prefix = tuple(tree.nodes[0].tokens + tree.response(i))
        start = len(prefix) - len(tree.nodes[i].tokens) if i else len(prefix) - 1
        for stop in range(start + 1, len(prefix) + 1):
            # Siblings may share a first token: a prefix may have several labels.
            labels.setdefault(prefix[:stop], []).append(tree.values("sum")[i])
    return labels


@pytest.mark.parametrize("max_length", [1, 40, 1000])
def test_every_prefix_has_the_value_of_its_node_once(trees, max_length):
    for tree in trees:
        found = {}
        pairs = 0
        for sequence in pack_tree(tree, two_objectives(tree), max_length):
            ids, segments, parents = (sequence[k] for k in ("input_ids", "segments", "parents"))
            for end in range(len(ids)):
                branch = set()
                segment = segments[end]
                while segment >= 0:
                    branch.add(segment)
                    segment = parents[segment]
                inside = [i for i in range(end + 1) if segments[i] in branch]
                prefix = tuple(ids[i] for i in inside)
                assert sequence["previous"][end] == (inside[-2] if len(inside) > 1 else 0)
                assert sequence["position_ids"][end] == len(prefix) - 1
                assert sequence["depths"][end] == max(0, len(prefix) - len(tree.nodes[0].tokens))
                label = sequence["labels"][end]
                if not np.isnan(label[0]):
                    assert label[1] == pytest.approx(-2 * label[0])
                    found.setdefault(prefix, []).append(label[0])
            pairs += len(sequence["siblings"])
        expected = naive(tree, range(len(tree.nodes)))
        assert found.keys() == expected.keys()
        for prefix in expected:
            np.testing.assert_allclose(sorted(found[prefix]), sorted(expected[prefix]), rtol=1e-6)
        if max_length == 1000:
            families = np.bincount([node.parent for node in tree.nodes[1:]])
            assert pairs == sum(n * (n - 1) // 2 for n in families)


def test_tokens_pay_for_the_kl_after_them(guided):
    """A token's label is the mean return of the responses that go on from it."""
    for tree in guided:
        total = tree.total_weights()
        returns = {}  # of the tokens of a node, by brute force over the leaves below it
        for leaf in tree.leaves():
            path = tree.path(leaf)
            kls = [kl for i in path for kl in tree.nodes[i].kls]
            for depth, node in enumerate(path):
                below = path[depth + 1 :]
                share = np.prod([tree.nodes[i].weight / total[tree.nodes[i].parent] for i in below])
                first = sum(len(tree.nodes[i].tokens) for i in path[:depth])
                for token in range(len(tree.nodes[node].tokens)):
                    paid = 0.5 * sum(kls[first + token + 1 :])
                    sums = returns.setdefault((node, token), [])
                    sums.append(share * (tree.rewards["sum"][leaf] - paid))
        (sequence,) = pack_tree(tree, tree.values("sum", 0.5)[:, None], 1000, kl_penalty=0.5)
        labels = sequence["labels"][:, 0]
        nodes = [
            0,
            *dict.fromkeys(i for leaf in sorted(map(tree.path, tree.leaves())) for i in leaf),
        ]
        seen = 0
        for end, segment in enumerate(sequence["segments"]):
            if segment == 0:
                continue
            token = end - np.flatnonzero(sequence["segments"] == segment)[0]
            assert labels[end] == pytest.approx(sum(returns[nodes[segment], token]), rel=1e-5)
            seen += 1
        assert seen == len(returns)


def test_unknown_objectives_have_no_label(trees):
    dataset = TreeDataset(trees, ["other", "sum"], np.zeros(2), np.ones(2), 1000)
    for sequence in dataset.sequences:
        assert np.isnan(sequence["labels"][:, 0]).all()
        assert not np.isnan(sequence["labels"][sequence["depths"] > 0, 1]).any()
        assert np.isnan(sequence["sibling_labels"][..., 0]).all()


@pytest.mark.parametrize("max_length", [40, 1000])
@pytest.mark.parametrize("kl_penalty", [0.0, 0.5])
def test_siblings_are_compared_at_their_first_and_last_tokens(guided, max_length, kl_penalty):
    for tree in guided:
        values = two_objectives(tree, kl_penalty)
        for sequence in pack_tree(tree, values, max_length, kl_penalty=kl_penalty):
            segments, parents = sequence["segments"], sequence["parents"]
            for (a, b, last_a, last_b), label in zip(
                sequence["siblings"], sequence["sibling_labels"]
            ):
                for first, last in ((a, last_a), (b, last_b)):
                    rows = np.flatnonzero(segments == segments[first])
                    assert (rows[0], rows[-1]) == (first, last)
                assert parents[segments[a]] == parents[segments[b]] and a != b
                known = sequence["labels"]
                if not np.isnan(known[[a, b]]).any():
                    expected = [known[a] - known[b], known[last_a] - known[last_b]]
                    np.testing.assert_allclose(label, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("max_length", [1, 40, 1000])
def test_packed_values_are_those_of_the_responses_alone(trees, value_model, max_length, additive):
    value_model.set_attn_implementation("eager" if additive else "sdpa")
    sequences = [s for tree in trees for s in pack_tree(tree, two_objectives(tree), max_length)]
    batch = DataCollatorForTrees(END, additive_mask=additive)(sequences)
    with torch.inference_mode():
        packed = value_model(
            batch["input_ids"], batch["attention_mask"], batch["position_ids"]
        ).logits
        for i, sequence in enumerate(sequences):
            for end in range(len(sequence["input_ids"])):
                seen = (
                    batch["attention_mask"][i, 0, end] >= 0
                    if additive
                    else (batch["attention_mask"][i, 0, end])
                )
                alone = value_model(batch["input_ids"][i, seen][None]).logits[0, -1]
                torch.testing.assert_close(packed[i, end], alone, atol=1e-5, rtol=1e-4)


def test_end_tokens_are_labelled_and_padding_is_not(trees):
    sequences = [s for tree in trees for s in pack_tree(tree, two_objectives(tree), 1000)]
    batch = DataCollatorForTrees(pad_token_id=END)(sequences)
    ends = sum(tree.response(i)[-1] == END for tree in trees for i in tree.leaves())
    known = ~batch["labels"][..., 0].isnan()
    assert (known & (batch["input_ids"] == END)).sum() == ends > 0
    for i, sequence in enumerate(sequences):
        assert not known[i, len(sequence["input_ids"]) :].any()


def test_collated_siblings_point_into_the_flattened_batch(trees):
    sequences = [s for tree in trees for s in pack_tree(tree, two_objectives(tree), 1000)]
    batch = DataCollatorForTrees(END)(sequences)
    flat = batch["labels"].flatten(0, 1)
    for place in (0, 2):
        a, b = batch["siblings"][:, place], batch["siblings"][:, place + 1]
        torch.testing.assert_close(flat[a] - flat[b], batch["sibling_labels"][:, 1])


def test_only_the_bottom_layer_is_thinned(trees):
    kept = [keep_leaves(tree, 0.5, seed=1) for tree in trees]
    bottom = [[i for i, node in enumerate(tree.nodes) if node.layer == 3] for tree in trees]
    for tree, keep, leaves in zip(trees, kept, bottom):
        assert set(range(len(tree.nodes))) - keep <= set(leaves)
    share = sum(len(k & set(b)) for k, b in zip(kept, bottom)) / sum(map(len, bottom))
    assert 0.25 < share < 0.75
    assert kept == [keep_leaves(tree, 0.5, seed=1) for tree in trees]
    dataset = TreeDataset(trees, ["sum"], np.array([0.0]), np.array([1.0]), 1000, 0.0)
    for tree, sequence in zip(trees, dataset):
        above = [i for i in range(len(tree.nodes)) if tree.nodes[i].layer < 3]
        expected = naive(tree, above)
        labels = sequence["labels"][:, 0]
        # The values above the bottom layer still count all its leaves.
        assert sorted(labels[~np.isnan(labels)]) == pytest.approx(
            sorted(value for values in expected.values() for value in values)
        )


def test_labels_are_standardised(trees):
    raw = TreeDataset(trees, ["sum"], np.array([0.0]), np.array([1.0]), 1000)
    scaled = TreeDataset(trees, ["sum"], np.array([10.0]), np.array([4.0]), 1000)
    for a, b in zip(raw, scaled):
        np.testing.assert_allclose((a["labels"] - 10) / 4, b["labels"], rtol=1e-5)
        np.testing.assert_allclose(a["sibling_labels"] / 4, b["sibling_labels"], rtol=1e-5)
