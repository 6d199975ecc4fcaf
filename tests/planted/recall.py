"""A model with planted factual recall: the one layer that looks a subject's attribute up is known, as ground truth for
causal tracing.

Prompts: BOS, fillers, a marker, a subject of two tokens, fillers, an asking token. The model is LLaMA-like, with the
rotary heads of `planted.circuit.induction`. Its circuit: an early head gathers the subject's first token at the second;
there the ReLU MLP of `recall_layer`, one neuron per pair of tokens, looks the attribute up; a head of `mover_layer`
moves it to the last token, where logits read it. That head finds the subject by a flag which another early head copied
from the marker, two tokens before: the marker comes before the subject, so its token is the same in every corrupted
run.

Everything else is the distractors of `planted.circuit`. A few neurons of every MLP, alarms, read axes on which all
token embeddings are
zero: silent on every prompt, and for any mixture of embeddings, but isotropic noise sets off some, and then they spill
into all of the stream. Hence noise smears: any one of the MLPs up to the mover's layer may be what spoils the recall,
so that restoring it brings the answer back where the embeddings' codes survived the noise; and restoring the recall
layer leaves what the others spoil. A constant carries nothing about the subject to any other layer, and one within the
span of the embeddings sets off no alarm. Without the spill, noise hardly smears: restoring another layer does not
repair the codes that the lookup reads.

Symbols: d model width, H heads, c code width, f MLP width, N prompts, T tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from oacore.models.weights import Model
from planted.circuit import (
    CONFIDENCE,
    MAX_LENGTH,
    SHARPNESS,
    PreviousToken,
    _axes,
    _below,
    _distractors,
    _model,
    _normal,
    _signs,
    _silence,
)

N_LAYERS, N_FILLERS, MAX_FILLERS = 8, 8, 4  # the last: on each side of the subject
# per junk axis of an embedding, against 1 of its code: noise of 3 standard deviations does not drown every code
BACKGROUND = 0.05
N_ALARMS, N_VOID = 4, 8  # neurons per MLP, and the axes that they read
# its input is then normal with standard deviation 0.66 and threshold 1 for noise of 3 standard deviations
ALARM_GAIN = 2.0
SPILL = 2.5  # what an alarm writes per axis, against 1 of the circuit, when its input exceeds the threshold by 1


@dataclass(frozen=True, eq=False)
class PlantedRecall:
    """A model and prompts about subjects whose attribute it recalls in one known layer."""

    model: Model
    tokens: Tensor  # [N, T], padded on the right with BOS
    lengths: Tensor  # [N]
    subject: Tensor  # [N, 2] half-open span of positions
    answers: Tensor  # [N] right next token
    recall_layer: int  # whose MLP looks the attribute up, at the last subject token
    mover_layer: int  # whose attention moves it to the last token


def recall(seed: int, per_subject: int = 3, spill: float = SPILL) -> PlantedRecall:
    """8 layers of 4 heads, 36 subjects: all pairs of 6 first and 6 second tokens, of each of which one subject has each
    of 6 attributes.

    Args:
        per_subject: prompts about each subject; N is 36 times as many.
        spill: how far noise spreads through the MLPs; the clean model is the same for all.
    """
    draw = torch.Generator().manual_seed(seed)
    d, H, c, f, n = 96, 4, 3, 64, 6
    first, second, gathered, marker, flag, recalled, answer, void, junk = _axes(draw, d, c, c, c, 1, 1, c, c, N_VOID)
    first_codes, second_codes, attribute_codes = (_signs(draw, c) for _ in range(3))  # [n, c]
    recall_layer = 3 + _below(draw, 3)
    mover_layer = recall_layer + 1 + _below(draw, N_LAYERS - 1 - recall_layer)
    gather_layer, flag_layer = _below(draw, 3), _below(draw, 3)
    gatherer, flagger = torch.randperm(H, generator=draw)[:2].tolist()  # distinct, as their layers may be the same
    mover = _below(draw, H)

    parts = [_distractors(draw, H, MAX_LENGTH + c, f, junk, rms=True) for _ in range(N_LAYERS)]
    alarms, heard = slice(f - N_ALARMS, f), torch.eye(d) - void @ void.T
    for part in parts:
        part["W_in"][:, alarms], part["b_in"][alarms] = (
            ALARM_GAIN * void @ _normal(draw, N_VOID, N_ALARMS) / N_VOID**0.5,
            -1.0,
        )
        part["W_out"][alarms] += spill * _normal(draw, N_ALARMS, d) @ heard  # no alarm sets off another

    content = slice(MAX_LENGTH, None)  # of a head, after its rotary coordinates
    head = _look_back(_silence(parts[gather_layer], gatherer), 1)
    head["W_V"][:, content], head["W_O"][content] = first, gathered.T
    head = _look_back(_silence(parts[flag_layer], flagger), 2)
    head["W_V"][:, MAX_LENGTH], head["W_O"][MAX_LENGTH] = marker[:, 0], flag[:, 0]
    head = _silence(parts[mover_layer], mover)
    head["b_Q"][MAX_LENGTH], head["W_K"][:, MAX_LENGTH] = SHARPNESS, flag[:, 0]
    head["W_V"][:, content], head["W_O"][content] = recalled, answer.T

    i, j = torch.arange(n * n) // n, torch.arange(n * n) % n  # tokens of each subject
    attribute = (i + j) % n  # a Latin square: neither token alone says anything about it
    lookup = parts[
        recall_layer
    ]  # its first neurons, 1 for both of a subject's tokens and 0 for one; the others stay distractors
    lookup["W_in"][:, : n * n] = 2 * (gathered @ first_codes[i].T + second @ second_codes[j].T)
    lookup["b_in"][: n * n], lookup["W_out"][: n * n] = -3.0, attribute_codes[attribute] @ recalled.T

    # Token ids: BOS is 0; the others in random order.
    order = 1 + torch.randperm(2 + N_FILLERS + 3 * n, generator=draw)
    ask, mark, fillers, firsts, seconds, values = order.split((1, 1, N_FILLERS, n, n, n))
    W_E = BACKGROUND * _normal(draw, 1 + len(order), junk.shape[1]) @ junk.T
    W_E[firsts] += first_codes @ first.T
    W_E[seconds] += second_codes @ second.T
    W_E[mark] += marker.T
    W_U = torch.zeros_like(W_E)
    W_U[values] = CONFIDENCE * attribute_codes @ answer.T
    model = _model(parts, family="llama", activation="relu", W_E=W_E, W_pos=None, W_U=W_U, rotary=PreviousToken())

    i, j, attribute = (x.repeat(per_subject) for x in (i, j, attribute))
    rows = torch.arange(len(i))
    start = 2 + torch.randint(MAX_FILLERS + 1, rows.shape, generator=draw)
    lengths = start + 3 + torch.randint(1, MAX_FILLERS + 1, rows.shape, generator=draw)
    position = torch.arange(int(lengths.max()))
    tokens = fillers[torch.randint(N_FILLERS, (len(rows), len(position)), generator=draw)]
    tokens[rows, start - 1], tokens[rows, start], tokens[rows, start + 1], tokens[rows, lengths - 1] = (
        mark,
        firsts[i],
        seconds[j],
        ask,
    )
    tokens[(position == 0) | (position >= lengths[:, None])] = 0
    return PlantedRecall(
        model, tokens, lengths, torch.stack((start, start + 2), 1), values[attribute], recall_layer, mover_layer
    )


def _look_back(head: dict[str, Tensor], steps: int) -> dict[str, Tensor]:
    """Make a silent head attend so many tokens back, whatever it reads."""
    angles, strength = PreviousToken.frequencies, (2 * SHARPNESS / MAX_LENGTH) ** 0.5
    head["b_Q"][:MAX_LENGTH] = strength * torch.cat((torch.ones_like(angles), torch.zeros_like(angles)))
    head["b_K"][:MAX_LENGTH] = strength * torch.cat(((steps * angles).cos(), (steps * angles).sin()))
    return head
