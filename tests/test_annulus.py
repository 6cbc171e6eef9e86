"""The counter-example of fetaya2020: densities, divergences, dimensions, attack, by independent means."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special, stats

from lib.theory import annulus

settings.register_profile("same every time", derandomize=True, deadline=None)
settings.load_profile("same every time")

weights = st.floats(.001, .9)
widths = st.floats(.01, 1.)
few_dimensions = st.integers(1, 40)
tolerances = st.tuples(st.floats(1e-4, 5.), st.floats(1e-4, .45), st.floats(.02, 1.))

# (epsilon, delta, Delta): (smallest dimension, the same with exact KLs), from the ledger's prop1.dimension
LEDGER = {(.1, .1, .5): (22, 18), (.1, .1, .1): (94, 76), (.01, .01, .5): (41, 38), (.1, .1, 1.): (13, 11),
          (.01, .01, .1): (175, 160), (.1, .01, .1): (149, 136), (.001, .001, .1): (251, 237),
          (.05, .05, .25): (51, 44), (.01, .01, .01): (1669, 1529)}


def radial_integral(c, function):
    """Integral over R^d of a function of ||x||, place by place: the area d C_d s^(d-1) times function(s)."""
    log_area = np.log(c.dimension) + annulus.log_unit_ball_volume(c.dimension)

    def integrand(s):
        return np.exp(log_area + (c.dimension - 1) * np.log(s)) * function(s)
    edges = [1e-12, 1, 1 + c.Delta, 2, 3]
    return sum(integrate.quad(integrand, a, b, limit=200)[0] for a, b in zip(edges[:-1], edges[1:]))


# ---------------------------------------------------------------- densities and posteriors

@settings(max_examples=25)
@given(weights, weights, widths, st.integers(1, 15))
def test_densities_integrate_to_one(lam1, lam2, Delta, d):
    c = annulus.annulus(lam1, lam2, Delta, d)
    for which in "pq":
        for label in (0, 1):
            mass = radial_integral(c, lambda s: np.exp(annulus.log_density(c, which, label, s)))
            assert mass == pytest.approx(1, abs=1e-7)
        mass = radial_integral(c, lambda s: np.exp(annulus.log_marginal(c, which, s)))
        assert mass == pytest.approx(1, abs=1e-7)


@given(weights, weights, widths, st.integers(1, 5000), st.floats(0., .999))
def test_lemma1_is_bayes_rule_in_the_ball(lam1, lam2, Delta, d, radius):
    c = annulus.annulus(lam1, lam2, Delta, d)
    for which, closed in zip("pq", annulus.log_core_posteriors(c)):
        joint = [annulus.log_density(c, which, y, radius) for y in (0, 1)]
        assert joint[0] - np.logaddexp(*joint) == pytest.approx(closed, abs=1e-9 * max(1, abs(closed)))
        assert annulus.log_posterior(c, which, radius)[0] == pytest.approx(closed, rel=1e-12, abs=1e-12)


@given(weights, weights, widths, few_dimensions, st.floats(0., 3.5))
def test_posteriors_sum_to_one_and_are_undefined_off_the_support(lam1, lam2, Delta, d, radius):
    c = annulus.annulus(lam1, lam2, Delta, d)
    outside = 1 + Delta < radius <= 2 or radius > 3
    for which in "pq":
        total = np.exp(annulus.log_posterior(c, which, radius)).sum()
        assert np.isnan(total) if outside else total == pytest.approx(1)
        assert (annulus.decide(c, which, radius) == -1) == outside


def test_decisions_of_the_three_places():
    c = annulus.construct(.1, .1, .5)
    places = np.array([0., .5, 1.2, 2.5])
    assert annulus.decide(c, "p", places).tolist() == [0, 0, 0, 1]
    assert annulus.decide(c, "q", places).tolist() == [1, 1, 0, 1]


def test_everything_is_finite_in_a_million_dimensions():
    for d in (2000, 10**6):
        c = annulus.construct(.1, .1, .5, d)
        _, radii = annulus.sample(c, "p", 1000, np.random.default_rng(0))
        found = annulus.measure_attack(c, radii[radii <= 1.5])
        assert all(np.isfinite(v).all() for v in found.values())
        numbers = [annulus.kl_q_p(c), annulus.kl_p_q(c), annulus.tv_distance(c), annulus.bv_seminorm(c),
                   annulus.log_ball_mass_bound(c), *annulus.log_core_posteriors(c)]
        assert np.isfinite(numbers).all()
        assert 0 < annulus.kl_q_p(c) < .1 and 0 < annulus.kl_p_q(c) < .1


# ---------------------------------------------------------------- divergences

@settings(max_examples=25)
@given(weights, weights, widths, st.integers(1, 12))
def test_kls_and_distance_equal_quadrature(lam1, lam2, Delta, d):
    c = annulus.annulus(lam1, lam2, Delta, d)

    def expected(function):
        # class 1 is the same in p and q; the prior of class 0 is 1/2
        def at(s):
            p, q = (np.exp(annulus.log_density(c, which, 0, s)) for which in "pq")
            return function(p, q)
        return .5 * radial_integral(c, at)
    assert annulus.kl_p_q(c) == pytest.approx(expected(special.rel_entr), abs=1e-7)
    assert annulus.kl_q_p(c) == pytest.approx(expected(lambda p, q: special.rel_entr(q, p)), abs=1e-7)
    assert annulus.tv_distance(c) == pytest.approx(expected(lambda p, q: .5 * abs(p - q)), abs=1e-7)
    assert annulus.tv_distance(c) == pytest.approx(annulus.tv_distance_by_regions(c), abs=1e-12)


@given(weights, weights, widths, few_dimensions)
def test_pinsker(lam1, lam2, Delta, d):
    c = annulus.annulus(lam1, lam2, Delta, d)
    least = min(annulus.kl_p_q(c), annulus.kl_q_p(c))
    assert annulus.tv_distance(c) <= np.sqrt(max(least, 0) / 2) + 1e-9


@given(st.floats(.1, 5.), st.integers(1, 3000))
def test_variation_of_the_uniform_ball(radius, d):
    level = -annulus.log_unit_ball_volume(d) - d * np.log(radius)
    assert annulus.bv_radial([radius], [level], d) == pytest.approx(d / radius, rel=1e-9)


def test_variation_in_one_dimension_counts_every_jump_on_both_sides():
    # density 2, 0.5, 1 on (0,1), (1,2), (2,3): jumps 1.5, 0.5, 1 at +-R each
    assert annulus.bv_radial([1, 2, 3], np.log([2, .5, 1]), 1) == pytest.approx(2 * (1.5 + .5 + 1))


def test_variation_grows_and_distance_vanishes():
    growing = [annulus.construct(.1, .1, .1, d) for d in (100, 200, 1000)]
    bv = np.array([annulus.bv_seminorm(c) for c in growing])
    assert bv == pytest.approx(np.array([100, 200, 1000]) / 2 * (1 / 1.1 + 1 / 3), rel=.01)
    assert np.all(np.diff([annulus.tv_distance(c) for c in growing]) < 0)


def test_ball_mass_bound_covers_measured_balls():
    c, rng = annulus.annulus(.3, .03, .5, 5), np.random.default_rng(1)
    x = annulus.sample_vectors(annulus.sample(c, "p", 20_000, rng)[1], 5, rng)
    heaviest = max((((x - centre) ** 2).sum(1) <= .25).mean() for centre in [*x[:100], np.zeros(5)])
    assert .1 * np.exp(annulus.log_ball_mass_bound(c)) < heaviest < np.exp(annulus.log_ball_mass_bound(c))


def test_median_density_is_the_median_of_samples():
    for c in (annulus.construct(.1, .1, .5), annulus.annulus(.8, .7, .3, 3), annulus.annulus(.5, .2, .3, 3)):
        for under in "pq":
            _, radii = annulus.sample(c, under, 100_001, np.random.default_rng(2))
            sampled = np.median(annulus.log_marginal(c, "q", radii))
            assert annulus.median_log_density(c, under) == pytest.approx(sampled)


# ---------------------------------------------------------------- the smallest dimension

@pytest.mark.parametrize("tolerance, least", LEDGER.items())
def test_smallest_dimensions_of_the_ledger(tolerance, least):
    assert annulus.smallest_dimension(*tolerance) == annulus.lambert_dimension(*tolerance) == least[0]
    assert annulus.smallest_dimension_brute(*tolerance) == least[0]
    assert annulus.smallest_dimension_exact(*tolerance) == least[1]


@given(tolerances)
def test_smallest_dimension_is_the_brute_force_one(tolerance):
    d = annulus.smallest_dimension(*tolerance)
    assert d == annulus.smallest_dimension_brute(*tolerance)
    assert annulus.is_admissible(*tolerance, np.arange(d, d + 500)).all()
    assert not annulus.is_admissible(*tolerance, np.arange(1, d)).any()


@given(tolerances, st.floats(1.01, 10.))
def test_smaller_tolerances_never_need_fewer_dimensions(tolerance, factor):
    d = annulus.smallest_dimension(*tolerance)
    for k in range(3):
        stricter = [v / factor if i == k else v for i, v in enumerate(tolerance)]
        assert annulus.smallest_dimension(*stricter) >= d


@given(st.floats(1.0001, 1e5))
def test_lambert_exponent_solves_its_equation(A):
    # SciPy's wrightomega picks the other branch for some A < 2: found by this test
    u = annulus.lambert_exponent(A)
    assert u > 1 and u - np.log(u) == pytest.approx(A, rel=1e-12)
    assert -1e-9 <= u - A - np.log(A) <= np.log(np.e / (np.e - 1)) + 1e-9


def test_lambert_dimension_does_not_underflow():
    d = annulus.lambert_dimension(1e-300, 1e-300, .1)
    u, A = d * np.log1p(.1), annulus.rate(1e-300, 1e-300)
    assert A > 2000 and 0 <= u - np.log(u) - A <= np.log1p(.1)


def test_printed_forms_differ():
    assert annulus.printed_rate(.1, .1, .5) < 0
    assert annulus.smallest_dimension_eq19(2, .3, .5) == 1 and annulus.smallest_dimension(2, .3, .5) == 7


# ---------------------------------------------------------------- sampling, attack, conditions

@pytest.mark.parametrize("a, b, d", [(0, 1, 1), (0, 1, 22), (1, 1.5, 3), (2, 3, 50), (1, 1.5, 2000)])
def test_radii_follow_their_distribution_function(a, b, d):
    radii = annulus.sample_radii(a, b, d, 1 - np.random.default_rng(3).random(5000))

    def cdf(s):
        # (s^d - a^d) / (b^d - a^d), divided by b^d
        return ((s / b) ** d - (a / b) ** d) / (1 - (a / b) ** d)
    assert stats.kstest(radii, cdf).pvalue > 1e-3


def test_samples_have_the_weights_and_the_norms():
    c, rng = annulus.annulus(.3, .1, .5, 5), np.random.default_rng(4)
    labels, radii = annulus.sample(c, "p", 100_000, rng)
    assert labels.mean() == pytest.approx(.5, abs=.01)
    assert (radii[labels == 0] < 1).mean() == pytest.approx(.3, abs=.01)
    assert (radii[labels == 1] < 1).mean() == pytest.approx(.1, abs=.01)
    _, radii = annulus.sample(c, "q", 100_000, rng, label=0)
    assert (radii < 1).mean() == pytest.approx(1.5 ** -5, abs=.01)
    x = annulus.sample_vectors(radii[:100], 5, rng)
    assert np.linalg.norm(x, axis=1) == pytest.approx(radii[:100])
    assert abs(annulus.sample_vectors(np.ones(20_000), 3, rng).mean(0)).max() < .02


def test_log_ratio_averages_to_both_kls():
    c, rng = annulus.annulus(.3, .1, .5, 5), np.random.default_rng(5)
    for which, kl in (("p", annulus.kl_p_q(c)), ("q", -annulus.kl_q_p(c))):
        ratio = annulus.log_ratio(c, *annulus.sample(c, which, 200_000, rng))
        assert abs(ratio.mean() - kl) < 5 * ratio.std() / np.sqrt(len(ratio))


@given(tolerances, st.sampled_from([1, 3, 50]))
def test_conditions_hold_exactly_for_class_0_in_the_shell(tolerance, factor):
    epsilon, delta, Delta = tolerance
    c = annulus.construct(*tolerance, factor * annulus.smallest_dimension(*tolerance))
    labels, radii = annulus.sample(c, "p", 500, np.random.default_rng(6))
    met = np.all(list(annulus.conditions(c, delta, radii).values()), axis=0)
    assert np.array_equal(met, (labels == 0) & (radii > 1))
    assert annulus.kl_p_q(c) < epsilon and annulus.kl_q_p(c) < epsilon and c.lam1 < 1 / 3


def test_conditions_can_fail():
    c, shell = annulus.construct(.1, .1, .5), np.array([1.2])
    wrong = {"lam2 above its interval": (c._replace(log_lam2=c.log_lam1 + 1), {2, 3}),
             "lam2 below its interval": (c._replace(log_lam2=c.log_r - 1), {2, 3}),
             "lam2 just too large": (c._replace(log_lam2=c.log_lam1 - np.log(9) + .01), {3})}
    for name, (pair, failing) in wrong.items():
        met = annulus.conditions(pair, .1, shell)
        assert {k for k, v in met.items() if not v.all()} == failing, name


def test_the_ring_is_out_of_reach():
    met = annulus.conditions(annulus.construct(.1, .1, .1), .1, np.array([2.9]))
    assert not met[4].any() and not met[5].any()


@given(widths, st.floats(0., 1 - 1e-9))
def test_attack_ends_in_the_ball_within_reach(Delta, share):
    c, radius = annulus.annulus(.1, .01, Delta, 5), 1 + share * Delta
    moved = annulus.attack(c, radius)
    assert 0 <= moved < 1 and radius - moved < Delta


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("arguments, message", [
    ((0, .1, .5), r"epsilon must be > 0 and finite \(nats\), got 0"),
    ((-.1, .1, .5), "epsilon must be > 0"),
    ((np.nan, .1, .5), "epsilon must be > 0"),
    ((.1, .5, .5), r"delta must lie in \(0, 1/2\), got 0.5"),
    ((.1, 0, .5), "delta must lie in"),
    ((.1, .1, 0), "Delta must lie in"),
    ((.1, .1, 1.2), r"Delta must lie in \(0, 1\].*got 1.2"),
    ((.1, .1, .5, 0), "dimension must be an integer >= 1, got 0"),
    ((.1, .1, .5, 22.5), "dimension must be an integer >= 1, got 22.5"),
    ((.1, .1, .5, 21), "dimension must be >= 22 for epsilon=0.1, delta=0.1, Delta=0.5, got 21"),
])
def test_bad_input_gets_one_clear_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        annulus.construct(*arguments)
    assert "\n" not in str(error.value)


def test_other_bad_input():
    with pytest.raises(ValueError, match=r"must be > 1 \(nats\)"):
        annulus.lambert_dimension(3., .45, .5)
    with pytest.raises(ValueError, match="which must be 'p' or 'q'"):
        annulus.regions(annulus.construct(.1, .1, .5), "r", 0)
    with pytest.raises(ValueError, match="label 0 or 1"):
        annulus.log_density(annulus.construct(.1, .1, .5), "p", 2, .5)
