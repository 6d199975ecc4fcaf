"""The estimate of memory: against measured peaks, against the models' own sizes, and how it scales."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import random_hf
from measured_peaks import CONFIG, SHAPE

from oacore.__main__ import main
from oacore.circuits.numbers import PASS_BYTES_ON_CPU, PASS_SHARE
from oacore.config.circuits import CIRCUIT_METHODS, EDGE_ABLATIONS
from oacore.config.lenses import LENSES
from oacore.config.model import ARCHITECTURES, REGISTERED
from oacore.config.read import load_config, parse_config
from oacore.config.rows import resolve
from oacore.engine.folded import Weights
from oacore.engine.masked import Engine
from oacore.errors import UserError
from oacore.estimate import circuits, masked, passes, table
from oacore.estimate.case import Case
from oacore.estimate.families import FAMILIES
from oacore.estimate.masked import folded_weights_bytes, pass_bytes
from oacore.estimate.run import estimated
from oacore.estimate.sizes import Sizes, known_sizes
from oacore.jobs import jobs
from oacore.models.load import canonical
from oacore.models.weights import named_tensors

ROOT = Path(__file__).parents[2]
LLAMA_8B = ROOT / "docs/llama-3.1-8b.json"
TOLERANCE = 0.25

# glibc would keep freed tensors below this size for later ones, so that a peak would be that of an earlier case.
RETURNED_TO_THE_SYSTEM = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def peaks():
    """What the stages' functions took on a scaled-down Llama-3-8B, each in a process that has imported everything
    before.
    """
    command = [sys.executable, "tests/estimate/measured_peaks.py", "fp32"]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | RETURNED_TO_THE_SYSTEM, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def test_predicted_peaks_are_within_a_quarter_of_measured_ones(peaks):
    assert len(peaks) == 10
    ratios = {peak["case"]: sum(peak["parts"].values()) / peak["measured"] for peak in peaks}
    assert all(1 - TOLERANCE <= ratio <= 1 + TOLERANCE for ratio in ratios.values()), ratios


def test_most_of_each_peak_is_not_the_weights(peaks):
    """Or the test above would say nothing about the formulas."""
    for peak in peaks:
        assert peak["parts"]["weights"] < 0.6 * peak["measured"], peak["case"]


def test_loaded_weights_are_not_held_twice(tmp_path):
    """Memory of the process itself; the file's pages that it maps belong to the page cache, which the system takes
    back.
    """
    import transformers

    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    n_weights = sum(parameter.numel() for parameter in hf.parameters())
    hf.save_pretrained(tmp_path / "fp32")
    hf.bfloat16().save_pretrained(tmp_path / "bf16")
    random_hf("llama").save_pretrained(tmp_path / "tiny")
    script = """
import gc, sys
from measured_peaks import status
from oacore.models.hub import load_hugging_face
from oacore.models.load import canonical
canonical(load_hugging_face(sys.argv[1] + "/tiny"))
for dtype in ("fp32", "bf16"):
    model = None
    gc.collect()
    base = status("RssAnon")
    hf = load_hugging_face(f"{sys.argv[1]}/{dtype}", dtype=dtype)
    model = canonical(hf)
    both = status("RssAnon") - base
    hf = None
    gc.collect()
    print(both, status("RssAnon") - base)
"""
    search = os.pathsep.join([str(ROOT / "tests/estimate"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | RETURNED_TO_THE_SYSTEM | {"PYTHONPATH": search}
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    for line, itemsize in zip(result.stdout.splitlines()[-2:], (4, 2), strict=True):
        assert max(map(int, line.split())) <= 1.15 * itemsize * n_weights


# ---- The same numbers as the code's ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", ["gpt2", "neox-parallel", "llama", "mistral", "phi3", "qwen2", "qwen3", "gemma2", "olmo2"]
)
def test_sizes_weights_and_rows_are_the_models_own(family):
    hf = random_hf(family)
    s, model = Sizes.of(hf.config.to_dict()), canonical(hf)
    assert s.graph == model.graph
    assert (s.d_model, s.d_head, s.d_vocab) == (model.d_model, model.d_head, model.d_vocab)
    matrices = {tensor.data_ptr(): tensor.numel() for tensor in named_tensors(model).values() if tensor.dim() > 1}
    biases = 3 * model.n_layers * s.z
    assert s.n_weights <= sum(matrices.values()) <= s.n_weights + biases
    for gpu, engine in ((False, Engine(model)), (True, Engine(model, layers_at_once=2))):
        for gradient, keep in ((False, False), (True, False), (True, True)):
            of_pass = {"gradient": gradient, "keep_inputs": keep}
            assert masked.row_bytes(s, 9, **of_pass, gpu=gpu) == engine.row_bytes(9, **of_pass)
    own = {id(tensor) for block in model.blocks for tensor in (block.W_O, block.W_out)}
    folded = [
        part
        for block in Weights(model).blocks
        for part in (block.read, block.write, block.W_in, block.W_gate, block.W_out)
    ]
    new = sum(part.nbytes for part in folded if part is not None and id(part) not in own)
    assert masked.folded_weights_bytes(s) == new


def test_every_family_that_the_pipeline_runs_has_sizes_and_no_other():
    assert set(FAMILIES) == {*ARCHITECTURES, REGISTERED}
    facts = random_hf("llama").config.to_dict()
    for family, nearest in (("falcon", ""), ("lama", " \\(did you mean 'llama'\\?\\)"), (None, "")):
        with pytest.raises(UserError, match=rf"architecture {family!r}, .*allowed: gpt2, .*, registered{nearest}$"):
            Sizes.of(facts | {"model_type": family})
    with pytest.raises(UserError, match="has no 'hidden_size'"):
        Sizes.of({name: value for name, value in facts.items() if name != "hidden_size"})


def test_sizes_of_the_demo_are_those_that_it_is_trained_with():
    from oacore.models.demo import make_tokenizer

    demo = known_sizes(load_config(ROOT / "config/demo.yaml"))
    assert demo is not None and demo.d_vocab == len(make_tokenizer())


def test_estimate_needs_no_torch():
    script = """
import sys
from oacore.__main__ import estimated
from oacore.config.read import load_config
assert "estimate for one job" in estimated(load_config("config/demo.yaml"))
assert not {"torch", "transformers"} & set(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# ---- Scaling ---------------------------------------------------------------------------------------------------------


def needs_of(sizes, **limits):
    config = parse_config(CONFIG | {"limits": CONFIG["limits"] | limits})
    case = Case(config, sizes, gpu=True)
    return {(need.rule, need.job): need for need in table.needs(case, jobs(config))}


@pytest.fixture(scope="module")
def sizes():
    return Sizes.of({"model_type": "llama", **SHAPE})


def test_twice_the_layers_take_twice_the_blocks_and_their_activations(sizes):
    deeper = replace(sizes, n_layers=2 * sizes.n_layers)
    assert deeper.n_weights - sizes.n_weights == sizes.n_layers * sizes.block_weights
    assert passes.clean_pass_bytes(deeper, 100) == pytest.approx(2 * passes.clean_pass_bytes(sizes, 100), rel=0.05)
    assert masked.folded_weights_bytes(deeper) == 2 * masked.folded_weights_bytes(sizes)
    one, two = needs_of(sizes), needs_of(deeper)
    assert one.keys() == two.keys()
    assert all(two[job].peak_bytes > one[job].peak_bytes for job in one if "random" not in job[1])


def test_bf16_halves_weights_but_not_masks_and_constants(sizes):
    def parts_of(sizes):
        case = Case(parse_config(CONFIG), sizes, gpu=True)
        return circuits.held(case, "ioi") | circuits.search(case, "ioi", "ugs", "optimal").parts

    one, half = parts_of(sizes), parts_of(replace(sizes, number_bytes=2))
    for part in ("weights", "folded weights", "cache rows"):
        assert half[part] == one[part] / 2
    for part in ("masks", "optimiser", "replacements", "constants"):
        assert half[part] == one[part]


def test_the_named_key_lowers_the_memory(sizes):
    for limits, rules in (
        ({"tokens_per_batch": 168}, ("activations", "optimal", "gaps", "tracing_fit")),
        ({"memory_gb": 0.05}, ("circuits",)),
    ):
        before, after = needs_of(sizes), needs_of(sizes, **limits)
        assert all(after[job].peak_bytes < before[job].peak_bytes for job in before if job[0] in rules)


def test_auto_memory_of_a_pass_is_a_share_of_what_the_device_has_left(sizes):
    config = parse_config(CONFIG | {"limits": {"memory_gb": "auto"}})
    left = 80e9 - sizes.weights_bytes - folded_weights_bytes(sizes)
    assert pass_bytes(Case(config, sizes, gpu=True, memory_bytes=80e9)) == pytest.approx(PASS_SHARE * left)
    assert pass_bytes(Case(config, sizes, gpu=False, memory_bytes=80e9)) == PASS_BYTES_ON_CPU
    assert pass_bytes(Case(config, sizes, gpu=True)) == PASS_BYTES_ON_CPU, "unknown"
    assert pass_bytes(Case(parse_config(CONFIG | {"limits": {"memory_gb": 2}}), sizes, gpu=True)) == 2e9


# ---- Registry rows
# -----------------------------------------------------------------------------------------------------------------


def test_every_row_has_its_formula(sizes):
    assert all(callable(resolve(row.cost)) for row in CIRCUIT_METHODS.values())
    values = {name: resolve(row.values)(sizes) for name, row in LENSES.items() if row.fit}
    assert values and all(n > 0 for n in values.values())


def test_a_method_is_costed_by_the_formula_of_its_row(sizes, monkeypatch):
    case = Case(parse_config(CONFIG), sizes, gpu=True)
    row = SimpleNamespace(**vars(CIRCUIT_METHODS["ugs"]) | {"cost": f"{__name__}:toy_formula"})
    monkeypatch.setattr(circuits, "CIRCUIT_METHODS", {"ugs": row})
    need, refit = circuits.circuits(case, "ioi", "ugs", "mean"), case.config.circuits.refit
    judged = circuits.judgement(case, "ioi", case.n_circuits("ugs"), refit, EDGE_ABLATIONS["mean"])
    assert need.parts["toy"] == 7e12 and need.flop == 11 + judged.flop and need.job == "ioi ugs mean"


def test_effects_are_costed_by_their_sets_of_edges(sizes):
    section = {"ablations": ["mean"], "n_components": 3, "components": ["m0"], "mediators": "layer"}
    case = Case(parse_config(CONFIG | {"interactions": section}), sizes, gpu=True)
    refit, k = case.config.interactions.refit, 4
    for job, n_sets in (
        (("interactions", "ioi", "mean"), k * (k - 1) // 2 + k * (3 + sizes.n_layers)),
        (("interaction_ranking", "ioi"), sizes.n_layers * (sizes.n_heads + 1)),
    ):
        judged = circuits.judgement(case, "ioi", n_sets, refit, EDGE_ABLATIONS["mean"])
        assert table.RULES[job[0]](case, *job[1:]).flop == judged.flop > 0


def test_removal_is_costed_by_what_is_ablated_and_fitted(sizes):
    def flop(method, ablation, **changed):
        section = {"forget": "ioi", "retain": "ioi", "relearn": {"max_steps": 0}} | changed
        return table.RULES["removal"](
            Case(parse_config(CONFIG | {"removal": section}), sizes, gpu=True), method, ablation
        ).flop

    assert flop("random", "zero") == 0 < flop("gap", "zero") < flop("gap", "optimal")
    assert flop("ugs", "zero", edge_prices=[1e-3, 1e-2]) == 2 * flop("ugs", "zero", edge_prices=[1e-3])
    fitted = [flop("random", "optimal", sizes=sizes_) for sizes_ in ([1], [1, 2, 3])]
    assert fitted[1] == 3 * fitted[0] == 3 * flop("linear_erasure", "optimal", ranks=[2]) > 0
    tuned = [flop("random", "zero", relearn={"max_steps": steps, "n_prompts": 8}) for steps in (2, 4)]
    assert tuned[1] == 2 * tuned[0] > 0
    relearned = [
        flop("ugs", "zero", edge_prices=[1e-3], relearn={"max_steps": steps, "n_prompts": 8}) for steps in (0, 2, 4)
    ]
    of_one = flop("random", "zero", sizes=[1], relearn={"max_steps": 2, "n_prompts": 8})
    assert relearned[2] - relearned[1] == relearned[1] - relearned[0] > of_one, "an edge's pass adds up every stream"


def toy_formula(case, task, method, ablation):
    assert method.name == "ugs" and not ablation.per_prompt
    return circuits.CircuitCost({"toy": 7e12}, 11)


def test_a_search_that_refuses_a_model_says_so(sizes):
    case = Case(parse_config(CONFIG), replace(sizes, n_layers=32, n_heads=32), gpu=True)
    need = circuits.circuits(case, "ioi", "exact", "mean")
    E = case.sizes.graph.n_edges
    assert need.refusal == f"exact refuses more than 500,000 passes: {16 * E:,} here"
    assert f"! circuits ioi exact mean: {need.refusal}" in table.table(
        [need], device="GPU", memory_bytes=0, flop_per_second=None
    )


# ---- The command -----------------------------------------------------------------------------------------------------


def test_command_prints_every_rule_and_warns(capsys):
    arguments = ["estimate", str(ROOT / "config/llama-8b.yaml"), "--model-config", str(LLAMA_8B), "--tflops", "100"]
    assert main([*arguments, "--memory-gb", "80"]) == 0
    shown = capsys.readouterr().out
    config = load_config(ROOT / "config/llama-8b.yaml")
    assert {rule for rule, _, _ in jobs(config)} & set(table.RULES) <= set(re.findall(r"^(\w+)  ", shown, re.M)) | {
        "prompts"
    }
    assert "!" not in shown, "the shipped config fits"
    assert main([*arguments, "--memory-gb", "24"]) == 0
    assert re.search(
        r"^! optimal ioi optimal: [\d.]+ GB of 24.0 GB; lower limits.tokens_per_batch$", capsys.readouterr().out, re.M
    )


def test_unknown_model_says_which_command_shows_it(capsys):
    config = load_config(ROOT / "config/gpt2.yaml").model_copy(update={"model": "nobody/nothing"})
    assert "python -m oacore estimate" in estimated(config)
    with pytest.raises(UserError, match="nobody/nothing"):
        estimated(config, tflops=1, memory_gb=1, fetch=True)


def test_device_is_measured_unless_told(capsys):
    assert main(["estimate", str(ROOT / "config/demo.yaml")]) == 0
    shown = capsys.readouterr().out
    assert "on the CPU" in shown and re.search(r"^all .* (s|min|h)$", shown, re.M) and "PFLOP" not in shown


def test_dry_run_shows_the_estimate_and_a_run_does_not():
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--quiet", "all"]
    dry = subprocess.run([*command, "-n"], cwd=ROOT, capture_output=True, text=True)
    assert dry.returncode == 0 and "estimate for one job at a time" in dry.stderr
    listed = subprocess.run([*command, "--summary"], cwd=ROOT, capture_output=True, text=True)
    assert "estimate" not in listed.stderr
