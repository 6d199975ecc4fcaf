"""Memory and arithmetic of causal tracing."""

from oacore.estimate.case import Case
from oacore.estimate.need import Need, fullest
from oacore.estimate.passes import (
    block_bytes,
    block_graph_bytes,
    clean_pass_bytes,
    descent_bytes,
    fit_flop,
    forward_flop,
    logits_bytes,
)


def n_places(case: Case) -> int:
    """Sites x positions x windows x layers; windows clipped to the same layers count twice here."""
    settings = case.config.tracing
    assert settings is not None
    return len(settings.sites) * len(settings.positions) * len(settings.windows) * case.sizes.n_layers


def tracing_fit(case: Case, task: str) -> Need:
    """A step: clean pass of B T tokens, L blocks kept for as many places as fit the budget; a test: a quarter of it,
    without a graph. One more than the places is the corrupted run.
    """
    s, T, settings = case.sizes, case.prompt_tokens(task), case.config.tracing
    assert settings is not None
    fit = settings.fit
    n_train, n_validation, _ = case.n_prompts(task)
    n = (n_places(case) if settings.per_place else 0) + 1
    B = min(fit.batch_size, n_train)
    X = min(n, max(1, case.tokens_per_batch // (B * T))) * B * T
    R = min(n_validation, max(1, case.tokens_per_batch // 4 // T))
    Y = min(n, max(1, case.tokens_per_batch // (R * T))) * R * T
    moment = fullest(
        {
            "clean pass": clean_pass_bytes(s, B * T),
            "graph": s.n_layers * block_graph_bytes(s, X),
            "block": block_bytes(s, X),
            "logits": logits_bytes(s, X / T),
        },
        {"clean pass": clean_pass_bytes(s, R * T), "block": block_bytes(s, Y), "logits": logits_bytes(s, Y / T)},
    )
    flop = fit_flop(
        fit,
        step=lambda: 2 * n * forward_flop(s, B * T),
        test=lambda: n * forward_flop(s, n_validation * T),
    )
    parts = {"weights": s.weights_bytes, "optimiser": descent_bytes(n * s.d_model)} | moment
    return Need("tracing_fit", task, parts, flop, "limits.tokens_per_batch")


def tracing(case: Case, task: str) -> Need:
    """A quarter of the budget's tokens: clean pass, corrupted residuals (L + 1) X d; places up to the budget in one
    block.
    """
    s, T, settings = case.sizes, case.prompt_tokens(task), case.config.tracing
    assert settings is not None
    n_test = case.n_prompts(task)[2]
    n = n_places(case) + 1
    R = min(n_test, max(1, case.tokens_per_batch // (4 * T)))
    X = min(n, max(1, case.tokens_per_batch // (R * T))) * R * T
    parts = {
        "weights": s.weights_bytes,
        "clean pass": clean_pass_bytes(s, R * T) + s.number_bytes * R * T * (s.n_layers + 1) * s.d_model,
        "block": block_bytes(s, X),
        "logits": logits_bytes(s, X / T),
    }
    n_draws = sum(settings.draws_of(corruption) for corruption in settings.corruption_names())
    flop = n_draws * n * forward_flop(s, n_test * T, s.n_layers / 2)
    return Need("tracing", task, parts, flop, "limits.tokens_per_batch")
