"""Attacks on the likelihood of a Gaussian in closed form: Section 3 and Appendix 8.1 of Pope et al. 2020.

A linear flow is a normal density N(mu, K), so every statement about it can be checked to the last digits.
The optimal L2 attack is a trust-region subproblem; after one eigendecomposition it costs O(n^2) a sample, for
the rotations in and out, and the root finding itself O(n) an iteration.
Everything is float64 and in nats; distances are in the units of x.
"""
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq

_CHUNK = 2**17        # numbers of a batch that are treated at a time: they stay in the processor's cache
_TOLERANCE = 1e-14    # of ||delta|| / epsilon - 1
_ITERATIONS = 50      # five or so are enough, thirty at the edge of the hard case
_TINY = 1e-300        # where the hard case begins


class Gaussian(NamedTuple):
    """A normal density in its eigenbasis, K = U diag(lambda) U^T.

    Fields: `mean` (n,), `eigenvalues` (n,) ascending and positive, `eigenvectors` (n, n), u_i in column i.
    """
    mean: np.ndarray
    eigenvalues: np.ndarray
    eigenvectors: np.ndarray


class Attack(NamedTuple):
    """The optimal perturbation of each point.

    Fields: `delta` (N, n); `curvature` (N,) = 2 eta lambda_min - 1, at least 0, and 0 in the hard case;
    `drop` (N,) in nats, the log-likelihood of x minus that of x + delta.
    """
    delta: np.ndarray
    curvature: np.ndarray
    drop: np.ndarray


def finite(name, value, low=0.0, strict=False, unit=""):
    """`value` as a float; ValueError in one line unless finite and >= `low` (> `low` where `strict`)."""
    number = float(value) if np.ndim(value) == 0 else np.nan
    if not np.isfinite(number) or number < low or strict and number == low:
        bound = f"{'>' if strict else '>='} {low:g} and finite{unit and f' ({unit})'}"
        raise ValueError(f"{name} must be {bound}, got {value}")
    return number


def _points(x, n):
    points = np.asarray(x, dtype=np.float64)
    if points.ndim not in (1, 2) or points.shape[-1] != n:
        raise ValueError(f"x must have shape (n,) or (N, n) with n = {n}, got {points.shape}")
    if not np.isfinite(points).all():
        raise ValueError("x must be finite, got values that are not")
    return points


def from_covariance(mean, covariance):
    """The Gaussian N(mean, covariance), by one eigendecomposition.

    Raises ValueError unless `mean` is (n,), and `covariance` (n, n), symmetric and positive definite.
    """
    mean, covariance = np.asarray(mean, dtype=np.float64), np.asarray(covariance, dtype=np.float64)
    if mean.ndim != 1 or covariance.shape != (mean.size, mean.size):
        raise ValueError(f"covariance must be (n, n), mean (n,), got {covariance.shape} and {mean.shape}")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError("mean and covariance must be finite, got values that are not")
    asymmetry = np.abs(covariance - covariance.T).max()
    if asymmetry > 1e-10 * np.abs(covariance).max():
        raise ValueError(f"covariance must be symmetric, got entries that differ by {asymmetry:.3g}")
    eigenvalues, eigenvectors = np.linalg.eigh((covariance + covariance.T) / 2)
    if eigenvalues[0] <= mean.size * np.finfo(float).eps * abs(eigenvalues[-1]):
        raise ValueError(f"covariance must be positive definite, got an eigenvalue of {eigenvalues[0]:.3g}")
    return Gaussian(mean, eigenvalues, eigenvectors)


def spherical(mean, variance):
    """The Gaussian N(mean, variance I)."""
    mean = np.asarray(mean, dtype=np.float64)
    return Gaussian(mean, np.full(mean.size, finite("variance", variance, strict=True)), np.eye(mean.size))


def random_covariance(n, condition, scale, rng):
    """A covariance (n, n), log-spaced eigenvalues from scale^2/condition to scale^2, random orientation."""
    finite("condition", condition, low=1)
    eigenvalues = finite("scale", scale, strict=True)**2 * np.geomspace(1 / condition, 1, n)
    q, r = np.linalg.qr(rng.standard_normal((n, n)))
    u = q * np.sign(np.diag(r))     # Haar: QR alone prefers some orientations
    covariance = (u * eigenvalues) @ u.T
    return (covariance + covariance.T) / 2


def covariance_of(gaussian):
    """The covariance (n, n) of a Gaussian."""
    return (gaussian.eigenvectors * gaussian.eigenvalues) @ gaussian.eigenvectors.T


def log_prob(gaussian, x):
    """Log-density in nats of points x (n,) or (N, n): Section 3, with the sign of the constant corrected."""
    y = (_points(x, gaussian.mean.size) - gaussian.mean) @ gaussian.eigenvectors
    # L(x) = -(n/2) log(2 pi) - (1/2) log|K| - (1/2) (x - mu)^T K^-1 (x - mu)
    return -0.5 * (np.log(2 * np.pi * gaussian.eigenvalues).sum() + (y**2 / gaussian.eigenvalues).sum(-1))


def sample(gaussian, count, rng):
    """`count` draws (count, n)."""
    z = rng.standard_normal((count, gaussian.mean.size))
    return gaussian.mean + (z * np.sqrt(gaussian.eigenvalues)) @ gaussian.eigenvectors.T


def fit(samples):
    """The maximum-likelihood Gaussian of samples (N, n), N > n: mean and covariance with 1/N (Section 3)."""
    samples = np.asarray(samples, dtype=np.float64)
    if samples.ndim != 2 or len(samples) <= samples.shape[1]:
        raise ValueError(f"samples must have shape (N, n) with N > n, got {samples.shape}")
    mean = samples.mean(0)
    return from_covariance(mean, (samples - mean).T @ (samples - mean) / len(samples))


def fit_spherical(samples):
    """The maximum-likelihood Gaussian with covariance v I of samples (N, n)."""
    mean = samples.mean(0)
    return spherical(mean, np.square(samples - mean).mean())


def _pole_distance(b, e):
    """The s >= 0 with sum_i b_i^2 / (e_i + s)^2 = 1 for each row of b (N, n) >= 0; e (n,) ascends from 0.

    The hard case, where the sum stays below 1 down to s = 0, gives 0.
    Newton's method on 1 / ||b / (e + s)||, concave and nearly linear, is monotone from the left and needs no
    guard in exact arithmetic; a step that rounding throws out of the bracket gives way to bisection of log s.
    """
    # the first k terms, e_i <= e_k, sum to at most 1: s >= ||b_1..k|| - e_k; and e_i >= 0: s <= ||b||
    first = np.maximum(np.sqrt(np.cumsum(b**2, axis=1)), b)      # b, because squares may underflow
    s = np.maximum((first - e).max(1), _TINY)
    low, high = s.copy(), np.maximum(np.linalg.norm(b, axis=1), s)
    pole = np.flatnonzero(s == _TINY)
    s[pole[np.linalg.norm(b[pole] / (e + _TINY), axis=1) < 1]] = 0
    rows = np.flatnonzero(s)
    for _ in range(_ITERATIONS):
        if not rows.size:
            break
        distance = e + s[rows, None]
        ratio = b[rows] / distance                     # |delta_i| / epsilon
        square = np.einsum("ij,ij->i", ratio, ratio)
        norm = np.sqrt(square)
        left, now = norm >= 1, s[rows]
        low[rows], high[rows] = np.where(left, now, low[rows]), np.where(left, high[rows], now)
        # Newton's step for 1/||p|| = 1, p = b/(e+s):  s <- s + (||p|| - 1) ||p||^2 / sum_i p_i^2 / (e_i + s)
        step = now + (norm - 1) * square / np.einsum("ij,ij,ij->i", ratio, ratio, 1 / distance)
        lower, upper = low[rows], high[rows]
        step = np.where((step < lower) | (step > upper), np.sqrt(lower) * np.sqrt(upper), step)
        stay = (np.abs(norm - 1) <= _TOLERANCE) | (step == now)
        s[rows[~stay]] = step[~stay]
        rows = rows[~stay]
    return s


def _attack_rows(gaussian, y, epsilon):
    """The attack on centred points y (N, n) in the eigenbasis: delta there, s, and the drop."""
    eigenvalues = gaussian.eigenvalues
    # 2 eta lambda_i - 1 = g_i + s (1 + g_i), a sum that cannot cancel, with
    # g_i = lambda_i / lambda_min - 1 and s = 2 eta lambda_min - 1
    gaps = (eigenvalues - eigenvalues[0]) / eigenvalues[0]
    s = _pole_distance(np.abs(y) / ((1 + gaps) * epsilon), gaps / (1 + gaps))
    distance = gaps + s[:, None] * (1 + gaps)
    # delta = (K^-1 - 2 eta I)^-1 K^-1 (mu - x)   (Eq. 2)
    delta = np.divide(y, distance, out=np.zeros_like(y), where=distance > 0)
    hard = s == 0
    if hard.any():
        # hard case: what is left of the budget goes along u_min, either way
        spent = np.square(delta[hard] / epsilon).sum(1)
        delta[hard, 0] = epsilon * np.sqrt(np.clip(1 - spent, 0, None))
    # L(x) - L(x + delta) = (1/2) sum_i delta_i (2 y_i + delta_i) / lambda_i, no term negative
    return delta, s, 0.5 * np.einsum("ij,ij->i", delta, (2 * y + delta) / eigenvalues)


def attack(gaussian, x, epsilon):
    """The perturbation of length epsilon that lowers the log-likelihood most (Theorem 3.1, Eq. 2, corrected).

    Args:
        gaussian: the density.
        x: points, (n,) or (N, n).
        epsilon: L2 radius, in [0, inf), units of x.
    Returns:
        Attack with `delta` shaped like x. In the hard case (x - mu without a component along u_min, for
        instance x = mu, and a large epsilon) both signs along u_min are optimal, and one is returned.
    Raises:
        ValueError: epsilon negative or not finite, x of another dimension or not finite.
    """
    points, epsilon = _points(x, gaussian.mean.size), finite("epsilon", epsilon, unit="L2 radius")
    batch = np.atleast_2d(points)
    delta, s, drop = np.zeros_like(batch), np.full(len(batch), np.inf), np.zeros(len(batch))
    if epsilon > 0:
        size = max(1, _CHUNK // gaussian.mean.size)
        for rows in (slice(i, i + size) for i in range(0, len(batch), size)):
            y = (batch[rows] - gaussian.mean) @ gaussian.eigenvectors
            turned, s[rows], drop[rows] = _attack_rows(gaussian, y, epsilon)
            delta[rows] = turned @ gaussian.eigenvectors.T
    if points.ndim == 1:
        return Attack(delta[0], s[0], drop[0])
    return Attack(delta, s, drop)


def attack_spherical(mean, x, epsilon):
    """Eq. 3, the attack on N(mean, sigma^2 I): a step of length epsilon away from the mean; x != mean."""
    away = _points(x, np.size(mean)) - mean
    distance = np.linalg.norm(away, axis=-1, keepdims=True)
    if (distance == 0).any():
        raise ValueError("x must differ from the mean: there every direction is optimal")
    # delta = epsilon (x - mu) / ||x - mu||   (Eq. 3)
    return finite("epsilon", epsilon, unit="L2 radius") * away / distance


def attack_universal(gaussian, epsilon):
    """The one perturbation (n,) that lowers the mean likelihood most: epsilon u_min, up to sign.

    It is the attack at x = mu, too (Sections 3.1.2 and 3.3, corrected).
    The drop, there or on average, is epsilon^2 / (2 lambda_min) nats.
    """
    return finite("epsilon", epsilon, unit="L2 radius") * gaussian.eigenvectors[:, 0]


def objective(gaussian, x, delta):
    """(1/2) (x - mu + delta)^T K^-1 (x - mu + delta) in nats, what the attack makes large (Eq. 6)."""
    y = (np.asarray(x) - gaussian.mean + delta) @ gaussian.eigenvectors
    return 0.5 * (y**2 / gaussian.eigenvalues).sum(-1)


def kkt_residual(gaussian, x, delta, curvature):
    """||-K^-1 (x-mu) - K^-1 delta + 2 eta delta|| in the eigenbasis, over the sum of its three terms' norms.

    Eq. 7 at 2 eta = (1 + curvature) / lambda_min, for points (N, n); (N,) numbers.
    """
    y = (np.atleast_2d(x) - gaussian.mean) @ gaussian.eigenvectors
    d = np.atleast_2d(delta) @ gaussian.eigenvectors
    twice_eta = (1 + np.atleast_1d(curvature)[:, None]) / gaussian.eigenvalues[0]
    terms = np.stack([-y / gaussian.eigenvalues, -d / gaussian.eigenvalues, twice_eta * d])
    return np.linalg.norm(terms.sum(0), axis=-1) / np.linalg.norm(terms, axis=-1).sum(0)


def projected_gradient(mean, covariance, x, epsilon, restarts, rng, iterations=20_000):
    """The attack on one point x (n,) by projected gradient ascent, knowing no eigenvalue and no formula.

    Starts at `restarts` random points of the sphere of radius epsilon; long steps (a convex function may only
    rise), until no start gains 1e-13 of its value in ten steps.
    Returns `delta` (restarts, n) and the objective of Eq. 6 (restarts,) in nats.
    """
    precision = np.linalg.inv(covariance)
    z = np.asarray(x) - mean
    long = 1e3 * np.trace(covariance)
    delta = rng.standard_normal((restarts, z.size))
    delta *= epsilon / np.linalg.norm(delta, axis=1, keepdims=True)
    value = np.full(restarts, -np.inf)
    for i in range(iterations):
        gradient = (z + delta) @ precision
        if i % 10 == 0:
            before, value = value, 0.5 * np.einsum("ij,ij->i", z + delta, gradient)
            if (value - before <= 1e-13 * value).all():
                break
        delta = delta + long * gradient
        delta *= np.minimum(1, epsilon / np.linalg.norm(delta, axis=1, keepdims=True))
    return delta, value


def contest(gaussian, x, epsilon, restarts, rng):
    """Closed form against `projected_gradient` at one point x (n,): a row of numbers for a table.

    Keys: `epsilon`; `objective` and `ascent`, what either reaches (nats); `radius` and `radius_ascent`, how
    long its push is; `kkt`, `curvature`, `drop` of the closed form; `delta`, `delta_ascent`, the pushes (n,).
    """
    found = attack(gaussian, x, epsilon)
    pushes, values = projected_gradient(gaussian.mean, covariance_of(gaussian), x, epsilon, restarts, rng)
    top = pushes[values.argmax()]
    return {"epsilon": epsilon, "objective": objective(gaussian, x, found.delta), "ascent": values.max(),
            "radius": np.linalg.norm(found.delta), "radius_ascent": np.linalg.norm(top),
            "kkt": kkt_residual(gaussian, x, found.delta, found.curvature)[0], "curvature": found.curvature,
            "drop": found.drop, "delta": found.delta, "delta_ascent": top}


def stationary_points(gaussian, x, epsilon):
    """Every eta with sum_i c_i^2 / (1 - 2 eta lambda_i)^2 = epsilon^2, c = U^T (mu - x), for one x (n,).

    The theorem's second condition, 2 eta lambda_i >= 1, is left out: only the largest root meets it, and in
    the hard case none.
    Returns `eta` (roots,) ascending, and `delta` (roots, n) by Eq. 2.
    """
    c = (gaussian.mean - _points(x, gaussian.mean.size)) @ gaussian.eigenvectors
    used = c != 0
    c, eigenvalues = c[used], gaussian.eigenvalues[used]
    poles = np.unique(1 / eigenvalues)
    # no root lies half as far beyond the outer poles
    reach = 2 * np.linalg.norm(c / eigenvalues) / epsilon
    edges = np.concatenate([[poles[0] - reach], poles, [poles[-1] + reach]])

    def excess(t):     # of the length at t = 2 eta
        return (c**2 / (1 - t * eigenvalues)**2).sum() - epsilon**2

    def slope(t):
        return (c**2 * eigenvalues / (1 - t * eigenvalues)**3).sum()

    roots = []
    for i, (a, b) in enumerate(zip(edges[:-1], edges[1:])):
        if b - a < 1e-9 * abs(b):     # eigenvalues tied but for rounding
            continue
        inside = [a + 1e-9 * (b - a) * (i > 0), b - 1e-9 * (b - a) * (i < len(edges) - 2)]
        if 0 < i < len(edges) - 2 and slope(inside[0]) * slope(inside[1]) < 0:
            inside.insert(1, brentq(slope, *inside, xtol=1e-300))      # convex between two poles
        roots += [brentq(excess, p, q, xtol=1e-300, rtol=1e-15) for p, q in zip(inside[:-1], inside[1:])
                  if excess(p) * excess(q) <= 0]
    eta = np.array(roots) / 2
    delta = np.zeros((eta.size, gaussian.mean.size))
    delta[:, used] = c / (1 - 2 * eta[:, None] * eigenvalues)
    return eta, delta @ gaussian.eigenvectors.T
