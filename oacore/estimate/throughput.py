"""How fast the device of a config multiplies matrices, for `oacore estimate`."""

import time
from dataclasses import dataclass

import torch

from oacore.config.run import Config
from oacore.estimate.table import host_memory_bytes
from oacore.models.load import pick_device
from oacore.models.weights import DTYPES

SIZE = {"cpu": 1024, "cuda": 4096}  # of the matrices
SECONDS = 0.2

# Of that rate in whole stages: activations, a fit and gaps of tests/estimate/measured_peaks.py did 29, 38 and 43
# GFLOP/s by these formulas, matrix products 25 to 43, on one thread of a busy machine. Not measured on a GPU, where
# masked passes wait for memory instead.
EFFICIENCY = 0.8


@dataclass(frozen=True)
class Device:
    """What an estimate asks of a device."""

    name: str
    memory_bytes: float
    flop_per_second: float  # of whole stages, not of matrix products alone


def measured_device(config: Config) -> Device:
    """The device that the config selects, from products of square matrices in its dtype for 0.2 s.

    Raises:
        UserError: as `oacore.models.load.pick_device`.
    """
    device = pick_device(config.device)
    torch.set_num_threads(config.limits.threads)
    left, right = (
        torch.randn(SIZE[device.type], SIZE[device.type], device=device).to(DTYPES[config.dtype]) for _ in range(2)
    )
    product_flop = 2 * SIZE[device.type] ** 3

    def seconds(n: int) -> float:
        start = time.perf_counter()
        for _ in range(n):
            left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(1)
    n = max(1, round(SECONDS / seconds(1)))
    memory_bytes = torch.cuda.mem_get_info()[1] if device.type == "cuda" else host_memory_bytes()
    return Device(device.type, memory_bytes, EFFICIENCY * n * product_flop / seconds(n))
