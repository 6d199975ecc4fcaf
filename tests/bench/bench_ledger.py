"""What a UGS step sends to a GPU, counted on the emulated one (tests/gpu) from the code's own calls: launches, bytes,
FLOP. No GPU is needed, nor memory for the model.

    python tests/bench/bench_ledger.py [L H D DH V T SAMPLES PROMPTS]   e.g. 12 12 768 64 50257 21 12 5, the default

Products are PyTorch's (the path `plain` of kernels/README.md), inputs are stored, operands are read once and results
written once. A step is what `oacore.circuits.learn` does: draw, prune, forward, backward, Adam.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))

import torch
from bench_step import random_model
from emulated import Gpu, Sent

from oacore.circuits import learn
from oacore.circuits.constants import Constants
from oacore.circuits.passes import Examples, Passes
from oacore.circuits.search import Knob
from oacore.circuits.ugs import UniformSampler
from oacore.config.circuits import MaskFit
from oacore.engine.buffers import MaskedPrompts
from oacore.engine.clean import Batch
from oacore.engine.masked import Engine

SIZES = (12, 12, 768, 64, 50257, 21, 12, 5)
PARTS = {"products": ("mm", "bmm", "addmm", "baddbmm", "baddbmm_"), "copies": ("copy_", "clone", "_to_copy", "cat")}


def step_of(gpu: Gpu, sizes: tuple[int, ...]) -> Sent:
    """What one step of one fit sends, with room to store all inputs."""
    L, H, D, K, V, T, samples, n_prompts = sizes
    device, t = gpu.device, T - 1
    with gpu.watched():
        engine = Engine(random_model(L, H, D, K, V, T, device))
        lengths = torch.full((n_prompts,), T, device=device)
        batch = Batch(torch.zeros(n_prompts, T, dtype=torch.int64, device=device), lengths)
        bos = tuple((torch.zeros(1, H, K, device=device), torch.zeros(1, H, K, device=device)) for _ in range(L))
        first = torch.zeros(n_prompts, dtype=torch.int64, device=device)
        prompts = MaskedPrompts(torch.zeros(n_prompts, t, D, device=device), bos, first, lengths - 2, None)
        ids = torch.zeros(n_prompts, 1, dtype=torch.int64, device=device)
        examples = Examples(batch, batch, prompts, torch.zeros(n_prompts, D, device=device), ids, ids)
        shapes = ((1, 1, D), (1, L, H, 1, K), (1, L, 1, D))
        start = Constants(*(torch.zeros(shape, device=device) for shape in shapes))
        replacements = SimpleNamespace(start=start, ablation="optimal", per_prompt=False)
        scales = Constants(*(torch.ones(shape, device=device) for shape in ((1, 1, 1), (1, L, H, 1, 1), (1, L, 1, 1))))
        settings = MaskFit(n_steps=10, n_samples=samples, n_prompts=n_prompts)
        passes = Passes(engine, examples, 1e12)
        sweep = learn._Sweep(
            UniformSampler(), [Knob(1e-3, 0)], [1e-3], passes, replacements, scales, "kl", settings, True
        )
        state = sweep.initial_state() | {"step": 0}
    for _ in range(2):
        with gpu.watched() as sent:
            _, gradients, _ = sweep.gradients(state)
            state["step"] += 1
            sweep.descend(state, gradients)
    return sent


def main() -> None:
    """Print the ledger."""
    sizes = tuple(map(int, sys.argv[1:])) or SIZES
    gpu = Gpu()
    with mock.patch.object(learn, "_uniform", lambda g, knob, step, shape: torch.rand(shape, device=gpu.device)):
        sent = step_of(gpu, sizes)
    of = {part: sum(sent.launches[name] for name in names) for part, names in PARTS.items()}
    n = sum(sent.launches.values())
    print(f"L H D DH V T SAMPLES PROMPTS = {' '.join(map(str, sizes))}")
    told = f"{of['products']} products, {of['copies']} copies"
    print(f"{n} launches ({told}), {sent.uploads} uploads, waits {dict(sent.waits)}")
    print(f"{sum(sent.n_bytes.values()) / 1e9:.1f} GB, {sent.flop / 1e12:.3f} TFLOP")
    print("most moved: " + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in sent.n_bytes.most_common(12)))
    print("most launched: " + ", ".join(f"{name} {count}" for name, count in sent.launches.most_common(15)))


if __name__ == "__main__":
    main()
