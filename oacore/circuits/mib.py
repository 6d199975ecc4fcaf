"""The MIB benchmark, circuit track: CPR and CMD as it computes them, and optimal constants in the form that its
evaluator reads.

What MIB means and what to mind when exporting to it: docs/mib.md. Symbols: L layers, H heads, k head width, d model
width, K budgets.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from oacore.circuits.circuit import by_size
from oacore.circuits.mib_file import group_masks, ungroup
from oacore.errors import UserError
from oacore.models.graph import Graph
from oacore.models.weights import Model

ROUNDING = 1e-5  # of metrics that are differences of fp32 logits
BUDGETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # shares of MIB's edges


def n_edges_of(graph: Graph, budgets: tuple[float, ...] = BUDGETS) -> np.ndarray:
    """int [K]: edges of each budget, of MIB's graph, where keys and values exist per query head."""
    return np.array([int(budget * graph.mib.n_edges) for budget in budgets])


def faithfulness(m: np.ndarray, m_empty: float, m_full: float) -> np.ndarray:
    """f = (m - m_empty) / (m_full - m_empty): 0 for a circuit as good as none, 1 for one as good as the model; no upper
    bound.

    Raises:
        UserError: the empty circuit is as good as the model, or a metric is NaN or infinite.
    """
    if not np.isfinite([*m, m_empty, m_full]).all():
        raise UserError(
            f"the task metric is {[*m, m_empty, m_full]} for circuits, no circuit, the model; allowed: finite numbers"
        )
    if math.isclose(m_full, m_empty, rel_tol=ROUNDING, abs_tol=ROUNDING):
        raise UserError(
            f"the task metric is {m_full} for the model and {m_empty} for the empty circuit, which is the same but for "
            "rounding: faithfulness is undefined"
        )
    return (m - m_empty) / (m_full - m_empty)


def cpr(x: np.ndarray, f: np.ndarray) -> float:
    """Integrated circuit performance ratio: the trapezoid area under f [K] over x [K]; more is better.

    MIB takes x = budgets, so that a perfect circuit scores 0.999 and half of all weight lies between the last two
    budgets. Our log variant takes x = `log_axis(budgets)`.
    """
    return float(np.trapezoid(f, x))


def cmd(x: np.ndarray, f: np.ndarray) -> float:
    """Integrated circuit-model distance: the trapezoid area under |1 - f| [K] over x [K]; 0 is perfect."""
    return float(np.trapezoid(np.abs(1 - f), x))


def log_axis(budgets: np.ndarray) -> np.ndarray:
    """ln k / ln(k_max / k_min) [K]: an axis of length 1, so that areas over it are averages over orders of
    magnitude.
    """
    return np.log(budgets) / np.log(budgets[-1] / budgets[0])


class Score(NamedTuple):
    """MIB's areas for one ranking of edges. It reports the CPR of the signed and the CMD of the absolute ranking."""

    table: pd.DataFrame  # budget, edges_requested, edges (left, both in MIB's graph), metric, faithfulness
    cpr: float
    cmd: float
    cpr_log: float
    cmd_log: float


def score(graph: Graph, scores: np.ndarray, evaluate: Callable[[np.ndarray], Any], *, absolute: bool) -> Score:
    """Judge a ranking of edges at every budget.

    Each budget's circuit is its highest-scoring edges of MIB's graph, pruned; the areas are over the *requested*
    budgets, as MIB has it. Where a budget cuts through a group of query heads, the shared key or value counts as in.

    Args:
        scores: [J, S].
        evaluate: masks bool [n, J, S] -> the mean task metric of each circuit [n]; MIB's is the logit difference at the
            last position, with counterfactual patching. It is called once, with the empty circuit, the budgets'
            circuits and the whole graph.
        absolute: rank by magnitude.

    Raises:
        UserError: as `faithfulness`.
    """
    requested = n_edges_of(graph)
    ranking = ungroup(graph, np.abs(scores) if absolute else scores)
    chosen = by_size(graph.mib, ranking, requested)  # [K, n_bwd, S]
    empty, full = np.zeros((1, *graph.valid.shape), bool), graph.valid[None]
    masks = np.concatenate((empty, group_masks(graph, chosen), full))
    m = np.asarray(evaluate(masks), np.float64)
    f = faithfulness(m[1:-1], m[0], m[-1])
    table = pd.DataFrame(
        {
            "budget": BUDGETS,
            "edges_requested": requested,
            "edges": chosen.sum((1, 2)),
            "metric": m[1:-1],
            "faithfulness": f,
        }
    )
    x = np.array(BUDGETS)
    log_x = log_axis(x)
    return Score(table, cpr(x, f), cmd(x, f), cpr(log_x, f), cmd(log_x, f))


def export_constants(model: Model, constants: dict[str, Tensor], lengths: Tensor | None) -> dict[str, Tensor]:
    """Constants of our graph in the basis of MIB's model, under the names that EAP-IG 7af394a looks up.

    MIB loads models with TransformerLens's default weight processing. It folds the bias of the LayerNorm that attention
    reads through W_V into b_V, and b_V through W_O into b_O, so a head's output lacks (b_V + b_LN W_V) W_O: attention
    rows sum to one, so that is the same everywhere, and is subtracted here. It makes LayerNorm models write vectors of
    mean 0, which LayerNorm can't tell apart: so are these. Heads come through W_O, without b_O; MLPs with their bias.

    MIB's input node is the token embedding alone; learned positions stay. A constant for token plus position can only
    be carried over on average: the mean position embedding of the prompts is subtracted.

    Args:
        constants: `input` [d], `head` [L, H, k] at z, `mlp` [L, d].
        lengths: int [n], tokens of each prompt that `input` was fitted on, if it replaces token plus position; None if
            it replaces the token embedding alone. Of no effect on models without learned positions.

    Returns:
        fp32 on the CPU: `hook_embed` [d], `blocks.{l}.attn.hook_result` [H, d], `blocks.{l}.hook_mlp_out` [d].

    Raises:
        UserError: constants of another shape, such as one per position, which EAP-IG has no place for.
    """
    _check_shapes(model, constants)
    wide = {name: value.to(model.device, torch.float64) for name, value in constants.items()}
    position = torch.zeros(model.d_model, dtype=torch.float64, device=model.device)
    if model.W_pos is not None and lengths is not None:
        # Position 0 is never ablated, so the constant has seen positions 1 to length - 1 of every prompt.
        ablated = torch.arange(1, model.W_pos.shape[0], device=model.device) < lengths.to(model.device)[:, None]
        position = ablated.sum(0).to(position) @ model.W_pos[1:].double() / ablated.sum()
    exported = {"hook_embed": wide["input"] - position}
    for layer, block in enumerate(model.blocks):
        folded = torch.zeros(model.n_kv_heads, model.d_head, dtype=torch.float64, device=model.device)  # b_V + b_LN W_V
        if block.b_V is not None:
            folded += block.b_V
        if block.attention_norm is not None and block.attention_norm.bias is not None:
            folded += torch.einsum("d,dhk->hk", block.attention_norm.bias.double(), block.W_V.double())
        z = wide["head"][layer] - folded.repeat_interleave(model.graph.group_size, 0)  # [H, k]
        exported[f"blocks.{layer}.attn.hook_result"] = torch.einsum("hk,hkd->hd", z, block.W_O.double())
        exported[f"blocks.{layer}.hook_mlp_out"] = wide["mlp"][layer]
    if model.centred:
        exported = {name: value - value.mean(-1, keepdim=True) for name, value in exported.items()}
    return {name: value.float().cpu().contiguous() for name, value in exported.items()}


def _check_shapes(model: Model, constants: dict[str, Tensor]) -> None:
    allowed = {
        "input": (model.d_model,),
        "head": (model.n_layers, model.n_heads, model.d_head),
        "mlp": (model.n_layers, model.d_model),
    }
    if set(constants) != set(allowed):
        raise UserError(
            f"constants for {', '.join(sorted(constants)) or 'nothing'}; allowed: {', '.join(allowed)}, all of them"
        )
    for name, shape in allowed.items():
        given = tuple(constants[name].shape)
        if len(given) == len(shape) + 1:
            raise UserError(
                f"constants for {name} have the shape {list(given)}, one per position; allowed: {list(shape)}, because "
                "EAP-IG puts one vector at all positions: fit constants that are not positional"
            )
        if given != shape:
            raise UserError(f"constants for {name} have the shape {list(given)}; allowed for this model: {list(shape)}")
