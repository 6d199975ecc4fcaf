"""Memory and arithmetic of every stage that may use a GPU, from the model's sizes and the config alone: estimates, not bounds.

Every formula counts the tensors that are alive at a stage's fullest moment, as the code it names makes them; tests/test_estimate.py holds
them against measured peaks. Free of torch, because the Snakefile asks on every dry run.

Symbols: b bytes of a weight, L layers, H heads, G key/value heads, k head width, d model width, f MLP width, V vocabulary, S sources,
J destinations, E edges; X tokens (rows x positions) of one batch, T tokens of a prompt, t = T - 1 after BOS, R rows, F fits.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from oacore.config import FITTED, LEARNED, CircuitMethod, Config, EdgeAblation, OptimalFit, is_directory_name
from oacore.errors import UserError
from oacore.graph import Graph

Parts = dict[str, float]  # bytes by what they hold
FP32, FP64 = 4, 8
USUAL_TOKENS = 16  # of a prompt of a task that is not in the next line
PROMPT_TOKENS = {"ioi": 21, "greater_than": 13, "facts": 16}  # of the longest prompt with BOS, by GPT-2's tokenizer or about so
SHOT_TOKENS = 16  # of one demonstration of truthfulness
LOGIT_CHUNK = 2**24 * FP32  # bytes of oacore.lens.CHUNK_ELEMENTS logits
JUDGED_AT_ONCE = 64  # prompts whose activations replace others at a time: oacore.circuits.evaluate
ROWS_WORTH_KEEPING = 16  # oacore.circuits.patching
GUESSES = 4  # oacore.circuits.acdc
EXACT_ROWS = 500_000  # oacore.circuits.attribution.MOST_ROWS
EXACT_AT_ONCE = 32
WHITENING_ROWS = 10_000  # oacore.stages.lens_faithfulness.TRAIN_ROWS
BANK = 1000  # oacore.lens
EVALUATED_ROWS = 512  # oacore.stages.lens_evaluation
STEERING_PASSES = 14  # oacore.faithfulness.BISECTIONS


@dataclass(frozen=True)
class Sizes:
    """What a model's config.json says of its shape."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    d_mlp: int
    d_vocab: int
    n_positions: int  # learned positions; 0 of rotary models
    gated: bool
    tied: bool
    parallel: bool
    rms: bool  # RMSNorm, else LayerNorm
    bytes: int = FP32  # of a weight

    @classmethod
    def of(cls, facts: dict[str, Any], itemsize: int = FP32) -> "Sizes":
        """From a Hugging Face config.json, and bytes of a weight.

        Raises:
            UserError: it lacks a size.
        """
        family = facts.get("model_type")
        try:
            if family == "gpt2":
                d, n_heads = facts["n_embd"], facts["n_head"]
                d_mlp = facts.get("n_inner") or 4 * d
                return cls(
                    facts["n_layer"], n_heads, n_heads, d // n_heads, d, d_mlp, facts["vocab_size"], facts["n_positions"],
                    gated=False, tied=True, parallel=False, rms=False, bytes=itemsize,
                )  # fmt: skip
            neox, d, n_heads = family == "gpt_neox", facts["hidden_size"], facts["num_attention_heads"]
            return cls(
                n_layers=facts["num_hidden_layers"],
                n_heads=n_heads,
                n_kv_heads=facts.get("num_key_value_heads") or n_heads,
                d_head=facts.get("head_dim") or d // n_heads,
                d_model=d,
                d_mlp=facts["intermediate_size"],
                d_vocab=facts["vocab_size"],
                n_positions=0,
                gated=not neox,
                tied=facts.get("tie_word_embeddings", family == "gemma2"),
                parallel=neox and facts.get("use_parallel_residual", True),
                rms=not neox,
                bytes=itemsize,
            )
        except KeyError as error:
            raise UserError(f"model: its config.json has no {error}, so its memory can't be estimated") from None

    @cached_property
    def graph(self) -> Graph:
        return Graph(self.n_layers, self.n_heads, self.n_kv_heads, self.parallel)

    @property
    def z(self) -> int:
        """Width H k of all heads together."""
        return self.n_heads * self.d_head

    @property
    def kv(self) -> int:
        """Width G k of all keys, or values, together."""
        return self.n_kv_heads * self.d_head

    @property
    def hidden(self) -> int:
        """Weights d f that read the residual into the MLP, per unit of d: f, or 2 f with a gate."""
        return self.d_mlp * (2 if self.gated else 1)

    @property
    def block_weights(self) -> int:
        """d (2 H k + 2 G k) of attention and d (f + f or 2 f) of the MLP."""
        return self.d_model * (2 * self.z + 2 * self.kv + self.d_mlp + self.hidden)

    @property
    def n_weights(self) -> int:
        """L blocks, V d of the embedding and, untied, of the unembedding, positions; biases and norms are not counted."""
        return self.n_layers * self.block_weights + self.d_model * (self.d_vocab * (1 if self.tied else 2) + self.n_positions)


DEMO = Sizes(4, 4, 4, 32, 128, 512, 452, 64, gated=False, tied=True, parallel=False, rms=False)  # oacore.demo.ARCHITECTURE


def known_sizes(config: Config, model_config: Path | None = None) -> Sizes | None:
    """The model's sizes from what lies on this machine, without the network; None where nothing does.

    Raises:
        UserError: config.json is unreadable or lacks a size.
    """
    path = model_config
    if path is None and config.model == "demo":
        return replace(DEMO, bytes=itemsize(config))
    if path is None and is_directory_name(config.model):
        path = Path(config.model).expanduser() / "config.json"
    if path is None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(config.model, "config.json", revision=config.revision)
        path = Path(found) if isinstance(found, str) else None
    if path is None:
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{path}: can't be read; allowed: a model's config.json") from None
    return Sizes.of(facts, itemsize(config))


def itemsize(config: Config) -> int:
    """Bytes of a weight."""
    return 2 if config.dtype == "bf16" else FP32


# Parts that have a key of their own.
KEYS = {
    "weights": "dtype",
    "replacements": "circuits.n_prompts or masks.n_prompts",
    "making replacements": "circuits.n_prompts or masks.n_prompts",
}
KEYS |= {"masks": "circuits.lambdas or masks.n_samples", "constants": "lenses.lenses"}


@dataclass(frozen=True)
class Need:
    """What one job needs."""

    rule: str
    what: str  # task, method, ...
    parts: Parts  # bytes at the fullest moment
    flops: float  # at most: fits may converge earlier
    key: str  # of the config: lowers the biggest part, but for those in KEYS
    note: str = ""  # why it can't run, if it can't

    @property
    def peak(self) -> float:
        return sum(self.parts.values())

    @property
    def biggest(self) -> str:
        return max(self.parts, key=self.parts.__getitem__)


def fullest(*moments: Parts) -> Parts:
    """That of several moments of a stage which holds most."""
    return max(moments, key=lambda parts: sum(parts.values()))


# ---- What passes hold ----------------------------------------------------------------------------------------------------------


def clean_pass(s: Sizes, X: float) -> float:
    """b X ((3 L + 1) d + L H k): residuals, z, attention and MLP outputs of all layers (`ablation.Clean`)."""
    return s.bytes * X * ((3 * s.n_layers + 1) * s.d_model + s.n_layers * s.z)


def block(s: Sizes, X: float) -> float:
    """b X (3 d + max(6 H k, 3 f or 2 f)): what one block makes beside its result, without a graph."""
    return s.bytes * X * (3 * s.d_model + max(6 * s.z, s.d_mlp * (3 if s.gated else 2)))


def kept_of_block(s: Sizes, X: float) -> float:
    """X (2 d of the norms, in fp32 for RMSNorm, + b (4 H k + 2 G k + 3 f or f)): what one block keeps for its backward pass.

    Weights have no gradient, so their inputs are not kept; keys and values are, once per query head.
    """
    norms = 2 * s.d_model * (FP32 if s.rms else s.bytes)
    return X * (norms + s.bytes * (4 * s.z + 2 * s.kv + s.d_mlp * (3 if s.gated else 1)))


def kept_of_mlp(s: Sizes, X: float) -> float:
    """X (d of its norm, in fp32 for RMSNorm, + b (3 f or f)): what an MLP keeps for its backward pass."""
    return X * (s.d_model * (FP32 if s.rms else s.bytes) + s.bytes * s.d_mlp * (3 if s.gated else 1))


def kept_above(s: Sizes, X: float) -> float:
    """The MLP of layer 0, L - 2 blocks, and of the last block norm, keys and values: the graph behind an attention head of layer 0."""
    last = X * (s.d_model * (FP32 if s.rms else s.bytes) + s.bytes * 2 * (s.z + s.kv))
    return kept_of_mlp(s, X) + (s.n_layers - 2) * kept_of_block(s, X) + last


def logits(s: Sizes, R: float) -> float:
    """5 x 4 R V: logits, their log-softmax, and three more in fp32 (`metrics.kl_of_log_probs`)."""
    return 5 * FP32 * R * s.d_vocab


def descent(values: float) -> float:
    """15 x 4 bytes a value: start, 5 of the state, 3 rows taken out, gradient, and Adam's 5 temporaries (`descent.descend`)."""
    return 15 * FP32 * values


def statistics(s: Sizes, T: int) -> float:
    """4 (2 T + 2) (L (H k + d) + d): means, deviations, and two positional tables (`ablation.Statistics`)."""
    return FP32 * (2 * T + 2) * (s.n_layers * (s.z + s.d_model) + s.d_model)


def folded_weights(s: Sizes) -> float:
    """b L d (H k + 2 G k + f or 2 f), and d (H k + f) of writers where LayerNorm has them centred (`folded.Weights`)."""
    writers = 0 if s.rms else s.z + s.d_mlp
    return s.bytes * s.n_layers * s.d_model * (s.z + 2 * s.kv + s.hidden + writers)


def row_bytes(s: Sizes, t: int, *, gradient: bool, keep_inputs: bool) -> int:
    """What `Engine.row_bytes` says; a test holds the two together. The engine's module would make this one's change stale its results."""
    S, J, d, f, L = s.graph.n_sources, s.graph.n_destinations, s.d_model, s.d_mlp, s.n_layers
    inner, reads = s.graph.first_source(L - 1), s.n_heads + 2 * s.n_kv_heads
    layer = (reads + 1) * d + reads * 2 * s.d_head + 2 * s.n_heads * (t + 1) + 3 * f
    values = inner * d + layer
    if gradient:
        values = 2 * inner * d + layer * 2 + L * (5 * s.z + 2 * s.n_heads * (t + 1) + 3 * f + 4 * d) + (J * d if keep_inputs else 0)
    return (values * t + S * J + 4 * S * d + 5 * s.d_vocab) * s.bytes


def sources(s: Sizes, n: float, t: int) -> tuple[float, float]:
    """b n S t d of what all sources write on n prompts, and what making it holds beside: as much again, 20 more where it is centred."""
    held = s.bytes * n * s.graph.n_sources * t * s.d_model
    return held, held * (1 if s.rms else 1 + 2 * FP64 / s.bytes)


# ---- Arithmetic ----------------------------------------------------------------------------------------------------------------


def forward_flops(s: Sizes, X: float, n_layers: float | None = None) -> float:
    """2 X n (weights of a block): attention scores are below 1 % of it at these prompt lengths. A backward pass is as much again."""
    return 2 * X * (s.n_layers if n_layers is None else n_layers) * s.block_weights


def unembed_flops(s: Sizes, R: float) -> float:
    """2 R d V."""
    return 2 * R * s.d_model * s.d_vocab


def masked_flops(s: Sizes, R: float, t: int, *, gradient: bool) -> float:
    """R t (2 d E of the mix, 4 d E more with gradients; projections once, twice with gradients) and the unembedding."""
    mix, blocks = 2 * s.d_model * s.graph.n_edges, forward_flops(s, 1)
    return R * t * (3 * mix + 2 * blocks if gradient else mix + blocks) + unembed_flops(s, R * (2 if gradient else 1))


# ---- Stages --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One config before one model: what all formulas start from."""

    config: Config
    sizes: Sizes
    gpu: bool  # else jobs run on the CPU, where passes take one fit or circuit at a time

    @property
    def budget(self) -> int:
        """Tokens of one batch."""
        return self.config.limits.tokens_per_batch

    def tokens(self, task: str) -> int:
        """T."""
        return int(getattr(self.config.tasks.selected()[task], "n_tokens", PROMPT_TOKENS.get(task, USUAL_TOKENS)))

    def prompts(self, task: str) -> tuple[int, int, int]:
        """Train, validation, test; of a file of facts, which may have fewer, at most."""
        settings = self.config.tasks.selected()[task]
        return settings.n_train, settings.n_validation, settings.n_test

    def rows(self, n: int, T: int) -> int:
        """Prompts of one batch, of n."""
        return min(n, max(1, self.budget // T))

    def beside(self, task: str) -> Parts:
        """What a stage holds throughout."""
        return {"weights": self.sizes.bytes * self.sizes.n_weights, "constants": statistics(self.sizes, self.tokens(task))}

    def knobs(self, method: CircuitMethod) -> int:
        """Circuits of one method."""
        assert self.config.circuits is not None
        return len(self.config.circuits.knobs(method)) * len(self.config.circuits.seeds)


def model(case: Case) -> Need:
    """Weights alone: the parity gate runs 4 prompts of at most 48 tokens, with all their logits."""
    s = case.sizes
    X = 4 * 48
    parts = {"weights": s.bytes * s.n_weights, "logits": logits(s, X), "block": block(s, X)}
    return Need("model", "", parts, 2 * (forward_flops(s, X) + unembed_flops(s, X)), "dtype")


def prompts(case: Case, task: str) -> Need:
    """Facts alone run the model: R T tokens of one batch through one block at a time."""
    s, T = case.sizes, case.tokens(task)
    R = case.rows(10**9, T)
    parts = {"weights": s.bytes * s.n_weights, "block": block(s, R * T), "logits": FP32 * R * s.d_vocab}
    n = sum(case.prompts(task))
    return Need("prompts", task, parts, forward_flops(s, n * T) + unembed_flops(s, n), "limits.tokens_per_batch")


def activations(case: Case, task: str) -> Need:
    """One clean pass, and one layer's values in float64, twice (`activations.Moments`), or one block under way."""
    s, T = case.sizes, case.tokens(task)
    n = sum(case.prompts(task))
    X = case.rows(max(case.prompts(task)), T) * T
    moments = 2 * FP64 * X * max(s.z, s.d_model)
    parts = case.beside(task) | {"clean pass": clean_pass(s, X), "block": max(block(s, X), moments)}
    flops = forward_flops(s, (n + case.prompts(task)[0]) * T)
    return Need("activations", task, parts, flops, "limits.tokens_per_batch")


def lens_activations(case: Case, task: str) -> Need:
    """One clean pass, and b X (4 L + 2) d of rows: residuals and attention, each stacked and made contiguous."""
    s, T = case.sizes, case.tokens(task)
    X = case.rows(max(case.prompts(task)), T) * T
    rows = s.bytes * X * (4 * s.n_layers + 2) * s.d_model
    parts = {"weights": s.bytes * s.n_weights, "clean pass": clean_pass(s, X), "cache rows": rows}
    return Need("lens_activations", task, parts, forward_flops(s, sum(case.prompts(task)) * T), "limits.tokens_per_batch")


def components(case: Case) -> tuple[int, float, int]:
    """C, mean number of blocks above one, and how many of a layer go side by side."""
    s, kinds = case.sizes, case.config.ablation.components
    per_layer = sum(s.n_heads if kind == "head" else 1 for kind in kinds)
    return per_layer * s.n_layers, (s.n_layers - 1) / 2, s.n_heads if "head" in kinds else 1


def optimal(case: Case, task: str, method: str) -> Need:
    """A step: clean pass of B T tokens, and what n heads of layer 0 keep side by side; or a test without a graph; and 15 C Q W."""
    s, T, fit = case.sizes, case.tokens(task), case.config.ablation.optimal
    n_train, n_validation, _ = case.prompts(task)
    C, above, side = components(case)
    B, R = min(fit.batch_size, n_train), case.rows(n_validation, T)
    step, test = (min(side, max(1, case.budget // (n * T))) * n * T for n in (B, R))
    values = (
        C
        * (T if method == "optimal_positional" else 1)
        * max(s.d_model, s.z if "attention_layer" in case.config.ablation.components else 0)
    )
    moments = fullest(
        {"clean pass": clean_pass(s, B * T), "graph": kept_above(s, step), "block": block(s, step), "logits": logits(s, step / T)},
        {"clean pass": clean_pass(s, R * T), "block": block(s, test), "logits": logits(s, test / T)},
    )  # fmt: skip

    def passes(X: float, backward: int) -> float:
        return forward_flops(s, X) + C * (1 + backward) * (forward_flops(s, X, above) + unembed_flops(s, X / T))

    flops = steps(fit, lambda: passes(B * T, 1), lambda: passes(n_validation * T, 0))
    return Need(
        "optimal", f"{task} {method}", case.beside(task) | {"optimiser": descent(values)} | moments, flops, "limits.tokens_per_batch"
    )


def steps(fit: OptimalFit, step: Callable[[], float], test: Callable[[], float]) -> float:
    """All steps of a fit that runs to its cap, and its tests."""
    return fit.max_steps * step() + (1 + fit.max_steps / fit.check_every) * test()


def gaps(case: Case, task: str) -> Need:
    """Up to three clean passes (own, partners', counterfactual), 4 values of the ablated heads, one block under way for them."""
    s, T, methods = case.sizes, case.tokens(task), case.config.ablation.methods
    n_test = case.prompts(task)[2]
    C, above, side = components(case)
    R = case.rows(n_test, T)
    X = min(side, max(1, case.budget // (R * T))) * R * T
    n_clean = 1 + ("counterfactual" in methods) + bool({"resample", "resample_positional"} & set(methods))
    fitted = FP32 * C * s.d_model * sum(T if method == "optimal_positional" else 1 for method in case.config.ablation.fitted())
    parts = case.beside(task) | {
        "clean pass": n_clean * clean_pass(s, R * T),
        "block": block(s, X) + 4 * s.bytes * X * s.d_model,
        "logits": logits(s, X / T),
    }
    parts["constants"] += fitted
    per_method = C * (forward_flops(s, n_test * T, above) + unembed_flops(s, n_test))
    return Need("gaps", task, parts, n_clean * forward_flops(s, n_test * T) + len(methods) * per_method, "limits.tokens_per_batch")


# ---- Circuits ------------------------------------------------------------------------------------------------------------------


def circuit_setting(case: Case, task: str) -> Parts:
    """Weights, folded ones beside them, and of every prompt t d of its embeddings and d of the clean run's end."""
    s, T = case.sizes, case.tokens(task)
    parts = case.beside(task) | {"folded weights": folded_weights(s)}
    parts["cache rows"] = s.bytes * sum(case.prompts(task)) * T * s.d_model
    return parts


def rows_at_once(case: Case, t: int, B: int, M: int, fits: int, *, gradient: bool) -> tuple[int, bool]:
    """Rows of one part of a pass, and whether inputs are kept: `Passes._parts`."""
    memory = case.config.limits.memory_gb * 1e9

    def fitting(keep: bool) -> int:
        return max(1, int(memory // row_bytes(case.sizes, t, gradient=gradient, keep_inputs=keep)))

    keep = fitting(True) >= min(B, ROWS_WORTH_KEEPING)
    per_fit, per_mask = B // fits, B // M
    alone = B if case.gpu else per_fit if fits > 1 else per_mask if per_mask >= ROWS_WORTH_KEEPING else B
    return min(alone, fitting(keep)), keep


def masked_pass(case: Case, t: int, B: int, M: int, fits: int, *, gradient: bool) -> Parts:
    """Rows of one part: `Engine.row_bytes` without its logits, which are in fp32."""
    s = case.sizes
    rows, keep = rows_at_once(case, t, B, M, fits, gradient=gradient)
    of_row = row_bytes(s, t, gradient=gradient, keep_inputs=keep) - 4 * s.d_vocab * s.bytes
    return {"masked pass": rows * of_row, "logits": logits(s, rows)}


def circuit_search(case: Case, task: str, method: CircuitMethod, ablation: EdgeAblation) -> Need:
    """The method's own moment, beside what all searches hold."""
    if method in LEARNED:
        moment, flops, note = mask_learning(case, task, method, ablation)
    elif method in ("random", "manual"):
        moment, flops, note = {}, 0.0, ""
    else:
        moment, flops, note = judged_edges(case, task, method, ablation)
    return Need("circuit_search", f"{task} {method} {ablation}", circuit_setting(case, task) | moment, flops, "limits.memory_gb", note)


def mask_learning(case: Case, task: str, method: CircuitMethod, ablation: EdgeAblation) -> tuple[Parts, float, str]:
    """F R masks: 4 J S of each five times (masks, gradients, rescaled, two of backward), 2 E of noise and alpha; Adam's 5 F E."""
    s, t = case.sizes, case.tokens(task) - 1
    assert case.config.circuits is not None
    fit = case.config.circuits.masks
    F, P = case.knobs(method), min(fit.n_prompts, case.prompts(task)[0])
    R = fit.n_samples * P
    n_masks, edges = F * R, s.graph.n_destinations * s.graph.n_sources
    masks = FP32 * n_masks * (5 * edges + 3 * s.graph.n_edges)
    parameters = FP32 * F * s.graph.n_edges * 8 * (2 if method == "hcgs" else 1)
    replacement, making = replaced(case, F * P, t, ablation, fits=F)
    parts = masked_pass(case, t, n_masks, n_masks, 1 if ablation in ("resample", "counterfactual") else F, gradient=True)
    moment = fullest(parts | {"masks": masks}, {"masks": masks / 2, "making replacements": making})
    flops = fit.n_steps * masked_flops(s, n_masks, t, gradient=True)
    return moment | {"optimiser": parameters, "replacements": replacement}, flops, ""


def replaced(case: Case, n: int, t: int, ablation: EdgeAblation, fits: int = 1) -> tuple[float, float]:
    """Bytes of the replacements of n prompts, and of making them: every source's output, or F fits' constants 4 F S d, thrice to fit."""
    if ablation in ("resample", "counterfactual"):
        return sources(case.sizes, n, t)
    s = case.sizes
    Q = t if "positional" in ablation or ablation == "cf_mean" else 1
    constants = FP32 * fits * s.graph.n_sources * Q * s.d_model
    return constants * (3 if ablation in FITTED else 1), 0.0


def judged_edges(case: Case, task: str, method: CircuitMethod, ablation: EdgeAblation) -> tuple[Parts, float, str]:
    """EAP and EAP-IG: one gradient pass (n_steps of them) of n prompts; ACDC and exact: passes without gradients, one an edge."""
    s, t, circuits = case.sizes, case.tokens(task) - 1, case.config.circuits
    assert circuits is not None
    n = min(circuits.n_prompts, case.prompts(task)[0])
    E, masks = s.graph.n_edges, FP32 * s.graph.n_destinations * s.graph.n_sources
    replacement, making = replaced(case, n, t, ablation)
    if method in ("eap", "eap_ig"):
        passes = circuits.ig_steps if method == "eap_ig" else 1
        parts = masked_pass(case, t, n, 1, 1, gradient=True)
        contrast = 0.0
        if method == "eap_ig":
            contrast, making = sources(s, n, t)
            # Each row's own copy, and a gradient as large that nobody reads: `limits.memory_gb` counts neither.
            rows, _ = rows_at_once(case, t, n, 1, 1, gradient=True)
            parts["contrast of rows"] = 2 * rows * contrast / n
        moment = fullest(parts, {"making replacements": making})
        flops = len(circuits.seeds) * passes * masked_flops(s, n, t, gradient=True)
        return moment | {"replacements": replacement + contrast, "masks": 6 * masks}, flops, ""
    at_once = GUESSES * len(circuits.thresholds) if method == "acdc" else EXACT_AT_ONCE
    parts = masked_pass(case, t, n * at_once, at_once, 1, gradient=False)
    moment = fullest(parts, {"making replacements": making}) | {"replacements": replacement, "masks": 3 * at_once * masks}
    n_passes = E * len(circuits.seeds) * (len(circuits.thresholds) if method == "acdc" else 1)
    too_many = method == "exact" and E * n > EXACT_ROWS
    note = f"exact refuses more than {EXACT_ROWS:,} passes: {E * n:,} here" if too_many else ""
    return moment, 0.0 if too_many else n_passes * masked_flops(s, n, t, gradient=False), note


def circuit_evaluation(case: Case, task: str, ablation: EdgeAblation) -> Need:
    """C circuits: their masks thrice in fp32; where constants are fitted, 15 values each in a step, and their writes 3 C S Q d."""
    s, T, circuits = case.sizes, case.tokens(task), case.config.circuits
    assert circuits is not None
    t, (n_train, n_validation, n_test) = T - 1, case.prompts(task)
    C = sum(case.knobs(method) for method in circuits.methods)
    edges = s.graph.n_destinations * s.graph.n_sources
    parts = circuit_setting(case, task) | {"masks": 3 * FP32 * C * edges}
    fit, flops = circuits.refit, masked_flops(s, C * n_test, t, gradient=False)
    per_prompt = ablation in ("resample", "counterfactual")
    moment = masked_pass(case, t, C * n_test, C, 1 if per_prompt else C, gradient=False)
    replacement, making = replaced(case, min(JUDGED_AT_ONCE, n_test), t, ablation, fits=C)
    parts["replacements"] = replacement
    if ablation in FITTED:
        B, Q = min(fit.batch_size, n_train), t if ablation == "optimal_positional" else 1
        parts["optimiser"] = descent(C * Q * (s.d_model + s.n_layers * (s.z + s.d_model)))
        moment = fullest(moment, masked_pass(case, t, C * B, C, C, gradient=True))
        flops += steps(fit, lambda: masked_flops(s, C * B, t, gradient=True), lambda: masked_flops(s, C * n_validation, t, gradient=False))
    parts |= fullest(moment, {"making replacements": making})
    return Need("circuit_evaluation", f"{task} {ablation}", parts, flops, "limits.memory_gb")


# ---- Tracing -------------------------------------------------------------------------------------------------------------------


def n_places(case: Case) -> int:
    """Sites x positions x windows x layers; windows clipped to the same layers count twice here."""
    assert case.config.tracing is not None
    asked = case.config.tracing
    return len(asked.sites) * len(asked.positions) * len(asked.windows) * case.sizes.n_layers


def tracing_fit(case: Case) -> Need:
    """A step: clean pass of B T tokens, L blocks kept for as many places as fit the budget; a test: a quarter of it, without a graph."""
    s, T, tracing = case.sizes, case.tokens("facts"), case.config.tracing
    assert tracing is not None
    n_train, n_validation, _ = case.prompts("facts")
    n = (n_places(case) if "oat" in tracing.corruptions else 0) + 1
    B = min(tracing.fit.batch_size, n_train)
    X = min(n, max(1, case.budget // (B * T))) * B * T
    R = min(n_validation, max(1, max(T, case.budget // 4) // T))
    Y = min(n, max(1, case.budget // (R * T))) * R * T
    moment = fullest(
        {"clean pass": clean_pass(s, B * T), "graph": s.n_layers * kept_of_block(s, X), "block": block(s, X), "logits": logits(s, X / T)},
        {"clean pass": clean_pass(s, R * T), "block": block(s, Y), "logits": logits(s, Y / T)},
    )
    parts = {"weights": s.bytes * s.n_weights, "optimiser": descent(n * s.d_model)} | moment
    flops = steps(tracing.fit, lambda: 2 * n * forward_flops(s, B * T), lambda: n * forward_flops(s, n_validation * T))
    return Need("tracing_fit", "", parts, flops, "limits.tokens_per_batch")


def tracing(case: Case) -> Need:
    """A quarter of the budget's tokens: clean pass, corrupted residuals (L + 1) X d; places up to the budget in one block."""
    s, T, asked = case.sizes, case.tokens("facts"), case.config.tracing
    assert asked is not None
    n_test = case.prompts("facts")[2]
    n = n_places(case) + 1
    R = min(n_test, max(1, case.budget // (4 * T)))
    X = min(n, max(1, case.budget // (R * T))) * R * T
    parts = {
        "weights": s.bytes * s.n_weights,
        "clean pass": clean_pass(s, R * T) + s.bytes * R * T * (s.n_layers + 1) * s.d_model,
        "block": block(s, X),
        "logits": logits(s, X / T),
    }
    draws = sum(asked.n_draws if name.startswith("gaussian") else 1 for name in asked.corruption_names())
    return Need("tracing", "", parts, draws * n * forward_flops(s, n_test * T, s.n_layers / 2), "limits.tokens_per_batch")


# ---- Lenses --------------------------------------------------------------------------------------------------------------------


def lens_values(s: Sizes, kind: str) -> float:
    """Values of a lens: L L d of OCA, L d (d + 1) of an affine one, L d of one that all layers share, 1000 L d of a bank."""
    L, d = s.n_layers, s.d_model
    affine = L * d * (d + 1)
    return {"oca": L * L * d, "tuned": affine, "linear_oca": affine, "grad": affine, "resample": BANK * L * d, "logit": 0}.get(kind, L * d)


def cache_rows(s: Sizes, n: float) -> float:
    """b n (2 L + 1) d: residual and attention of every layer, and the final residual."""
    return s.bytes * n * (2 * s.n_layers + 1) * s.d_model


def n_cached(case: Case, task: str, split: int) -> int:
    """Rows of a split in the lenses' cache."""
    assert case.config.lenses is not None
    every = case.config.lenses.positions == "all"
    return case.prompts(task)[split] * (case.tokens(task) - 1 if every else 1)


def lens_fit(case: Case, task: str, lens: str) -> Need:
    """All layers' fits at once: 15 values, their validation rows, the graph of m MLPs on B rows each, and chunks of logits.

    OCA runs L (L + 1) / 2 MLPs on B rows, each keeping 2 d (fp32) and 3 f or f; grad first averages a Jacobian of L d d in float64.
    """
    s, kind, lenses = case.sizes, lens.partition("-")[0], case.config.lenses
    assert lenses is not None
    fit = lenses.oca if kind in ("oca", "oca_shared") else lenses.tuned
    L, d, T = s.n_layers, s.d_model, case.tokens(task)
    B = min(fit.batch_size, n_cached(case, task, 0))
    mlps = L * (L + 1) / 2
    of_mlp = 2 * d * FP32 + s.bytes * s.d_mlp * (3 if s.gated else 1)
    graph = B * (mlps * of_mlp if kind in ("oca", "oca_shared") else s.bytes * L * d * 3)
    values = L * d if kind == "grad" else lens_values(s, kind)
    extra = lens_values(s, "oca") if kind == "linear_oca" else lens_values(s, "tuned") if kind == "grad" else 0.0
    batch = B * L * s.bytes * (3 * d + s.d_mlp * (3 if s.gated else 2))
    parts = {
        "weights": s.bytes * s.n_weights,
        "optimiser": descent(values),
        "constants": FP32 * extra,
        "cache rows": cache_rows(s, n_cached(case, task, 1) + 2 * B),
        "graph": graph,
        "block": batch,
        "logits": 5 * min(LOGIT_CHUNK, FP32 * B * L * s.d_vocab),
    }
    unembedded = unembed_flops(s, 2 * B * L)
    run = mlps * 2 * d * (s.d_mlp + s.hidden) if kind.startswith("oca") or kind == "linear_oca" else L * 2 * d * d
    flops = steps(fit, lambda: B * 2 * run + 2 * unembedded, lambda: n_cached(case, task, 1) * (run + unembedded / B))
    if kind == "grad":
        R = case.rows(lenses.grad_prompts, T)
        jacobian = {"graph": L * kept_of_block(s, R * T), "optimiser": FP64 * L * d * d, "block": block(s, R * T)}
        parts = fullest(parts, {"weights": parts["weights"]} | jacobian)
        flops += d * forward_flops(s, lenses.grad_prompts * T, L / 2)
    return Need("lens_fit", f"{task} {lens}", parts, flops, f"lenses.{'oca' if kind.startswith('oca') else 'tuned'}.batch_size")


def fitted_lenses(case: Case, kinds: Iterable[str]) -> float:
    """4 bytes a value of every lens of these kinds."""
    assert case.config.lenses is not None
    return FP32 * sum(
        lens_values(case.sizes, name.partition("-")[0]) for name in case.config.lenses.files() if name.partition("-")[0] in kinds
    )


def lens_evaluation(case: Case, task: str) -> Need:
    """All lenses, the test rows, predictions of 512 rows at every layer twice, chunks of logits."""
    s, lenses = case.sizes, case.config.lenses
    assert lenses is not None
    n = n_cached(case, task, 2)
    R = min(EVALUATED_ROWS, n)
    parts = {
        "weights": s.bytes * s.n_weights,
        "constants": fitted_lenses(case, lenses.lenses),
        "cache rows": cache_rows(s, n),
        "block": 3 * s.bytes * R * s.n_layers * s.d_model + block(s, R),
        "logits": max(5 * min(LOGIT_CHUNK, FP32 * R * s.n_layers * s.d_vocab), 2 * FP32 * R * s.d_vocab),
    }
    flops = len(lenses.files()) * s.n_layers * (2 * unembed_flops(s, n) + forward_flops(s, n, 0.5))
    return Need("lens_evaluation", task, parts, flops, "lenses.lenses")


def lens_faithfulness(case: Case, task: str) -> Need:
    """Lenses, 10,000 training rows, one clean pass with keys and values; P x B changed rows through the blocks, their logits in float64."""
    s, T, lenses = case.sizes, case.tokens(task), case.config.lenses
    assert lenses is not None and lenses.faithfulness is not None
    asked = lenses.faithfulness
    B = min(asked.n_prompts, case.prompts(task)[2])
    P = min(asked.n_directions, max(1, case.budget // (B * T)))
    n_layers = s.n_layers if asked.layers is None else len(asked.layers)
    keys = s.bytes * 2 * B * T * s.kv
    parts = {
        "weights": s.bytes * s.n_weights,
        "constants": fitted_lenses(case, asked.lenses) + 6 * FP64 * s.d_model**2,
        "cache rows": cache_rows(s, min(WHITENING_ROWS, n_cached(case, task, 0))) + 2 * FP64 * WHITENING_ROWS * s.d_model,
        "clean pass": clean_pass(s, B * T) + s.n_layers * keys,
        "block": (P + 1) * keys + block(s, P * B),
        "logits": 8 * FP64 * P * B * s.d_vocab,
    }
    groups = 2 + len(asked.lenses) * (2 + len(asked.resample_sizes))
    passes = asked.n_directions * B * (groups + STEERING_PASSES * (1 + len(asked.lenses)))
    flops = n_layers * passes * (forward_flops(s, 1, s.n_layers / 2) + unembed_flops(s, 2))
    return Need("lens_faithfulness", task, parts, flops, "limits.tokens_per_batch")


def lens_truthfulness(case: Case, task: str) -> Need:
    """Lenses, and one batch of few-shot prompts: one residual X d, one block under way."""
    s, lenses = case.sizes, case.config.lenses
    assert lenses is not None and lenses.truthfulness is not None
    asked = lenses.truthfulness
    T = SHOT_TOKENS * (asked.n_demonstrations + 1)
    R = case.rows(asked.n_inputs, T)
    parts = {
        "weights": s.bytes * s.n_weights,
        "constants": fitted_lenses(case, asked.lenses),
        "block": block(s, R * T) + s.bytes * R * T * s.d_model,
        "logits": logits(s, R),
    }
    n = 2 * asked.n_inputs * len(asked.datasets or (0,))
    flops = forward_flops(s, n * T) + len(asked.lenses) * s.n_layers * (unembed_flops(s, n) + forward_flops(s, n, s.n_layers / 4))
    return Need("lens_truthfulness", task, parts, flops, "limits.tokens_per_batch")


RULES: dict[str, Callable[..., Need]] = {
    stage.__name__: stage
    for stage in (
        model, prompts, activations, optimal, gaps, circuit_search, circuit_evaluation, tracing_fit, tracing,
        lens_activations, lens_fit, lens_evaluation, lens_faithfulness, lens_truthfulness,
    )
}  # fmt: skip


def needs(case: Case, jobs: Iterable[tuple[str, dict[str, str], str]]) -> Iterator[Need]:
    """Of every job that may use a GPU."""
    for rule, what, _ in jobs:
        if rule in RULES and (rule != "prompts" or what["task"] == "facts"):
            yield RULES[rule](case, **what)


# ---- The table -----------------------------------------------------------------------------------------------------------------


def has_gpu(config: Config) -> bool:
    """Whether jobs will take a GPU, as far as can be seen without torch."""
    return config.device == "cuda" or (config.device == "auto" and Path("/proc/driver/nvidia/version").exists())


def host_memory() -> float:
    """Bytes of this machine, 0 where unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0.0


def table(found: Iterable[Need], *, device: str, memory: float, throughput: float | None) -> str:
    """One line per rule with its hungriest job; time, at `throughput` FLOP/s, of all its jobs one after another.

    Args:
        memory: bytes of the device, 0 where unknown.
        throughput: without it, the arithmetic itself is shown.
    """
    rules: dict[str, list[Need]] = {}
    for need in found:
        rules.setdefault(need.rule, []).append(need)
    amount = "time" if throughput else "PFLOP"
    rows = [("rule", "jobs", "GB", "most of it", amount, "hungriest job")]
    warnings = []
    for rule, jobs in rules.items():
        most = max(jobs, key=lambda need: need.peak)
        flops = sum(need.flops for need in jobs)
        share = most.parts[most.biggest] / most.peak
        cost = duration(flops / throughput) if throughput else f"{flops / 1e15:.3g}"
        rows.append((rule, str(len(jobs)), f"{most.peak / 1e9:.2f}", f"{most.biggest} {share:.0%}", cost, most.what))
        if memory and most.peak > memory:
            warnings.append(
                f"! {rule} {most.what}: {most.peak / 1e9:.1f} GB of {memory / 1e9:.1f} GB; lower {KEYS.get(most.biggest, most.key)}"
            )
        warnings += [f"! {rule} {need.what}: {need.note}" for need in jobs if need.note]
    total = sum(need.flops for jobs in rules.values() for need in jobs)
    rows.append(("all", "", "", "", duration(total / throughput) if throughput else f"{total / 1e15:.3g}", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    head = f"estimate for one job at a time on the {device}; fits may converge before the steps that are counted here"
    return "\n".join((head, *lines, *warnings))


def duration(seconds: float) -> str:
    """In the largest unit of which there are two, e.g. 90 min."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 1 else "< 1 s"
