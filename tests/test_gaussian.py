"""The Gaussian chapter against projected gradient ascent, SciPy, autograd, quadrature and simulation."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize._trustregion_exact import IterativeSubproblem

from lib.theory import gaussian as gs
from lib.theory import training as at

seeds = st.integers(0, 2**31)


def problem(n, condition, seed, points=1):
    """A random Gaussian with data scale 1 and points drawn from it."""
    rng = np.random.default_rng([seed, n, int(condition)])
    covariance = gs.random_covariance(n, condition, 1.0, rng)
    gaussian = gs.from_covariance(rng.standard_normal(n), covariance)
    return gaussian, covariance, gs.sample(gaussian, points, rng), rng


# ---------------------------------------------------------------- likelihood and fit

@pytest.mark.parametrize("n", [1, 5, 50])
def test_log_prob_equals_scipy(n):
    gaussian, covariance, x, _ = problem(n, 100, 0, 7)
    expected = stats.multivariate_normal(gaussian.mean, covariance).logpdf(x)
    np.testing.assert_allclose(gs.log_prob(gaussian, x), expected, rtol=1e-11, atol=1e-10)


def test_fit_is_the_maximum_of_the_likelihood():
    _, _, x, rng = problem(4, 10, 1, 200)
    best = gs.fit(x)
    np.testing.assert_allclose(gs.covariance_of(best), np.cov(x.T, bias=True), rtol=1e-12, atol=1e-14)
    top = gs.log_prob(best, x).sum()
    for scale in (1e-3, 1e-1):
        for _ in range(20):
            shift = rng.standard_normal((4, 4)) * scale * gs.covariance_of(best).max() / 10
            worse = gs.from_covariance(best.mean + scale * rng.standard_normal(4),
                                       gs.covariance_of(best) + shift @ shift.T)
            assert gs.log_prob(worse, x).sum() < top


def test_random_covariance_has_the_condition_and_scale_asked_for():
    eigenvalues = np.linalg.eigvalsh(gs.random_covariance(6, 1e4, 3.0, np.random.default_rng(0)))
    assert eigenvalues[-1] / eigenvalues[0] == pytest.approx(1e4, rel=1e-8)
    assert eigenvalues[-1] == pytest.approx(9.0)


# ---------------------------------------------------------------- the optimal attack

@pytest.mark.parametrize("n", [2, 10, 100])
@pytest.mark.parametrize("condition", [1, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("epsilon", [1e-3, 1e-1, 1, 1e3])
@pytest.mark.parametrize("seed", [0, 1])
def test_attack_equals_the_best_of_100_restarts_of_projected_gradient_ascent(n, condition, epsilon, seed):
    gaussian, covariance, x, rng = problem(n, condition, seed)
    found = gs.attack(gaussian, x, epsilon)
    _, values = gs.projected_gradient(gaussian.mean, covariance, x[0], epsilon, 100, rng)
    assert gs.objective(gaussian, x, found.delta)[0] == pytest.approx(values.max(), rel=1e-8)
    assert np.linalg.norm(found.delta) == pytest.approx(epsilon, rel=1e-10)
    assert gs.kkt_residual(gaussian, x, found.delta, found.curvature)[0] < 1e-8


@pytest.mark.parametrize("n", [2, 10, 100])
@pytest.mark.parametrize("component", [10.0**-k for k in range(2, 13, 2)] + [1e-200, 0.0])
@pytest.mark.parametrize("epsilon", [0.1, 10.0])
def test_hard_and_near_hard_case(n, component, epsilon):
    # in the eigenbasis, where a component of 1e-12 along u_min is not drowned by the rounding of a rotation
    rng = np.random.default_rng(n)
    gaussian = gs.Gaussian(np.zeros(n), np.geomspace(1e-6, 1, n), np.eye(n))
    x = 0.1 * rng.standard_normal((1, n)) * np.sqrt(gaussian.eigenvalues)
    x[0, 0] = component
    found = gs.attack(gaussian, x, epsilon)
    _, values = gs.projected_gradient(gaussian.mean, np.diag(gaussian.eigenvalues), x[0], epsilon, 100, rng)
    assert gs.objective(gaussian, x, found.delta)[0] == pytest.approx(values.max(), rel=1e-8)
    assert np.linalg.norm(found.delta) == pytest.approx(epsilon, rel=1e-10)
    assert gs.kkt_residual(gaussian, x, found.delta, found.curvature)[0] < 1e-12


@pytest.mark.parametrize("condition", [1, 1e2, 1e6])
@pytest.mark.parametrize("epsilon", [1e-2, 1, 1e2])
def test_seven_iterations_are_enough(condition, epsilon, monkeypatch):
    monkeypatch.setattr(gs, "_ITERATIONS", 7)
    gaussian, _, x, _ = problem(100, condition, 10, 200)
    lengths = np.linalg.norm(gs.attack(gaussian, x, epsilon).delta, axis=1)
    np.testing.assert_allclose(lengths, epsilon, rtol=1e-10)


@pytest.mark.parametrize("component", [0.0, 1e-14, 1e-9, 1e-3])
@pytest.mark.parametrize("over", [-0.5, -1e-6, -1e-12, 1e-12, 1e-6, 0.5, 10])
def test_edge_of_the_hard_case(component, over, monkeypatch):
    # beside u_min the push at the pole has length 1 + over: just too short, or just too long, for epsilon = 1
    monkeypatch.setattr(gs, "_ITERATIONS", 32)
    gaussian = gs.Gaussian(np.zeros(5), np.geomspace(1 / 50, 1, 5), np.eye(5))
    rest = np.random.default_rng(0).standard_normal(4)
    rest *= (1 + over) / np.linalg.norm(rest / (50 * gaussian.eigenvalues[1:] - 1))
    x = np.r_[component, rest][None]
    found = gs.attack(gaussian, x, 1.0)
    assert np.linalg.norm(found.delta) == pytest.approx(1, rel=1e-10)
    assert gs.kkt_residual(gaussian, x, found.delta, found.curvature)[0] < 1e-12
    assert (found.curvature[0] == 0) == (component == 0 and over < 0)


def test_hard_case_of_the_ledger():
    gaussian = gs.from_covariance(np.zeros(3), np.diag([4, 1, 0.25]))
    found = gs.attack(gaussian, [0.3, 0.2, 0.0], 1.0)
    assert found.curvature == 0
    np.testing.assert_allclose(np.abs(found.delta), [0.02, 0.2 / 3, 0.997574], atol=1e-6)
    assert gs.objective(gaussian, [0.3, 0.2, 0.0], found.delta) == pytest.approx(2.0386666666666)


@given(n=st.integers(1, 12), condition=st.floats(0, 6), epsilon=st.floats(-3, 3), component=st.floats(-15, 1),
       seed=seeds)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_attack_meets_the_conditions_of_global_optimality(n, condition, epsilon, component, seed):
    # stationary, on the sphere, and -K^-1 + 2 eta I not negative: necessary and sufficient for a trust region
    rng = np.random.default_rng(seed)
    gaussian = gs.Gaussian(np.zeros(n), np.geomspace(10**-condition, 1, n), np.eye(n))
    x = rng.standard_normal((3, n)) * np.sqrt(gaussian.eigenvalues)
    x[:, 0] *= 10**component
    found = gs.attack(gaussian, x, 10**epsilon)
    np.testing.assert_allclose(np.linalg.norm(found.delta, axis=1), 10**epsilon, rtol=1e-10)
    assert (gs.kkt_residual(gaussian, x, found.delta, found.curvature) < 1e-8).all()
    assert (found.curvature >= 0).all()
    difference = gs.log_prob(gaussian, x) - gs.log_prob(gaussian, x + found.delta)
    np.testing.assert_allclose(found.drop, difference, rtol=1e-8, atol=1e-9)


@given(n=st.integers(2, 8), repeated=st.integers(2, 8), epsilon=st.floats(-2, 2), seed=seeds)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_repeated_smallest_eigenvalue(n, repeated, epsilon, seed):
    rng = np.random.default_rng(seed)
    eigenvalues = np.sort(np.r_[np.full(min(repeated, n), 0.1), 1 + rng.random(max(n - repeated, 0))])
    gaussian = gs.Gaussian(np.zeros(n), eigenvalues, np.eye(n))
    x = rng.standard_normal(n) * (rng.random(n) < 0.5)
    found = gs.attack(gaussian, x, 10**epsilon)
    _, values = gs.projected_gradient(gaussian.mean, np.diag(eigenvalues), x, 10**epsilon, 30, rng)
    assert gs.objective(gaussian, x, found.delta) == pytest.approx(values.max(), rel=1e-8)


@pytest.mark.parametrize("n", [2, 10, 100])
@pytest.mark.parametrize("epsilon", [1e-2, 1.0, 1e2])
def test_attack_equals_scipys_trust_region_solver(n, epsilon):
    gaussian, covariance, x, _ = problem(n, 1e3, 3)
    precision = np.linalg.inv(covariance)
    z = x[0] - gaussian.mean
    solver = IterativeSubproblem(np.zeros(n), fun=lambda d: 0.0, jac=lambda d: -precision @ z,
                                 hess=lambda d: -precision, k_easy=1e-12, k_hard=1e-12)
    delta, _ = solver.solve(epsilon)
    assert np.linalg.norm(delta) == pytest.approx(epsilon, rel=1e-8)
    ours = gs.attack(gaussian, x[0], epsilon).delta
    assert gs.objective(gaussian, x[0], ours) == pytest.approx(gs.objective(gaussian, x[0], delta), rel=1e-8)


def test_every_other_root_is_stationary_and_weaker():
    gaussian, _, x, _ = problem(10, 50, 4, 5)
    count = 0
    for point in x:
        eta, delta = gs.stationary_points(gaussian, point, 0.5)
        curvature = 2 * eta * gaussian.eigenvalues[0] - 1
        many = np.broadcast_to(point, delta.shape)
        assert (gs.kkt_residual(gaussian, many, delta, curvature) < 1e-8).all()
        np.testing.assert_allclose(np.linalg.norm(delta, axis=1), 0.5, rtol=1e-8)
        found = gs.attack(gaussian, point, 0.5)
        np.testing.assert_allclose(curvature[-1], found.curvature, rtol=1e-6)
        np.testing.assert_allclose(delta[-1], found.delta, rtol=1e-5, atol=1e-8)
        values = gs.objective(gaussian, point, delta)
        assert (curvature[:-1] < 0).all() and (values[:-1] < values[-1]).all()
        count += len(eta)
    assert count > 2 * len(x)      # the printed equation alone has more roots than the theorem says


@given(component=st.floats(1e-3, 1e3), epsilon=st.floats(1e-3, 1e3))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_one_used_coordinate_has_two_roots(component, epsilon):
    # |c| / |1 - 2 eta lambda| = epsilon on either side of the pole, the other coordinates of x - mu being 0
    eta, delta = gs.stationary_points(gs.Gaussian(np.zeros(3), np.array([0.5, 1, 2]), np.eye(3)),
                                      [0.0, component, 0.0], epsilon)
    ratio = component / epsilon
    np.testing.assert_allclose(2 * eta, [1 - ratio, 1 + ratio], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(delta, axis=1), epsilon, rtol=1e-6)


def test_gradient_of_the_lagrangian_by_autograd():
    gaussian, covariance, x, rng = problem(6, 30, 5)
    precision, z = torch.tensor(np.linalg.inv(covariance)), torch.tensor(x[0] - gaussian.mean)
    delta = torch.tensor(gs.attack(gaussian, x[0], 0.7).delta, requires_grad=True)
    eta = (1 + gs.attack(gaussian, x[0], 0.7).curvature) / (2 * gaussian.eigenvalues[0])
    lagrangian = -0.5 * (z + delta) @ precision @ (z + delta) + eta * (delta @ delta - 0.7**2)
    lagrangian.backward()
    assert delta.grad.norm() < 1e-9 * (precision @ z).norm()


@pytest.mark.parametrize("n", [1, 2, 10, 100])
def test_spherical_attack_is_a_step_away_from_the_mean(n):
    rng = np.random.default_rng(n)
    mean, x = rng.standard_normal(n), rng.standard_normal((5, n)) * 3
    found = gs.attack(gs.spherical(mean, 1.69), x, 0.7)
    np.testing.assert_allclose(found.delta, gs.attack_spherical(mean, x, 0.7), atol=1e-12)
    expected = at.drop_at(np.linalg.norm(x - mean, axis=1), 0.7, 1.69)
    np.testing.assert_allclose(found.drop, expected, rtol=1e-12)


def test_attack_at_the_mean_and_universal_attack():
    gaussian, covariance, _, rng = problem(6, 20, 6)
    at_mean, universal = gs.attack(gaussian, gaussian.mean, 0.4), gs.attack_universal(gaussian, 0.4)
    np.testing.assert_allclose(np.abs(at_mean.delta @ universal), 0.4**2, rtol=1e-12)
    assert at_mean.drop == pytest.approx(0.4**2 / (2 * gaussian.eigenvalues[0]))
    delta, values = gs.projected_gradient(gaussian.mean, covariance, gaussian.mean, 0.4, 20, rng)
    assert values.max() == pytest.approx(at_mean.drop, rel=1e-8)
    assert set(np.sign(delta @ universal)) == {-1.0, 1.0}


def test_a_batch_gives_what_single_points_give():
    gaussian, _, x, _ = problem(300, 100, 7, 1000)     # several chunks
    before = x.copy()
    together = gs.attack(gaussian, x, 0.5)
    for i in (0, 436, 437, 999):
        alone = gs.attack(gaussian, x[i], 0.5)
        np.testing.assert_allclose(together.delta[i], alone.delta, rtol=1e-9, atol=1e-12)
        assert together.drop[i] == pytest.approx(alone.drop, rel=1e-10)
    np.testing.assert_array_equal(x, before)


def test_epsilon_zero_changes_nothing():
    gaussian, _, x, _ = problem(3, 10, 8, 2)
    found = gs.attack(gaussian, x, 0.0)
    assert not found.delta.any() and not found.drop.any() and np.isinf(found.curvature).all()


# ---------------------------------------------------------------- adversarial training

@pytest.mark.parametrize("n", [1, 2, 10, 100])
@pytest.mark.parametrize("ratio", [0.1, 1.0, 4.0])
def test_growth_and_sensitivity_equal_quadrature(n, ratio):
    second = stats.chi(n).expect(lambda r: (r + ratio)**2, epsabs=1e-13, epsrel=1e-12)
    assert at.growth(n, ratio) == pytest.approx(second / n - 1, rel=1e-9)
    assert at.sensitivity(n, ratio, 1.7) == pytest.approx((second - n) / (2 * 1.7), rel=1e-9)
    log_prob = stats.chi(n).expect(lambda r: -n / 2 * np.log(2 * np.pi * 4 * 1.7) - r**2 / (2 * 1.7))
    assert at.natural_log_prob(n, 2.0, 1.7) == pytest.approx(log_prob, rel=1e-8)
    attacked = log_prob - (second - n) / 3.4
    assert at.adversarial_log_prob(n, 2.0, ratio, 1.7) == pytest.approx(attacked, rel=1e-8)


def test_mean_chi_does_not_overflow():
    assert at.mean_chi(1) == pytest.approx(np.sqrt(2 / np.pi))
    assert at.mean_chi(10**6) == pytest.approx(1000 * (1 - 1 / (4 * 10**6)), rel=1e-8)


@pytest.mark.parametrize("reading", at.READINGS)
def test_closed_form_of_each_reading_equals_its_simulation(reading):
    rng = np.random.default_rng(0)
    samples = 3 + 2 * rng.standard_normal((20_000, 10))
    models, attacked = at.adversarial_training(samples, 1.0, 5, reading, rng, gs.fit_spherical)
    variances = [model.eigenvalues[0] / 4 for model in models]
    np.testing.assert_allclose(variances, at.factor(reading, 5, 10, 0.5), rtol=0.015)
    assert np.square(attacked - attacked.mean(0)).mean() == pytest.approx(models[-1].eigenvalues[0])
    assert np.abs(models[-1].mean - 3).max() < 0.15


def test_the_four_readings_differ():
    last = {r: at.factor(r, 5, 10, 0.5)[-1] for r in at.READINGS}
    assert last["a"] < last["c"] < last["b"] < last["d"]
    assert last["d"] == pytest.approx((1 + at.growth(10, 0.5))**5)


def test_clean_data_training_oscillates_for_a_general_covariance():
    rng = np.random.default_rng(0)
    _, _, x, _ = problem(10, 100, 9, 10_000)
    models, _ = at.adversarial_training(x, 0.5, 4, "a", rng)
    drop = np.array([gs.attack(model, x, 0.5).drop.mean() for model in models])
    assert drop[2] > 1.5 * drop[1] and drop[2] > 1.2 * drop[3]


def test_natural_drop_is_a_kl_divergence():
    factors = at.factor("d", 10, 7, 0.3)
    q = stats.norm(0, np.sqrt(factors[4]))
    kl = stats.norm.expect(lambda z: stats.norm.logpdf(z) - q.logpdf(z))
    assert at.natural_drop(7, factors[4]) == pytest.approx(7 * kl, rel=1e-8)
    assert (np.diff(at.natural_drop(7, factors)) > 0).all()
    assert (np.diff(at.sensitivity(7, 0.3, factors)) < 0).all()


@given(n=st.sampled_from([1, 2, 10, 100]), sigma=st.floats(0.1, 10), epsilon=st.floats(0.01, 10),
       drop=st.floats(0.01, 10), gamma=st.floats(1e-6, 0.99))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_theorem_3_2_covers(n, sigma, epsilon, drop, gamma):
    needed = at.needed_variance(sigma, epsilon, drop, at.bound_quantile(n, gamma))
    alpha = at.growth(n, epsilon / sigma)
    grown = sigma**2 * (1 + alpha)**at.steps_growing(needed, sigma, alpha)
    assert at.coverage(n, sigma, epsilon, grown * (1 + 1e-12), drop) >= 1 - gamma
    # attacking the data again for the corrected number of steps reaches at least the same variance
    steps = at.steps_again(needed, sigma, epsilon, n)
    assert sigma**2 * (1 + at.growth(n, steps * epsilon / sigma)) >= needed * (1 - 1e-8)


def test_coverage_equals_simulation():
    rng = np.random.default_rng(1)
    distance = 2 * np.linalg.norm(rng.standard_normal((100_000, 10)), axis=1)
    share = (at.drop_at(distance, 0.5, 6.0) < 0.6).mean()
    assert 0.05 < share < 0.95
    assert at.coverage(10, 2.0, 0.5, 6.0, 0.6) == pytest.approx(share, abs=0.006)


def test_chi2_tail_and_lemma():
    n, t = np.array([1, 2, 3, 5, 10, 50, 100, 1000])[:, None], np.linspace(1.001, 20, 40)
    tail = at.log_chi2_tail(n, np.maximum(2 * t * n, n + 2))
    seen = stats.chi2.logsf(np.maximum(2 * t * n, n + 2), n)
    np.testing.assert_allclose(tail[seen > -600], seen[seen > -600], rtol=1e-12, atol=1e-12)
    assert np.isfinite(tail).all() and np.isinf(seen).any()      # scipy underflows where ours does not
    assert (at.log_chi2_tail(n, 2 * t * n) <= -t * n / 10).all()


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("call, message", [
    (lambda g: gs.attack(g, np.zeros(2), -1), "epsilon must be >= 0 and finite"),
    (lambda g: gs.attack(g, np.zeros(2), np.nan), "epsilon must be >= 0 and finite"),
    (lambda g: gs.attack(g, np.zeros(2), np.inf), "epsilon must be >= 0 and finite"),
    (lambda g: gs.attack(g, np.zeros(3), 1), "x must have shape .* n = 2, got \\(3,\\)"),
    (lambda g: gs.attack(g, [np.nan, 0], 1), "x must be finite"),
    (lambda g: gs.log_prob(g, np.zeros((1, 1, 2))), "x must have shape"),
    (lambda g: gs.attack_universal(g, -1), "epsilon must be >= 0"),
    (lambda g: gs.attack_spherical(g.mean, g.mean, 1), "x must differ from the mean"),
    (lambda g: gs.from_covariance(np.zeros(2), np.eye(3)), "covariance must be \\(n, n\\)"),
    (lambda g: gs.from_covariance(np.zeros(2), [[1, 2], [0, 1]]), "covariance must be symmetric"),
    (lambda g: gs.from_covariance(np.zeros(2), [[1, 2], [2, 1]]), "covariance must be positive definite"),
    (lambda g: gs.from_covariance(np.zeros(2), [[1, np.inf], [np.inf, 1]]), "must be finite"),
    (lambda g: gs.spherical(np.zeros(2), 0), "variance must be > 0"),
    (lambda g: gs.random_covariance(2, 0.5, 1, np.random.default_rng(0)), "condition must be >= 1"),
    (lambda g: gs.fit(np.zeros((2, 2))), "samples must have shape \\(N, n\\) with N > n"),
    (lambda g: at.factor("e", 3, 2, 1), "reading must be one of a, b, c, d, got 'e'"),
    (lambda g: at.adversarial_training(np.zeros((9, 2)), 1, 1, "x", None), "reading must be one of"),
    (lambda g: at.growth(0, 1), "n must be an integer >= 1, got 0"),
    (lambda g: at.bound_quantile(2, 1.0), "gamma must be in \\(0, 1\\), got 1.0"),
    (lambda g: at.needed_variance(1, 1, 0, 2), "drop must be > 0"),
])
def test_bad_input_gets_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(gs.spherical(np.zeros(2), 1.0))
    assert "\n" not in str(caught.value)
