"""The checks that Nevergrad applies to every optimizer of its registry, on CONGO's four names.

Its own test functions where they take a name; their bodies where they skip most names at random.
"""

import warnings
from concurrent import futures

import nevergrad as ng
import numpy as np
import pytest
from nevergrad.common import errors, testing
from nevergrad.optimization import base, test_optimizerlib, test_suggest

import trimtab.optimizers as package
from trimtab.optimizers import ParametrizedCONGO

NAMES = ["CONGO", "CONGO_B", "CONGO_Z", "CONGO_E"]


def buggy(x):
    if any(x[::2] > 0.0):
        return float("nan")
    if any(x > 0.0):
        return float("inf")
    return np.sum(x**2)


def make(name, parametrization=2, budget=None, num_workers=1, seed=0):
    optimizer = ng.optimizers.registry[name](parametrization, budget, num_workers)
    optimizer.parametrization.random_state.seed(seed)
    return optimizer


@pytest.mark.parametrize("name", NAMES)
def test_registration(name):
    configured = ng.optimizers.registry[name]
    assert configured is getattr(package, name)
    assert configured.__class__(**configured._config) == configured
    optimizer = make(name)
    assert optimizer.name == name and name in repr(optimizer)
    assert not (configured.no_parallelization or configured.one_shot or configured.recast)


def test_family_repr():
    assert repr(ParametrizedCONGO()) == "ParametrizedCONGO()"
    assert ParametrizedCONGO()._config == package.CONGO._config  # the default is what is registered
    assert repr(ParametrizedCONGO(variant="Z", sparsity=3)) == (
        "ParametrizedCONGO(sparsity=3, variant='Z')"
    )
    assert repr(ParametrizedCONGO().set_name("mine")) == "mine"


@pytest.mark.parametrize("name", NAMES)
def test_nevergrads_convergence_check(name):
    # What its test_optimizers does, but for looking the name up among its own modules: the sphere
    # in 300 evaluations by 2 workers, the archive's best, a point told that was never asked.
    np.random.seed(0)  # noqa: NPY002  (what it draws its optimizers' seeds from)
    test_optimizerlib.check_optimizer(ng.optimizers.registry[name], budget=300)


@pytest.mark.parametrize("name", NAMES)
def test_nevergrads_pickle_check(name):
    test_optimizerlib.test_optim_pickle(name)


@pytest.mark.parametrize("name", NAMES)
def test_nevergrads_suggestion_check(name):
    test_suggest.test_optimizers_suggest(name)


@pytest.mark.parametrize("name", NAMES)
def test_nevergrads_offset_check(name):
    # test_parametrization_offset skips three names of four; this is its body.
    parametrization = ng.p.Instrumentation(ng.p.Array(init=[1e12, 1e12]))
    optimizer = make(name, parametrization, 100)
    for _ in range(10):
        candidate = optimizer.ask()
        assert candidate.args[0][0] > 100
        optimizer.tell(candidate, 0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "lower, upper, target, least, most",
    [(0.0, 1.0, 1.1, 0.94, 1.01), (-0.3, 0.3, -1.1, -0.31, -0.24)],
)
def test_nevergrads_bounded_minimal_case(name, lower, upper, target, least, most):
    # The second half of its test_optimizers_minimal, which skips names that contain "NGO".
    parametrization = ng.p.Scalar(lower=lower, upper=upper)
    value = make(name, parametrization, 100).minimize(lambda x: (x - target) ** 2).value
    assert least < value < most


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", [1.1, -1.1])  # the first half of test_optimizers_minimal
def test_converges_in_one_dimension(name, target):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", errors.InefficientSettingsWarning)
        optimizer = make(name, 1, 100)
    value = optimizer.minimize(lambda x: sum((x - target) ** 2)).value
    assert abs(value[0] - target) < 0.06


@pytest.mark.parametrize("name", NAMES)
@testing.suppress_nevergrad_warnings()
def test_infinite_and_nan_losses(name):
    recommendation = make(name, 2, 70).minimize(buggy)
    assert buggy(recommendation.value) < 2.0


@pytest.mark.parametrize("name", NAMES)
def test_optimum_given_as_suggestion_is_kept(name):
    parametrization = ng.p.Array(shape=(100,)).set_bounds(0.0, 1.0).set_integer_casting()
    suggestion = np.asarray([0] * 17 + [1] * 17 + [0] * 66)
    with testing.suppress_nevergrad_warnings():
        optimizer = make(name, parametrization, 7)
    optimizer.suggest(suggestion)
    optimizer.minimize(lambda x: 0 if np.all(np.asarray(x, dtype=int) == suggestion) else 1)
    assert np.all(optimizer.recommend().value == suggestion)


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_run(name):
    def function(x):  # whose gradient no round finds exactly, or all seeds would agree
        return float(np.sum(np.abs(x - np.linspace(0, 1, 12)) ** 3))

    results = []
    for _ in range(2):
        np.random.random(3)  # noqa: NPY002  (the global generator must not matter)
        results.append(make(name, 12, 200, seed=3).minimize(function).value)
    np.testing.assert_array_equal(*results)
    other = make(name, 12, 200, seed=4).minimize(function).value
    assert np.any(other != results[0])


@pytest.mark.parametrize("name", NAMES)
def test_dump_and_load_in_the_middle_of_a_round_continue_exactly(name, tmp_path):
    def advance(optimizer, count):
        for _ in range(count):
            candidate = optimizer.ask()
            optimizer.tell(candidate, float(np.sum((candidate.value - 0.3) ** 2)))

    optimizer = make(name, 12)
    advance(optimizer, 3 * optimizer.evaluations_per_round + 2)
    out = [optimizer.ask() for _ in range(3)]
    optimizer.dump(tmp_path / "optimizer.pkl")
    loaded = ng.optimizers.registry[name].load(tmp_path / "optimizer.pkl")
    for each in (optimizer, loaded):
        for candidate in out:
            each.tell(candidate, float(np.sum((candidate.value - 0.3) ** 2)))
        advance(each, 100)
    assert loaded.num_rounds == optimizer.num_rounds > 3
    np.testing.assert_array_equal(loaded.recommend().value, optimizer.recommend().value)
    np.testing.assert_array_equal(loaded.ask().value, optimizer.ask().value)
    assert loaded.last_round == optimizer.last_round
    assert isinstance(base.load(base.Optimizer, tmp_path / "optimizer.pkl"), type(optimizer))


def cost(x):
    return float((x[3] - 1) ** 2 + (x[11] + 1) ** 2)


def check_concurrent(executor):
    optimizer = make("CONGO", 40, 800, num_workers=4)
    recommendation = optimizer.minimize(cost, executor=executor)
    assert (
        optimizer.num_rounds > 10
    )  # of 36, where no answer comes late, as many do on a busy machine
    assert cost(recommendation.value) < 0.05


def test_minimize_on_threads():
    with futures.ThreadPoolExecutor(4) as executor:
        check_concurrent(executor)


def test_minimize_on_processes():
    with futures.ProcessPoolExecutor(2) as executor:
        check_concurrent(executor)


def test_minimize_on_dask():
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        check_concurrent(client)
