"""Latent prediction: what a model would say if it stopped to attend at layer l (Li & Janson 2024, section 6).

A lens maps the residual entering block l to a prediction of the residual after all blocks, which the model's own final norm and
unembedding turn into a next-token distribution. OCA runs the remaining MLPs with every attention output replaced by an optimal constant.
Fits read cached residuals and targets, never the model's attention: `grad` alone runs the model, for its Jacobian.

Symbols: L layers, m start layers, B rows (prompts or tokens), d model width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from oacore.ablation import Batch, clean_pass
from oacore.artefacts import read_tensors, write_tensors
from oacore.cache import Reader, to_torch
from oacore.config import LensFit, LensName
from oacore.descent import Descent, descend
from oacore.forward import at, attention_write, embed, final_norm, logits_of, mlp, run_block, unembed
from oacore.metrics import kl_of_log_probs
from oacore.model import Model
from oacore.progress import progress

CHUNK_ELEMENTS = 2**24  # logits at a time, 64 MiB: [B, L, V] of GPT-2-XL at batch 200 would be 1.9 GB, and its gradient as much again
SGD_RATE = 10.0  # times Adam's: 0.1 with momentum 0.9, the official recipe's 1
BANK = 1000  # attention outputs that the resample lens draws from


class AnyLens(Protocol):
    """What is asked of a lens where it is compared with others."""

    @property
    def name(self) -> str: ...

    @property
    def init(self) -> str: ...

    def final(self, residual: Tensor, layer: int) -> Tensor: ...

    def logits(self, residual: Tensor, layer: int) -> Tensor: ...


@dataclass(frozen=True)
class Lens:
    """One lens on all layers of one model.

    values: `constants` [L, L, d] (oca: from start layer, at layer), [L, d] (oca_shared, mean) or [n, L, d] (resample: a bank);
    `matrix` [L, d, d] and `bias` [L, d] of affine lenses, as a change: x + x matrix + bias. None for logit.
    """

    name: LensName
    init: str  # of the tuned lens: identity or random; else ""
    model: Model
    values: Mapping[str, Tensor]

    def final(self, residual: Tensor, layer: int) -> Tensor:
        """The residual after all blocks [..., B, d] predicted from the one entering block `layer` [..., B, d]."""
        if "matrix" in self.values:
            matrix, bias = (self.values[name][layer].to(residual.dtype) for name in ("matrix", "bias"))
            return residual + residual @ matrix + bias
        if "constants" not in self.values:
            return residual
        constants = self.values["constants"]
        if self.name == "resample":  # another prompt's for each row, the same at every layer
            rows = torch.arange(residual.shape[-2], device=residual.device) % len(constants)
            return _without_attention(self.model, residual, layer, lambda i: constants[rows, i])
        own = constants[layer] if self.name == "oca" else constants
        return _without_attention(self.model, residual, layer, lambda i: own[i])

    def logits(self, residual: Tensor, layer: int) -> Tensor:
        """Predicted logits [..., B, V], fp32. At layer L, after all blocks, every lens is the model."""
        return logits_of(self.model, self.final(residual, layer) if layer < self.model.n_layers else residual)

    @property
    def label(self) -> str:
        return f"{self.name}-{self.init}" if self.init else self.name


def _without_attention(model: Model, residual: Tensor, layer: int, constant: Callable[[int], Tensor]) -> Tensor:
    """Blocks `layer` to the last, with attention's output replaced by `constant(i)` [d] or [B, d]."""
    for i in range(layer, model.n_layers):
        residual = _block(model, i, residual, constant(i))
    return residual


def _block(model: Model, layer: int, residual: Tensor, constant: Tensor) -> Tensor:
    middle = residual + constant.to(residual.dtype)
    return middle + mlp(model, layer, residual if model.parallel else middle)


def from_all_starts(model: Model, residual: Tensor, starts: Sequence[int], constants: Tensor) -> Tensor:
    """OCA from several start layers side by side: each row joins at its own layer, and all go on together.

    Args:
        residual: [m, B, d], entering block `starts[r]`; starts ascend.
        constants: [m, L, d], or [L, d] that all starts share.
    """
    under_way, joined = residual[:0], 0
    for layer in range(model.n_layers):
        n = joined
        while n < len(starts) and starts[n] <= layer:
            n += 1
        if n > joined:
            under_way, joined = torch.cat((under_way, residual[joined:n])), n
        if joined:
            under_way = _block(model, layer, under_way, constants[layer] if constants.dim() == 2 else constants[:joined, layer, None])
    return under_way


class _UnembeddedKl(torch.autograd.Function):
    """KL(target || unembedding of rows), chunk by chunk: no tensor of all logits, forward or backward."""

    @staticmethod
    def forward(ctx: Any, normed: Tensor, target: Tensor, model: Model) -> Tensor:
        loss = torch.empty(normed.shape[:2], dtype=torch.promote_types(normed.dtype, torch.float32), device=normed.device)
        gradient = torch.empty_like(normed) if ctx.needs_input_grad[0] else None
        with torch.no_grad():
            for rows, layers, log_target, logits in _logit_chunks(model, normed, target):
                log_probs = logits.log_softmax(-1)
                loss[layers, rows] = kl_of_log_probs(log_target, log_probs)
                if gradient is not None:
                    slope = log_probs.exp_() - log_target.exp()  # of the logits
                    if model.logit_softcap is not None:
                        slope *= 1 - (logits / model.logit_softcap).square()
                    gradient[layers, rows] = slope.to(normed.dtype) @ model.W_U
        ctx.gradient = gradient
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0][..., None].to(ctx.gradient.dtype) * ctx.gradient, None, None


def _logit_chunks(model: Model, normed: Tensor, target: Tensor) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """(rows, layers, log-probabilities of the target, logits) for parts of `normed` [m, B, d]; target [B, d] or [m, B, d] is normed too."""
    m, batch = normed.shape[:2]
    some_rows = max(1, min(batch, CHUNK_ELEMENTS // model.d_vocab))
    some_layers = max(1, CHUNK_ELEMENTS // (model.d_vocab * some_rows))
    for start in range(0, batch, some_rows):
        rows = slice(start, start + some_rows)
        shared = unembed(model, target[rows]).log_softmax(-1) if target.dim() == 2 else None
        for first in range(0, m, some_layers):
            layers = slice(first, first + some_layers)
            log_target = unembed(model, target[layers, rows]).log_softmax(-1) if shared is None else shared
            yield rows, layers, log_target, unembed(model, normed[layers, rows])


def unembedded_kl(model: Model, normed: Tensor, target: Tensor) -> Tensor:
    """KL [m, B] in nats of the distributions that the unembedding gives.

    Args:
        normed: predictions after the final norm [m, B, d]; differentiable.
        target: what the model itself unembeds [B, d], or another prediction for each [m, B, d].
    """
    loss: Tensor = _UnembeddedKl.apply(normed, target, model)
    return loss


# ---- Data ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Cached rows of one split on the model's device."""

    residual: Tensor  # [B, L, d] entering each block
    attention: Tensor  # [B, L, d] what each block's attention wrote
    target: Tensor  # [B, d] what the unembedding read


PARTS = ("residual", "attention", "final")


def _rows(reader: Reader, split: str, arrays: Mapping[str, Any], device: Any) -> Rows:
    tensors = (to_torch(arrays[f"{split}/{name}"], reader[f"{split}/{name}"].bfloat16).to(device) for name in PARTS)
    return Rows(*tensors)


def read_rows(path: str | Path, split: str, expect: dict[str, Any], device: Any, most: int | None = None) -> Rows:
    """All rows of a split, or the first `most`."""
    with Reader(path, expect) as reader:
        return _rows(reader, split, {f"{split}/{name}": reader[f"{split}/{name}"][:most] for name in PARTS}, device)


class Shuffled:
    """Random batches of the training split, every row once an epoch, read ahead from disk; step n is the same whenever it is asked for."""

    def __init__(self, path: str | Path, expect: dict[str, Any], size: int, seed: int, device: Any):
        self.reader, self.size, self.seed, self.device = Reader(path, expect), size, seed, device
        self.names = [f"train/{name}" for name in PARTS]
        self.per_epoch = -(-len(self.reader[self.names[0]]) // size)
        self.next_step, self.batches = -1, iter(())

    def at(self, step: int) -> Rows:
        """The batch of a step; steps in order are a stream."""
        if step != self.next_step or step % self.per_epoch == 0:
            epoch, index = divmod(step, self.per_epoch)
            self.batches = self.reader.shuffled(self.names, self.size, self.seed * 1_000_003 + epoch)
            for _ in range(index):  # after a restart
                next(self.batches)
        self.next_step = step + 1
        return _rows(self.reader, "train", next(self.batches), self.device)

    def close(self) -> None:
        self.reader.close()


# ---- Fits ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def attention_moments(path: str | Path, expect: dict[str, Any], device: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [L, d] of what attention wrote, over the training rows."""
    first = second = torch.zeros(())
    count = 0
    with Reader(path, expect) as reader:
        stored = reader["train/attention"]
        for array in reader.batches("train/attention", 4096):
            values = to_torch(array, stored.bfloat16).double()
            first, second, count = first + values.sum(0), second + values.square().sum(0), count + len(values)
    mean = first / count
    return mean.float().to(device), (second / count - mean.square()).clamp(min=0).sqrt().float().to(device)


Apply = Callable[[Tensor, Sequence[int], Tensor], Tensor]  # (values of m rows, their layers, residual [m, B, d]) -> final [m, B, d]


def fit(
    model: Model,
    name: LensName,
    init: str,
    path: str | Path,
    expect: dict[str, Any],
    settings: LensFit,
    *,
    seed: int = 0,
    teacher: Lens | None = None,
    jacobian: Tensor | None = None,
    checkpoint: Path | None = None,
    identity: str = "",
    on_test: Callable[[], object] = lambda: None,
) -> tuple[Lens, Descent]:
    """Fit a lens to cached rows, all layers at once, each until its KL on the validation rows stops falling.

    Args:
        name: oca, oca_shared, tuned, linear_oca or grad.
        init: of the tuned lens: `identity`, by the official recipe (SGD with Nesterov momentum 0.9, weight decay 1e-3, gradients clipped
            to 1), or `random`, the paper's (standard normal, Adam).
        path: an activation cache with residual, attention and final of every split.
        teacher: the OCA lens, whose output linear_oca is fitted to; all others are fitted to the model's.
        jacobian: [L, d, d] of grad, from `mean_jacobian`; its bias is fitted.
    """
    held_out = read_rows(path, "validation", expect, model.device)
    mean, std = attention_moments(path, expect, model.device)
    start, scale, apply = _problem(model, name, init, mean, std, jacobian, held_out, seed)
    sgd = name == "tuned" and init == "identity"
    scale = scale * SGD_RATE if sgd else scale
    shared = name == "oca_shared"
    n_layers = model.n_layers
    batches = Shuffled(path, expect, settings.batch_size, seed, model.device)

    def losses(rows: Rows, running: Sequence[int], values: Tensor) -> Tensor:
        """[m, B]; one row of all layers' mean for a shared lens."""
        layers = range(n_layers) if shared else running
        x = rows.residual[:, list(layers)].transpose(0, 1)  # [m, B, d]
        target = rows.target
        if teacher is not None:
            target = final_norm(model, torch.stack([teacher.final(x[r], layer) for r, layer in enumerate(layers)]))
        found = unembedded_kl(model, final_norm(model, apply(values, layers, x)), target)
        return found.mean(0, keepdim=True) if shared else found

    def gradient(running: Tensor, value: Tensor, step: int) -> Tensor:
        rows = batches.at(step)
        with torch.enable_grad():
            leaf = value.detach().requires_grad_()
            return torch.autograd.grad(losses(rows, running.tolist(), leaf).mean(1).sum(), leaf)[0]

    def validate(running: Tensor, value: Tensor) -> Tensor:
        total = torch.zeros(len(running), dtype=torch.float64, device=model.device)
        for first in range(0, len(held_out.target), settings.batch_size):
            part = slice(first, first + settings.batch_size)
            rows = Rows(held_out.residual[part], held_out.attention[part], held_out.target[part])
            total += losses(rows, running.tolist(), value).double().sum(1)
        return (total / len(held_out.target)).float()

    try:
        found = descend(
            start,
            scale,
            gradient,
            validate,
            settings,
            names=["all layers"] if shared else [f"layer {layer}" for layer in range(n_layers)],
            key=f"lenses.{'tuned' if name in ('tuned', 'linear_oca', 'grad') else 'oca'}.learning_rate",
            checkpoint=checkpoint,
            identity=identity,
            what=f"{name} {init}".strip(),
            on_test=on_test,
            sgd=sgd,
        )
    finally:
        batches.close()
    return _lens_of(model, name, init, found.best, jacobian), found


def _problem(
    model: Model, name: LensName, init: str, mean: Tensor, std: Tensor, jacobian: Tensor | None, rows: Rows, seed: int
) -> tuple[Tensor, Tensor, Apply]:
    """Where a fit starts, the unit of its learning rate, and what its values do."""
    n_layers, d = model.n_layers, model.d_model
    one = torch.ones(1, device=model.device)
    unit = std.square().mean(-1).sqrt()[None, :, None]  # [1, L, 1] of each layer's constant
    if name == "oca":
        return mean.repeat(n_layers, 1, 1), unit, lambda value, layers, x: from_all_starts(model, x, layers, value)
    if name == "oca_shared":
        return mean[None].clone(), unit, lambda value, layers, x: from_all_starts(model, x, layers, value[0])
    if name == "grad":
        assert jacobian is not None
        after = rows.residual[:, -1] + rows.attention[:, -1]
        after = after + mlp(model, n_layers - 1, rows.residual[:, -1] if model.parallel else after)  # [B, d]: after all blocks
        bias = after.float().mean(0) - torch.einsum("ld,lde->le", rows.residual.float().mean(0), jacobian)
        spread = after.float().std(0).square().mean().sqrt().reshape(1, 1)
        return bias, spread, lambda value, layers, x: x @ jacobian[list(layers)].to(x.dtype) + value[:, None].to(x.dtype)
    start = torch.zeros(n_layers, d + 1, d, device=model.device)
    if init == "random":
        start = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed)).to(model.device)
        start[:, :d] -= torch.eye(d, device=model.device)
    return start, one[:, None, None], lambda value, layers, x: x + x @ value[:, :d].to(x.dtype) + value[:, d:].to(x.dtype)


def _lens_of(model: Model, name: LensName, init: str, value: Tensor, jacobian: Tensor | None) -> Lens:
    if name in ("oca", "oca_shared"):
        return Lens(name, init, model, {"constants": value[0] if name == "oca_shared" else value})
    if name == "grad":
        assert jacobian is not None
        return Lens(name, init, model, {"matrix": jacobian - torch.eye(model.d_model, device=model.device), "bias": value})
    return Lens(name, init, model, {"matrix": value[:, :-1].contiguous(), "bias": value[:, -1].contiguous()})


def unfitted(model: Model, name: LensName, path: str | Path, expect: dict[str, Any], seed: int = 0) -> Lens:
    """The lenses that need no fit: logit, mean, resample."""
    if name == "logit":
        return Lens(name, "", model, {})
    if name == "mean":
        return Lens(name, "", model, {"constants": attention_moments(path, expect, model.device)[0]})
    with Reader(path, expect) as reader:
        stored = reader["train/attention"]
        order = torch.randperm(len(stored), generator=torch.Generator().manual_seed(seed))[:BANK].sort().values
        bank = torch.cat([to_torch(stored[int(row) : int(row) + 1], stored.bfloat16) for row in order])
    return Lens(
        name, "", model, {"constants": bank[torch.randperm(len(bank), generator=torch.Generator().manual_seed(seed))].to(model.device)}
    )


def mean_jacobian(model: Model, prompts: Batch, tokens_per_batch: int) -> Tensor:
    """Mean over prompts of d(residual after all blocks) / d(residual entering block l), both at the last position: [L, d, d], out last.

    Runs the model, and d backward passes; the other positions stay as they are.
    """
    d, total = model.d_model, torch.zeros(model.n_layers, model.d_model, model.d_model, dtype=torch.float64, device=model.device)
    with progress(what="Jacobian", unit="prompts", total=len(prompts)) as bar:
        for part in prompts.split(tokens_per_batch):
            rows, last = torch.arange(len(part), device=model.device), part.lengths - 1
            shifts = [torch.zeros(len(part), d, dtype=model.dtype, device=model.device, requires_grad=True) for _ in range(model.n_layers)]
            with torch.enable_grad():
                residual = embed(model, part.tokens)
                for layer, shift in enumerate(shifts):
                    residual = residual.index_put((rows, last), shift, accumulate=True)
                    residual = run_block(model, layer, residual, last if layer == model.n_layers - 1 else None)
                out = residual[:, 0].sum(0)  # [d]
                for k in range(d):
                    for layer, slope in enumerate(torch.autograd.grad(out[k], shifts, retain_graph=k < d - 1)):
                        total[layer, :, k] += slope.double().sum(0)
            bar.update(len(part))
    return (total / len(prompts)).float()


# ---- Files ---------------------------------------------------------------------------------------------------------------------


def save(path: str | Path, lens: Lens, metadata: dict[str, Any], found: Descent | None = None) -> None:
    """Write a lens as safetensors with the record of its fit; `metadata` must hold the model's hash."""
    tensors = dict(lens.values) or {"none": torch.zeros(1)}
    if found is not None:
        record = {name: getattr(found, name) for name in ("best_loss", "n_steps", "converged", "curve_steps", "curve_losses")}
        tensors |= {f"fit.{name}": value for name, value in record.items()}
    write_tensors(path, tensors, {"lens": lens.name, "init": lens.init, **metadata})


def load(path: str | Path, model: Model, expect: dict[str, Any]) -> Lens:
    """Read a lens.

    Raises:
        UserError: the file is damaged, or of another model or other rows than `expect` says.
    """
    facts, tensors = read_tensors(path, expect)
    values = {name: value.to(model.device) for name, value in tensors.items() if name in ("constants", "matrix", "bias")}
    return Lens(facts["lens"], facts["init"], model, values)


# ---- Evaluation ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def losses_of(lens: Lens, rows: Rows, batch_size: int) -> tuple[Tensor, Tensor]:
    """KL(model || lens) in nats, and whether their most likely tokens agree: both [L, B]."""
    model = lens.model
    kl, agree = [], []
    for first in range(0, len(rows.target), batch_size):
        part = slice(first, first + batch_size)
        target = rows.target[part]
        predictions = torch.stack([_shifted(lens, first).final(rows.residual[part, layer], layer) for layer in range(model.n_layers)])
        normed, top = final_norm(model, predictions), unembed(model, target).argmax(-1)
        kl.append(unembedded_kl(model, normed, target).cpu())
        agree.append(torch.stack([unembed(model, layer).argmax(-1) == top for layer in normed]).cpu())
    return torch.cat(kl, 1), torch.cat(agree, 1)


def _shifted(lens: Lens, rows: int) -> Lens:
    """The resample lens with its bank moved on, so that what a row draws does not depend on the batches."""
    if lens.name != "resample" or rows == 0:
        return lens
    return Lens(lens.name, lens.init, lens.model, {"constants": lens.values["constants"].roll(-rows, 0)})


@torch.no_grad()
def rows_of(model: Model, batch: Batch) -> Rows:
    """Run the model on prompts that are not cached, and keep what lenses read at the last position."""
    clean = clean_pass(model, batch.tokens, batch.lengths)
    last = [at(entering, clean.last)[:, 0] for entering in clean.entering]
    added = [attention_write(model, layer, at(combined, clean.last))[:, 0] for layer, combined in enumerate(clean.combined)]
    return Rows(torch.stack(last[:-1], 1), torch.stack(added, 1), final_norm(model, last[-1]))
