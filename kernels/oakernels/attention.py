"""Attention over a first token that is clean and the positions after it, where all keys fit one tile:

    p[h, b, i, n] = softmax_n(cap(scale * <q[h, b, i], key[g, b, n]>))     over the keys n that i sees
    z[h, b, i] = sum_n p[h, b, i, n] * value[g, b, n]

Key and value 0 are the clean run's, gathered by each row's first token; key n is k[g, b, n - 1]. Head h reads
key/value head g = h // (H / KV), and cap(s) = c tanh(s / c), where there is a softcap c.

Symbols: B rows, U different first tokens, H heads, KV key/value heads, q positions of queries, T keys, t = T - 1 of
them after the first, k head width.
"""

from dataclasses import dataclass

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from oakernels.operands import check_contiguous
from oakernels.runtime import (
    INTERPRETED,
    Backend,
    Precision,
    accumulator_dtype,
    factor,
    matmul_precision,
    rounded,
    run,
)

MAX_KEYS = 64
"""Keys of a program, which holds all of its row's."""


@dataclass(frozen=True)
class Attention:
    """What attention takes beside queries, keys and values, and what gets no gradient.

    Args:
        clean_keys, clean_values: [U, KV, k], contiguous: of every first token.
        first: [B] which of the U first tokens a row has.
        hidden: bool [q, T] or [B, 1, T], contiguous: the keys that a query does not see. It sees one at least.
        scale: of the scores.
        softcap: that the scores stay below; None: none.
        precision: of fp32 products on a GPU.
        backend: as `Operands`.

    Raises:
        ValueError: more keys than `MAX_KEYS`; shapes, strides or dtypes that don't fit together.
    """

    clean_keys: Tensor
    clean_values: Tensor
    first: Tensor
    hidden: Tensor
    scale: float
    softcap: float | None = None
    precision: Precision = "ieee"
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        clean, hidden, T = self.clean_keys, self.hidden, self.hidden.shape[-1]
        check_contiguous("clean_keys", clean, clean.shape, clean.dtype)
        check_contiguous("clean_values", self.clean_values, clean.shape, clean.dtype)
        allowed = hidden.shape[:-1] == (len(self.first), 1) or hidden.ndim == 2
        if not (allowed and T <= MAX_KEYS and hidden.dtype == torch.bool and hidden.is_contiguous()):
            raise ValueError(
                f"hidden {hidden.dtype} {list(hidden.shape)} of strides {hidden.stride()}; "
                f"allowed: contiguous torch.bool [q, T] or [{len(self.first)}, 1, T], T up to {MAX_KEYS}"
            )

    def check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """ValueError unless q is [H, B, q, k], k and v [KV, B, t, k], with KV dividing H."""
        (_, KV, width), B = self.clean_keys.shape, len(self.first)
        n, t = (self.hidden.shape[0] if self.hidden.ndim == 2 else 1), self.hidden.shape[-1] - 1
        if q.shape[1:] != (B, n, width) or len(q) % KV or not k.shape == v.shape == (KV, B, t, width):
            raise ValueError(
                f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; "
                f"allowed: [H, {B}, {n}, {width}], {KV} dividing H, and twice {[KV, B, t, width]}"
            )

    def with_clean(self, x: Tensor, clean: Tensor, n_heads: int) -> Tensor:
        """Keys or values [KV, B, t, k] after those of each row's first token, for every head: [H, B, T, k]."""
        every = torch.cat((clean[self.first].transpose(0, 1)[:, :, None], x), 2)
        return every if len(every) == n_heads else every.repeat_interleave(n_heads // len(every), 0)


Kept = tuple[Tensor, ...]
"""What eager's forward pass keeps for its backward pass: keys and values [H, B, T, k], probabilities [H, B, q, T] in
fp32 or wider, and with a softcap the tanh of the scores. The kernel keeps nothing: either backward pass can do without.
"""


def attend(q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> tuple[Tensor, Kept]:
    """What each head reads.

    Args:
        q: [H, B, q, k].
        k, v: [KV, B, t, k].

    Returns:
        z [H, B, q, k], and what was kept.

    Raises:
        ValueError: shapes that don't fit together.
    """
    attention.check(q, k, v)
    candidates = {
        "eager": lambda z: _attend_eager(q, k, v, attention, z),
        "triton": lambda z: _attend_triton(q, k, v, attention, z),
    }
    key = ("attend", q.shape, k.shape, attention.softcap is None, attention.precision)
    return run(attention.backend, key, q.new_empty(q.shape), candidates)


def kept_by_eager(q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> Kept:
    """Eager's attention up to the probabilities; arguments as `attend`."""
    keys = attention.with_clean(k, attention.clean_keys, len(q))
    values = attention.with_clean(v, attention.clean_values, len(q))
    with matmul_precision(attention.precision):
        scores = (q * attention.scale) @ keys.mT
    capped: Kept = ()
    if attention.softcap is not None:
        capped = (torch.tanh(scores / attention.softcap),)
        scores = capped[0] * attention.softcap
    scores.masked_fill_(attention.hidden, float("-inf"))
    return keys, values, scores.softmax(-1, dtype=accumulator_dtype(q.dtype)), *capped


def _attend_eager(q: Tensor, k: Tensor, v: Tensor, attention: Attention, z: Tensor) -> tuple[Tensor, Kept]:
    _, values, p, *_ = kept = kept_by_eager(q, k, v, attention)
    with matmul_precision(attention.precision):
        torch.bmm(p.to(v.dtype).flatten(0, 1), values.flatten(0, 1), out=z.flatten(0, 1))
    return z, kept


# ---- Triton ----------------------------------------------------------------------------------------------------------


@triton.jit
def with_clean(x, clean, row, first, t, k, BT: tl.constexpr, BK: tl.constexpr):  # type: ignore[no-untyped-def]
    """[BT, BK]: the k numbers of row `first` of clean [., k], and after it those of row `row` of x [., t, k]."""
    n, column = tl.arange(0, BT), tl.arange(0, BK)
    inside = (n[:, None] > 0) & (n[:, None] <= t) & (column[None, :] < k)
    after = tl.load(x + (row * t + n[:, None] - 1) * k + column[None, :], mask=inside, other=0.0)
    before = tl.load(clean + first * k + column, mask=column < k, other=0.0)
    return tl.where(n[:, None] == 0, before[None, :], after)


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    """Below 1 by Lambert's continued fraction, where the exponential would cancel: wrong by 1e-7 of its size at most.

    libdevice's is not in the interpreter.
    """
    square = x * x
    near = x * (945 + square * (105 + square)) / (945 + square * (420 + 15 * square))
    size = 1 - 2 / (tl.exp(2 * tl.abs(x)) + 1)
    return tl.where(square < 1, near, tl.where(x < 0, -size, size))


@triton.jit
def probabilities(  # type: ignore[no-untyped-def]
    queries,  # [BQ, BK]
    keys,  # [BT, BK]
    hidden,  # its row, [., T]
    i,  # [BQ] which queries
    n_queries,
    T,
    scale,
    softcap,
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """p [BQ, BT], and the slope of what it is the softmax of, in <query, key>."""
    n = tl.arange(0, BT)
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
    slope = scale
    if softcap is not None:
        capped = tanh(scores / softcap)
        scores, slope = capped * softcap, scale * (1 - capped * capped)
    inside = (i[:, None] < n_queries) & (n[None, :] < T)
    unseen = tl.load(hidden + i[:, None] * T + n[None, :], mask=inside, other=0).to(tl.int1) | (n[None, :] >= T)
    scores = tl.where(unseen, float("-inf"), scores)
    raised = tl.exp(scores - tl.max(scores, 1)[:, None])
    return raised / tl.sum(raised, 1)[:, None], slope


@triton.jit(do_not_specialize=["B", "n_queries", "T", "hidden_stride"])
def attend_kernel(  # type: ignore[no-untyped-def]
    z,  # [H, B, q, k]
    q,  # [H, B, q, k]
    key,  # [KV, B, t, k]
    value,  # [KV, B, t, k]
    clean_keys,  # [U, KV, k]
    clean_values,  # [U, KV, k]
    first,  # [B]
    hidden,  # [q, T], or [B, 1, T]
    B,
    n_queries,
    T,
    H,
    KV,
    k,
    hidden_stride,
    scale,
    softcap,  # or None
    BQ: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    UP: tl.constexpr,
):
    """One program: BQ queries of one head of one row."""
    n_blocks = tl.cdiv(n_queries, BQ)
    block = tl.program_id(0) % n_blocks
    h = (tl.program_id(0) // n_blocks % H).to(tl.int64)  # heads of one row run side by side and share its keys in L2
    b = (tl.program_id(0) // n_blocks // H).to(tl.int64)
    g = h // (H // KV)
    clean = tl.load(first + b) * KV + g
    keys = factor(with_clean(key, clean_keys, g * B + b, clean, T - 1, k, BT, BK), PRECISION, UP)
    i, column = block * BQ + tl.arange(0, BQ), tl.arange(0, BK)
    inside = (i[:, None] < n_queries) & (column[None, :] < k)
    at = ((h * B + b) * n_queries + i[:, None]) * k + column[None, :]
    queries = factor(tl.load(q + at, mask=inside, other=0.0), PRECISION, UP)
    row = hidden + b * hidden_stride
    p, _ = probabilities(queries, keys, row, i, n_queries, T, scale, softcap, BT, PRECISION)
    p = factor(rounded(p, z.dtype.element_ty, UP), PRECISION, UP)
    values = factor(with_clean(value, clean_values, g * B + b, clean, T - 1, k, BT, BK), PRECISION, UP)
    result = tl.dot(p, values, input_precision=PRECISION)
    tl.store(z + at, rounded(result, z.dtype.element_ty, UP), mask=inside)


def key_tiles(n_keys: int, width: int) -> dict[str, int]:
    """The tile of all keys of both directions: powers of two, and at least the 16 rows of a tensor-core tile."""
    return {"BT": max(triton.next_power_of_2(n_keys), 16), "BK": max(triton.next_power_of_2(width), 16)}


def attend_tiles(n_queries: int, n_keys: int, width: int, dtype: torch.dtype, precision: Precision) -> dict[str, int]:
    """Tile sizes and launch options of `attend_kernel`, by what fits without spilling (kernels/README.md)."""
    keys = key_tiles(n_keys, width)
    on_cuda_cores = dtype == torch.float32 and precision == "ieee"
    return {
        "BQ": 16 if n_queries <= 16 else 32,
        **keys,
        "num_warps": 8 if on_cuda_cores or keys["BT"] * keys["BK"] > 8192 else 4,
        "num_stages": 1,
    }


def launch_options(q: Tensor, k: Tensor, attention: Attention) -> dict[str, object]:
    """Sizes and settings that both kernels take."""
    (H, B, n_queries, width), T = q.shape, k.shape[2] + 1
    return {
        "B": B,
        "n_queries": n_queries,
        "T": T,
        "H": H,
        "KV": len(k),
        "k": width,
        "hidden_stride": T if attention.hidden.ndim == 3 else 0,
        "scale": attention.scale,
        "softcap": attention.softcap,
        "PRECISION": attention.precision,
        "UP": INTERPRETED,
    }


def _attend_triton(q: Tensor, k: Tensor, v: Tensor, attention: Attention, z: Tensor) -> tuple[Tensor, Kept]:
    H, B, n_queries, width = q.shape
    tiles = attend_tiles(n_queries, k.shape[2] + 1, width, q.dtype, attention.precision)
    attend_kernel[(B * H * triton.cdiv(n_queries, tiles["BQ"]),)](
        z,
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        attention.clean_keys,
        attention.clean_values,
        attention.first,
        attention.hidden,
        **launch_options(q, k, attention),
        **tiles,
    )
    return z, ()
