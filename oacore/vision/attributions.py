"""Integrated gradients and layer conductance of units, by Captum.

Both are of the same loss as everything else, -KL(clean || .), so that what they share out is comparable: integrated
gradients over the gates, from all units replaced to none, sum to the KL with everything replaced, as Shapley values do
(they are the Aumann-Shapley values of the same game). For channels of one layer this is integrated gradients over the
layer's output, from the replacement, summed over the places of the picture. Conductance starts from an empty picture
instead, and is what flows through a unit's channels.

Symbols: N images, n units.
"""

import torch
from torch import Tensor

from oacore.metrics import kl_divergence
from oacore.vision.network import EMPTY
from oacore.vision.passes import Passes, Values


@torch.enable_grad()
def gate_gradients(passes: Passes, images: Tensor, values: Values, n_steps: int) -> Tensor:
    """Attributions [N, n] of rows of images; a path takes n_steps gradients for each image."""
    from captum.attr import IntegratedGradients

    kept = torch.ones(len(images), len(passes.units))
    found = IntegratedGradients(lambda gates, rows: -passes.losses(rows, gates, values)).attribute(
        kept, torch.zeros_like(kept), additional_forward_args=(images,), n_steps=n_steps,
        internal_batch_size=max(len(images), passes.rows_at_once),
    )  # fmt: skip
    return found.detach().double()


@torch.enable_grad()
def layer_conductance(passes: Passes, images: Tensor, n_steps: int) -> Tensor:
    """The same by layer conductance; n_steps + 1 gradients for each image and place."""
    from captum.attr import LayerConductance

    def value(pixels: Tensor, rows: Tensor) -> Tensor:
        return -kl_divergence(passes.clean[rows], passes.network(pixels))

    pixels, total = passes.pixels[images], torch.zeros(len(images), len(passes.units), dtype=torch.float64)
    for place, owner in passes.units.owners.items():
        layer = passes.network.get_submodule(place)
        found = LayerConductance(value, layer).attribute(
            pixels, torch.full_like(pixels, EMPTY), additional_forward_args=(images,), n_steps=n_steps,
            internal_batch_size=max(len(images), passes.rows_at_once),
        )  # fmt: skip
        total.index_add_(1, owner, found.detach().double().sum((2, 3)))
    return total
