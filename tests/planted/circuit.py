"""Models with a planted circuit: hand-set weights whose true edges are known, as ground truth for circuit discovery.

The circuit's own heads and MLP read and write disjoint subspaces of the residual stream. Every other head and MLP is a
distractor: it reads all of the stream and writes loudly, but into a subspace that only distractors read, apart from a
faint leak everywhere. One head more always writes the same into what the logits read: it matters only to those who
replace it by something else than its mean.

What is true holds for ablations to a constant fitted to or averaged over prompts, and to the counterfactual prompt; not
for zero ablation. An edge that carries the same on every prompt is no true edge: the heads below find positions by
rotary angles or constant queries. Norms are linear to within rounding (their epsilon dwarfs the stream), so that no
edge acts through a norm's scale.

Symbols: d model width, H heads, k head width, f MLP width, V vocabulary, N prompts, T tokens, J destinations, S
sources.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from oacore.engine.clean import Batch
from oacore.models.weights import Block, Model, Norm

EPSILON = 1e6  # of every norm, whose weight undoes it
SHARPNESS = 12.0  # attention score of a match; all others are 0 or below
CONFIDENCE = 8.0  # logit of the right answer; all others are about 0 or below
LOUDNESS = 10.0  # distractors' writes, against 1 of the circuit's
LEAK = 0.002  # share of that which reaches the circuit's subspaces
MAX_LENGTH = 16  # tokens, and the period of the rotary angles


@dataclass(frozen=True, eq=False)
class Planted:
    """A model, prompts that it completes rightly by its circuit alone, and the edges of that circuit."""

    name: str
    model: Model
    prompts: Batch
    counterfactual: Batch  # other prompts of the same length, with another answer
    answers: Tensor  # [N, 1] right next token
    wrong: Tensor  # [N, 1] the counterfactual's
    true_edges: np.ndarray  # bool [J, S]


def auroc(scores: np.ndarray, true_edges: np.ndarray, valid: np.ndarray) -> float:
    """Probability that a true edge scores above a false one, ties counting half: scores, true_edges and valid are [J,
    S].

    Raises:
        ValueError: a NaN score, or no true or no false edge to compare.
    """
    scores, truth = np.asarray(scores, np.float64)[valid], true_edges[valid]
    n_true, n_false = int(truth.sum()), int((~truth).sum())
    if np.isnan(scores).any() or not n_true or not n_false:
        raise ValueError(
            f"{int(np.isnan(scores).sum())} NaN scores, {n_true} true and {n_false} false edges; allowed: 0, 1 or more "
            "of each"
        )
    return float((rankdata(scores)[truth].sum() - n_true * (n_true + 1) / 2) / (n_true * n_false))


class PreviousToken(torch.nn.Module):
    """Rotary angles whose cosines at any whole number of steps below the period sum to 0, save at no step."""

    frequencies = 2 * torch.pi * (torch.arange(MAX_LENGTH // 2) + 0.5) / MAX_LENGTH

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = (positions[..., None] * self.frequencies.to(x.device)).repeat(1, 1, 2)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def induction(seed: int, n_prompts: int = 64) -> Planted:
    """A B ... A -> B in 3 layers of 4 heads: a previous-token head, and an induction head in a later layer whose keys
    read it.

    LLaMA-like: RMSNorm and rotary embedding of half the head width, by which the first head finds the previous token
    whatever it reads.
    """
    draw = torch.Generator().manual_seed(seed)
    d, H, c, n_layers = 64, 4, 16, 3
    token, previous, answer, junk = _axes(draw, d, c, c, c)
    codes = torch.cat((torch.zeros(1, c), _signs(draw, c)))  # [V, c]; BOS has none
    first = _below(draw, n_layers - 1)
    second = first + 1 + _below(draw, n_layers - 1 - first)
    heads = [_below(draw, H) for _ in range(n_layers)]
    parts = [_distractors(draw, H, MAX_LENGTH + c, 32, junk, rms=True) for _ in range(n_layers)]
    content = slice(MAX_LENGTH, None)  # of a head, after its rotary coordinates

    angles = PreviousToken.frequencies
    query, key = torch.cat((torch.ones_like(angles), torch.zeros_like(angles))), torch.cat((angles.cos(), angles.sin()))
    strength = (SHARPNESS / len(angles)) ** 0.5
    before = _silence(parts[first], heads[first])
    before["b_Q"][:MAX_LENGTH], before["b_K"][:MAX_LENGTH] = query * strength, key * strength
    before["W_V"][:, content], before["W_O"][content] = token, previous.T

    match = _silence(parts[second], heads[second])
    match["W_Q"][:, content], match["W_K"][:, content] = token * SHARPNESS, previous
    match["W_V"][:, content], match["W_O"][content] = token, answer.T

    _write_the_same(draw, parts, [(first, heads[first]), (second, heads[second])], answer)
    W_E = codes @ token.T + _normal(draw, len(codes), junk.shape[1]) @ junk.T
    model = _model(
        parts,
        family="llama",
        activation="gelu",
        W_E=W_E,
        W_pos=None,
        W_U=CONFIDENCE * codes @ answer.T,
        rotary=PreviousToken(),
    )

    T = 12
    words = (
        1 + torch.rand(n_prompts, len(codes) - 1, generator=draw).argsort(1)[:, : 2 * (T - 2)]
    )  # none twice in a pair of prompts
    tokens = torch.zeros(2, n_prompts, T, dtype=torch.long)  # clean, counterfactual
    tokens[:, :, 1:-1] = words.unflatten(1, (2, T - 2)).transpose(0, 1)
    place = torch.randint(1, T - 2, (2, n_prompts, 1), generator=draw)
    tokens[:, :, -1:] = tokens.gather(2, place)
    right, wrong = tokens.gather(2, place + 1)
    head, matcher = f"a{first}.h{heads[first]}", f"a{second}.h{heads[second]}"
    edges = f"input->{head}<v> {head}->{matcher}<k> input->{matcher}<q> input->{matcher}<v> {matcher}->logits"
    return _planted("induction", model, tokens, right, wrong, edges)


def chain(seed: int, n_prompts: int = 64) -> Planted:
    """Entries (key, value) and one item in any order -> the value of the key that belongs to the item, in 4 layers of 3
    heads.

    A head moves the item to the last position, a ReLU MLP looks up its key, a later head attends to that key's entry
    and copies its value. GPT-2-like: LayerNorm and learned positions, which only distractors read.
    """
    draw = torch.Generator().manual_seed(seed)
    d, H, k, n_layers, n_keys, n_values = 48, 3, 8, 4, 8, 4
    flag, item, key, value, moved, wanted, answer, junk = _axes(draw, d, 1, 4, 4, 2, 4, 4, 2, centred=True)
    item_codes, key_codes, value_codes = _signs(draw, 4), _signs(draw, 4), _signs(draw, 2)
    first = _below(draw, 2)
    middle = first + _below(draw, n_layers - 1 - first)
    last = middle + 1 + _below(draw, n_layers - 1 - middle)
    heads = [_below(draw, H) for _ in range(n_layers)]
    parts = [_distractors(draw, H, k, 32, junk, rms=False) for _ in range(n_layers)]

    mover = _silence(parts[first], heads[first])
    mover["b_Q"][0], mover["W_K"][:, :1] = SHARPNESS, flag
    mover["W_V"][:, :4], mover["W_O"][:4] = item, moved.T

    lookup = parts[middle]  # n_keys of its neurons, the others are distractors
    lookup["W_in"][:, :n_keys], lookup["b_in"][:n_keys] = 2 * moved @ item_codes.T, -1.0
    lookup["W_out"][:n_keys] = key_codes @ wanted.T

    copier = _silence(parts[last], heads[last])
    copier["W_Q"][:, :4], copier["W_K"][:, :4] = wanted * SHARPNESS, key
    copier["W_V"][:, :2], copier["W_O"][:2] = value, answer.T

    _write_the_same(draw, parts, [(first, heads[first]), (last, heads[last])], answer)
    # Token ids: BOS is 0; the asking token, items, entries and values in random order.
    order = 1 + torch.randperm(1 + n_keys + n_keys * n_values + n_values, generator=draw)
    ask, items, entries, values = order.split((1, n_keys, n_keys * n_values, n_values))
    entries = entries.view(n_keys, n_values)
    W_E = _normal(draw, 1 + len(order), junk.shape[1]) @ junk.T
    W_E[items] += item_codes @ item.T + flag.T
    W_E[entries] += (key_codes @ key.T)[:, None] + value_codes @ value.T
    W_U = torch.zeros_like(W_E)
    W_U[values] = CONFIDENCE * value_codes @ answer.T
    W_pos = _normal(draw, MAX_LENGTH, junk.shape[1]) @ junk.T
    model = _model(parts, family="gpt2", activation="relu", W_E=W_E, W_pos=W_pos, W_U=W_U, rotary=None)

    # The counterfactual has another item, at another place, and another value of its key.
    asked = torch.randint(n_keys, (n_prompts,), generator=draw)
    asked = torch.stack((asked, (asked + torch.randint(1, n_keys, (n_prompts,), generator=draw)) % n_keys))  # [2, N]
    held = torch.randint(n_values, (2, n_prompts, n_keys), generator=draw)
    rows = torch.arange(n_prompts)
    right = held[0, rows, asked[0]]
    wrong = (right + torch.randint(1, n_values, (n_prompts,), generator=draw)) % n_values
    held[1, rows, asked[1]] = wrong
    shown = torch.cat((entries[torch.arange(n_keys), held], items[asked][..., None]), 2)  # [2, N, n_keys + 1]
    shuffled = torch.rand(n_prompts, n_keys + 1, generator=draw).argsort(1)
    tokens = torch.zeros(2, n_prompts, n_keys + 3, dtype=torch.long)
    tokens[0, :, 1:-1] = shown[0].gather(1, shuffled)
    tokens[1, :, 1:-1] = shown[1].gather(1, shuffled.roll(1, 1))
    tokens[:, :, -1] = ask
    head, mlp, reader = f"a{first}.h{heads[first]}", f"m{middle}", f"a{last}.h{heads[last]}"
    into = f"input->{head}<k> input->{head}<v> {head}->{mlp} {mlp}->{reader}<q>"
    edges = f"{into} input->{reader}<k> input->{reader}<v> {reader}->logits"
    return _planted("chain", model, tokens, values[right][:, None], values[wrong][:, None], edges)


def _normal(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=draw)


def _below(draw: torch.Generator, n: int) -> int:
    return int(torch.randint(n, (1,), generator=draw))


def _axes(draw: torch.Generator, d: int, *sizes: int, centred: bool = False) -> Sequence[Tensor]:
    """Random orthonormal axes of the stream [d, n] for each size n, and one more for what is left; centred: none has a
    mean over d.
    """
    basis = torch.linalg.qr(torch.cat((torch.ones(d, 1, dtype=torch.float64), _normal(draw, d, d - 1).double()), 1))[
        0
    ].float()
    basis = basis[:, 1:] if centred else basis @ torch.linalg.qr(_normal(draw, d, d))[0]
    return basis.split((*sizes, basis.shape[1] - sum(sizes)), 1)


def _signs(draw: torch.Generator, c: int) -> Tensor:
    """2 c unit vectors [2 c, c] in random order, of which no two have a positive product: the axes and their
    opposites.
    """
    return torch.cat((torch.eye(c), -torch.eye(c)))[torch.randperm(2 * c, generator=draw)]


def _distractors(draw: torch.Generator, H: int, k: int, f: int, junk: Tensor, *, rms: bool) -> dict[str, Any]:
    """The parts of a block of random heads and a random MLP."""
    d = len(junk)
    quiet = (
        torch.eye(d) - (1 - 1 / (4 * LOUDNESS)) * junk @ junk.T
    )  # some 16 of them write to the loud subspace: what is read does not grow

    def reads(*shape: int) -> Tensor:
        return (quiet @ _normal(draw, d, prod(shape))).unflatten(1, shape)

    def writes(*shape: int) -> Tensor:
        loud = _normal(draw, *shape, junk.shape[1]) @ junk.T + LEAK * _normal(draw, *shape, d)
        return loud * LOUDNESS / (shape[-1] * junk.shape[1]) ** 0.5

    norm = Norm(torch.full((d,), EPSILON**0.5), None if rms else torch.zeros(d), EPSILON, rms)
    parts: dict[str, Any] = {
        "attention_norm": norm,
        "mlp_norm": norm,
        "attention_post_norm": None,
        "mlp_post_norm": None,
    }
    parts |= {"attention_scale": 1.0, "attention_softcap": None, "window": None, "W_gate": None}
    parts |= {name: reads(H, k) for name in ("W_Q", "W_K", "W_V")} | {
        name: torch.zeros(H, k) for name in ("b_Q", "b_K", "b_V")
    }
    parts |= {"W_O": writes(H, k), "b_O": junk @ _normal(draw, junk.shape[1])}
    return parts | {"W_in": reads(f), "b_in": _normal(draw, f), "W_out": writes(f), "b_out": torch.zeros(d)}


def _silence(parts: dict[str, Any], head: int) -> dict[str, Tensor]:
    """Views of one head's weights (W_Q, W_K, W_V [d, k], W_O [k, d], biases [k]), all set to zero."""
    views = {name: parts[name][:, head] for name in ("W_Q", "W_K", "W_V")}
    views |= {name: parts[name][head] for name in ("W_O", "b_Q", "b_K", "b_V")}
    for view in views.values():
        view.zero_()
    return views


def _write_the_same(
    draw: torch.Generator, parts: Sequence[dict[str, Any]], taken: Sequence[tuple[int, int]], answer: Tensor
) -> None:
    """Make a distractor head write one constant vector into what the logits read."""
    free = [
        (layer, head)
        for layer in range(len(parts))
        for head in range(len(parts[0]["b_Q"]))
        if (layer, head) not in taken
    ]
    layer, head = free[_below(draw, len(free))]
    weights = _silence(parts[layer], head)
    weights["b_V"][0], weights["W_O"][0] = 1.0, answer @ _normal(draw, answer.shape[1]) / CONFIDENCE


def _model(parts: Sequence[dict[str, Any]], **own: Any) -> Model:
    shared: dict[str, Any] = {
        "parallel": False,
        "embed_scale": 1.0,
        "b_U": None,
        "logit_softcap": None,
        "max_length": MAX_LENGTH,
    }
    return Model(blocks=tuple(Block(**part) for part in parts), final_norm=parts[0]["attention_norm"], **shared, **own)


def _planted(name: str, model: Model, tokens: Tensor, right: Tensor, wrong: Tensor, edges: str) -> Planted:
    """Of clean and counterfactual tokens [2, N, T], answers [N, 1] and the names of the true edges, separated by
    spaces.
    """
    lengths = torch.full((tokens.shape[1],), tokens.shape[2])
    mask = np.zeros(model.graph.valid.shape, bool)
    for s, j in map(model.graph.edge, edges.split()):
        mask[j, s] = True
    return Planted(name, model, Batch(tokens[0], lengths), Batch(tokens[1], lengths), right, wrong, mask)
