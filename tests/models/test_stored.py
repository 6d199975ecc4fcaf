"""Stored weights: the same model to the bit for every family, and what a later stage imports to read it."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES, random_hf

from oacore.engine.forward import logits_of, residual_after
from oacore.errors import UserError
from oacore.jobs import STAGES
from oacore.models.form import check_form
from oacore.models.load import canonical
from oacore.models.stored import read_model, write_model
from oacore.models.weights import named_tensors, weight_hash
from oacore.store.fingerprint import fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_stored_model_is_the_model(family, dtype, tmp_path):
    """40 tokens are beyond the short context of longrope and yarn."""
    model, path = canonical(random_hf(family).to(dtype)), tmp_path / "weights.safetensors"
    check_form(model)  # what the engine computes, `oacore.register` takes
    write_model(path, model)
    again = read_model(path, fingerprint(path))
    assert weight_hash(again) == weight_hash(model) and again.graph == model.graph
    tokens = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    for n_tokens in (7, 40):
        ours, theirs = (logits_of(each, residual_after(each, tokens[:, :n_tokens])) for each in (again, model))
        assert torch.equal(ours, theirs)


def test_tied_weights_are_stored_once(tmp_path):
    model, path = canonical(random_hf("gpt2")), tmp_path / "weights.safetensors"
    model = replace(model, W_U=model.W_E)
    write_model(path, model)
    again = read_model(path, fingerprint(path))
    assert again.W_U.data_ptr() == again.W_E.data_ptr()
    n_bytes = sum({tensor.data_ptr(): tensor.nbytes for tensor in named_tensors(model).values()}.values())
    assert n_bytes < path.stat().st_size < n_bytes + 20_000


def test_the_same_model_is_the_same_file(tmp_path):
    for name in ("a", "b"):
        write_model(tmp_path / name, canonical(random_hf("llama-longrope")))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    write_model(path, canonical(random_hf("gpt2")))
    digest = fingerprint(path)
    write_model(path, canonical(random_hf("llama")))
    with pytest.raises(UserError, match=r"weights.safetensors: damaged or edited"):
        read_model(path, digest)


def test_stages_after_the_model_import_neither_transformers_nor_transformer_lens(own_copy, tmp_path):
    """But for those that need the tokenizer, which import transformers when they use it."""
    wanted = [stage for stage in STAGES if stage not in ("demo", "model")]
    runs = {"optimal": {"task": "ioi", "method": "optimal"}, "gaps": {"task": "ioi"}}
    runs |= {"circuits": {"task": "ioi", "method": "eap", "ablation": "optimal"}, "tracing_fit": {"task": "facts"}}
    runs |= {"lens_fit": {"task": "text", "lens": "oca"}}
    runs |= {"activations": {"task": "ioi"}, "lens_faithfulness": {"task": "text"}}
    script = f"""
import importlib, sys
from pathlib import Path
from oacore.config.run import Config
from oacore.runner import run_stage
for stage in {wanted!r}:
    importlib.import_module(f"oacore.stages.{{stage}}")
values = {own_copy.model_dump(mode="json")!r}
config = Config(**values)
for stage, what in {runs!r}.items():
    run_stage(stage, config, **what)
print(sorted({{"transformers", "transformer_lens", "matplotlib.pyplot"}} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"
