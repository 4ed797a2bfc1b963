"""Times taken by turns, compared as ratios that are paired by round."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

TAIL = 0.025  # the most that may lie on either side of an interval


def turns(labels: Sequence[str], number: int) -> list[str]:
    """The order in round `number` (from 0): each round, another one goes first."""
    first = number % max(len(labels), 1)
    return [*labels[first:], *labels[:first]]


class Speedup(NamedTuple):
    """Above 1 is faster than the reference. `low` and `high` bound the median, see `ranks`."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"

    def verdict(self, noise: float = 0.0) -> str:
        """What it tells where two runs of one contender differ by `noise` (0.03 is 3 %): faster,
        slower, or no difference, which is also where the interval, as it is printed, holds 1."""
        if math.isnan(self.median):
            return "not timed"
        if abs(self.median - 1) <= noise or round(self.low, 2) <= 1 <= round(self.high, 2):
            return "no difference"
        return "faster" if self.median > 1 else "slower"


def ranks(rounds: int) -> tuple[int, int]:
    """Of values in order of size, which two bound their median at 95 % or more; the first is 1.

    The exact interval from order statistics: how many of n values lie below the median is binomial
    with probability 1/2, whatever they are drawn from (Conover, Practical Nonparametric Statistics,
    3rd edition, 3.2; Hahn and Meeker, Statistical Intervals, 5.2). Fewer than six values cannot
    bound it at 95 %, and these are the first and the last: their range.
    """
    below = itertools.accumulate(math.comb(rounds, count) for count in range(rounds))
    lowest = max(1, sum(ways / 2**rounds <= TAIL for ways in below))
    return lowest, rounds + 1 - lowest


def coverage(rounds: int) -> float:
    """The probability that the values at `ranks` have the median between them."""
    lowest, highest = ranks(rounds)
    return sum(math.comb(rounds, count) for count in range(lowest, highest)) / 2**rounds


def interval(rounds: int) -> str:
    """What an interval of so many rounds is called: below six, its coverage is less than 95 %."""
    if coverage(rounds) >= 1 - 2 * TAIL:
        return "95 % interval"
    return f"range (a {100 * coverage(rounds):.0f} % interval)"


def speedup(reference: np.ndarray, times: np.ndarray) -> Speedup:
    """The median of the ratios `reference` / `times`, both (rounds,), paired by round.

    It is bounded by the ratios at the `ranks` that bound it at 95 %.
    """
    ratios = np.sort(np.asarray(reference) / np.asarray(times))
    lowest, highest = ranks(len(ratios))
    return Speedup(float(np.median(ratios)), float(ratios[lowest - 1]), float(ratios[highest - 1]))
