"""Speed and peak memory of the masked read, forward and backward, by backend, beside the roofline.

python kernels/bench/bench_masked_read.py [--shape J S B T d k] [--repeats N] [--csv FILE]
"""

import torch
from oakernels import Operands, mix, mix_backward, project_backward, read
from roofline import Case, Shape, Work, main
from torch import Tensor


def work_of(shape: Shape, case: Case) -> list[Work]:
    """The ops of a read."""
    J, S, B, T, d, k = vars(shape).values()
    tokens, edges, heads, weights = B * T * d, B * J * S, J * B * T * k, J * d * k
    mixing, projecting = J * S * tokens, J * B * T * d * k
    base, projection = case.base, case.projection
    d_delta, dx = torch.zeros_like(case.delta), torch.empty_like(case.dx)
    by_eager = Operands(case.masks, case.delta, backend="eager")
    y, rstd, stored = read(base, by_eager, projection, store_inputs=True)
    assert stored is not None

    def backward_of_projection(operands: Operands, x: Tensor, out: Tensor) -> Tensor:
        how = {"backend": operands.backend, "precision": operands.precision}
        return project_backward(case.dy, y, rstd, x, projection, out=out, **how)

    def backward(operands: Operands) -> object:
        x = mix(base, operands)
        return mix_backward(backward_of_projection(operands, x, x), operands, d_delta=d_delta, token_sums=True)

    return [
        Work(
            "read",
            S * tokens + heads + weights,
            edges,
            mixing + projecting,
            lambda operands: read(base, operands, projection),
        ),
        Work(
            "read, x stored",
            (S + J) * tokens + heads + weights,
            edges,
            mixing + projecting,
            lambda operands: read(base, operands, projection, store_inputs=True),
        ),
        Work(
            "project_backward",
            2 * J * tokens + 2 * heads + weights,
            J * B * T,
            projecting,
            lambda operands: backward_of_projection(operands, stored, dx),
        ),
        Work(
            "backward of read, x mixed again",
            # x lives in dx: written and read once more than the mix's own backward
            (3 * S + 2 * J) * tokens + 2 * heads + weights,
            2 * edges + J * B * d,
            3 * mixing + projecting,
            backward,
        ),
    ]


if __name__ == "__main__":
    main(__doc__.splitlines()[0], work_of)
