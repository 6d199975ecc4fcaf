"""Steps in the metric of gradients: what Adam does for single coordinates, done for those that are coupled.

Adam divides every coordinate by the root mean square of its own gradients. Coordinates of one vector are coupled, since
what is behind it reads directions and not coordinates; here each block of them is multiplied by the inverse square root
of its gradients' second moments, a matrix, as in full-matrix Adagrad (Duchi et al. 2011) and Shampoo (Gupta et al.
2018).
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from oacore.fits.resume import State

DECAY = 0.99  # of the second moments, a step
DAMPING = 0.01  # added to every eigenvalue, of their mean
PACE = 1.4  # times Adam's rate: with 2 one of four circuits lost what it had, with 1 all were a little slower
TINY = 1e-20  # beside it, for blocks without any gradient


def blocks_of(widths: Sequence[int]) -> dict[int, Tensor]:
    """Coordinates of consecutive blocks: by width w those of its b blocks, [b, w] int64."""
    by_width: dict[int, list[Tensor]] = {}
    for width, end in zip(widths, accumulate(widths), strict=True):
        by_width.setdefault(width, []).append(torch.arange(end - width, end))
    return {width: torch.stack(blocks) for width, blocks in by_width.items()}


class Whitening:
    """The second moments of n fits' gradients by block, and the directions that they give.

    Args:
        widths: of consecutive blocks; together all coordinates of a fit.
        unit: [n, coordinates] each coordinate's unit, in which its block is whitened.
    """

    def __init__(self, widths: Sequence[int], unit: Tensor):
        self.blocks = {width: index.to(unit.device) for width, index in blocks_of(widths).items()}
        self.unit = unit
        self._roots: dict[int, tuple[Tensor, Tensor]] = {}

    def initial_state(self) -> State:
        """Moments [n, b, w, w] of each width, before any gradient."""
        n = len(self.unit)
        return {_name(width): self.unit.new_zeros(n, *index.shape, width) for width, index in self.blocks.items()}

    def see(self, state: State, rows: Tensor, gradient: Tensor) -> None:
        """Take in a step's gradients [m, coordinates] of some fits."""
        gradient = gradient * self.unit[rows]
        for width, index in self.blocks.items():
            part, moments = gradient[:, index], state[_name(width)]
            product = part[..., :, None] * part[..., None, :]
            if len(rows) == len(moments):  # all of them, in order
                moments.lerp_(product, 1 - DECAY)
            else:
                moments[rows] = moments[rows].lerp_(product, 1 - DECAY)

    def refresh(self, state: State, rows: Tensor, n_seen: int) -> None:
        """Take the roots of some fits' moments, for `direction` until the next call.

        Args:
            n_seen: gradients so far, of which the moments are a decaying mean that began at zero.
        """
        for width in self.blocks:
            values, vectors = _eigen(state[_name(width)][rows] / (1 - DECAY**n_seen))
            values = values.clamp(min=0) + DAMPING * values.clamp(min=0).mean(-1, keepdim=True) + TINY
            roots, kept = (values.rsqrt(), vectors), self._roots.get(width)
            if kept is not None and len(kept[0]) == len(rows):
                for memory, new in zip(kept, roots, strict=True):  # in place: a GPU may replay steps that read it
                    memory.copy_(new)
            else:
                self._roots[width] = roots

    def direction(self, rows: Tensor, momentum: Tensor) -> Tensor:
        """Momentum [m, coordinates] of the fits of the last `refresh` after the inverse roots, in units of their own: a
        single gradient has about length `PACE` in every coordinate.
        """
        momentum, found = momentum * self.unit[rows], torch.zeros_like(momentum)
        for width, index in self.blocks.items():
            roots, vectors = self._roots[width]
            # Sums of products, not matrix products: a fit's bits must not depend on what is fitted beside it.
            along = (vectors * momentum[:, index][..., :, None]).sum(-2) * roots
            found[:, index] = (vectors * along[..., None, :]).sum(-1)
        return PACE * found


def _name(width: int) -> str:
    return f"moments_{width}"


def _eigen(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [m, b, w] and vectors [m, b, w, w]; on a CPU fit by fit, each aligned as it would be alone."""
    if moments.device.type != "cpu":
        return tuple(torch.linalg.eigh(moments))
    each = [torch.linalg.eigh(of_fit.clone()) for of_fit in moments]
    return torch.stack([values for values, _ in each]), torch.stack([vectors for _, vectors in each])
