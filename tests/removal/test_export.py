"""An exported ablation: the plain Hugging Face model's logits are the ablated model's."""

import pytest
import torch
from conftest import random_hf

from oacore.engine.forward import logits_of, residual_after
from oacore.engine.parity import hugging_face_logits, open_model, parity_prompts
from oacore.errors import UserError
from oacore.models.load import canonical
from oacore.removal.ablated import Components
from oacore.removal.export import edit

ROUNDING = 1e-5  # of a logit


def ablation(model, *, heads=True, mlps=True, zero=False):
    """The first head of every other layer, and the MLP of the others, by random constants or zeros."""
    draw = torch.Generator().manual_seed(0)
    ablated = Components(
        torch.zeros(model.n_layers, model.n_heads, dtype=torch.bool),
        torch.zeros(model.n_layers, dtype=torch.bool),
        torch.randn(model.n_layers, model.n_heads, model.d_head, generator=draw) * (not zero),
        torch.randn(model.n_layers, model.d_model, generator=draw) * (not zero),
    )
    ablated.heads[::2, 1] = heads
    ablated.mlps[1::2] = mlps
    return ablated


def exported(name, folder, **which):
    """Logits of the plain model of a directory, and of ours with the ablation; and of ours without."""
    hf = random_hf(name)
    model = canonical(random_hf(name))
    ablated = ablation(model, **which)
    edit(hf, model, ablated)
    hf.save_pretrained(folder)
    tokens, lengths = parity_prompts(model.d_vocab, model.max_length)
    loaded, _ = open_model(folder, device="cpu")  # it passes the gate like any other
    plain = type(hf).from_pretrained(folder, attn_implementation="eager").eval()
    real = torch.arange(tokens.shape[1]) < lengths[:, None]
    with torch.no_grad():
        ours = [logits_of(of, residual_after(of, tokens))[real] for of in (ablated.edited(model), model, loaded.model)]
    return hugging_face_logits(plain, tokens, lengths)[real], *ours


@pytest.mark.parametrize("name", ["gpt2", "neox-parallel", "neox-unbiased", "llama", "llama-linear"])
def test_logits_are_those_of_the_ablated_model(name, tmp_path):
    """Of families with biases, and of those whose config can add them."""
    plain, ablated, clean, loaded = exported(name, tmp_path)
    assert (plain - ablated).abs().max() < ROUNDING and (loaded - ablated).abs().max() < ROUNDING
    assert (plain - clean).abs().max() > 0.1


@pytest.mark.parametrize("name", ["mistral", "qwen2", "phi3"])
def test_zeros_need_no_bias(name, tmp_path):
    plain, ablated, *_ = exported(name, tmp_path, zero=True)
    assert (plain - ablated).abs().max() < ROUNDING


def test_qwen3_has_biases_for_its_heads_alone(tmp_path):
    plain, ablated, *_ = exported("qwen3", tmp_path, mlps=False)
    assert (plain - ablated).abs().max() < ROUNDING


@pytest.mark.parametrize(("name", "what"), [("mistral", "attention"), ("qwen3", "mlp")])
def test_a_constant_without_a_bias_is_refused_before_anything_changes(name, what):
    hf, model = random_hf(name), canonical(random_hf(name))
    before = {key: value.clone() for key, value in hf.state_dict().items()}
    with pytest.raises(UserError, match=f"the {what} of a {name} has none; allowed: zero ablation"):
        edit(hf, model, ablation(model))
    assert all(torch.equal(value, before[key]) for key, value in hf.state_dict().items())
