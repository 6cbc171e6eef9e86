"""The counter-example of Fetaya et al. (2020), Section 2 and Appendix D, in closed form.

Two classes with equal priors live on a ball, a shell and a ring of R^d; U(a, b) is uniform on a < ||x|| <= b:

    p(x|0) = lam1 U(0, 1) + (1 - lam1) U(1, 1+Delta)        q(x|0) = U(0, 1+Delta)
    p(x|1) = lam2 U(0, 1) + (1 - lam2) U(2, 3)              q(x|1) = p(x|1)

p is the data and q the model: both KL divergences are below epsilon, and yet nearly half of all inputs can be
moved by less than Delta to a point that q finds more likely and classifies wrongly with confidence 1 - delta.

Everything depends on x through ||x|| alone, so all functions take radii; r stands for (1+Delta)^-d, the share
of q(x|0) inside the unit ball. Float64 and logarithms (nats) throughout: d = 10^6 is as safe as d = 2.
"""
from typing import NamedTuple

import numpy as np
from scipy.special import gammaln, lambertw, wrightomega

LOG_HALF = -np.log(2)


class Annulus(NamedTuple):
    """One pair (p, q): the logarithms of the two core weights, the shell's width and the dimension."""
    log_lam1: float
    log_lam2: float
    Delta: float
    dimension: int

    @property
    def lam1(self):
        """Weight of the unit ball in p(x|0), in (0, 1)."""
        return float(np.exp(self.log_lam1))

    @property
    def lam2(self):
        """Weight of the unit ball in p(x|1), in (0, 1)."""
        return float(np.exp(self.log_lam2))

    @property
    def log_r(self):
        """log (1+Delta)^-d, nats."""
        return -self.dimension * np.log1p(self.Delta)


def annulus(lam1, lam2, Delta, dimension):
    """The pair with given weights, 0 < lam1, lam2 < 1, and any Delta > 0: Proposition 1 may fail for it."""
    return Annulus(float(np.log(lam1)), float(np.log(lam2)), float(Delta), int(dimension))


def _log1mexp(log_w):
    # log(1 - w)
    return np.log1p(-np.exp(log_w))


def _check(epsilon, delta, Delta):
    if not 0 < epsilon < np.inf:
        raise ValueError(f"epsilon must be > 0 and finite (nats), got {epsilon}")
    if not 0 < delta < .5:
        raise ValueError(f"delta must lie in (0, 1/2), got {delta}")
    if not 0 < Delta <= 1:
        raise ValueError(f"Delta must lie in (0, 1] (beyond 1 the shell overlaps the ring), got {Delta}")


def log_lam1_interval(epsilon, delta, Delta, dimension):
    """Lower and upper end of log lam1 (nats) in Proposition 1; empty where lower >= upper. Broadcasts.

    The five inequalities of the proof and the cap lam1 < 1/3 that "probability > 1/3" needs.
    """
    d_log = dimension * np.log1p(Delta)
    # ((1-delta)/delta)^2 (1+Delta)^-d  <  lam1  <  min(epsilon / (d log(1+Delta)), 1 - exp(-epsilon), 1/3)
    lower = 2 * (np.log1p(-delta) - np.log(delta)) - d_log
    upper = np.minimum(np.log(epsilon) - np.log(d_log), np.minimum(np.log(-np.expm1(-epsilon)), -np.log(3)))
    return lower, upper


def is_admissible(epsilon, delta, Delta, dimension):
    """Whether a lam1 exists (boolean, broadcasts)."""
    lower, upper = log_lam1_interval(epsilon, delta, Delta, dimension)
    return lower < upper


def construct(epsilon, delta, Delta, dimension=None):
    """The pair (p, q) of Proposition 1 with both weights in the middle of their intervals.

    Args:
        epsilon: bound of both KL divergences, nats, > 0.
        delta: 1 - confidence, in (0, 1/2).
        Delta: how far an attack may move, in (0, 1].
        dimension: d >= 1; by default the smallest that works.
    Raises:
        ValueError: a parameter out of range; a dimension without any lam1 (the smallest that works is named).
    """
    _check(epsilon, delta, Delta)
    least = smallest_dimension(epsilon, delta, Delta)
    dimension = least if dimension is None else dimension
    if dimension < 1 or dimension != int(dimension):
        raise ValueError(f"dimension must be an integer >= 1, got {dimension}")
    lower, upper = log_lam1_interval(epsilon, delta, Delta, dimension)
    if lower >= upper:
        setting = f"epsilon={epsilon:g}, delta={delta:g}, Delta={Delta:g}"
        raise ValueError(f"dimension must be >= {least} for {setting}, got {dimension}")
    log_lam1 = np.logaddexp(lower, upper) + LOG_HALF
    # (1-delta)/delta (1+Delta)^-d  <  lam2  <  delta/(1-delta) lam1, both strict (the paper: upper end)
    log_odds = np.log1p(-delta) - np.log(delta)
    log_lam2 = np.logaddexp(log_odds - dimension * np.log1p(Delta), log_lam1 - log_odds) + LOG_HALF
    return Annulus(float(log_lam1), float(log_lam2), float(Delta), int(dimension))


def rate(epsilon, delta):
    """A = 2 log((1-delta)/delta) + log(1/epsilon), nats; u = d log(1+Delta) needs u - log u > A."""
    return 2 * (np.log1p(-delta) - np.log(delta)) - np.log(epsilon)


def lambert_exponent(A):
    """The larger solution u of u - log u = A, u = -W_{-1}(-e^-A), for A > 1 (Lambert's W; broadcasts)."""
    A = np.asarray(A, float)
    if (A <= 1).any():
        raise ValueError(f"A = 2 log((1-delta)/delta) + log(1/epsilon) must be > 1 (nats), got {A.min():g}")
    # e^-A underflows for A > 745; Wright's omega does without it, but takes the wrong branch for some A < 2
    return -np.where(A < 700, lambertw(-np.exp(-A), -1).real, wrightomega(-A - 1j * np.pi).real)


def lambert_dimension(epsilon, delta, Delta):
    """Smallest d of Eq. (19), the least integer above `lambert_exponent` / log(1+Delta). Broadcasts."""
    u = lambert_exponent(rate(epsilon, delta))
    return np.floor(u / np.log1p(Delta)).astype(np.int64) + 1


def smallest_dimension(epsilon, delta, Delta):
    """Smallest dimension with a construction: the Lambert-W formula or, where larger, a cap on lam1."""
    _check(epsilon, delta, Delta)
    A = rate(epsilon, delta)
    caps = [np.log(-np.expm1(-epsilon)), -np.log(3)]
    # ((1-delta)/delta)^2 (1+Delta)^-d < cap  <=>  d > (A + log epsilon - log cap) / log(1+Delta)
    d = max(1, *(int((A + np.log(epsilon) - cap) // np.log1p(Delta)) + 1 for cap in caps))
    if A > 1:
        d = max(d, int(lambert_dimension(epsilon, delta, Delta)))
    # Rounding of the formula is at most one step.
    while d > 1 and is_admissible(epsilon, delta, Delta, d - 1):
        d -= 1
    while not is_admissible(epsilon, delta, Delta, d):
        d += 1
    return d


def _first(works, limit, block=4096):
    for start in range(1, limit, block):
        hits = np.flatnonzero(works(np.arange(start, start + block)))
        if len(hits):
            return start + int(hits[0])
    raise ValueError(f"dimension must be < {limit} in a search by brute force")


def smallest_dimension_brute(epsilon, delta, Delta, limit=10**7):
    """The same by trying d = 1, 2, 3, ...; the independent check of `smallest_dimension`."""
    _check(epsilon, delta, Delta)
    return _first(lambda d: is_admissible(epsilon, delta, Delta, d), limit)


def smallest_dimension_exact(epsilon, delta, Delta, limit=10**7):
    """Smallest d if the exact joint KLs, not their bounds, must be below epsilon, at the smallest lam1."""
    _check(epsilon, delta, Delta)

    def works(d):
        lower, _ = log_lam1_interval(epsilon, delta, Delta, d)
        lam1 = np.minimum(lower, -np.log(3))
        log_r = -d * np.log1p(Delta)
        kls = .5 * np.maximum(binary_kl(lam1, log_r), binary_kl(log_r, lam1))
        return (lower < -np.log(3)) & (kls < epsilon)
    return _first(works, limit)


def log_unit_ball_volume(dimension):
    """log C_d = (d/2) log pi - log Gamma(d/2 + 1), C_d the volume of the unit d-ball."""
    return dimension / 2 * np.log(np.pi) - gammaln(dimension / 2 + 1)


def _log_power_difference(a, b, d):
    # log(b^d - a^d) = d log b + log(1 - (a/b)^d)
    with np.errstate(divide="ignore"):
        return d * np.log(b) + np.log(-np.expm1(d * (np.log(a) - np.log(b))))


def regions(c, which, label):
    """The uniform pieces of p(x|label) or q(x|label): a list of (log weight, inner radius, outer radius)."""
    if which not in ("p", "q") or label not in (0, 1):
        raise ValueError(f"which must be 'p' or 'q' and label 0 or 1, got {which!r} and {label!r}")
    if label == 1:
        return [(c.log_lam2, 0., 1.), (_log1mexp(c.log_lam2), 2., 3.)]
    if which == "q":
        return [(0., 0., 1 + c.Delta)]
    return [(c.log_lam1, 0., 1.), (_log1mexp(c.log_lam1), 1., 1 + c.Delta)]


def _log_density_in_balls(c, which, label, radius):
    """`log_density` in units of 1/C_d: the unit ball has volume 1, so nothing large cancels."""
    radius = np.asarray(radius, float)
    total = np.full(radius.shape, -np.inf)
    for log_weight, a, b in regions(c, which, label):
        # U(a, b) = 1 / (C_d (b^d - a^d)) for a < ||x|| <= b; the centre belongs to the ball
        inside = ((radius > a) | ((radius == 0) & (a == 0))) & (radius <= b)
        piece = np.where(inside, log_weight - _log_power_difference(a, b, c.dimension), -np.inf)
        total = np.logaddexp(total, piece)
    return total


def log_density(c, which, label, radius):
    """log p(x|label) (`which`="p") or log q(x|label) ("q") at ||x|| = radius, nats; -inf off the support."""
    return _log_density_in_balls(c, which, label, radius) - log_unit_ball_volume(c.dimension)


def log_marginal(c, which, radius):
    """log p(x) or log q(x) = log (1/2) sum_y p(x|y), nats; -inf off the support."""
    return np.logaddexp(log_density(c, which, 0, radius), log_density(c, which, 1, radius)) + LOG_HALF


def log_posterior(c, which, radius):
    """log p(y|x) or log q(y|x), nats, shape radius.shape + (2,); nan where the density is 0."""
    joint = np.stack([_log_density_in_balls(c, which, y, radius) for y in (0, 1)], -1)
    with np.errstate(invalid="ignore"):
        return joint - np.logaddexp(joint[..., :1], joint[..., 1:])


def log_ratio(c, labels, radii):
    """log p(x|y) - log q(x|y) of labelled points, nats; its mean over (x, y) ~ p is KL(p||q)."""
    ratio, zero = np.zeros(len(radii)), np.asarray(labels) == 0        # p(x|1) = q(x|1)
    at = np.asarray(radii)[zero]
    ratio[zero] = _log_density_in_balls(c, "p", 0, at) - _log_density_in_balls(c, "q", 0, at)
    return ratio


def decide(c, which, radius):
    """The label with the larger posterior under p (Bayes) or q (the model); -1 where the density is 0."""
    log_post = log_posterior(c, which, radius)
    return np.where(np.isnan(log_post[..., 0]), -1, log_post[..., 1] > log_post[..., 0])


def log_core_posteriors(c):
    """(log p(0|x), log q(0|x)) in the unit ball, nats: Lemma 1, Eqs. (11) and (12)."""
    # p(0|x) = lam1 / (lam1 + lam2),  q(0|x) = 1 / (1 + lam2 (1+Delta)^d)
    return -np.logaddexp(0., c.log_lam2 - c.log_lam1), -np.logaddexp(0., c.log_lam2 - c.log_r)


def binary_kl(log_a, log_b):
    """KL between Bernoulli(a) and Bernoulli(b), nats, from log a and log b (broadcasts)."""
    # a log(a/b) + (1-a) log((1-a)/(1-b))
    return np.exp(log_a) * (log_a - log_b) - np.expm1(log_a) * (_log1mexp(log_a) - _log1mexp(log_b))


def kl_q_p(c):
    """KL(q(x,y)||p(x,y)), nats: half of Lemma 2's, since only class 0 differs and has prior 1/2."""
    return .5 * binary_kl(c.log_r, c.log_lam1)


def kl_p_q(c):
    """KL(p(x,y)||q(x,y)), nats: half of Lemma 3's."""
    return .5 * binary_kl(c.log_lam1, c.log_r)


def tv_distance(c):
    """Total-variation distance of the joints p(x,y) and q(x,y), in [0, 1]: |lam1 - (1+Delta)^-d| / 2."""
    return .5 * abs(np.exp(c.log_lam1) - np.exp(c.log_r))


def _cells(c):
    # edges of the radial cells on which every density is constant, and their mid-radii
    edges = np.unique([0., 1., 1 + c.Delta, 2., 3.])
    return edges, (edges[1:] + edges[:-1]) / 2


def tv_distance_by_regions(c):
    """`tv_distance` from the densities instead: (1/2) sum_y (1/2) sum over cells |p mass - q mass|."""
    edges, middle = _cells(c)
    log_volume = _log_power_difference(edges[:-1], edges[1:], c.dimension)
    p, q = (np.array([_log_density_in_balls(c, which, y, middle) for y in (0, 1)]) for which in "pq")
    return .25 * np.abs(np.exp(p + log_volume) - np.exp(q + log_volume)).sum()


def bv_radial(edges, log_levels, dimension):
    """Bounded-variation seminorm ("total variation") of a piecewise constant radial density, in 1/length.

    `edges` are the outer radii of its cells, increasing, `log_levels` the log densities in them (nats); 0
    beyond. The sum over the edges R of |jump| d C_d R^(d-1), the jump times the area of the sphere.
    """
    log_levels = np.append(log_levels, -np.inf)
    log_area = np.log(dimension) + log_unit_ball_volume(dimension) + (dimension - 1) * np.log(edges)
    return float(np.abs(np.exp(log_levels[:-1] + log_area) - np.exp(log_levels[1:] + log_area)).sum())


def bv_seminorm(c):
    """Bounded-variation seminorm of the density p(x), in 1/length."""
    edges, middle = _cells(c)
    return bv_radial(edges[1:], log_marginal(c, "p", middle), c.dimension)


def log_ball_mass_bound(c):
    """log of a bound on P_p(||x - centre|| <= Delta) for every centre (condition 6), nats."""
    d_log = c.dimension * np.log(c.Delta)
    # (lam1+lam2)/2 Delta^d + (1/2) Delta^d / ((1+Delta)^d - 1) + (1/2) Delta^d / (3^d - 2^d)
    log_volumes = [_log_power_difference(a, b, c.dimension) for a, b in ((1., 1 + c.Delta), (2., 3.))]
    return LOG_HALF + d_log + np.logaddexp.reduce([c.log_lam1, c.log_lam2, *np.negative(log_volumes)])


def median_log_density(c, under):
    """Median of log q(x) for x ~ p or x ~ q (`under`), nats: the lowest level with half the mass up to it."""
    edges, middle = _cells(c)
    level = log_marginal(c, "q", middle)
    log_mass = (log_marginal(c, under, middle) + log_unit_ball_volume(c.dimension)
                + _log_power_difference(edges[:-1], edges[1:], c.dimension))
    order = np.argsort(level)
    below = np.cumsum(np.exp(log_mass[order]))
    return float(level[order][np.searchsorted(below, .5 - 1e-12)])


def sample(c, which, n, rng, label=None):
    """Draw n labels (uniform, or all `label`) and radii from p or q: (labels, radii), each of shape (n,)."""
    labels = rng.integers(0, 2, n) if label is None else np.full(n, label)
    radii, uniform, coin = np.empty(n), 1 - rng.random(n), rng.random(n)
    for y in (0, 1):
        pieces = regions(c, which, y)
        in_core = coin < np.exp(pieces[0][0])
        for (_, a, b), chosen in zip(pieces, (in_core, ~in_core)):
            mask = (labels == y) & chosen
            radii[mask] = sample_radii(a, b, c.dimension, uniform[mask])
    return labels, radii


def sample_radii(a, b, dimension, uniform):
    """Radii of U(a, b) by the inverse of the radial distribution function; `uniform` in (0, 1]."""
    # P(||x|| <= s) = (s^d - a^d)/(b^d - a^d)  =>  s = b (u + (1-u) (a/b)^d)^(1/d)
    return b * (uniform + (1 - uniform) * (a / b) ** dimension) ** (1 / dimension)


def sample_vectors(radii, dimension, rng):
    """Points with the given norms and uniform directions, shape (len(radii), dimension)."""
    direction = rng.standard_normal((len(radii), dimension))
    return direction * (radii / np.linalg.norm(direction, axis=1))[:, None]


def attack(c, radius):
    """Norms of the attacked points, shape of `radius`: towards the centre, half-way into (||x|| - Delta, 1).

    Strictly inside the unit ball and strictly closer than Delta to every x of the shell, ||x|| < 1+Delta.
    """
    return .5 * (np.maximum(np.asarray(radius, float) - c.Delta, 0) + 1)


def measure_attack(c, radius):
    """What conditions 1 to 5 of Proposition 1 speak about, for x of the given norms: a dict of arrays.

    y_p_x, y_q_x are the decisions at x, p_own_x, q_own_x their posteriors, p_true_x, q_true_x the posteriors
    of Bayes' decision, log_q_x the density (nats); the same with _attack at the attacked point.
    """
    moved = attack(c, radius)
    found = {"distance": np.asarray(radius, float) - moved, "attack_norm": moved}
    for where, r in (("x", radius), ("attack", moved)):
        for which in "pq":
            log_post = log_posterior(c, which, r)
            found[f"y_{which}_{where}"] = decide(c, which, r)
            found[f"{which}_own_{where}"] = np.exp(log_post.max(-1))
            true = decide(c, "p", r)[..., None]
            found[f"{which}_true_{where}"] = np.exp(np.take_along_axis(log_post, true, -1)[..., 0])
        found[f"log_q_{where}"] = log_marginal(c, "q", r)
    return found


def conditions(c, delta, radius):
    """Conditions 1 to 5 of Proposition 1 (2 and 3 as corrected) for x of given norms: {number: booleans}."""
    m = measure_attack(c, radius)
    median = max(median_log_density(c, "p"), median_log_density(c, "q"))
    return {1: (m["y_q_x"] == m["y_p_x"]) & (m["p_own_x"] >= 1 - delta) & (m["q_own_x"] >= 1 - delta),
            2: (m["y_q_attack"] != m["y_q_x"]) & (m["y_p_attack"] == m["y_p_x"]),
            3: (m["q_true_attack"] < delta) & (m["p_true_attack"] > 1 - delta),
            4: m["distance"] < c.Delta,
            5: m["log_q_attack"] >= median}


def printed_rate(epsilon, delta, Delta):
    """The rate as printed, (log(delta/(1+delta)) + log(1/epsilon)) / log(1+Delta), with its sign slip."""
    return (np.log(delta) - np.log1p(delta) - np.log(epsilon)) / np.log1p(Delta)


def smallest_dimension_eq19(epsilon, delta, Delta, limit=10**7):
    """Smallest d that Eq. (19) alone accepts, without the caps on lam1."""
    _check(epsilon, delta, Delta)

    def works(d):
        lower, _ = log_lam1_interval(epsilon, delta, Delta, d)
        return lower < np.log(epsilon) - np.log(d * np.log1p(Delta))
    return _first(works, limit)
