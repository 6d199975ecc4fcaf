"""Memory and arithmetic of what lenses are judged by: held-out rows, faithfulness, truthfulness."""

from oacore.estimate.case import Case
from oacore.estimate.lenses import chunk_bytes, lenses_bytes, n_rows, rows_bytes
from oacore.estimate.need import Need
from oacore.estimate.passes import block_bytes, clean_pass_bytes, forward_flop, logits_bytes, unembed_flop
from oacore.estimate.sizes import FP32, FP64
from oacore.lenses.numbers import BATCH_ROWS, BISECTIONS, TRAIN_ROWS

SHOT_TOKENS = 16  # of one demonstration of truthfulness


def lens_evaluation(case: Case, task: str) -> Need:
    """All lenses, the test rows, predictions of 512 rows at every layer twice, chunks of logits."""
    s, lenses = case.sizes, case.config.lenses
    assert lenses is not None
    n = n_rows(case, task)[2]
    R = min(BATCH_ROWS, n)
    parts = {
        "weights": s.weights_bytes,
        "constants": lenses_bytes(case, lenses.lenses),
        "cache rows": rows_bytes(s, n),
        "block": 3 * s.number_bytes * R * s.n_layers * s.d_model + block_bytes(s, R),
        "logits": max(chunk_bytes(s, R * s.n_layers), 2 * FP32 * R * s.d_vocab),
    }
    flop = len(lenses.files()) * s.n_layers * (2 * unembed_flop(s, n) + forward_flop(s, n, 0.5))
    return Need("lens_evaluation", task, parts, flop, "lenses.lenses")


def lens_faithfulness(case: Case, task: str) -> Need:
    """Lenses, 10,000 training rows, one clean pass with keys and values; P x B changed rows through the blocks, their
    logits in float64.
    """
    s, T, lenses = case.sizes, case.prompt_tokens(task), case.config.lenses
    assert lenses is not None and lenses.faithfulness is not None
    settings = lenses.faithfulness
    B = min(settings.n_prompts, case.n_prompts(task)[2])
    P = min(settings.n_directions, max(1, case.tokens_per_batch // (B * T)))
    n_layers = s.n_layers if settings.layers is None else len(settings.layers)
    keys = s.number_bytes * 2 * B * T * s.kv
    whitened = 2 * FP64 * TRAIN_ROWS * s.d_model
    parts = {
        "weights": s.weights_bytes,
        "constants": lenses_bytes(case, settings.lenses) + 6 * FP64 * s.d_model**2,
        "cache rows": rows_bytes(s, min(TRAIN_ROWS, n_rows(case, task)[0])) + whitened,
        "clean pass": clean_pass_bytes(s, B * T) + s.n_layers * keys,
        "block": (P + 1) * keys + block_bytes(s, P * B),
        "logits": 8 * FP64 * P * B * s.d_vocab,
    }
    n_groups = 2 + len(settings.lenses) * (2 + len(settings.resample_sizes))
    n_passes = settings.n_directions * B * (n_groups + BISECTIONS * (1 + len(settings.lenses)))
    flop = n_layers * n_passes * (forward_flop(s, 1, s.n_layers / 2) + unembed_flop(s, 2))
    return Need("lens_faithfulness", task, parts, flop, "limits.tokens_per_batch")


def lens_truthfulness(case: Case, task: str) -> Need:
    """Lenses, and one batch of few-shot prompts: one residual X d, one block under way."""
    s, lenses = case.sizes, case.config.lenses
    assert lenses is not None and lenses.truthfulness is not None
    settings = lenses.truthfulness
    T = SHOT_TOKENS * (settings.n_demonstrations + 1)
    R = case.at_once(settings.n_inputs, T)
    parts = {
        "weights": s.weights_bytes,
        "constants": lenses_bytes(case, settings.lenses),
        "block": block_bytes(s, R * T) + s.number_bytes * R * T * s.d_model,
        "logits": logits_bytes(s, R),
    }
    n = 2 * settings.n_inputs * len(settings.datasets or (0,))
    of_lens = s.n_layers * (unembed_flop(s, n) + forward_flop(s, n, s.n_layers / 4))
    flop = forward_flop(s, n * T) + len(settings.lenses) * of_lens
    return Need("lens_truthfulness", task, parts, flop, "limits.tokens_per_batch")
