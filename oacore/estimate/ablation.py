"""Memory and arithmetic of single-component ablation."""

from oacore.config.ablation import ABLATION_TYPES, Method
from oacore.estimate.case import Case
from oacore.estimate.need import Need, fullest
from oacore.estimate.passes import (
    block_bytes,
    clean_pass_bytes,
    descent_bytes,
    first_head_graph_bytes,
    fit_flop,
    forward_flop,
    logits_bytes,
    unembed_flop,
)
from oacore.estimate.sizes import FP32


def components(case: Case) -> tuple[int, float, int]:
    """C, mean number of blocks above one, and how many of a layer go side by side."""
    s, kinds = case.sizes, case.config.ablation.components
    per_layer = sum(s.n_heads if kind == "head" else 1 for kind in kinds)
    return per_layer * s.n_layers, (s.n_layers - 1) / 2, s.n_heads if "head" in kinds else 1


def ablated_pass_flop(case: Case, X: float, R: float) -> float:
    """All C components ablated in turn in X tokens of R rows: blocks above each, and the unembedding of R rows."""
    C, above, _ = components(case)
    return C * (forward_flop(case.sizes, X, above) + unembed_flop(case.sizes, R))


def optimal(case: Case, task: str, method: Method) -> Need:
    """A step: clean pass of B T tokens, and what n heads of layer 0 keep side by side; or a test without a graph; and
    15 C Q W.
    """
    s, T, fit = case.sizes, case.prompt_tokens(task), case.config.ablation.optimal
    n_train, n_validation, _ = case.n_prompts(task)
    C, _, side = components(case)
    B, R = min(fit.batch_size, n_train), case.at_once(n_validation, T)
    step, test = (min(side, max(1, case.tokens_per_batch // (n * T))) * n * T for n in (B, R))
    Q = T if ABLATION_TYPES[method].positional else 1
    W = max(s.d_model, s.z if "attention_layer" in case.config.ablation.components else 0)
    moment = fullest(
        {
            "clean pass": clean_pass_bytes(s, B * T),
            "graph": first_head_graph_bytes(s, step),
            "block": block_bytes(s, step),
            "logits": logits_bytes(s, step / T),
        },
        {"clean pass": clean_pass_bytes(s, R * T), "block": block_bytes(s, test), "logits": logits_bytes(s, test / T)},
    )
    flop = fit_flop(
        fit,
        step=lambda: forward_flop(s, B * T) + 2 * ablated_pass_flop(case, B * T, B),
        test=lambda: forward_flop(s, n_validation * T) + ablated_pass_flop(case, n_validation * T, n_validation),
    )
    parts = case.held(task) | {"optimiser": descent_bytes(C * Q * W)} | moment
    return Need("optimal", f"{task} {method}", parts, flop, "limits.tokens_per_batch")


def gaps(case: Case, task: str) -> Need:
    """Up to three clean passes (the prompts', partners', counterfactual), 4 values of the ablated heads, and one block
    under way for them.
    """
    s, T, ablation = case.sizes, case.prompt_tokens(task), case.config.ablation
    n_test = case.n_prompts(task)[2]
    C, _, side = components(case)
    R = case.at_once(n_test, T)
    X = min(side, max(1, case.tokens_per_batch // (R * T))) * R * T
    rows = [ABLATION_TYPES[method] for method in ablation.methods]
    n_clean = 1 + any(row.of_partner for row in rows) + any(row.of_counterfactual for row in rows)
    parts = case.held(task) | {
        "clean pass": n_clean * clean_pass_bytes(s, R * T),
        "block": block_bytes(s, X) + 4 * s.number_bytes * X * s.d_model,
        "logits": logits_bytes(s, X / T),
    }
    parts["constants"] += FP32 * C * s.d_model * sum(T if row.positional else 1 for row in rows if row.fitted)
    flop = n_clean * forward_flop(s, n_test * T) + len(rows) * ablated_pass_flop(case, n_test * T, n_test)
    return Need("gaps", task, parts, flop, "limits.tokens_per_batch")
