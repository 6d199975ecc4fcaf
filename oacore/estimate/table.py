"""Memory and arithmetic of every stage that may use a GPU, from the model's sizes and the config alone: estimates, not
bounds.

Every formula counts the tensors that are alive at a stage's fullest moment, as the code it names makes them;
tests/estimate holds them against measured peaks and counted FLOP. Free of torch, because the Snakefile asks on every
dry run.

Symbols: b bytes of a weight, L layers, H heads, G key/value heads, k head width, d model width, f MLP width, V
vocabulary, S sources, J destinations, E edges; X tokens (rows x positions) of one batch, T tokens of a prompt, t = T -
1 after BOS, R rows, F fits.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from oacore.config.run import Config
from oacore.config.tasks import task_row
from oacore.estimate.ablation import gaps, optimal
from oacore.estimate.case import Case
from oacore.estimate.circuits import circuits
from oacore.estimate.inputs import activations, model, prompts
from oacore.estimate.interactions import interaction_ranking, interactions
from oacore.estimate.lens_evaluation import lens_evaluation, lens_faithfulness, lens_truthfulness
from oacore.estimate.lenses import lens_activations, lens_fit
from oacore.estimate.need import Need
from oacore.estimate.removal import removal
from oacore.estimate.tracing import tracing, tracing_fit

RULES: dict[str, Callable[..., Need]] = {
    stage.__name__: stage
    for stage in (
        model, prompts, activations, optimal, gaps, circuits, interaction_ranking, interactions,
        removal, tracing_fit, tracing,
        lens_activations, lens_fit, lens_evaluation, lens_faithfulness, lens_truthfulness,
    )
}  # fmt: skip


def needs(case: Case, jobs: Iterable[tuple[str, dict[str, str], str]]) -> Iterator[Need]:
    """Of every job that may use a GPU, from `oacore.jobs.jobs`."""
    for rule, wildcards, _ in jobs:
        runs_model = rule != "prompts" or task_row(wildcards["task"]).completed
        if rule in RULES and runs_model:
            yield RULES[rule](case, **wildcards)


def has_gpu(config: Config) -> bool:
    """Whether jobs will take a GPU, as far as can be seen without torch."""
    return config.device == "cuda" or (config.device == "auto" and Path("/proc/driver/nvidia/version").exists())


def host_memory_bytes() -> float:
    """Of this machine, 0 where unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0.0


def table(all_needs: Iterable[Need], *, device: str, memory_bytes: float, flop_per_second: float | None) -> str:
    """One line per rule with its hungriest job; time, at `flop_per_second`, of all its jobs one after another.

    Args:
        memory_bytes: of the device, 0 where unknown.
        flop_per_second: without it, the arithmetic itself is shown.
    """
    by_rule: dict[str, list[Need]] = {}
    for need in all_needs:
        by_rule.setdefault(need.rule, []).append(need)

    def cost(jobs: Iterable[Need]) -> str:
        flop = sum(need.flop for need in jobs)
        return duration(flop / flop_per_second) if flop_per_second else f"{flop / 1e15:.3g}"

    lines = [("rule", "jobs", "GB", "most of it", "time" if flop_per_second else "PFLOP", "hungriest job")]
    warnings = []
    for rule, jobs in by_rule.items():
        most = max(jobs, key=lambda need: need.peak_bytes)
        share = f"{most.biggest_part} {most.parts[most.biggest_part] / most.peak_bytes:.0%}"
        lines.append((rule, str(len(jobs)), f"{most.peak_bytes / 1e9:.2f}", share, cost(jobs), most.job))
        if memory_bytes and most.peak_bytes > memory_bytes:
            too_much = f"{most.peak_bytes / 1e9:.1f} GB of {memory_bytes / 1e9:.1f} GB"
            warnings.append(f"! {rule} {most.job}: {too_much}; lower {most.key_to_lower}")
        warnings += [f"! {rule} {need.job}: {need.refusal}" for need in jobs if need.refusal]
    lines.append(("all", "", "", "", cost(need for jobs in by_rule.values() for need in jobs), ""))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)
    head = f"estimate for one job at a time on the {device}; fits may converge before the steps that are counted here"
    return "\n".join((head, *cells, *warnings))


def duration(seconds: float) -> str:
    """In the largest unit of which there are two, e.g. 90 min."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 1 else "< 1 s"
