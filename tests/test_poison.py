"""No path hands rows that nobody wrote to a matrix product, padded prompts included: results may not depend on what
memory held.
"""

import pytest
import torch
from conftest import random_hf
from poison import poisoned_memory
from test_gaps import METHODS, gaps_of
from test_gaps import setting as gaps_setting  # noqa: F401 - a fixture
from test_mask_learning import Setting
from test_tracing import PLACES, some_recall

from oacore.ablation import optimal
from oacore.ablation.components import components_of
from oacore.circuits.evaluate import circuit_losses
from oacore.engine.clean import Batch, clean_pass
from oacore.lenses.constant import from_all_starts
from oacore.lenses.faithfulness import Continuation
from oacore.lenses.kl import unembedded_kl
from oacore.models.load import canonical
from oacore.tracing.recall import embedded
from oacore.tracing.restore import restored_together

NAMES = ("gpt2", "gpt2-inverse", "neox-parallel", "llama", "qwen2-window", "gemma2")


def twice(compute):
    """Everything that `compute` returns, with memory as it comes and with poisoned memory, must be the same to the last
    bit.
    """
    plain = compute()
    with poisoned_memory() as products:
        poisoned = compute()
    assert products.count > 0
    for one, other in zip(plain, poisoned, strict=True):
        assert torch.equal(one, other) and one.isfinite().all()


@pytest.mark.parametrize("memory_gb", [1.0, 2e-5], ids=["inputs stored", "mixed again"])
@pytest.mark.parametrize("skip_dead", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_masked_passes(name, dtype, skip_dead, memory_gb):
    setting = Setting(name, n=4, dtype=dtype)
    graph, passes, chosen = setting.engine.graph, setting.passes(memory_gb), torch.arange(4)
    draw = torch.Generator().manual_seed(0)
    masks = (torch.rand(2, *graph.valid.shape, generator=draw) * 3 - 1).clamp(0, 1) * torch.tensor(graph.valid)
    masks[:, :, graph.heads(1).start] = masks[:, :, graph.mlp_source(1)] = 0  # what a plan leaves out
    slots = torch.arange(4).repeat(2)

    def compute():
        found = []
        for ablation in ("optimal", "optimal_positional", "counterfactual"):
            replacements = setting.replacements(ablation)
            values, owned = replacements.of(chosen), replacements.per_prompt
            gradients = passes.gradients(
                "kl", chosen, slots, masks, values, owned=owned, constants=not owned, skip_dead=skip_dead
            )
            found += [part for part in gradients if part is not None]
            found.append(circuit_losses(passes, masks, replacements).kl)
        return found

    twice(compute)


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_inputs_mixed_again(name):
    setting = Setting(name, n=4)
    engine = setting.engine
    masks = torch.rand(4, *engine.graph.valid.shape, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        engine.graph.valid
    )
    written = setting.replacements("optimal").start.writes(engine, setting.examples.prompts.n_tokens)

    def compute():
        leaf = masks.clone().requires_grad_()
        logits = engine.logits(setting.examples.prompts, torch.arange(4), leaf, written, keep_inputs=False)
        return logits.detach(), *torch.autograd.grad(logits.square().sum(), leaf)

    twice(compute)


def test_single_components(gaps_setting):  # noqa: F811
    model, prompts, other, statistics = gaps_setting
    items = components_of(model, ("head", "mlp"))
    start = optimal.starting_means(model, items, statistics, positional=True)
    twice(
        lambda: [
            *gaps_of(model, prompts, other, statistics, METHODS, 64).values(),
            optimal.gradients(model, prompts, items, start, 64),
        ]
    )


def test_traced_places():
    model, recall = canonical(random_hf("gpt2")), some_recall(2)

    def compute():
        with torch.no_grad():
            clean = clean_pass(model, recall.tokens, recall.lengths)
            return (
                restored_together(
                    model, recall, clean, PLACES, embedded(model, recall, torch.zeros(model.d_model)), 64
                ),
            )

    twice(compute)


def test_a_prompt_goes_on_from_a_changed_residual():
    model, draw = canonical(random_hf("qwen2-window")), torch.Generator().manual_seed(0)
    batch = Batch(torch.randint(1, 97, (3, 9), generator=draw), torch.tensor([9, 7, 8]))
    changed = torch.randn(2, 3, model.d_model, generator=draw)

    def compute():
        with torch.no_grad():
            return (Continuation(model, batch).logits(changed, 1),)

    twice(compute)


def test_lenses():
    model, draw = canonical(random_hf("gemma2")), torch.Generator().manual_seed(0)
    entering, constants = (
        torch.randn(3, 5, model.d_model, generator=draw),
        torch.randn(3, 3, model.d_model, generator=draw),
    )

    def compute():
        leaf = constants.clone().requires_grad_()
        losses = unembedded_kl(model, from_all_starts(model, entering, range(3), leaf), entering[0])
        return losses.detach(), *torch.autograd.grad(losses.sum(), leaf)

    twice(compute)
