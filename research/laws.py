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
    if np.ptp(y) == 0:
        return "all runs have the same loss"
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


def power_intervals(x: np.ndarray, y: np.ndarray) -> dict[str, list[float]]:
    """The 95 % intervals of a and b of L = a x^-b, by Student's t for the line through log L."""
    from scipy.stats import linregress, t

    line, quantile = linregress(np.log(x), np.log(y)), t.ppf(0.975, len(x) - 2)
    b, log_a = -line.slope, line.intercept
    half_b, half_a = quantile * line.stderr, quantile * line.intercept_stderr
    return {"a": [math.exp(log_a - half_a), math.exp(log_a + half_a)], "b": [b - half_b, b + half_b]}


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


def offset_intervals(x: np.ndarray, y: np.ndarray) -> dict[str, list[float]]:
    """The 95 % intervals of a, b and c of L = c + a x^-b, by profile likelihood.

    A value is inside if the best fit with it is not significantly worse than the best fit of all (F test).
    """
    from scipy.optimize import least_squares
    from scipy.stats import f

    a, b, c = fit_offset(x, y)
    best = np.array([math.log(a), b, c])
    lowest, highest = np.array([-600.0, 0.0, 0.0]), np.array([600.0, 10.0, 0.9999 * y.min()])

    def fit(fixed: int | None = None, value: float = 0.0, start=best) -> tuple[float, np.ndarray]:
        free = [n for n in range(3) if n != fixed]

        def whole(parameters) -> np.ndarray:
            theta = np.full(3, value)
            theta[free] = parameters
            return theta

        def residuals(parameters):
            log_a, b, c = whole(parameters)
            return np.log(power_law(x, math.exp(log_a), b, c) / y)

        def gradients(parameters):
            log_a, b, c = whole(parameters)
            falling = power_law(x, math.exp(log_a), b, 0.0)
            return (np.stack((falling, -falling * np.log(x), np.ones_like(x))) / (falling + c))[free].T

        inside = np.clip(start[free], lowest[free] + 1e-9, highest[free] - 1e-9)
        bounds = (lowest[free], highest[free])
        found = least_squares(residuals, inside, gradients, bounds, x_scale=abs(inside) + 1e-2)
        return 2 * found.cost, whole(found.x)

    smallest, best = fit()
    limit = smallest * (1 + f.ppf(0.95, 1, len(x) - 3) / (len(x) - 3))
    intervals = {}
    for n, name in enumerate("abc"):
        ends = [profile_end(fit, n, best, bound, limit) for bound in (lowest[n], highest[n])]
        intervals[name] = [float(math.exp(end) if name == "a" else end) for end in ends]
    return intervals


def profile_end(fit, n: int, best: np.ndarray, bound: float, limit: float) -> float:
    """The value of parameter n between the best and the bound with which the best fit has `limit` as its sum of squares.

    fit(n, value, start): that sum and the parameters. The bound, where even there the sum is smaller.
    """
    from scipy.optimize import brentq

    starts = [best]  # the fits inside so far: the next one starts from the last

    def excess(value: float) -> float:
        cost, theta = fit(n, value, starts[-1])
        if cost <= limit:
            starts.append(theta)
        return math.log((cost + 1e-30) / (limit + 1e-30))

    if fit(n, bound, best)[0] <= limit:
        return bound
    if excess(best[n]) >= 0:  # all points lie on the curve
        return best[n]
    return brentq(excess, best[n], bound, xtol=1e-4)


def frontier_exponent(points: list[dict]) -> float:
    """b of the power law through the frontier of the points; nan with fewer than three points on it."""
    x, y = columns(frontier(points), "flops", "loss")
    return fit_power(x, y)[1] if len(np.unique(x)) > 2 else math.nan


def why_not_frontier(points: list[dict]) -> str:
    """A running minimum falls also where there is only noise: over all runs, the loss must fall with FLOPs beyond chance."""
    from scipy.stats import spearmanr

    flops, loss = columns(points, "flops", "loss")
    falls = spearmanr(flops, loss, alternative="less").pvalue < 0.025
    return "" if falls else "over all runs the loss does not fall with FLOPs beyond chance"


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


def why_not_surface(N: np.ndarray, D: np.ndarray, y: np.ndarray) -> str:
    if reason := why_not_exponent("params", N) or why_not_exponent("tokens", D):
        return reason
    if np.ptp(y) == 0:
        return "all runs have the same loss"
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


def first_guesses(N, D, y) -> list[np.ndarray]:
    """The best three of a grid of exponents, each with its best A, B and E, which are linear: variable projection."""
    from scipy.optimize import nnls

    exponents, guesses = np.geomspace(0.05, 2, 16), []
    for alpha, beta in itertools.product(exponents, exponents):
        terms = np.stack((N**-alpha, D**-beta, np.ones_like(y)), axis=1) / y[:, None]
        parts, error = nnls(terms, np.ones_like(y))  # the squared relative error, with no term below zero
        guesses.append((error, [*np.log(np.maximum(parts, 1e-6 * y.min())), alpha, beta]))
    return [np.array(theta) for _, theta in sorted(guesses)[:3]]


def fit_surface(N, D, y, delta: float = 1e-3, start: np.ndarray | None = None) -> np.ndarray:
    """theta with the lowest objective(), by L-BFGS from the theta `start`, or from first_guesses()."""
    from scipy.optimize import minimize

    # In units of the geometric means of N and D, log A and log B hardly depend on the exponents.
    log_means = np.array([np.log(N).mean(), np.log(D).mean()])
    data = (N / np.exp(log_means[0]), D / np.exp(log_means[1]), y, delta)
    if start is None:
        starts = first_guesses(*data[:3])
    else:
        starts = [np.concatenate([start[:2] - start[3:] * log_means, start[2:]])]
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


def find_budgets(flops: np.ndarray) -> list[float]:
    """The FLOPs around which the runs lie densely: peaks of a kernel density that are twice as high as the valleys beside them."""
    from scipy.signal import find_peaks

    log_c = np.log(flops)
    grid = np.arange(log_c.min() - 0.5, log_c.max() + 0.5, 0.005)
    density = np.exp(-0.5 * ((grid[:, None] - log_c) / 0.07) ** 2).sum(1)
    peaks, found = find_peaks(density, prominence=0.5)
    high = found["prominences"] >= 0.5 * density[peaks]
    return np.exp(grid[peaks[high]]).tolist()


def split_budgets(points: list[dict], budgets: list[float]) -> list[list[dict]]:
    """The points within 15 % of each budget."""
    logs = np.log(columns(points, "flops")[0])[:, None] - np.log(budgets)
    nearest = abs(logs).argmin(1)
    near = abs(logs).min(1) <= math.log(1.15)
    return [
        [p for p, n, close in zip(points, nearest, near) if close and n == number] for number in range(len(budgets))
    ]


def fit_parabola(log_n: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients of a parabola of loss in log N, and which points it was fitted to.

    Those within a factor of four of the size with the lowest loss, or the four nearest sizes: far from its minimum the
    loss is no parabola, and a fit through all sizes moves the minimum (by 0.08 in the exponent on published runs).
    """
    distance = abs(log_n - log_n[y.argmin()])
    used = distance <= max(math.log(4.001), np.unique(distance.round(9))[:4].max() + 1e-9)
    return np.polyfit(log_n[used], y[used], 2), used


def fit_isoflop(points: list[dict], budgets: list[float] = ()) -> dict:
    """The best N of each budget, by a parabola of loss in log N, and the power of C by which it grows, or why not.

    points: params, tokens, flops and loss. budgets: FLOPs; empty: those of find_budgets(). A budget needs four sizes around the best; a trend needs three budgets, and its exponent has a 95 % interval (t).
    """
    fitted, left_out = [], []
    given = bool(budgets)
    budgets = list(budgets) or find_budgets(columns(points, "flops")[0])
    groups = split_budgets(points, budgets) if budgets else []
    if not given:
        budgets = [float(np.exp(np.log(columns(group, "flops")[0]).mean())) for group in groups]
    for flops, group in zip(budgets, groups):
        N, D, y = columns(group, "params", "tokens", "loss")
        log_n, sizes = np.log(N), len(np.unique(N))
        if sizes < 4:
            left_out += [f"{flops:.3g} FLOPs: {sizes} sizes, a parabola needs 4"] * (sizes > 1 or given)
            continue
        parabola, used = fit_parabola(log_n, y)
        c2, c1, c0 = parabola.tolist()
        best = -c1 / (2 * c2) if c2 > 0 else math.nan
        if not log_n.min() < best < log_n.max():
            missing = "larger" if c1 + 2 * c2 * log_n.max() < 0 else "smaller"
            left_out.append(f"{flops:.3g} FLOPs: no minimum among its sizes, add {missing} ones")
            continue
        order = np.argsort(log_n)
        tokens = math.exp(np.interp(best, log_n[order], np.log(D)[order]))  # those of the sizes beside it
        entry = dict(flops=flops, coefficients=[c2, c1, c0], best_params=math.exp(best), best_tokens=tokens)
        entry |= dict(best_loss=c0 - c1**2 / (4 * c2), params=N.tolist(), loss=y.tolist(), used=used.tolist())
        fitted.append(entry)
    if between := len(points) - sum(map(len, groups)):
        left_out.append(f"{between} runs between the budgets")
    law: dict = {"budgets": fitted, "left_out": left_out}
    if len(fitted) < 3:
        reasons = f" ({'; '.join(left_out)})" if left_out else ""
        return law | {"refused": f"{len(fitted)} budgets with four sizes and a minimum, a trend needs 3{reasons}"}
    C, N = columns(fitted, "flops", "best_params")
    factor, exponent = fit_power(C, N)
    low, high = power_intervals(C, N)["b"]
    return law | dict(exponent_of_N=-exponent, interval=[-high, -low], factor=factor)
