"""Speed and peak memory of the masked mix, forward and backward, by backend, beside the roofline.

python kernels/bench/bench_masked_mix.py [--shape J S B T d k] [--csv FILE]
"""

import torch
from oakernels import mix, mix_and_scale, mix_backward
from roofline import Operands, Shape, Work, main


def work_of(shape: Shape, o: Operands) -> list[Work]:
    J, S, B, T, d, _ = vars(shape).values()
    tokens, edges = B * T * d, B * J * S
    products = J * S * tokens
    x, d_delta = torch.empty_like(o.dx), torch.zeros_like(o.delta)
    return [
        Work("mix", (S + J) * tokens, edges, products, lambda **options: mix(o.base, o.masks, o.delta, out=x, **options)),
        Work(
            "mix_and_scale",
            (S + J) * tokens,
            edges + J * B * T,
            products,
            lambda **options: mix_and_scale(o.base, o.masks, o.delta, 1e-5, out=x, **options),
        ),
        Work(
            "mix_backward",
            (3 * S + J) * tokens,  # delta and dx read, d_delta read and written
            2 * edges + J * B * d,
            2 * products,
            lambda **options: mix_backward(o.dx, o.masks, o.delta, d_delta=d_delta, token_sums=True, **options),
        ),
    ]


if __name__ == "__main__":
    main(__doc__.splitlines()[0], work_of)
