"""The fits of scaling.py: power laws along one axis, L(N, D), and IsoFLOP parabolas.

The last two are those of https://arxiv.org/abs/2203.15556: L(N, D) in section 3.3 and appendix D.3, IsoFLOP in 3.2.
N is the number of parameters, D the number of tokens, y the loss: float arrays (n,). Functions named why_not_* return
why the points cannot support a law, or "". L(N, D) needs scipy.
"""

import itertools
import math

import numpy as np


def columns(points: list[dict], *keys: str) -> list[np.ndarray]:
    return [np.array([point[key] for point in points], float) for key in keys]


def frontier(points: list[dict]) -> list[dict]:
    """The points that no point with the same FLOPs or fewer beats."""
    best: list[dict] = []
    for point in sorted(points, key=lambda p: (p["flops"], p["loss"])):
        if not best or point["loss"] < best[-1]["loss"]:
            best.append(point)
    return best


def why_not_exponent(name: str, values: np.ndarray) -> str:
    distinct = np.unique(values)
    if len(distinct) < 3:
        return f"{len(distinct)} different {name}, an exponent needs 3"
    if distinct[-1] / distinct[0] < 3:
        return f"{name} span a factor of {distinct[-1] / distinct[0]:.2g}, an exponent needs 3"
    return ""


def why_not_axis(x: np.ndarray, y: np.ndarray) -> str:
    if reason := why_not_exponent("values", x):
        return reason
    falls = np.corrcoef(np.log(x), np.log(y))[0, 1] < -0.5
    return "" if falls else "the loss does not fall along this axis"


def power_law(x, a, b, c=0.0):
    return c + a * x**-b


def formula(law: dict) -> str:
    return (f"{law['c']:.4g} + " if "c" in law else "") + f"{law['a']:.4g} x^-{law['b']:.4g}"


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
        a, b = fit_power(x, y - c)
        error = np.log(power_law(x, a, b, c) / y)
        return float(error @ error), a, b, c

    coarse = y.min() * (1 - np.geomspace(1, 1e-3, 200))
    best = min(map(fit_given, coarse))[3]
    width = y.min() * 0.02
    fine = np.clip(np.linspace(best - width, best + width, 101), 0, y.min() * 0.9999)
    return min(map(fit_given, fine))[1:]


def leave_one_out(x: np.ndarray, y: np.ndarray) -> float:
    """Mean relative error of the loss at each value of x, predicted from the other values by fit_offset()."""
    errors = []
    for value in np.unique(x):
        rest = x != value
        predicted = power_law(value, *fit_offset(x[rest], y[rest]))
        errors += list(abs(predicted / y[~rest] - 1))
    return float(np.mean(errors))


def r_squared(y: np.ndarray, predicted: np.ndarray) -> float:
    """R² of log loss."""
    return float(1 - (np.log(y / predicted) ** 2).mean() / np.log(y).var())


def why_not_surface(N: np.ndarray, D: np.ndarray) -> str:
    if reason := why_not_exponent("params", N) or why_not_exponent("tokens", D):
        return reason
    if len(N) < 8:
        return f"{len(N)} runs, five coefficients need 8"
    if abs(np.corrcoef(np.log(N), np.log(D))[0, 1]) > 0.98:
        return "params and tokens grow together, which mixes their effects; vary one while the other is fixed"
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
    clipped = np.clip(residual, -delta, delta)  # the derivative of the Huber loss
    value = (clipped * (residual - clipped / 2)).sum()
    wa, wb, we = clipped * weights
    gradient = np.array([wa.sum(), wb.sum(), we.sum(), -wa @ log_n, -wb @ log_d])
    return value / delta**2, gradient / delta**2


def fit_surface(N, D, y, delta: float = 1e-3, start: np.ndarray | None = None) -> np.ndarray:
    """theta with the lowest objective(), by L-BFGS from the theta `start`, or from every point of a grid.

    The grid divides the loss among the three terms in different ways, with exponents from 0.1 to 1.5.
    """
    from scipy.optimize import minimize

    # In units of the geometric means of N and D, log A and log B hardly depend on the exponents.
    log_means = np.array([np.log(N).mean(), np.log(D).mean()])
    if start is None:
        parts, exponents = np.log(np.median(y) * np.array([0.05, 0.3, 0.8])), (0.1, 0.35, 0.8, 1.5)
        starts = list(itertools.product(parts, parts, parts, exponents, exponents))
    else:
        starts = [np.concatenate([start[:2] - start[3:] * log_means, start[2:]])]
    data = (N / np.exp(log_means[0]), D / np.exp(log_means[1]), y, delta)
    bounds = [(-30, 30), (-30, 30), (-30, 30), (0, 5), (0, 5)]
    options = dict(maxiter=1000, ftol=1e-13, gtol=1e-9)
    fits = [minimize(objective, s, data, "L-BFGS-B", jac=True, bounds=bounds, options=options) for s in starts]
    best = min(fits, key=lambda fit: fit.fun).x
    return np.concatenate([best[:2] + best[3:] * log_means, best[2:]])


def coefficients(theta) -> dict[str, float]:
    log_a, log_b, log_e, alpha, beta = map(float, theta)
    return dict(E=math.exp(log_e), A=math.exp(log_a), B=math.exp(log_b), alpha=alpha, beta=beta)


def optimum(theta, flops: float) -> tuple[float, float]:
    """Parameters and tokens with the lowest loss at 6 N D = flops (eq. 4 of the paper)."""
    log_a, log_b, _, alpha, beta = theta
    log_g = (math.log(alpha) + log_a - math.log(beta) - log_b) / (alpha + beta)
    log_n = log_g + beta / (alpha + beta) * math.log(flops / 6)
    return math.exp(log_n), flops / 6 / math.exp(log_n)


def fit_isoflop(points: list[dict]) -> dict:
    """The best N of each budget, by a parabola of loss in log N, and the power of C by which it grows, or why not.

    Points whose FLOPs are within 10 % of the smallest belong to one budget, which needs four sizes around the best.
    """
    budgets, left_out = [], []
    remaining = sorted(points, key=lambda p: p["flops"])
    while remaining:
        group = [p for p in remaining if p["flops"] <= 1.1 * remaining[0]["flops"]]
        remaining = remaining[len(group) :]
        C, N, y = columns(group, "flops", "params", "loss")
        flops, log_n, sizes = float(C.mean()), np.log(N), len(np.unique(N))
        if sizes < 4:
            left_out += [f"{flops:.3g} FLOPs: {sizes} sizes, a parabola needs 4"] * (sizes > 1)
            continue
        c2, c1, c0 = parabola = np.polyfit(log_n, y, 2).tolist()
        best = -c1 / (2 * c2) if c2 > 0 else math.nan
        if not log_n.min() < best < log_n.max():
            missing = "larger" if c1 + 2 * c2 * log_n.max() < 0 else "smaller"
            left_out.append(f"{flops:.3g} FLOPs: no minimum among its sizes, add {missing} ones")
            continue
        best_loss = c0 - c1**2 / (4 * c2)
        budgets.append(dict(flops=flops, coefficients=parabola, best_params=math.exp(best), best_loss=best_loss))
    law: dict = {"budgets": budgets, "left_out": left_out}
    if len(budgets) < 2:
        reasons = f" ({'; '.join(left_out)})" if left_out else ""
        return law | {"refused": f"{len(budgets)} budgets with four sizes and a minimum, a trend needs 2{reasons}"}
    factor, exponent = fit_power(*columns(budgets, "flops", "best_params"))
    return law | dict(exponent_of_N=-exponent, factor=factor)
