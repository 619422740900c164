"""Is an arm better than the first one, or was it luck? Differences with intervals, and a verdict in words.

The error is pooled over all arms, which are taken to have the same spread: three seeds of twenty arms give 38 degrees of
freedom and not 2. Where the seeds shift all arms alike (F test, 5 %), the arms are compared seed by seed. The intervals hold
for all comparisons with the first arm together (Dunnett 1955): in 95 % of studies without any effect, no arm is told apart.
"""

import functools
import itertools
import math

from runs import arm_statistics, higher_is_better

import numpy as np


@functools.cache
def dunnett_quantile(arms: int, df: int, level: float = 0.95) -> float:
    """The half-width, in standard errors, of simultaneous intervals of `arms` differences to one reference.

    For as many runs in each arm as in the reference (correlation 1/2); for one arm it is Student's t.
    """
    from scipy.integrate import quad
    from scipy.optimize import brentq
    from scipy.stats import chi, norm, t

    if arms == 1:
        return float(t.ppf((1 + level) / 2, df))
    z, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()

    def inside(q: float) -> float:
        """Probability that all differences are within q standard errors: over the scale s, and the reference's deviation z."""

        def given_scale(s: float) -> float:
            one = norm.cdf(z + q * s * math.sqrt(2)) - norm.cdf(z - q * s * math.sqrt(2))
            return float((weights * one**arms).sum()) * chi.pdf(s * math.sqrt(df), df) * math.sqrt(df)

        return quad(given_scale, 0, 1 + 10 / math.sqrt(df), limit=200)[0]

    return float(brentq(lambda q: inside(q) - level, 1, 200, xtol=1e-4))


def fit_arms(values: dict[tuple, float]) -> dict | None:
    """Least squares of (arm, seed) -> loss, as an effect of the arm plus, if it pays, an effect of the seed.

    arms: their names; means: of each arm, up to a constant; covariance: of the means, in units of sigma^2; sigma: the
    standard deviation of a run; df: its degrees of freedom. None if no arm has a second run.
    """
    if not values:
        return None
    arms, seeds = (list(dict.fromkeys(key[n] for key in values)) for n in (0, 1))
    y = np.array([*values.values()])
    by_arm = np.array([[arm == other for other in arms] for arm, _ in values], float)
    by_seed = np.array([[seed == other for other in seeds[1:]] for _, seed in values], float).reshape(len(y), -1)
    fits = {}
    for paired, X in ((False, by_arm), (True, np.hstack((by_arm, by_seed)))):
        rank = np.linalg.matrix_rank(X)
        if len(y) > rank == X.shape[1]:
            effects = np.linalg.lstsq(X, y, rcond=None)[0]
            fits[paired] = (effects, np.linalg.inv(X.T @ X), float(((y - X @ effects) ** 2).sum()), len(y) - rank)
    if False not in fits:
        return None
    paired = False
    if True in fits and by_seed.shape[1]:
        from scipy.stats import f

        (*_, rss, df), (*_, rss_paired, df_paired) = fits[False], fits[True]
        mean_square = rss_paired / df_paired
        explained = (rss - rss_paired) / (df - df_paired)
        paired = explained > f.ppf(0.95, df - df_paired, df_paired) * mean_square
    effects, covariance, rss, df = fits[paired]
    means, covariance = effects[: len(arms)], covariance[: len(arms), : len(arms)]  # without the effects of the seeds
    sigma = math.sqrt(rss / df)
    return dict(arms=arms, means=means, covariance=covariance, sigma=sigma, df=int(df), paired=bool(paired))


def contrast(fit: dict, weights: np.ndarray) -> tuple[float, float]:
    """The weighted sum of the arms' means, and its standard error."""
    return float(weights @ fit["means"]), fit["sigma"] * math.sqrt(weights @ fit["covariance"] @ weights)


def seeds_needed(sigma: float, arms: int, effect: float) -> int:
    """Seeds per arm with which a true difference of this size is told apart in about 80 % of studies."""
    from scipy.stats import norm

    n = 2
    for _ in range(8):  # with more seeds, the quantile is smaller
        quantile = dunnett_quantile(arms, (arms + 1) * (n - 1))
        wanted = max(2, math.ceil(2 * (sigma * (quantile + norm.ppf(0.8)) / effect) ** 2))
        if wanted == n:
            break
        n = wanted if wanted > n else (n + wanted) // 2
    return n


def values_of(rows: list[dict], metric: str) -> dict[tuple, float]:
    """(arm, seed) -> the metric of a run."""
    values: dict[tuple, float] = {}
    for row in rows:
        if row.get(metric) is not None:
            key = (row["arm"], row.get("seed"))
            while key in values:  # a second run with this seed, of another study
                key = (row["arm"], (key[1], "again"))
            values[key] = row[metric]
    return values


def compare_arms(rows: list[dict], metric: str, order: list[str], effect: float = 0.01) -> list[dict]:
    """arm_statistics(), and for each arm but the first of `order`: difference, interval (95 %), verdict.

    The interval is None, and there is no verdict, where no arm has a second run. effect: the difference for which a verdict
    says the seeds needed. Lower is better, except for accuracies.
    """
    rows = sorted((row for row in rows if row["arm"] in order), key=lambda row: order.index(row["arm"]))
    table = arm_statistics(rows, metric)
    values = values_of(rows, metric)
    if not table or table[0]["arm"] != order[0]:
        if table:
            print(f"no comparison: the first arm, {order[0]}, has no result")
        return table
    fit, compared = fit_arms(values), len(table) - 1
    for n, entry in enumerate(table[1:], 1):
        if fit is None:
            entry |= {"difference": entry["mean"] - table[0]["mean"], "interval": None}
            continue
        weights = np.eye(len(table))[n] - np.eye(len(table))[0]
        difference, error = contrast(fit, weights)
        half = dunnett_quantile(compared, fit["df"]) * error
        entry |= {"difference": difference, "interval": [difference - half, difference + half]}
        needed = seeds_needed(fit["sigma"], compared, effect)
        entry["verdict"] = verdict(difference, half, higher_is_better(metric), f"about {needed} seeds show {effect:g}")
    return table


def verdict(difference: float, half: float, higher_is_better: bool, needed: str = "") -> str:
    if abs(difference) <= half:
        return "not told apart" + (f" ({needed})" if needed else "")
    word = "better" if (difference > 0) == higher_is_better else "worse"
    return f"{word} by {abs(difference):.4f}, 95 % {abs(difference) - half:.4f} to {abs(difference) + half:.4f}"


def grid_effects(rows: list[dict], metric: str, arm_keys: dict[str, dict]) -> list[dict]:
    """What the keys of a grid change: entries with title, verdict, and difference and interval (95 %) or p.

    Each value against the first one of its key, on average over the other keys (Dunnett); of two keys, also at each value
    of the other one (Bonferroni); and whether two keys interact (F test).
    arm_keys: the keys of each arm. [] without a grid of at least two keys, all of whose arms have results, and a second run.
    """
    from scipy.stats import f, t

    arms = list(arm_keys)
    levels: dict[str, list] = {key: [] for key in arm_keys[arms[0]]}
    for key, found in levels.items():
        for keys in arm_keys.values():
            found += [keys[key]] * (keys[key] not in found)
    levels = {key: found for key, found in levels.items() if len(found) > 1}
    fit = fit_arms(values_of(rows, metric))
    if len(levels) < 2 or fit is None or set(fit["arms"]) != set(arms):
        return []
    order = [arm_keys[arm] for arm in fit["arms"]]

    def mean_of(chosen: dict) -> np.ndarray:
        """Weights (arms,) of the mean over the arms with these values."""
        has = np.array([all(keys[key] == value for key, value in chosen.items()) for keys in order], float)
        return has / has.sum()

    def effect(key: str, value, place: dict, quantile: float) -> dict:
        """Of a value against the key's first one, at the place (values of other keys) or on average."""
        first = levels[key][0]
        weights = mean_of({key: value} | place) - mean_of({key: first} | place)
        difference, error = contrast(fit, weights)
        half = quantile * error
        where = " at {}={}".format(*place.popitem()) if place else ", mean over the other keys"
        says = verdict(difference, half, higher_is_better(metric))
        interval = [difference - half, difference + half]
        return dict(
            title=f"{key}={value} against {first}{where}", difference=difference, interval=interval, verdict=says
        )

    effects = []
    for key, (_, *others) in levels.items():
        quantile = dunnett_quantile(len(others), fit["df"])
        effects += [effect(key, value, {}, quantile) for value in others]
    for key, other in itertools.permutations(levels, 2) if len(levels) == 2 else ():
        pairs = list(itertools.product(levels[other], levels[key][1:]))
        quantile = float(t.ppf(1 - 0.025 / len(pairs), fit["df"]))
        effects += [effect(key, value, {other: place}, quantile) for place, value in pairs]
    for one, other in itertools.combinations(levels, 2):
        cells = np.array([mean_of({one: a, other: b}) for a in levels[one] for b in levels[other]])
        against_first = [np.eye(len(levels[key]))[1:] - np.eye(len(levels[key]))[0] for key in (one, other)]
        weights = np.kron(*against_first) @ cells  # (interactions, arms)
        means = weights @ fit["means"]
        square = means @ np.linalg.solve(weights @ fit["covariance"] @ weights.T, means) / len(weights)
        p = float(f.sf(square / fit["sigma"] ** 2, len(weights), fit["df"]))
        says = "the effect of one depends on the other" if p < 0.05 else "no interaction seen"
        effects.append(dict(title=f"{one} and {other}", p=p, verdict=f"{says} (F test, p = {p:.2g})"))
    return effects
