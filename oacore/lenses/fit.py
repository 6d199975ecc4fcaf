"""The fit of a lens to cached rows, all layers at once, each until its KL on the validation rows stops falling.

It reads residuals and targets, never the model's attention; the gradient lens alone runs the model, for its Jacobian.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from oacore.config.lenses import LENSES, LensFit, LensName, LensRow
from oacore.engine.forward import final_norm
from oacore.fits.descent import Descent, Running, descend
from oacore.fits.record import read_fitted, recorded, write_fits
from oacore.fits.resume import NOT_KEPT, Resumable
from oacore.lenses.kl import unembedded_kl
from oacore.lenses.lens import Lens, LensSources
from oacore.lenses.rows import FitRows, LensRows
from oacore.models.weights import Model
from oacore.store.items import Item
from oacore.store.provenance import Provenance


def fit_lens(
    row: LensRow,
    init: str,
    sources: LensSources,
    settings: LensFit,
    *,
    teacher: Lens | None = None,
    resumable: Resumable = NOT_KEPT,
    on_test: Callable[[], object] = lambda: None,
) -> tuple[Lens, Descent]:
    """Fit a lens to the training rows.

    Args:
        init: of the row's; empty where it has none.
        teacher: the lens whose output this one is fitted to; by default it is fitted to the model's.
    """
    model, device = sources.model, sources.model.device
    held_out = sources.cache.read("validation")
    problem = row.load().problem(row.name, init, sources, held_out)

    def losses(rows: LensRows | FitRows, running: Running, values: Tensor) -> Tensor:
        """[m, B]; one row of all layers' mean for a shared lens."""
        layers = range(model.n_layers) if row.shared else running.rows
        residual = rows.residual if row.shared else rows.residual[:, running.index]
        residual = residual.transpose(0, 1)  # [m, B, d]
        target = rows.target
        if teacher is not None:
            taught = [teacher.final(residual[r], layer) for r, layer in enumerate(layers)]
            target = final_norm(model, torch.stack(taught))
        kl = unembedded_kl(model, final_norm(model, problem.final(values, layers, residual)), target)
        return kl.mean(0, keepdim=True) if row.shared else kl

    def gradient(running: Running, value: Tensor, *drawn: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = value.detach().requires_grad_()
            return torch.autograd.grad(losses(FitRows(*drawn), running, leaf).mean(1).sum(), leaf)[0]

    def validate(running: Running, value: Tensor) -> Tensor:
        total = torch.zeros(len(running.rows), dtype=torch.float64, device=device)
        for part in held_out.in_batches(settings.batch_size):
            total += losses(part, running, value).double().sum(1)
        return (total / len(held_out)).float()

    with sources.cache.shuffled(settings.batch_size, sources.seed) as batches:
        descent = descend(
            problem.start,
            problem.unit,
            gradient,
            validate,
            settings,
            names=fits_of(row, model.n_layers),
            key=f"lenses.{row.fit}.learning_rate",
            resumable=resumable,
            what=f"{row.name} {init}".strip(),
            on_test=on_test,
            draw=batches.at,
            sgd=problem.sgd,
        )
    return problem.lens(descent.best), descent


def fits_of(row: LensRow, n_layers: int) -> list[str]:
    """What the fits of a lens are called: one for each layer, or one for all."""
    return ["all layers"] if row.shared else [f"layer {layer}" for layer in range(n_layers)]


def item_of(lens: Lens, descent: Descent) -> Item:
    """A fitted lens and the record of its fits, for the store."""
    return Item(recorded(lens.values, descent))


def save_lens(path: str | Path, row: LensRow, init: str, n_layers: int, item: Item, provenance: Provenance) -> None:
    """Write a lens of the store as a file of the run."""
    write_fits(path, item.tensors, fits_of(row, n_layers), provenance.noting(lens=row.name, init=init))


def load_lens(path: str | Path, name: LensName, init: str, model: Model, provenance: Provenance) -> Lens:
    """Read a fitted lens.

    Raises:
        UserError: the file is damaged, or of another model or other rows.
    """
    values = read_fitted(path, None, provenance)
    lens: Lens = LENSES[name].load()(name, init, model, {key: value.to(model.device) for key, value in values.items()})
    return lens
