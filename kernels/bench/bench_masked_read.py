"""Speed and peak memory of the masked read, forward and backward, by backend, beside the roofline.

python kernels/bench/bench_masked_read.py [--shape J S B T d k] [--csv FILE]
"""

import torch
from oakernels import project_backward, read, read_backward
from roofline import Operands, Shape, Work, main


def work_of(shape: Shape, o: Operands) -> list[Work]:
    J, S, B, T, d, k = vars(shape).values()
    tokens, edges, heads, weights = B * T * d, B * J * S, J * B * T * k, J * d * k
    mixing, projecting = J * S * tokens, J * B * T * d * k
    d_delta, dx = torch.zeros_like(o.delta), torch.empty_like(o.dx)
    y, rstd, x = read(o.base, o.masks, o.delta, o.weight, o.bias, 1e-5, store_inputs=True, backend="eager")
    assert x is not None
    forward = (o.base, o.masks, o.delta, o.weight, o.bias, 1e-5)
    backward = (o.dy, y, rstd, o.base, o.masks, o.delta, o.weight, o.bias)
    return [
        Work("read", S * tokens + heads + weights, edges, mixing + projecting, lambda **options: read(*forward, **options)),
        Work(
            "read, x stored",
            (S + J) * tokens + heads + weights,
            edges,
            mixing + projecting,
            lambda **options: read(*forward, store_inputs=True, **options),
        ),
        Work(
            "project_backward",
            2 * J * tokens + 2 * heads + weights,
            J * B * T,
            projecting,
            lambda **options: project_backward(o.dy, y, rstd, x, o.weight, o.bias, out=dx, **options),
        ),
        Work(
            "read_backward, x mixed again",
            (3 * S + 2 * J) * tokens + 2 * heads + weights,  # x lives in dx: written and read once more than the mix's own backward
            2 * edges + J * B * d,
            3 * mixing + projecting,
            lambda **options: read_backward(*backward, d_delta=d_delta, token_sums=True, **options),
        ),
    ]


if __name__ == "__main__":
    main(__doc__.splitlines()[0], work_of)
