"""Mask learning: the samplers' distributions and gradients, sweeps against single fits, resumption, limits."""

import os

import numpy as np
import oakernels.constants
import pytest
import torch
from conftest import FAMILIES, random_hf
from scipy import stats

from oacore.circuits import evaluate
from oacore.circuits import learn as learning
from oacore.circuits.circuit import by_threshold
from oacore.circuits.constants import constant_scales
from oacore.circuits.edges import Edges
from oacore.circuits.evaluate import circuit_losses, refit_constants
from oacore.circuits.hcgs import HardConcreteSampler
from oacore.circuits.learn import learn
from oacore.circuits.numbers import PASS_BYTES_ON_CPU, PASS_SHARE
from oacore.circuits.passes import Examples, Passes, pass_bytes
from oacore.circuits.replacements import Replacements, TrainingPrompts, starting_constants
from oacore.circuits.search import Knob
from oacore.circuits.topk import TopKSampler, budgeted
from oacore.circuits.ugs import UniformSampler
from oacore.config.circuits import MaskFit, Refit
from oacore.config.run import Limits
from oacore.engine.activations import _add_sources
from oacore.engine.clean import Batch, clean_pass
from oacore.engine.forward import at, final_norm
from oacore.engine.masked import Engine
from oacore.engine.statistics import Moments, Statistics
from oacore.errors import UserError
from oacore.fits.resume import Resumable
from oacore.models.graph import Graph
from oacore.models.load import canonical

SETTINGS = MaskFit(n_steps=4, n_samples=2, n_prompts=3, record_every=2)


class Setting:
    """A random model, its statistics and prompts."""

    def __init__(self, name="gpt2", n=8, scale=0.15, dtype=torch.float32):
        self.model = canonical(random_hf(name, scale).to(dtype))
        self.engine = Engine(self.model)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(1, self.model.d_vocab, (2, n, 9), generator=generator)
        tokens[:, :, 0] = 0
        lengths = torch.full((n,), 9) - torch.arange(n) % 2
        self.batch, self.other = Batch(tokens[0], lengths), Batch(tokens[1], lengths)
        clean, cf = (clean_pass(self.model, part.tokens, lengths) for part in (self.batch, self.other))
        moments = Moments(int(lengths.min()))
        _add_sources(moments, clean, lengths)
        _add_sources(moments, cf, lengths, "cf_")
        d, L, H, k = self.model.d_model, self.model.n_layers, self.model.n_heads, self.model.d_head
        shapes = {"input": (d,), "head": (L, H, k), "mlp": (L, d)}
        self.statistics = Statistics(
            moments.shortest,
            {name: moments.mean(f"{name}/mean", shape) for name, shape in shapes.items()},
            {name: moments.std(name, shape) for name, shape in shapes.items()},
            {name: moments.positional(name, shape) for name, shape in shapes.items()},
            {name: moments.positional(f"cf_{name}", shape) for name, shape in shapes.items()},
        )
        final = final_norm(self.model, at(clean.entering[-1], clean.last))[:, 0]
        answers = torch.randint(0, self.model.d_vocab, (2, n, 1), generator=generator)
        self.examples = Examples(self.batch, self.other, self.engine.prompts(self.batch), final, answers[0], answers[1])
        self.scales = constant_scales(self.model, self.statistics)

    def passes(self, memory_gb=1.0):
        return Passes(self.engine, self.examples, memory_gb * 1e9)

    def replacements(self, ablation):
        start = starting_constants(ablation, TrainingPrompts(self.engine, self.statistics, self.batch, self.other))
        return Replacements(self.engine, ablation, self.examples, start, 0)

    def learn(self, sampler, knobs, ablation, weights=None, settings=SETTINGS, **options):
        weights = [knob.value for knob in knobs] if weights is None else weights
        trained = ablation == "optimal"
        replacements = self.replacements(ablation)
        return learn(
            sampler,
            knobs,
            weights,
            self.passes(),
            replacements,
            self.scales,
            "kl",
            settings,
            train_constants=trained,
            **options,
        )


@pytest.fixture(scope="module")
def setting():
    return Setting()


NOTHING = torch.empty(0)  # of the samplers without a schedule

# ---- Samplers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logit", [-2.0, 0.0, 1.0])
def test_ugs_masks_have_the_stated_distribution(logit):
    parameters = {"logit": torch.full((1, 1), logit)}
    alpha, theta = UniformSampler().sample(
        parameters, torch.rand(1, 40000, 1, generator=torch.Generator().manual_seed(3)), {}, NOTHING
    )
    alpha, theta = alpha.flatten().numpy(), float(theta)
    window = theta * (1 - theta)
    for share, wanted in (((alpha == 1).mean(), theta - window / 2), ((alpha == 0).mean(), 1 - theta - window / 2)):
        assert abs(share - wanted) < 4 * (wanted * (1 - wanted) / len(alpha)) ** 0.5
    inside = alpha[(alpha > 0) & (alpha < 1)]
    assert stats.kstest(inside, "uniform").pvalue > 1e-3


def test_a_dynamic_window_follows_the_gradient_noise():
    noise = torch.rand(1, 20000, 3, generator=torch.Generator().manual_seed(3))
    second = {"logit": torch.tensor([[0.0001, 1.0, 100.0]])}
    alpha, _ = UniformSampler(dynamic_window=True).sample({"logit": torch.zeros(1, 3)}, noise, second, NOTHING)
    share = ((alpha > 0) & (alpha < 1)).float().mean(1)[0]
    torch.testing.assert_close(share, 0.25 * torch.tensor([0.5, 0.5, 2.0]), atol=0.02, rtol=0)


def test_the_noisiest_edges_do_not_narrow_all_other_windows():
    """199 edges of spread 1 and 2 and one of a million: without the clip every other window would be halved."""
    spread = torch.where(torch.arange(200) < 100, 1.0, 2.0)
    spread[7] = 1e6
    noise = torch.rand(1, 4000, 200, generator=torch.Generator().manual_seed(3))
    sampler = UniformSampler(dynamic_window=True)
    alpha, _ = sampler.sample({"logit": torch.zeros(1, 200)}, noise, {"logit": spread.square()[None]}, NOTHING)
    share = ((alpha > 0) & (alpha < 1)).float().mean(1)[0]
    mean = (99 * 1 + 101 * 2) / 200
    assert share[8:100].mean() == pytest.approx(0.25 * 1 / mean, rel=0.02)
    assert share[100:].mean() == pytest.approx(0.25 * 2 / mean, rel=0.02)


def test_ugs_gradient_is_unbiased_on_a_multilinear_function():
    """E[L] of independent masks with means theta is L(theta), so its gradient is known; the estimate's mean must be
    within 4 SE.
    """
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(
        2, 2, 2, 2, generator=generator, dtype=torch.float64
    )  # of every product of four masks or their complements

    def loss(m):
        factors = [torch.stack((1 - m[..., i], m[..., i]), -1) for i in range(4)]
        return torch.einsum("...a,...b,...c,...d,abcd->...", *factors, weights)

    logit = torch.tensor([[0.5, -1.0, 1.0, 0.0]], dtype=torch.float64)
    theta = logit.sigmoid().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(theta[0]), theta)
    estimates = []
    for _ in range(400):
        own = logit.clone().requires_grad_()
        noise = torch.rand(1, 64, 4, generator=generator, dtype=torch.float64)
        alpha, _ = UniformSampler().sample({"logit": own}, noise, {}, NOTHING)
        loss(alpha[0]).mean().backward()
        slope = logit.sigmoid() * (1 - logit.sigmoid())
        estimates.append(own.grad / slope)
    estimates = torch.cat(estimates)
    error = (estimates.mean(0) - wanted[0]).abs()
    assert (error < 4 * estimates.std(0) / len(estimates) ** 0.5).all()


def test_hard_concrete_size_is_the_probability_of_a_mask_above_zero():
    parameters = {"location": torch.tensor([[-1.0, 0.0, 2.0]]), "temperature": torch.tensor([[0.3, 2 / 3, 1.0]])}
    alpha, size = HardConcreteSampler().sample(
        parameters, torch.rand(1, 40000, 3, generator=torch.Generator().manual_seed(1)), {}, NOTHING
    )
    share = (alpha > 0).float().mean(1)
    assert ((share - size).abs() < 4 * (size * (1 - size) / 40000).sqrt() + 1e-4).all()
    assert alpha.min() == 0 and alpha.max() == 1


def test_topk_probabilities_add_up_to_the_budget():
    logit = torch.randn(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    budget = torch.tensor([3.0, 20.0, 45.0], dtype=torch.float64)
    torch.testing.assert_close(budgeted(logit, budget).sum(1), budget, atol=1e-6, rtol=0)
    weights = torch.randn(3, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: (budgeted(x, budget) * weights).sum(1), logit, eps=1e-5, atol=1e-5)
    sampler = TopKSampler(budget)
    assert sampler.schedule(0.0, 50)[0].item() == pytest.approx(0.73 * 50, abs=1e-4)
    assert torch.equal(sampler.schedule(0.5, 50), budget), "reached half-way through the fit"
    assert sampler.schedule(0.25, 50)[0].item() == pytest.approx((0.73 * 50 * 3.0) ** 0.5)
    for share in (0.1, 0.3, 1.0):
        scheduled = sampler.schedule(share, 50)
        torch.testing.assert_close(
            sampler.probability({"logit": logit}, scheduled).sum(1), scheduled, atol=1e-6, rtol=0
        )
    assert torch.equal(scheduled, budget)
    torch.testing.assert_close(sampler.score({"logit": logit}).sum(1), budget.float().double(), atol=1e-4, rtol=0)


# ---- Edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", [Graph(2, 3, 3, False), Graph(3, 4, 2, False), Graph(2, 2, 2, True)])
def test_node_term_and_clip_by_loops(graph):
    edges = Edges.of(graph, torch.device("cpu"))
    theta = torch.rand(2, graph.n_edges, generator=torch.Generator().manual_seed(0))
    full = edges.full(theta)
    assert torch.equal(full != 0, torch.tensor(graph.valid).expand(2, -1, -1))
    n, wanted = graph.n_layers * graph.n_heads, torch.zeros(2)
    for layer in range(graph.n_layers):
        q, k, v = graph.qkv(layer)
        for head in range(graph.n_heads):
            group = head // graph.group_size
            shared = (full[:, k.start + group].sum(1) + full[:, v.start + group].sum(1)) / graph.group_size
            degree = full[:, :, graph.first_source(layer) + head].sum(1) + full[:, q.start + head].sum(1) + shared
            wanted += torch.tanh(2 * degree / n) * n / 2
    torch.testing.assert_close(edges.node_term(theta), wanted)
    gradient = torch.randn(2, graph.n_edges, generator=torch.Generator().manual_seed(1)) * 20
    clipped = edges.clip(gradient)
    kinds = {}
    for e, flat in enumerate(edges.index.tolist()):
        j, s = divmod(flat, graph.n_sources)
        kinds.setdefault((graph.destination_names[j][0] == "a", graph.source_names[s][0] == "a"), []).append(e)
    assert len(kinds) == 4
    for members in kinds.values():
        for fit in range(2):
            norm = gradient[fit, members].norm()
            torch.testing.assert_close(clipped[fit, members], gradient[fit, members] * min(1.0, 5.0 / float(norm)))


# ---- Fits ------------------------------------------------------------------------------------------------------------

SAMPLERS = {
    "ugs": lambda sizes: UniformSampler(),
    "hcgs": lambda sizes: HardConcreteSampler(),
    "topk": lambda sizes: TopKSampler(sizes),
}


def close(one, other):
    """Equal but for rounding."""
    return torch.allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ablation", ["optimal", "mean", "counterfactual", "resample"])
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_a_sweep_equals_its_fits_made_alone(setting, name, ablation):
    """To the bit: the store mixes fits that were made together with fits that were made apart.

    But for MKL told to be COMPATIBLE, whose products of a row depend on how many rows there are: what edges carry that
    take other prompts' activations comes from one clean pass over the prompts of all fits.
    """
    of_prompts = ablation in ("counterfactual", "resample")
    same = close if of_prompts and os.environ.get("MKL_CBWR") == "COMPATIBLE" else torch.equal
    knobs = [Knob(1e-3, 0), Knob(1e-2, 0), Knob(1e-3, 1)]
    sizes = torch.tensor([20.0, 40.0, 60.0])
    weights = [0.0] * 3 if name == "topk" else [knob.value for knob in knobs]
    together = setting.learn(SAMPLERS[name](sizes), knobs, ablation, weights)
    for index, knob in enumerate(knobs):
        alone = setting.learn(SAMPLERS[name](sizes[index : index + 1]), [knob], ablation, weights[index : index + 1])
        assert same(alone.scores[0], together.scores[index])
        assert same(alone.step_losses[:, 0], together.step_losses[:, index])
        if ablation == "optimal":
            assert all(map(torch.equal, (part[0] for part in alone.constants), (p[index] for p in together.constants)))


class KilledError(Exception):
    pass


def test_a_killed_fit_resumes_bit_by_bit(setting, tmp_path, monkeypatch):
    knobs, path = [Knob(1e-3, 0), Knob(1e-2, 1)], tmp_path / "masks.safetensors"
    straight = setting.learn(UniformSampler(), knobs, "optimal")
    draw, calls = learning._uniform, []

    def killed_later(*arguments):
        calls.append(None)
        if len(calls) == 7:
            raise KilledError
        return draw(*arguments)

    monkeypatch.setattr(learning, "_uniform", killed_later)
    with pytest.raises(KilledError):
        setting.learn(UniformSampler(), knobs, "optimal", resumable=Resumable(path, "a"))
    monkeypatch.setattr(learning, "_uniform", draw)
    assert path.exists()
    resumed = setting.learn(UniformSampler(), knobs, "optimal", resumable=Resumable(path, "a"))
    assert torch.equal(straight.scores, resumed.scores) and torch.equal(straight.step_losses, resumed.step_losses)
    assert all(torch.equal(one, other) for one, other in zip(straight.constants, resumed.constants, strict=True))
    other = setting.learn(
        UniformSampler(),
        knobs,
        "optimal",
        settings=SETTINGS.model_copy(update={"n_steps": 2}),
        resumable=Resumable(path, "b"),
    )
    assert len(other.step_losses) == 2, "a checkpoint of another fit is not taken up"


def test_sampled_masks_lose_their_dangling_edges(setting, monkeypatch):
    seen, passes = [], Passes.gradients

    def spy(self, objective, chosen, slots, masks, *rest, **options):
        seen.append(masks)
        return passes(self, objective, chosen, slots, masks, *rest, **options)

    monkeypatch.setattr(Passes, "gradients", spy)
    setting.learn(UniformSampler(), [Knob(1e-2, 0)], "counterfactual")
    graph = setting.engine.graph
    for masks in seen:
        assert torch.equal(graph.prune(masks > 0), masks > 0)


def test_nan_names_step_and_knob():
    broken = Setting()
    broken.examples.final.fill_(float("nan"))
    with pytest.raises(
        UserError, match=r"step 1: not finite: loss of masks 0\.01 \(seed 3\); gradient of .*last good checkpoint: none"
    ):
        broken.learn(UniformSampler(), [Knob(0.01, 3)], "mean")


def test_huge_lambda_empties_the_circuit_and_it_can_be_measured(setting):
    settings = MaskFit(n_steps=40, n_samples=1, n_prompts=2, learning_rate=4, record_every=20)
    learned = setting.learn(UniformSampler(), [Knob(100.0, 0), Knob(0.0, 0)], "optimal", settings=settings)
    masks = by_threshold(setting.engine.graph, learned.scores.numpy(), 0.5)
    assert masks[0].sum() == 0 < masks[1].sum()
    own = torch.from_numpy(masks).float()
    start = setting.replacements("optimal").start
    constants, fit = refit_constants(
        setting.passes(),
        setting.passes(),
        start,
        setting.scales,
        own,
        Refit(max_steps=20, batch_size=4),
        names=["a", "b"],
    )
    losses = circuit_losses(setting.passes(), own, setting.replacements("optimal"), constants)
    assert losses.kl.isfinite().all() and losses.kl[0].mean() > losses.kl[1].mean()
    torch.testing.assert_close(losses.kl.mean(1), fit.best_loss, atol=1e-5, rtol=1e-4)
    assert (fit.best_loss <= fit.curve_losses[0] + 1e-7).all()


def test_one_prompt_is_enough():
    alone = Setting(n=2)
    alone.learn(
        UniformSampler(), [Knob(1e-3, 0)], "counterfactual", settings=SETTINGS.model_copy(update={"n_prompts": 1})
    )


# ---- Passes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ablation", ["mean", "counterfactual"])
@pytest.mark.parametrize("n_masks", [2, 8])
def test_parts_change_nothing(setting, ablation, n_masks):
    generator, graph = torch.Generator().manual_seed(0), setting.engine.graph
    masks = torch.rand(n_masks, *graph.valid.shape, generator=generator) * torch.tensor(graph.valid)
    chosen, slots = torch.tensor([3, 1, 0, 5]), torch.arange(4).repeat(2)
    replacements = setting.replacements(ablation)
    values = replacements.of(chosen)
    values = values if replacements.per_prompt else torch.cat((values, values * 0.5))
    found = []
    for memory in (1.0, 2e-5, 1e-9):  # all at once; a few rows; row by row
        options = {"owned": replacements.per_prompt, "constants": not replacements.per_prompt}
        found.append(setting.passes(memory).gradients("kl", chosen, slots, masks, values, **options))
    for other in found[1:]:
        torch.testing.assert_close(other.losses, found[0].losses, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(other.masks, found[0].masks, atol=1e-6, rtol=1e-4)
        if other.constants is not None:
            torch.testing.assert_close(other.constants, found[0].constants, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_whole_graph_loses_nothing(name):
    """0 and not some 1e-8 of either sign: it is computed by other sums than the clean run, so that every machine rounds
    it differently.
    """
    whole = Setting(name)
    masks = torch.tensor(whole.engine.graph.valid).float()[None]
    assert (circuit_losses(whole.passes(), masks, whole.replacements("mean")).kl == 0).all()


def test_out_of_memory_halves_and_goes_on(setting, monkeypatch, capsys):
    passes, logits = setting.passes(), Engine.logits
    chosen = torch.arange(6)
    clean = torch.tensor(setting.engine.graph.valid).float()[None]
    values = setting.replacements("mean").of(chosen)
    wanted = passes.losses("kl", chosen, chosen, clean * 0.5, values, owned=False)

    def scarce(limit):
        def run(self, prompts, rows, *rest, **options):
            if len(rows) > limit:
                raise torch.OutOfMemoryError("simulated")
            return logits(self, prompts, rows, *rest, **options)

        return run

    monkeypatch.setattr(Engine, "logits", scarce(2))
    torch.testing.assert_close(
        passes.losses("kl", chosen, chosen, clean * 0.5, values, owned=False), wanted, atol=1e-6, rtol=1e-5
    )
    assert "going on with" in capsys.readouterr().err
    monkeypatch.setattr(Engine, "logits", scarce(0))
    with pytest.raises(UserError, match="out of memory with a single prompt"):
        passes.losses("kl", chosen, chosen, clean, values, owned=False)


def test_resampling_takes_other_prompts_real_tokens(setting):
    replacements, everything = setting.replacements("resample"), torch.arange(8)
    sources = setting.engine.sources(setting.batch)  # [N, S, t, d]
    for draw in range(3):
        values = replacements.of(everything, draw)
        assert torch.equal(values, replacements.of(everything, draw))
        for n in range(8):
            same = [
                torch.allclose(values[n, :, 0], sources[m, :, t], atol=1e-5)
                for m in range(8)
                for t in range(int(setting.batch.lengths[m]) - 1)
                if m != n
            ]
            assert any(same)
    assert not torch.equal(replacements.of(everything, 0), replacements.of(everything, 1))


def test_aligned_resampling_takes_other_prompts_tokens_at_the_same_place(setting):
    """The authors' resample: of one other prompt, position by position, and its last one past its end."""
    replacements, everything = setting.replacements("resample_positional"), torch.arange(8)
    sources = setting.engine.sources(setting.batch)  # [N, S, t, d]
    partners = set()
    for draw in range(3):
        values = replacements.of(everything, draw)
        assert torch.equal(values, replacements.of(everything, draw))
        for n in range(8):
            of_partner = []
            for m in set(range(8)) - {n}:
                ends = int(setting.batch.lengths[m]) - 2  # after BOS, the last real one
                places = torch.arange(values.shape[2]).clamp(max=ends)
                of_partner.append(torch.allclose(values[n], sources[m][:, places], atol=1e-5))
            assert sum(of_partner) == 1
            partners.add((n, draw, of_partner.index(True)))
    assert len({(n, m) for n, _, m in partners}) > 8, "another draw takes other partners"


def test_logit_difference_by_hand():
    from oacore.circuits.passes import logit_difference

    logits = torch.log(torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]]))
    answers, wrong = torch.tensor([[0, 1], [3, -1]]), torch.tensor([[2, -1], [-1, -1]])
    found = logit_difference(logits, answers, wrong)
    assert found[0].item() == pytest.approx(np.log(3 / 3)) and found[1].isnan()


def test_partly_ablated_edges_would_bias_the_constants(monkeypatch):
    """The paper's reason for the rule: a constant that is optimal for an ablated edge is not where half-ablated ones
    pull it to.
    """
    setting = Setting(scale=0.6)  # sharp predictions, far from the linear regime in which nothing is biased
    graph, everything = setting.engine.graph, torch.arange(8)
    s, j = graph.edge("m1->logits")
    ablated = torch.tensor(graph.valid).float()[None].clone()
    ablated[0, j, s] = 0
    half = ablated.clone()
    half[0, j, s] = 0.5
    start = setting.replacements("optimal").start
    settings = Refit(first_round=300, max_steps=600, batch_size=8, tolerance=1e-4)
    fitted, _ = refit_constants(
        setting.passes(), setting.passes(), start, setting.scales, ablated, settings, names=["edge"]
    )
    written = fitted.writes(setting.engine, setting.examples.prompts.n_tokens)

    def pull(masks):
        found = setting.passes().gradients("kl", everything, everything, masks, written, owned=False, constants=True)
        return float(found.constants[0, s].norm())

    at_optimum = pull(ablated)
    assert pull(half) == 0, "with the rule, half-ablated edges leave constants alone"
    monkeypatch.setattr(oakernels.constants, "ABLATED", 2.0)
    assert pull(half) > 10 * at_optimum, "without it they pull them away from the optimum"


def test_refits_are_whitened_in_blocks_of_their_constants(monkeypatch):
    setting, given = Setting(), {}

    def noting(*arguments, **keywords):
        given.update(keywords)
        return descend(*arguments, **keywords)

    descend = evaluate.descend
    monkeypatch.setattr(evaluate, "descend", noting)
    start, masks = (
        setting.replacements("optimal").start,
        torch.zeros_like(torch.tensor(setting.engine.graph.valid).float())[None],
    )
    settings = Refit(first_round=1, max_steps=2, batch_size=2)
    refit_constants(setting.passes(), setting.passes(), start, setting.scales, masks, settings, names=["none"])
    assert given["blocks"] == start.blocks() and len(given["blocks"]) > 1


def test_auto_memory_is_what_is_free_on_a_gpu_and_the_same_everywhere_on_a_cpu(monkeypatch):
    assert pass_bytes(Limits(memory_gb=3), torch.device("cuda")) == 3e9
    assert pass_bytes(Limits(), torch.device("cpu")) == PASS_BYTES_ON_CPU
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50e9, 80e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 12e9)  # by PyTorch, of which 2 GB are in use
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2e9)
    assert pass_bytes(Limits(), torch.device("cuda")) == PASS_SHARE * 60e9


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 4, 4), (4, 6, 2), (9, 2, 1)])
@pytest.mark.parametrize("parallel", [False, True])
def test_pruning_by_squaring_is_pruning(shape, parallel):
    graph = Graph(*shape, parallel)
    valid = torch.tensor(graph.valid)
    draws = torch.rand(40, *valid.shape, generator=torch.Generator().manual_seed(0))
    masks = (draws < torch.linspace(0.01, 0.9, 40)[:, None, None]) & valid
    pruned = Edges.of(graph, torch.device("cpu")).on_paths(masks)
    assert torch.equal(pruned, graph.prune(masks))
    assert 0 < pruned.sum() < masks.sum()
