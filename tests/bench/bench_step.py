"""One UGS step of our engine (masked-edge forward + backward) on random weights: arguments and line of the yardstick
`naive_step.py`.

    python tests/bench/bench_step.py L H D DH V T SAMPLES PROMPTS REPS e.g. 4 4 128 32 512 16 12 5 7 12 12 768 64 50257
    21 12 1 3

Every edge mask in (0, 1); one constant per source; KL at the last token; gradients for masks and constants. Prints the
median and minimum step time and the peak memory: resident on a CPU, allocated on a GPU, where a second line has the
step as a CUDA graph. Compare in alternation.
"""

import math
import resource
import sys
import time
from collections.abc import Callable

import torch

from oacore.engine.clean import Batch
from oacore.engine.masked import Engine
from oacore.metrics import kl_divergence
from oacore.models.weights import Block, Model, Norm


def random_model(L: int, H: int, D: int, K: int, V: int, T: int, device: str) -> Model:
    """A GPT-2-like model with the yardstick's weights: no biases but b_O."""

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device) / math.sqrt(shape[-2])

    def norm() -> Norm:
        return Norm(torch.ones(D, device=device), torch.zeros(D, device=device), 1e-5, rms=False)

    def block() -> Block:
        q, k, v = (weight(H, D, K).transpose(0, 1) for _ in range(3))
        return Block(
            attention_norm=norm(),
            mlp_norm=norm(),
            attention_post_norm=None,
            mlp_post_norm=None,
            W_Q=q,
            W_K=k,
            W_V=v,
            W_O=weight(H, K, D),
            b_Q=None,
            b_K=None,
            b_V=None,
            b_O=torch.zeros(D, device=device),
            attention_scale=K**-0.5,
            attention_softcap=None,
            window=None,
            W_in=weight(D, 4 * D),
            W_gate=None,
            W_out=weight(4 * D, D),
            b_in=None,
            b_out=None,
        )

    return Model(
        family="gpt2",
        parallel=False,
        W_E=torch.randn(V, D, device=device) * 0.1,
        W_pos=None,
        embed_scale=1.0,
        rotary=None,
        activation="gelu_new",
        blocks=tuple(block() for _ in range(L)),
        final_norm=norm(),
        W_U=weight(D, V).T,
        b_U=None,
        logit_softcap=None,
        max_length=T,
    )


def main() -> None:
    L, H, D, K, V, T, samples, n_prompts, reps = map(int, sys.argv[1:10])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_num_threads(2)
    engine = Engine(random_model(L, H, D, K, V, T, device))
    graph = engine.graph
    target = torch.randn(n_prompts, V, device=device).log_softmax(-1).repeat(samples, 1)
    rows = torch.arange(n_prompts, device=device).repeat(samples)

    # Prepared once for all steps, as a fit does.
    tokens = torch.randint(0, V, (n_prompts, T), device=device)
    prompts = engine.prompts(Batch(tokens, torch.full((n_prompts,), T, device=device)))

    def inputs() -> tuple[torch.Tensor, torch.Tensor]:
        masks = torch.rand(samples * n_prompts, graph.n_destinations, graph.n_sources, device=device)
        constants = torch.randn(1, graph.n_sources, 1, D, device=device) * 0.1
        return masks.masked_fill_(engine.no_edge, 0).requires_grad_(), constants.requires_grad_()

    def step(masks: torch.Tensor, constants: torch.Tensor) -> None:
        kl_divergence(target, engine.logits(prompts, rows, masks, constants)).mean().backward()

    name = f"our step L{L} H{H} d{D} T{T} {samples}x{n_prompts}"
    times = sorted([_seconds(lambda: step(*inputs()), device) for _ in range(reps + 1)][1:])  # the first warms up
    peak = (
        torch.cuda.max_memory_allocated() / 1e9
        if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    )
    print(f"{name}: median {times[len(times) // 2] * 1e3:.0f} ms, min {times[0] * 1e3:.0f} ms, peak {peak:.2f} GB")
    if device == "cuda":
        replay = _captured(step, inputs())
        times = sorted(_seconds(replay, device) for _ in range(reps))
        print(f"{name} as a CUDA graph: median {times[len(times) // 2] * 1e3:.2f} ms, min {times[0] * 1e3:.2f} ms")


def _seconds(step: Callable[[], None], device: str) -> float:
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _captured(step: Callable[..., None], static: tuple[torch.Tensor, ...]) -> Callable[[], None]:
    """The step on fixed inputs as a CUDA graph; kernels are measured and picked in the runs before it is captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(*static)
    torch.cuda.current_stream().wait_stream(side)
    for tensor in static:
        tensor.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*static)
    return graph.replay


if __name__ == "__main__":
    main()
