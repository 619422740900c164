"""The fits of scaling.py: power laws along one axis, L(N, D), and IsoFLOP parabolas.

N is the number of parameters, D the number of tokens, y the loss: float arrays (n,). The functions named why_not_* return
why the points cannot support a law, or "". L(N, D) needs scipy.
"""

import math

import numpy as np

# -----------------------------------------------------------------------------
# One axis


def frontier(points: list[dict]) -> list[dict]:
    """The points that no point with the same FLOPs or fewer beats."""
    best: list[dict] = []
    for point in sorted(points, key=lambda p: (p["flops"], p["loss"])):
        if not best or point["loss"] < best[-1]["loss"]:
            best.append(point)
    return best


def why_not_axis(x: np.ndarray, y: np.ndarray) -> str:
    distinct = np.unique(x)
    if len(distinct) < 3:
        return f"{len(distinct)} different values, a power law needs 3"
    if distinct[-1] / distinct[0] < 3:
        return f"the values span a factor of {distinct[-1] / distinct[0]:.2g}, a power law needs 3"
    if np.corrcoef(np.log(x), np.log(y))[0, 1] > -0.5:
        return "the loss does not fall along this axis"
    return ""


def power_law(x, a, b, c=0.0):
    return c + a * x**-b


def fit_power(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(a, b) of L = a x^-b, by least squares on log loss."""
    slope, intercept = np.polyfit(np.log(x), np.log(y), 1)
    return float(np.exp(intercept)), float(-slope)


def fit_offset(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """(a, b, c) of L = c + a x^-b with c >= 0.

    For each candidate c, a and b follow from a straight line through log(L - c). The c with the least squared error of
    log L wins: first on a coarse grid below the lowest loss, then on a fine grid around the best one.
    """

    def fit_given(c):
        slope, intercept = np.polyfit(np.log(x), np.log(y - c), 1)
        error = np.log(c + np.exp(intercept) * x**slope) - np.log(y)
        return float(error @ error), float(np.exp(intercept)), float(-slope), c

    coarse = y.min() * (1 - np.geomspace(1, 1e-3, 200))
    best = min(map(fit_given, coarse))[3]
    width = y.min() * 0.02
    fine = np.clip(np.linspace(best - width, best + width, 101), 0, y.min() * 0.9999)
    _, a, b, c = min(map(fit_given, fine))
    return a, b, c


def leave_one_out(x: np.ndarray, y: np.ndarray) -> float:
    """Mean relative error of the loss at each value of x, predicted from the other values by fit_offset()."""
    errors = []
    for value in np.unique(x):
        rest = x != value
        if len(np.unique(x[rest])) >= 3:
            predicted = power_law(x[~rest], *fit_offset(x[rest], y[rest]))
            errors += list(abs(predicted / y[~rest] - 1))
    return float(np.mean(errors))


def r_squared(y: np.ndarray, predicted: np.ndarray) -> float:
    """R² of log loss."""
    y, predicted = np.log(y), np.log(predicted)
    return float(1 - ((y - predicted) ** 2).sum() / ((y - y.mean()) ** 2).sum())


# -----------------------------------------------------------------------------
# N and D: https://arxiv.org/abs/2203.15556, section 3.3 and appendix D.3


def why_not_surface(N: np.ndarray, D: np.ndarray) -> str:
    for name, values in (("params", N), ("tokens", D)):
        if len(np.unique(values)) < 3:
            return f"{len(np.unique(values))} different {name}, the exponent of each needs 3"
        if values.max() / values.min() < 3:
            return f"{name} span a factor of {values.max() / values.min():.2g}, their exponent needs 3"
    if len(N) < 8:
        return f"{len(N)} runs, five coefficients need 8"
    if abs(np.corrcoef(np.log(N), np.log(D))[0, 1]) > 0.98:
        return (
            "params and tokens grow together, so their effects cannot be separated; vary one while the other is fixed"
        )
    return ""


def surface(theta, N, D):
    """log L of L = E + A / N^alpha + B / D^beta at theta = (log A, log B, log E, alpha, beta)."""
    log_a, log_b, log_e, alpha, beta = theta
    return np.logaddexp(np.logaddexp(log_a - alpha * np.log(N), log_b - beta * np.log(D)), log_e)


def objective(theta, N, D, y, delta):
    """Huber loss of the residuals of log loss (quadratic up to delta), divided by delta^2; and its gradient."""
    log_a, log_b, log_e, alpha, beta = theta
    log_n, log_d = np.log(N), np.log(D)
    predicted = surface(theta, N, D)
    terms = np.stack((log_a - alpha * log_n, log_b - beta * log_d, np.full_like(y, log_e)))
    weights = np.exp(terms - predicted)  # (3, n): the part of each term in the predicted loss
    residual = predicted - np.log(y)
    is_small = abs(residual) <= delta
    value = np.where(is_small, residual**2 / 2, delta * (abs(residual) - delta / 2)).sum()
    wa, wb, we = np.where(is_small, residual, delta * np.sign(residual)) * weights
    gradient = np.array([wa.sum(), wb.sum(), we.sum(), -wa @ log_n, -wb @ log_d])
    return value / delta**2, gradient / delta**2


def fit_surface(N, D, y, starts, delta: float = 1e-3) -> np.ndarray:
    """theta with the lowest objective(), by L-BFGS from each start.

    The starts are in units of the geometric means of N and D, as grid_of_starts() and to_scaled() return them.
    """
    from scipy.optimize import minimize

    log_mean_n, log_mean_d = np.log(N).mean(), np.log(D).mean()
    data = (N / np.exp(log_mean_n), D / np.exp(log_mean_d), y, delta)
    bounds = [(-30, 30), (-30, 30), (-30, 30), (0, 5), (0, 5)]
    options = dict(maxiter=1000, ftol=1e-13, gtol=1e-9)
    fits = [minimize(objective, s, data, "L-BFGS-B", jac=True, bounds=bounds, options=options) for s in starts]
    log_a, log_b, log_e, alpha, beta = min(fits, key=lambda fit: fit.fun).x
    return np.array([log_a + alpha * log_mean_n, log_b + beta * log_mean_d, log_e, alpha, beta])


def to_scaled(theta, N, D) -> np.ndarray:
    """theta in the units of fit_surface()'s starts."""
    log_a, log_b, log_e, alpha, beta = theta
    return np.array([log_a - alpha * np.log(N).mean(), log_b - beta * np.log(D).mean(), log_e, alpha, beta])


def grid_of_starts(y) -> list[np.ndarray]:
    """Starts at which the three terms divide the loss in different ways, with exponents from 0.1 to 1.5."""
    level = math.log(float(np.median(y)))
    parts, exponents = np.log((0.05, 0.3, 0.8)), (0.1, 0.35, 0.8, 1.5)
    return [
        np.array([level + p, level + q, level + r, alpha, beta])
        for p in parts for q in parts for r in parts for alpha in exponents for beta in exponents
    ]  # fmt: skip


def coefficients(theta) -> dict[str, float]:
    log_a, log_b, log_e, alpha, beta = map(float, theta)
    return dict(E=math.exp(log_e), A=math.exp(log_a), B=math.exp(log_b), alpha=alpha, beta=beta)


def optimum(theta, flops: float) -> tuple[float, float]:
    """Parameters and tokens with the lowest loss at 6 N D = flops (https://arxiv.org/abs/2203.15556, eq. 4)."""
    log_a, log_b, _, alpha, beta = theta
    log_g = (math.log(alpha) + log_a - math.log(beta) - log_b) / (alpha + beta)
    log_n = log_g + beta / (alpha + beta) * math.log(flops / 6)
    return math.exp(log_n), flops / 6 / math.exp(log_n)


# -----------------------------------------------------------------------------
# IsoFLOP: the same paper, section 3.2


def fit_isoflop(points: list[dict]) -> dict:
    """The best N of each budget by a parabola of loss in log N, and the power of C by which it grows, or why there is none.

    Points belong to one budget if their FLOPs are within 10 % of the smallest. A budget needs four sizes around the best one.
    """
    curves, refused = [], []
    remaining = sorted(points, key=lambda p: p["flops"])
    while remaining:
        group = [p for p in remaining if p["flops"] <= 1.1 * remaining[0]["flops"]]
        remaining = remaining[len(group) :]
        flops = float(np.mean([p["flops"] for p in group]))
        n, y = np.log([p["params"] for p in group]), np.array([p["loss"] for p in group])
        sizes = len(np.unique(n))
        if sizes < 4:
            refused += [f"{flops:.3g} FLOPs: {sizes} sizes, a parabola needs 4"] * (sizes > 1)
            continue
        c2, c1, c0 = parabola = np.polyfit(n, y, 2)
        best = -c1 / (2 * c2) if c2 > 0 else math.nan
        if not n.min() < best < n.max():
            missing = "larger" if c1 + 2 * c2 * n.max() < 0 else "smaller"
            refused.append(f"{flops:.3g} FLOPs: no minimum among its sizes, add {missing} ones")
            continue
        by_size = sorted((math.log(p["params"]), math.log(p["tokens"])) for p in group)
        tokens = math.exp(np.interp(best, *zip(*by_size)))
        found = dict(best_params=math.exp(best), best_loss=float(np.polyval(parabola, best)), best_tokens=tokens)
        curves.append(dict(flops=flops, coefficients=[c2, c1, c0], **found))
    law: dict = {"budgets": curves, "left_out": refused}
    if len(curves) < 2:
        reasons = f" ({'; '.join(refused)})" if refused else ""
        return law | {"refused": f"{len(curves)} budgets with four sizes and a minimum, a trend needs 2{reasons}"}
    C, N = (np.log([curve[key] for curve in curves]) for key in ("flops", "best_params"))
    slope, intercept = np.polyfit(C, N, 1)
    return law | dict(exponent_of_N=float(slope), factor=float(np.exp(intercept)))
