"""Speed and peak memory of scale and projection, and of the whole backward of a layer's reads, by backend, beside the
roofline.

python kernels/bench/bench_projection.py [--shape J S B T d k] [--repeats N] [--csv FILE]
"""

import torch
from oakernels import Operands, mix, mix_and_scale, mix_backward, project, project_backward
from roofline import EPS, Case, Shape, Work, main
from torch import Tensor


def work_of(shape: Shape, case: Case) -> list[Work]:
    """What a layer does with its mixed inputs."""
    J, S, B, T, d, k = vars(shape).values()
    tokens, edges, heads, weights = B * T * d, B * J * S, J * B * T * k, J * d * k
    mixing, projecting = J * S * tokens, J * B * T * d * k
    base, projection = case.base, case.projection
    d_delta, dx = torch.zeros_like(case.delta), torch.empty_like(case.dx)
    x, rstd = mix_and_scale(base, Operands(case.masks, case.delta, backend="eager"), EPS)
    y = project(x, rstd, projection)

    def backward_of_projection(operands: Operands, x: Tensor, out: Tensor) -> Tensor:
        how = {"backend": operands.backend, "precision": operands.precision}
        return project_backward(case.dy, y, rstd, x, projection, out=out, **how)

    def backward(operands: Operands) -> object:
        x = mix(base, operands)
        return mix_backward(backward_of_projection(operands, x, x), operands, d_delta=d_delta)

    return [
        Work(
            "project",
            J * tokens + 2 * heads + weights,  # y is scaled in place
            J * B * T,
            projecting,
            lambda operands: project(x, rstd, projection, out=y, precision=operands.precision),
        ),
        Work(
            "project_backward",
            2 * J * tokens + 2 * heads + weights,
            J * B * T,
            projecting,
            lambda operands: backward_of_projection(operands, x, dx),
        ),
        Work(
            "backward of reads, x mixed again",
            # x lives in dx: written and read once more than the mix's own backward
            (3 * S + 2 * J) * tokens + 2 * heads + weights,
            2 * edges,
            3 * mixing + projecting,
            backward,
        ),
    ]


if __name__ == "__main__":
    main(__doc__.splitlines()[0], work_of)
