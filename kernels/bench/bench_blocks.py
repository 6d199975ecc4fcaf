"""Speed and peak memory of attention and of the RMS scale, forward and backward, by backend, beside the roofline.

python kernels/bench/bench_blocks.py [--shape J S B T d k] [--repeats N] [--csv FILE]

A third of the destinations are heads, with keys and values of their own.
"""

import torch
from oakernels import Attention, Operands, attend, attend_backward, rms_scaled, rms_scaled_backward
from roofline import DEVICE, EPS, Case, Shape, Work, main


def work_of(shape: Shape, case: Case) -> list[Work]:
    """What attention and the MLP of a layer do beside their products."""
    J, _, B, T, d, k = vars(shape).values()
    H = J // 3
    q, key, value = case.dy[: 3 * H].unflatten(0, (3, H))
    clean, x, dy = q[:, 0, 0][None].contiguous(), case.dx[0], case.dx[-1]
    first = torch.zeros(B, dtype=torch.int64, device=DEVICE)
    hidden = torch.ones(T, T + 1, dtype=torch.bool, device=DEVICE).triu(2)
    rstd, numbers, product = rms_scaled(x, EPS, backend="eager")[1], H * B * T * k, H * B * T * (T + 1) * k

    def given(operands: Operands) -> Attention:
        how = {"precision": operands.precision, "backend": operands.backend}
        return Attention(clean, clean, first, hidden, k**-0.5, **how)

    kept = attend(q, key, value, Attention(clean, clean, first, hidden, k**-0.5, backend="eager"))[1]
    return [
        Work("attend", 4 * numbers, 0, 2 * product, lambda operands: attend(q, key, value, given(operands))),
        Work(
            "attend_backward",
            7 * numbers,
            0,
            5 * product,
            lambda operands: attend_backward(q, q, key, value, given(operands), kept),
        ),
        Work("rms_scaled", 2 * B * T * d, B * T, 0, lambda operands: rms_scaled(x, EPS, backend=operands.backend)),
        Work(
            "rms_scaled_backward",
            3 * B * T * d,
            B * T,
            0,
            lambda operands: rms_scaled_backward(dy, x, rstd, backend=operands.backend),
        ),
    ]


if __name__ == "__main__":
    main(__doc__.splitlines()[0], work_of)
