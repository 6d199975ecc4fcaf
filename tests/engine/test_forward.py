"""Our forward pass against plain Hugging Face logits, on random tiny models of every family."""

import pytest
import torch
from conftest import FAMILIES, random_hf

from oacore.engine.forward import embed, last_residual_from, logits_of, residual_after, run_block
from oacore.engine.parity import hugging_face_logits
from oacore.models.load import canonical

TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    """Our model, ragged tokens padded on the right with random ones, their lengths, Hugging Face's logits."""
    hf = random_hf(request.param)
    lengths = torch.tensor([30, 17, 2, 1, 9])
    tokens = torch.randint(0, 97, (5, 30), generator=torch.Generator().manual_seed(3))
    expected = hugging_face_logits(hf, tokens, lengths)
    return canonical(hf), tokens, lengths, expected


def real(lengths, n_tokens):
    return torch.arange(n_tokens) < lengths[:, None]


def test_logits_equal_hugging_face(case):
    model, tokens, lengths, expected = case
    ours = logits_of(model, residual_after(model, tokens))
    mask = real(lengths, tokens.shape[1])
    assert expected[mask].std() > 0.1, "a model that predicts nothing would agree with anything"
    assert (ours - expected)[mask].abs().max() <= TOLERANCE * max(1.0, expected[mask].abs().max().item())


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_from_a_layers_residual_to_the_last_position(case, layer):
    model, tokens, lengths, expected = case
    residual = residual_after(model, tokens, layer)
    ours = logits_of(model, last_residual_from(model, layer, residual, lengths - 1))
    wanted = expected[torch.arange(len(tokens)), lengths - 1]
    assert (ours - wanted).abs().max() <= TOLERANCE * max(1.0, wanted.abs().max().item())


def test_padding_does_not_reach_real_tokens(case):
    model, tokens, lengths, _ = case
    mask = real(lengths, tokens.shape[1])
    other = torch.where(mask, tokens, (tokens + 1) % 97)
    assert torch.equal(residual_after(model, tokens)[mask], residual_after(model, other)[mask])


def test_gradients_reach_the_residual(case):
    """Against central differences along one direction, in fp32 as the weights are."""
    model, tokens, lengths, _ = case
    start = embed(model, tokens).detach().requires_grad_()
    direction = torch.randn(start.shape, generator=torch.Generator().manual_seed(0))

    def loss(residual):
        return logits_of(model, run_block(model, 0, residual, lengths - 1)).log_softmax(-1)[..., :5].sum()

    (gradient,) = torch.autograd.grad(loss(start), start)
    step = 3e-3
    with torch.no_grad():
        numeric = (loss(start + step * direction) - loss(start - step * direction)) / (2 * step)
    assert torch.isclose((gradient * direction).sum(), numeric, rtol=2e-2, atol=2e-1)
