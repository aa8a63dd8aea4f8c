import hashlib
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.trainers.responses import ResponseTrees, TokenLists
from trimtab.trainers.rollouts import prompts_digest

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=4)
SCORE = st.floats(width=32, allow_infinity=False)


@given(lists=st.lists(TOKENS), at=st.slices(5))
def test_lists_are_those_that_were_added(lists, at):
    stored = TokenLists(lists)
    assert len(stored) == len(lists)
    assert list(stored) == lists and stored[at] == lists[at]
    for beyond in (len(lists), -len(lists) - 1):
        with pytest.raises(IndexError):
            stored[beyond]
    # As of folders that were made from lists
    expected = hashlib.sha256(json.dumps(lists).encode()).hexdigest()
    assert not lists or prompts_digest(stored) == expected


def test_a_number_that_is_no_token_is_refused():
    for number in (2**31, -(2**31) - 1):
        with pytest.raises(OverflowError):
            TokenLists([[number]])


PIECE = st.tuples(TOKENS.filter(bool), st.tuples(SCORE, SCORE))


@given(
    prompts=st.lists(st.sampled_from([[1], [1, 2], [3]]), min_size=1, max_size=8),
    data=st.data(),
)
def test_responses_are_branches_of_the_tree_of_their_prompt(prompts, data):
    trees = ResponseTrees(TokenLists(prompts), ["a", "b"])
    given = []
    for row in range(len(prompts)):
        for _ in range(data.draw(st.integers(1, 2))):  # a pair has two
            given.append((row, data.draw(st.lists(PIECE, max_size=3))))
            trees.add(*given[-1])
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    assert len(trees) == len(distinct) == len(list(trees))
    for tree, prompt in zip(trees, distinct):
        assert tree.prompt_index == prompts.index(list(prompt))
        assert tree.nodes[0].tokens == list(prompt) and math.isnan(tree.rewards["a"][0])
        own = [pieces for row, pieces in given if prompts[row] == list(prompt)]
        numbers = iter(range(1, len(tree.nodes)))
        for pieces in own:
            parent = 0
            for layer, (tokens, scores) in enumerate(pieces, start=1):
                node = tree.nodes[number := next(numbers)]
                assert (node.parent, node.layer, node.tokens) == (parent, layer, tokens)
                assert node.leaf and node.weight == 1
                np.testing.assert_equal([tree.rewards[name][number] for name in "ab"], scores)
                parent = number
        assert next(numbers, None) is None
