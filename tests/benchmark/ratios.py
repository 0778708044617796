"""From samples to figures: medians, the best peer of a row, the ratio to it and its bootstrap interval.

The interval: rounds are drawn with replacement, the same rounds for all targets (they ran side by side, so noise of the
machine is shared), and the whole figure is computed anew, the choice of the best peer included. The ends are the 2.5 %
and 97.5 % quantiles of 2,000 such draws (Efron's percentile bootstrap). With few rounds it is coarse: it cannot be
wider than the rounds' spread.
"""

import random
from dataclasses import dataclass
from statistics import median

DRAWS = 2000


@dataclass(frozen=True)
class Ratio:
    """Subject over best peer, in operations a second: the interval's ends, and the round that was best for it."""

    best_peer: str
    value: float
    low: float
    high: float
    best_round: float


def ratio_to_best_peer(rates: dict[str, list[float]], subject: str, seed: int = 1) -> Ratio | None:
    """`rates`: target → operations a second, one for each round. None if the subject or every peer is absent."""
    peers = [name for name in rates if name != subject]
    if subject not in rates or not peers:
        return None
    rounds = range(min(len(values) for values in rates.values()))
    best, value = _ratio(rates, subject, peers, list(rounds))
    draw = random.Random(seed)
    drawn = sorted(_ratio(rates, subject, peers, draw.choices(rounds, k=len(rounds)))[1] for _ in range(DRAWS))
    best_round = max(_ratio(rates, subject, peers, [number])[1] for number in rounds)
    return Ratio(best, value, drawn[int(DRAWS * 0.025)], drawn[int(DRAWS * 0.975)], best_round)


def _ratio(rates: dict[str, list[float]], subject: str, peers: list[str], rounds: list[int]) -> tuple[str, float]:
    medians = {name: median(rates[name][index] for index in rounds) for name in rates}
    best = max(peers, key=lambda name: medians[name])
    return best, medians[subject] / medians[best]
