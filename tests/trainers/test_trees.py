import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.trainers import read_rollouts, trees
from trimtab.trainers.trees import Node, StoredTrees, Tree, read_trees, write_trees


def tree(number, names=("a",), guided=False):
    """A tree with some branches, of numbers that its own says."""
    drawn = random.Random(number)
    nodes = [Node(-1, 0, [number, 1])]
    for i in range(1, drawn.randint(2, 6)):
        tokens = [drawn.randrange(1 << 31) for _ in range(drawn.randint(1, 3))]
        told = [drawn.random() for _ in tokens] if guided else []
        told = np.float32(told).tolist()
        nodes.append(Node(drawn.randrange(i), i, tokens, drawn.random(), i > 1, told, told[::-1]))
    rewards = {n: np.array([np.nan, *(drawn.gauss(0, 1) for _ in nodes[1:])]) for n in names}
    return Tree(number, nodes, rewards)


def same(some, others):
    assert len(some) == len(others)
    for one, other in zip(some, others):
        assert one.prompt_index == other.prompt_index and one.nodes == other.nodes
        np.testing.assert_equal(one.rewards, other.rewards)


def store(folder, counts, **kwargs):
    """Files of so many trees each; the trees and the files."""
    folder.mkdir(parents=True, exist_ok=True)
    made, paths = [], []
    for number, count in enumerate(counts):
        batch = [tree(len(made) + i, **kwargs) for i in range(count)]
        paths.append(folder / f"trees-{number:05d}.parquet")
        write_trees(paths[-1], batch, {"a": f"by {number}"})
        made += batch
    return made, paths


@pytest.mark.parametrize("guided", [False, True])
def test_a_file_of_trees_is_read_as_it_was_written(tmp_path, guided):
    made, (path,) = store(tmp_path, [5], names=("a", "b"), guided=guided)
    found, ids = read_trees(path)
    same(found, made)
    assert ids["a"] == "by 0"


@given(data=st.data(), counts=st.lists(st.integers(1, 4), max_size=5))
def test_stored_trees_are_a_sequence(tmp_path_factory, data, counts):
    folder = tmp_path_factory.mktemp("trees")
    made, _ = store(folder, counts)
    stored = read_rollouts(folder)
    same(stored, made)
    same(list(stored), made)
    if made:
        i = data.draw(st.integers(-len(made), len(made) - 1))
        same([stored[i]], [made[i]])
    at = data.draw(st.slices(len(made)))
    same(stored[at], made[at])
    for beyond in (len(made), -len(made) - 1):
        with pytest.raises(IndexError):
            stored[beyond]


def test_a_file_at_a_time_is_read(tmp_path, monkeypatch):
    _, paths = store(tmp_path, [3, 3, 3])
    read = []
    monkeypatch.setattr(trees, "read_trees", lambda path: read.append(path) or read_trees(path))
    stored = StoredTrees(paths)
    assert len(stored) == 9 and read == []
    for _ in stored:
        pass
    assert read == paths
    stored[4], stored[5]
    assert read == [*paths, paths[1]]


def test_stored_trees_are_joined_and_told_apart_by_their_rewards(tmp_path):
    sampled, _ = store(tmp_path / "sampled", [2, 1], names=("a", "c"))
    given, _ = store(tmp_path / "given", [2], names=("b",))
    both = read_rollouts(tmp_path / "sampled") + read_rollouts(tmp_path / "given")
    same(both, [*sampled, *given])
    same(sum([both, both], StoredTrees([])), 2 * [*sampled, *given])
    for names, expected in (("a", sampled), ("b", given), ("ab", sampled + given), ("", [])):
        has, has_not = both.split(names)
        same(has, expected)
        assert len(has) + len(has_not) == len(both)


def test_a_file_that_was_written_since_is_no_longer_read(tmp_path):
    _, paths = store(tmp_path, [2, 2])
    stored = read_rollouts(tmp_path)
    assert len(list(stored)) == 4
    write_trees(paths[0], [tree(7), tree(8)], {"a": "by another"})
    with pytest.raises(ValueError, match=r"trees-00000.parquet' has been written.*`rollout_dir`"):
        list(stored)
    assert [tree.prompt_index for tree in read_rollouts(tmp_path)][:2] == [7, 8]
