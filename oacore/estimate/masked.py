"""Bytes and FLOP of masked-edge passes (`oacore.engine.masked`, `oacore.circuits.passes`); `s` are the model's sizes,
other symbols those of `oacore.estimate.table`.
"""

from oacore.circuits.numbers import PASS_BYTES_ON_CPU, PASS_SHARE, ROWS_WORTH_KEEPING
from oacore.estimate.case import Case
from oacore.estimate.need import Parts
from oacore.estimate.passes import forward_flop, logits_bytes, unembed_flop
from oacore.estimate.sizes import FP32, FP64, Sizes


def folded_weights_bytes(s: Sizes) -> float:
    """b L d (H k + 2 G k + f or 2 f), and d (H k + f) of writers where LayerNorm has them centred
    (`engine.folded.Weights`).
    """
    writers = 0 if s.rms else s.z + s.d_mlp
    return s.number_bytes * s.n_layers * s.d_model * (s.z + 2 * s.kv + s.hidden + writers)


def row_bytes(s: Sizes, t: int, *, gradient: bool, keep_inputs: bool, gpu: bool = False) -> int:
    """One row of a masked pass, which is what `Engine.row_bytes` says: a test holds the two together. If the engine
    imported this one, a change of any estimate would make the engine's results stale.
    """
    S, J, d, f, L = s.graph.n_sources, s.graph.n_destinations, s.d_model, s.d_mlp, s.n_layers
    inner, reads = s.graph.first_source(L - 1), s.n_heads + 2 * s.n_kv_heads
    layer = (reads + 1) * d + reads * 2 * s.d_head + 2 * s.n_heads * (t + 1) + 3 * f
    values = inner * d + layer
    if gradient:
        values = (
            2 * inner * d
            + layer * 2
            + L * (5 * s.z + 2 * s.n_heads * (t + 1) + 3 * f + 4 * d)
            + (J * d if keep_inputs else 0)
        )
    sums = FP32 * J * d if gpu and gradient and keep_inputs else 0  # over tokens, for the constants' gradient
    return (values * t + S * J + 4 * S * d + 5 * s.d_vocab) * s.number_bytes + sums


def sources_bytes(s: Sizes, n: float, t: int) -> tuple[float, float]:
    """b n S t d of what all sources write on n prompts, and what making it holds beside: as much again, 20 more where
    it is centred.
    """
    held = s.number_bytes * n * s.graph.n_sources * t * s.d_model
    return held, held * (1 if s.rms else 1 + 2 * FP64 / s.number_bytes)


def mask_bytes(s: Sizes) -> int:
    """4 J S of one mask."""
    return FP32 * s.graph.n_destinations * s.graph.n_sources


def pass_bytes(case: Case) -> float:
    """What a masked pass may take, as `oacore.circuits.passes.pass_bytes` finds it beside the weights on the device."""
    memory_gb = case.config.limits.memory_gb
    if memory_gb != "auto":
        return memory_gb * 1e9
    free = case.memory_bytes - case.sizes.weights_bytes - folded_weights_bytes(case.sizes)
    return max(PASS_SHARE * free, 1e9) if case.gpu and case.memory_bytes else PASS_BYTES_ON_CPU


def rows_at_once(case: Case, t: int, B: int, apart: int, *, gradient: bool) -> tuple[int, bool]:
    """Rows of one part of a pass, and whether inputs are kept: `Passes._parts`."""
    memory_bytes = pass_bytes(case)

    def fitting(keep: bool) -> int:
        return max(1, int(memory_bytes // row_bytes(case.sizes, t, gradient=gradient, keep_inputs=keep, gpu=case.gpu)))

    alone = B if case.gpu else B // apart
    keep = fitting(True) >= min(alone, ROWS_WORTH_KEEPING)
    return min(alone, fitting(keep)), keep


def masked_pass(case: Case, t: int, B: int, apart: int, *, gradient: bool) -> Parts:
    """Rows of one part: `Engine.row_bytes` without its logits, which are in fp32."""
    s = case.sizes
    rows, keep = rows_at_once(case, t, B, apart, gradient=gradient)
    of_row = row_bytes(s, t, gradient=gradient, keep_inputs=keep, gpu=case.gpu) - 4 * s.d_vocab * s.number_bytes
    return {"masked pass": rows * of_row, "logits": logits_bytes(s, rows)}


def masked_pass_flop(s: Sizes, R: float, t: int, *, gradient: bool) -> float:
    """R t (2 d E of the mix, 4 d E more with gradients; projections once, twice with gradients) and the unembedding.

    Not counted: attention scores; a second mix where inputs are not kept; the gradient of constants, 2 d J S a row.
    Counted too often: queries, attention output and MLP of the last block, which run at the last position alone.
    """
    mix, blocks = 2 * s.d_model * s.graph.n_edges, forward_flop(s, 1)
    return R * t * (3 * mix + 2 * blocks if gradient else mix + blocks) + unembed_flop(s, R * (2 if gradient else 1))
