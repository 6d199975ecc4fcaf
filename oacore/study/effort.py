"""What a method does with a number of passes: how many prompts, and how many steps of which fit.

A budget is counted for each component: its own ablated passes of one prompt, and `GRADIENT` for one with a gradient.
What all components share, clean passes, is counted in tables and not here.
"""

from typing import NamedTuple

from oacore.config.base import OptimalFit
from oacore.config.study import Estimator
from oacore.metrics import GRADIENT

FEWEST_PROMPTS = 2  # of which resampling takes another one for each
FEWEST_STEPS = 8  # of a fit; where the budget does not give as many, batches are smaller
VALIDATIONS = 64  # as many validation prompts as the budget has times so many passes, but not fewer than
FEWEST_VALIDATED = 4


class Sizes(NamedTuple):
    """Of what is measured."""

    n_components: int
    n_validation: int
    n_test: int


class Effort(NamedTuple):
    """What a method is to do; without a fit only `n_prompts` counts."""

    n_prompts: int  # that importance is measured on
    batch_size: int = 0
    max_steps: int = 0
    n_validation: int = 0

    def settings(self, fit: OptimalFit) -> OptimalFit:
        """The fit, cut."""
        return fit.model_copy(update={"batch_size": self.batch_size, "max_steps": self.max_steps})


def whole(fit: OptimalFit, sizes: Sizes) -> Effort:
    """A fit to its end on all prompts: the reference."""
    return Effort(sizes.n_test, fit.batch_size, fit.max_steps, sizes.n_validation)


def within(budget: int, row: Estimator, sizes: Sizes, fit: OptimalFit) -> Effort | None:
    """The most that a method can do with so many passes a component; None where that is nothing.

    A fit takes up to half of them. One gradient tells of all components, each of which pays its part.
    """
    if row.gradient:
        n_prompts = budget * sizes.n_components // GRADIENT
        return _measuring(n_prompts, sizes)
    if not row.fitted:
        return _measuring(budget, sizes)
    batch = min(fit.batch_size, max(1, budget // (2 * GRADIENT * FEWEST_STEPS)))
    n_validation = min(sizes.n_validation, max(FEWEST_VALIDATED, budget // VALIDATIONS))
    steps, passes = 0, 0
    for candidate in range(1, fit.max_steps + 1):
        cut = Effort(0, batch, candidate, n_validation)
        if (needed := fit_passes(cut, fit)) > budget // 2:
            break
        steps, passes = candidate, needed
    left = _measuring(budget - passes, sizes)
    return left._replace(batch_size=batch, max_steps=steps, n_validation=n_validation) if steps and left else None


def fit_passes(effort: Effort, fit: OptimalFit) -> int:
    """Passes of one component in a fit that takes all its steps."""
    stops = 1 + len(effort.settings(fit).round_ends)
    return GRADIENT * effort.batch_size * effort.max_steps + effort.n_validation * stops


def _measuring(n_prompts: int, sizes: Sizes) -> Effort | None:
    return Effort(min(n_prompts, sizes.n_test)) if n_prompts >= FEWEST_PROMPTS else None
