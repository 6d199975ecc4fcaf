"""The estimate of memory and arithmetic: against measured peaks, against the code it copies numbers from, and how it scales."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import random_hf
from measured_peaks import CONFIG, SHAPE

from oacore import estimate, lens
from oacore.__main__ import estimated, jobs, main
from oacore.circuits import acdc, attribution, evaluate, patching
from oacore.config import load_config, parse_config
from oacore.errors import UserError
from oacore.estimate import Case, Sizes
from oacore.folded import Weights
from oacore.masked_forward import Engine
from oacore.model import canonical, named_tensors

ROOT = Path(__file__).parents[1]
LLAMA_8B = ROOT / "docs/llama-3.1-8b.json"
TOLERANCE = 0.25

# glibc would keep freed tensors below this size for later ones, so that a peak would be that of an earlier case.
RETURNED_TO_THE_SYSTEM = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def peaks():
    """What the stages' functions took on a scaled-down Llama-3-8B, each in a process that has imported everything before."""
    command = [sys.executable, "tests/measured_peaks.py", "fp32"]
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
    """Memory of the process itself; the file's pages that it maps belong to the page cache, which the system takes back."""
    import transformers

    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    n_weights = sum(parameter.numel() for parameter in hf.parameters())
    hf.save_pretrained(tmp_path / "fp32")
    hf.bfloat16().save_pretrained(tmp_path / "bf16")
    random_hf("llama").save_pretrained(tmp_path / "tiny")
    script = """
import gc, sys
from measured_peaks import status
from oacore.model import canonical, load_hugging_face
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
    environment = os.environ | RETURNED_TO_THE_SYSTEM | {"PYTHONPATH": "tests"}
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for line, itemsize in zip(result.stdout.splitlines()[-2:], (4, 2), strict=True):
        assert max(map(int, line.split())) <= 1.15 * itemsize * n_weights


# ---- The same numbers as the code's ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "neox-parallel", "llama", "qwen2", "gemma2"])
def test_sizes_weights_and_rows_are_the_models_own(family):
    hf = random_hf(family)
    s, model = Sizes.of(hf.config.to_dict()), canonical(hf)
    assert s.graph == model.graph
    assert (s.d_model, s.d_head, s.d_vocab) == (model.d_model, model.d_head, model.d_vocab)
    matrices = {tensor.data_ptr(): tensor.numel() for tensor in named_tensors(model).values() if tensor.dim() > 1}
    biases = 3 * model.n_layers * s.z
    assert s.n_weights <= sum(matrices.values()) <= s.n_weights + biases
    engine = Engine(model)
    for gradient, keep in ((False, False), (True, False), (True, True)):
        assert estimate.row_bytes(s, 9, gradient=gradient, keep_inputs=keep) == engine.row_bytes(9, gradient=gradient, keep_inputs=keep)
    own = {id(tensor) for block in model.blocks for tensor in (block.W_O, block.W_out)}
    folded = [part for block in Weights(model).blocks for part in (block.read, block.write, block.W_in, block.W_gate, block.W_out)]
    new = sum(part.nbytes for part in folded if part is not None and id(part) not in own)
    assert estimate.folded_weights(s) == new


def test_copied_numbers_are_those_of_the_code():
    from oacore.demo import ARCHITECTURE, make_tokenizer
    from oacore.stages import lens_evaluation, lens_faithfulness

    assert estimate.LOGIT_CHUNK == 4 * lens.CHUNK_ELEMENTS and estimate.BANK == lens.BANK
    assert (estimate.GUESSES, estimate.EXACT_ROWS) == (acdc.GUESSES, attribution.MOST_ROWS)
    assert (estimate.JUDGED_AT_ONCE, estimate.ROWS_WORTH_KEEPING) == (evaluate.REPLACED_AT_ONCE, patching.ROWS_WORTH_KEEPING)
    assert (estimate.EVALUATED_ROWS, estimate.WHITENING_ROWS) == (lens_evaluation.BATCH_ROWS, lens_faithfulness.TRAIN_ROWS)
    demo = Sizes.of({"model_type": "gpt2", "vocab_size": len(make_tokenizer()), **ARCHITECTURE})
    assert demo == estimate.DEMO


def test_estimate_needs_no_torch():
    code = "import sys; from oacore.__main__ import estimated; from oacore.config import load_config; "
    code += "print(estimated(load_config('config/demo.yaml'))); assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


# ---- Scaling ---------------------------------------------------------------------------------------------------------------------


def needs_of(sizes, **limits):
    config = parse_config(CONFIG | {"limits": CONFIG["limits"] | limits})
    case = Case(config, sizes, gpu=True)
    return {(need.rule, need.what): need for need in estimate.needs(case, jobs(config))}


@pytest.fixture(scope="module")
def sizes():
    return Sizes.of({"model_type": "llama", **SHAPE})


def test_twice_the_layers_take_twice_the_blocks_and_their_activations(sizes):
    deeper = replace(sizes, n_layers=2 * sizes.n_layers)
    assert deeper.n_weights - sizes.n_weights == sizes.n_layers * sizes.block_weights
    assert estimate.clean_pass(deeper, 100) == pytest.approx(2 * estimate.clean_pass(sizes, 100), rel=0.05)
    assert estimate.folded_weights(deeper) == 2 * estimate.folded_weights(sizes)
    one, two = needs_of(sizes), needs_of(deeper)
    assert one.keys() == two.keys()
    assert all(two[job].peak > one[job].peak for job in one if "random" not in job[1])


def test_bf16_halves_weights_but_not_masks_and_constants(sizes):
    one, half = needs_of(sizes), needs_of(replace(sizes, bytes=2))
    job = ("circuit_search", "ioi ugs optimal")
    for part in ("weights", "folded weights", "cache rows"):
        assert half[job].parts[part] == one[job].parts[part] / 2
    for part in ("masks", "optimiser", "replacements", "constants"):
        assert half[job].parts[part] == one[job].parts[part]


def test_the_named_key_lowers_the_memory(sizes):
    for limits, rules in (
        ({"tokens_per_batch": 168}, ("activations", "optimal", "gaps", "tracing_fit")),
        ({"memory_gb": 0.05}, ("circuit_search",)),
    ):
        before, after = needs_of(sizes), needs_of(sizes, **limits)
        assert all(after[job].peak < before[job].peak for job in before if job[0] in rules)


# ---- The command -----------------------------------------------------------------------------------------------------------------


def test_command_prints_every_rule_and_warns(capsys):
    arguments = ["estimate", str(ROOT / "config/llama-8b.yaml"), "--model-config", str(LLAMA_8B), "--tflops", "100"]
    assert main([*arguments, "--memory-gb", "80"]) == 0
    shown = capsys.readouterr().out
    config = load_config(ROOT / "config/llama-8b.yaml")
    assert {rule for rule, _, _ in jobs(config)} & set(estimate.RULES) <= set(re.findall(r"^(\w+)  ", shown, re.M)) | {"prompts"}
    assert "!" not in shown, "the shipped config fits"
    assert main([*arguments, "--memory-gb", "24"]) == 0
    assert re.search(r"^! optimal ioi optimal: [\d.]+ GB of 24.0 GB; lower limits.tokens_per_batch$", capsys.readouterr().out, re.M)


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
