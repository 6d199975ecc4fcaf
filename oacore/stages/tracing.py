"""Trace facts: average indirect effects on held-out subjects, and a few facts token by token."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from oacore.artefacts import digest_of_tensors, write_json, write_table
from oacore.codehash import codehash
from oacore.config import Config
from oacore.corruption import Corrupt, corruption, trace_own, trace_shared
from oacore.layout import short_hash
from oacore.progress import progress
from oacore.resume import Kept
from oacore.stages.tracing_setting import Setting
from oacore.tasks.prompts import token_text
from oacore.tracing import NOWHERE, Place, Recall, Traced, aie_table, place

PARTS = ("clean", "corrupted", "restored")  # of what is traced
USUAL_NOISE = 3.0  # standard deviations, of ROME and the paper


def run(config: Config) -> None:
    """Write aie.csv, pictures.csv and facts.json."""
    setting = Setting.open(config)
    places, recall, n_layers = setting.places, setting.recall["test"], setting.loaded.model.n_layers
    chosen = setting.pictured
    subjects = recall.subject_numbers
    tables = []
    names = setting.tracing.corruption_names()
    fitted = setting.constants([*places, NOWHERE] if "oat" in names else [NOWHERE]) if setting.tracing.fitted else torch.zeros(0)
    about = [setting.expect, setting.tracing.model_dump(), config.seed, codehash("oacore.stages.tracing"), torch.__version__]
    kept = Kept(setting.layout.tracing(".aie-checkpoint.safetensors"), short_hash([about, digest_of_tensors({"": fitted})]))
    done = kept.load() or {}
    for name in names:
        if f"{name}/clean" in done:
            traced = Traced(*(done[f"{name}/{part}"] for part in PARTS))
        else:
            traced = _traced(setting, name, places)
            done |= {f"{name}/{part}": getattr(traced, part) for part in PARTS}
            kept.save(done)
        tables.append(aie_table(name, traced, places, subjects, setting.settings, n_layers))
    belongs = setting.expect
    about_facts = {"counts": setting.counts, "n_subjects": len(set(subjects.tolist()))}
    write_json(setting.layout.tracing("facts.json"), {**belongs, **about_facts})
    write_table(setting.layout.tracing("pictures.csv"), _pictures(setting, chosen), belongs)
    write_table(setting.layout.tracing("aie.csv"), pd.concat(tables, ignore_index=True), belongs)
    kept.remove()
    print(f"tracing: {len(recall)} facts about {len(set(subjects.tolist()))} subjects, {len(places)} places, {len(tables)} corruptions")


def _traced(setting: Setting, name: str, places: list[Place]) -> Traced:
    """All places under one corruption."""
    model, recall, limit = setting.loaded.model, setting.recall["test"], setting.config.limits.tokens_per_batch
    if name == "oat":
        return trace_own(model, recall, places, setting.constants([*places, NOWHERE]), limit, name)
    constant = setting.constants([NOWHERE])[0] if name == "oat_shared" else None
    corrupt, n_draws = corruption(model, name, setting.statistics, constant, setting.config.seed, setting.tracing.n_draws)
    return trace_shared(model, recall, places, corrupt, n_draws, limit, name)


def _picture_corruptions(setting: Setting) -> list[str]:
    """Optimal ablation's shared constant and noise of about three standard deviations, where there are any."""
    names = setting.tracing.corruption_names()
    noise = sorted((name for name in names if name.startswith("gaussian-")), key=lambda name: abs(float(name.split("-")[1]) - USUAL_NOISE))
    found = ["oat_shared"] * setting.tracing.fitted + noise[:1]
    return found or [names[0]]


def _pictures(setting: Setting, chosen: list[int]) -> pd.DataFrame:
    """Probability of the answer with each token's output of each layer restored, fact by fact."""
    model, limit, n_layers = setting.loaded.model, setting.config.limits.tokens_per_batch, setting.loaded.model.n_layers
    tokenizer, width = setting.loaded.tokenizer, setting.tracing.windows[len(setting.tracing.windows) // 2]
    columns = ["fact", "prompt", "answer", "corruption", "site", "window", "layer", "position", "token", "in_subject"]
    rows: list[tuple[Any, ...]] = []
    for number, row in enumerate(progress(chosen, what="pictures", unit="facts")):
        recall = setting.recall["test"].take(slice(row, row + 1))
        length, inside = int(recall.last[0]) + 1, recall.in_subject[0].tolist()
        tokens = [token_text(tokenizer, token) for token in recall.tokens[0, :length].tolist()]
        answer = tokenizer.decode([token for token in recall.answer[0].tolist() if token >= 0])
        cells = [(site, layer, position) for site in setting.tracing.sites for layer in range(n_layers) for position in range(length)]
        places = [place(site, position, layer, width, n_layers) for site, layer, position in cells]
        for name in _picture_corruptions(setting):
            constant = setting.constants([NOWHERE])[0] if name == "oat_shared" else None
            corrupt, n_draws = corruption(model, name, setting.statistics, constant, setting.config.seed, setting.tracing.n_draws)

            def of_fact(_: Sequence[int], part: Recall, draw: int, corrupt: Corrupt = corrupt, row: int = row) -> Tensor:
                return corrupt([row], part, draw)  # the same noise as in the table

            traced = trace_shared(model, recall, places, of_fact, n_draws, limit, what="")
            both = (float(traced.clean[0]), float(traced.corrupted[0]))
            for (site, layer, position), p_restored in zip(cells, traced.restored[:, 0].tolist(), strict=True):
                about = (number, setting.test.text[setting.test_rows[row]], answer, name, site, width, layer, position)
                rows.append((*about, tokens[position], inside[position], *both, p_restored))
    return pd.DataFrame(rows, columns=[*columns, "p_clean", "p_corrupted", "p_restored"])
