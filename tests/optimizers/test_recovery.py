"""Recovery against exact solutions, scikit-learn's OMP and linear programming."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from sklearn.linear_model import OrthogonalMatchingPursuit

from trimtab.optimizers.recovery import basis_pursuit, cosamp, sparse_regression


def instance(seed, m, d, s, noise=0.0):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((m, d))
    x = np.zeros(d)
    support = np.sort(rng.choice(d, s, replace=False))
    x[support] = rng.choice([-1.0, 1.0], s) * rng.uniform(0.5, 2.0, s)
    return a, x, a @ x + noise * rng.standard_normal(m), support


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), s=st.integers(1, 4))
def test_exact_recovery_without_noise(seed, s):
    a, x, y, _ = instance(seed, 40, 80, s)
    np.testing.assert_allclose(cosamp(a, y, s).dense(80), x, atol=1e-9)
    np.testing.assert_allclose(basis_pursuit(a, y).dense(80), x, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), s=st.integers(1, 5))
def test_cosamp_fits_no_worse_than_omp(seed, s):
    a, _, y, _ = instance(seed, 40, 80, s, noise=0.05)
    omp = OrthogonalMatchingPursuit(n_nonzero_coefs=s, fit_intercept=False).fit(a, y)
    found = cosamp(a, y, s)
    assert found.residual <= np.linalg.norm(y - a @ omp.coef_) * 1.05
    assert found.residual == pytest.approx(np.linalg.norm(y - a @ found.dense(80)))


def test_cosamp_fails_less_often_than_omp():
    misses = {"cosamp": 0, "omp": 0}
    for seed in range(60):
        a, _, y, support = instance(seed, 47, 100, 10)
        omp = OrthogonalMatchingPursuit(n_nonzero_coefs=10, fit_intercept=False).fit(a, y)
        misses["omp"] += not np.array_equal(np.flatnonzero(omp.coef_), support)
        misses["cosamp"] += not np.array_equal(cosamp(a, y, 10).support, support)
    assert misses["cosamp"] <= misses["omp"]
    assert misses["cosamp"] <= 3


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), s=st.integers(1, 12))
def test_basis_pursuit_reaches_the_linear_program(seed, s):
    # Also where the sparse vector is not the solution: s is up to m.
    a, _, y, _ = instance(seed, 12, 30, s)
    program = linprog(np.ones(60), A_eq=np.hstack([a, -a]), b_eq=y)
    found = basis_pursuit(a, y, max_iterations=50_000)
    assert found.residual <= 1e-3 * np.linalg.norm(y)
    assert np.abs(found.coefficients).sum() == pytest.approx(program.fun, rel=1e-3)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.05, 0.3])
def test_bounded_error_meets_the_optimality_conditions(seed, share):
    a, _, y, _ = instance(seed, 30, 60, 4, noise=0.1)
    error = share * np.linalg.norm(y)
    found = basis_pursuit(a, y, error)
    assert found.residual == pytest.approx(error, rel=1e-4)
    dual = (y - a @ found.dense(60)) @ a
    largest = np.abs(dual).max()
    # The residual is equally, and most, correlated with exactly the columns of the support.
    signs = np.sign(found.coefficients)
    np.testing.assert_allclose(dual[found.support], largest * signs, rtol=1e-3)


def test_basis_pursuit_at_ten_thousand_dimensions():
    a, x, y, _ = instance(0, 139, 10_000, 10)
    assert np.linalg.norm(basis_pursuit(a, y).dense(10_000) - x) < 1e-6 * np.linalg.norm(x)


def test_error_above_the_measurements_gives_zero():
    a, _, y, _ = instance(0, 10, 20, 2)
    assert not basis_pursuit(a, y, 2 * np.linalg.norm(y)).support.size


@pytest.mark.parametrize("recover", [lambda a, y: cosamp(a, y, 2), basis_pursuit])
def test_zero_measurements_give_zero(recover):
    found = recover(np.eye(3, 5), np.zeros(3))
    assert not found.dense(5).any() and found.residual == 0


@pytest.mark.parametrize("m, d, s", [(3, 1, 1), (5, 4, 3), (4, 4, 4), (2, 9, 6), (8, 15, 6)])
def test_cosamp_outside_its_theory_is_finite_and_fits(m, d, s):
    # d <= 2 s, m >= d, and 2 s > m.
    a, x, y, _ = instance(1, m, d, s)
    found = cosamp(a, y, s)
    assert found.support.size <= s and np.isfinite(found.coefficients).all()
    assert found.residual <= np.linalg.norm(y)
    if m >= d:
        np.testing.assert_allclose(found.dense(d), x, atol=1e-9)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: cosamp(np.ones((3, 4)), np.ones(3), 0), "sparsity is 0"),
        (lambda: cosamp(np.ones((3, 4)), np.ones(3), 5), "d = 4"),
        (lambda: cosamp(np.ones((3, 4)), np.ones(2), 1), r"\(2,\)"),
        (lambda: cosamp(np.ones((3, 4)), np.array([1, np.nan, 1]), 1), "finite"),
        (lambda: basis_pursuit(np.ones((3, 4)), np.ones(3), -1.0), "error is -1.0"),
        (lambda: basis_pursuit(np.full((3, 4), np.inf), np.ones(3)), "finite"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_unknown_sparsity_is_found():
    for seed in range(20):
        s = 1 + seed % 6
        a, x, y, support = instance(seed, 40, 100, s, noise=0.02)
        mean, inclusion = sparse_regression(a, y, 100)
        assert np.array_equal(np.flatnonzero(inclusion > 0.5), support)
        assert np.linalg.norm(mean - x) < 0.1


def test_intercept_takes_one_degree_of_freedom():
    # Centred measurements hold as much as their n - 1 coordinates in an orthonormal basis.
    rng = np.random.default_rng(1)
    a, y = rng.standard_normal((9, 12)), rng.standard_normal(9)
    y += 2 * a[:, 3]
    a, y = a - a.mean(axis=0), y - y.mean()
    contrasts = np.linalg.svd(np.eye(9) - 1 / 9)[0][:, :8].T
    for with_intercept, without in zip(
        sparse_regression(a, y, 12, intercept=True),
        sparse_regression(contrasts @ a, contrasts @ y, 12),
    ):
        np.testing.assert_allclose(with_intercept, without, atol=1e-9)


def test_support_that_greedy_search_misses_is_found():
    # 12 measurements, 5 of 50 entries: a support that fits exactly is all but certainly the one.
    found = greedy = 0
    for seed in range(20):
        a, _, y, support = instance(seed, 12, 50, 5)
        _, inclusion = sparse_regression(a, y, 50)
        found += np.array_equal(np.flatnonzero(inclusion > 0.5), support)
        omp = OrthogonalMatchingPursuit(n_nonzero_coefs=5, fit_intercept=False).fit(a, y)
        greedy += np.array_equal(np.flatnonzero(omp.coef_), support)
    assert found >= 12 > 2 * greedy


def test_pure_noise_is_left_unexplained():
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(30):
        a, y = rng.standard_normal((24, 50)), rng.standard_normal(24)
        mean, _ = sparse_regression(a, y, 50)
        shares.append(np.linalg.norm(a @ mean) / np.linalg.norm(y))
    least_squares_would_explain = 1.0
    assert np.median(shares) < 0.3 * least_squares_would_explain


def test_single_column_matches_the_closed_form():
    # One candidate: the posterior mean is the shrunk fit times the posterior probability.
    rng = np.random.default_rng(3)
    column = rng.standard_normal(12)
    y = 0.8 * column + 0.5 * rng.standard_normal(12)
    mean, inclusion = sparse_regression(column[:, None], y, 1, free=1)
    fit = column @ y / (column @ column)
    r2 = fit**2 * (column @ column) / (y @ y)
    g = max(r2 / ((1 - r2) / 11) - 1, 0)
    # Bayes factor by numerical integration over the precision, with the slope integrated out:
    # y | phi ~ N(0, (I + g P) / phi), p(phi) = 1 / phi.
    phi = np.exp(np.linspace(-12, 12, 20001))

    def log_marginal(quadratic, log_det):
        values = 6 * np.log(phi) - 0.5 * phi * quadratic - 0.5 * log_det
        return np.log(np.sum(np.exp(values - values.max()))) + values.max()

    model = log_marginal((y @ y) * (1 - r2 * g / (1 + g)), np.log1p(g))
    odds = np.exp(model - log_marginal(y @ y, 0.0))
    assert inclusion[0] == pytest.approx(odds / (1 + odds), rel=1e-3)
    assert mean[0] == pytest.approx(odds / (1 + odds) * fit * g / (1 + g), rel=1e-3)
