"""A CUDA graph without a GPU: the operations of a step are recorded on the CPU with the memory that they read and
write, and repeated there without any Python in between.

So a replay gives what it would on a GPU: a number of the host stays what it was, and what is not in the inputs' memory,
or in tensors that the step changes in place, is not seen. A step that asks for a value, which would have to wait for a
device, is refused.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from oacore.fits import replayed

WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_unique2", "masked_select")


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[tuple[int, Tensor]]]] = []
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}  # what the step found, as it was
        self.made: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function.overloadpacket.__name__ in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        given = {_storage(leaf): leaf.untyped_storage() for leaf in _tensors((args, kwargs))}
        for key in given.keys() - self.before.keys() - self.made:
            self.before[key] = given[key], given[key].clone()
        result = function(*args, **(kwargs or {}))
        leaves = tree_leaves(result)
        new = [(n, leaf) for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and _storage(leaf) not in given]
        self.made.update(_storage(leaf) for _, leaf in new)
        if new or not function.is_view:
            self.operations.append((function, args, kwargs or {}, new))
        return result

    def replay(self) -> None:
        """All operations again, on the same memory."""
        with torch.no_grad():
            for function, args, kwargs, new in self.operations:
                results = tree_leaves(function(*args, **kwargs))
                for n, memory in new:
                    memory.detach().copy_(results[n])


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def capture(
    step: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...], pool: Any
) -> tuple[Callable[[], None], tuple[Tensor, ...], Any]:
    """As `oacore.fits.replayed.capture`. A capture runs nothing, so that what the step has changed is put back."""
    recorder = _Recorder()
    with recorder:
        returned = step(*inputs)
    for storage, old in recorder.before.values():
        storage.copy_(old)
    return recorder.replay, returned, pool


@contextmanager
def launching() -> Iterator[None]:
    """Steps on the CPU go as on a GPU that can capture nothing: their inputs are its, and every step is launched."""
    refused = mock.patch.object(replayed, "capture", side_effect=RuntimeError("nothing can be captured"))
    with mock.patch.object(replayed, "replays", return_value=True), refused:
        yield


@contextmanager
def replaying() -> Iterator[list[int]]:
    """Steps on the CPU go as on a GPU within this block; the list gets how many operations each capture had."""
    sizes: list[int] = []

    def noting(*given: Any) -> Any:
        replay, *rest = capture(*given)
        sizes.append(len(replay.__self__.operations))
        return replay, *rest

    with mock.patch.object(replayed, "replays", return_value=True), mock.patch.object(replayed, "capture", noting):
        yield sizes
