"""What a change of a finished run would compute, row by row of the table in docs/cache.md, and that nothing is."""

from pathlib import Path

import pytest

from oacore.config.read import parse_config
from oacore.plan import Step, plan, shown

# Parts of the tiny run, so that each is looked at in a second or two.
CIRCUITS = {
    "ablation": {"tasks": ["ioi"]},
    "circuits": {"methods": ["ugs", "topk", "eap", "acdc"], "ablations": ["optimal"]},
    "interactions": None,
    "removal": None,
    "tracing": None,
    "lenses": None,
    "vision": None,
}
EXPERIMENTS = ("circuits", "interactions", "removal", "tracing", "lenses", "vision")


def only(experiment):
    """What takes the others away, and components of other tasks."""
    return {"ablation": {"tasks": ["ioi"]}} | {name: None for name in EXPERIMENTS if name != experiment}


COMPONENTS = dict.fromkeys(EXPERIMENTS)
INTERACTIONS, REMOVAL, TRACING, LENSES, VISION = map(only, EXPERIMENTS[1:])
N_CURVES = 3 * 3 * 2  # of the tiny run: sites, positions, windows

# What changes in a part, and the new items by job, as far as they are known before the first of them is computed.
CHANGES = {
    "another name, nothing else": ({}, {"run": "other"}, {}),
    "what costs no item": (
        CIRCUITS,
        {"circuits": {"masks": {"record_every": 2}}, "limits": {"threads": 2, "tokens_per_batch": 70}},
        {},
    ),
    "another order, and less": (
        CIRCUITS,
        {"circuits": {"methods": ["eap", "ugs"], "seeds": [1], "lambdas": [0.1]}},
        {},
    ),
    "a lambda": (CIRCUITS, {"circuits": {"lambdas": [1e-3, 0.3, 0.1]}}, {"circuits ioi ugs optimal": 2}),
    "a threshold": (CIRCUITS, {"circuits": {"thresholds": [0.05, 0.1]}}, {"circuits ioi acdc optimal": 2}),
    "a size": (
        CIRCUITS,
        {"circuits": {"sizes": [40, 0.3, 0.2]}},
        {"circuits ioi topk optimal": 2, "circuits ioi eap optimal": 2},
    ),
    "a seed": (
        CIRCUITS,
        {"circuits": {"seeds": [0, 1, 2]}},
        {
            "circuits ioi ugs optimal": 2,  # lambdas
            "circuits ioi topk optimal": 2,  # sizes
            "circuits ioi eap optimal": 1,  # scores, whatever the sizes
            "circuits ioi acdc optimal": 1,
        },
    ),
    "an edge ablation type": (
        CIRCUITS,
        {"circuits": {"ablations": ["optimal", "mean"]}},
        {
            "circuits ioi ugs mean": 4,
            "circuits ioi topk mean": 4,
            "circuits ioi eap mean": 2,
            "circuits ioi acdc mean": 2,
        },
    ),
    "how masks are learned": (
        CIRCUITS,
        {"circuits": {"masks": {"n_steps": 9}}},
        {"circuits ioi ugs optimal": 4, "circuits ioi topk optimal": 4},
    ),
    "a kind of component": (
        COMPONENTS,
        {"ablation": {"components": ["head", "mlp", "attention_layer"]}},
        {"optimal ioi optimal": 1, "optimal facts optimal": 1},  # from which optimal_positional starts
    ),
    "how constants are fitted": (
        COMPONENTS,
        {"ablation": {"tasks": ["ioi"], "optimal": {"max_steps": 59}}},
        {"optimal ioi optimal": 2},  # of heads, of MLPs
    ),
    "a smaller share of components": (INTERACTIONS, {"interactions": {"n_components": 2}}, {}),
    "an ablation type of effects": (
        INTERACTIONS,
        {"interactions": {"ablations": ["optimal", "mean", "zero"]}},
        {"interactions ioi zero": 23},
    ),
    "a price of edges": (REMOVAL, {"removal": {"edge_prices": [1e-2, 1e-1]}}, {"removal ugs optimal": 1}),
    "how removal is weighed": (
        REMOVAL,
        {"removal": {"weight": 2.0}},
        {"removal ugs optimal": 1, "removal gap optimal": 1},
    ),
    "what vision shows elsewhere": (
        VISION,
        {"vision": {"units": ["blocks"], "budgets": [], "replacements": ["zero"]}},
        {},
    ),
    "a replacement": (
        VISION,
        {"vision": {"units": ["blocks"], "replacements": ["optimal", "zero", "mean"]}},
        {"vision blocks": 3},  # alone, in sets, by gradients
    ),
    "how constants of units are fitted": (
        VISION,
        {"vision": {"units": ["blocks"], "fit": {"max_steps": 8}}},
        {"vision blocks": 2},
    ),
    "a corruption": (TRACING, {"tracing": {"noise_scales": [1, 3, 5]}}, {"tracing facts": N_CURVES}),
    "a window": (TRACING, {"tracing": {"windows": [1, 3, 5]}}, {"tracing_fit facts": N_CURVES // 2}),
    "a picture of tracing": (TRACING, {"tracing": {"pictures": 3}}, {"tracing facts": 1}),
    "a picture of lenses": (LENSES, {"lenses": {"pictures": 2}}, {"lens_evaluation text": 3}),
    "a length": (LENSES, {"lenses": {"lengths": [6, 8]}}, {"lens_evaluation text": 9}),
    "a layer": (LENSES, {"lenses": {"faithfulness": {"layers": [1, 2, 3]}}}, {"lens_faithfulness text": 2}),
    "how a lens is fitted": (
        LENSES,
        {"lenses": {"tuned": {"max_steps": 59}}},
        {f"lens_fit text {lens}": 1 for lens in ("tuned-identity", "tuned-random", "linear_oca", "grad")},
    ),
}


def merged(values, changes):
    return values | {
        key: merged(values[key], value) if isinstance(value, dict) and isinstance(values.get(key), dict) else value
        for key, value in changes.items()
    }


def planned(config, change):
    """The steps of a part of a run, with a change."""
    part, changes, _ = CHANGES[change]
    values = merged(merged(config.model_dump(mode="json"), part), changes)
    return plan(parse_config({name: value for name, value in values.items() if value is not None}))


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_change_computes(tiny_run, change):
    assert {step.job: step.n_new for step in planned(tiny_run[0], change) if step.n_new} == CHANGES[change][2]


def test_it_writes_nothing(own_copy):
    """In a copy of its own: other tests draw in the shared run."""

    def files():
        return {path: path.stat().st_mtime_ns for path in Path(own_copy.cache_dir).rglob("*") if path.is_file()}

    before = files()
    assert len(before) > 500 and str(own_copy.results_dir).startswith(str(own_copy.cache_dir))
    planned(own_copy, "what costs no item")
    planned(own_copy, "a lambda")
    assert files() == before


def test_what_is_shown():
    steps = [
        Step("optimal ioi optimal", "all is in the store"),
        Step("circuits ioi ugs optimal", "ugs: 1 of 4 are new: 0.003 0", 1, 190.0),
        Step("lens_fit text oca", "text: 2 of 2 are new", 2, None),
        Step("lens_evaluation text", "known after lens_fit text oca", None),
    ]
    assert shown(steps).splitlines() == [
        "optimal ioi optimal       all is in the store",
        "circuits ioi ugs optimal  ugs: 1 of 4 are new: 0.003 0; at least 3 min",
        "lens_fit text oca         text: 2 of 2 are new; time unknown",
        "lens_evaluation text      known after lens_fit text oca",
        "3 new items, at least 3 min and the time of 1 job with nothing alike in the store; known later: 1 job",
    ]
    assert shown(steps[:1]).splitlines()[-1] == "nothing new"
