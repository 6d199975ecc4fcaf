"""Time of one step of the OCA lens's fit from the cache, beside the ways that run the model at every step.

    python tests/bench/bench_lens.py [--shape stories260k] [--batch 200] [--tokens 25] [--steps 20]

All do the same step: the loss and gradient of every start layer's constants on the same rows.
  cache      rows from HDF5, all start layers side by side, KL by chunks rerun the same, but a forward pass of the model
  gives the rows research as the paper's code: a forward pass with logits at all positions, then every start layer by
  itself with all logits

On a GPU, also the peak memory. Prints medians over the steps; random weights, so nothing is learned.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from oacore.draws import uploaded
from oacore.engine.activations import write_activations
from oacore.engine.clean import Batch, clean_pass
from oacore.engine.forward import final_norm, logits_of
from oacore.lenses.constant import from_all_starts, without_attention
from oacore.lenses.kl import unembedded_kl
from oacore.lenses.rows import FitRows, LensRows, RowCache, rows_of
from oacore.metrics import kl_divergence
from oacore.models.load import canonical, pick_device
from oacore.models.weights import Model, to_device
from oacore.store.provenance import Provenance
from oacore.tasks.prompts import Prompts, build

SHAPES = {  # layers, heads, key/value heads, width, MLP width, vocabulary
    "stories260k": (5, 8, 4, 64, 172, 512),
    "gpt2": (12, 12, 12, 768, 3072, 50257),
    "gpt2-xl": (48, 25, 25, 1600, 6400, 50257),
}
N_CACHED = 2000


def random_model(shape: str) -> Model:
    """A Llama of the shape with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, heads, kv, d, f, vocabulary = SHAPES[shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        hidden_size=d,
        intermediate_size=f,
        vocab_size=vocabulary,
    )
    return to_device(canonical(LlamaForCausalLM(config).eval()), pick_device("auto"))


def random_prompts(n: int, n_tokens: int, vocabulary: int) -> Prompts:
    rows = torch.randint(1, vocabulary, (n, n_tokens), generator=torch.Generator().manual_seed(n)).tolist()
    return build("text", "train", [""] * n, rows, rows, [[1]] * n, [[-1]] * n)


def fitted_step(model: Model, rows: LensRows, constants: Tensor) -> Tensor:
    leaf = constants.requires_grad_()
    final = from_all_starts(model, rows.residual.transpose(0, 1), range(model.n_layers), leaf)
    return torch.autograd.grad(unembedded_kl(model, final_norm(model, final), rows.target).mean(1).sum(), leaf)[0]


def research_step(model: Model, batch: Batch, constants: Tensor) -> Tensor:
    clean = clean_pass(model, batch.tokens, batch.lengths)
    target = logits_of(model, clean.entering[-1])[torch.arange(len(batch)), clean.last].log_softmax(-1)
    found = torch.zeros_like(constants)
    for layer in range(model.n_layers):
        own = constants[layer].detach().requires_grad_()
        final = without_attention(
            model, clean.entering[layer][torch.arange(len(batch)), clean.last], layer, own.__getitem__
        )
        found[layer] = torch.autograd.grad(kl_divergence(target, logits_of(model, final)).mean(), own)[0]
    return found


def seconds(step: Callable[[], object], n: int) -> float:
    found = []
    for _ in range(n + 2):
        start = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return median(found[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="stories260k")
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=25)
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    model = random_model(given.shape)
    constants = torch.zeros(model.n_layers, model.n_layers, model.d_model, device=model.device)
    prompts = random_prompts(given.batch, given.tokens, model.d_vocab)
    batch = Batch(
        torch.from_numpy(prompts.tokens).long().to(model.device),
        torch.from_numpy(prompts.lengths).long().to(model.device),
    )
    with tempfile.TemporaryDirectory() as folder, ExitStack() as files:
        path = Path(folder) / "rows.h5"
        cached = random_prompts(max(N_CACHED, given.batch), given.tokens, model.d_vocab)
        write_activations(path, model, dict.fromkeys(("train", "validation", "test"), cached), Provenance())
        stream = files.enter_context(RowCache(path, Provenance(), model.device).shuffled(given.batch, 0))
        steps = iter(range(10**9))
        ways: dict[str, Callable[[], object]] = {
            "cache": lambda: fitted_step(
                model, FitRows(*(uploaded(part, model.device) for part in stream.at(next(steps)))), constants
            ),
            "  of it reading": lambda: stream.at(next(steps)),
            "rerun": lambda: fitted_step(model, rows_of(model, batch), constants),
            "research": lambda: research_step(model, batch, constants),
        }
        device = (
            torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
        )
        print(f"{given.shape}, {given.batch} rows, {given.tokens} tokens, {device}, torch {torch.__version__}")
        base = 0.0
        for name, step in ways.items():
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            taken = seconds(step, given.steps)
            base = base or taken
            memory = f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_available() else ""
            print(f"{name:16} {1000 * taken:8.1f} ms a step, {taken / base:5.1f} x the cache's{memory}", flush=True)


if __name__ == "__main__":
    main()
