"""The fits of scaling.py: power laws of one axis, L(N, D), IsoFLOP parabolas. N parameters, D tokens, y losses: float arrays (n,).

Each why_not_* says why points cannot carry a law, or nothing. Needs numpy, and scipy for L(N, D).
"""

import math

import numpy as np

# -----------------------------------------------------------------------------
# One axis


def why_not_axis(x: np.ndarray, y: np.ndarray) -> str:
    """Why these points carry no power law, or nothing."""
    distinct = np.unique(x)
    if len(distinct) < 3:
        return f"{len(distinct)} different values, a power law needs 3"
    if distinct[-1] / distinct[0] < 3:
        return f"values within a factor of {distinct[-1] / distinct[0]:.2g}, a power law needs 3"
    if np.corrcoef(np.log(x), np.log(y))[0, 1] > -0.5:
        return "the loss does not fall along it"
    return ""


def fit_power(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(a, b) of L = a x^-b, by least squares of log loss."""
    slope, level = np.polyfit(np.log(x), np.log(y), 1)
    return float(np.exp(level)), float(-slope)


def fit_offset(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """(a, b, c) of L = c + a x^-b, c at least 0: for each c a line through log(L - c), and the c with the least error in log L."""

    def line(c):
        slope, level = np.polyfit(np.log(x), np.log(y - c), 1)
        error = np.log(c + np.exp(level) * x**slope) - np.log(y)
        return float(error @ error), float(np.exp(level)), float(-slope), c

    tries = y.min() * (1 - np.geomspace(1, 1e-3, 200))
    near = min(map(line, tries))[3]
    step = y.min() * 0.02
    fine = np.clip(np.linspace(near - step, near + step, 101), 0, y.min() * 0.9999)
    _, a, b, c = min(map(line, fine))
    return a, b, c


def leave_one_out(x: np.ndarray, y: np.ndarray) -> float:
    """The mean relative error of predicting each value of x from the others."""
    errors = []
    for value in np.unique(x):
        rest = x != value
        if len(np.unique(x[rest])) >= 3:
            a, b, c = fit_offset(x[rest], y[rest])
            errors += list(abs((c + a * x[~rest] ** -b) / y[~rest] - 1))
    return float(np.mean(errors))


def r_squared(y: np.ndarray, predicted: np.ndarray) -> float:
    """Of log loss."""
    y, predicted = np.log(y), np.log(predicted)
    return float(1 - ((y - predicted) ** 2).sum() / ((y - y.mean()) ** 2).sum())


# -----------------------------------------------------------------------------
# N and D: https://arxiv.org/abs/2203.15556, section 3.3


def why_not_surface(N: np.ndarray, D: np.ndarray) -> str:
    for name, values in (("params", N), ("tokens", D)):
        if len(np.unique(values)) < 3:
            return f"{len(np.unique(values))} different {name}, the exponent of each needs 3"
        if values.max() / values.min() < 3:
            return f"{name} within a factor of {values.max() / values.min():.2g}, their exponent needs 3"
    if len(N) < 8:
        return f"{len(N)} runs, five coefficients need 8"
    if abs(np.corrcoef(np.log(N), np.log(D))[0, 1]) > 0.98:
        return "params and tokens grow together: nobody can tell their effects apart; vary one at a fixed other"
    return ""


def surface(theta, N, D):
    """log L of L = E + A / N^alpha + B / D^beta at theta = (log A, log B, log E, alpha, beta)."""
    a, b, e, alpha, beta = theta
    return np.logaddexp(np.logaddexp(a - alpha * np.log(N), b - beta * np.log(D)), e)


def objective(theta, N, D, y, delta):
    """Huber's loss of log loss, quadratic up to delta, over delta^2; and its gradient."""
    a, b, e, alpha, beta = theta
    log_n, log_d = np.log(N), np.log(D)
    terms = np.stack((a - alpha * log_n, b - beta * log_d, np.full_like(y, e)))
    total = np.logaddexp(np.logaddexp(terms[0], terms[1]), terms[2])
    share = np.exp(terms - total)
    r = total - np.log(y)
    small = abs(r) <= delta
    value = np.where(small, r**2 / 2, delta * (abs(r) - delta / 2)).sum()
    g = np.where(small, r, delta * np.sign(r))
    gradient = (g @ share[0], g @ share[1], g @ share[2], -(g * share[0]) @ log_n, -(g * share[1]) @ log_d)
    return value / delta**2, np.array(gradient) / delta**2


def fit_surface(N, D, y, starts, delta=1e-3) -> np.ndarray:
    """theta of the best fit by L-BFGS from each start, in units that suit it (N and D over their geometric means)."""
    from scipy.optimize import minimize

    mean_n, mean_d = np.exp(np.log(N).mean()), np.exp(np.log(D).mean())
    bounds = [(-30, 30), (-30, 30), (-30, 30), (0, 5), (0, 5)]
    best, lowest = None, math.inf
    for start in starts:
        done = minimize(
            objective, start, (N / mean_n, D / mean_d, y, delta), "L-BFGS-B", jac=True, bounds=bounds,
            options=dict(maxiter=1000, ftol=1e-13, gtol=1e-9),
        )  # fmt: skip
        if done.fun < lowest:
            best, lowest = done.x, done.fun
    a, b, e, alpha, beta = best
    return np.array([a + alpha * np.log(mean_n), b + beta * np.log(mean_d), e, alpha, beta])


def scaled(theta, N, D):
    """A start for fit_surface at coefficients in plain units."""
    a, b, e, alpha, beta = theta
    return np.array([a - alpha * np.log(N).mean(), b - beta * np.log(D).mean(), e, alpha, beta])


def grid_of_starts(y) -> list[np.ndarray]:
    """Where the three terms share the loss in different ways, at exponents from 0.1 to 1.5."""
    level = math.log(float(np.median(y)))
    shares = (0.05, 0.3, 0.8)
    return [
        np.array([level + math.log(p), level + math.log(q), level + math.log(r), alpha, beta])
        for p in shares for q in shares for r in shares for alpha in (0.1, 0.35, 0.8, 1.5) for beta in (0.1, 0.35, 0.8, 1.5)
    ]  # fmt: skip


def natural(theta) -> dict[str, float]:
    a, b, e, alpha, beta = map(float, theta)
    return dict(E=math.exp(e), A=math.exp(a), B=math.exp(b), alpha=alpha, beta=beta)


def optimum(theta, flops: float) -> tuple[float, float]:
    """Parameters and tokens of least loss with 6 N D = flops (https://arxiv.org/abs/2203.15556, eq. 4)."""
    a, b, _, alpha, beta = theta
    log_g = (math.log(alpha) + a - math.log(beta) - b) / (alpha + beta)
    log_n = log_g + beta / (alpha + beta) * math.log(flops / 6)
    return math.exp(log_n), flops / 6 / math.exp(log_n)


# -----------------------------------------------------------------------------
# IsoFLOP: the same, section 3.2


def fit_isoflop(points: list[dict]) -> dict:
    """A parabola of loss in log N for each budget (runs within 10 % of one another); its lowest N grows as a power of C."""
    left, curves, refused = sorted(points, key=lambda p: p["flops"]), [], []
    while left:
        near = [p for p in left if p["flops"] <= 1.1 * left[0]["flops"]]
        left = left[len(near) :]
        flops = float(np.mean([p["flops"] for p in near]))
        n, y = np.log([p["params"] for p in near]), np.array([p["loss"] for p in near])
        if len(np.unique(n)) < 4:
            if len(np.unique(n)) > 1:
                refused.append(f"{flops:.3g} FLOPs: {len(np.unique(n))} sizes, a parabola needs 4")
            continue
        c2, c1, c0 = np.polyfit(n, y, 2)
        lowest = -c1 / (2 * c2) if c2 > 0 else math.nan
        if not n.min() < lowest < n.max():
            refused.append(
                f"{flops:.3g} FLOPs: no lowest loss among its sizes, add {'larger' if c1 + 2 * c2 * n.max() < 0 else 'smaller'} ones"
            )
            continue
        low = c0 + c1 * lowest + c2 * lowest**2
        by_size = sorted((math.log(p["params"]), math.log(p["tokens"])) for p in near)
        tokens = math.exp(np.interp(lowest, *zip(*by_size)))
        curves.append(
            dict(flops=flops, coefficients=[c2, c1, c0], best_params=math.exp(lowest), best_loss=float(low), best_tokens=tokens)
        )  # fmt: skip
    told: dict = {"budgets": curves, "left_out": refused}
    if len(curves) < 2:
        more = f" ({'; '.join(refused)})" if refused else ""
        told["refused"] = f"{len(curves)} budgets with four sizes and a lowest between them, a trend needs 2{more}"
        return told
    C, N = (np.log([c[k] for c in curves]) for k in ("flops", "best_params"))
    slope, level = np.polyfit(C, N, 1)
    return told | dict(exponent_of_N=float(slope), factor=float(np.exp(level)))
