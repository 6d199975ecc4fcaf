"""Single-component ablation: what replaces a component's output, and the model's prediction with it replaced.

A component's *value* is what it computes: z (width k) for a head, before W_O, so that zero, means and constants live
where the head writes; what an MLP adds to the residual (width d); all of z (width H k) for a whole attention layer.
Position 0 (BOS) is never ablated.

Everything below the ablated layer is the clean run, shared by all components of a batch; only the blocks above run once
per component (Li & Janson 2024, sections 2 and A; methods in the paper's order in `Method`).

Symbols: n components of one group, B prompts, T tokens, w component width, P shortest prompt.
"""

import torch
from torch import Tensor

from oacore.ablation.components import Group, value_of
from oacore.engine.clean import Clean
from oacore.engine.forward import add_attention, at, last_residual_from, logits_of
from oacore.models.weights import Model


def ablated_logits(model: Model, clean: Clean, group: Group, replacement: Tensor) -> Tensor:
    """Logits at the last position with each component of the group replaced, one at a time.

    Args:
        replacement: [n, B or 1, T or 1, w]; position 0 keeps the clean value.

    Returns:
        [n, B, V] in fp32, differentiable in `replacement`.
    """
    n, layer, final = len(group), group.layer, group.layer == model.n_layers - 1
    value = value_of(clean, group)  # [n, B, T, w]
    n_tokens = value.shape[2]
    ablated_positions = (torch.arange(n_tokens, device=value.device) > 0)[:, None]  # [T, 1]
    delta = (replacement.to(value.dtype) - value) * ablated_positions  # [n, B, T, w]

    def pick(x: Tensor) -> Tensor:
        """In the last block nothing but the last position reaches the logits: [B, T, .] -> [B, 1, .]."""
        return at(x, clean.last) if final else x

    if final:
        delta = at(delta.transpose(0, 1).transpose(1, 2), clean.last).permute(2, 0, 1, 3)  # [n, B, 1, w]
    if group.kind == "mlp":
        residual = pick(clean.entering[layer + 1]) + delta
    else:
        W_O = model.blocks[layer].W_O
        of_heads = [W_O[head] for head in group.heads] if group.kind == "head" else [W_O.flatten(0, 1)]
        weight = torch.stack(of_heads)  # [n, w, d]
        combined = pick(clean.combined[layer]) + (delta.flatten(1, 2) @ weight).unflatten(
            1, delta.shape[1:3]
        )  # [n, B, T, d]
        residual = add_attention(model, layer, pick(clean.entering[layer]), combined)  # [n, B, T, d]
    if not final:
        rows = residual.flatten(0, 1)  # [n B, T, d]
        return logits_of(model, last_residual_from(model, layer + 1, rows, clean.last.repeat(n))).unflatten(0, (n, -1))
    return logits_of(model, residual[:, :, 0])
