"""Memory and arithmetic of circuit discovery: each search method's row (`oacore.config.circuits`) names its formula,
which is called with the case, the task and the rows of the method and of the edge ablation.
"""

from typing import NamedTuple

from oacore.circuits.numbers import REPLACED_AT_ONCE, WIDEST_BLOCK
from oacore.config.base import OptimalFit
from oacore.config.circuits import (
    CIRCUIT_METHODS,
    EDGE_ABLATIONS,
    CircuitMethod,
    EdgeAblation,
    EdgeAblationType,
    SearchMethod,
)
from oacore.config.rows import resolve
from oacore.estimate.case import Case
from oacore.estimate.masked import (
    folded_weights_bytes,
    mask_bytes,
    masked_pass,
    masked_pass_flop,
    rows_at_once,
    sources_bytes,
)
from oacore.estimate.need import Need, Parts, fullest
from oacore.estimate.passes import descent_bytes, fit_flop
from oacore.estimate.sizes import FP32, Sizes


class CircuitCost(NamedTuple):
    """What finding circuits, or judging them, needs beside what is held all along."""

    parts: Parts
    flop: float
    refusal: str = ""


def held(case: Case, task: str) -> Parts:
    """Weights, folded ones beside them, and of every prompt t d of its embeddings and d of the clean run's end."""
    s, T = case.sizes, case.prompt_tokens(task)
    parts = case.held(task) | {"folded weights": folded_weights_bytes(s)}
    parts["cache rows"] = s.number_bytes * sum(case.n_prompts(task)) * T * s.d_model
    return parts


def replacement_bytes(case: Case, n: int, t: int, ablation: EdgeAblationType, fits: int = 1) -> tuple[float, float]:
    """Of the replacements of n prompts, and of making them: every source's output, or F fits' constants 4 F S Q d,
    thrice to fit.
    """
    s = case.sizes
    if ablation.per_prompt:
        return sources_bytes(s, n, t)
    constants = FP32 * fits * s.graph.n_sources * (t if ablation.positional else 1) * s.d_model
    return constants * (3 if ablation.fitted else 1), 0.0


def circuits(case: Case, task: str, method: CircuitMethod, ablation: EdgeAblation) -> Need:
    """The search, then the judgement of what it found; one is over before the other begins."""
    assert case.config.circuits is not None
    found = search(case, task, method, ablation)
    judged = judgement(case, task, case.n_circuits(method), case.config.circuits.refit, EDGE_ABLATIONS[ablation])
    parts = held(case, task) | fullest(found.parts, judged.parts)
    flop = found.flop + judged.flop
    return Need("circuits", f"{task} {method} {ablation}", parts, flop, "limits.memory_gb", found.refusal)


def search(case: Case, task: str, method: CircuitMethod, ablation: EdgeAblation) -> CircuitCost:
    """By the method's own formula."""
    row = CIRCUIT_METHODS[method]
    cost: CircuitCost = resolve(row.cost)(case, task, row, EDGE_ABLATIONS[ablation])
    return cost


def nothing(case: Case, task: str, method: SearchMethod, ablation: EdgeAblationType) -> CircuitCost:
    """A circuit that is known without a pass."""
    return CircuitCost({}, 0.0)


def mask_learning(case: Case, task: str, method: SearchMethod, ablation: EdgeAblationType) -> CircuitCost:
    """F R masks: 4 J S of each five times (masks, gradients, rescaled, two of backward), 2 E of noise and alpha; Adam's
    5 F E, for each parameter of an edge.
    """
    s, t = case.sizes, case.prompt_tokens(task) - 1
    assert case.config.circuits is not None
    fit = case.config.circuits.masks_under(ablation.name)
    F, P = case.n_circuits(method.name), min(fit.n_prompts, case.n_prompts(task)[0])
    n_masks = F * fit.n_samples * P
    masks = n_masks * (5 * mask_bytes(s) + 3 * FP32 * s.graph.n_edges)
    parameters = FP32 * F * s.graph.n_edges * 8 * method.parameters
    replacement, making = replacement_bytes(case, F * P, t, ablation, fits=F)
    step = masked_pass(case, t, n_masks, F, gradient=True)
    moment = fullest(step | {"masks": masks}, {"masks": masks / 2, "making replacements": making})
    flop = fit.steps * masked_pass_flop(s, n_masks, t, gradient=True)
    return CircuitCost(moment | {"optimiser": parameters, "replacements": replacement}, flop)


def gradient_scores(case: Case, task: str, method: SearchMethod, ablation: EdgeAblationType) -> CircuitCost:
    """One gradient pass of n prompts, or as many as a key of the config says; with a contrast, every source's output
    beside it.
    """
    s, t, circuits = case.sizes, case.prompt_tokens(task) - 1, case.config.circuits
    assert circuits is not None
    n = min(circuits.n_prompts, case.n_prompts(task)[0])
    n_passes = getattr(circuits, method.gradient_passes) if method.gradient_passes else 1
    replacement, making = replacement_bytes(case, n, t, ablation)
    parts, contrast = masked_pass(case, t, n, 1, gradient=True), 0.0
    if method.contrast:
        contrast, making = sources_bytes(s, n, t)
        # Each row's own copy, and a gradient as large that nobody reads: `limits.memory_gb` counts neither.
        rows, _ = rows_at_once(case, t, n, 1, gradient=True)
        parts["contrast of rows"] = 2 * rows * contrast / n
    moment = fullest(parts, {"making replacements": making})
    flop = len(circuits.seeds) * n_passes * masked_pass_flop(s, n, t, gradient=True)
    return CircuitCost(moment | {"replacements": replacement + contrast, "masks": 6 * mask_bytes(s)}, flop)


def edge_by_edge(case: Case, task: str, method: SearchMethod, ablation: EdgeAblationType) -> CircuitCost:
    """A pass without gradients of n prompts for every edge, and for every knob where each goes its own way; masks of
    those that are judged side by side thrice.
    """
    s, t, circuits = case.sizes, case.prompt_tokens(task) - 1, case.config.circuits
    assert circuits is not None
    n, E = min(circuits.n_prompts, case.n_prompts(task)[0]), s.graph.n_edges
    n_sweeps = len(circuits.knobs(method.name)) if method.sweeps_each_knob else 1
    M = method.masks_at_once * n_sweeps
    replacement, making = replacement_bytes(case, n, t, ablation)
    moment = fullest(masked_pass(case, t, n * M, M, gradient=False), {"making replacements": making})
    parts = moment | {"replacements": replacement, "masks": 3 * M * mask_bytes(s)}
    if method.most_passes and E * n > method.most_passes:
        return CircuitCost(parts, 0.0, f"{method.name} refuses more than {method.most_passes:,} passes: {E * n:,} here")
    return CircuitCost(parts, E * len(circuits.seeds) * n_sweeps * masked_pass_flop(s, n, t, gradient=False))


def judgement(case: Case, task: str, C: int, fit: OptimalFit, row: EdgeAblationType) -> CircuitCost:
    """C circuits: their masks thrice in fp32; where constants are fitted, 15 values each in a step, their moments, and
    their writes 3 C S Q d.
    """
    s, t, (n_train, n_validation, n_test) = case.sizes, case.prompt_tokens(task) - 1, case.n_prompts(task)
    n_most, n_held_out = max(n_validation, n_test), n_validation + n_test
    moment = masked_pass(case, t, C * n_most, C, gradient=False)
    flop = masked_pass_flop(s, C * n_held_out, t, gradient=False)
    replacement, making = replacement_bytes(case, min(REPLACED_AT_ONCE, n_most), t, row, fits=C)
    parts: Parts = {"masks": 3 * C * mask_bytes(s), "replacements": replacement}
    if row.fitted:
        B, Q = min(fit.batch_size, n_train), t if row.positional else 1
        parts["optimiser"] = descent_bytes(C * Q * (s.d_model + s.n_layers * (s.z + s.d_model)))
        parts["moments"] = moments_bytes(s, C) * (not row.positional)
        moment = fullest(moment, masked_pass(case, t, C * B, C, gradient=True))
        flop += fit_flop(
            fit,
            step=lambda: masked_pass_flop(s, C * B, t, gradient=True),
            test=lambda: masked_pass_flop(s, C * n_validation, t, gradient=False),
        )
    return CircuitCost(parts | fullest(moment, {"making replacements": making}), flop)


def moments_bytes(s: Sizes, C: int) -> int:
    """Five times the second moments of the blocks of C circuits' constants (`fits.whitening`), with their roots and
    what a step adds.
    """

    def of_vector(width: int) -> int:
        whole, rest = divmod(width, WIDEST_BLOCK)
        return whole * WIDEST_BLOCK**2 + rest**2

    return 5 * FP32 * C * (of_vector(s.d_model) * (1 + s.n_layers) + of_vector(s.d_head) * s.n_layers * s.n_heads)
