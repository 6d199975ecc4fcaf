"""What an ablation did, on held-out prompts: items of the store, and the rows of the table.

Symbols: N test prompts of a group, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from oacore.circuits.search import Knob
from oacore.config.removal import ROLES, Relearn
from oacore.engine.forward import unembed
from oacore.fits.convergence import Convergence, columns_in, typed
from oacore.metrics import clustered_mean_and_se, kl_divergence
from oacore.removal.ablated import Ablated
from oacore.removal.behaviours import ANSWERED, Behaviours, Group
from oacore.removal.loss import correct
from oacore.removal.relearn import relearn
from oacore.removal.request import Chosen
from oacore.removal.validation import validation_loss
from oacore.store.items import Item

PART = "ablation/"  # of an item: what its ablation is made of


def measured(behaviours: Behaviours, chosen: Chosen, settings: Relearn) -> Item:
    """An ablation, and of every test prompt of each role's tasks its KL in nats, or whether it is answered rightly."""
    ablated, fit = chosen
    before = accuracy_before(behaviours)
    tensors = {f"{PART}{name}": part for name, part in ablated.tensors().items()}
    for role in ROLES:
        for number, group in enumerate(behaviours.groups[role]["test"]):
            tensors[f"{role}/{number}"] = _values(behaviours, ablated, role, group)
    again = relearn(behaviours, ablated, before, settings) if settings.max_steps else None
    facts = {
        "size": ablated.size,
        "before": before,
        "validation": validation_loss(behaviours, ablated),
        "fit": [fit.converged, fit.steps, None if math.isnan(fit.left) else fit.left],
        "relearned": None if again is None else list(again),
    }
    return Item(tensors, facts)


def accuracy_before(behaviours: Behaviours) -> float:
    """Of the forgotten test prompts, without an ablation."""
    (group,) = behaviours.groups["forget"]["test"]
    return float(correct(unembed(behaviours.model, group.final), group.answers, group.wrong).double().mean())


def _values(behaviours: Behaviours, ablated: Ablated, role: str, group: Group) -> Tensor:
    """[N]."""
    model, values, start = behaviours.model, [], 0
    for part in group.batch.split(behaviours.tokens_per_batch):
        rows = slice(start, start := start + len(part))
        with torch.no_grad():
            logits = ablated.logits(behaviours.engine, model, part)
            if role in ANSWERED:
                values.append(correct(logits, group.answers[rows], group.wrong[rows]))
            else:
                values.append(kl_divergence(unembed(model, group.final[rows]).log_softmax(-1), logits))
    return torch.cat(values)


def front(behaviours: Behaviours, method: str, ablation: str, knobs: Sequence[Knob], items: Sequence[Item]) -> Any:
    """The table of one method's ablations, a row for each: see docs/removal.md for its columns."""
    rows = []
    for knob, item in zip(knobs, items, strict=True):
        row: dict[str, Any] = {"method": method, "ablation": ablation, "knob": knob.value, "seed": knob.seed}
        row |= {"ablations": item.facts["size"], "accuracy_before": item.facts["before"]}
        names = {"forget": "forget", "paraphrases": "paraphrase", "retain": "retain", "held_out": "held_out"}
        for role, name in names.items():
            mean, error = _mean(behaviours, role, item.tensors)
            row |= {f"{name}_{'accuracy' if role in ANSWERED else 'kl_nats'}": mean, f"{name}_se": error}
        steps, back, highest = item.facts["relearned"] or (None, None, math.nan)
        converged, taken, left = item.facts["fit"]
        fit = Convergence(converged, taken, math.nan if left is None else left)
        row |= {"relearn_steps": steps, "relearned": back, "relearn_accuracy": highest} | dict(
            zip(columns_in("nats"), fit, strict=True)
        )
        rows.append(row | {"validation_loss_nats": item.facts["validation"]})
    table = typed(pd.DataFrame(rows))
    return table.astype({"relearn_steps": "Int64", "relearned": "boolean"})


def _mean(behaviours: Behaviours, role: str, tensors: Mapping[str, Tensor]) -> tuple[float, float]:
    """Over a role's tasks, each of them the same, and the standard error; NaN of a role without tasks."""
    groups = behaviours.groups[role]["test"]
    if not groups:
        return math.nan, math.nan
    each = [clustered_mean_and_se(tensors[f"{role}/{n}"], group.cluster) for n, group in enumerate(groups)]
    means, errors = zip(*each, strict=True)
    return sum(means) / len(each), math.hypot(*errors) / len(each)
