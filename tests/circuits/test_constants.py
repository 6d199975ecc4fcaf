"""Constants of the residual graph: what one fit's do must not depend on what is fitted beside it, to the bit."""

from types import SimpleNamespace

import pytest
import torch

from oacore.circuits.constants import Constants

L, H, K, D = 4, 4, 32, 128  # of the demo model
OFFSET = 2  # floats after an aligned address, where its mapped file has W_O: other products round otherwise there


@pytest.mark.parametrize("n_fits", [2, 3, 7])
def test_a_fit_beside_others_has_the_bits_that_it_has_alone(n_fits):
    """What constants write, and their gradient, as a refit of circuits takes them."""
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(OFFSET + H * K * D, generator=draw)[OFFSET:].view(H, K, D) for _ in range(L)]
    blocks = [SimpleNamespace(W_O=weight) for weight in weights]
    engine = SimpleNamespace(model=SimpleNamespace(post_norm=False, dtype=torch.float32, blocks=blocks))
    shaped = Constants(torch.zeros(1, 1, D), torch.zeros(1, L, H, 1, K), torch.zeros(1, L, 1, D))
    values = torch.randn(n_fits, D + L * H * K + L * D, generator=draw)
    gradient = torch.randn(n_fits, 1 + L * (H + 1), 1, D, generator=draw)

    def written(rows):
        leaf = values[rows].clone().requires_grad_()
        out = shaped.unflattened(leaf).writes(engine, 5)
        out.backward(gradient[rows])
        return out.detach(), leaf.grad

    together = written(slice(None))
    for fit in range(n_fits):
        for whole, own in zip(together, written(slice(fit, fit + 1)), strict=True):
            assert torch.equal(whole[fit], own[0])


def test_blocks_are_parts_of_single_vectors_in_their_order():
    """What a refit whitens together: every coordinate once, and never two of different vectors."""
    shaped = Constants(torch.zeros(1, 1, 70), torch.zeros(1, 2, 3, 1, 40), torch.zeros(1, 2, 1, 70))
    assert shaped.blocks() == [32, 32, 6] + [32, 8] * 6 + [32, 32, 6] * 2
    assert sum(shaped.blocks()) == sum(part[0].numel() for part in shaped)
    positional = Constants(torch.zeros(1, 5, 70), torch.zeros(1, 2, 3, 5, 40), torch.zeros(1, 2, 5, 70))
    assert positional.blocks() == []
