"""The masked-edge engine against a brute force in float64 that walks every destination, and against the clean model."""

from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES, random_hf

from oacore.engine.clean import Batch, clean_pass
from oacore.engine.forward import embed, logits_of, normalise, rotary_of, rotary_tables, rotate
from oacore.engine.masked import Engine
from oacore.engine.masked_pass import _aligned
from oacore.models.load import canonical
from oacore.models.weights import ACTIVATIONS

T = 11


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    """In float64: what differs is the algorithm, not rounding.

    RMS norms and post-norms still run in fp32, as Hugging Face has them.
    """
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


def head_norm64(norm, x):
    """Of queries or keys [n, T, k]: each head's, or all together as one vector of n k."""
    if norm is None or norm.weight.dim() == 1:
        return norm64(norm, x)
    joint = x.transpose(0, 1).flatten(1)
    return norm64(replace(norm, weight=norm.weight.flatten()), joint).unflatten(1, norm.weight.shape).transpose(0, 1)


def brute_force(model, tokens, length, mask, replacement):
    """Logits [V] of one prompt, given a replacement [S, T, d].

    Every destination gathers its own input at every position, source by source.
    """
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

        q, k = project(q_at, block.W_Q, block.b_Q), project(k_at, block.W_K, block.b_K)
        q, k = head_norm64(block.query_norm, q), head_norm64(block.key_norm, k)
        v = project(v_at, block.W_V, block.b_V)
        if rotary_of(model, block) is not None:
            cos, sin = rotary_tables(model, block, x0[None])
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
    generator, shape = torch.Generator().manual_seed(seed), (n_fits, model.graph.n_sources, positions, model.d_model)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3


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


def test_all_zeros_ablates_every_node(model):
    """With no edge left, logits follow from the constants alone: what is read is their sum and the biases."""
    engine, batch = Engine(model), batch_of(model)
    constants = constants_of(model)
    masks = torch.zeros(1, *model.graph.valid.shape, dtype=torch.float64)
    got = engine.logits(engine.prompts(batch), torch.arange(3), masks, constants)
    biases = sum(torch.zeros(model.d_model).double() if block.b_O is None else block.b_O for block in model.blocks)
    wanted = logits_of(model, constants[0].sum((0, 1)) + biases).expand(3, -1)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", [1, T - 1])
def test_constants_get_their_gradient_through_ablated_edges(model, positions):
    """For masks of zeros and ones the rule leaves nothing out, so the brute force's gradient is the whole one."""
    engine, batch = Engine(model), batch_of(model)
    masks = random_masks(model, 2, p=0.6)
    constants = constants_of(model, 2, positions).requires_grad_()
    rows = torch.tensor([0, 1])
    logits = engine.logits(engine.prompts(batch), rows, masks, constants)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    (got,) = torch.autograd.grad((logits * weights).sum(), constants)
    wanted = []
    for row in range(2):
        replacement = torch.cat((torch.zeros_like(constants[0, :, :1]), constants[row].expand(-1, T - 1, -1)), 1)
        wanted.append(brute_force(model, batch.tokens[row], int(batch.lengths[row]), masks[row], replacement))
    (gradient,) = torch.autograd.grad((torch.stack(wanted) * weights).sum(), constants)
    if model.centred:  # the engine's constants have no mean over d, which LayerNorm removes
        gradient = gradient - gradient.mean(-1, keepdim=True)
    torch.testing.assert_close(got, gradient, atol=1e-4, rtol=1e-4)


def test_partly_ablated_edges_leave_constants_alone(gpt2):
    engine, batch = Engine(gpt2), batch_of(gpt2)
    masks = random_masks(gpt2, 3).clamp(min=0.01) * torch.tensor(gpt2.graph.valid)
    constants = constants_of(gpt2).requires_grad_()
    engine.logits(engine.prompts(batch), torch.arange(3), masks, constants).sum().backward()
    assert constants.grad is not None and constants.grad.abs().max() == 0


def test_activations_as_replacements(model):
    engine, batch = Engine(model), batch_of(model)
    values = engine.sources(batch_of(model, seed=9))
    masks, rows = random_masks(model, 3), torch.tensor([2, 0, 1])
    got = engine.logits(engine.prompts(batch), rows, masks, values, rows)
    for row, prompt in enumerate(rows.tolist()):
        replacement = torch.cat((torch.zeros_like(values[prompt, :, :1]), values[prompt]), 1)
        wanted = brute_force(model, batch.tokens[prompt], int(batch.lengths[prompt]), masks[row], replacement)
        torch.testing.assert_close(got[row], wanted, atol=1e-5, rtol=1e-5)


def test_sources_are_what_the_brute_force_sums_up(model):
    engine, batch = Engine(model), batch_of(model)
    clean = clean_pass(model, batch.tokens, batch.lengths)
    biases = sum(torch.zeros(model.d_model).double() if block.b_O is None else block.b_O for block in model.blocks)
    total = engine.sources(batch).sum(1) + engine.weights.centre(biases)
    torch.testing.assert_close(total, engine.weights.centre(clean.entering[-1][:, 1:]), atol=1e-5, rtol=1e-5)


def test_inputs_mixed_again_are_those_stored(model):
    batch, masks = batch_of(model), random_masks(model, 3)
    found = []
    for keep_inputs in (True, False):
        engine = Engine(model)
        own, constants = masks.clone().requires_grad_(), constants_of(model).requires_grad_()
        logits = engine.logits(engine.prompts(batch), torch.arange(3), own, constants, keep_inputs=keep_inputs)
        logits.square().sum().backward()
        found.append((logits.detach(), own.grad, constants.grad))
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("positional", [False, True])
@pytest.mark.parametrize("layers_at_once", [1, 2])
def test_gradients_of_a_few_layers_at_a_time_are_those_of_all(model, layers_at_once, positional):
    """As on a GPU: sources gather what later readers have left; also where a layer has no heads or no MLP."""
    batch, masks = batch_of(model), random_masks(model, 3)
    none = masks.clone()
    none[..., model.graph.heads(1)], none[..., model.graph.mlp_source(0)] = 0, 0
    for given_masks, contrast in ((masks, None), (none, None), (masks, Engine(model).sources(batch).transpose(0, 1))):
        found = []
        for engine in (Engine(model), Engine(model, layers_at_once=layers_at_once)):
            constants = constants_of(model)
            constants = constants.expand(-1, -1, batch.tokens.shape[1] - 1, -1) if positional else constants
            own, constants = given_masks.clone().requires_grad_(), constants.clone().requires_grad_()
            given = {
                "contrast": contrast if contrast is None else contrast.contiguous(),
                "plan": engine.weights.plan(given_masks),
            }
            logits = engine.logits(engine.prompts(batch), torch.arange(3), own, constants, **given)
            logits.square().sum().backward()
            found.append((logits.detach(), own.grad, constants.grad))
        for first, second in zip(*found, strict=True):
            torch.testing.assert_close(first, second, atol=1e-9, rtol=1e-9)


def test_a_plan_leaves_out_only_what_is_not_used(model):
    """Pruned sparse masks: same logits, and the same gradients where a mask is above 0."""
    engine, batch = Engine(model), batch_of(model)
    masks = random_masks(model, 2) * random_masks(model, 2, seed=4, p=0.15)
    masks = masks * model.graph.prune(masks > 0)
    found = []
    for plan in (None, engine.weights.plan(masks)):
        own, constants = masks.clone().requires_grad_(), constants_of(model).requires_grad_()
        logits = engine.logits(engine.prompts(batch), torch.tensor([0, 1, 1, 2]), own, constants, plan=plan)
        logits.square().sum().backward()
        found.append((logits.detach(), own.grad * (masks > 0), constants.grad))
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, atol=1e-9, rtol=1e-9)
    if model.heads_apart:
        assert engine.weights.plan(masks).n_sources < model.graph.n_sources


def test_rows_that_share_a_mask(gpt2):
    engine, batch = Engine(gpt2), batch_of(gpt2)
    masks, rows = random_masks(gpt2, 2), torch.tensor([0, 1, 2, 0, 1, 2])
    shared, apart = masks.clone().requires_grad_(), masks.repeat_interleave(3, 0).requires_grad_()
    results = [engine.logits(engine.prompts(batch), rows, own, constants_of(gpt2, 2)) for own in (shared, apart)]
    torch.testing.assert_close(*results, atol=1e-10, rtol=1e-10)
    for result in results:
        result.square().sum().backward()
    torch.testing.assert_close(shared.grad, apart.grad.view(2, 3, *masks.shape[1:]).sum(1), atol=1e-9, rtol=1e-9)


def test_a_prompt_of_one_token_is_refused(gpt2):
    with pytest.raises(ValueError, match="nothing to ablate"):
        Engine(gpt2).prompts(Batch(torch.zeros(1, 1, dtype=torch.long), torch.tensor([1])))


def test_replacements_of_prompts_are_data(gpt2):
    engine, batch = Engine(gpt2), batch_of(gpt2)
    values = engine.sources(batch).requires_grad_()
    rows = torch.arange(3)
    logits = engine.logits(engine.prompts(batch), rows, random_masks(gpt2, 3), values, rows)
    with pytest.raises(ValueError, match="only constants have a gradient"):
        logits.sum().backward()


@pytest.mark.parametrize("n_sources", [5, 8])
def test_rows_of_masks_begin_where_wide_loads_can(n_sources):
    masks = torch.rand(3, 4, n_sources)
    aligned = _aligned(masks)
    assert torch.equal(aligned, masks) and aligned.stride() == (32, 8, 1)
