"""The checks that Nevergrad applies to every optimizer of its registry, on CONGO's four names."""

import warnings
from concurrent import futures

import nevergrad as ng
import numpy as np
import pytest
from nevergrad.common import errors, testing
from nevergrad.optimization import base

import trimtab.optimizers as package
from trimtab.optimizers import ParametrizedCONGO

NAMES = ["CONGO", "CONGO_B", "CONGO_Z", "CONGO_E"]
OPTIMUM = np.array([0.5, -0.8])


def sphere(x):
    return float(np.sum((np.asarray(x) - OPTIMUM) ** 2))


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
    assert repr(ParametrizedCONGO(variant="Z", sparsity=3)) == (
        "ParametrizedCONGO(sparsity=3, variant='Z')"
    )
    assert repr(ParametrizedCONGO().set_name("mine")) == "mine"


@pytest.mark.parametrize("name", NAMES)
def test_converges_on_a_simple_function(name):
    optimizer = make(name, budget=300, num_workers=2)
    assert isinstance(optimizer.provide_recommendation(), ng.p.Parameter)
    with testing.suppress_nevergrad_warnings():
        candidate = optimizer.minimize(sphere)
    np.testing.assert_array_almost_equal(candidate.value, OPTIMUM, decimal=1)
    archive = optimizer.archive
    assert optimizer.current_bests["pessimistic"].pessimistic_confidence_bound == min(
        v.pessimistic_confidence_bound for v in archive.values()
    )
    assert not optimizer._asked
    data = np.random.default_rng(0).normal(0, 1, size=optimizer.dimension)
    optimizer.tell(optimizer.parametrization.spawn_child().set_standardized_data(data), 12.0)
    assert optimizer.num_tell == 301 and optimizer.num_tell_not_asked == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", [1.1, -1.1])
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
def test_suggestion_is_recommended(name):
    with testing.suppress_nevergrad_warnings():
        optimizer = make(name, 4, 2)
    optimizer.suggest(np.array([12.0] * 4))
    candidate = optimizer.ask()
    optimizer.tell(candidate, 12)
    np.testing.assert_array_almost_equal(optimizer.recommend().value, [12.0] * 4)


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
    results = []
    for _ in range(2):
        np.random.random(3)  # noqa: NPY002  (the global generator must not matter)
        results.append(make(name, 12, 200, seed=3).minimize(lambda x: np.sum((x - 0.3) ** 2)).value)
    np.testing.assert_array_equal(*results)
    other = make(name, 12, 200, seed=4).minimize(lambda x: np.sum((x - 0.3) ** 2)).value
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
    assert optimizer.num_rounds > 20
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
