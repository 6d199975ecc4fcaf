"""Memory and arithmetic of lenses: each lens's row (`oacore.config.lenses`) names the formula of its number of values,
which is called with the model's sizes, and says how it is fitted.
"""

from collections.abc import Iterable

from oacore.config.lenses import LENSES, LensName, lens_and_init
from oacore.config.rows import resolve
from oacore.estimate.case import Case
from oacore.estimate.need import Need, fullest
from oacore.estimate.passes import (
    block_bytes,
    block_graph_bytes,
    clean_pass_bytes,
    descent_bytes,
    fit_flop,
    forward_flop,
    mlp_flop,
    unembed_flop,
)
from oacore.estimate.sizes import FP32, FP64, Sizes
from oacore.lenses.numbers import BANK, CHUNK_ELEMENTS


def values_none(s: Sizes) -> int:
    """A lens without values."""
    return 0


def values_per_layer(s: Sizes) -> int:
    """L d: one vector for each layer."""
    return s.n_layers * s.d_model


def values_per_layer_pair(s: Sizes) -> int:
    """L L d: one vector for each layer, for each layer that the lens starts at."""
    return s.n_layers * values_per_layer(s)


def values_affine(s: Sizes) -> int:
    """L d (d + 1): a matrix and a bias for each layer."""
    return values_per_layer(s) * (s.d_model + 1)


def values_bank(s: Sizes) -> int:
    """1000 L d: the outputs that are drawn from."""
    return BANK * values_per_layer(s)


def lenses_bytes(case: Case, lenses: Iterable[LensName]) -> float:
    """4 bytes a value of these lenses, once for each init."""
    assert case.config.lenses is not None
    rows = [LENSES[lens_and_init(file)[0]] for file in case.config.lenses.files(lenses)]
    return FP32 * sum(resolve(row.values)(case.sizes) for row in rows)


def rows_bytes(s: Sizes, n: float) -> float:
    """b n (2 L + 1) d: residual and attention of every layer, and the final residual, of n rows."""
    return s.number_bytes * n * (2 * s.n_layers + 1) * s.d_model


def n_rows(case: Case, task: str) -> tuple[int, ...]:
    """Rows of each split in the lenses' cache."""
    assert case.config.lenses is not None
    per_prompt = case.prompt_tokens(task) - 1 if case.config.lenses.positions == "all" else 1
    return tuple(n * per_prompt for n in case.n_prompts(task))


def chunk_bytes(s: Sizes, R: float) -> float:
    """5 x 4 R V of R rows' logits, or of one chunk of them (`lenses.kl`)."""
    return 5 * FP32 * min(CHUNK_ELEMENTS, R * s.d_vocab)


def lens_activations(case: Case, task: str) -> Need:
    """One clean pass, and b X (4 L + 2) d of rows: residuals and attention, each stacked and made contiguous."""
    s, T = case.sizes, case.prompt_tokens(task)
    X = case.at_once(max(case.n_prompts(task)), T) * T
    rows = s.number_bytes * X * (4 * s.n_layers + 2) * s.d_model
    parts = {"weights": s.weights_bytes, "clean pass": clean_pass_bytes(s, X), "cache rows": rows}
    flop = forward_flop(s, sum(case.n_prompts(task)) * T)
    return Need("lens_activations", task, parts, flop, "limits.tokens_per_batch")


def lens_fit(case: Case, task: str, lens: str) -> Need:
    """All layers' fits at once: 15 values, their validation rows, the graph of m MLPs on B rows each, and chunks of
    logits.

    A lens that runs MLPs runs L (L + 1) / 2 of them on B rows, each keeping 2 d (fp32) and 3 f or f. One that runs the
    model first averages a Jacobian of L d d in float64. Values that do not descend, and a teacher's, lie beside.
    """
    s, T, lenses, row = case.sizes, case.prompt_tokens(task), case.config.lenses, LENSES[lens_and_init(lens)[0]]
    assert lenses is not None
    n_train, n_validation, _ = n_rows(case, task)
    fit = getattr(lenses, row.fit)
    L, d, B = s.n_layers, s.d_model, min(fit.batch_size, n_train)
    n_mlps = L * (L + 1) / 2
    hidden = s.d_mlp * (3 if s.gated else 1)
    graph = n_mlps * (2 * d * FP32 + s.number_bytes * hidden) if row.runs_mlps else s.number_bytes * L * d * 3
    taught = resolve(LENSES[row.teacher].values)(s) if row.teacher else 0
    held = resolve(row.values)(s) if row.fitted_values else 0
    parts = {
        "weights": s.weights_bytes,
        "optimiser": descent_bytes(resolve(row.fitted_values or row.values)(s)),
        "constants": FP32 * (taught + held),
        "cache rows": rows_bytes(s, n_validation + 2 * B),
        "graph": B * graph,
        "block": B * L * s.number_bytes * (3 * d + s.d_mlp * (3 if s.gated else 2)),
        "logits": chunk_bytes(s, B * L),
    }
    through_mlps = row.runs_mlps or (bool(row.teacher) and LENSES[row.teacher].runs_mlps)
    row_flop = mlp_flop(s, n_mlps) if through_mlps else L * 2 * d * d
    flop = fit_flop(
        fit,
        step=lambda: B * 2 * row_flop + 2 * unembed_flop(s, 2 * B * L),
        test=lambda: n_validation * (row_flop + unembed_flop(s, 2 * L)),
    )
    if row.runs_model:
        R, d = case.at_once(lenses.grad_prompts, T), s.d_model
        jacobian = {
            "weights": s.weights_bytes,
            "graph": s.n_layers * block_graph_bytes(s, R * T),
            "optimiser": FP64 * s.n_layers * d * d,
            "block": block_bytes(s, R * T),
        }
        parts = fullest(parts, jacobian)
        flop += d * forward_flop(s, lenses.grad_prompts * T, s.n_layers / 2)
    return Need("lens_fit", f"{task} {lens}", parts, flop, f"lenses.{row.fit}.batch_size")
