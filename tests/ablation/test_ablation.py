"""Ablated predictions against TransformerBridge hooks, on random tiny models of every family."""

import pytest
import torch
from conftest import BRIDGED, random_hf

from oacore.ablation.ablate import ablated_logits
from oacore.ablation.components import Component, Group, components_of, group_components, rows_in, value_of, width
from oacore.draws import derangement
from oacore.engine.clean import clean_log_probs, clean_pass
from oacore.engine.parity import hugging_face_logits
from oacore.engine.statistics import first_pooled, spread
from oacore.metrics import kl_divergence
from oacore.models.load import canonical

KINDS = ("head", "attention_layer", "mlp")
N_TOKENS = 12


def bridge_of(name):
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    hf = random_hf(name)
    return build_bridge_from_module(hf, type(hf).__name__, hf_config=hf.config, tokenizer=None)


@pytest.fixture(scope="module", params=BRIDGED)
def case(request):
    lengths = torch.tensor([12, 7, 3])
    tokens = torch.randint(0, 97, (3, N_TOKENS), generator=torch.Generator().manual_seed(5))
    return canonical(random_hf(request.param)), bridge_of(request.param), tokens, lengths


def bridge_logits(bridge, tokens, lengths, component, replacement):
    """Logits at the last position with the component replaced from position 1 on; replacement [B, T, w]."""
    layer = component.layer
    if component.kind == "mlp":
        # Gemma-2's MLP writes what its post-norm returns.
        name = (
            f"blocks.{layer}.ln2_post.hook_out"
            if hasattr(bridge.blocks[layer], "ln2_post")
            else f"blocks.{layer}.mlp.hook_out"
        )
    else:
        name = f"blocks.{layer}.attn.o.hook_in"

    def replace(value, hook):
        value = value.clone()
        if component.kind == "head":
            value[:, 1:, component.head] = replacement[:, 1:]
        elif component.kind == "attention_layer":
            value[:, 1:] = replacement[:, 1:].unflatten(-1, value.shape[2:]) if value.dim() == 4 else replacement[:, 1:]
        else:
            value[:, 1:] = replacement[:, 1:]
        return value

    with torch.no_grad():
        logits = bridge.run_with_hooks(tokens, fwd_hooks=[(name, replace)], return_type="logits")
    return logits[torch.arange(len(tokens)), lengths - 1]


@pytest.mark.parametrize("form", ["constant", "positional", "per prompt"])
def test_every_component_equals_hooks(case, form):
    model, bridge, tokens, lengths = case
    clean = clean_pass(model, tokens, lengths)
    generator = torch.Generator().manual_seed(7)
    shape = {"constant": (1, 1), "positional": (1, N_TOKENS), "per prompt": (3, N_TOKENS)}[form]
    for group in group_components(components_of(model, KINDS)):
        replacement = torch.randn(len(group), *shape, width(model, group.kind), generator=generator)
        ours = ablated_logits(model, clean, group, replacement)
        for row, component in zip(range(len(group)), group.components, strict=True):
            full = replacement[row].expand(3, N_TOKENS, -1)
            expected = bridge_logits(bridge, tokens, lengths, component, full)
            assert (ours[row] - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item()), component.name


def test_clean_pass_predicts_what_hugging_face_predicts():
    hf = random_hf("llama")
    lengths = torch.tensor([9, 4])
    tokens = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(5))
    expected = hugging_face_logits(hf, tokens, lengths)[torch.arange(2), lengths - 1].log_softmax(-1)
    model = canonical(hf)
    assert (clean_log_probs(model, clean_pass(model, tokens, lengths)) - expected).abs().max() < 1e-5


def test_own_value_changes_nothing_and_position_zero_is_never_touched(case):
    model, _, tokens, lengths = case
    clean = clean_pass(model, tokens, lengths)
    for group in group_components(components_of(model, KINDS)):
        value = value_of(clean, group).clone()
        value[:, :, 0] = 1e3
        logits = ablated_logits(model, clean, group, value)
        assert (logits.log_softmax(-1) - clean_log_probs(model, clean)).abs().max() < 1e-5
        assert (kl_divergence(clean_log_probs(model, clean), logits) == 0).all()


def test_gradient_against_finite_differences(case):
    model, _, tokens, lengths = case
    clean = clean_pass(model, tokens, lengths)
    generator = torch.Generator().manual_seed(11)
    for group in group_components(components_of(model, KINDS))[:3]:
        constant = torch.randn(len(group), 1, 1, width(model, group.kind), generator=generator).requires_grad_()

        def loss(value, group=group):
            return ablated_logits(model, clean, group, value).log_softmax(-1)[..., 3].sum()

        (gradient,) = torch.autograd.grad(loss(constant), constant)
        direction = torch.randn(constant.shape, generator=generator)
        step = 3e-3
        with torch.no_grad():
            numeric = (loss(constant + step * direction) - loss(constant - step * direction)) / (2 * step)
        assert torch.isclose((gradient * direction).sum(), numeric, rtol=0.02, atol=0.02)


def test_chunks_cover_a_group_in_order():
    group = Group(1, "head", (0, 1, 2, 3, 4))
    assert [chunk.heads for chunk in group.chunks(2)] == [(0, 1), (2, 3), (4,)]
    assert list(Group(1, "mlp").chunks(1)) == [Group(1, "mlp")]


@pytest.mark.parametrize("name", ["a3.h11", "m0", "a2"])
def test_component_names_round_trip(name):
    assert Component.parse(name).name == name


def test_derangement_is_a_permutation_without_fixed_points():
    for n in (2, 3, 5, 40):
        for seed in range(20):
            partner = derangement(n, torch.Generator().manual_seed(seed))
            assert sorted(partner.tolist()) == list(range(n))
            assert (partner != torch.arange(n)).all()


def test_pooling_starts_at_nine_or_as_far_as_prompts_allow():
    assert [first_pooled(shortest) for shortest in (2, 3, 9, 10, 11, 30)] == [1, 2, 8, 9, 9, 9]


def test_later_positions_share_the_last_row():
    table = torch.arange(3.0)[None, :, None]  # P = 2
    assert spread(table, 5).flatten().tolist() == [0, 1, 2, 2, 2]


def test_attention_layer_statistics_are_those_of_its_heads():
    heads = torch.arange(24.0).reshape(1, 2, 3, 4)  # L 1, H 2, P + 1 = 3, k 4
    tables = {"head": heads, "mlp": torch.zeros(1, 3, 4)}
    layer = rows_in(tables, Group(0, "attention_layer"))
    assert layer.shape == (1, 3, 8)
    assert torch.equal(layer[0, 1], torch.cat([heads[0, 0, 1], heads[0, 1, 1]]))
