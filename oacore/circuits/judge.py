"""Judge circuits on equal terms, whichever method found them: constants fitted anew, then held-out losses; both are
items of the store, by circuit.

Symbols: C circuits, J destinations, S sources, N prompts.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from oacore.circuits.constants import Constants
from oacore.circuits.evaluate import CircuitLosses, circuit_losses, refit_constants
from oacore.circuits.task import CircuitTask
from oacore.config.base import OptimalFit
from oacore.config.circuits import EDGE_ABLATIONS, EdgeAblation
from oacore.config.run import Config
from oacore.fits.convergence import UNFITTED, Convergence, of_descent
from oacore.fits.record import descent_of, items_of_fits
from oacore.fits.resume import NOT_KEPT, Resumable
from oacore.inputs import items_of
from oacore.jobs import Files
from oacore.store.artefacts import digest_of_tensors
from oacore.store.items import Item

JUDGED_ON = ("test", "validation")  # circuits are reported on the first and chosen on the second
JUDGED_BY = "oacore.circuits.evaluate"


@dataclass(frozen=True)
class Judged:
    """What is said of C circuits, on the CPU."""

    losses: dict[str, CircuitLosses]  # by split, [C, N]
    constants: Constants | None  # C of them; None where the ablation type fits none
    fits: Sequence[Convergence]  # C of them


@dataclass(frozen=True)
class Judge:
    """One task's prompts and one ablation type, under which circuits are judged.

    Args:
        inputs: with `model`, beside which the store of items lies.
        settings: of the constants' fit.
        what: named in messages and progress.
    """

    config: Config
    inputs: Files
    task: CircuitTask
    ablation: EdgeAblation
    settings: OptimalFit
    what: str
    resumable: Resumable = NOT_KEPT

    def judge(self, masks: Tensor, names: Sequence[str]) -> Judged:
        """Each of C circuits; equal ones, as neighbouring knobs often find, are fitted once.

        Args:
            masks: bool [C, J, S].
            names: what errors call them.
        """
        packed = np.packbits(masks.flatten(1).numpy(), axis=1)
        unique, first, which = np.unique(packed, axis=0, return_index=True, return_inverse=True)
        circuits = _Circuits(
            [names[row] for row in first],
            masks[first].float().to(self.task.engine.model.device),
            [{"mask": hashlib.sha256(row.tobytes()).hexdigest()} for row in unique],
        )
        constants, fits = (
            self._fit(circuits) if EDGE_ABLATIONS[self.ablation].fitted else (None, [UNFITTED] * len(first))
        )
        losses = {split: self._losses(circuits, constants, split) for split in JUDGED_ON}
        rows = torch.from_numpy(which.reshape(-1))
        return Judged(
            {split: CircuitLosses(*(part[rows] for part in of)) for split, of in losses.items()},
            None if constants is None else Constants(*(values[rows] for values in constants)),
            [fits[row] for row in rows.tolist()],
        )

    def _fit(self, circuits: "_Circuits") -> tuple[Constants, Sequence[Convergence]]:
        """Constants of every circuit, and how their fits came out."""
        task, start = self.task, self.task.start(self.ablation)
        what = f"{self.what} refit"
        items = items_of(
            self.config,
            self.inputs,
            "refits",
            task.provenance,
            ["train", "validation"],
            [JUDGED_BY, EDGE_ABLATIONS[self.ablation].module],
            ablation=self.ablation,
            settings=self.settings.model_dump(),
        )

        def compute(new: list[int]) -> list[Item]:
            _, descent = refit_constants(
                task.passes["train"],
                task.passes["validation"],
                start,
                task.constant_scales,
                circuits.masks[new],
                self.settings,
                names=[circuits.names[row] for row in new],
                seed=task.seed,
                resumable=self.resumable.part("fit", items.identity([circuits.digests[row] for row in new])),
                what=what,
            )
            return items_of_fits(descent, [[row] for row in range(len(new))])

        descent = descent_of(items.get(circuits.digests, compute, what))
        print(f"{what}: constants of {int(descent.converged.sum())} of {len(circuits.names)} circuits converged")
        return start.unflattened(descent.best), of_descent(descent)

    def _losses(self, circuits: "_Circuits", constants: Constants | None, split: str) -> CircuitLosses:
        """Of every circuit, on one split's prompts."""
        task, own = self.task, circuits.digests
        if constants is not None:
            rows = [Constants(*(part[row] for part in constants)) for row in range(len(own))]
            own = [of | {"constants": digest_of_tensors(row._asdict())} for of, row in zip(own, rows, strict=True)]
        items = items_of(
            self.config,
            self.inputs,
            "losses",
            task.provenance,
            ["train", split],
            [JUDGED_BY, EDGE_ABLATIONS[self.ablation].module],
            ablation=self.ablation,
            split=split,
        )

        def compute(new: list[int]) -> list[Item]:
            replacements = task.replacements(self.ablation, split, task.start(self.ablation))
            device = circuits.masks.device
            chosen = None if constants is None else Constants(*(part[new].to(device) for part in constants))
            found = circuit_losses(task.passes[split], circuits.masks[new], replacements, chosen)
            return [Item({"kl": kl, "logit_diff": other}) for kl, other in zip(*found, strict=True)]

        of_circuits = items.get(own, compute, f"{self.what} losses on the {split} prompts")
        return CircuitLosses(
            *(torch.stack([item.tensors[name] for item in of_circuits]) for name in CircuitLosses._fields)
        )


@dataclass(frozen=True)
class _Circuits:
    """The different circuits among all that are judged."""

    names: list[str]  # what errors call them
    masks: Tensor  # [C, J, S]
    digests: list[dict[str, str]]  # what determines an item of each
