"""Lenses against TransformerLens hooks, plain formulas and models on which the truth is known; fits from the cache
alone.
"""

from dataclasses import replace

import pytest
import torch
from conftest import BRIDGED, random_hf
from recorded import launching, replaying

import oacore.engine.forward
from oacore.config.lenses import LENSES, Lenses, LensFit
from oacore.engine.activations import write_activations, write_every_position
from oacore.engine.clean import Batch
from oacore.engine.forward import final_norm, last_residual_from, logits_of, residual_after, unembed
from oacore.errors import UserError
from oacore.fits.descent import sgd_step
from oacore.fits.resume import Resumable
from oacore.lenses import kl
from oacore.lenses.affine import GradientLens, model_jacobian
from oacore.lenses.constant import OptimalConstants, from_all_starts
from oacore.lenses.evaluate import lens_losses
from oacore.lenses.fit import fit_lens, item_of, load_lens, save_lens
from oacore.lenses.kl import unembedded_kl
from oacore.lenses.lens import LensSources
from oacore.lenses.rows import LensRows, RowCache, rows_of
from oacore.metrics import kl_divergence
from oacore.models.load import canonical
from oacore.store.provenance import Provenance
from oacore.tasks.prompts import build

SHORT = LensFit(batch_size=16, first_round=4, max_steps=60)


def some_batch(n=6, length=9, seed=0):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, length + 1, (n,), generator=draw)
    lengths[0] = length
    return Batch(torch.randint(1, 97, (n, length), generator=draw), lengths)


def prompts_of(n, seed):
    batch = some_batch(n, seed=seed)
    rows = [tokens[:length] for tokens, length in zip(batch.tokens.tolist(), batch.lengths.tolist(), strict=True)]
    return build("text", "train", [""] * n, rows, rows, [[1]] * n, [[-1]] * n)


def sources(model, path, seed=0):
    settings = Lenses(grad_prompts=4)
    return LensSources(model, RowCache(path, Provenance()), some_batch(), settings, seed, 1000)


def unfitted(model, name, path):
    return LENSES[name].load().of_rows(name, sources(model, path))


def cached_rows(path, split, **required):
    return RowCache(path, Provenance(required)).read(split)


@pytest.fixture(scope="module")
def gpt2():
    return canonical(random_hf("gpt2", scale=0.5))  # wide weights: attention differs between prompts


@pytest.fixture(scope="module")
def cached(gpt2, tmp_path_factory):
    """A cache of 120 training, 40 validation and 40 test rows."""
    path = tmp_path_factory.mktemp("lens") / "activations.h5"
    splits = {
        split: prompts_of(n, seed)
        for seed, (split, n) in enumerate({"train": 120, "validation": 40, "test": 40}.items())
    }
    write_activations(path, gpt2, splits, Provenance({"model_hash": "gpt2"}))
    return path


@pytest.mark.parametrize("name", [name for name in BRIDGED if not name.startswith("llama-")])
def test_oca_is_the_bridge_with_constant_attention(name):
    """The bridge's attention outputs become constants from layer l on; only the last position's residual goes in, as in
    the lens.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    hf = random_hf(name)
    model, batch = canonical(random_hf(name)), some_batch(3)
    bridge = build_bridge_from_module(hf, type(hf).__name__, hf_config=hf.config, tokenizer=None)
    constants = torch.randn(3, 3, model.d_model, generator=torch.Generator().manual_seed(1)) * 0.5
    oca, last = OptimalConstants("oca", "", model, {"constants": constants}), (torch.arange(3), batch.lengths - 1)
    finals = []
    with torch.no_grad():
        for start in range(3):
            hooks = [
                (
                    f"blocks.{i}.hook_attn_out",
                    lambda value, hook, i=i, start=start: constants[start, i].expand_as(value).clone(),
                )
                for i in range(start, 3)
            ]
            expected = bridge.run_with_hooks(batch.tokens, fwd_hooks=hooks, return_type="logits")[last].log_softmax(-1)
            residual = residual_after(model, batch.tokens, start)[last]
            assert (oca.logits(residual, start).log_softmax(-1) - expected).abs().max() < 1e-4
            finals.append(oca.final(residual, start))
        entering = torch.stack([residual_after(model, batch.tokens, start)[last] for start in range(3)])
        assert torch.allclose(
            from_all_starts(model, entering, range(3), constants), torch.stack(finals), rtol=1e-4, atol=1e-5
        )
        some = from_all_starts(model, entering[[0, 2]], [0, 2], constants[[0, 2]])
        assert torch.allclose(some, torch.stack([finals[0], finals[2]]), rtol=1e-4, atol=1e-5)


def test_without_anything_that_attention_reads_mean_and_oca_are_the_model(tmp_path):
    """Values that are constant make attention constant: its mean is no approximation, at any layer."""
    model = canonical(random_hf("gpt2"))
    blocks = tuple(replace(block, W_V=torch.zeros_like(block.W_V)) for block in model.blocks)
    model = replace(model, blocks=blocks)
    write_activations(
        tmp_path / "a.h5", model, {split: prompts_of(20, 3) for split in ("train", "validation", "test")}, Provenance()
    )
    rows = cached_rows(tmp_path / "a.h5", "test")
    kl, agree = lens_losses(unfitted(model, "mean", tmp_path / "a.h5"), rows, 7)
    assert kl.abs().max() < 1e-5 and agree.all()
    kl, _ = lens_losses(unfitted(model, "resample", tmp_path / "a.h5"), rows, 7)
    assert kl.abs().max() < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "llama"])
@pytest.mark.parametrize("elements", [97, 400, 10**6])
def test_unembedded_kl_and_its_gradient_in_chunks(name, elements, monkeypatch):
    """Against the formula on all logits at once, with a logit softcap too; no tensor of logits is larger than asked
    for.
    """
    model, draw = canonical(random_hf(name)), torch.Generator().manual_seed(0)
    normed, target = torch.randn(3, 5, model.d_model, generator=draw), torch.randn(5, model.d_model, generator=draw)
    many = torch.randn(3, 5, model.d_model, generator=draw)
    monkeypatch.setattr(kl, "CHUNK_ELEMENTS", elements)
    largest = []
    monkeypatch.setattr(
        kl, "unembed", lambda model, x: largest.append(x[..., 0].numel() * model.d_vocab) or unembed(model, x)
    )
    for goal in (target, many):
        leaf, plain = normed.clone().requires_grad_(), normed.clone().requires_grad_()
        weights = torch.rand(3, 5, generator=draw)
        found = unembedded_kl(model, leaf, goal)
        expected = kl_divergence(unembed(model, goal).log_softmax(-1), unembed(model, plain))
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)
        (found * weights).sum().backward()
        (expected * weights).sum().backward()
        assert torch.allclose(leaf.grad, plain.grad, rtol=1e-3, atol=1e-5)
    assert max(largest) <= max(elements, 97)


def test_every_lens_is_the_model_after_all_blocks(gpt2, cached):
    batch = some_batch()
    residual = residual_after(gpt2, batch.tokens)
    for name in ("logit", "mean", "resample"):
        assert torch.equal(unfitted(gpt2, name, cached).logits(residual, 3), logits_of(gpt2, residual))


def test_cached_rows_are_the_models(gpt2, cached):
    prompts = prompts_of(40, 2)
    batch = Batch(torch.from_numpy(prompts.tokens).long(), torch.from_numpy(prompts.lengths).long())
    cache, fresh = cached_rows(cached, "test", model_hash="gpt2"), rows_of(gpt2, batch)
    for name in ("residual", "attention", "target"):
        assert torch.allclose(getattr(cache, name), getattr(fresh, name), atol=1e-5), name
    # From what enters the last layer and what attention wrote there, the MLP alone gives what the unembedding reads.
    middle = cache.residual[:, 2] + cache.attention[:, 2]
    assert torch.allclose(
        final_norm(gpt2, middle + oacore.engine.forward.mlp(gpt2, 2, middle)), cache.target, atol=1e-4
    )
    with pytest.raises(UserError, match="model_hash"):
        cached_rows(cached, "test", model_hash="another")


def test_rows_in_batches_and_joined_are_the_rows(cached):
    rows = cached_rows(cached, "test")
    parts = list(rows.in_batches(7))
    assert [len(part) for part in parts] == [7, 7, 7, 7, 7, 5]
    for name in ("residual", "attention", "target"):
        assert torch.equal(getattr(LensRows.joined(parts), name), getattr(rows, name))


def test_rows_of_every_position(gpt2, tmp_path):
    prompts = prompts_of(5, 4)
    write_every_position(tmp_path / "all.h5", gpt2, {"train": prompts}, Provenance(), tokens_per_batch=18)
    rows = cached_rows(tmp_path / "all.h5", "train")
    row = 0
    for tokens, length in zip(prompts.tokens, prompts.lengths, strict=True):
        for end in range(2, length + 1):  # the last position of every prefix but BOS alone
            one = rows_of(gpt2, Batch(torch.from_numpy(tokens[None, :end]).long(), torch.tensor([end])))
            for name in ("residual", "attention", "target"):
                assert torch.allclose(getattr(rows, name)[row], getattr(one, name)[0], rtol=1e-3, atol=1e-3), (
                    row,
                    name,
                )
            row += 1
    assert row == len(rows.target) == int((prompts.lengths - 1).sum())


def test_batches_of_a_step_do_not_depend_on_where_one_starts(cached):
    cache = RowCache(cached, Provenance())
    with cache.shuffled(50, 3) as stream:
        steps = [stream.at(step).target for step in range(7)]
    assert [len(step) for step in steps] == [50, 50, 20, 50, 50, 20, 50]
    epoch = torch.cat(steps[:3])
    assert torch.equal(epoch.sort(0).values, cached_rows(cached, "train").target.sort(0).values)
    assert not torch.equal(steps[0], steps[3])
    for start in (1, 3, 5):
        with cache.shuffled(50, 3) as again:
            for step in (start, start + 1):
                assert torch.equal(again.at(step).target, steps[step])


KINDS = [("oca", ""), ("oca_shared", ""), ("tuned", "identity"), ("tuned", "random"), ("linear_oca", ""), ("grad", "")]


def fitted(model, path, name, init, **options):
    teacher = unfitted(model, "mean", path) if name == "linear_oca" else None
    return fit_lens(LENSES[name], init, sources(model, path, 1), SHORT, teacher=teacher, **options)


@pytest.mark.parametrize(("name", "init"), KINDS)
def test_a_gpu_replays_the_steps_of_a_fit(gpt2, cached, name, init):
    """Here recorded on the CPU; the last batch of an epoch is shorter, and takes a graph of its own."""
    plain, _ = fitted(gpt2, cached, name, init)
    with replaying() as captured:
        ours, descent = fitted(gpt2, cached, name, init)
    assert len(captured) > len(descent.curve_steps) - 1
    with launching():
        theirs, _ = fitted(gpt2, cached, name, init)
    for key, value in ours.values.items():
        assert torch.equal(value, theirs.values[key])
        torch.testing.assert_close(value, plain.values[key], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("name", "init"), KINDS)
def test_fits_lower_the_loss_resume_bit_by_bit_and_never_attend(gpt2, cached, tmp_path, monkeypatch, name, init):
    whole, record = fitted(gpt2, cached, name, init)
    assert (record.best_loss <= record.curve_losses[0]).all() and (record.best_loss < record.curve_losses[0]).any()
    held_out = cached_rows(cached, "validation")
    if name != "linear_oca":  # whose loss is against its teacher
        kl = lens_losses(whole, held_out, 40)[0].mean(1)
        expected = kl.mean(0, keepdim=True) if name == "oca_shared" else kl
        assert torch.allclose(expected, record.best_loss, rtol=1e-4, atol=1e-5)
    start = {"oca": "mean", "oca_shared": "mean", "tuned": "logit"}.get(name)
    if start and init != "random":
        begun = lens_losses(unfitted(gpt2, start, cached), held_out, 40)[0].mean(1)
        assert torch.allclose(
            begun.mean(0, keepdim=True) if name == "oca_shared" else begun, record.curve_losses[0], rtol=1e-4
        )

    class KilledError(Exception):
        pass

    tests = []

    def kill():
        tests.append(1)
        if len(tests) == 3:
            raise KilledError

    resumable = Resumable(tmp_path / "checkpoint.safetensors", "a")
    with pytest.raises(KilledError):
        fitted(gpt2, cached, name, init, resumable=resumable, on_test=kill)
    assert resumable.path.exists()
    if name != "grad":  # whose Jacobian runs the model

        def attends(*_, **__):
            raise AssertionError("a fit ran attention")

        monkeypatch.setattr(oacore.engine.forward, "heads", attends)
        monkeypatch.setattr(oacore.engine.forward, "attend", attends)
    resumed, _ = fitted(gpt2, cached, name, init, resumable=resumable)
    assert all(torch.equal(resumed.values[key], value) for key, value in whole.values.items())


def test_the_official_step_is_torchs():
    draw = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(4, 3, generator=draw)) for _ in range(2)]
    value, momentum = torch.stack([p.detach().clone() for p in parameters]), torch.zeros(2, 4, 3)
    optimisers = [torch.optim.SGD([p], lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3) for p in parameters]
    for step in range(5):
        gradient = torch.randn(2, 4, 3, generator=draw) * (0.1 if step % 2 else 3)
        for p, optimiser, g in zip(parameters, optimisers, gradient, strict=True):
            p.grad = g.clone()
            torch.nn.utils.clip_grad_norm_([p], 1.0)
            optimiser.step()
        value, momentum = sgd_step(value, momentum, gradient, torch.tensor(0.1))
    assert torch.allclose(value, torch.stack([p.detach() for p in parameters]), rtol=1e-5, atol=1e-6)


def test_model_jacobian_by_finite_differences():
    model, batch = canonical(random_hf("llama").double()), some_batch(4)
    found = model_jacobian(model, batch, 18)
    rows, step = torch.arange(4), 1e-5
    for layer in range(3):
        entering = residual_after(model, batch.tokens, layer)
        direction = torch.randn(model.d_model, generator=torch.Generator().manual_seed(layer), dtype=torch.float64)
        ends = []
        for sign in (1, -1):
            moved = entering.clone()
            moved[rows, batch.lengths - 1] += sign * step * direction
            ends.append(last_residual_from(model, layer, moved, batch.lengths - 1))
        slope = ((ends[0] - ends[1]) / (2 * step)).mean(0)
        assert torch.allclose(direction @ found[layer].double(), slope, rtol=1e-4, atol=1e-6)


def test_grad_starts_at_the_mean(gpt2, cached):
    """A residual at the mean of the rows goes where the rows go on average, from every layer, before the bias is
    fitted.
    """
    rows = cached_rows(cached, "validation")
    problem = GradientLens.problem("grad", "", sources(gpt2, cached), rows)
    found = problem.final(problem.start, range(3), rows.residual.mean(0)[:, None])[:, 0]
    middle = rows.residual[:, 2] + rows.attention[:, 2]
    after = (middle + oacore.engine.forward.mlp(gpt2, 2, middle)).mean(0)
    assert torch.allclose(found, after.expand(3, -1), atol=1e-4)


def test_saved_lenses_come_back_for_their_model_only(gpt2, cached, tmp_path):
    lens, record = fitted(gpt2, cached, "tuned", "identity")
    path, provenance = tmp_path / "tuned.safetensors", Provenance({"model_hash": "a", "prompts_hash": {"train": "x"}})
    save_lens(path, LENSES["tuned"], "identity", gpt2.n_layers, item_of(lens, record), provenance)
    again = load_lens(path, "tuned", "identity", gpt2, provenance)
    assert (type(again), again.name, again.init) == (type(lens), "tuned", "identity")
    assert all(torch.equal(again.values[key], value) for key, value in lens.values.items())
    with pytest.raises(UserError, match=r"tuned.safetensors: model_hash is 'a', expected 'b'"):
        load_lens(path, "tuned", "identity", gpt2, Provenance({"model_hash": "b"}))
    (tmp_path / "broken.safetensors").write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"broken.safetensors: can't be read as safetensors"):
        load_lens(tmp_path / "broken.safetensors", "tuned", "identity", gpt2, Provenance())


def test_losses_do_not_depend_on_batches(gpt2, cached):
    rows = cached_rows(cached, "test")
    for name in ("logit", "mean", "resample"):
        lens = unfitted(gpt2, name, cached)
        one, other = lens_losses(lens, rows, 40), lens_losses(lens, rows, 7)
        assert torch.allclose(one[0], other[0], rtol=1e-4, atol=1e-6) and torch.equal(one[1], other[1])


def test_resample_takes_other_prompts_attention(gpt2, cached):
    lens, rows = unfitted(gpt2, "resample", cached), cached_rows(cached, "train")
    bank = {tuple(row.flatten().tolist()) for row in rows.attention}
    assert {tuple(row.flatten().tolist()) for row in lens.values["constants"]} == bank and len(bank) == 120
    x = rows.residual[:2, 2]
    middle = x + lens.values["constants"][:2, 2]
    assert torch.allclose(lens.final(x, 2), middle + oacore.engine.forward.mlp(gpt2, 2, middle))


@pytest.mark.parametrize("name", LENSES)
def test_every_lens_on_bf16_weights(tmp_path, name):
    """What is fitted stays in fp32; residuals come from the cache in bf16."""
    model = canonical(random_hf("llama").bfloat16())
    splits = {
        split: prompts_of(n, seed) for seed, (split, n) in enumerate({"train": 24, "validation": 8, "test": 8}.items())
    }
    path = tmp_path / "activations.h5"
    write_activations(path, model, splits, Provenance({"model_hash": "m"}))
    settings = SHORT.model_copy(update={"max_steps": 4})
    row, of_rows = LENSES[name], sources(model, path)
    if not row.fit:
        lens = unfitted(model, name, path)
    else:
        teacher = fit_lens(LENSES[row.teacher], "", of_rows, settings)[0] if row.teacher else None
        lens, descent = fit_lens(row, row.inits[0] if row.inits else "", of_rows, settings, teacher=teacher)
        assert descent.best.dtype == torch.float32
    kl, agree = lens_losses(lens, cached_rows(path, "test"), 4)
    assert kl.shape == agree.shape == (model.n_layers, 8)
    assert kl.dtype == torch.float32 and kl.isfinite().all()
