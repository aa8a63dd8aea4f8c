import itertools
from collections import Counter

import numpy as np
import pytest

from tests.trainers.policies import (
    OBJECTIVES,
    PROMPTS,
    REWARDS,
    WEIGHTS,
    against_red,
    blue,
    policies,
    red,
)
from trimtab.trainers import Policy, simplex_weights, sweep


@pytest.mark.parametrize(("objectives", "steps"), [(1, 3), (2, 4), (3, 3), (4, 2)])
def test_weights_cover_the_simplex(objectives, steps):
    weights = simplex_weights(objectives, steps)
    parts = itertools.product(range(steps + 1), repeat=objectives)
    expected = {tuple(np.array(p) / steps) for p in parts if sum(p) == steps}
    assert len(weights) == len(expected) and set(map(tuple, weights)) == expected
    assert weights[0].tolist() == [1.0] + [0.0] * (objectives - 1)
    assert weights[-1].tolist() == [0.0] * (objectives - 1) + [1.0]
    with pytest.raises(ValueError, match="steps=0"):
        simplex_weights(objectives, 0)


def test_a_sweep_asks_once_and_goes_on_where_it_stopped(tmp_path):
    calls = Counter()
    full = sweep(policies(calls), PROMPTS, WEIGHTS, REWARDS, tmp_path, seeds=2)
    assert len(full) == 1 + 3 * 3
    assert [len(point.responses) for point in full] == [2] + [2] * 6 + [1] * 3
    total = calls.total()
    assert total == 2 + 2 * 6 + 3

    def broken(prompts, weights, seed):
        raise KeyboardInterrupt

    stopped = [*policies(calls)[:2], Policy("strong", broken)]
    with pytest.raises(KeyboardInterrupt):
        sweep(stopped, PROMPTS, WEIGHTS, REWARDS, tmp_path / "other", seeds=2)
    again = sweep(policies(calls), PROMPTS, WEIGHTS, REWARDS, tmp_path / "other", seeds=2)
    assert calls.total() == total + total  # nothing twice, nothing left out
    for one, other in zip(full, again):
        texts = [[r.text for r in row] for row in one.responses]
        assert texts == [[r.text for r in row] for row in other.responses]
        for name in OBJECTIVES:
            assert np.array_equal(one.rewards[name], other.rewards[name])
            assert np.array_equal(one.rewards[name], [REWARDS[name](row) for row in texts])


def test_a_changed_reward_function_scores_stored_responses_again(tmp_path):
    calls = Counter()
    sweep(policies(calls), PROMPTS, WEIGHTS, REWARDS, tmp_path, seeds=1)
    total = calls.total()
    (point, *_) = sweep(
        policies(calls), PROMPTS, WEIGHTS, {"red": against_red, "blue": blue}, tmp_path, seeds=1
    )
    assert calls.total() == total
    texts = [r.text for r in point.responses[0]]
    assert point.rewards["red"].tolist() == [against_red(texts)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "`prompts` is empty"),
        ({"seeds": 0}, "`seeds` must be at least 1, got 0"),
        ({"weights": [{"green": 1.0}]}, "name 'green'; the objectives are"),
        ({"judges": {"green": red}}, "`judges` has 'green'"),
        ({"policies": policies()[1:2] * 2}, "twice: give another `method`"),
        ({"policies": [Policy("short", lambda p, w, s: [])]}, "returned 0 responses for 6 prompts"),
    ],
)
def test_a_sweep_refuses_what_it_cannot_run(change, message, tmp_path):
    given = {
        "policies": policies(),
        "prompts": PROMPTS,
        "weights": WEIGHTS,
        "reward_funcs": REWARDS,
        "seeds": 1,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        sweep(**given, folder=tmp_path)
