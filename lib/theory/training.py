"""Adversarial training of a Gaussian, closed form and simulation: Sections 3.2 and 8.2 of Pope et al. 2020.

Symbols: n the dimension, sigma^2 the variance of the spherical data, v = sigma^2 f the variance of the
trained model (`factor` f), epsilon the L2 radius of the attack and `ratio` = epsilon / sigma.
The paper prints epsilon where epsilon / sigma belongs: its formulas are the ones here at ratio = epsilon.
"""
import numpy as np
from scipy import special, stats

from lib.theory import gaussian as gs

READINGS = {"a": "attack the clean data at every step",
            "b": "attack the attacked data again",
            "c": "redraw from the model, fixed radius",
            "d": "redraw from the model, radius grows with it"}


def _dimension(n):
    if np.ndim(n) or n != int(n) or n < 1:
        raise ValueError(f"n must be an integer >= 1, got {n}")
    return int(n)


def _share(name, value):
    if not 0 < value < 1:
        raise ValueError(f"{name} must be in (0, 1), got {value}")
    return value


def mean_chi(n):
    """E ||z|| for z ~ N(0, I_n), c_n = sqrt(2) Gamma((n+1)/2) / Gamma(n/2); without overflow for any n."""
    n = _dimension(n)
    return np.sqrt(2) * np.exp(special.gammaln((n + 1) / 2) - special.gammaln(n / 2))


def growth(n, ratio):
    """alpha: one step of adversarial training multiplies the variance by 1 + alpha (Section 3.2).

    `ratio` = epsilon / sigma may be an array; the paper prints ratio = epsilon.
    """
    ratio = np.asarray(ratio, dtype=np.float64)
    # alpha = (2 sqrt(2) / n) (eps/sigma) Gamma((n+1)/2) / Gamma(n/2) + (eps/sigma)^2 / n
    return (2 * ratio * mean_chi(n) + ratio**2) / n


def factor(reading, steps, n, ratio):
    """Variance of the model over that of the data after 0, 1, ..., `steps` steps; Eq. 4 corrected.

    `reading` is one of `READINGS`; the paper's (1 + alpha)^m is reading "d".
    """
    if reading not in READINGS:
        raise ValueError(f"reading must be one of {', '.join(READINGS)}, got {reading!r}")
    ratio, m = gs.finite("ratio", ratio), np.arange(steps + 1)
    if reading == "a":
        # the attack ignores the model's variance, so every step repeats the first
        return np.where(m == 0, 1, 1 + growth(n, ratio))
    if reading == "b":
        # m steps of epsilon straight away from the mean are one step of m epsilon
        return 1 + growth(n, m * ratio)
    if reading == "c":
        factors = [1.0]
        for _ in range(steps):
            # sigma_{k+1}^2 = sigma_k^2 (1 + alpha(eps / sigma_k))
            factors.append(factors[-1] * (1 + float(growth(n, ratio / np.sqrt(factors[-1])))))
        return np.array(factors)
    # K_m = sigma^2 (1 + alpha)^m I   (Eq. 4)
    return (1 + growth(n, ratio))**m


def adversarial_training(samples, epsilon, steps, reading, rng, fit=gs.fit):
    """Adversarial training by simulation: attack, refit, `steps` times (Section 3.2 under one of `READINGS`).

    Args:
        samples: clean data (N, n).
        epsilon: L2 radius, in [0, inf); "d" scales it with the model's root-mean variance.
        steps: number of refits, at least 0.
        reading: which samples are attacked, a key of `READINGS`.
        rng: numpy generator, used by "c" and "d".
        fit: samples -> Gaussian; `gaussian.fit` or `gaussian.fit_spherical`.
    Returns:
        The models, steps + 1 of them, and the last attacked samples (N, n).
    """
    if reading not in READINGS:
        raise ValueError(f"reading must be one of {', '.join(READINGS)}, got {reading!r}")
    models, attacked = [fit(samples)], samples
    for _ in range(steps):
        model = models[-1]
        base = {"a": samples, "b": attacked}.get(reading)
        if base is None:
            base = gs.sample(model, len(samples), rng)
        # reading (d): epsilon_k = epsilon sigma_k / sigma
        spread = np.sqrt(model.eigenvalues.mean() / models[0].eigenvalues.mean()) if reading == "d" else 1
        attacked = base + gs.attack(model, base, epsilon * spread).delta
        models.append(fit(attacked))
    return models, attacked


def natural_log_prob(n, sigma, factor):
    """L_nat: mean log-likelihood in nats of N(mu, sigma^2 I) under the model N(mu, sigma^2 factor I)."""
    # L_nat = -(n/2) log(2 pi sigma^2 f) - n / (2 f)
    return -n / 2 * (np.log(2 * np.pi * sigma**2 * factor) + 1 / factor)


def natural_drop(n, factor):
    """L_nat-dr: clean log-likelihood in nats lost by training, KL(N(0, I) || N(0, factor I))."""
    # L_nat-dr = (n/2) (log f + 1/f - 1)
    return n / 2 * (np.log(factor) + 1 / factor - 1)


def adversarial_log_prob(n, sigma, ratio, factor):
    """L_adv: mean log-likelihood in nats of attacked data; ratio = epsilon / sigma (printed: epsilon)."""
    # L_adv = -(n/2) log(2 pi sigma^2 f) - [n + 2 (eps/sigma) c_n + (eps/sigma)^2] / (2 f)
    return natural_log_prob(n, sigma, factor) - sensitivity(n, ratio, factor)


def sensitivity(n, ratio, factor):
    """L_sen: mean drop in nats under attack (Eq. 5); ratio = epsilon / sigma (printed: epsilon)."""
    # L_sen = [2 (eps/sigma) c_n + (eps/sigma)^2] / (2 f) = n alpha / (2 f)
    return n * growth(n, ratio) / (2 * factor)


def drop_at(distance, epsilon, variance):
    """Drop in nats at a distance ||x - mu|| under the model N(mu, variance I) (Section 8.2)."""
    # L(x) - L(x + delta) = (2 eps ||x - mu|| + eps^2) / (2 v)
    return (2 * epsilon * distance + epsilon**2) / (2 * variance)


def coverage(n, sigma, epsilon, variance, drop):
    """P(drop of x < `drop`) for x ~ N(mu, sigma^2 I) under the model N(mu, variance I), exact."""
    # P(chi_n < (2 Delta v - eps^2) / (2 eps sigma))
    reach = (2 * drop * np.asarray(variance) - epsilon**2) / (2 * epsilon * sigma)
    return stats.chi2.cdf(np.clip(reach, 0, None)**2, n)


def bound_quantile(n, gamma):
    """The theorem's bound on the (1 - gamma)-quantile of chi_n: max(sqrt(20 log(1/gamma)), sqrt(2n))."""
    return np.sqrt(max(20 * np.log(1 / _share("gamma", gamma)), 2 * _dimension(n)))


def needed_variance(sigma, epsilon, drop, quantile):
    """Variance of the model at which a point `quantile` sigmas from the mean drops by exactly `drop` nats."""
    for name, value in (("sigma", sigma), ("epsilon", epsilon), ("drop", drop)):
        gs.finite(name, value, strict=True)
    # V = (2 sigma eps q + eps^2) / (2 Delta)
    return (2 * sigma * epsilon * quantile + epsilon**2) / (2 * drop)


def steps_growing(variance, sigma, alpha):
    """Steps m >= 0 (real) until sigma^2 (1 + alpha)^m is `variance`: Theorem 3.2 as printed, reading "d"."""
    return max(0.0, np.log(variance / sigma**2) / np.log1p(alpha))


def steps_again(variance, sigma, epsilon, n):
    """Steps m >= 0 (real) until reading "b" reaches `variance`: Theorem 3.2 corrected for that reading."""
    # 1 + 2 m (eps/sigma) c_n / n + m^2 (eps/sigma)^2 / n = V / sigma^2
    c = mean_chi(n) * sigma
    return (np.sqrt(c**2 + n * max(0.0, variance - sigma**2)) - c) / epsilon


def log_chi2_tail(n, x):
    """log P(X >= x) for X ~ chi^2(n), arrays with x >= n + 1, far below the smallest float, too.

    Legendre's continued fraction of the incomplete gamma function; scipy's logsf underflows to -inf there.
    """
    a, z, rest = np.asarray(n) / 2, np.asarray(x) / 2, 0.0
    # Gamma(a, z) = e^-z z^a / (z + 1 - a - 1 (1 - a) / (z + 3 - a - 2 (2 - a) / (z + 5 - a - ...)))
    for k in range(400, 0, -1):
        rest = k * (k - a) / (z + 2 * k + 1 - a - rest)
    return -z + a * np.log(z) - np.log(z + 1 - a - rest) - special.gammaln(a)
