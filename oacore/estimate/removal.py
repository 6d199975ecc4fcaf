"""Memory and arithmetic of behaviour removal: masks that are learned or scored as for circuits, fits of constants by
masked or plain passes, and fine-tuning of all weights.
"""

from oacore.config.circuits import EDGE_ABLATIONS, EdgeAblation
from oacore.config.removal import REMOVAL_METHODS, Removal, RemovalMethodName
from oacore.estimate.case import Case
from oacore.estimate.circuits import CircuitCost, moments_bytes, replacement_bytes
from oacore.estimate.masked import folded_weights_bytes, mask_bytes, masked_pass, masked_pass_flop
from oacore.estimate.need import Need, Parts, fullest
from oacore.estimate.passes import (
    block_graph_bytes,
    clean_pass_bytes,
    descent_bytes,
    fit_flop,
    forward_flop,
    logits_bytes,
    unembed_flop,
)
from oacore.estimate.sizes import FP32

FINE_TUNED = 5  # times the weights: a copy, its gradients, Adam's two moments and its temporary


def removal(case: Case, method: RemovalMethodName, ablation: EdgeAblation) -> Need:
    """The choice of what to ablate, the fit of its constants, and fine-tuning; one is over before the next begins."""
    settings, s = _settings(case), case.sizes
    task = max(settings.tasks(), key=case.prompt_tokens)  # as wide as which all prompts of learning are
    row = REMOVAL_METHODS[method]
    n_ablations = len(settings.knobs(method)) * len(settings.seeds)
    chosen = _choice(case, settings, task, method, ablation, n_ablations)
    fitted = _fit(case, settings, task, row.unit, ablation, n_ablations)
    tuned = _relearning(case, settings, task, row.unit, n_ablations)
    held = case.held(task) | {"folded weights": folded_weights_bytes(s)}
    n_prompts = sum(sum(case.n_prompts(name)) for name in settings.tasks())
    held["cache rows"] = s.number_bytes * n_prompts * case.prompt_tokens(task) * s.d_model
    parts = held | fullest(chosen.parts, fitted.parts, tuned.parts)
    flop = chosen.flop + fitted.flop + tuned.flop
    return Need("removal", f"{method} {ablation}", parts, flop, "limits.memory_gb")


def _settings(case: Case) -> Removal:
    assert case.config.removal is not None
    return case.config.removal


def _choice(
    case: Case, settings: Removal, task: str, method: RemovalMethodName, ablation: EdgeAblation, F: int
) -> CircuitCost:
    """Learned masks as of circuits, with one row for each sample and prompt; gaps as of a mask for each component;
    attribution as of one pass for each interpolation. Others cost nothing to speak of.
    """
    s, t, row = case.sizes, case.prompt_tokens(task) - 1, EDGE_ABLATIONS[ablation]
    reads = REMOVAL_METHODS[method].keys
    if "masks" in reads:
        masks, E = settings.masks, s.graph.n_edges
        n = F * masks.n_samples * masks.n_prompts
        replacement, _ = replacement_bytes(case, F, t, row, fits=F)
        parts = masked_pass(case, t, n, F, gradient=True) | {"masks": n * (5 * mask_bytes(s) + 3 * FP32 * E)}
        parts |= {"optimiser": FP32 * F * E * 8, "replacements": replacement}
        return CircuitCost(parts, masks.steps * masked_pass_flop(s, n, t, gradient=True))
    if "ig_steps" in reads:
        n = min(settings.n_prompts, case.n_prompts(task)[0])
        return CircuitCost(
            masked_pass(case, t, n, 1, gradient=True), settings.ig_steps * masked_pass_flop(s, n, t, gradient=True)
        )
    if method == "gap":
        return _masked_fit(case, settings, task, ablation, s.graph.n_sources - 1)
    return CircuitCost({}, 0.0)


def _fit(case: Case, settings: Removal, task: str, unit: str, ablation: EdgeAblation, n_ablations: int) -> CircuitCost:
    """Of every ablation's constants: of edges side by side, of all else one after the other by plain passes."""
    if unit == "edge":
        return _masked_fit(case, settings, task, ablation, n_ablations)
    if not EDGE_ABLATIONS[ablation].fitted:
        return CircuitCost({}, 0.0)
    s, T, fit = case.sizes, case.prompt_tokens(task), settings.refit
    n_validation = case.n_prompts(task)[1]
    values = n_ablations * (s.n_layers * (s.z + s.d_model) if unit == "component" else s.d_model)
    parts = _plain_pass(case, T, fit.batch_size) | {"optimiser": descent_bytes(values)}
    flop = n_ablations * fit_flop(
        fit,
        step=lambda: 2 * _plain_flop(case, T, fit.batch_size),
        test=lambda: _plain_flop(case, T, n_validation),
    )
    return CircuitCost(parts, flop)


def _masked_fit(case: Case, settings: Removal, task: str, ablation: EdgeAblation, C: int) -> CircuitCost:
    """As circuits are judged, on validation prompts alone."""
    s, t, fit, row = case.sizes, case.prompt_tokens(task) - 1, settings.refit, EDGE_ABLATIONS[ablation]
    n_validation = case.n_prompts(task)[1]
    replacement, _ = replacement_bytes(case, C, t, row, fits=C)
    moment = masked_pass(case, t, C * n_validation, C, gradient=False)
    flop = masked_pass_flop(s, C * n_validation, t, gradient=False)
    parts: Parts = {"masks": 3 * C * mask_bytes(s), "replacements": replacement}
    if row.fitted:
        parts["optimiser"] = descent_bytes(C * (s.d_model + s.n_layers * (s.z + s.d_model)))
        parts["moments"] = moments_bytes(s, C) * (not row.positional)
        moment = fullest(moment, masked_pass(case, t, C * fit.batch_size, C, gradient=True))
        flop += fit_flop(
            fit,
            step=lambda: masked_pass_flop(s, C * fit.batch_size, t, gradient=True),
            test=lambda: masked_pass_flop(s, C * n_validation, t, gradient=False),
        )
    return CircuitCost(parts | moment, flop)


def _relearning(case: Case, settings: Removal, task: str, unit: str, n_ablations: int) -> CircuitCost:
    """Thrice a pass for every step: forward, and backward for activations and weights. With edges cut, each prompt has
    a residual stream for every source, twice a block, and destinations have their own; fewer prompts go at a time.
    """
    T, relearn, s = case.prompt_tokens(task), settings.relearn, case.sizes
    if not relearn.max_steps:
        return CircuitCost({}, 0.0)
    n, n_sources, flop = relearn.n_prompts, s.graph.n_sources, _plain_flop(case, T, relearn.n_prompts)
    parts: Parts = {"fine-tuning": FINE_TUNED * s.weights_bytes}
    if unit == "edge":
        n = min(n, max(1, case.tokens_per_batch // (n_sources * T)))
        streams = 2 * FP32 * n * T * s.d_model * (s.n_layers * n_sources + 2 * s.graph.n_destinations)
        parts["streams"] = streams
        flop += 2 * relearn.n_prompts * T * s.d_model * s.graph.n_edges
    return CircuitCost(parts | _plain_pass(case, T, n), n_ablations * relearn.max_steps * 3 * flop)


def _plain_pass(case: Case, T: int, n: int) -> Parts:
    """Of n prompts with a graph."""
    s = case.sizes
    graph = s.n_layers * block_graph_bytes(s, n * T) + clean_pass_bytes(s, n * T)
    return {"pass": graph, "logits": logits_bytes(s, n)}


def _plain_flop(case: Case, T: int, n: int) -> float:
    return forward_flop(case.sizes, n * T) + unembed_flop(case.sizes, n)
