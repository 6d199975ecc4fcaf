"""Overthinking: at which layer do wrong demonstrations win? (Halawi et al. 2023; Li & Janson 2024, section 6)

Every lens names the label of every input at every layer, after demonstrations with true labels and with permuted ones.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from oacore.engine.clean import Batch
from oacore.engine.forward import at, embed, run_block
from oacore.lenses.labelled import FewShot
from oacore.lenses.lens import Lens
from oacore.models.weights import Model

EQUAL = 1e-5  # relative: fp32 logits of one input round differently in batches of different sizes


def calibrated_accuracy(log_probs: Tensor, label: Tensor) -> Tensor:
    """How right each prediction is, [N] of 0, 1 / K or 1.

    A label counts as predicted for the inputs on which its probability, among the labels, is above its own (K - 1) / K
    quantile over all inputs, so that a lens which always prefers one label gains nothing by it. Where it is equal to
    the quantile, which is everywhere for a lens that tells no inputs apart, it counts 1 / K.

    Args:
        log_probs: [N, K] of the labels' tokens.
        label: [N], index of the true one.
    """
    n_labels = log_probs.shape[1]
    share = log_probs.double().softmax(-1)  # [N, K]
    # The quantile is one of the values: interpolation would leave none equal to it.
    threshold = share.quantile((n_labels - 1) / n_labels, dim=0, interpolation="lower")[label]
    of_label = share.gather(1, label[:, None])[:, 0]
    equal = torch.isclose(of_label, threshold, rtol=EQUAL, atol=0)
    return torch.where(equal, 1 / n_labels, (of_label > threshold).double())


@torch.no_grad()
def label_log_probs(model: Model, lenses: Sequence[Lens], prompts: FewShot, tokens_per_batch: int) -> Tensor:
    """Log-probabilities of the labels' tokens [n, L + 1, N, K] by every lens at every layer; at layer L all are the
    model's.
    """
    tokens = torch.from_numpy(prompts.tokens).long().to(model.device)
    batch = Batch(tokens, torch.from_numpy(prompts.lengths).long().to(model.device))
    labels = torch.from_numpy(prompts.label_tokens).long().to(model.device)
    log_probs = []
    for part in batch.split(tokens_per_batch):
        residual, last, layers = embed(model, part.tokens), part.lengths - 1, []
        for layer in range(model.n_layers + 1):
            here = at(residual, last)[:, 0]  # [B, d]
            layers.append(torch.stack([lens.logits(here, layer).log_softmax(-1)[:, labels] for lens in lenses]))
            if layer < model.n_layers:
                residual = run_block(model, layer, residual)
        log_probs.append(torch.stack(layers, 1))  # [n, L + 1, B, K]
    return torch.cat(log_probs, 2).cpu()


def truthfulness_table(
    lenses: Sequence[Lens],
    prompts: Mapping[tuple[str, str], FewShot],
    log_probs: Mapping[tuple[str, str], Tensor],
) -> pd.DataFrame:
    """Calibrated accuracy of every lens at every layer.

    Args:
        prompts: by (data set, demonstrations), the latter `true` or `permuted`.
        log_probs: of the same, as `label_log_probs` gives them.

    Returns:
        dataset, demonstrations, lens, init, layer, accuracy, se, n; layer L, after all blocks, is the model itself.
    """
    rows = []
    for (dataset, demonstrations), shots in prompts.items():
        label = torch.from_numpy(shots.label).long()
        for lens, by_layer in zip(lenses, log_probs[dataset, demonstrations], strict=True):
            for layer, values in enumerate(by_layer):
                right = calibrated_accuracy(values, label).numpy()
                se = float(right.std(ddof=1) / np.sqrt(len(right))) if len(right) > 1 else float("nan")
                rows.append((dataset, demonstrations, lens.name, lens.init, layer, float(right.mean()), se, len(right)))
    return pd.DataFrame(rows, columns=["dataset", "demonstrations", "lens", "init", "layer", "accuracy", "se", "n"])
