"""bf16 weights: what is learned, masks and constants with their gradients and Adam states, stays in fp32."""

import pytest
import torch
from conftest import random_hf

from oacore.ablation import optimal
from oacore.ablation.components import components_of
from oacore.circuits.constants import Constants, constant_scales
from oacore.circuits.learn import learn
from oacore.circuits.passes import Examples, Passes
from oacore.circuits.replacements import Replacements, TrainingPrompts, starting_constants
from oacore.circuits.search import Knob
from oacore.circuits.ugs import UniformSampler
from oacore.config.base import OptimalFit
from oacore.config.circuits import MaskFit
from oacore.engine.clean import Batch, clean_pass
from oacore.engine.forward import at, final_norm
from oacore.engine.masked import Engine
from oacore.engine.statistics import Statistics
from oacore.fits.resume import Resumable
from oacore.models.load import canonical

N, T = 8, 7
FAMILIES = ("gpt2", "gpt2-bare", "llama", "gemma2", "olmo2")


def some_batch():
    tokens = torch.randint(1, 97, (N, T), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 0
    return Batch(tokens, torch.full((N,), T))


def some_statistics(model):
    shapes = {
        "input": (model.d_model,),
        "head": (model.n_layers, model.n_heads, model.d_head),
        "mlp": (model.n_layers, model.d_model),
    }
    mean = {kind: torch.zeros(shape) for kind, shape in shapes.items()}
    positional = {kind: torch.zeros(*shape[:-1], T + 1, shape[-1]) for kind, shape in shapes.items()}
    return Statistics(T, mean, {kind: part + 1 for kind, part in mean.items()}, positional, positional)


def setting(name, dtype):
    model, batch = canonical(random_hf(name).to(dtype)), some_batch()
    engine, clean = Engine(model), clean_pass(model, batch.tokens, batch.lengths)
    final = final_norm(model, at(clean.entering[-1], clean.last))[:, 0]
    ids = torch.ones(N, 1, dtype=torch.long)
    other = Batch(batch.tokens.roll(1, 0), batch.lengths)
    return engine, Passes(engine, Examples(batch, other, engine.prompts(batch), final, ids, ids + 1), memory_bytes=1e9)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("ablation", ["optimal", "mean", "counterfactual"])
def test_a_step_of_mask_learning_keeps_masks_and_constants_in_fp32(name, ablation, tmp_path):
    engine, passes = setting(name, torch.bfloat16)
    examples, statistics, trained = passes.examples, some_statistics(engine.model), ablation == "optimal"
    assert engine.model.dtype == torch.bfloat16
    assert all(block.read.dtype == block.W_in.dtype == torch.bfloat16 for block in engine.weights.blocks)
    start = starting_constants(ablation, TrainingPrompts(engine, statistics, examples.batch, examples.counterfactual))
    found = learn(
        UniformSampler(), [Knob(1e-3, 0)], [1e-3], passes, Replacements(engine, ablation, examples, start),
        constant_scales(engine.model, statistics), "kl", MaskFit(n_steps=1, n_samples=2, n_prompts=3, record_every=1),
        train_constants=trained, resumable=Resumable(tmp_path / "state.safetensors"),
    )  # fmt: skip
    state = Resumable(tmp_path / "state.safetensors").load()
    assert {
        name: value.dtype for name, value in state.items() if value.is_floating_point() and value.dtype != torch.float32
    } == {}
    assert found.scores.dtype == torch.float32
    assert not trained or {part.dtype for part in found.constants} == {torch.float32}
    assert bool(state["logit/first"].ne(0).any()), "a gradient arrived"
    assert not trained or bool(state["constants/head/first"].ne(0).any())


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_fp32_to_within_bf16(name):
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        engine, passes = setting(name, dtype)
        graph, width = engine.graph, engine.model.d_model if engine.model.post_norm else engine.model.d_head
        draw = torch.Generator().manual_seed(1)
        masks = torch.rand(2, graph.n_destinations, graph.n_sources, generator=draw).mul(1.5).sub(0.4).clamp(
            0, 1
        ) * torch.tensor(graph.valid)
        shapes = (
            (1, engine.model.d_model),
            (graph.n_layers, graph.n_heads, 1, width),
            (graph.n_layers, 1, engine.model.d_model),
        )
        values = Constants(*(torch.randn(1, *shape, generator=draw) for shape in shapes))
        written = values.writes(engine, T - 1)
        slots = torch.arange(4).repeat(2)
        found[dtype] = passes.gradients("kl", torch.arange(4), slots, masks, written, owned=False, constants=True)
    for part in ("masks", "constants"):
        wide, narrow = (getattr(found[dtype], part) for dtype in found)
        assert narrow.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(wide.flatten(), narrow.flatten(), 0) > 0.97, part


def test_a_step_of_optimal_fit_keeps_constants_in_fp32(tmp_path):
    model, batch = canonical(random_hf("llama").bfloat16()), some_batch()
    items, statistics = components_of(model, ("head", "mlp")), some_statistics(model)
    start = optimal.starting_means(model, items, statistics, positional=False)
    settings = OptimalFit(max_steps=1, batch_size=4)
    fit = optimal.fit_constants(
        model,
        items,
        statistics,
        batch,
        batch,
        settings,
        start=start,
        resumable=Resumable(tmp_path / "state.safetensors"),
    )
    state = Resumable(tmp_path / "state.safetensors").load()
    assert {state[name].dtype for name in ("value", "first", "second", "best", "best_loss")} == {torch.float32}
    assert fit.best.dtype == fit.best_loss.dtype == torch.float32
    assert not torch.equal(state["value"], start)
