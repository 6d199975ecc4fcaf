"""The masked-edge engine against TransformerLens: hooks on a TransformerBridge edit every destination's input."""

import pytest
import torch
from conftest import BRIDGED, FAMILIES, random_hf

from oacore.ablation.ablate import ablated_logits
from oacore.ablation.components import Component, group_components
from oacore.engine.clean import Batch, clean_pass
from oacore.engine.masked import Engine
from oacore.models.load import canonical

B, T = 3, 9


def bridge_logits(name, tokens, masks, replacement):
    """Last logits [B, V]: masks [B, J, S], replacement [S, d] at all positions but 0.

    A destination's input is what the bridge has there minus sum_s (1 - m) (out_s - r_s), with out_s as recorded in this
    very run.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    hf = random_hf(name)
    bridge = build_bridge_from_module(hf, type(hf).__name__, hf_config=hf.config, tokenizer=None)
    bridge.set_use_attn_result(True)
    bridge.set_use_split_qkv_input(True)
    bridge.set_use_hook_mlp_in(True)
    model = canonical(random_hf(name))
    graph = model.graph
    outs, after_bos = [], (torch.arange(T) > 0)[:, None].float()

    def edited(value, rows):
        """value [B, T, d] or [B, T, n, d] for the n destinations `rows`."""
        live = torch.stack(outs, 1)  # [B, s, T, d]
        n = live.shape[1]
        removed = (live - replacement[:n, None]) * after_bos
        missing = torch.einsum("bjs,bstd->btjd", 1 - masks[:, rows, :n], removed)
        return value - (missing if value.dim() == 4 else missing[:, :, 0])

    def record(value, hook):
        outs.append(value)

    def record_heads(layer):
        def run(value, hook):
            written = value  # [B, T, H, d], without b_O
            post = model.blocks[layer].attention_post_norm
            if post is not None:  # its scale is shared by the heads, and live
                scale = torch.rsqrt(value.sum(2, keepdim=True).square().mean(-1, keepdim=True) + post.eps)
                written = value * scale * post.weight
            pending.extend(written.unbind(2))

        return run

    # Heads of the running block: a parallel MLP must not see them, and no other destination of their layer does.
    pending = []

    def settle():
        outs.extend(pending)
        pending.clear()

    def edit(rows, *, after_heads=False):
        def run(value, hook):
            if after_heads:
                settle()
            return edited(value, rows)

        return run

    def mlp_out(value, hook):
        settle()
        outs.append(value)

    hooks = [("blocks.0.hook_resid_pre", record)]
    for layer in range(graph.n_layers):
        q, k, v = graph.qkv(layer)
        at = f"blocks.{layer}"
        hooks += [(f"{at}.attn.hook_{x}_input", edit(rows)) for x, rows in (("q", q), ("k", k), ("v", v))]
        hooks.append((f"{at}.attn.hook_result", record_heads(layer)))
        j = graph.mlp_destination(layer)
        hooks.append((f"{at}.hook_mlp_in", edit(slice(j, j + 1), after_heads=not graph.parallel)))
        hooks.append((f"{at}.hook_mlp_out", mlp_out))
    last = graph.n_destinations - 1
    hooks.append((f"blocks.{graph.n_layers - 1}.hook_resid_post", edit(slice(last, last + 1))))
    return bridge.run_with_hooks(tokens, fwd_hooks=hooks)[:, -1]


@pytest.mark.parametrize("name", BRIDGED)
def test_random_masks_match_bridge_hooks(name):
    model = canonical(random_hf(name))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.d_vocab, (B, T), generator=generator)
    masks = torch.rand(B, *model.graph.valid.shape, generator=generator) * torch.tensor(model.graph.valid)
    replacement = torch.randn(model.graph.n_sources, model.d_model, generator=generator) * 0.3
    weights = torch.randn(B, model.d_vocab, generator=generator)
    own, theirs = masks.clone().requires_grad_(), masks.clone().requires_grad_()
    engine = Engine(model)
    prompts = engine.prompts(Batch(tokens, torch.full((B,), T)))
    found = engine.logits(prompts, torch.arange(B), own, replacement[None, :, None]).log_softmax(-1)
    wanted = bridge_logits(name, tokens, theirs, replacement).log_softmax(-1)
    torch.testing.assert_close(found, wanted.float(), atol=3e-5, rtol=0)
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(own.grad, theirs.grad * torch.tensor(model.graph.valid), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_vertex_masks_ablate_single_components(name):
    """m[:, j, s] = m_s: with one source's edges all ablated, the prediction is that with the component replaced."""
    model = canonical(random_hf(name))
    graph, engine = model.graph, Engine(model)
    generator = torch.Generator().manual_seed(1)
    tokens, lengths = torch.randint(0, model.d_vocab, (B, T), generator=generator), torch.tensor([T, T - 2, T - 1])
    clean = clean_pass(model, tokens, lengths)
    prompts = engine.prompts(Batch(tokens, lengths))
    for layer, block in enumerate(model.blocks):
        components = [Component(layer, "mlp")]
        # With a post-norm a replaced z rescales the other heads in a single-component ablation; an edge's does not.
        if not model.post_norm:
            components = [*(Component(layer, "head", head) for head in range(model.n_heads)), *components]
        for component in components:
            width = model.d_head if component.kind == "head" else model.d_model
            constant = torch.randn(width, generator=generator) * 0.3
            (group,) = group_components([component])
            wanted = ablated_logits(model, clean, group, constant[None, None, None])[0]
            s = graph.mlp_source(layer) if component.kind == "mlp" else graph.first_source(layer) + component.head
            masks = torch.tensor(graph.valid).float()[None].clone()
            masks[:, :, s] = 0
            replacement = torch.zeros(1, graph.n_sources, 1, model.d_model)
            replacement[0, s, 0] = constant if component.kind == "mlp" else constant @ block.W_O[component.head]
            found = engine.logits(prompts, torch.arange(B), masks, replacement)
            torch.testing.assert_close(found.log_softmax(-1), wanted.log_softmax(-1), atol=3e-5, rtol=0)
