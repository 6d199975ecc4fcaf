"""Bytes and FLOP of passes, fits and what they hold; `s` are the model's sizes, other symbols those of
`oacore.estimate.table`.
"""

from collections.abc import Callable

from oacore.config.base import OptimalFit
from oacore.estimate.sizes import FP32, Sizes


def clean_pass_bytes(s: Sizes, X: float) -> float:
    """b X ((3 L + 1) d + L H k): residuals, z, attention and MLP outputs of all layers (`engine.clean.Clean`)."""
    return s.number_bytes * X * ((3 * s.n_layers + 1) * s.d_model + s.n_layers * s.z)


def block_bytes(s: Sizes, X: float) -> float:
    """b X (3 d + max(6 H k, 3 f or 2 f)): what one block makes beside its result, without a graph."""
    return s.number_bytes * X * (3 * s.d_model + max(6 * s.z, s.d_mlp * (3 if s.gated else 2)))


def block_graph_bytes(s: Sizes, X: float) -> float:
    """X (2 d of the norms, in fp32 for RMSNorm, + b (4 H k + 2 G k + 3 f or f)): what one block keeps for its backward
    pass.

    Weights have no gradient, so their inputs are not kept; keys and values are, once per query head.
    """
    norms = 2 * s.d_model * (FP32 if s.rms else s.number_bytes)
    return X * (norms + s.number_bytes * (4 * s.z + 2 * s.kv + s.d_mlp * (3 if s.gated else 1)))


def mlp_graph_bytes(s: Sizes, X: float) -> float:
    """X (d of its norm, in fp32 for RMSNorm, + b (3 f or f)): what an MLP keeps for its backward pass."""
    norm = s.d_model * (FP32 if s.rms else s.number_bytes)
    return X * (norm + s.number_bytes * s.d_mlp * (3 if s.gated else 1))


def first_head_graph_bytes(s: Sizes, X: float) -> float:
    """The MLP of layer 0, L - 2 blocks, and of the last block norm, keys and values: the graph behind an attention head
    of layer 0.
    """
    last = X * (s.d_model * (FP32 if s.rms else s.number_bytes) + s.number_bytes * 2 * (s.z + s.kv))
    return mlp_graph_bytes(s, X) + (s.n_layers - 2) * block_graph_bytes(s, X) + last


def logits_bytes(s: Sizes, R: float) -> float:
    """5 x 4 R V: logits, their log-softmax, and three more in fp32 (`metrics.kl_of_log_probs`)."""
    return 5 * FP32 * R * s.d_vocab


def descent_bytes(n_values: float) -> float:
    """14 x 4 bytes a value: start, 4 of the state, 3 rows taken out, gradient, and Adam's 5 temporaries
    (`fits.descent.descend`).
    """
    return 14 * FP32 * n_values


def statistics_bytes(s: Sizes, T: int) -> float:
    """4 (2 T + 2) (L (H k + d) + d): means, deviations, and two positional tables (`engine.statistics.Statistics`)."""
    return FP32 * (2 * T + 2) * (s.n_layers * (s.z + s.d_model) + s.d_model)


def forward_flop(s: Sizes, X: float, n_layers: float | None = None) -> float:
    """2 X n (weights of a block) of n = L blocks, or of as many as are asked for. A backward pass is as much again.

    Attention scores, 4 H k a pair of positions, are not counted: below 1 % of it at these prompt lengths.
    """
    return 2 * X * (s.n_layers if n_layers is None else n_layers) * s.block_weights


def mlp_flop(s: Sizes, X: float) -> float:
    """2 X d (f + f or 2 f): one MLP."""
    return X * 2 * s.d_model * (s.d_mlp + s.hidden)


def unembed_flop(s: Sizes, R: float) -> float:
    """2 R d V."""
    return 2 * R * s.d_model * s.d_vocab


def fit_flop(fit: OptimalFit, step: Callable[[], float], test: Callable[[], float]) -> float:
    """All steps of a fit that runs to its cap, and its tests."""
    return fit.max_steps * step() + (1 + len(fit.round_ends)) * test()
