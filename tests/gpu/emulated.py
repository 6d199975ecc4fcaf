"""A GPU without a GPU: tensors that claim another device, in PyTorch's fake mode, which refuses to mix devices and to
give the host a value; launches of a device and waits for it are counted.

Nothing is computed: what is counted are the operations that the host would have sent. PyTorch's own attention counts as
what it is made of, so that a real GPU launches fewer.
"""

import copy
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

NAME = "gpu"
SPACE = (
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "detach",
    "_unsafe_view",
)  # no launch
PICKS = ("index", "index_select", "gather", "index_put_")


def register() -> torch.device:
    """Make the device known to this process, for good."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME)
    return torch.device(NAME, 0)


@dataclass
class Sent:
    """What the host has sent to the device since the block began."""

    launches: Counter[str] = field(default_factory=Counter)  # by operation
    waits: Counter[str] = field(default_factory=Counter)  # copies to the host, by shape
    uploads: int = 0  # copies from the host
    n_bytes: Counter[str] = field(default_factory=Counter)  # that they read and write, each operand once
    flop: int = 0  # of matrix products and attention


class _Watch(TorchDispatchMode):
    def __init__(self, sent: Sent):
        super().__init__()
        self.sent = sent

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, options, given = function.overloadpacket.__name__, kwargs or {}, _places((args, kwargs))
        if name == "_to_copy" and given == {"cpu"} and torch.device(options.get("device", "cpu")).type == NAME:
            self.sent.uploads += 1  # a value that fake mode knows can't be copied to a device without memory
            return torch.empty(args[0].shape, dtype=options.get("dtype") or args[0].dtype, device=options["device"])
        result = function(*args, **options)
        made = _places(result)
        if NAME in given and made == {"cpu"}:
            self.sent.waits[f"{name} {[tuple(leaf.shape) for leaf in tree_leaves(result)]}"] += 1
        elif NAME in made and not function.is_view and name.rstrip("_") not in SPACE:
            self.sent.launches[name] += 1
            overwritten = name in ("copy_", "fill_", "zero_") or options.get("beta") == 0  # its first operand, not read
            read, written = tree_leaves((args[1:] if overwritten else args, kwargs)), tree_leaves(result)
            if name in PICKS:  # what is picked is read and written, and not all that it is picked from
                read = written = tree_leaves(args[2] if name == "index_put_" else result)
            tensors = [leaf for leaf in (*read, *written) if isinstance(leaf, torch.Tensor)]
            self.sent.n_bytes[name] += sum(map(_bytes, tensors))
            if (formula := flop_registry.get(getattr(torch.ops.aten, name.rstrip("_"), None))) is not None:
                self.sent.flop += formula(*args, **options, out_val=result)
        return result


def _bytes(tensor: torch.Tensor) -> int:
    """Of its memory, which an expanded tensor goes over more than once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride or not size) * tensor.element_size()


def _places(tree: Any) -> set[str]:
    return {leaf.device.type for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}


class Gpu:
    """The device; `put` takes objects there, `watched` counts."""

    def __init__(self) -> None:
        self.device, self.mode = register(), FakeTensorMode(allow_non_fake_inputs=True)
        self._put: dict[int, Any] = {}

    def put(self, value: Any) -> Any:
        """A copy of an object of ours, of containers and of what they hold, with all tensors on the device."""
        if id(value) in self._put:
            return self._put[id(value)][1]
        new = self._copied(value)
        self._put[id(value)] = value, new  # keeps the old one alive, and so its id its own
        return new

    def _copied(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            here = self.mode.from_tensor(value.detach())
            with self.mode:
                return here.to(self.device)
        if isinstance(value, torch.device):
            return self.device
        if isinstance(value, dict):
            return {key: self.put(item) for key, item in value.items()}
        if isinstance(value, tuple | list):
            items = [self.put(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if type(value).__module__.startswith(("oacore", "oakernels", "test_")):
            new = copy.copy(value)
            for name, item in vars(value).items():
                object.__setattr__(new, name, self.put(item))
            return new
        return value

    @contextmanager
    def watched(self) -> Iterator[Sent]:
        """Count what is sent within this block; a value that the host asks for raises."""
        sent = Sent()
        generator, tensor = torch.Generator(), torch.tensor  # the device has no generator, and no memory to fill

        def uploaded(data: Any, *, device: Any = "cpu", **options: Any) -> torch.Tensor:
            return tensor(data, **options).to(device)

        on_device = mock.patch.multiple(torch, Generator=lambda device="cpu": generator, tensor=uploaded)
        with self.mode, _Watch(sent), on_device:
            yield sent
