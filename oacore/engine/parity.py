"""The parity gate: no number is computed with a model before our forward pass has been held against Hugging Face's, or
against a registered model's own.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oacore.engine.forward import logits_of, residual_after
from oacore.errors import UserError
from oacore.models.hub import load_hugging_face
from oacore.models.load import Loaded, canonical, pick_device, pick_precision, set_precision
from oacore.models.registered import is_registered, read_gate, read_registered
from oacore.models.weights import Model, named_tensors, to_device, weight_hash

# Largest difference of log-probabilities between our forward pass and Hugging Face's that the parity gate lets pass.
# fp32 rounding gives 1e-6 (tiny models) to 1e-4 (deep ones); a wrong rotary base or a missed softcap gives more than
# 1e-1. bf16 keeps 8 bits, so both sides are themselves wrong by about 1e-1 on deep models.
PARITY_TOLERANCE = {"fp32": 1e-3, "bf16": 0.5}
LONGEST = 48  # tokens of a random prompt of the gate
HUGGING_FACE, OWN = "Hugging Face", "its own forward pass"  # what ours is held against


@dataclass(frozen=True)
class Parity:
    """How far our forward pass is from Hugging Face's, or a registered model's own, over all tokens of the gate's
    prompts.
    """

    max_abs_log_prob: float  # nats
    max_abs_logit: float
    n_prompts: int
    n_tokens: int
    longest: int  # tokens of a prompt
    tolerance: float  # nats
    of: str = HUGGING_FACE  # what ours was held against
    precision: str = "ieee"  # of products of fp32 numbers in all later work
    precision_log_prob: float = 0.0  # nats, how far log-probabilities move by it


def parity_prompts(d_vocab: int, max_length: int, seed: int = 0, longest: int = LONGEST) -> tuple[Tensor, Tensor]:
    """Random tokens [4, T] of four lengths, padded on the right with token 0, and their lengths [4]."""
    longest = min(max_length, longest)
    lengths = torch.tensor([longest, max(2, longest // 2), max(2, longest // 3), 2])
    tokens = torch.randint(0, d_vocab, (4, longest), generator=torch.Generator().manual_seed(seed))
    return tokens.masked_fill(torch.arange(longest) >= lengths[:, None], 0), lengths


@torch.no_grad()
def hugging_face_logits(hf: Any, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Plain Hugging Face logits [B, T, V] of right-padded tokens; call before `canonical(hf)`."""
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    logits: Tensor = hf(input_ids=tokens, attention_mask=mask.long(), use_cache=False).logits
    return logits


@torch.no_grad()
def check_parity(
    model: Model, tokens: Tensor, lengths: Tensor, expected: Tensor, tolerance: float, of: str = HUGGING_FACE
) -> Parity:
    """Compare our clean forward pass with other logits [B, T, V] on the real tokens.

    Args:
        of: whose logits they are, for the message.

    Raises:
        UserError: the log-probabilities differ by more than `tolerance` (nats) anywhere, or are not finite.
    """
    ours = logits_of(model, residual_after(model, tokens.to(model.device))).float().cpu()  # [B, T, V]
    real = torch.arange(tokens.shape[1]) < lengths[:, None]  # [B, T]
    ours, expected = ours[real], expected.float()[real]  # [n, V]
    log_prob = (ours.log_softmax(-1) - expected.log_softmax(-1)).abs().max().item()
    sizes = len(tokens), int(lengths.sum()), int(lengths.max())
    parity = Parity(log_prob, (ours - expected).abs().max().item(), *sizes, tolerance, of)
    bad = [name for name, weight in named_tensors(model).items() if not weight.isfinite().all()]
    if bad:
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise UserError(f"model: not finite: {shown}; allowed: finite weights; nothing was computed with it")
    if not log_prob <= tolerance:
        raise UserError(
            f"model: our forward pass of this {model.family} model differs from {of}'s by {log_prob:.3g} nats "
            f"(allowed: {tolerance:g}); nothing was computed with it"
        )
    return parity


@torch.no_grad()
def moved_by_precision(model: Model, tokens: Tensor, lengths: Tensor, precision: str) -> float:
    """The largest change of a log-probability (nats) when products round as `precision` says, instead of as IEEE's."""
    set_precision("ieee", model.device)
    exact = logits_of(model, residual_after(model, tokens.to(model.device))).float().log_softmax(-1)
    set_precision(precision, model.device)
    rounded = logits_of(model, residual_after(model, tokens.to(model.device))).float().log_softmax(-1)
    real = (torch.arange(tokens.shape[1]) < lengths[:, None]).to(model.device)
    return (rounded - exact)[real].abs().max().item()


def open_model(
    source: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "fp32",
    device: str = "auto",
    precision: str = "auto",
) -> tuple[Loaded, Parity]:
    """`load` behind the parity gate: the only way by which a model enters the pipeline. The gate itself is in IEEE's
    precision; what another one changes is measured beside it.
    """
    if is_registered(source):
        (tokens, lengths, expected), of, commit = read_gate(source), OWN, None
        model = read_registered(source, dtype)
    else:
        hf, of = load_hugging_face(source, revision=revision, dtype=dtype), HUGGING_FACE
        commit = getattr(hf.config, "_commit_hash", None)
        tokens, lengths = parity_prompts(hf.config.vocab_size, hf.config.max_position_embeddings)
        expected = hugging_face_logits(hf, tokens, lengths)
        model = canonical(hf)
    model = to_device(model, pick_device(device))
    set_precision("ieee", model.device)
    parity = check_parity(model, tokens, lengths, expected, PARITY_TOLERANCE[dtype], of)
    picked = pick_precision(precision, model.device)
    moved = moved_by_precision(model, tokens, lengths, precision) if picked != "ieee" else 0.0
    parity = replace(parity, precision=picked, precision_log_prob=moved)
    return Loaded(model, source, commit or revision, weight_hash(model)), parity
