"""Speed and peak memory of the masked mix, forward and backward, by backend, beside the roofline.

python kernels/bench/bench_masked_mix.py [--shape J S B T d k] [--repeats N] [--csv FILE]
"""

import torch
from oakernels import mix, mix_and_scale, mix_backward
from roofline import EPS, Case, Shape, Work, main


def work_of(shape: Shape, case: Case) -> list[Work]:
    """The ops of a mix."""
    J, S, B, T, d, _ = vars(shape).values()
    tokens, edges = B * T * d, B * J * S
    products = J * S * tokens
    x, d_delta = torch.empty_like(case.dx), torch.zeros_like(case.delta)
    return [
        Work("mix", (S + J) * tokens, edges, products, lambda operands: mix(case.base, operands, out=x)),
        Work(
            "mix_and_scale",
            (S + J) * tokens,
            edges + J * B * T,
            products,
            lambda operands: mix_and_scale(case.base, operands, EPS, out=x),
        ),
        Work(
            "mix_backward",
            (3 * S + J) * tokens,  # delta and dx read, d_delta read and written
            2 * edges,
            2 * products,
            lambda operands: mix_backward(case.dx, operands, d_delta=d_delta),
        ),
    ]


if __name__ == "__main__":
    main(__doc__.splitlines()[0], work_of)
