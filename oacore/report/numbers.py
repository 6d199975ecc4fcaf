"""Numbers as people read them, and when two of them count as different."""

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np

Z95 = 1.96  # half the width of a 95 % interval in standard errors
# nats; an estimated gap at or below it, negative ones included, has no place on a log axis and is drawn here
FLOOR = 1e-6
DAGGER = "†"  # of numbers whose fit had not converged
SIGNIFICANT = 2.0  # standard errors of a difference: closer than this, two losses count as equal


def three_digits(value: float) -> str:
    """Three significant digits for people: 0.0123, 4.57, 12,346; below 1e-4 as 1.23e-5; a dash where there is no
    number.
    """
    if not np.isfinite(value):
        return "–" if np.isnan(value) else str(value)
    mantissa, exponent = f"{value:.2e}".split("e")
    if value == 0:
        return "0"
    text = f"{value:,.{max(0, 2 - int(exponent))}f}" if int(exponent) >= -4 else f"{mantissa}e{int(exponent)}"
    return text.replace("-", "−", 1) if value < 0 else text


WHOSE_SE = (
    "SE is the standard error over prompts; those about the same subject, or of the same passage of text, count as one."
)


def verdict(own: float, own_se: float, other: float, other_se: float) -> str:
    """`below` or `above` if the loss `own` differs from `other` by more than `SIGNIFICANT` standard errors of the
    difference, else `equal`; `undecided` without standard errors. Losses at or below `FLOOR` are equal.

    The errors are added as if independent, although losses that are compared come from the same prompts: where they go
    up and down together, this calls too few different.
    """
    error = np.hypot(own_se, other_se)
    if max(own, other) <= FLOOR or abs(own - other) <= SIGNIFICANT * error:
        return "equal"
    return "undecided" if not np.isfinite(error) else "below" if own < other else "above"


def plain(value: float) -> str:
    """0.01, 1e-5: tick labels without superscripts, which would be too small to read."""
    return f"{value:g}".replace("e-0", "e-")


@dataclass(frozen=True)
class Estimate:
    """A table cell with its standard error."""

    value: float
    se: float
    finished: bool = True  # False: its fit had not converged, and it carries a dagger


def human(value: object) -> str:
    """A value as people write it: numbers with three digits, lists with commas, mappings as name and value."""
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case Estimate():
            return " ± ".join(estimate_texts(value)) + f" {DAGGER}" * (not value.finished)
        case Integral():
            return f"{int(value):,}".replace("-", "−")
        case Real():
            return three_digits(float(value))
        case Mapping():
            return ", ".join(f"{name} {human(inner)}" for name, inner in value.items())
        case list() | tuple():
            return ", ".join(map(human, value))
    return str(value)


def estimate_texts(estimate: Estimate) -> list[str]:
    """Value and standard error with the same decimals: three digits of the value, but not more than two of the
    error.
    """
    value, se = estimate.value, estimate.se
    if not np.isfinite(value) or not np.isfinite(se) or se <= 0:
        return [three_digits(value)]
    if 0 < abs(value) < 1e-4:
        return [three_digits(value), f"{se:.1e}".replace("e-0", "e-")]
    decimals = max(0, 1 - _exponent(se))
    if value:
        decimals = min(decimals, max(0, 2 - _exponent(value)))
    rounded = f"{se:.{decimals}f}"
    return [f"{value:,.{decimals}f}".replace("-", "−"), rounded if float(rounded) else f"{se:.0e}".replace("e-0", "e-")]


def _exponent(value: float) -> int:
    return int(f"{value:.2e}".split("e")[1])
