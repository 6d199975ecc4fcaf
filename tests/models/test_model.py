"""Loading, the parity gate and refusals."""

import json
import time
from dataclasses import replace

import pytest
import torch
from conftest import GATED, random_hf

from oacore.config.read import parse_config
from oacore.engine.clean import Batch
from oacore.engine.forward import logits_of, residual_after
from oacore.engine.masked import Engine
from oacore.engine.parity import check_parity, hugging_face_logits, open_model, parity_prompts
from oacore.errors import UserError
from oacore.models import hub
from oacore.models.hub import load_hugging_face
from oacore.models.load import canonical, load, pick_device, pick_precision, set_precision
from oacore.models.weights import to_device, weight_hash
from oacore.stages.model import check_depth


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model directory with a tokenizer."""
    from oacore.models.demo import make_tokenizer

    path = tmp_path_factory.mktemp("model") / "tiny-llama"
    random_hf("llama").save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def test_open_model_passes_the_gate(directory):
    loaded, parity = open_model(directory, device="cpu")
    assert loaded.model.family == "llama"
    assert parity.max_abs_log_prob < 1e-5
    assert parity.n_prompts == 4
    assert (loaded.model.n_layers, loaded.model.n_heads, loaded.model.n_kv_heads, loaded.model.d_head) == (3, 4, 2, 8)
    assert loaded.model.graph.n_kv_heads == 2
    assert load(directory, device="cpu").weight_hash == loaded.weight_hash


def test_bf16_passes_its_gate_and_has_another_hash(directory):
    loaded, parity = open_model(directory, dtype="bf16", device="cpu")
    assert loaded.model.dtype == torch.bfloat16
    assert parity.max_abs_log_prob < 0.1
    assert loaded.weight_hash != load(directory, device="cpu").weight_hash


def test_a_block_of_another_form_is_refused():
    import transformers as tf

    hf = tf.AutoModelForCausalLM.from_config(tf.OlmoConfig(**GATED))
    with pytest.raises(UserError, match=r"a olmo of another form than is read here \(.*no attribute 'weight'\)"):
        canonical(hf)


def test_attention_without_biases_where_the_bridge_wants_them():
    hf = random_hf("neox-unbiased")
    tokens, lengths = parity_prompts(97, 64)
    expected = hugging_face_logits(hf, tokens, lengths)
    model = canonical(hf)
    assert check_parity(model, tokens, lengths, expected, 1e-3).max_abs_log_prob < 1e-4
    assert not any(bias.any() for block in model.blocks for bias in (block.b_Q, block.b_K, block.b_V))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "neox-parallel"])
def test_gate_refuses_a_model_that_we_compute_wrongly(family):
    hf = random_hf(family)
    tokens, lengths = parity_prompts(97, 64)
    expected = hugging_face_logits(hf, tokens, lengths)
    model = canonical(hf)
    assert check_parity(model, tokens, lengths, expected, 1e-3).max_abs_log_prob < 1e-4
    wrong = replace(model, blocks=(replace(model.blocks[0], attention_scale=1.0), *model.blocks[1:]))
    with pytest.raises(UserError, match=r"differs from Hugging Face's by [\d.e-]+ nats \(allowed: 0.001\)"):
        check_parity(wrong, tokens, lengths, expected, 1e-3)
    with pytest.raises(UserError, match="differs"):
        check_parity(model, tokens, lengths, expected * float("nan"), 1e-3)


def test_weight_hash_sees_one_changed_weight_and_scalars():
    model = canonical(random_hf("gemma2"))
    changed = model.blocks[1].W_in.clone()
    changed[0, 0] += 1e-3
    blocks = (model.blocks[0], replace(model.blocks[1], W_in=changed), model.blocks[2])
    windows = (replace(model.blocks[0], window=7), *model.blocks[1:])
    hashes = {
        weight_hash(model),
        weight_hash(replace(model, blocks=blocks)),
        weight_hash(replace(model, blocks=windows)),
    }
    assert len(hashes) == 3
    assert weight_hash(model) == weight_hash(canonical(random_hf("gemma2")))


def refused(source, *parts):
    start = time.perf_counter()
    with pytest.raises(UserError) as caught:
        load_hugging_face(source)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message
    return time.perf_counter() - start


def test_missing_directory():
    refused("./no/such/model", "'./no/such/model' is not a directory", "allowed")


def test_directory_without_config(tmp_path):
    refused(tmp_path, "no readable config.json")


def test_unsupported_architecture(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gptj"}))
    refused(
        tmp_path,
        "architecture 'gptj'",
        "gpt2, gpt_neox, llama, mistral, phi3, qwen2, qwen3, gemma2, gemma3_text, olmo2",
    )


def test_damaged_weights(tmp_path):
    random_hf("gpt2").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(tmp_path, "can't be loaded", "complete model directory")


def test_unreachable_hub_fails_at_once_when_offline():
    refused("no-such-owner/no-such-model", "'no-such-owner/no-such-model'", "can't be loaded", "reachable hub")


def test_unreachable_hub_fails_quickly(monkeypatch):
    """The hub's own client would retry for 23-46 s."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    hub._hub_answers.cache_clear()
    asked = []
    monkeypatch.setattr(hub.urllib.request, "urlopen", lambda request, timeout: asked.append(timeout) or _refuse())
    refused("no-such-owner/no-such-model", "can't be loaded", "reachable hub")
    assert asked == [hub.HUB_TIMEOUT], "asked once, with a time limit"
    hub._hub_answers.cache_clear()


def _refuse():
    raise OSError("no route")


def test_cuda_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device: 'cuda'"):
        pick_device("cuda")
    assert pick_device("auto").type == "cpu"


def test_tied_weights_stay_tied_on_another_device():
    model = canonical(random_hf("gpt2"))
    assert model.W_U.data_ptr() == model.W_E.data_ptr()
    moved = to_device(model, "meta")
    assert moved.W_U is moved.W_E and moved.blocks[0].W_in is not moved.blocks[1].W_in
    assert weight_hash(to_device(model, "cpu")) == weight_hash(model)


@pytest.mark.parametrize("absent", [("k_proj",), ("q_proj", "k_proj"), ("v_proj",)])
def test_biases_of_some_projections_alone(absent):
    """Nobody's `config.json` can say so, but a Hugging Face module can: the gate passes and circuits run."""
    hf = random_hf("llama-linear")  # with attention biases
    for layer in hf.model.layers:
        for name in absent:
            getattr(layer.self_attn, name).bias = None
    tokens, lengths = parity_prompts(97, 64)
    expected = hugging_face_logits(hf, tokens, lengths)
    model = canonical(hf)
    assert check_parity(model, tokens, lengths, expected, 1e-3).max_abs_log_prob < 1e-5
    engine, batch = Engine(model), Batch(tokens[:2, :9], torch.tensor([9, 7]))
    masks = (~engine.no_edge).float()[None]
    constants = torch.zeros(1, model.graph.n_sources, 1, model.d_model)
    logits = engine.logits(engine.prompts(batch), torch.arange(2), masks, constants)
    wanted = logits_of(model, residual_after(model, batch.tokens))[torch.arange(2), batch.lengths - 1]
    assert torch.allclose(logits, wanted, atol=1e-4)


def test_precision_is_a_gpus_matter(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert {pick_precision(asked, cpu) for asked in ("auto", "ieee", "tf32")} == {"ieee"}
    assert [pick_precision(asked, gpu) for asked in ("auto", "ieee", "tf32")] == ["tf32", "ieee", "tf32"]
    asked = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    for device, precision in ((cpu, "tf32"), (gpu, "auto"), (gpu, "ieee")):
        set_precision(precision, device)
    assert asked == ["high", "highest"]


def test_weights_that_are_not_finite_are_named():
    hf = random_hf("gpt2")
    tokens, lengths = parity_prompts(97, 64)
    with torch.no_grad():
        hf.transformer.h[1].mlp.c_fc.weight[0, 0] = float("nan")
    expected = hugging_face_logits(hf, tokens, lengths)
    with pytest.raises(UserError, match=r"model: not finite: blocks.1.W_in; allowed: finite weights"):
        check_parity(canonical(hf), tokens, lengths, expected, 1e-3)


def test_a_directory_without_a_tokenizer_is_refused(directory, tmp_path):
    for path in directory.iterdir():
        if not path.name.startswith("tokenizer"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"has no tokenizer, .* would invent one; allowed: .*tokenizer.json"):
        hub.load_tokenizer(tmp_path)
    assert hub.load_tokenizer(directory).bos_token_id is not None


LENSED = {"model": "demo", "tasks": {"text": {"n_tokens": 11}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lenses": {"faithfulness": {"layers": [1, 4, 5]}}}, r"lenses.faithfulness.layers: 4, 5; allowed: 0 to 3"),
        ({"lenses": {"lengths": [8, 65]}}, r"lenses.lengths: 65; allowed: up to 64, the model's context"),
        ({"tasks": {"text": {"n_tokens": 65}}}, r"tasks.text.n_tokens: 65; allowed: up to 64, the model's context"),
    ],
)
def test_what_the_model_has_not_is_refused_before_any_fit(changes, message):
    check_depth(parse_config(LENSED), 4, 64)
    with pytest.raises(UserError, match=message):
        check_depth(parse_config(LENSED | changes), 4, 64)
