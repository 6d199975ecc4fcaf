"""The plain pass with cut edges: the engine's logits, in every family, and gradients of weights."""

import pytest
import torch
from conftest import FAMILIES, random_hf
from test_masked_forward import T, batch_of, constants_of, random_masks

from oacore.engine.edge_pass import logits_without_edges
from oacore.engine.masked import Engine
from oacore.models.load import canonical
from oacore.models.weights import _map_tensors, named_tensors


@pytest.mark.parametrize("positions", [1, T - 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_engine_s_pass(family, positions):
    model = canonical(random_hf(family).double())
    engine, batch = Engine(model), batch_of(model)
    kept, carried = random_masks(model, 1, p=0.5), constants_of(model, 1, positions)
    expected = engine.logits(engine.prompts(batch), torch.arange(3), kept, carried)
    found = logits_without_edges(model, batch, kept[0].bool(), carried[0])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    whole = logits_without_edges(model, batch, torch.tensor(model.graph.valid), carried[0])
    assert (found - whole).abs().max() > 1e-3, "cut edges matter"


def test_gradients_of_weights_are_finite_differences():
    model = canonical(random_hf("gpt2").double())
    batch, kept, carried = batch_of(model), random_masks(model, 1, p=0.5)[0].bool(), constants_of(model)[0]
    leaves = _map_tensors(model, lambda tensor: tensor.detach().clone().requires_grad_())

    def loss(of):
        return logits_without_edges(of, batch, kept, carried).log_softmax(-1)[:, :5].sum()

    loss(leaves).backward()
    draw = torch.Generator().manual_seed(0)
    for name in ("blocks.0.W_Q", "blocks.0.W_O", "blocks.1.W_V", "blocks.1.W_in", "W_E"):
        weight, step = named_tensors(leaves)[name], 1e-5
        direction = torch.randn(weight.shape, generator=draw, dtype=torch.float64)
        with torch.no_grad():
            weight += step * direction
            above = loss(leaves)
            weight -= 2 * step * direction
            below = loss(leaves)
            weight += step * direction
        expected = (above - below) / (2 * step)
        assert (weight.grad * direction).sum().item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6), name
