"""The estimate's arithmetic against FLOP that PyTorch counts, on tiny random models of every family.

Equal to the last one, where what a formula leaves out on purpose is added: attention scores, 4 H k a pair of positions,
are below 1 % of the models that the estimate is for, but not of these; and the last block of most passes computes its
queries, attention output and MLP at the last position alone.
"""

import pytest
import torch
from conftest import random_hf
from torch.utils.flop_counter import FlopCounterMode

from oacore.ablation.ablate import ablated_logits
from oacore.ablation.components import components_of, group_components, value_of
from oacore.config.read import parse_config
from oacore.engine.clean import Batch, clean_log_probs, clean_pass
from oacore.engine.masked import Engine
from oacore.estimate.ablation import ablated_pass_flop
from oacore.estimate.case import Case
from oacore.estimate.masked import masked_pass_flop
from oacore.estimate.passes import forward_flop, mlp_flop, unembed_flop
from oacore.estimate.sizes import Sizes
from oacore.lenses.constant import from_all_starts
from oacore.lenses.kl import unembedded_kl
from oacore.models.load import canonical

B, T = 3, 9
t = T - 1

# Counted by PyTorch only where they are not done in place, or only on a GPU.
aten = torch.ops.aten
ALSO_COUNTED = {
    aten.baddbmm_: lambda _, left, right, **__: 2 * left[0] * left[1] * left[2] * right[2],
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, *_, **__: 4 * q[0] * q[1] * q[2] * k[2] * q[3],
}


def counted(compute) -> int:
    with FlopCounterMode(display=False, custom_mapping=ALSO_COUNTED) as counter:
        compute()
    return counter.get_total_flops()


@pytest.fixture(scope="module", params=["gpt2", "neox-parallel", "neox-sequential", "llama", "qwen2", "gemma2"])
def sized(request):
    """(model, its sizes)"""
    hf = random_hf(request.param)
    return canonical(hf), Sizes.of(hf.config.to_dict())


@pytest.fixture(scope="module")
def batch():
    return Batch(torch.randint(1, 90, (B, T), generator=torch.Generator().manual_seed(0)), torch.full((B,), T))


def scores_flop(s: Sizes, rows: int, n_queries: int, n_keys: int) -> int:
    """Attention scores and the means of values of one block."""
    return 4 * s.z * rows * n_queries * n_keys


def beyond_last_position(s: Sizes) -> int:
    """Of one position of one row in the last block: queries, attention output and MLP."""
    return 2 * s.d_model * (2 * s.z + s.d_mlp + s.hidden)


def test_forward_pass_and_unembedding(sized, batch):
    model, s = sized
    scores = s.n_layers * scores_flop(s, B, T, T)
    assert counted(lambda: clean_pass(model, batch.tokens, batch.lengths)) == forward_flop(s, B * T) + scores
    clean = clean_pass(model, batch.tokens, batch.lengths)
    assert counted(lambda: clean_log_probs(model, clean)) == unembed_flop(s, B)


@pytest.mark.parametrize("gradient", [False, True])
def test_masked_pass(sized, batch, gradient):
    """Of masks with a gradient whose destinations' inputs are stored."""
    model, s = sized
    engine = Engine(model)
    prompts, graph, L = engine.prompts(batch), engine.graph, s.n_layers
    masks = torch.rand(B, graph.n_destinations, graph.n_sources) * torch.from_numpy(graph.valid.copy())
    masks.requires_grad_(gradient)
    replacement = torch.randn(1, graph.n_sources, 1, s.d_model)

    def compute():
        logits = engine.logits(prompts, torch.arange(B), masks, replacement, keep_inputs=True)
        if gradient:
            logits.sum().backward()

    read = graph.valid.sum(1)  # edges into each destination
    queries, _, _ = graph.qkv(L - 1)
    edges = int(read[queries].sum() + read[graph.mlp_destination(L - 1)] + read[-1])
    mix, blocks = 2 * s.d_model * edges, beyond_last_position(s)
    left_out = B * (t - 1) * (3 * mix + 2 * blocks if gradient else mix + blocks)
    scores = (L - 1) * scores_flop(s, B, t, T) + scores_flop(s, B, 1, T)
    wanted = masked_pass_flop(s, B, t, gradient=gradient) - left_out + scores * (3 if gradient else 1)
    assert counted(compute) == wanted


def test_ablated_passes(sized, batch):
    """Blocks above each component and the unembedding; what a head writes, and the MLP of its layer, are left out."""
    model, s = sized
    config = parse_config({"model": "demo", "tasks": {"ioi": {}}, "ablation": {"components": ["head", "mlp"]}})
    clean = clean_pass(model, batch.tokens, batch.lengths)
    groups = group_components(components_of(model, ("head", "mlp")))

    def compute():
        for group in groups:
            value = value_of(clean, group)
            ablated_logits(model, clean, group, torch.zeros_like(value[:, :1, :1]))

    L, H = s.n_layers, s.n_heads
    wanted = ablated_pass_flop(Case(config, s, gpu=False), B * T, B)
    for blocks_above in range(L):
        n_positions = T if blocks_above else 1
        # In parallel blocks the MLP does not see its layer's heads, so that it runs once for all of them.
        wanted += mlp_flop(s, B * n_positions * (1 if s.parallel else H))
        wanted += H * B * n_positions * 2 * s.d_head * s.d_model
        if blocks_above:
            last = scores_flop(s, B, 1, T) - B * (T - 1) * beyond_last_position(s)
            wanted += (H + 1) * ((blocks_above - 1) * scores_flop(s, B, T, T) + last)
    assert counted(compute) == wanted


def test_lens_passes(sized):
    """MLPs of all start layers, and logits with their gradient; those of the target are left out of the latter."""
    model, s = sized
    residual, constants = torch.randn(s.n_layers, B, s.d_model), torch.zeros(s.n_layers, s.n_layers, s.d_model)
    starts = range(s.n_layers)
    n_mlps = s.n_layers * (s.n_layers + 1) // 2
    assert counted(lambda: from_all_starts(model, residual, starts, constants)) == mlp_flop(s, B * n_mlps)
    residual.requires_grad_()
    losses = counted(lambda: unembedded_kl(model, residual, torch.randn(B, s.d_model)).sum().backward())
    assert losses == unembed_flop(s, 2 * B * s.n_layers) + unembed_flop(s, B)
