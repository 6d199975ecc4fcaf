"""Models with planted effects: hand-set weights whose direct, indirect and joint effects are known in closed form.

A prompt is BOS and one word; the model says the word again. What is true of the stream after BOS is all that there is:
heads look at both tokens alike, BOS writes nothing, so that a head is a linear map of the stream, and an MLP a row of
ReLUs. Norms are linear to within rounding (their epsilon dwarfs the stream). Every split has each word once, so that
the mean of what a source writes favours no word, and another prompt always has another word.

Symbols: W words, d model width, V = W + 1 vocabulary, f MLP width.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from oacore.circuits.judge import Judge
from oacore.circuits.passes import Examples, Passes
from oacore.circuits.task import CircuitTask
from oacore.config.circuits import Refit
from oacore.config.read import parse_config
from oacore.engine.activations import _add_sources
from oacore.engine.clean import Batch, clean_pass
from oacore.engine.forward import at, final_norm
from oacore.engine.masked import Engine
from oacore.engine.statistics import Moments, Statistics
from oacore.jobs import Files
from oacore.models.weights import Block, Model, Norm
from oacore.store.provenance import Provenance

WORDS = 8
LAYERS, HEADS = 2, 2
WIDTH = 4 * WORDS + 1
EPSILON = 1e6  # of every norm, whose weight undoes it
NEVER = -100.0  # logit of what is never said
# Axes of the stream: the word as it is read, two messages, the answer, and a gate.
WORD, MESSAGE, OTHER, ANSWER = (slice(n * WORDS, (n + 1) * WORDS) for n in range(4))
GATE = slice(4 * WORDS, WIDTH)
ONE_OF_EACH = torch.eye(WORDS)


def linear(*parts: tuple[slice, Tensor, slice]) -> Tensor:
    """A map of the stream [d, d], the sum of (axes that it reads, matrix, axes that it writes)."""
    matrix = torch.zeros(WIDTH, WIDTH)
    for reads, weights, writes in parts:
        matrix[reads, writes] += weights
    return matrix


@dataclass(frozen=True)
class Neurons:
    """An MLP: ReLU(stream @ reads + bias) @ writes."""

    reads: Tensor  # [d, f]
    bias: float
    writes: Tensor  # [f, d]

    @classmethod
    def of(cls, *reads: tuple[slice, Tensor], bias: float = 0.0, size: float) -> "Neurons":
        """A neuron for each word, which adds up (axes, matrix) and writes the word's answer times `size`."""
        matrix, answer = torch.zeros(WIDTH, WORDS), torch.zeros(WORDS, WIDTH)
        for axes, weights in reads:
            matrix[axes] += weights
        answer[:, ANSWER] = size * ONE_OF_EACH
        return cls(matrix, bias, answer)


def planted(
    heads: Mapping[str, Tensor], mlps: Mapping[str, Neurons], words: Tensor | None = None, said: Tensor | None = None
) -> Model:
    """The model of these heads and MLPs by name; all others write nothing.

    Args:
        words: what each word writes to the `WORD` axes, [W, W]; an axis of its own by default.
        said: how much each answer axis speaks for each word, [W, W]; for its own word alone by default.
    """
    norm = Norm(torch.full((WIDTH,), EPSILON**0.5), None, EPSILON, True)
    blocks = []
    for layer in range(LAYERS):
        # Both tokens are looked at alike, and BOS has nothing to say: twice the half of it.
        values = [2 * heads.get(f"a{layer}.h{head}", torch.zeros(WIDTH, WIDTH)) for head in range(HEADS)]
        nothing = Neurons(torch.zeros(WIDTH, WORDS), 0.0, torch.zeros(WORDS, WIDTH))
        neurons = mlps.get(f"m{layer}", nothing)
        zeros = torch.zeros(WIDTH, HEADS, WIDTH)
        blocks.append(
            Block(
                attention_norm=norm, mlp_norm=norm, attention_post_norm=None, mlp_post_norm=None,
                W_Q=zeros, W_K=zeros, W_V=torch.stack(values, 1), W_O=torch.eye(WIDTH).repeat(HEADS, 1, 1),
                b_Q=None, b_K=None, b_V=None, b_O=None, attention_scale=1.0, attention_softcap=None, window=None,
                W_in=neurons.reads, W_gate=None, W_out=neurons.writes,
                b_in=torch.full((WORDS,), neurons.bias), b_out=torch.zeros(WIDTH),
            )
        )  # fmt: skip
    W_E, W_U = torch.zeros(WORDS + 1, WIDTH), torch.zeros(WORDS + 1, WIDTH)
    W_E[1:, WORD] = ONE_OF_EACH if words is None else words
    W_U[1:, ANSWER] = ONE_OF_EACH if said is None else said
    return Model(
        family="planted", parallel=False, W_E=W_E, W_pos=None, embed_scale=1.0, rotary=None, activation="relu",
        blocks=tuple(blocks), final_norm=norm, W_U=W_U, b_U=torch.tensor([NEVER] + [0.0] * WORDS),
        logit_softcap=None, max_length=8,
    )  # fmt: skip


def judge_of(model: Model, ablation: str, folder, settings: Refit) -> Judge:
    """What judges sets of edges of a planted model, with a store in a folder; all splits have the same prompts."""
    words = torch.arange(1, WORDS + 1)
    tokens = torch.stack((torch.zeros(WORDS, dtype=torch.long), words), 1)
    lengths = torch.full((WORDS,), 2)
    batch, other = Batch(tokens, lengths), Batch(torch.stack((tokens[:, 0], words.roll(1)), 1), lengths)
    clean = clean_pass(model, batch.tokens, lengths)
    moments = Moments(2)
    _add_sources(moments, clean, lengths)
    shapes = {"input": (WIDTH,), "head": (LAYERS, HEADS, WIDTH), "mlp": (LAYERS, WIDTH)}
    mean = {name: moments.mean(f"{name}/mean", shape) for name, shape in shapes.items()}
    std = {name: moments.std(name, shape) for name, shape in shapes.items()}
    engine = Engine(model)
    final = final_norm(model, at(clean.entering[-1], clean.last))[:, 0]
    examples = Examples(batch, other, engine.prompts(batch), final, words[:, None], words.roll(1)[:, None])
    splits = ("train", "validation", "test")
    provenance = Provenance({"model_hash": "planted", "task": "ioi", "prompts_hash": dict.fromkeys(splits, "words")})
    task = CircuitTask(
        "words", engine, {split: Passes(engine, examples, 1e9) for split in splits}, Statistics(2, mean, std, {}, {}),
        0, np.arange(WORDS), provenance,
    )  # fmt: skip
    config = parse_config({"tasks": {"ioi": None}, "device": "cpu"})
    return Judge(config, Files({"model": str(folder / "model.json")}), task, ablation, settings, "planted")
