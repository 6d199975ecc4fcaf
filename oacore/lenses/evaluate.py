"""How well lenses predict on held-out rows."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from oacore.engine.forward import final_norm, unembed
from oacore.fits.convergence import UNFITTED, Convergence, columns_in, typed
from oacore.lenses.kl import unembedded_kl
from oacore.lenses.lens import Lens
from oacore.lenses.numbers import BATCH_ROWS
from oacore.lenses.rows import LensRows
from oacore.metrics import clustered_mean_and_se


@torch.no_grad()
def lens_losses(lens: Lens, rows: LensRows, batch_size: int = BATCH_ROWS) -> tuple[Tensor, Tensor]:
    """KL(model || lens) in nats, and whether their most likely tokens agree: both [L, B]."""
    model = lens.model
    kl, agree = [], []
    for number, part in enumerate(rows.in_batches(batch_size)):
        moved = lens.moved_on(number * batch_size)
        finals = torch.stack([moved.final(part.residual[:, layer], layer) for layer in range(model.n_layers)])
        normed, top = final_norm(model, finals), unembed(model, part.target).argmax(-1)
        kl.append(unembedded_kl(model, normed, part.target).cpu())
        agree.append(torch.stack([unembed(model, layer).argmax(-1) == top for layer in normed]).cpu())
    return torch.cat(kl, 1), torch.cat(agree, 1)


def loss_table(
    lens: Lens, losses: tuple[Tensor, Tensor], clusters: np.ndarray, fits: Sequence[Convergence] = ()
) -> pd.DataFrame:
    """One row per layer: lens, init, layer, kl_nats, se_nats, top1_agreement, n, converged, steps, left_nats.

    Args:
        losses: as `lens_losses` gives them.
        clusters: [B], `Prompts.cluster` of each row's prompt: what standard errors are over.
        fits: of each layer; the last three columns are empty without.
    """
    table = []
    for layer, (kl, agree) in enumerate(zip(*losses, strict=True)):
        mean, se = clustered_mean_and_se(kl, clusters)
        fit, agreement = fits[layer] if fits else UNFITTED, float(agree.double().mean())
        table.append((lens.name, lens.init, layer, mean, se, agreement, len(kl), *fit))
    columns = ["lens", "init", "layer", "kl_nats", "se_nats", "top1_agreement", "n", *columns_in("nats")]
    return typed(pd.DataFrame(table, columns=columns))
