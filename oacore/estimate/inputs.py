"""Memory and arithmetic of what all experiments share: model, prompts, activations."""

from oacore.estimate.case import Case
from oacore.estimate.need import Need
from oacore.estimate.passes import block_bytes, clean_pass_bytes, forward_flop, logits_bytes, unembed_flop
from oacore.estimate.sizes import FP32, FP64


def model(case: Case) -> Need:
    """Weights alone: the parity gate runs 4 prompts of at most 48 tokens, with all their logits."""
    s = case.sizes
    X = 4 * 48
    parts = {"weights": s.weights_bytes, "logits": logits_bytes(s, X), "block": block_bytes(s, X)}
    return Need("model", "", parts, 2 * (forward_flop(s, X) + unembed_flop(s, X)), "dtype")


def prompts(case: Case, task: str) -> Need:
    """Prompts that the model must complete rightly: R T tokens of one batch through one block at a time."""
    s, T = case.sizes, case.prompt_tokens(task)
    R = max(1, case.tokens_per_batch // T)
    parts = {"weights": s.weights_bytes, "block": block_bytes(s, R * T), "logits": FP32 * R * s.d_vocab}
    n = sum(case.n_prompts(task))
    return Need("prompts", task, parts, forward_flop(s, n * T) + unembed_flop(s, n), "limits.tokens_per_batch")


def activations(case: Case, task: str) -> Need:
    """One clean pass, and one layer's values in float64, twice (`engine.statistics.Moments`), or one block under
    way.
    """
    s, T, counts = case.sizes, case.prompt_tokens(task), case.n_prompts(task)
    X = case.at_once(max(counts), T) * T
    moments = 2 * FP64 * X * max(s.z, s.d_model)
    parts = case.held(task) | {"clean pass": clean_pass_bytes(s, X), "block": max(block_bytes(s, X), moments)}
    # Of training prompts the counterfactuals run too.
    flop = forward_flop(s, (sum(counts) + counts[0]) * T)
    return Need("activations", task, parts, flop, "limits.tokens_per_batch")
