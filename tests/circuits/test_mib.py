"""MIB's areas against sums written from its definition; exported constants against TransformerLens with its own weight
processing.
"""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_hf
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from oacore.circuits import mib
from oacore.circuits.circuit import by_size
from oacore.circuits.mib_file import ungroup
from oacore.engine import forward
from oacore.errors import UserError
from oacore.models.graph import Graph
from oacore.models.load import canonical
from oacore.models.weights import Model
from oacore.store.artefacts import write_tensors
from oacore.store.provenance import Provenance

GPT2 = Graph(12, 12, 12, parallel=False)
GROUPED = Graph(2, 4, 2, parallel=False)

# Budgets, areas.


def test_budgets_of_gpt2_small_are_those_of_mib():
    assert mib.n_edges_of(GPT2).tolist() == [32, 64, 162, 324, 649, 1624, 3249, 6498, 16245, 32491]


def test_budgets_count_keys_and_values_per_query_head():
    assert mib.n_edges_of(GROUPED)[-1] == GROUPED.mib.n_edges > GROUPED.n_edges


def trapezoids(x: list[float], y: list[float]) -> float:
    return sum((x[i + 1] - x[i]) * (y[i] + y[i + 1]) / 2 for i in range(len(x) - 1))


def test_areas_of_a_perfect_and_of_an_empty_circuit():
    budgets, perfect = np.array(mib.BUDGETS), np.ones(10)
    log_x = mib.log_axis(budgets)
    assert mib.cpr(budgets, perfect) == pytest.approx(0.999) and mib.cmd(budgets, perfect) == 0
    assert mib.cpr(log_x, perfect) == pytest.approx(1) and mib.cmd(log_x, perfect) == 0
    assert mib.cpr(budgets, 0 * perfect) == 0 and mib.cmd(budgets, 0 * perfect) == pytest.approx(0.999)


def test_areas_by_hand():
    """f = 0 up to 0.2, 2 at 0.5, 1 at 1: (0.3 · 1 + 0.5 · 1.5); |1 - f| = 1 up to 0.5, 0 at 1: 0.199 + 0.3 + 0.25."""
    f = np.array([0, 0, 0, 0, 0, 0, 0, 0, 2, 1.0])
    assert mib.cpr(np.array(mib.BUDGETS), f) == pytest.approx(1.05)
    assert mib.cmd(np.array(mib.BUDGETS), f) == pytest.approx(0.749)
    thirds = np.array(
        [0.001, 0.01, 0.1, 1]
    )  # equal steps in log x: (0 + 1) / 2, (1 + 1) / 2, (1 + 3) / 2, each a third
    assert mib.cpr(mib.log_axis(thirds), np.array([0, 1, 1, 3])) == pytest.approx((0.5 + 1 + 2) / 3)
    assert mib.cmd(mib.log_axis(thirds), np.array([0, 1, 1, 3])) == pytest.approx((0.5 + 0 + 1) / 3)


@given(st.lists(st.floats(-3, 5), min_size=10, max_size=10))
def test_areas_are_sums_of_trapezoids(f):
    budgets = list(mib.BUDGETS)
    away = [abs(1 - value) for value in f]
    assert mib.cpr(np.array(budgets), np.array(f)) == pytest.approx(trapezoids(budgets, f), abs=1e-12)
    assert mib.cmd(np.array(budgets), np.array(f)) == pytest.approx(trapezoids(budgets, away), abs=1e-12)
    logs = [math.log(k) / math.log(1000) for k in budgets]
    assert mib.cpr(mib.log_axis(np.array(budgets)), np.array(f)) == pytest.approx(trapezoids(logs, f), abs=1e-12)
    assert mib.cmd(mib.log_axis(np.array(budgets)), np.array(f)) == pytest.approx(trapezoids(logs, away), abs=1e-12)


def test_faithfulness_of_no_circuit_and_of_the_model():
    assert mib.faithfulness(np.array([-1.0, 3.0, 5.0]), -1.0, 3.0).tolist() == [0, 1, 1.5]
    for empty in (2.0, 2.0 + 5e-6, 2.0 - 5e-6):  # which of them, rounding decides
        with pytest.raises(
            UserError,
            match=r"task metric is 2\.0 for the model and .* for the empty circuit, .*: faithfulness is undefined",
        ):
            mib.faithfulness(np.ones(3), empty, 2.0)
    with pytest.raises(UserError, match=r"nan.*allowed: finite"):
        mib.faithfulness(np.array([np.nan]), 0.0, 1.0)


# The score of a ranking.


def score_of(graph: Graph, scores: np.ndarray, *, absolute: bool) -> tuple[mib.Score, np.ndarray]:
    """The metric of a circuit is 3 plus the number of its edges; also the masks that were evaluated."""
    seen: list[np.ndarray] = []

    def evaluate(masks: np.ndarray) -> torch.Tensor:
        seen.append(masks)
        return torch.tensor(3.0 + masks.sum((1, 2)))

    found = mib.score(graph, scores, evaluate, absolute=absolute)
    assert len(seen) == 1
    return found, seen[0]


@pytest.mark.parametrize("absolute", [False, True])
def test_score_judges_the_highest_ranked_edges_of_each_budget(absolute):
    graph = Graph(3, 4, 4, parallel=True)
    scores = np.random.default_rng(0).normal(size=graph.valid.shape)
    found, masks = score_of(graph, scores, absolute=absolute)
    assert masks.shape == (12, *graph.valid.shape) and not masks[0].any() and (masks[-1] == graph.valid).all()
    ranking = np.abs(scores) if absolute else scores
    sizes = [int(k * graph.n_edges) for k in mib.BUDGETS]
    assert found.table["edges_requested"].tolist() == sizes
    f = []
    for row, (size, mask) in enumerate(zip(sizes, masks[1:-1], strict=True)):
        assert (mask == by_size(graph, ranking, size)).all()
        f.append(mask.sum() / graph.n_edges)
        assert found.table.loc[row, ["budget", "edges", "metric", "faithfulness"]].tolist() == pytest.approx(
            [mib.BUDGETS[row], mask.sum(), 3 + mask.sum(), f[-1]]
        )
    away = [1 - value for value in f]
    logs = [math.log(k) / math.log(1000) for k in mib.BUDGETS]
    areas = [trapezoids(x, y) for x in (list(mib.BUDGETS), logs) for y in (f, away)]
    assert [found.cpr, found.cmd, found.cpr_log, found.cmd_log] == pytest.approx(areas)
    assert found.table["edges"].iloc[-2] < graph.n_edges // 2 + 1 and f[-1] == 1


def test_signed_and_absolute_rankings_differ_only_by_negative_scores():
    scores = np.random.default_rng(0).normal(size=GROUPED.valid.shape)
    signed, absolute = (score_of(GROUPED, scores, absolute=flag)[1] for flag in (False, True))
    assert (signed != absolute).any()
    again = score_of(GROUPED, np.abs(scores), absolute=False)[1]
    assert (again == absolute).all()


def test_a_shared_key_counts_once_per_query_head():
    scores = np.random.default_rng(1).normal(size=GROUPED.valid.shape)
    found, masks = score_of(GROUPED, scores, absolute=False)
    counts = GROUPED.mib.prune(ungroup(GROUPED, masks[1:-1])).sum((1, 2))
    edges, requested = found.table["edges"].to_numpy(), found.table["edges_requested"].to_numpy()
    # A budget that cuts through a group of two query heads counts one of them, and we evaluate both.
    assert (edges <= requested).all() and (edges <= counts).all() and (counts <= edges + 1).all()
    assert edges[-1] == counts[-1] == GROUPED.mib.n_edges
    assert all((GROUPED.prune(mask) == mask).all() for mask in masks)


# Constants for EAP-IG.

FAMILIES = ("gpt2", "neox-parallel", "neox-sequential", "llama", "qwen2", "gemma2", "olmo2")


def random_constants(model: Model, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "input": (model.d_model,),
        "head": (model.n_layers, model.n_heads, model.d_head),
        "mlp": (model.n_layers, model.d_model),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def logits_by_hand(
    model: Model, constants: dict[str, torch.Tensor], tokens: torch.Tensor, ablated: set[str]
) -> torch.Tensor:
    """Logits [B, T, V] with the constants in place of the ablated nodes at all positions; `input` is the token
    embedding alone.
    """
    residual = forward.embed(model, tokens)
    if "input" in ablated:
        residual = constants["input"].expand_as(residual)
        if model.W_pos is not None:
            residual = residual + model.W_pos[: tokens.shape[1]]
    for layer in range(model.n_layers):
        z = forward.heads(model, layer, residual).clone()  # [B, T, H, k]
        for head in range(model.n_heads):
            if f"a{layer}.h{head}" in ablated:
                z[:, :, head] = constants["head"][layer, head]
        middle = residual + forward.attention_write(model, layer, forward.combine_heads(model, layer, z))
        out = forward.mlp(model, layer, residual if model.parallel else middle)
        residual = middle + (constants["mlp"][layer].expand_as(out) if f"m{layer}" in ablated else out)
    return forward.logits_of(model, residual)


def logits_by_transformer_lens(
    hf, exported: dict[str, torch.Tensor], tokens: torch.Tensor, ablated: set[str]
) -> torch.Tensor:
    """The same by TransformerLens with its default weight processing, looking constants up as `load_ablations` of
    EAP-IG 7af394a does.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    bridge = build_bridge_from_module(hf, type(hf).__name__, hf_config=hf.config, tokenizer=None)
    bridge.enable_compatibility_mode(disable_warnings=True)
    bridge.set_use_attn_result(True)

    def replace_heads(value, hook):
        layer = int(hook.name.split(".")[1])
        for head in range(value.shape[2]):
            if f"a{layer}.h{head}" in ablated:
                value[:, :, head] = exported[f"blocks.{layer}.attn.hook_result"][head]
        return value

    hooks = [("hook_embed", lambda value, hook: exported["hook_embed"].expand_as(value))] if "input" in ablated else []
    for layer in range(hf.config.num_hidden_layers):
        hooks.append((f"blocks.{layer}.attn.hook_result", replace_heads))
        if f"m{layer}" in ablated:
            name = f"blocks.{layer}.hook_mlp_out"
            hooks.append((name, lambda value, hook: exported[hook.name].expand_as(value)))
    return bridge.run_with_hooks(tokens, fwd_hooks=hooks)


@pytest.mark.parametrize("which", ["everything", "some"])
@pytest.mark.parametrize("name", FAMILIES)
def test_exported_constants_give_the_same_predictions_in_transformer_lens(name, which):
    """Everything ablated tests b_O, the basis and the positions; some nodes ablated, how constants and clean outputs
    share the biases.
    """
    tokens = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    model = canonical(random_hf(name))
    constants = random_constants(model)
    sources = model.graph.source_names
    ablated = set(sources) if which == "everything" else {"a0.h1", "a1.h2", "a1.h3", "m1", "a2.h0"}
    with torch.no_grad():
        ours = logits_by_hand(model, constants, tokens, ablated).log_softmax(-1)
        clean = logits_by_hand(model, constants, tokens, set()).log_softmax(-1)
        exported = mib.export_constants(model, constants, lengths=None)
        theirs = logits_by_transformer_lens(random_hf(name), exported, tokens, ablated).log_softmax(-1)
    assert (ours - clean).abs().max() > 0.1
    torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=2e-5)


def test_the_transform_by_definition():
    model = canonical(random_hf("qwen2"))
    constants = random_constants(model)
    exported = mib.export_constants(model, constants, lengths=None)
    layers = [(f"blocks.{layer}.attn.hook_result", f"blocks.{layer}.hook_mlp_out") for layer in range(3)]
    assert set(exported) == {"hook_embed", *sum(layers, ())}
    assert torch.equal(exported["hook_embed"], constants["input"]) and torch.equal(
        exported[layers[1][1]], constants["mlp"][1]
    )
    block = model.blocks[2]
    for head, kv in enumerate((0, 0, 1, 1)):
        expected = (constants["head"][2, head].double() - block.b_V[kv].double()) @ block.W_O[head].double()
        torch.testing.assert_close(exported[layers[2][0]][head], expected.float())
    assert all(value.dtype == torch.float32 and value.is_contiguous() for value in exported.values())


def test_layer_norm_models_get_constants_of_mean_zero():
    model = canonical(random_hf("gpt2"))
    constants = random_constants(model)
    exported = mib.export_constants(model, constants, lengths=None)
    assert all(value.mean(-1).abs().max() < 1e-6 for value in exported.values())
    torch.testing.assert_close(exported["blocks.1.hook_mlp_out"], constants["mlp"][1] - constants["mlp"][1].mean())


def test_a_constant_for_token_plus_position_loses_the_mean_position():
    """Averaged over the ablated positions of all prompts: 1 and 2 of the first, 1 of the second."""
    model = canonical(random_hf("gpt2"))
    constants = random_constants(model)
    token, both = (
        mib.export_constants(model, constants, lengths)["hook_embed"] for lengths in (None, torch.tensor([3, 2]))
    )
    position = (2 * model.W_pos[1] + model.W_pos[2]) / 3
    torch.testing.assert_close(token - both, position - position.mean())
    rotary = canonical(random_hf("llama"))
    constants = random_constants(rotary)
    assert torch.equal(mib.export_constants(rotary, constants, torch.tensor([3]))["hook_embed"], constants["input"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp": None}, "constants for head, input; allowed: input, head, mlp, all of them"),
        (
            {"input": (9, 32)},
            r"input have the shape \[9, 32\], one per position; allowed: \[32\], because EAP-IG puts one",
        ),
        ({"head": (3, 4, 9, 8)}, r"head have the shape \[3, 4, 9, 8\], one per position"),
        ({"mlp": (3, 9, 32)}, "mlp have the shape .*not positional"),
        ({"mlp": (2, 32)}, r"mlp have the shape \[2, 32\]; allowed for this model: \[3, 32\]"),
    ],
)
def test_constants_that_eap_ig_has_no_place_for_are_refused(change, message):
    model = canonical(random_hf("gpt2"))
    constants = random_constants(model) | {name: shape and torch.zeros(shape) for name, shape in change.items()}
    with pytest.raises(UserError, match=message):
        mib.export_constants(
            model, {name: value for name, value in constants.items() if value is not None}, lengths=None
        )


@pytest.fixture
def constants_file(tmp_path) -> tuple[Path, dict[str, torch.Tensor]]:
    model = canonical(random_hf("gpt2"))
    exported = mib.export_constants(model, random_constants(model), lengths=None)
    write_tensors(tmp_path / "constants.safetensors", exported, Provenance(noted={"task": "ioi", "model_hash": "abc"}))
    return tmp_path / "constants.safetensors", exported


def test_a_constants_file_holds_the_tensors_and_the_facts(constants_file):
    path, exported = constants_file
    found = load_file(path)
    assert found.keys() == exported.keys() and all(torch.equal(found[name], exported[name]) for name in found)
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["oacore"])
    assert facts["task"] == "ioi" and facts["model_hash"] == "abc"
    before = path.read_bytes()
    write_tensors(path, exported, Provenance(noted={"task": "ioi", "model_hash": "abc"}))
    assert path.read_bytes() == before


def test_the_documented_converter_writes_what_eap_ig_unpickles(constants_file, tmp_path):
    """In a process of its own, as a user runs it."""
    path, exported = constants_file
    guide = (Path(__file__).parents[2] / "docs/mib.md").read_text()
    (converter,) = re.findall(r"```python\n(.*?)```", guide, re.S)
    assert len(converter.splitlines()) <= 10
    (tmp_path / "convert.py").write_text(converter)
    target = tmp_path / "ablations/gpt2/ioi_oa.pkl"
    subprocess.run([sys.executable, tmp_path / "convert.py", path, target], check=True)
    read = (
        "import json, pickle, sys; constants = pickle.load(open(sys.argv[1], 'rb'));"
        "print(json.dumps({name: [value.device.type, value.tolist()] for name, value in constants.items()}))"
    )
    result = subprocess.run([sys.executable, "-c", read, target], check=True, capture_output=True, text=True)
    assert json.loads(result.stdout) == {name: ["cpu", value.tolist()] for name, value in exported.items()}
