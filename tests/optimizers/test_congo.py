"""Rounds, estimates, bounds, failures and reports of the CONGO optimizers."""

import logging
import math
import pickle
from concurrent import futures

import nevergrad as ng
import numpy as np
import pytest
from nevergrad.common import errors, testing

from trimtab.optimizers import ParametrizedCONGO
from trimtab.optimizers.spaces import coordinate_name, standardized_bounds

VARIANTS = ["B", "Z", "E", "adaptive"]


def make(parametrization=30, *, budget=None, num_workers=1, seed=0, **options):
    options.setdefault("learning_rate", 0.1)  # without one: test_step.py
    optimizer = ParametrizedCONGO(**options)(parametrization, budget, num_workers)
    optimizer.parametrization.random_state.seed(seed)
    return optimizer


def run_round(optimizer, function):
    done = optimizer.num_rounds
    while optimizer.num_rounds == done:
        candidate = optimizer.ask()
        optimizer.tell(candidate, function(*candidate.args, **candidate.kwargs))


class Sparse:
    """``b'x + x'Dx + c sum x_i^3`` on a few coordinates, with its gradient."""

    def __init__(self, d=60, s=3, seed=0, bend=1.0, cubic=0.0):
        rng = np.random.default_rng(seed)
        self.b, self.diagonal = np.zeros(d), np.zeros(d)
        self.support = np.sort(rng.choice(d, s, replace=False))
        self.b[self.support] = rng.choice([-2.0, 2.0], s) * rng.uniform(0.5, 1, s)
        self.diagonal[self.support] = bend * rng.uniform(0.5, 1, s)
        self.cubic = cubic

    def __call__(self, x):
        weighted = self.cubic * np.sign(self.diagonal)
        return float(self.b @ x + self.diagonal @ x**2 + weighted @ x**3)

    def gradient(self, x):
        return self.b + 2 * self.diagonal * x + 3 * self.cubic * np.sign(self.diagonal) * x**2


# -- estimates -------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["Z", "E", "adaptive"])
def test_gradient_of_a_sparse_quadratic(variant):
    function = Sparse()
    optimizer = make(60, variant=variant, sparsity=3, delta=1e-4, num_measurements=25)
    run_round(optimizer, function)
    np.testing.assert_allclose(optimizer.gradient, function.gradient(np.zeros(60)), atol=1e-3)
    np.testing.assert_allclose(optimizer.recommend().value, -0.1 * optimizer.gradient)
    assert optimizer.last_round.residual < 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_b_finds_the_largest_entries(seed):
    function = Sparse(s=2, seed=seed)
    optimizer = make(60, variant="B", num_measurements=25, num_perturbations=600, delta=1e-4)
    run_round(optimizer, function)
    truth = function.gradient(np.zeros(60))
    assert set(np.argsort(-np.abs(optimizer.gradient))[:2]) == set(function.support)
    cosine = optimizer.gradient @ truth / np.linalg.norm(optimizer.gradient)
    assert cosine / np.linalg.norm(truth) > 0.9


def test_b_measurements_are_unbiased_projections():
    # The average of many simultaneous perturbations tends to A g, whatever the sparsity of g.
    rng = np.random.RandomState(0)
    g = rng.standard_normal(8)
    optimizer = make(8, variant="B", num_measurements=6, num_perturbations=40_000, delta=1e-6)
    optimizer.pruning = None
    slopes = []
    for _ in range(2000):
        optimizer.ask()
    for index in range(1, 2000):
        step = optimizer._round.measurements.step(index - 1)
        length = optimizer._round.measurements.lengths[index - 1]
        slopes.append(optimizer._round.measurements.rows[index - 1] * (g @ step) / length)
    mean, error = np.mean(slopes, axis=0), np.std(slopes, axis=0) / math.sqrt(len(slopes))
    assert np.all(np.abs(mean - optimizer._round.measurements.mixing @ g) < 4.5 * error)


@pytest.mark.parametrize("variant", ["Z", "E"])
def test_bias_of_forward_differences_is_first_order(variant):
    function = Sparse(bend=1.0)
    errors_ = []
    for delta in (4e-2, 2e-2, 1e-2):
        optimizer = make(60, variant=variant, sparsity=3, num_measurements=30, delta=delta)
        run_round(optimizer, function)
        errors_.append(np.linalg.norm(optimizer.gradient - function.gradient(np.zeros(60))))
    np.testing.assert_allclose(np.divide(errors_[:-1], errors_[1:]), 2.0, rtol=0.1)


def test_adaptive_bias_is_second_order():
    # Signs and the fitted curvature leave only third derivatives.
    function = Sparse(bend=1.0, cubic=1.0)
    errors_ = []
    for delta in (0.2, 0.1, 0.05):
        optimizer = make(60, variant="adaptive", num_measurements=30, delta=delta)
        run_round(optimizer, function)
        errors_.append(np.linalg.norm(optimizer.gradient - function.gradient(np.zeros(60))))
    np.testing.assert_allclose(np.divide(errors_[:-1], errors_[1:]), 4.0, rtol=0.25)


@pytest.mark.parametrize("variant", VARIANTS)
def test_as_many_measurements_as_dimensions_is_least_squares(variant):
    g = np.arange(1.0, 6.0)  # dense
    options = {"num_perturbations": 3000} if variant == "B" else {}
    optimizer = make(5, variant=variant, num_measurements=5, **options)
    run_round(optimizer, lambda x: float(g @ x))
    np.testing.assert_allclose(optimizer.gradient, g, atol=1.0 if variant == "B" else 1e-8)


def test_common_slope_is_found_beside_a_sparse_gradient():
    optimizer = make(60, variant="adaptive", num_measurements=20)
    run_round(optimizer, lambda x: float(0.5 * x.sum() - 4 * x[7]))
    expected = np.full(60, 0.5)
    expected[7] = -3.5
    np.testing.assert_allclose(optimizer.gradient, expected, atol=1e-6)
    assert optimizer.last_round.common == pytest.approx(0.5)
    assert list(optimizer.last_round.support) == ["x[7]"]


def test_drift_within_a_round_is_no_gradient():
    optimizer = make(60, variant="adaptive", num_measurements=25)
    clock = iter(range(10**6))
    run_round(optimizer, lambda x: 3.0 * next(clock) - 2 * x[4])
    expected = np.zeros(60)
    expected[4] = -2
    np.testing.assert_allclose(optimizer.gradient, expected, atol=1e-6)


def test_noise_lengthens_perturbations_and_curvature_shortens_them():
    rng = np.random.default_rng(0)
    noisy = make(40, variant="adaptive", delta=0.01, learning_rate=1e-6, num_measurements=20)
    for _ in range(40):
        run_round(noisy, lambda x: float(x[0] + 0.1 * rng.standard_normal()))
    assert noisy._length > 0.05

    mixing = np.linalg.qr(rng.standard_normal((40, 40)))[0]
    bent = make(40, variant="adaptive", delta=0.5, learning_rate=1e-6, num_measurements=20)
    for _ in range(40):
        run_round(bent, lambda x: float(x[0] + 5 * np.sum(np.abs(mixing @ x) ** 3)))
    assert bent._length < 0.25


# -- asks and tells --------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_order_of_tells_does_not_matter(variant):
    function, results = Sparse(d=30), []
    for reverse in (False, True):
        optimizer = make(30, variant=variant, num_workers=50)
        for _ in range(3):
            out = [optimizer.ask() for _ in range(optimizer.evaluations_per_round)]
            for candidate in reversed(out) if reverse else out:
                optimizer.tell(candidate, function(candidate.value))
        assert optimizer.num_rounds == 3
        results.append(optimizer.recommend().value)
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("lost", [{0}, {1, 5}, {0, 3, 4}])
def test_lost_evaluations_are_replaced_and_reported(variant, lost):
    function = Sparse(d=30)
    optimizer = make(30, variant=variant)
    asked = 0
    while optimizer.num_rounds == 0:
        candidate = optimizer.ask()
        if asked not in lost:
            optimizer.tell(candidate, function(candidate.value))
        asked += 1
        assert asked < 200
    report = optimizer.last_round
    assert report.lost == len(lost)
    assert report.measurements == optimizer.evaluations_per_round
    assert report.step > 0


def test_late_and_repeated_tells_change_nothing():
    function = Sparse(d=30)
    one, two = make(30, variant="adaptive"), make(30, variant="adaptive")
    run_round(one, function)
    late = [two.ask()]  # the base point, which never answers in time
    while two.num_rounds == 0:
        candidate = two.ask()
        two.tell(candidate, function(candidate.value))
        two.tell(candidate, -1e6)  # again
    np.testing.assert_array_equal(one.recommend().value, two.recommend().value)
    for candidate in late:
        two.tell(candidate, -1e6)
    np.testing.assert_array_equal(one.recommend().value, two.recommend().value)
    run_round(one, function)
    run_round(two, function)
    np.testing.assert_array_equal(one.recommend().value, two.recommend().value)


def test_idle_workers_measure_too():
    assert make(100, variant="adaptive", num_workers=80).evaluations_per_round == 80
    assert make(100, variant="adaptive", num_workers=16).evaluations_per_round == 48
    assert make(100, variant="adaptive", num_workers=10).evaluations_per_round == 50
    assert make(20, variant="adaptive", num_workers=80).evaluations_per_round == 21  # m = d
    assert make(100, variant="E", num_workers=80).evaluations_per_round == 48


@pytest.mark.parametrize("batch_mode", [True, False])
def test_asks_that_workers_waste(batch_mode):
    # Batches waste none. Workers that never wait lose what is in flight when a round ends: it was
    # asked for before the next iterate was known. No more than that.
    function, workers = Sparse(d=200), 16
    optimizer = make(200, variant="adaptive", budget=1280, num_workers=workers)
    each = optimizer.evaluations_per_round
    assert each == 64
    losses = []

    def logged(optimizer, candidate, loss):
        losses.append(optimizer.last_round.lost if optimizer.last_round else 0)

    optimizer.register_callback("tell", logged)
    with futures.ThreadPoolExecutor(workers) as executor:
        optimizer.minimize(function, executor=executor, batch_mode=batch_mode)
    if batch_mode:
        assert optimizer.num_rounds == 1280 // each and max(losses) == 0
    else:
        assert optimizer.num_rounds >= 1280 // (each + workers - 1)
        assert max(losses) <= workers - 1
    assert function(optimizer.recommend().value) < -1.0


def test_point_from_outside_is_a_warm_start_only_if_better():
    optimizer = make(30, variant="adaptive")
    run_round(optimizer, lambda x: float(np.sum((x - 1) ** 2)))
    before = optimizer.recommend().value
    optimizer.tell(optimizer.parametrization.spawn_child(new_value=np.full(30, 9.0)), 1e3)
    np.testing.assert_array_equal(optimizer.recommend().value, before)
    optimizer.tell(optimizer.parametrization.spawn_child(new_value=np.ones(30)), 0.0)
    np.testing.assert_array_equal(optimizer.recommend().value, np.ones(30))
    optimizer.tell(optimizer.parametrization.spawn_child(new_value=np.zeros(30)), 5.0)
    np.testing.assert_array_equal(optimizer.recommend().value, np.ones(30))


# -- failures --------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@testing.suppress_nevergrad_warnings()
def test_failed_losses_are_left_out(variant, bad):
    function = Sparse(d=30)
    optimizer = make(30, variant=variant)
    out = [optimizer.ask() for _ in range(optimizer.evaluations_per_round)]
    for k, candidate in enumerate(out):
        optimizer.tell(candidate, bad if k == 2 else function(candidate.value))
    assert optimizer.num_rounds == 1
    assert optimizer.last_round.lost == 1
    assert 0 < np.linalg.norm(optimizer.gradient) < 50


@pytest.mark.parametrize("variant", VARIANTS)
@testing.suppress_nevergrad_warnings()
def test_failure_at_the_iterate_returns_to_the_last_good_one(variant):
    optimizer = make(30, variant=variant)
    function = Sparse(d=30)
    run_round(optimizer, function)
    run_round(optimizer, lambda x: math.nan)
    np.testing.assert_array_equal(optimizer.recommend().value, np.zeros(30))
    assert "not a number" in optimizer.last_round.skipped
    run_round(optimizer, function)
    assert optimizer.last_round.skipped == ""


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dimension", [1, 2, 30])
def test_constant_function_stays_put(variant, dimension):
    optimizer = make(dimension, variant=variant)
    for _ in range(30):
        run_round(optimizer, lambda x: 3.0)
    assert not optimizer.recommend().value.any()
    assert "equal" in optimizer.last_round.skipped


def test_gradient_beyond_the_limit_is_skipped():
    optimizer = make(30, variant="adaptive", max_gradient_norm=10.0)
    run_round(optimizer, lambda x: float(1e4 * x[0]))
    assert not optimizer.recommend().value.any()
    assert "max_gradient_norm" in optimizer.last_round.skipped
    run_round(optimizer, lambda x: float(5 * x[0]))
    assert optimizer.recommend().value[0] == pytest.approx(-0.5)


# -- the step --------------------------------------------------------------------------------


def schedule(completed):
    return 0.5 / (1 + completed)


def test_schedule_and_unit_gradients():
    optimizer = make(30, variant="adaptive", learning_rate=schedule, normalize=True)
    steps = []
    for _ in range(3):
        run_round(optimizer, lambda x: float(7 * x[3]))
        steps.append(optimizer.last_round.step)
    np.testing.assert_allclose(steps, [0.5, 0.25, 0.5 / 3])
    copied = pickle.loads(pickle.dumps(optimizer))
    for one in (copied, optimizer):
        run_round(one, lambda x: float(7 * x[3]))
    assert copied.last_round.step == optimizer.last_round.step == pytest.approx(0.5 / 4)
    np.testing.assert_array_equal(copied.recommend().value, optimizer.recommend().value)
    np.testing.assert_array_equal(copied.ask().value, optimizer.ask().value)


@pytest.mark.parametrize("variant", VARIANTS)
def test_iterates_stay_in_the_ball(variant):
    optimizer = make(30, variant=variant, radius=0.7, learning_rate=10.0)
    for _ in range(4):
        run_round(optimizer, Sparse(d=30, bend=0.0))
        assert np.linalg.norm(optimizer.recommend().value) <= 0.7 + 1e-12
    assert np.linalg.norm(optimizer.recommend().value) == pytest.approx(0.7)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", ["bouncing", "clipping", "constraint", "arctan"])
def test_bounds_hold_for_every_candidate_and_are_reached(variant, method):
    lower, upper = np.full(20, -1.0), np.full(20, 5.0)
    array = ng.p.Array(init=np.zeros(20)).set_bounds(lower, upper, method=method)
    optimizer = make(array, variant=variant, num_measurements=20, learning_rate=0.5)

    def function(x):
        assert np.all(x >= lower - 1e-12) and np.all(x <= upper + 1e-12)
        return float(3 * x[2] - 3 * x[5])

    for _ in range(60):
        run_round(optimizer, function)
    value = optimizer.recommend().value
    slack = 0.7 if method == "arctan" else 0.15
    assert value[2] == pytest.approx(-1, abs=slack) and value[5] == pytest.approx(5, abs=slack)


def test_sparse_gradient_is_found_at_a_bound():
    # Half of the perturbations of x[2] are cut; what was measured is what counts.
    array = ng.p.Array(init=np.zeros(60)).set_bounds(0.0, 6.0, method="clipping")
    optimizer = make(array, variant="adaptive", num_measurements=25)
    run_round(optimizer, lambda x: float(-3 * x[2] + 2 * x[9]))
    expected = np.zeros(60)
    expected[[2, 9]] = -3, 2
    np.testing.assert_allclose(optimizer.gradient, expected, atol=1e-6)


def below(x):
    return bool(x[0] <= 0.3)


def test_cheap_constraints_hold_and_do_not_stop_the_rounds():
    array = ng.p.Array(shape=(20,))
    array.register_cheap_constraint(below)
    optimizer = make(array, variant="adaptive")
    for _ in range(60):
        run_round(optimizer, lambda x: float((x[0] - 0.5) ** 2 + (x[1] + 0.8) ** 2))
        assert below(optimizer.recommend().value)
    # Steps are shortened, not bent: the boundary is reached, the optimum along it need not be.
    value = optimizer.recommend().value
    assert value[0] == pytest.approx(0.3, abs=1e-3) and value[1] < -0.3


def test_standardized_bounds():
    parametrization = ng.p.Dict(
        log=ng.p.Log(init=1.0, lower=0.1, upper=10.0),
        free=ng.p.Array(shape=(2,)),
        low=ng.p.Array(init=[1.0]).set_bounds(lower=0.0, method="clipping"),
    )
    lower, upper = standardized_bounds(parametrization)
    # In the order of the keys: free, log, low. Log's bounds are three sigma off.
    np.testing.assert_allclose(lower, [-np.inf, -np.inf, -3.0, -1.0])
    np.testing.assert_allclose(upper, [np.inf, np.inf, 3.0, np.inf])
    assert standardized_bounds(ng.p.Array(shape=(3,))) == (None, None)
    for bound in (lower, upper):
        data = np.where(np.isfinite(bound), bound, 0.0)
        child = parametrization.spawn_child().set_standardized_data(data)
        np.testing.assert_allclose(child.get_standardized_data(reference=parametrization), data)


def test_integer_variables():
    array = ng.p.Array(init=np.full(30, 20.0)).set_bounds(0, 60).set_integer_casting()
    optimizer = make(array, variant="adaptive", learning_rate=0.5)
    for _ in range(150):
        run_round(optimizer, lambda x: float((x[4] - 30) ** 2 + (x[9] - 12) ** 2) / 10)
    value = optimizer.recommend().value
    assert value.dtype.kind == "i"
    assert abs(value[4] - 30) <= 2 and abs(value[9] - 12) <= 2


def test_instrumentation_with_log_and_scalar():
    parametrization = ng.p.Instrumentation(
        ng.p.Array(shape=(12,)),
        rate=ng.p.Log(lower=1e-4, upper=1.0),
        width=ng.p.Scalar(init=1.0),
    )
    optimizer = make(parametrization, variant="adaptive", learning_rate=0.2)

    def function(x, rate, width):
        return (x[3] - 1) ** 2 + (math.log10(rate) + 1) ** 2 + (width - 2) ** 2

    for _ in range(300):
        run_round(optimizer, function)
    (x,), kwargs = optimizer.recommend().value
    assert x[3] == pytest.approx(1, abs=0.1)
    assert math.log10(kwargs["rate"]) == pytest.approx(-1, abs=0.1)
    assert kwargs["width"] == pytest.approx(2, abs=0.1)


# -- reports ---------------------------------------------------------------------------------


def test_support_is_reported_by_name_and_reaches_the_logs(caplog):
    parametrization = ng.p.Dict(
        pools=ng.p.Array(shape=(3, 4)), rate=ng.p.Scalar(), other=ng.p.Array(shape=(20,))
    )
    optimizer = make(parametrization, variant="adaptive", num_measurements=20)
    assert optimizer.last_round is None and optimizer.gradient is None
    optimizer.register_callback(
        "tell", ng.callbacks.OptimizationLogger(logger=logging.getLogger("t"))
    )
    with caplog.at_level(logging.INFO, logger="t"):
        run_round(optimizer, lambda v: float(3 * v["rate"] - v["pools"][2, 1]))
    assert len(caplog.records) == optimizer.evaluations_per_round
    report = optimizer.last_round
    assert list(report.support) == ["rate", "pools[2,1]"]
    assert report.number == optimizer.num_rounds == 1
    assert report.measurements == 21 and report.lost == 0
    assert report.perturbation == pytest.approx(0.1 * math.sqrt(33), rel=0.1)
    assert optimizer._info()["support"] == report.support
    assert coordinate_name(ng.p.Scalar(), 0) == "x[0]"
    with pytest.raises(IndexError, match="coordinate is 40"):
        coordinate_name(parametrization, 40)


def tracked(optimizer):
    """Entries of every collection that the optimizer, ours or Nevergrad's part, holds."""
    return {
        name: len(value) for name, value in vars(optimizer).items() if hasattr(value, "__len__")
    } | {"archive": len(optimizer.archive), "pickle": len(pickle.dumps(optimizer))}


@pytest.mark.parametrize("lose", [False, True])
def test_state_stays_bounded(lose):
    # Long after the archive's 1,000 points are full; benchmarks/congo_scaling.py goes on.
    optimizer = make(4, variant="adaptive", num_measurements=2)
    rng, sizes = np.random.default_rng(0), []
    for k in range(6000):
        candidate = optimizer.ask()
        if not lose or rng.random() < 0.7:
            optimizer.tell(candidate, float(candidate.value[1] + rng.standard_normal()))
        if k >= 2000 and k % 100 == 0:
            sizes.append(tracked(optimizer))
    assert optimizer.num_rounds > 1000
    for name in sizes[0]:
        early, late = (max(size[name] for size in half) for half in (sizes[:20], sizes[20:]))
        assert late <= 1.1 * early + 10, name


def test_archive_is_bounded_in_bytes():
    assert make(10**6, variant="adaptive").pruning.max_len * 16 * 10**6 <= 2**28


# -- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"variant": "Q"}, "variant is 'Q'"),
        ({"sparsity": 0}, "sparsity is 0"),
        ({"num_measurements": 0}, "num_measurements is 0"),
        ({"num_measurements": 2.5}, "num_measurements is 2.5"),
        ({"delta": 0.0}, "delta is 0.0"),
        ({"delta": math.nan}, "delta is nan"),
        ({"radius": -1.0}, "radius is -1.0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"max_gradient_norm": -1}, "max_gradient_norm is -1"),
        ({"num_perturbations": 3}, "only variant 'B'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ParametrizedCONGO(**options)


def test_sparsity_above_the_dimension():
    with pytest.raises(ValueError, match="sparsity is 9, above the dimension 8"):
        make(8, sparsity=9)


def test_one_measurement_of_many_variables():
    with pytest.raises(ValueError, match="num_measurements is 1 in dimension 8"):
        make(8, variant="adaptive", num_measurements=1)
    assert make(1, variant="adaptive", num_measurements=1).evaluations_per_round == 2


def test_two_measurements_still_descend():
    optimizer = make(3, variant="adaptive", num_measurements=2)
    for _ in range(200):
        run_round(optimizer, lambda x: float((x[1] - 1) ** 2))
    assert optimizer.recommend().value[1] == pytest.approx(1, abs=0.2)


def test_budget_below_one_round_warns_with_the_number():
    with pytest.warns(errors.InefficientSettingsWarning, match="takes 25 evaluations"):
        make(50, variant="adaptive", budget=24)


def test_loss_that_is_not_a_number_is_an_error():
    optimizer = make(5)
    with pytest.raises(TypeError, match="only supports float"):
        optimizer.tell(optimizer.ask(), "fast")


@pytest.mark.parametrize("start", ["x", "y", "z"])
def test_first_base_point_has_the_categories_of_the_start(start):
    knobs = ng.p.Dict(mode=ng.p.Choice(["x", "y", "z"]), on=ng.p.Choice([False, True]))
    knobs["mode"].value, knobs["on"].value = start, True
    optimizer = ng.optimizers.registry["CONGO"](knobs)
    assert optimizer.ask().value == {"mode": start, "on": True}
    assert optimizer.recommend().value == {"mode": start, "on": True}
