"""What is told of measurements themselves."""

import numpy as np
import pytest

from trimtab.optimizers import noises

# A round's perturbations: two lengths in turn, beside two evaluations of the base point.
SIZES = np.concatenate([np.zeros(2), np.tile([0.07, 0.14], 20)])


def half_space(rng, share):
    """A plane that so many of the perturbations are beyond."""
    place = np.quantile(SIZES[2:] * rng.standard_normal((10_000, 40)), 1 - share)
    return lambda: SIZES * rng.standard_normal(SIZES.size) > place


def chance(rng, share):
    return lambda: rng.random(SIZES.size) < share


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.3])
def test_failures_of_a_half_space_are_told_from_those_of_chance(share):
    rng = np.random.default_rng(0)
    blamed = {half_space: 0, chance: 0}
    for cause in blamed:
        draw = cause(rng, share)
        for _ in range(100):
            failures = noises.Failures()
            for _ in range(20):
                failures.learn(SIZES, draw())
            blamed[cause] += failures.of_size
    assert blamed[half_space] >= 95 and blamed[chance] <= 20


def test_shorter_ones_that_fail_as_often_acquit_lengths_that_are_all_one():
    failures = noises.Failures()
    assert failures.of_size
    for k in range(20):  # of one length a round, ever shorter
        failures.learn(np.full(10, 0.5**k), np.arange(10) == k % 10)
    assert not failures.of_size


def test_what_is_kept_is_bounded():
    failures = noises.Failures()
    for _ in range(100):
        failures.learn(np.ones(50), np.ones(50, dtype=bool))
    assert failures.sizes.size == failures.failed.size <= 1024
