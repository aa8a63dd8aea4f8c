"""Walls: blamed on the right coordinate, seldom on any by chance, and moved by what probes tell."""

import math

import numpy as np
import pytest

from trimtab.optimizers import estimates, sensing, walls


def measured(d, n, seed, *, base=None, bounds=(None, None), leveled=(), gaussian=False):
    """``n`` perturbations of two lengths around a base point."""
    rng = np.random.RandomState(seed)
    places = np.array(leveled, dtype=np.int64)
    base = np.zeros(d) if base is None else base
    now = estimates.Measurements(base, bounds, places, places)
    for j in range(n):
        now.rows.append(sensing.gaussian(rng, d) if gaussian else sensing.rademacher(rng, d))
        now.lengths.append(0.14 if j % 2 else 0.07)
        now.jumps.append(rng.choice([-1.0, 1.0], places.size).astype(np.float32))
    return now


def seen(now, fails):
    """A round in which the points fail of which ``fails`` says so."""
    failed = np.array([bool(fails(now.base + now.step(j))) for j in range(len(now))])
    return walls.Seen(now, np.flatnonzero(~failed), np.flatnonzero(failed))


def brute(rounds, x, coordinate, side):
    """Bits of one rule, the place that answered and the one that failed, or None."""
    d = x.size
    fine = max([side * x[coordinate], *(side * s.now.base[coordinate] for s in rounds)])
    steps = [(s, j, s.now.base + s.now.step(j)) for s in rounds for j in [*s.fine, *s.failed]]
    for s, j, point in steps:
        if j in s.fine:
            fine = max(fine, side * point[coordinate])
    bits, able_failed, beyond, failing = 0, 0, 0, math.inf
    for s, j, point in steps:
        size = abs(s.now.lengths[j] * sensing.expand(s.now.rows[j], d)[coordinate])
        either = [s.now.clip(s.now.base + sign * size)[coordinate] for sign in (-1, 1)]
        able = max(side * place for place in either) > fine
        if j in s.fine:
            bits += able
        else:
            able_failed += able
            if side * point[coordinate] > fine:
                beyond, failing = beyond + 1, min(failing, side * point[coordinate])
    if not beyond:
        return None
    chance = sum(math.comb(able_failed, i) for i in range(beyond, able_failed + 1))
    return bits - math.log2(chance / 2**able_failed), side * fine, side * failing


@pytest.mark.parametrize("seed", range(12))
def test_rule_is_the_best_of_all_by_brute_force(seed):
    rng = np.random.default_rng(seed)
    d = 13
    bounds = (np.full(d, -0.1), np.full(d, 0.2)) if seed % 2 else (None, None)
    rounds = []
    for k in range(1 + seed % 3):
        base = rng.choice([0.0, 0.05, 0.12], d)
        now = measured(d, 24, 10 * seed + k, base=base, bounds=bounds, gaussian=seed % 4 == 2)
        # A wall beyond the bases of all rounds, beside failures of no cause.
        rounds.append(seen(now, lambda x: x[4] > 0.125 or x[7] < -0.05 or rng.random() < 0.1))
    x = np.zeros(d)
    found = walls.rule(rounds, x)
    every = {(i, side): brute(rounds, x, i, side) for i in range(d) for side in (1, -1)}
    best = max((values[0] for values in every.values() if values is not None), default=0.0)
    if found is None:
        assert best < 10 + math.log2(2 * d * sum(len(s.now) for s in rounds))
        return
    assert found.bits == pytest.approx(best)
    bits, fine, failing = every[found.coordinate, found.side]
    assert (found.bits, found.fine, found.failing) == pytest.approx((bits, fine, failing))
    for s, explained in zip(rounds, found.explained):
        places = [found.side * (s.now.base + s.now.step(j))[found.coordinate] for j in s.failed]
        assert list(explained) == [
            j for j, place in zip(s.failed, places) if place > found.side * fine
        ]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_failures_of_no_cause_make_no_wall(share):
    rng = np.random.default_rng(0)
    found = 0
    for seed in range(700):
        now = measured(100, 48, seed)
        found += walls.rule([seen(now, lambda x: rng.random() < share)], now.base) is not None
    assert found <= 4  # 0.7 on average at most; five or more once in a thousand


def learnt(now, fails, x=None, bounds=(None, None)):
    found = walls.Walls(bounds, now.base.size)
    s = seen(now, fails)
    left = found.learn(now, now.base if x is None else x, s.fine, s.failed)
    assert set(left) <= set(s.failed)
    return found, left, s


def test_walls_are_where_measurements_still_answered():
    now = measured(300, 60, 1)
    found, left, s = learnt(now, lambda x: x[123] > 0.1)
    assert not left.size and s.failed.size
    lower, upper = found.bounds
    assert lower is None and upper[123] == 0.07 and np.isinf(np.delete(upper, 123)).all()
    bounds = np.full(300, -1.0), np.full(300, 1.0)
    found, *_ = learnt(measured(300, 60, 1, bounds=bounds), lambda x: x[123] < -0.05, None, bounds)
    lower, upper = found.bounds
    assert lower[123] == 0 and (np.delete(lower, 123) == -1).all() and upper is bounds[1]
    assert (bounds[0] == -1).all()


def test_two_walls_and_failures_of_no_cause_at_once():
    rng = np.random.default_rng(0)
    now = measured(200, 96, 3)
    found, *_ = learnt(now, lambda x: x[3] > 0.05 or x[150] < -0.05 or rng.random() < 0.05)
    lower, upper = found.bounds
    assert len(found) == 2 and upper[3] == 0 and lower[150] == 0


def test_iterate_stays_within():
    x = np.full(200, 0.12)
    found, *_ = learnt(measured(200, 60, 4), lambda y: y[9] > 0.1, x)
    assert found.bounds[1][9] == 0.12
    found, left, s = learnt(measured(200, 60, 4), lambda y: y[9] > 0.1, x + 0.1)
    # It answered beyond what failed.
    assert left.size == s.failed.size and found.bounds == (None, None)


def test_regions_of_two_coordinates_and_levels_are_no_walls():
    for fails in (lambda x: x[3] + x[8] > 0.1, lambda x: x[5] > 0):
        found, left, s = learnt(measured(40, 60, 5, leveled=(5,)), fails)
        assert left.size == s.failed.size > 5 and not len(found)
        assert found.bounds == (None, None)


def test_few_measurements_add_up_over_rounds():
    found = walls.Walls((None, None), 20)
    counts = []
    for seed in range(6):
        now = measured(20, 8, seed)
        s = seen(now, lambda x: x[11] > 0.05)
        found.learn(now, now.base, s.fine, s.failed)
        counts.append(len(found))
    assert counts[0] == 0 and counts[-1] == 1 and found.bounds[1][11] == 0


def test_what_is_kept_of_unexplained_failures_is_bounded():
    found = walls.Walls((None, None), 30)
    for seed in range(20):
        now = measured(30, 100, seed)
        s = seen(now, lambda x: x[0] + x[1] > 0.1)
        found.learn(now, now.base, s.fine, s.failed)
    assert not len(found) and sum(len(s.now) for s in found._seen) <= 512


def test_probes_close_in_on_the_place_with_growing_waits():
    found, *_ = learnt(measured(50, 60, 0), lambda x: x[2] > 0.1)
    x, gradient, support = np.zeros(50), np.zeros(50), np.array([2])
    x[2], gradient[2] = 0.07, -1.0
    assert found.wanted(x, -gradient, support, 0.001, 0) is None  # the slope points inward
    assert found.wanted(x, gradient, np.array([3]), 0.001, 0) is None
    assert found.wanted(np.zeros(50), gradient, support, 0.001, 0) is None  # far from the wall
    failed = []
    for number in range(100):
        x[2] = found.bounds[1][2]
        probe = found.wanted(x, gradient, support, 0.001, number)
        if probe is not None:
            found.probed(probe, probe.place <= 0.1, number)
            if probe.place > 0.1:
                failed.append(number)
        assert found.bounds[1][2] <= 0.1
    assert found.bounds[1][2] > 0.099
    assert np.all(np.diff(np.diff(failed)) >= 0) and len(failed) < 8


def test_mended_place_has_no_wall():
    found, *_ = learnt(measured(50, 60, 0), lambda x: x[2] > 0.1)
    x, gradient = np.zeros(50), np.zeros(50)
    x[2], gradient[2] = 0.07, -1.0
    for number in range(20):
        probe = found.wanted(x, gradient, np.array([2]), 0.02, number)
        if probe is None:
            break
        assert found.probed(probe, True, number) == (len(found) == 0)
        x[2] = probe.place
    assert found.bounds == (None, None)


def test_point_that_answered_beyond_a_wall_takes_it_down():
    found, *_ = learnt(measured(50, 60, 0), lambda x: x[2] > 0.1)
    found.release(np.full(50, 0.07))
    assert len(found) == 1
    found.release(np.full(50, 0.09))
    assert not len(found) and found.bounds == (None, None)
