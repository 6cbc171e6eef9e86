"""Speed of the optimal attack on a Gaussian, beside projected gradient ascent and SciPy's direct solver.

``make benchmarks`` runs it, ``make test`` does not.
It asserts that all three are equally accurate, never a time.
"""
from time import perf_counter

import numpy as np
import pytest
from scipy.optimize._trustregion_exact import IterativeSubproblem

from lib.theory import gaussian as gs

SAMPLES, CONDITION, ACCURACY = 1000, 100.0, 1e-8
DIRECT = 20           # samples for SciPy's solver, whose time is scaled to SAMPLES


def problem(n):
    rng = np.random.default_rng(n)
    covariance = gs.random_covariance(n, CONDITION, 1.0, rng)
    gaussian = gs.from_covariance(rng.standard_normal(n), covariance)
    return gaussian, np.linalg.inv(covariance), gs.sample(gaussian, SAMPLES, rng)


def ascend(precision, z, epsilon, goal):
    """Projected gradient ascent for all points at once, from the outward push, until ACCURACY near `goal`."""
    delta = epsilon * z / np.linalg.norm(z, axis=1, keepdims=True)
    for steps in range(1, 100_000):
        gradient = (z + delta) @ precision
        value = 0.5 * np.einsum("ij,ij->i", z + delta, gradient)
        if (value >= goal * (1 - ACCURACY)).all():
            return value, steps
        # the limit of a long step: a convex function on a sphere rises along its whole gradient
        delta = epsilon * gradient / np.linalg.norm(gradient, axis=1, keepdims=True)
    raise AssertionError("projected gradient ascent has not reached the accuracy of the closed form")


def solve_directly(precision, z, epsilon):
    """SciPy's trust-region solver (Cholesky factors) for one point."""
    solver = IterativeSubproblem(np.zeros(len(z)), fun=lambda d: 0.0, jac=lambda d: -precision @ z,
                                 hess=lambda d: -precision, k_easy=1e-12, k_hard=1e-12)
    delta, _ = solver.solve(epsilon)
    return 0.5 * (z + delta) @ precision @ (z + delta)


def timed(function, *arguments):
    start = perf_counter()
    result = function(*arguments)
    return result, perf_counter() - start


@pytest.mark.parametrize("epsilon", [1.0, 10.0])      # well below the size of x - mu, about 15, and near it
def test_attack_beside_its_rivals(epsilon, benchmark, capsys):
    gaussian, precision, x = problem(1000)
    z = x - gaussian.mean
    found = benchmark.pedantic(gs.attack, (gaussian, x, epsilon), rounds=3, warmup_rounds=1)
    _, ours = timed(gs.attack, gaussian, x, epsilon)
    reached = gs.objective(gaussian, x, found.delta)
    (ascended, steps), ascent = timed(ascend, precision, z, epsilon, reached)
    direct, some = timed(lambda: [solve_directly(precision, point, epsilon) for point in z[:DIRECT]])
    np.testing.assert_allclose(ascended, reached, rtol=2 * ACCURACY)
    np.testing.assert_allclose(direct, reached[:DIRECT], rtol=ACCURACY)
    with capsys.disabled():
        scaled = some * SAMPLES / DIRECT
        print(f"\n{SAMPLES} samples, n = {len(z[0])}, condition {CONDITION:g}, epsilon {epsilon:g}"
              f"\n  closed form                {ours:8.3f} s"
              f"\n  projected gradient ascent  {ascent:8.3f} s {ascent / ours:7.1f} times, {steps} steps"
              f"\n  SciPy's direct solver      {scaled:8.3f} s {scaled / ours:7.1f} times")


@pytest.mark.parametrize("n", [250, 500, 1000])
def test_cost_of_a_sample_grows_as_the_square_of_the_dimension(n, benchmark, capsys):
    gaussian, _, x = problem(n)
    found = benchmark.pedantic(gs.attack, (gaussian, x, 1.0), rounds=3, warmup_rounds=1)
    assert gs.kkt_residual(gaussian, x, found.delta, found.curvature).max() < ACCURACY
    _, seconds = timed(gs.attack, gaussian, x, 1.0)
    with capsys.disabled():
        each = seconds / SAMPLES
        print(f"\n  n = {n:4d}: {1e6 * each:7.1f} us a sample, {1e9 * each / n**2:6.3f} ns times n^2")
