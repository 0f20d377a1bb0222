"""What every estimate comes as; without numpy, which those who only show it need not load."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its confidence bounds."""

    estimate: float
    low: float
    high: float
