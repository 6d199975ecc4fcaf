"""Lenses that map the residual straight to the last one: the tuned lens (Belrose et al. 2023) and its kin, and the
model's first-order expansion.
"""

from typing import Self

import torch
from torch import Tensor

from oacore.engine.clean import Batch
from oacore.engine.forward import embed, mlp, run_block
from oacore.lenses.lens import FittedLens, LensProblem, LensSources
from oacore.lenses.rows import LensRows
from oacore.models.weights import Model
from oacore.progress import progress

SGD_RATE = 10.0  # times Adam's: 0.1 with momentum 0.9, the official recipe's 1


class AffineLens(FittedLens):
    """x + x matrix + bias; values: `matrix` [L, d, d] and `bias` [L, d], the change."""

    def final(self, residual: Tensor, layer: int) -> Tensor:
        """The residual and its change."""
        matrix, bias = (self.values[name][layer].to(residual.dtype) for name in ("matrix", "bias"))
        return residual + residual @ matrix + bias

    @classmethod
    def problem(cls, name: str, init: str, sources: LensSources, validation: LensRows) -> LensProblem:
        """Matrix and bias as one [L, d + 1, d]. From no change, by Adam; `identity` from there by the official recipe
        (SGD with Nesterov momentum 0.9, weight decay 1e-3, gradients clipped to 1); `random` from standard normal
        weights, by Adam, as the paper does.
        """
        model, sgd = sources.model, init == "identity"
        d = model.d_model
        start = torch.zeros(model.n_layers, d + 1, d, device=model.device)
        if init == "random":
            draw = torch.Generator().manual_seed(sources.seed)
            start = torch.randn(start.shape, generator=draw).to(model.device)
            start[:, :d] -= torch.eye(d, device=model.device)
        unit = torch.ones(1, 1, 1, device=model.device)
        return LensProblem(
            start=start,
            unit=unit * SGD_RATE if sgd else unit,
            final=lambda values, layers, x: x + x @ values[:, :d].to(x.dtype) + values[:, d:].to(x.dtype),
            lens=lambda values: cls._of(name, init, model, values[:, :-1].contiguous(), values[:, -1].contiguous()),
            sgd=sgd,
        )

    @classmethod
    def _of(cls, name: str, init: str, model: Model, matrix: Tensor, bias: Tensor) -> Self:
        return cls(name, init, model, {"matrix": matrix, "bias": bias})


class GradientLens(AffineLens):
    """The mean Jacobian of the remaining layers as the matrix; the bias is fitted."""

    @classmethod
    def problem(cls, name: str, init: str, sources: LensSources, validation: LensRows) -> LensProblem:
        """The bias [L, d] from where the mean residual goes to the mean one after all blocks."""
        model, last = sources.model, sources.model.n_layers - 1
        prompts = sources.prompts.take(slice(0, sources.settings.grad_prompts))
        jacobian = model_jacobian(model, prompts, sources.tokens_per_batch)
        after = validation.residual[:, -1] + validation.attention[:, -1]
        after = after + mlp(model, last, validation.residual[:, -1] if model.parallel else after)  # [B, d]
        mean = validation.residual.float().mean(0)
        return LensProblem(
            start=after.float().mean(0) - torch.einsum("ld,lde->le", mean, jacobian),
            unit=after.float().std(0).square().mean().sqrt().reshape(1, 1),
            final=lambda values, layers, x: x @ jacobian[list(layers)].to(x.dtype) + values[:, None].to(x.dtype),
            lens=lambda values: cls._of(
                name, init, model, jacobian - torch.eye(model.d_model, device=model.device), values
            ),
        )


def model_jacobian(model: Model, prompts: Batch, tokens_per_batch: int) -> Tensor:
    """Mean over prompts of d(residual after all blocks) / d(residual entering block l), both at the last position: [L,
    d, d], out last.

    Runs the model, and d backward passes; the other positions stay as they are.
    """
    d, device = model.d_model, model.device
    total = torch.zeros(model.n_layers, d, d, dtype=torch.float64, device=device)
    with progress(what="Jacobian", unit="prompts", total=len(prompts)) as bar:
        for part in prompts.split(tokens_per_batch):
            rows, last = torch.arange(len(part), device=device), part.lengths - 1
            shifts = [
                torch.zeros(len(part), d, dtype=model.dtype, device=device, requires_grad=True)
                for _ in range(model.n_layers)
            ]
            with torch.enable_grad():
                residual = embed(model, part.tokens)
                for layer, shift in enumerate(shifts):
                    residual = residual.index_put((rows, last), shift, accumulate=True)
                    residual = run_block(model, layer, residual, last if layer == model.n_layers - 1 else None)
                out = residual[:, 0].sum(0)  # [d]
                for k in range(d):
                    for layer, slope in enumerate(torch.autograd.grad(out[k], shifts, retain_graph=k < d - 1)):
                        total[layer, :, k] += slope.double().sum(0)
            bar.update(len(part))
    return (total / len(prompts)).float()
