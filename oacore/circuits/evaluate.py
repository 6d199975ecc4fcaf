"""What every circuit is judged by, whichever method found it: constants fitted anew for it, then its loss on held-out
prompts.

Symbols: C circuits, N prompts, J destinations, S sources.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from oacore.circuits.constants import Constants
from oacore.circuits.numbers import REPLACED_AT_ONCE
from oacore.circuits.passes import Passes
from oacore.circuits.replacements import Replacements
from oacore.config.base import OptimalFit
from oacore.draws import prompts_of_step
from oacore.fits.descent import Descent, Running, descend
from oacore.fits.resume import NOT_KEPT, Resumable


class CircuitLosses(NamedTuple):
    """Of every circuit on every prompt of a split."""

    kl: Tensor  # [C, N] nats
    logit_diff: (
        Tensor  # [C, N] log odds of the right answers against the wrong ones; NaN where a task has no wrong answers
    )


def refit_constants(
    passes: Passes,
    validation: Passes,
    start: Constants,
    scales: Constants,
    masks: Tensor,
    settings: OptimalFit,
    *,
    names: Sequence[str],
    seed: int = 0,
    resumable: Resumable = NOT_KEPT,
    what: str = "refit",
) -> tuple[Constants, Descent]:
    """Fit constants for each of C discrete circuits [C, J, S], all at once, to the KL on `passes`' prompts (paper,
    appendix).

    Every circuit of every method starts from the same constants, sees the same prompts and stops by the same test.
    """
    engine, device, on_cpu = passes.engine, masks.device, masks.device.type == "cpu"
    shapes = [part.shape[1:] for part in start]

    def draw(step: int) -> tuple[Tensor]:
        return (prompts_of_step(len(passes.examples), settings.batch_size, seed, step),)

    def gradient(running: Running, values: Tensor, chosen: Tensor) -> Tensor:
        slots, fits = torch.arange(len(chosen), device=device).repeat(len(running.rows)), masks[running.index]
        with torch.enable_grad():
            leaf = values.detach().requires_grad_()
            written = start.unflattened(leaf).writes(engine, passes.examples.prompts.n_tokens)
            computed = passes.gradients(
                "kl", chosen, slots, fits, written.detach(), owned=False, constants=True, skip_dead=on_cpu
            )
            assert computed.constants is not None
            (found,) = torch.autograd.grad(written, leaf, computed.constants / len(chosen))
        return found

    def validate(running: Running, values: Tensor) -> Tensor:
        losses = _losses_with_constants(validation, masks[running.index], start.unflattened(values))
        return losses.kl.double().mean(1).float()

    flat = torch.cat([part.flatten(1) for part in start.repeat(len(masks))], 1)
    scale = torch.cat([part.expand(1, *shape).flatten(1) for part, shape in zip(scales, shapes, strict=True)], 1)
    descent = descend(
        flat,
        scale,
        gradient,
        validate,
        settings,
        names=names,
        key="circuits.refit.learning_rate",
        draw=draw,
        resumable=resumable,
        what=what,
        blocks=start.blocks(),
    )
    return start.unflattened(descent.best), descent


def circuit_losses(
    passes: Passes, masks: Tensor, replacements: Replacements, constants: Constants | None = None
) -> CircuitLosses:
    """Losses of C circuits [C, J, S] on all prompts of a split; `constants` are each circuit's own, in place of the
    replacements.
    """
    if constants is not None:
        return _losses_with_constants(passes, masks, constants)
    everything = torch.arange(len(passes.examples), device=masks.device)
    kl: list[Tensor] = []
    logit_diff: list[Tensor] = []
    for chosen in everything.split(REPLACED_AT_ONCE if replacements.per_prompt else len(everything)):
        replacement = replacements.of(chosen)
        slots = torch.arange(len(chosen), device=masks.device).repeat(len(masks))
        of_rows = passes.measure(chosen, slots, masks, replacement, owned=replacements.per_prompt)
        for losses, part in zip((kl, logit_diff), of_rows, strict=True):
            losses.append(part.view(len(masks), -1))
    return CircuitLosses(torch.cat(kl, 1), torch.cat(logit_diff, 1))


def _losses_with_constants(passes: Passes, masks: Tensor, constants: Constants) -> CircuitLosses:
    written = constants.writes(passes.engine, passes.examples.prompts.n_tokens)
    chosen = torch.arange(len(passes.examples), device=masks.device)
    of_rows = passes.measure(chosen, chosen.repeat(len(masks)), masks, written, owned=False)
    return CircuitLosses(*(part.view(len(masks), -1) for part in of_rows))
