"""A model of one's own class as a directory: the same model to the bit, gated by its own forward pass, refused where
the engine has no such form.
"""

import shutil
from dataclasses import replace

import pytest
import torch
from conftest import random_hf

import oacore as oa
from oacore.config.model import REGISTERED_FILE
from oacore.config.read import parse_config
from oacore.engine.forward import logits_of, residual_after
from oacore.engine.parity import open_model
from oacore.errors import UserError
from oacore.estimate.sizes import known_sizes
from oacore.models.hub import load_tokenizer
from oacore.models.load import canonical, load
from oacore.models.registered import GATE, word_tokenizer
from oacore.models.weights import Norm, weight_hash
from oacore.store.layout import WEIGHTS, Layout

WORDS = ["<bos>", *(f"w{number}" for number in range(1, 97))]


def model_of(name):
    """(canonical weights, Hugging Face's forward pass) of the first 12 positions."""
    hf, read = random_hf(name), random_hf(name)
    return replace(canonical(read), max_length=12), lambda tokens: hf(input_ids=tokens).logits


@pytest.fixture(scope="module", params=["gpt2-bare", "gemma3"])
def registered(request, tmp_path_factory):
    """(directory, canonical weights): without norms, and with all that there is."""
    model, logits = model_of(request.param)
    return oa.register(tmp_path_factory.mktemp("own") / "my-model", model, WORDS, logits), model


def test_it_is_the_model_that_was_registered(registered):
    folder, model = registered
    loaded, parity = open_model(folder, device="cpu")
    tokens = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    ours, theirs = (logits_of(each, residual_after(each, tokens)) for each in (loaded.model, model))
    assert torch.equal(ours, theirs)
    assert loaded.weight_hash == weight_hash(replace(model, family="registered"))
    assert parity.of == "its own forward pass" and parity.max_abs_log_prob < 1e-4
    assert parity.longest == 12, "the gate sees the whole context"


def test_bf16_passes_the_gate_with_angles_in_fp32(registered):
    folder, model = registered
    loaded, parity = open_model(folder, dtype="bf16", device="cpu")
    assert loaded.model.dtype == torch.bfloat16 and 1e-4 < parity.max_abs_log_prob < 0.5
    assert model.rotary is None or torch.equal(loaded.model.rotary.frequencies, model.rotary.frequencies)
    assert load(folder, dtype="bf16", device="cpu").weight_hash == loaded.weight_hash


def test_words_are_tokens(registered):
    tokenizer = load_tokenizer(registered[0])
    assert tokenizer("w3  w96", add_special_tokens=False)["input_ids"] == [3, 96]
    assert tokenizer.bos_token_id == 0 and tokenizer.decode([5, 6]) == "w5 w6"
    with pytest.raises(UserError, match=r"tokenizer: the words \['a', 'b c'\]; allowed: each once, and without blanks"):
        word_tokenizer(["<bos>", "a", "b c", "a"])


def test_the_estimate_knows_its_sizes(registered):
    folder, model = registered
    sizes = known_sizes(parse_config({"model": folder, "tasks": {"ioi": {}}}))
    assert sizes.graph == model.graph and sizes.rms == (not model.centred)
    assert (sizes.d_vocab, sizes.d_head, sizes.gated) == (97, model.d_head, model.blocks[0].W_gate is not None)


def test_other_weights_are_another_model_and_the_same_ones_the_same(tmp_path):
    model, logits = model_of("gpt2-bare")

    def folder():
        return Layout(parse_config({"model": str(tmp_path / "own"), "tasks": {"ioi": {}}})).model_dir

    def register(scale):
        changed = replace(model, W_E=model.W_E * scale, W_pos=model.W_pos * scale, b_U=torch.zeros(97))
        own = {True: logits, False: lambda tokens: logits_of(changed, residual_after(changed, tokens))}[scale == 1]
        oa.register(tmp_path / "own", changed, WORDS, own)
        return folder()

    first = register(1)
    assert register(1) == first
    assert register(1.5) != first


@pytest.mark.parametrize("file", [WEIGHTS, GATE, REGISTERED_FILE])
def test_an_edited_file_is_refused(registered, tmp_path, file):
    shutil.copytree(registered[0], tmp_path / "edited")
    path = tmp_path / "edited" / file
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{file}.*(damaged|read)"):
        open_model(tmp_path / "edited", device="cpu")


def test_another_forward_pass_is_refused_and_nothing_is_written(tmp_path):
    model, logits = model_of("gpt2-bare")
    wrong = replace(model, blocks=(replace(model.blocks[0], attention_scale=1.0), *model.blocks[1:]))
    with pytest.raises(UserError, match=r"differs from its own forward pass's by [\d.e+-]+ nats"):
        oa.register(tmp_path / "own", wrong, WORDS, logits)
    with pytest.raises(UserError, match=r"logits gives \[12, 97\] of tokens \[1, 12\]; allowed: a tensor \[1, 12, V\]"):
        oa.register(tmp_path / "own", model, WORDS, lambda tokens: logits(tokens)[0])
    assert not list(tmp_path.iterdir())
    (tmp_path / "own").mkdir()
    with pytest.raises(UserError, match="own' exists; allowed: a new directory, or one that was registered"):
        oa.register(tmp_path / "own", model, WORDS, logits)


def test_forward_passes_are_asked_for_prompts_without_padding(tmp_path):
    """One that looks at what comes after is no decoder, and the gate sees it."""
    model, logits = model_of("gpt2-bare")
    asked = []
    oa.register(tmp_path / "own", model, WORDS, lambda tokens: asked.append(tokens.shape[1]) or logits(tokens))
    assert asked == [12, 6, 4, 2]


LAYER_NORM = Norm(torch.ones(32), torch.zeros(32), 1e-5, rms=False)


@pytest.mark.parametrize(
    ("of_model", "of_block", "message"),
    [
        ({"W_U": torch.zeros(32, 97)}, {}, r"W_U has the shape \[32, 97\]; allowed: \[V = 97, d = 32\]"),
        ({"max_length": 65}, {}, "max_length 65; allowed: 2 to 64, the positions"),
        ({"activation": "swish"}, {}, "activation 'swish'; allowed: gelu, gelu_new"),
        ({"blocks": ()}, {}, "no blocks; allowed: one or more"),
        ({"final_norm": LAYER_NORM}, {}, "LayerNorm before some of what reads .*allowed: before all, or none"),
        ({}, {"W_Q": torch.zeros(32, 32)}, r"blocks.2.W_Q has the shape \[32, 32\]; allowed: \[d = 32, H = 4, k = 8\]"),
        (
            {},
            {"W_O": torch.zeros(4, 8, 32, dtype=torch.int)},
            "blocks.2.W_O is of torch.int32; allowed: floating point",
        ),
        ({}, {"b_K": None}, "blocks.2: biases of some of Q, K and V; allowed: of all, or of none"),
        ({}, {"mlp_post_norm": LAYER_NORM}, "blocks.2: a post-norm; allowed: RMSNorm without a bias"),
        ({}, {"mlp_post_norm": replace(LAYER_NORM, bias=None, rms=True)}, "post-norms of some .*; allowed: of all, or"),
        ({}, {"query_norm": LAYER_NORM}, r"blocks.2.query_norm.weight has the shape \[32\]; allowed: \[k = 8\]"),
    ],
)
def test_what_the_engine_does_not_compute_is_named(tmp_path, of_model, of_block, message):
    model, logits = model_of("gpt2-bare")
    blocks = (*model.blocks[:2], replace(model.blocks[2], **of_block))
    with pytest.raises(UserError, match=f"register: {message}"):
        oa.register(tmp_path / "own", replace(model, **({"blocks": blocks} | of_model)), WORDS, logits)


def test_queries_in_groups_of_different_sizes_are_refused(tmp_path):
    model, logits = model_of("gpt2-bare")
    three = {name: getattr(model.blocks[0], name)[:, :3] for name in ("W_K", "W_V")}
    three |= {name: getattr(model.blocks[0], name)[:3] for name in ("b_K", "b_V")}
    with pytest.raises(UserError, match=r"blocks.0: 4 heads for 3 keys; allowed: a multiple of the keys"):
        oa.register(tmp_path / "own", replace(model, blocks=(replace(model.blocks[0], **three),)), WORDS, logits)
