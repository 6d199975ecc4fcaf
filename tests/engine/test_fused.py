"""What a GPU has as one operation, where the kernels' eager twins can run: against plain autograd, which a CPU has."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import random_hf
from oakernels.attention import MAX_KEYS, Attention
from test_masked_forward import batch_of, constants_of, random_masks

from oacore.engine import fused, masked_blocks
from oacore.engine.masked import Engine
from oacore.models.load import canonical

# Learned, rotary and partly rotary positions, grouped heads, windows, softcaps, norms of heads apart and together.
MODELS = ("gpt2", "neox-parallel", "qwen2-window", "qwen3", "gemma2", "olmo2")


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return canonical(random_hf(request.param).double())


def fuse(monkeypatch, yes):
    """As on a GPU, or as on a CPU."""
    for module in (fused, masked_blocks):
        monkeypatch.setattr(module, "fuses", lambda x: yes)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Counts the calls of both operations."""
    fuse(monkeypatch, True)
    with (
        mock.patch.object(fused, "attend", wraps=fused.attend) as attend,
        mock.patch.object(fused, "rms_scaled", wraps=fused.rms_scaled) as rms_scaled,
    ):
        yield SimpleNamespace(attend=attend, rms_scaled=rms_scaled)


def computed(engine, masks, plan=None):
    """Logits, and the gradients of masks and constants."""
    own, constants = masks.clone().requires_grad_(), constants_of(engine.model).requires_grad_()
    rows = torch.arange(len(masks)) % 3
    logits = engine.logits(engine.prompts(batch_of(engine.model)), rows, own, constants, plan=plan)
    return logits.detach(), *torch.autograd.grad(logits.square().sum(), (own, constants))


def test_a_pass_is_the_same_as_by_plain_autograd(model, monkeypatch, as_on_a_gpu):
    masks = random_masks(model, 6)
    found = computed(Engine(model, layers_at_once=2), masks)
    norms = sum(block.mlp_norm is not None for block in model.blocks)
    assert (as_on_a_gpu.attend.call_count, as_on_a_gpu.rms_scaled.call_count) == (model.n_layers, norms)
    fuse(monkeypatch, False)
    for value, expected in zip(found, computed(Engine(model), masks), strict=True):
        torch.testing.assert_close(value, expected, atol=1e-9, rtol=1e-9)
    assert as_on_a_gpu.attend.call_count == model.n_layers


def test_where_heads_are_left_out_attention_is_not_one_operation(as_on_a_gpu):
    model = canonical(random_hf("qwen2").double())
    engine, masks = Engine(model), random_masks(model, 2)
    masks[..., model.graph.first_source(1)] = 0  # a head of block 1
    plan = engine.weights.plan(masks)
    found = computed(engine, masks, plan)
    assert as_on_a_gpu.attend.call_count == model.n_layers - 1
    for value, expected in zip(found[::2], computed(engine, masks)[::2], strict=True):
        torch.testing.assert_close(value, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("n_after_first", "one"), [(MAX_KEYS - 1, True), (MAX_KEYS, False)])
def test_all_keys_of_a_prompt_must_fit(n_after_first, one):
    q = k = torch.empty(2, 1, n_after_first, 8, device="meta")
    assert fused.fuses_attention(SimpleNamespace(heads=slice(None)), q, k) == one
    assert not fused.fuses_attention(SimpleNamespace(heads=slice(None)), torch.empty(q.shape), k)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("last", [False, True])
def test_gradcheck_of_attention(softcap, last):
    g = torch.Generator().manual_seed(0)
    q, k, v, clean = (
        torch.randn(shape, generator=g, dtype=torch.float64)
        for shape in ((4, 2, 1 if last else 3, 5), (2, 2, 3, 5), (2, 2, 3, 5), (2, 2, 2, 5))
    )
    hidden = torch.ones(3, 4, dtype=torch.bool).triu(2)
    given = Attention(*clean, torch.tensor([1, 0]), hidden[[2, 0]][:, None] if last else hidden, 0.5, softcap)
    operands = tuple(x.requires_grad_() for x in (q, k, v))
    assert torch.autograd.gradcheck(lambda *x: fused._Attention.apply(*x, given), operands)


def test_gradcheck_of_the_rms_scale():
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fused.fused_rms_scale(x, 1e-2), x)
