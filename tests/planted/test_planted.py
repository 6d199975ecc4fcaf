"""Planted circuits: their ground truth against a float64 brute force that ablates every edge; AUROC against counting
pairs.
"""

import numpy as np
import pytest
import torch
from scipy.stats import norm as gaussian

from oacore.engine.clean import Batch
from oacore.engine.forward import logits_of, residual_after
from oacore.models.graph import Graph
from planted.circuit import auroc, chain, induction

CIRCUITS = {"induction": induction, "chain": chain}
SEEDS = range(3)
CLEAR, ALL_FALSE = 0.05, 1e-2  # nats


@pytest.fixture(
    scope="module", params=[(name, seed) for name in CIRCUITS for seed in SEEDS], ids=lambda key: f"{key[0]}-{key[1]}"
)
def planted(request):
    name, seed = request.param
    return CIRCUITS[name](seed)


def normed(norm, x):
    x = x if norm.rms else x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()
    return y if norm.bias is None else y + norm.bias.double()


def rotated(x, model):
    """x [..., T, k] turned by position times frequency, as complex numbers."""
    if model.rotary is None:
        return x
    frequencies = model.rotary.frequencies.double()
    r = len(frequencies)
    angles = torch.arange(x.shape[-2])[:, None] * frequencies
    turned = torch.complex(x[..., :r], x[..., r : 2 * r]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag, x[..., 2 * r :]), -1)


def sources_and_logits(model, tokens, masks, replacement):
    """Every source [S, M, N, T, d] and the last logits [M, N, V], under masks [M, J, S]; replacement [S, N or 1, T or
    1, d].
    """
    names, n_tokens = model.graph.destination_names, tokens.shape[1]
    embedded = model.W_E.double()[tokens]
    if model.W_pos is not None:
        embedded = embedded + model.W_pos.double()[:n_tokens]
    outs, biases = [embedded.expand(len(masks), *embedded.shape)], 0.0
    after_bos = (torch.arange(n_tokens) > 0)[:, None]

    def gather(name, n):
        j = names.index(name)
        total = biases
        for s, out in enumerate(outs[:n]):
            keep = masks[:, j, s, None, None, None]
            total = total + torch.where(after_bos, keep * out + (1 - keep) * replacement[s], out)
        return total

    causal = torch.ones(n_tokens, n_tokens).tril().bool()
    act = {"relu": lambda x: x.clamp(min=0), "gelu": lambda x: x * torch.tensor(gaussian.cdf(x.numpy()))}[
        model.activation
    ]
    for layer, block in enumerate(model.blocks):
        n, written = len(outs), []
        for h in range(model.n_heads):
            q, k, v = (
                normed(block.attention_norm, gather(f"a{layer}.h{h}<{part.lower()}>", n))
                @ getattr(block, f"W_{part}").double()[:, h]
                + getattr(block, f"b_{part}").double()[h]
                for part in "QKV"
            )
            scores = rotated(q, model) @ rotated(k, model).mT * block.attention_scale
            written.append(scores.masked_fill(~causal, -torch.inf).softmax(-1) @ v @ block.W_O.double()[h])
        outs += written
        biases = biases + block.b_O.double()
        hidden = act(normed(block.mlp_norm, gather(f"m{layer}", len(outs))) @ block.W_in.double() + block.b_in.double())
        outs.append(hidden @ block.W_out.double() + block.b_out.double())
    final = normed(model.final_norm, gather("logits", len(outs)))[:, :, -1]
    return torch.stack(outs), final @ model.W_U.double().T


def kl_of(planted, masks, ablation, n=6):
    """Mean KL [M] in nats over the first n prompts of masks [M, J, S]."""
    model, everything = planted.model, torch.ones(1, *planted.true_edges.shape, dtype=torch.float64)
    nothing = torch.zeros(model.graph.n_sources, 1, 1, 1, dtype=torch.float64)
    tokens = planted.prompts.tokens
    match ablation:
        case "zero":
            replacement = nothing
        case "mean":
            replacement = sources_and_logits(model, tokens, everything, nothing)[0][:, 0, :, 1:].mean((1, 2))[
                :, None, None
            ]
        case "counterfactual":
            replacement = sources_and_logits(model, planted.counterfactual.tokens[:n], everything, nothing)[0][:, 0]
    target = sources_and_logits(model, tokens[:n], everything, nothing)[1].log_softmax(-1)  # [1, n, V]
    found = []
    for part in torch.tensor(np.asarray(masks), dtype=torch.float64).split(32):
        logits = sources_and_logits(model, tokens[:n], part, replacement)[1]
        found.append((target.exp() * (target - logits.log_softmax(-1))).sum(-1).mean(1))
    return torch.cat(found).numpy()


def without_each_edge(graph):
    """All-ones masks [E, J, S] without one edge each, in the order of graph.valid's entries."""
    j, s = np.nonzero(graph.valid)
    masks = np.ones((len(j), *graph.valid.shape), bool)
    masks[np.arange(len(j)), j, s] = False
    return masks


@pytest.mark.parametrize("ablation", ["mean", "counterfactual"])
def test_exactly_the_true_edges_matter(planted, ablation):
    valid = planted.model.graph.valid
    effects = kl_of(planted, without_each_edge(planted.model.graph), ablation)
    truth = planted.true_edges[valid]
    assert effects[truth].min() > max(CLEAR, 10 * effects[~truth].max())
    alone = without_each_edge(planted.model.graph)[truth] & planted.true_edges
    circuit, *broken = kl_of(planted, [planted.true_edges, *alone], ablation)
    assert circuit < ALL_FALSE < CLEAR < min(broken)


def test_the_model_is_right_on_its_prompts_and_wrong_as_its_counterfactuals_are(planted):
    for batch, target in ((planted.prompts, planted.answers), (planted.counterfactual, planted.wrong)):
        last = residual_after(planted.model, batch.tokens)[torch.arange(len(batch)), batch.lengths - 1]
        assert (logits_of(planted.model, last).argmax(-1) == target[:, 0]).float().mean() > 0.95
    assert (planted.answers != planted.wrong).all()


def test_false_edges_are_tempting(planted):
    """Some distractor writes louder than all of the circuit, and false edges leak into the logits: scores by size would
    mislead.
    """
    model = planted.model
    everything = torch.ones(1, *planted.true_edges.shape, dtype=torch.float64)
    outs, _ = sources_and_logits(
        model, planted.prompts.tokens, everything, everything.new_zeros(model.graph.n_sources, 1, 1, 1)
    )
    size = outs[:, 0, :, 1:].norm(dim=-1).mean((1, 2)).numpy()
    heads = np.array([name.startswith("a") for name in model.graph.source_names])
    used = planted.true_edges.any(0)
    assert size[heads & ~used].max() > 3 * size[heads & used].max()
    loudness = size * model.graph.valid
    assert auroc(loudness, planted.true_edges, model.graph.valid) < 0.9


def test_zero_ablation_takes_a_constant_head_for_a_part(planted):
    """Hence the module says that the truth is not one for zero ablation."""
    graph = planted.model.graph
    heads = [
        s for s, name in enumerate(graph.source_names) if name.startswith("a") and not planted.true_edges[:, s].any()
    ]
    masks = np.ones((len(heads), *graph.valid.shape), bool)
    masks[np.arange(len(heads)), -1, heads] = False
    assert kl_of(planted, masks, "zero").max() > 20 * kl_of(planted, masks, "mean").max()


@pytest.mark.parametrize("make", CIRCUITS.values(), ids=CIRCUITS)
def test_a_seed_fixes_everything_and_seeds_place_the_circuit_elsewhere(make):
    one, again, other = make(1), make(1), make(2)
    assert torch.equal(one.model.W_E, again.model.W_E) and torch.equal(one.prompts.tokens, again.prompts.tokens)
    assert np.array_equal(one.true_edges, again.true_edges)
    assert not torch.equal(one.model.W_E, other.model.W_E)
    assert len({make(seed).true_edges.tobytes() for seed in range(8)}) >= 5
    assert torch.equal(make(1, n_prompts=5).model.blocks[0].W_O, one.model.blocks[0].W_O)


def test_the_true_edges_are_a_circuit(planted):
    """None of them dangles."""
    graph: Graph = planted.model.graph
    assert np.array_equal(graph.prune(planted.true_edges), planted.true_edges)
    assert isinstance(planted.prompts, Batch) and len(planted.prompts) == len(planted.answers) == 64


def test_auroc_counts_pairs():
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 5, (6, 7)).astype(float)  # many ties
    truth, valid = generator.random((6, 7)) < 0.3, generator.random((6, 7)) < 0.8
    scores[~valid] = np.nan  # what is no edge does not count
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[truth & valid] for b in scores[~truth & valid]]
    assert auroc(scores, truth, valid) == pytest.approx(np.mean(pairs))


def test_auroc_at_its_ends():
    truth, valid = np.array([[True, False, False]]), np.ones((1, 3), bool)
    assert auroc(np.array([[3.0, 1, 2]]), truth, valid) == 1
    assert auroc(np.array([[0.0, 1, 2]]), truth, valid) == 0
    assert auroc(np.zeros((1, 3)), truth, valid) == 0.5
    with pytest.raises(ValueError, match="0 false"):
        auroc(np.zeros((1, 3)), valid, valid)
    with pytest.raises(ValueError, match="1 NaN"):
        auroc(np.array([[np.nan, 1, 2]]), truth, valid)
