"""A fit's step as one CUDA graph: sent to the device once, and replayed at every further step.

A step of a small model is a thousand launches of some microseconds each, which take the host longer than the device. A
replay is a single one. All that differs from step to step must then be an input, or a tensor that steps change in
place: numbers of the host would stay those of the step that was captured.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from oacore.draws import sendable, uploaded

Tensors = tuple[Tensor, ...]
SWITCH = "OACORE_CUDA_GRAPHS"  # 0: every step is launched


def replays(device: torch.device) -> bool:
    """Whether steps on this device are replayed."""
    return device.type == "cuda" and os.environ.get(SWITCH) != "0"


def capture(step: Callable[..., Tensors], inputs: Tensors, pool: Any) -> tuple[Callable[[], None], Tensors, Any]:
    """What repeats a step on these inputs, without having run it; the memory that it returns values in; and its pool of
    memory, which later graphs may share, since one is replayed at a time.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        returned = step(*inputs)
    return graph.replay, returned, graph.pool()


class Replayed:
    """Calls a step. On a GPU the first call with inputs of some shapes launches it, which also compiles kernels and
    measures which are the fastest, the second captures it, and all later ones replay that.

    Args:
        step: (*inputs) -> tensors; on a GPU all its inputs are there, numbers as float64 tensors without axes.
        device: where the step runs.
    """

    def __init__(self, step: Callable[..., Tensors], device: torch.device):
        self.step, self.device, self.pool = step, device, None
        self._launched: set[object] = set()
        self._captured: dict[object, tuple[Tensors, Callable[[], None], Tensors]] = {}
        self._launches_all = False

    def __call__(self, *inputs: Tensor | float) -> Tensors:
        """What the step returns; on a CPU from the inputs as they are."""
        if not replays(self.device):
            return self.step(*inputs)
        given = tuple(_tensor(value) for value in inputs)
        shapes = tuple((value.shape, value.dtype) for value in given)
        if shapes not in self._captured and (shapes not in self._launched or not self._capture(shapes, given)):
            self._launched.add(shapes)
            return self.step(*(uploaded(value, self.device) for value in given))
        kept, replay, returned = self._captured[shapes]
        for memory, value in zip(kept, given, strict=True):
            memory.copy_(sendable(value, self.device), non_blocking=True)
        replay()
        return tuple(value.clone() for value in returned)  # the next replay overwrites them

    def _capture(self, shapes: object, given: Tensors) -> bool:
        """Whether the step could be captured: one that does not fit into memory twice goes on being launched."""
        if self._launches_all:
            return False
        kept = tuple(uploaded(value, self.device).clone() for value in given)
        try:
            replay, returned, self.pool = capture(self.step, kept, self.pool)
        except RuntimeError as error:
            self._launches_all = True
            cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            print(f"warning: a step can't be captured as a CUDA graph, going on without: {cause}", file=sys.stderr)
            return False
        self._captured[shapes] = kept, replay, returned
        return True


def _tensor(value: Tensor | float) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
