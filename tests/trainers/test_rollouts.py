import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from trimtab.trainers.rollouts import collect_rollouts, grow_trees, read_rollouts
from trimtab.trainers.samplers import Piece
from trimtab.trainers.trees import Node, Tree, TreeConfig

from .conftest import END, ROOT

PROMPTS = [f"a {word}" for word in "abcdefg"]


class CoinSampler:
    """Tokens 4 and up, each ending with probability `end`; depends on the seeds only."""

    def __init__(self, end=0.1, guided=False):
        self.end = end
        self.guided = guided
        self.calls = []

    def __call__(self, prefixes, lengths, seeds):
        self.calls.append(len(prefixes))
        pieces = []
        for length, seed in zip(lengths, seeds):
            rng = np.random.default_rng(seed)
            piece = rng.integers(4, 18, size=length).tolist()
            ends = np.flatnonzero(rng.random(length) < self.end)
            tokens = [*piece[: ends[0]], END] if len(ends) else piece
            kls = [rng.random() for _ in tokens] if self.guided else []
            pieces.append(Piece(tokens, [2 * kl for kl in kls], kls))
        return pieces


def grow(config, end=0.1, count=20, guided=False):
    prompts = [(i, [2, 4 + i % 10, 3]) for i in range(count)]
    return grow_trees(CoinSampler(end, guided), prompts, config, {END})


def reward(tokens):
    return float(sum(tokens))


def add_rewards(tree):
    tree.rewards["sum"] = np.full(len(tree.nodes), np.nan)
    for leaf in tree.leaves():
        tree.rewards["sum"][leaf] = reward(tree.response(leaf))


@pytest.mark.parametrize("end", [0.0, 0.1, 0.5])
def test_trees_have_the_configured_shape(end):
    config = TreeConfig(max_completion_length=24, layers=4, root_children=3, children=2)
    depths = set()
    for tree in grow(config, end):
        children = {i: [] for i in range(len(tree.nodes))}
        for i, node in enumerate(tree.nodes[1:], start=1):
            assert node.parent < i and node.layer == tree.nodes[node.parent].layer + 1
            assert node.tokens
            children[node.parent].append(i)
        assert len(children[0]) == 3
        for i, node in enumerate(tree.nodes):
            response = tree.response(i)
            assert END not in response[:-1], "nothing follows the end"
            assert node.leaf is (not children[i])
            if node.leaf:
                assert response[-1] == END or len(response) == 24
            elif i:
                assert len(children[i]) == 2
                depths.add(len(response))
            if node.layer == 1 and len(response) > 1:
                assert not node.leaf, "the root's children are never leaves"
    if end == 0.1:
        assert len(depths & set(range(1, 24))) > 15, "values are learnt at every depth"


def test_one_layer_is_plain_sampling():
    for tree in grow(TreeConfig(max_completion_length=8, layers=1, root_children=5)):
        assert len(tree.nodes) == 6 and all(node.leaf for node in tree.nodes[1:])


def expected_reward(tree, node, kl_penalty=0.0):
    """Of walking down from a node at random, child by child, by their weights, paying for KL."""
    if tree.nodes[node].leaf:
        return reward(tree.response(node))
    below = [i for i, child in enumerate(tree.nodes) if child.parent == node]
    weights = [tree.nodes[i].weight for i in below]
    returns = [expected_reward(tree, i, kl_penalty) for i in below]
    paid = [kl_penalty * sum(tree.nodes[i].kls) for i in below]
    return sum(w * (r - p) for w, r, p in zip(weights, returns, paid)) / sum(weights)


@pytest.mark.parametrize(("guided", "kl_penalty"), [(False, 0.0), (False, 0.5), (True, 0.5)])
def test_node_values_are_those_of_brute_force(guided, kl_penalty):
    trees = grow(TreeConfig(max_completion_length=16, layers=3), end=0.15, guided=guided)
    for tree in trees:
        add_rewards(tree)
        values, shares = tree.values("sum", kl_penalty), tree.shares()
        for i in range(len(tree.nodes)):
            assert values[i] == pytest.approx(expected_reward(tree, i, kl_penalty))
        assert values[0] == pytest.approx(tree.values("sum")[0] - kl_penalty * tree.kl())
        assert (tree.kl() > 0) is guided
        assert all(len(node.kls) == len(node.tokens) * guided for node in tree.nodes[1:])
        values = tree.values("sum")
        leaves = tree.leaves()
        assert shares[leaves].sum() == pytest.approx(1)
        assert values[0] == pytest.approx(sum(shares[i] * tree.rewards["sum"][i] for i in leaves))


def walks(tree, node, kl_penalty):
    """Probability, return and leaf of every way down from a node."""
    if tree.nodes[node].leaf:
        return [(1.0, 0.0, node)]
    below = [i for i, child in enumerate(tree.nodes) if child.parent == node]
    total = sum(tree.nodes[i].weight for i in below)
    return [
        (probability * tree.nodes[i].weight / total, paid - kl_penalty * sum(tree.nodes[i].kls), j)
        for i in below
        for probability, paid, j in walks(tree, i, kl_penalty)
    ]


@pytest.mark.parametrize("kl_penalty", [0.0, 0.5])
def test_values_are_means_over_the_responses_that_have_a_reward(kl_penalty):
    rng = np.random.default_rng(0)
    unknown = 0
    for tree in grow(TreeConfig(max_completion_length=16, layers=3), end=0.15, guided=True):
        add_rewards(tree)
        masked = tree.rewards["sum"]
        masked[rng.random(len(masked)) < rng.choice([0.2, 0.8, 1.0])] = np.nan
        values, known = tree.values("sum", kl_penalty), tree.known("sum")
        for i in range(len(tree.nodes)):
            ways = [w for w in walks(tree, i, kl_penalty) if w[0] and not np.isnan(masked[w[2]])]
            mass = sum(p for p, _, _ in ways)
            assert known[i] == pytest.approx(mass)
            if ways:
                expected = sum(p * (masked[leaf] + paid) for p, paid, leaf in ways) / mass
                assert values[i] == pytest.approx(expected)
            else:
                unknown += 1
                assert np.isnan(values[i])
    assert unknown > 100


def test_root_value_is_unbiased_though_early_ends_are_split():
    """The mean length of a response that ends with probability p at each of at most n tokens."""
    p, n = 0.2, 8
    config = TreeConfig(max_completion_length=n, layers=2, root_children=4, children=2)
    trees = grow(config, end=p, count=4000)
    roots = []
    for tree in trees:
        tree.rewards["length"] = np.array([len(tree.response(i)) for i in range(len(tree.nodes))])
        roots.append(tree.values("length")[0])
    expected = sum((1 - p) ** t for t in range(n))
    error = np.std(roots) / np.sqrt(len(roots))
    assert np.mean(roots) == pytest.approx(expected, abs=4 * error)
    # Had the second samples counted, the bias would show.
    naive = np.mean([np.mean([len(t.response(i)) for i in t.leaves()]) for t in trees])
    assert abs(naive - expected) > 8 * error


def test_tree_does_not_depend_on_its_batch():
    config = TreeConfig(max_completion_length=16, layers=3)
    together = grow(config, count=4)
    alone = grow_trees(CoinSampler(), [(2, [2, 6, 3])], config, {END})[0]
    assert alone.nodes == together[2].nodes


def test_seed_changes_the_trees():
    first, second = (grow(TreeConfig(16, 3, seed=seed), count=2) for seed in (1, 2))
    assert first[0].nodes != second[0].nodes


def test_each_layer_is_one_call():
    sampler = CoinSampler(0.0)
    prompts = [(i, [2, 4, 3]) for i in range(3)]
    grow_trees(sampler, prompts, TreeConfig(32, 3, root_children=4, children=2), {END})
    assert sampler.calls == [12, 24, 48]


def collect(folder, tokenizer, sampler, funcs=None, config=None, prompts=PROMPTS, **kwargs):
    trees = collect_rollouts(
        folder,
        prompts=prompts,
        columns={"number": list(range(len(prompts)))},
        tokenizer=tokenizer,
        prompt_ids=[tokenizer(prompt)["input_ids"] for prompt in prompts],
        reward_funcs=funcs or {"length": length},
        config=config or TreeConfig(max_completion_length=12, layers=2),
        eos_token_ids={END},
        make_sampler=lambda: sampler,
        identity={"base_model": "tiny"},
        batch_size=2,
        **kwargs,
    )
    return list(trees)


def length(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def number(number, **kwargs):
    return [float(n) for n in number]


def same(trees, others):
    assert len(trees) == len(others)
    for tree, other in zip(trees, others):
        assert tree.prompt_index == other.prompt_index and tree.nodes == other.nodes
        assert tree.rewards.keys() == other.rewards.keys()
        for name in tree.rewards:
            np.testing.assert_array_equal(tree.rewards[name], other.rewards[name])


def test_rollouts_are_read_back_as_they_were_collected(tmp_path, tokenizer):
    trees = collect(tmp_path, tokenizer, CoinSampler(), {"length": length, "number": number})
    assert [tree.prompt_index for tree in trees] == list(range(len(PROMPTS)))
    assert trees[3].rewards["number"][trees[3].leaves()].tolist() == [3.0] * len(trees[3].leaves())
    same(read_rollouts(tmp_path), trees)
    idle = CoinSampler()
    same(collect(tmp_path, tokenizer, idle, {"length": length, "number": number}), trees)
    assert idle.calls == []


def test_log_ratios_are_read_back_as_they_were_sampled(tmp_path, tokenizer):
    trees = collect(tmp_path, tokenizer, CoinSampler(guided=True))
    for tree, other in zip(read_rollouts(tmp_path), trees):
        for node, same_node in zip(tree.nodes, other.nodes):
            assert node.tokens == same_node.tokens
            assert node.kls == pytest.approx(same_node.kls)  # float32 on disk
            assert node.log_ratios == pytest.approx(same_node.log_ratios)


def test_processes_share_the_batches(tmp_path, tokenizer):
    alone = collect(tmp_path / "alone", tokenizer, CoinSampler())
    parts = [
        collect(tmp_path / "shared", tokenizer, CoinSampler(), process_index=i, num_processes=3)
        for i in range(3)
    ]
    assert [[tree.prompt_index for tree in part] for part in parts] == [[0, 1, 6], [2, 3], [4, 5]]
    same(read_rollouts(tmp_path / "shared"), alone)


def test_failing_reward_keeps_the_rollouts(tmp_path, tokenizer):
    def broken(prompts, **kwargs):
        if PROMPTS[4] in prompts:
            raise RuntimeError("down")
        return [0.0] * len(prompts)

    sampler = CoinSampler()
    with pytest.raises(RuntimeError, match=r"'length' raised RuntimeError: down.*'a e'"):
        collect(tmp_path, tokenizer, sampler, {"length": broken})
    kept = list(read_rollouts(tmp_path))
    assert [tree.prompt_index for tree in kept] == [0, 1, 2, 3, 4, 5]
    assert "length" not in kept[4].rewards

    again = CoinSampler()
    trees = collect(tmp_path, tokenizer, again)
    assert again.calls[0] == 4, "only the last batch, of one prompt, was sampled"
    assert [tree.nodes for tree in trees[:6]] == [tree.nodes for tree in kept]


def test_new_objective_is_computed_on_stored_rollouts(tmp_path, tokenizer):
    first = collect(tmp_path, tokenizer, CoinSampler())
    idle = CoinSampler()
    trees = collect(tmp_path, tokenizer, idle, {"length": length, "number": number})
    assert idle.calls == [] and trees[5].nodes == first[5].nodes
    assert np.nanmax(trees[5].rewards["number"]) == 5.0


def test_changed_reward_function_scores_the_stored_rollouts_again(tmp_path, tokenizer):
    first = collect(tmp_path, tokenizer, CoinSampler())
    idle = CoinSampler()
    trees = collect(tmp_path, tokenizer, idle, {"length": number})
    assert idle.calls == [] and trees[5].nodes == first[5].nodes
    assert np.nanmax(trees[5].rewards["length"]) == 5.0 != np.nanmax(first[5].rewards["length"])
    same(read_rollouts(tmp_path), trees)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"config": TreeConfig(max_completion_length=13, layers=2)},
            "max_completion_length was 12",
        ),
        (
            {"config": TreeConfig(max_completion_length=12, layers=2, seed=1)},
            "seed was 42 and is 1",
        ),
        (
            {"config": TreeConfig(max_completion_length=12, layers=2, top_p=0.5)},
            "top_p was None and is 0.5",
        ),
        ({"prompts": ["a z", *PROMPTS[1:]]}, "prompts was"),
    ],
)
def test_folder_of_other_settings_is_refused(tmp_path, tokenizer, change, named):
    collect(tmp_path, tokenizer, CoinSampler())
    with pytest.raises(ValueError, match=f"made with other settings: .*{named}"):
        collect(tmp_path, tokenizer, CoinSampler(), **change)


def test_rollouts_without_their_settings_are_refused(tmp_path, tokenizer):
    collect(tmp_path, tokenizer, CoinSampler())
    (tmp_path / "rollouts.json").unlink()
    with pytest.raises(ValueError, match=r"without their rollouts\.json"):
        collect(tmp_path, tokenizer, CoinSampler())


def test_killed_collection_resumes_without_duplicate_or_loss(tmp_path, tokenizer):
    script = textwrap.dedent(
        f"""
        import time
        from tests.trainers.conftest import make_tokenizer
        from tests.trainers.test_rollouts import CoinSampler, collect
        class Slow(CoinSampler):
            def __call__(self, *args):
                time.sleep(0.3)
                return super().__call__(*args)
        collect({str(tmp_path / "killed")!r}, make_tokenizer(), Slow())
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "trees-00001.parquet").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = read_rollouts(tmp_path / "killed")
    assert 4 <= len(left) < len(PROMPTS)
    sampler = CoinSampler()
    resumed = collect(tmp_path / "killed", tokenizer, sampler)
    assert sum(sampler.calls[::2]) == 4 * (len(PROMPTS) - len(left)), "only the rest is sampled"
    same(resumed, collect(tmp_path / "whole", tokenizer, CoinSampler()))
    same(read_rollouts(tmp_path / "killed"), resumed)


def test_response_joins_the_pieces_of_a_path():
    nodes = [Node(-1, 0, [1, 2]), Node(0, 1, [5]), Node(1, 2, [6, 7]), Node(1, 2, [8], leaf=True)]
    tree = Tree(0, nodes)
    assert tree.path(2) == [1, 2] and tree.response(2) == [5, 6, 7] and tree.response(0) == []


def test_only_batches_whose_columns_changed_are_scored_again(tmp_path, tokenizer):
    scored = []

    def numbered(number, **kwargs):
        scored.extend(number)
        return [float(n) for n in number]

    numbered.version = "1"  # it keeps what it has seen
    arguments = {
        "prompts": PROMPTS, "tokenizer": tokenizer, "eos_token_ids": {END}, "batch_size": 2,
        "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in PROMPTS],
        "config": TreeConfig(max_completion_length=12, layers=2), "make_sampler": CoinSampler,
        "identity": {}, "reward_funcs": {"number": numbered},
    }  # fmt: skip
    columns = {"number": list(range(len(PROMPTS))), "unread": ["x"] * len(PROMPTS)}
    collect_rollouts(tmp_path, columns=columns, **arguments)
    scored.clear()
    columns["unread"][0] = "y"
    collect_rollouts(tmp_path, columns=columns, **arguments)
    assert scored == []
    columns["number"][3] = 33
    trees = collect_rollouts(tmp_path, columns=columns, **arguments)
    assert set(scored) == {2, 33}
    assert np.nanmax(trees[3].rewards["number"]) == 33


def test_rewards_of_unknown_identity_are_computed_again(tmp_path, tokenizer):
    lock, calls = threading.Lock(), []

    def guarded(completions, **kwargs):
        with lock:
            calls.append(len(completions))
            return [0.0] * len(completions)

    for _ in range(2):
        collect(tmp_path, tokenizer, CoinSampler(), {"length": guarded})
    assert len(calls) == 8, "four batches, twice"


def test_batch_that_cannot_be_read_is_sampled_again(tmp_path, tokenizer):
    trees = collect(tmp_path, tokenizer, CoinSampler())
    path = tmp_path / "trees-00001.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    same(collect(tmp_path, tokenizer, CoinSampler()), trees)
    same(read_rollouts(tmp_path), trees)
