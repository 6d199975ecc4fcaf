"""What a UGS step sends to a GPU, counted on the emulated one (tests/gpu) from the code's own calls: launches, bytes,
FLOP. No GPU is needed, nor memory for the model.

    python tests/bench/bench_ledger.py [L H D DH V T SAMPLES PROMPTS]   e.g. 12 12 768 64 50257 21 12 5, the default
    python tests/bench/bench_ledger.py llama-8b [T SAMPLES PROMPTS]

Once with PyTorch's products and once with our kernels, whose launches are counted by their operands, too. Inputs are
stored, operands are read once and results written once. A step is what `oacore.circuits.learn` does: draw, prune,
forward, backward, Adam.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))

import torch
from bench_step import random_model
from emulated import Gpu, Sent
from oakernels import attention, attention_backward, masked_mix, masked_mix_backward, projection, rms

from oacore.circuits import learn
from oacore.circuits.constants import Constants
from oacore.circuits.passes import Examples, Passes
from oacore.circuits.search import Knob
from oacore.circuits.ugs import UniformSampler
from oacore.config.circuits import MaskFit
from oacore.draws import uploaded
from oacore.engine.buffers import MaskedPrompts
from oacore.engine.clean import Batch
from oacore.engine.masked import Engine
from oacore.fits.replayed import Replayed
from oacore.models.weights import Model, Norm, _map_tensors

SIZES = (12, 12, 768, 64, 50257, 21, 12, 5)
PARTS = {"products": ("mm", "bmm", "addmm", "baddbmm", "baddbmm_"), "copies": ("copy_", "clone", "_to_copy", "cat")}


class Counted:
    """A kernel that counts a launch and the operands that it is given."""

    def __init__(self, name: str, sent: list[Sent]):
        self.name, self.sent = name, sent

    def __getitem__(self, grid: object) -> Callable[..., None]:
        """As a kernel is launched."""
        return self.launched

    def launched(self, *operands: torch.Tensor | None, ADD: bool = False, **sizes: Any) -> None:
        """Each operand once, and what is added to twice."""
        tensors = [operand for operand in operands if operand is not None]
        sent = self.sent[-1]
        sent.launches[self.name] += 1
        sent.n_bytes[self.name] += sum(t.numel() * t.element_size() for t in tensors)
        if self.name == "mix_backward_kernel":
            J, S, (_, B, *n) = sizes["J"], sizes["S"], operands[0].shape
            sent.flop += 4 * J * S * B * n[0] * n[1]
            sent.n_bytes[self.name] += ADD * operands[3].numel() * operands[3].element_size()
        elif self.name == "mix_kernel":
            sent.flop += 2 * sizes["S"] * operands[0].numel()
        elif self.name == "project_backward_kernel":
            sent.flop += 2 * operands[0].numel() * sizes["k"]
        elif self.name in ("attend_kernel", "attend_backward_kernel"):  # two products, or five
            sent.flop += (4 if self.name == "attend_kernel" else 10) * operands[0].numel() * sizes["T"]


KERNELS = {
    "mix_kernel": masked_mix,
    "mix_backward_kernel": masked_mix_backward,
    "project_backward_kernel": projection,
    "attend_kernel": attention,
    "attend_backward_kernel": attention_backward,
    "rms_kernel": rms,
    "rms_backward_kernel": rms,
}


@contextmanager
def forced(backend: str) -> Iterator[None]:
    """Every op runs this backend."""

    def run(given: object, key: object, target: Any, candidates: dict[str, Callable[..., Any]]) -> Any:
        return candidates[backend](target)

    with ExitStack() as stack:
        for module in KERNELS.values():
            stack.enter_context(mock.patch.object(module, "run", run))
        yield


@contextmanager
def with_kernels(sent: list[Sent]) -> Iterator[None]:
    """Every op runs its kernel, which counts into the last of `sent`."""
    with ExitStack() as stack:
        stack.enter_context(forced("triton"))
        for name, module in KERNELS.items():
            stack.enter_context(mock.patch.object(module, name, Counted(name, sent)))
        yield


def llama(T: int, device: torch.device) -> Model:
    """Llama-3.1-8B's shapes in bf16; its rotary tables come with the prompts."""
    model, n_kv, width = random_model(32, 32, 4096, 128, 128256, T, device), 8, 14336

    def weight(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device=device)

    norm = Norm(model.final_norm.weight, None, 1e-5, rms=True)
    mlp = {"W_in": weight(4096, width), "W_gate": weight(4096, width), "W_out": weight(width, 4096)}
    blocks = tuple(
        replace(
            block,
            attention_norm=norm,
            mlp_norm=norm,
            W_K=weight(4096, n_kv, 128),
            W_V=weight(4096, n_kv, 128),
            b_O=None,
            **mlp,
        )
        for block in model.blocks
    )
    model = replace(model, family="llama", blocks=blocks, final_norm=norm, activation="silu")
    return _map_tensors(model, lambda weight: weight.to(torch.bfloat16))


def sweep_of(device: torch.device, sizes: tuple[int, ...]) -> learn._Sweep:
    """One fit of UGS on random weights, with room to store all inputs."""
    L, H, D, K, V, T, samples, n_prompts = sizes
    return sweep_over(random_model(L, H, D, K, V, T, device), T, samples, n_prompts)


def sweep_over(model: Model, T: int, samples: int, n_prompts: int) -> learn._Sweep:
    """`sweep_of` a model."""
    engine, device, L, H, D, K = (
        Engine(model),
        model.device,
        model.n_layers,
        model.n_heads,
        model.d_model,
        model.d_head,
    )
    t, of_model = T - 1, {"device": device, "dtype": model.dtype}
    lengths = torch.full((n_prompts,), T, device=device)
    batch = Batch(torch.zeros(n_prompts, T, dtype=torch.int64, device=device), lengths)
    clean = torch.zeros(1, model.n_kv_heads, K, **of_model)
    bos = ((clean, clean),) * L
    first = torch.zeros(n_prompts, dtype=torch.int64, device=device)
    rotary = ((torch.ones(t, K, **of_model),) * 2 if model.family == "llama" else None,) * L
    prompts = MaskedPrompts(torch.zeros(n_prompts, t, D, **of_model), bos, first, lengths - 2, rotary)
    ids = torch.zeros(n_prompts, 1, dtype=torch.int64, device=device)
    examples = Examples(batch, batch, prompts, torch.zeros(n_prompts, D, **of_model), ids, ids)
    shapes = ((1, 1, D), (1, L, H, 1, K), (1, L, 1, D))
    start = Constants(*(torch.zeros(shape, device=device) for shape in shapes))
    replacements = SimpleNamespace(start=start, ablation="optimal", per_prompt=False)
    scales = Constants(*(torch.ones(shape, device=device) for shape in ((1, 1, 1), (1, L, H, 1, 1), (1, L, 1, 1))))
    settings = MaskFit(n_steps=1000, n_samples=samples, n_prompts=n_prompts)
    passes = Passes(engine, examples, 1e12)
    return learn._Sweep(UniformSampler(), [Knob(1e-3, 0)], [1e-3], passes, replacements, scales, "kl", settings, True)


def take_step(sweep: learn._Sweep, state: dict[str, Any]) -> None:
    """As `learn` does, without looking at what came of it."""
    drawn = [uploaded(part, sweep.device) for part in sweep.draw(int(state["step"]))]
    _, gradients, _ = sweep.gradients(state, *drawn)
    state["step"] = state["step"] + 1
    sweep.descend(state, gradients, float(state["step"]))


def replayed_steps(sweep: learn._Sweep, state: dict[str, Any]) -> Callable[[int], object]:
    """A call of a number takes that step, as a graph where a device replays: without looking at what came of it."""

    def take(number: float | torch.Tensor, *drawn: torch.Tensor) -> tuple[torch.Tensor]:
        losses, gradients, _ = sweep.gradients(state, *drawn)
        sweep.descend(state, gradients, number)
        return (losses,)

    taken = Replayed(take, sweep.device)
    return lambda step: taken(step + 1, *sweep.draw(step))


def step_of(gpu: Gpu, make: Callable[[], learn._Sweep], counting: list[Sent]) -> Sent:
    """What one step of a sweep sends; `counting` gets what is being filled."""
    with gpu.watched():
        sweep = make()
        state = sweep.initial_state() | {"step": 0}
    for _ in range(2):
        with gpu.watched() as sent:
            counting.append(sent)
            take_step(sweep, state)
    return sent


def main() -> None:
    """Print the ledger, with PyTorch's products and with our kernels."""
    gpu, given = Gpu(), sys.argv[1:]
    if given[:1] == ["llama-8b"]:
        T, samples, n_prompts = map(int, given[1:] or ("21", "12", "5"))
        make = lambda: sweep_over(llama(T, gpu.device), T, samples, n_prompts)  # noqa: E731
        print(f"Llama-3.1-8B, bf16; T SAMPLES PROMPTS = {T} {samples} {n_prompts}")
    else:
        sizes = tuple(map(int, given)) or SIZES
        make = lambda: sweep_of(gpu.device, sizes)  # noqa: E731
        print(f"L H D DH V T SAMPLES PROMPTS = {' '.join(map(str, sizes))}")
    with mock.patch.object(learn, "_uniform", lambda g, knob, step, shape: torch.rand(shape, device=gpu.device)):
        show("PyTorch's products", step_of(gpu, make, []))
        with with_kernels(counting := []):
            show("our kernels", step_of(gpu, make, counting))


def show(title: str, sent: Sent) -> None:
    """A few lines on what was sent."""
    of = {part: sum(sent.launches[name] for name in names) for part, names in PARTS.items()}
    n = sum(sent.launches.values())
    told = f"{of['products']} products, {of['copies']} copies"
    print(f"{title}: {n} launches ({told}), {sent.uploads} uploads, waits {dict(sent.waits)}")
    print(f"{sum(sent.n_bytes.values()) / 1e9:.1f} GB, {sent.flop / 1e12:.3f} TFLOP")
    print("most moved: " + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in sent.n_bytes.most_common(12)))
    print("most launched: " + ", ".join(f"{name} {count}" for name, count in sent.launches.most_common(15)))


if __name__ == "__main__":
    main()
