"""The masked-edge engine against a brute force in float64 that walks every destination, and against the clean and ablated model."""

import pytest
import torch
from conftest import FAMILIES, random_hf
from hypothesis import given, settings
from hypothesis import strategies as st

from oacore.ablation import Batch, Group, ablated_logits, clean_pass
from oacore.forward import ACTIVATIONS, embed, logits_of, normalise, rotary_tables, rotate
from oacore.masked_forward import Engine
from oacore.model import canonical

T = 11


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    """In float64: what differs is the algorithm, not rounding. RMS norms and post-norms still run in fp32, as Hugging Face has them."""
    return canonical(random_hf(request.param).double())


@pytest.fixture(scope="module")
def gpt2():
    return canonical(random_hf("gpt2").double())


def batch_of(model, n=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.d_vocab, (n, T), generator=generator)
    return Batch(tokens, torch.tensor([T, T - 3, T - 1])[torch.arange(n) % 3])


def random_masks(model, n, seed=1, p=None):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(n, *model.graph.valid.shape, generator=generator, dtype=torch.float64)
    if p is not None:
        masks = (masks < p).double()
    return masks * torch.tensor(model.graph.valid)


def norm64(norm, x):
    if norm is None:
        return x
    if not norm.rms:
        return normalise(norm, x)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight


def brute_force(model, tokens, length, mask, replacement):
    """Logits [V] of one prompt: every destination gathers its own input at every position, source by source. replacement [S, T, d]."""
    graph, live = model.graph, tokens[:length]
    x0 = embed(model, live[None])[0]
    outs, biases = [x0], torch.zeros_like(x0)
    after_bos = (torch.arange(length) > 0)[:, None]

    def gather(j, n):
        total = biases.clone()
        for s in range(n):
            mixed = mask[j, s] * outs[s] + (1 - mask[j, s]) * replacement[s, :length]
            total = total + torch.where(after_bos, mixed, outs[s])
        return total

    for layer, block in enumerate(model.blocks):
        n = graph.first_source(layer)
        q_at, k_at, v_at = graph.qkv(layer)

        def project(at, weight, bias, block=block, n=n):
            rows = []
            for index, j in enumerate(range(at.start, at.stop)):
                y = norm64(block.attention_norm, gather(j, n)) @ weight[:, index]
                rows.append(y if bias is None else y + bias[index])
            return torch.stack(rows)  # [n, T, k]

        q, k, v = project(q_at, block.W_Q, block.b_Q), project(k_at, block.W_K, block.b_K), project(v_at, block.W_V, block.b_V)
        if model.rotary is not None:
            cos, sin = rotary_tables(model, x0[None])
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (y.repeat_interleave(graph.group_size, 0) for y in (k, v))
        scores = q @ k.mT * block.attention_scale
        if block.attention_softcap is not None:
            scores = torch.tanh(scores / block.attention_softcap) * block.attention_softcap
        position = torch.arange(length)
        seen = position[None] <= position[:, None]
        if block.window is not None:
            seen = seen & (position[None] > position[:, None] - block.window)
        z = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v  # [H, T, k]
        written = z @ block.W_O  # [H, T, d]
        if block.attention_post_norm is not None:
            norm = block.attention_post_norm
            written = written * torch.rsqrt(written.sum(0).square().mean(-1, keepdim=True) + norm.eps) * norm.weight
        new_biases = biases if block.b_O is None else biases + block.b_O
        if not model.parallel:
            outs += list(written)
            biases = new_biases
        x = norm64(block.mlp_norm, gather(graph.mlp_destination(layer), n if model.parallel else n + graph.n_heads))
        hidden = x @ block.W_in if block.b_in is None else x @ block.W_in + block.b_in
        activation = ACTIVATIONS[model.activation]
        hidden = activation(hidden) if block.W_gate is None else activation(x @ block.W_gate) * hidden
        out = hidden @ block.W_out if block.b_out is None else hidden @ block.W_out + block.b_out
        if model.parallel:
            outs += list(written)
            biases = new_biases
        outs.append(norm64(block.mlp_post_norm, out))
    return logits_of(model, gather(graph.n_destinations - 1, graph.n_sources)[-1])


def constants_of(model, n_fits=1, positions=1, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_fits, model.graph.n_sources, positions, model.d_model, generator=generator, dtype=torch.float64) * 0.3


@pytest.mark.parametrize("positions", [1, T - 1])
def test_random_masks_match_the_brute_force(model, positions):
    engine, batch = Engine(model), batch_of(model)
    masks = random_masks(model, 4).requires_grad_()
    constants = constants_of(model, 2, positions)
    rows = torch.tensor([0, 1, 2, 0])
    logits = engine.logits(engine.prompts(batch), rows, masks, constants)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    (got,) = torch.autograd.grad((logits * weights).sum(), masks)
    wanted = []
    for row, prompt in enumerate(rows.tolist()):
        replacement = torch.cat((torch.zeros_like(constants[0, :, :1]), constants[row // 2].expand(-1, T - 1, -1)), 1)
        wanted.append(brute_force(model, batch.tokens[prompt], int(batch.lengths[prompt]), masks[row], replacement))
    (gradient,) = torch.autograd.grad((torch.stack(wanted) * weights).sum(), masks)
    torch.testing.assert_close(logits, torch.stack(wanted), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got, gradient * torch.tensor(model.graph.valid), atol=1e-4, rtol=1e-4)


def test_all_ones_is_the_clean_model(model):
    engine, batch = Engine(model), batch_of(model)
    masks = torch.tensor(model.graph.valid, dtype=torch.float64)[None]
    got = engine.logits(engine.prompts(batch), torch.arange(3), masks, constants_of(model))
    clean = clean_pass(model, batch.tokens, batch.lengths)
    wanted = logits_of(model, clean.entering[-1][torch.arange(3), clean.last])
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
