"""CONGO without a learning rate: progress at any scale, nothing made worse, hostile services."""

import math
import pickle

import nevergrad as ng
import numpy as np
import pytest
from nevergrad.common import testing
from nevergrad.functions import ArtificialFunction

from trimtab.optimizers import ParametrizedCONGO, noises, rounds, spaces, step


def make(parametrization, budget=None, workers=1, seed=0, **options):
    optimizer = ParametrizedCONGO(**options)(parametrization, budget, workers)
    optimizer.parametrization.random_state.seed(seed)
    return optimizer


def play(optimizer, function, evaluations, noise=0.0):
    """Costs without noise of what was asked for."""
    rng, costs = np.random.default_rng(0), []
    for _ in range(evaluations):
        candidate = optimizer.ask()
        costs.append(function(candidate.value))
        optimizer.tell(candidate, costs[-1] + noise * rng.standard_normal())
    return costs


def bowl(x):
    return float((x[3] - 1) ** 2 + (x[11] + 1) ** 2)


# -- scales ----------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [-30, 30])
def test_scale_of_the_cost_changes_no_bit_of_the_points(exponent):
    one, two = make(100), make(100)
    for _ in range(300):
        first, second = one.ask(), two.ask()
        np.testing.assert_array_equal(first.value, second.value)
        cost = float(np.sum(np.abs(first.value[:4] - 1) ** 2.5))
        one.tell(first, cost)
        two.tell(second, cost * 2.0**exponent)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_progress_at_any_scale_of_the_cost(scale):
    value = make(100, 1000, 8).minimize(lambda x: scale * bowl(x)).value
    assert bowl(value) < 0.01 * 2


def test_progress_in_the_users_units():
    knobs = ng.p.Dict(a=ng.p.Scalar(lower=0, upper=100), b=ng.p.Scalar(lower=0, upper=100))
    found = make(knobs, 100).minimize(
        lambda v: ((v["a"] - 80) / 10) ** 2 + ((v["b"] - 20) / 10) ** 2
    )
    assert found.value["a"] == pytest.approx(80, abs=1)
    assert found.value["b"] == pytest.approx(20, abs=1)
    value = make(ng.p.Scalar(init=1000.0), 100).minimize(lambda x: ((x - 900) / 100) ** 2).value
    assert value == pytest.approx(900, abs=1)


def test_noise_does_not_stop_a_knob_that_has_far_to_go():
    # Slopes of 0.14 and 1 per unit, and hundreds of units to go.
    for target, noise, function in ((300, 0.01, lambda x: ((x - 300) / 100) ** 2), (0, 0.1, abs)):
        left = []
        for seed in range(5):
            optimizer = make(ng.p.Scalar(init=1000.0), seed=seed)
            play(optimizer, function, 500, noise)
            left.append(abs(optimizer.recommend().value - target))
        assert np.median(left) < 30


def test_optimum_inside_bounds_is_reached():
    knobs = ng.p.Array(shape=(100,)).set_bounds(0, 1)
    value = make(knobs, 600, 8).minimize(lambda x: 50 + 100 * bowl(x / 2 + 0.1 * x**0)).value
    assert np.all((value >= 0) & (value <= 1))
    scalar = ng.p.Scalar(lower=-10, upper=10, init=8.0)
    assert make(scalar, 100).minimize(lambda x: x * x).value == pytest.approx(0, abs=0.05)


# -- never worse -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ellipsoid", "rosenbrock", "multipeak", "deceptivemultimodal"])
@pytest.mark.parametrize("workers", [1, 8])
def test_no_recommendation_is_worse_than_the_start(name, workers):
    np.random.seed(1)  # noqa: NPY002  (Nevergrad's functions draw from it)
    function = ArtificialFunction(name, 5, useless_variables=55, rotation=name == "ellipsoid")
    function.parametrization.random_state.seed(1)
    start = function(np.zeros(60))
    optimizer = make(60, workers=workers)
    best = start
    while optimizer.num_tell < 500:
        for candidate in [optimizer.ask() for _ in range(workers)]:
            optimizer.tell(candidate, function(candidate.value))
        now = function(optimizer.recommend().value)
        assert now <= best
        best = now
    assert best < start or name.startswith("deceptive")


@pytest.mark.parametrize("target", [np.abs, np.square, np.sign])
def test_dense_cost_of_which_a_round_sees_half_does_not_diverge(target):
    """Three hidden units fitted to a curve: each round's slopes are wrong, and no noise says so."""
    x = np.linspace(-1, 1, 50)

    def cost(w):
        hidden = np.tanh(np.outer(x, w[:3]) + w[3:6])
        return float(np.mean((hidden @ w[6:9] + w[9] - target(x)) ** 2))

    for seed in range(5):
        optimizer = make(10, seed=seed)
        paid = play(optimizer, cost, 800)
        assert np.mean(paid[400:]) < paid[0]
        assert cost(optimizer.recommend().value) < 0.9 * paid[0]
        assert np.isfinite(optimizer.gradient).all()


def test_step_that_is_clearly_better_is_recommended_before_its_round_ends():
    optimizer = make(50)
    before, early = bowl(np.zeros(50)), 0
    for _ in range(200):
        number = optimizer.num_rounds
        play(optimizer, bowl, 1)
        found = optimizer.recommend()
        assert bowl(found.value) <= before
        assert found.loss is None or found.loss == pytest.approx(bowl(found.value), abs=1e-12)
        early += bowl(found.value) < before and optimizer.num_rounds == number
        before = bowl(found.value)
    assert early


def test_suggestion_that_is_worse_than_the_recommendation_is_not_taken():
    optimizer = make(50)
    while (better := optimizer._clearly_better()) is None:
        play(optimizer, bowl, 1)
    between = 0.5 * (better.loss + optimizer._value.loss)
    optimizer.tell(optimizer.parametrization.spawn_child(new_value=np.ones(50)), between)
    assert optimizer.recommend().loss == better.loss


@pytest.mark.parametrize("limit", [0.3, 3.0])
def test_no_measurement_is_predicted_above_max_regression(limit):
    def function(x):
        return 10 + 5 * bowl(x) + float((x[20] + x[21]) ** 2 - x[21])

    optimizer = make(60, max_regression=limit)
    incumbent = function(np.zeros(60))
    for _ in range(400):
        candidate = optimizer.ask()
        cost = function(candidate.value)
        if optimizer.num_rounds:  # of a smooth function the model is right up to curvature
            assert cost <= incumbent + 1.5 * limit
        optimizer.tell(candidate, cost)
        incumbent = function(optimizer.recommend().value)
    assert incumbent < 10


@pytest.mark.parametrize("seed", [0, 1])
def test_measurements_above_max_regression_get_rare_where_cliffs_are_near(seed):
    """Settings of a database from a good start: past some values all is twenty times slower."""
    knobs = {f"size{i:02d}": ng.p.Log(init=16, lower=1, upper=256) for i in range(20)}
    for i in range(14):
        knobs[f"count{i:02d}"] = ng.p.Scalar(init=8, lower=1, upper=64).set_integer_casting()
        knobs[f"flag{i:02d}"] = ng.p.Choice([True, False])

    def cost(v):
        cliff = v["size03"] > 20 or v["size07"] < 13 or v["size11"] > 25 or v["count05"] < 8
        cliff = cliff or not v["flag02"] or not v["flag09"]
        return (10 + 0.1 * abs(v["size15"] - 32)) * (20 if cliff else 1)

    optimizer = make(ng.p.Dict(**knobs), seed=seed, max_regression=10.0)
    above = [paid > 22 for paid in play(optimizer, cost, 100, noise=0.3)]  # the start costs 11.6
    assert sum(above) <= 10 and sum(above[50:]) <= 4
    assert cost(optimizer.recommend().value) < 12


def test_paid_cost_approaches_the_recommended_one_under_noise():
    def function(x):
        return 100 + 5 * bowl(x)

    optimizer = make(60)
    paid = play(optimizer, function, 1800, noise=2.0)
    assert function(optimizer.recommend().value) < 101
    assert np.mean(paid[-300:]) < 101
    report = optimizer.last_round
    assert abs(report.recommended - 100) < 2 and abs(report.paid - 100) < 2


def test_perturbations_lengthen_when_the_world_moves():
    optimizer = make(40)
    play(optimizer, bowl, 600)
    settled = optimizer.last_round.perturbation
    assert settled < 0.1
    lengths = []
    for _ in range(12):
        play(optimizer, lambda x: bowl(x[::-1]) + 3, 40)
        lengths.append(optimizer.last_round.perturbation)
    assert max(lengths) > 2 * settled
    assert bowl(optimizer.recommend().value[::-1]) < 0.01


# -- robust measurements ---------------------------------------------------------------------


def test_optimum_that_moves_is_followed_while_the_level_goes_up_and_down():
    found = []
    for seed in range(6):
        optimizer = make(100, workers=8, seed=seed)
        rng, behind = np.random.default_rng(seed), []
        for n in range(2000):
            phase = 2 * math.pi * n / 2000
            best = math.cos(0.5 * phase)

            def distance(x, best=best):
                return 4 * float(np.sum((x[[3, 11, 40]] - [best, -best, best]) ** 2))

            candidate = optimizer.ask()
            level = 5 * math.sin(3 * phase) + rng.standard_normal()
            optimizer.tell(candidate, level + distance(candidate.value))
            behind.append(distance(optimizer.recommend().value))
        found.append(np.mean(behind[1000:]))
    assert np.median(found) < 1.5  # standing still at the first optimum costs 33


@testing.suppress_nevergrad_warnings()
def test_outage_teaches_nothing():
    optimizer = make(60)
    play(optimizer, bowl, 400, noise=0.05)
    for _ in range(100):  # what was out when it began
        optimizer.tell(optimizer.ask(), math.nan)
    before, length = bowl(optimizer.recommend().value), optimizer._length
    for _ in range(300):
        optimizer.tell(optimizer.ask(), math.nan)
    assert bowl(optimizer.recommend().value) == before
    assert optimizer._length == length
    play(optimizer, bowl, 200, noise=0.05)
    assert bowl(optimizer.recommend().value) < before + 0.05


@pytest.mark.parametrize(
    ("dimension", "share", "evaluations"), [(60, 0.1, 800), (60, 0.3, 1200), (12, 0.05, 800)]
)
@testing.suppress_nevergrad_warnings()
def test_failures_at_random_do_not_shorten_perturbations_for_good(dimension, share, evaluations):
    found, lengths = [], []
    for seed in range(5):
        optimizer = make(dimension, seed=seed)
        rng = np.random.default_rng(seed)
        for _ in range(evaluations):
            candidate = optimizer.ask()
            cost = bowl(candidate.value) + 0.1 * rng.standard_normal()
            optimizer.tell(candidate, math.nan if rng.random() < share else cost)
        found.append(bowl(optimizer.recommend().value))
        lengths.append(optimizer._length)
    assert np.median(found) < 0.07  # of 2
    assert np.median(lengths) > 0.02  # of 0.1


@pytest.mark.parametrize("penalty", [1e5, math.nan])
@testing.suppress_nevergrad_warnings()
def test_failing_region_repels_no_knob(penalty):
    optimizer = make(40)
    play(optimizer, lambda x: penalty if x[5] > 0.05 else bowl(x), 600, noise=0.01)
    value = optimizer.recommend().value
    assert np.abs(value).max() < 2 and bowl(value) < 0.1


@pytest.mark.parametrize(("penalty", "limit"), [(1e5, None), (math.nan, None), (math.nan, 1.0)])
@testing.suppress_nevergrad_warnings()
def test_region_that_fails_is_not_entered_again(penalty, limit):
    optimizer = make(100, workers=8, max_regression=limit)
    paid = play(optimizer, lambda x: penalty if x[5] > 0.05 else bowl(x), 1600, noise=0.01)
    failed = [not cost < 1e4 for cost in paid]
    assert 0 < sum(failed) < 60 and sum(failed[1000:]) <= 1
    assert bowl(optimizer.recommend().value) < 0.02


@testing.suppress_nevergrad_warnings()
def test_knob_whose_best_value_fails_ends_just_before_and_goes_on_once_it_is_mended():
    optimizer = make(100, workers=8)
    best = np.eye(100)[3] - np.eye(100)[11]
    paid = play(optimizer, lambda x: math.nan if x[3] > 0.6 else 10 + bowl(x), 1500, noise=0.01)
    value = optimizer.recommend().value
    assert 0.55 < value[3] <= 0.6 and abs(value[11] + 1) < 0.1
    assert np.isnan(paid[1000:]).sum() <= 4
    play(optimizer, lambda x: 10 + bowl(x), 2000, noise=0.01)
    assert np.abs(optimizer.recommend().value - best).max() < 0.15


@testing.suppress_nevergrad_warnings()
def test_walls_are_dumped_and_scale_free():
    def cost(x):
        return 1e5 if x[3] > 0.6 or x[20] < -0.05 else 10 + bowl(x) + math.sin(1e4 * x.sum())

    one, two = make(60), make(60)
    for number in range(600):
        first, second = one.ask(), two.ask()
        np.testing.assert_array_equal(first.value, second.value)
        one.tell(first, cost(first.value))
        two.tell(second, cost(second.value) * 2.0**-40)
        if number == 450:
            one = pickle.loads(pickle.dumps(one))
    assert len(one._walls)


@pytest.mark.parametrize("penalty", [1e5, math.nan])
@testing.suppress_nevergrad_warnings()
def test_category_that_fails_is_asked_for_seldom_until_it_recovers(penalty):
    knobs = {f"x{i}": ng.p.Scalar(lower=0, upper=1) for i in range(4)}
    optimizer = make(ng.p.Dict(**knobs, mode=ng.p.Choice(["old", "broken", "new"])))

    def cost(v, down):
        if down and v["mode"] == "broken":
            return penalty
        return 10 + (v["x0"] - 0.8) ** 2 + {"old": 2, "broken": 0, "new": 1}[v["mode"]]

    asked = []
    for _ in range(160):
        candidate = optimizer.ask()
        asked.append(candidate.value["mode"])
        optimizer.tell(candidate, cost(candidate.value, down=True))
        assert optimizer.recommend().value["mode"] != "broken"
    assert optimizer.recommend().value["mode"] == "new"
    assert 1 <= asked.count("broken") <= 16 and asked[80:].count("broken") <= 6
    play(optimizer, lambda v: cost(v, down=False), 300)
    assert optimizer.recommend().value["mode"] == "broken"


def test_outliers_and_quantised_costs():
    rng = np.random.default_rng(1)

    def hostile(x):
        return round(100 + 5 * bowl(x) + rng.standard_normal()) * (
            100 if rng.random() < 0.05 else 1
        )

    optimizer = make(60)
    play(optimizer, hostile, 1500)
    assert 5 * bowl(optimizer.recommend().value) < 1.5


def test_surplus_workers_are_used():
    optimizer, measured = make(50), []
    for _ in range(4):
        out = [optimizer.ask() for _ in range(300)]
        for candidate in out:
            optimizer.tell(candidate, bowl(candidate.value))
        measured.append(optimizer.last_round.measurements)
    assert optimizer.num_rounds == 4 and min(measured) > 290


def test_penalties_are_a_group_far_above():
    base = np.array([0.0])
    rng = np.random.default_rng(0)
    plain = rng.choice([-1, 1], 40) * np.tile([0.7, 1.4], 20)
    assert not noises.penalties(np.concatenate([base, plain])).any()
    mixed = np.concatenate([base, plain])
    mixed[[4, 9, 30]] = 1e4 + rng.standard_normal(3)
    assert list(np.flatnonzero(noises.penalties(mixed))) == [4, 9, 30]


# -- constraints and levels ------------------------------------------------------------------


def test_constraint_violation_stops_at_the_boundary():
    def function(x):
        return float((x[0] - 2) ** 2 + (x[3] + 1) ** 2)

    optimizer = make(50)
    for _ in range(700):
        candidate = optimizer.ask()
        x = candidate.value
        optimizer.tell(candidate, function(x), constraint_violation=[max(0.0, x[0] - 1)])
    value = optimizer.recommend().value
    assert 0.9 < value[0] < 1.02 and value[3] == pytest.approx(-1, abs=0.2)


def feasible(x):
    return x[0] >= 1


def test_infeasible_start_becomes_feasible_at_once():
    knobs = ng.p.Array(shape=(20,))
    knobs.register_cheap_constraint(feasible)
    optimizer = make(knobs, 200)
    for _ in range(120):
        candidate = optimizer.ask()
        assert feasible(candidate.value)
        optimizer.tell(candidate, float(np.sum((candidate.value[:3] - 0.5) ** 2)))
    assert optimizer.num_rounds >= 2
    value = optimizer.recommend().value
    assert 1 <= value[0] < 1.5 and np.abs(value[1:3] - 0.5).max() < 0.2


def test_integers_move_by_levels():
    knobs = ng.p.Array(init=[2.0] * 20).set_bounds(1, 4).set_integer_casting()
    found = make(knobs, 500).minimize(lambda k: 10 + 3 * abs(k[0] - 4) + 3 * abs(k[1] - 1)).value
    assert list(found) == [4, 1] + [2] * 18


@pytest.mark.parametrize("seed", range(3))
def test_integers_that_matter_only_several_levels_away_are_found(seed):
    """A delay of thousands of levels, each next to nothing, and a pool that helps from twenty."""
    knobs = {f"n{i:02d}": ng.p.Scalar(init=12, lower=1, upper=64) for i in range(15)}
    knobs |= {f"wide{i}": ng.p.Log(init=200, lower=1, upper=100_000) for i in range(5)}
    knobs["delay"] = ng.p.Scalar(init=15_000, lower=0, upper=20_000)
    knobs = {name: knob.set_integer_casting() for name, knob in knobs.items()}
    knobs |= {f"flag{i}": ng.p.Choice([False, True]) for i in range(8)}

    def cost(v):
        return 10 + v["delay"] / 500 + 30 * (v["n04"] < 20)  # 70 at the start

    optimizer = make(ng.p.Dict(**knobs), seed=seed)
    play(optimizer, cost, 150, noise=2.0)
    assert cost(optimizer.recommend().value) < 20


def test_what_levels_do_together_is_taken_as_it_was_measured():
    """Neither flag does anything without the other, and others cost a lot: no fit tells of them."""
    knobs = {f"flag{i:02d}": ng.p.Choice([False, True]) for i in range(20)}

    def cost(v):
        dear = 150 * (v["flag01"] + v["flag05"]) + 300 * v["flag11"]
        return 24 - 22 * (v["flag03"] and v["flag07"]) + dear

    found = 0
    for seed in range(8):
        optimizer = make(ng.p.Dict(**knobs), seed=seed)
        play(optimizer, cost, 150, noise=1.0)
        found += cost(optimizer.recommend().value) == 2
    assert found >= 5  # the fewer levels change at a time, the more seldom two do together


def test_noise_alone_moves_no_flag():
    knobs = {f"flag{i:02d}": ng.p.Choice([False, True]) for i in range(20)}
    moved = []
    for seed in range(10):
        optimizer = make(ng.p.Dict(**knobs), seed=seed)
        play(optimizer, lambda v: 50.0, 150, noise=5.0)
        moved.append(sum(optimizer.recommend().value.values()))
    assert np.median(moved) <= 2


@pytest.mark.parametrize("seed", range(3))
def test_levels_that_cost_a_lot_are_changed_ever_more_seldom(seed):
    """A good start: five flags cost 20 more when turned off, three sizes 50 more when small."""
    rng = np.random.default_rng(seed)
    flags, sizes = rng.choice(20, 5, replace=False), rng.choice(20, 3, replace=False)
    knobs = ng.p.Tuple(
        *(ng.p.Choice([True, False]) for _ in range(20)),
        *(ng.p.Scalar(init=100, lower=0, upper=1000).set_integer_casting() for _ in range(20)),
    )
    for i in range(20):
        knobs[i].value = True

    def cost(x):
        return 10 + 20 * sum(not x[i] for i in flags) + 50 * sum(x[20 + i] < 60 for i in sizes)

    optimizer = make(knobs, 150, seed=seed)
    paid = np.array(play(optimizer, cost, 150, noise=0.5))
    assert paid[-50:].mean() < 20 < paid[2:10].mean()
    assert cost(optimizer.recommend().value) == 10


def test_move_to_a_measurement_says_nothing_of_the_model():
    knobs = ng.p.Dict(x=ng.p.Array(shape=(6,)), flags=ng.p.Choice([0, 1], repetitions=6))
    optimizer = make(knobs)
    play(optimizer, lambda v: 10 + float(np.sum((v["x"] - 1) ** 2)), 60, noise=0.01)
    radius, to = optimizer._radius, np.zeros(optimizer.dimension)
    to[0] = 0.01
    optimizer._plan = rounds.Plan(0 * to, to, 0.0, 0.0, 1.0, settled=True, measured=True)
    optimizer._open(optimizer._x + to)
    played = optimizer.num_rounds
    while optimizer.num_rounds == played:
        play(optimizer, lambda v: 20.0 + 0.1 * float(v["x"][0]), 1)
    assert optimizer._radius >= radius


def test_integers_that_are_far_from_harmless_are_moved_by_few_levels():
    knobs = {f"n{i:02d}": ng.p.Scalar(init=500, lower=0, upper=1000) for i in range(20)}
    optimizer = make(ng.p.Dict(**{k: x.set_integer_casting() for k, x in knobs.items()}))

    def cost(v):
        return 10 + sum(100 * (abs(v[f"n{i:02d}"] - 500) > 60) for i in range(8))

    paid = play(optimizer, cost, 300, noise=0.5)
    assert np.mean(paid[2:12]) > 50 and np.mean(paid[200:]) < 20
    assert cost(optimizer.recommend().value) == 10


def test_scale_of_the_cost_changes_no_step_of_integers():
    knobs = ng.p.Dict(
        n=ng.p.Array(init=np.full(20, 200.0)).set_bounds(0, 1000).set_integer_casting(),
        flags=ng.p.Choice([False, True], repetitions=5),
    )
    one, two = make(knobs.copy()), make(knobs.copy())
    for _ in range(150):
        first, second = one.ask(), two.ask()
        np.testing.assert_array_equal(first.value["n"], second.value["n"])
        cost = float(np.sum(np.abs(first.value["n"][:3] - 700)) + sum(first.value["flags"]))
        one.tell(first, cost)
        two.tell(second, cost * 2.0**30)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_integers_follow_a_slope_that_all_share(noise):
    """Thirty replicas each cost their price; a latency wants twelve of one."""
    knobs = {f"k{i:02d}": ng.p.Scalar(init=10, lower=1, upper=20) for i in range(30)}
    optimizer = make(ng.p.Dict(**{k: x.set_integer_casting() for k, x in knobs.items()}))

    def cost(k):
        return sum(k.values()) + 10 * abs(k["k03"] - 12)

    assert cost(dict.fromkeys(knobs, 10)) == 320  # at the start; 41 is the least
    play(optimizer, cost, 400, noise)
    assert cost(optimizer.recommend().value) < (42 if not noise else 60)


@pytest.mark.parametrize("budget", [150, 666])
def test_nevergrads_realistic_scenario(budget):
    # Its test_ngopt_on_simple_realistic_scenario: a rate, an integer and a choice.
    def training(rate, batch, architecture):
        return (rate - 0.2) ** 2 + (batch - 4) ** 2 + (0 if architecture == "conv" else 10)

    knobs = ng.p.Instrumentation(
        rate=ng.p.Log(lower=0.001, upper=1.0),
        batch=ng.p.Scalar(lower=1, upper=12).set_integer_casting(),
        architecture=ng.p.Choice(["fc", "conv"]),
    )
    recommendation = make(knobs, budget).minimize(training)
    assert training(**recommendation.kwargs) < 1.0006


def test_levels_of_every_kind():
    knobs = ng.p.Dict(
        a=ng.p.Array(init=[2.0, 4.0]).set_bounds(1, 4).set_integer_casting(),
        b=ng.p.Choice(["x", "y", "z"]),
        c=ng.p.TransitionChoice(list(range(5))),
        d=ng.p.Log(lower=0.1, upper=10),
    )
    levels = spaces.Levels(knobs)
    assert list(levels.positions) == [0, 1, 2, 3, 4, 5]
    assert list(levels.integers) == [True, True, False, False, False, True]
    x = levels.snap(np.zeros(7))
    start = knobs.spawn_child().set_standardized_data(x).value
    assert list(start["a"]) == [2, 4] and start["b"] == "x" and start["c"] == 2
    down, up = levels.neighbours(x, np.full(6, 0.1))
    for direction, expected in ((down, ([1, 3], 1)), (up, ([3, 4], 3))):
        moved = x.copy()
        moved[levels.positions] += direction
        value = knobs.spawn_child().set_standardized_data(moved).value
        assert (list(value["a"]), value["c"]) == expected
    far = levels.neighbours(x, np.full(6, 2.0))
    for direction, expected in zip(far, (([1, 2], 0), ([4, 4], 4))):
        moved = x.copy()
        moved[levels.positions] += direction
        value = knobs.spawn_child().set_standardized_data(moved).value
        assert (list(value["a"]), value["c"]) == expected
    rng = np.random.RandomState(0)
    seen = set()
    for _ in range(50):
        moved = x.copy()
        moved[levels.positions] += levels.draw(rng, x, down, up, 0.5)
        seen.add(knobs.spawn_child().set_standardized_data(moved).value["b"])
    assert seen == {"x", "y", "z"}


# -- the parts -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_step_minimises_the_model_within_the_radius(seed):
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((3, 3))
    matrix = root @ root.T - (2.0 if seed % 2 else 0.0) * np.eye(3)
    model = step.Quadratic(np.array([0, 2, 3]), matrix, 0.5)
    gradient, radius = rng.standard_normal(5), float(rng.uniform(0.1, 3))
    found = model.minimise(gradient, radius, np.ones(5, dtype=bool))
    assert np.linalg.norm(found) <= radius * (1 + 1e-9)

    def value(s):
        return gradient @ s + 0.5 * s @ model.product(s)

    for _ in range(3000):
        other = rng.standard_normal(5)
        other *= radius * rng.random() ** 0.2 / np.linalg.norm(other)
        assert value(found) <= value(other) + 1e-9


def test_curvature_of_a_quadratic_is_learnt():
    rng = np.random.default_rng(0)
    root = rng.standard_normal((4, 4))
    hessian = root @ root.T + np.eye(4)
    curvature = step.Curvature()
    for s in np.linalg.qr(rng.standard_normal((4, 4)))[0]:
        curvature.learn(s, hessian @ s, 0.0)
    last = curvature.pairs[-1][0]
    np.testing.assert_allclose(curvature.quadratic(4).product(last), hessian @ last)


def test_probes_lengthen_and_shorten():
    # A parabola with its minimum at 6, one at 0.05, and one that the first probe meets.
    for best, expected in ((6.0, 4.0), (0.05, 0.1), (1.0, None)):
        cost = (1 - best) ** 2 - best**2
        assert step.next_probe([(1.0, cost)], 0.0, -2 * best, 0.0) == expected
    assert step.next_probe([(1.0, 0.1)], 0.0, -1.0, error=0.5) is None  # noise, no reason


def test_recommendation_carries_its_loss():
    optimizer = make(20)
    play(optimizer, bowl, 60)
    recommendation = optimizer.recommend()
    assert recommendation.loss == pytest.approx(bowl(recommendation.value))


def test_never_told_asks_do_not_grow_the_pickle():
    optimizer, sizes = make(20), []
    for k in range(6000):
        optimizer.ask()
        if k >= 2000 and k % 500 == 0:
            sizes.append(len(pickle.dumps(optimizer)))
    assert sizes[-1] < 1.05 * sizes[0]


def test_options_that_do_not_go_together():
    with pytest.raises(ValueError, match=r"max_regression is 1\.0 with"):
        ParametrizedCONGO(max_regression=1.0, learning_rate=0.1)
    with pytest.raises(ValueError, match="normalize is True without a learning_rate"):
        ParametrizedCONGO(normalize=True)
    with pytest.raises(ValueError, match="max_regression is 0"):
        ParametrizedCONGO(max_regression=0)
