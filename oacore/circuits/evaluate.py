"""What every circuit is judged by, whichever method found it: constants fitted anew for it, then its loss on held-out prompts.

Symbols: C circuits, N prompts, J destinations, S sources.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from oacore.circuits.patching import Constants, Passes, Replacements
from oacore.config import OptimalFit
from oacore.descent import Descent, descend, prompts_of_step


class Measured(NamedTuple):
    kl: Tensor  # [C, N] nats
    logit_diff: Tensor  # [C, N] log odds of the right answers against the wrong ones; NaN where a task has no wrong answers


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
    checkpoint: Path | None = None,
    identity: str = "",
    what: str = "refit",
) -> tuple[Constants, Descent]:
    """Fit constants for each of C discrete circuits [C, J, S], all at once, to the KL on `passes`' prompts (paper, appendix).

    Every circuit of every method starts from the same constants, sees the same prompts and stops by the same test.
    """
    engine, device = passes.engine, masks.device
    shapes = [part.shape[1:] for part in start]
    sizes = [shape.numel() for shape in shapes]

    def unpack(values: Tensor) -> Constants:
        parts = values.split(sizes, 1)
        return Constants(*(part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)))

    def gradient(rows: Tensor, values: Tensor, step: int) -> Tensor:
        chosen = prompts_of_step(len(passes.examples), settings.batch_size, seed, step).to(device)
        slots = torch.arange(len(chosen), device=device).repeat(len(rows))
        with torch.enable_grad():
            leaf = values.detach().requires_grad_()
            written = unpack(leaf).writes(engine, passes.examples.prompts.n_tokens)
            found = passes.gradients(
                "kl", chosen, slots, masks[rows], written.detach(), owned=False, constants=True, skip_dead=device.type == "cpu"
            )
            assert found.constants is not None
            written.backward(found.constants / len(chosen))
        assert leaf.grad is not None
        return leaf.grad

    def validate(rows: Tensor, values: Tensor) -> Tensor:
        return _measure(validation, masks[rows], unpack(values)).kl.double().mean(1).float()

    flat = torch.cat([part.flatten(1) for part in start.repeat(len(masks))], 1)
    scale = torch.cat([part.expand(1, *shape).flatten(1) for part, shape in zip(scales, shapes, strict=True)], 1)
    found = descend(
        flat,
        scale,
        gradient,
        validate,
        settings,
        names=names,
        key="circuits.refit.learning_rate",
        checkpoint=checkpoint,
        identity=identity,
        what=what,
    )
    return unpack(found.best), found


def measure(passes: Passes, masks: Tensor, replacements: Replacements, constants: Constants | None = None) -> Measured:
    """Losses of C circuits [C, J, S] on all prompts of a split; `constants` are each circuit's own, in place of the replacements."""
    if constants is not None:
        return _measure(passes, masks, constants)
    everything = torch.arange(len(passes.examples), device=masks.device)
    kl, logit_diff = [], []
    for chosen in everything.split(REPLACED_AT_ONCE if replacements.per_prompt else len(everything)):
        replacement = replacements.of(chosen)
        slots = torch.arange(len(chosen), device=masks.device).repeat(len(masks))
        found = passes.measure(chosen, slots, masks, replacement, owned=replacements.per_prompt)
        kl.append(found[0].view(len(masks), -1))
        logit_diff.append(found[1].view(len(masks), -1))
    return Measured(torch.cat(kl, 1), torch.cat(logit_diff, 1))


REPLACED_AT_ONCE = 64  # prompts whose activations are held as replacements


def _measure(passes: Passes, masks: Tensor, constants: Constants) -> Measured:
    written = constants.writes(passes.engine, passes.examples.prompts.n_tokens)
    chosen = torch.arange(len(passes.examples), device=masks.device)
    found = passes.measure(chosen, chosen.repeat(len(masks)), masks, written, owned=False)
    return Measured(*(part.view(len(masks), -1) for part in found))
