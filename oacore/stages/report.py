"""Put all results of a run into one HTML page."""

from pathlib import Path
from typing import Any

from oacore import circuit_report, lens_report, report, tracing_report
from oacore.activations import read_facts
from oacore.artefacts import read_json, read_svg, read_table
from oacore.config import Circuits, Config, Lenses, Tracing
from oacore.layout import Layout
from oacore.stages.common import model_facts, need, origin
from oacore.stages.lens_figures import read_tables
from oacore.stages.tracing_figures import read_tables as read_tracing


def run(config: Config) -> None:
    """Write report.html."""
    layout = Layout(config)
    facts = model_facts(layout)
    sections, counts = [], {}
    for task in config.tasks.selected():
        about_prompts = read_facts(need(layout.prompts(task), "prompts"), origin(layout, task))
        counts[task] = about_prompts["counts"]
        if task in config.ablation_tasks():
            sections.append(_ablation(config, layout, task, about_prompts["example"]))
        if task in config.circuit_tasks():
            sections.append(_circuits(layout, config.circuits, task))
        if task == "facts" and config.tracing is not None:
            sections.append(_tracing(layout, config.tracing))
        if task in config.lens_tasks():
            sections.append(_lenses(layout, config.lenses, task))
    sizes, parity = facts["sizes"], facts["parity"]
    about: dict[str, dict[str, Any]] = {
        "Model": {
            "name": facts["model"],
            "family": facts["family"],
            "layers × heads": f"{sizes['n_layers']} × {sizes['n_heads']}",
            "width": sizes["d_model"],
            "vocabulary": sizes["d_vocab"],
            "edges": sizes["n_edges"],
            "revision": facts["revision"] or "none (local)",
            "weight hash": facts["model_hash"][:16],
            "parity with Hugging Face": f"{parity['max_abs_log_prob']:.1e} nats (gate {parity['tolerance']:g})",
        },
        "Prompts": {task: ", ".join(f"{c[split]['n_prompts']} {split}" for split in c) for task, c in counts.items()},
        "Run": {"name": config.run, "seed": str(config.seed), "precision": config.dtype, **facts["versions"]},
    }
    appendix = [report.methods_section(config.ablation.methods)] if config.ablation_tasks() else []
    if config.circuits is not None:
        appendix.append(circuit_report.circuit_methods_section(config.circuits.methods, config.circuits.ablations))
    if config.tracing is not None:
        appendix.append(tracing_report.tracing_methods_section(config.tracing.corruption_names()))
    if config.lenses is not None:
        appendix.append(lens_report.lens_methods_section(config.lenses.lenses))
    appendix += [report.provenance_section(config.model_dump(mode="json"))]
    report.write(layout.report, "Optimal ablation", about, sections, appendix)
    print(f"report: {Path(layout.report).resolve()}")


def _ablation(config: Config, layout: Layout, task: str, example: dict[str, object]) -> report.Section:
    belongs = origin(layout, task)
    gaps = read_table(need(layout.ablation(task, "gaps.csv"), "gaps"), belongs, dtype={"head": "Int64"})
    summary = read_table(need(layout.ablation(task, "summary.csv"), "gaps"), belongs)
    names = config.ablation.figures()
    figures = {name: read_svg(need(layout.ablation(task, f"{name}.svg"), "figures"), belongs) for name in names}
    return report.ablation_section(task, gaps, summary, figures, example)


def _circuits(layout: Layout, settings: Circuits | None, task: str) -> report.Section:
    assert settings is not None
    belongs = origin(layout, task)

    def text(name: str) -> str:
        return read_svg(need(layout.circuits(task, f"figures/{name}.svg"), "circuit_figures"), belongs)

    pareto, stability = (
        read_table(need(layout.circuits(task, f"{name}.csv"), "circuit_figures"), belongs) for name in ("pareto", "stability")
    )
    drawings = {
        f"A circuit under {ablation} ablation. Point at an edge to see its score.": text(f"circuit_{ablation}")
        for ablation in settings.ablations
    }
    figures = {name: text(name) for name in settings.figures()}
    return circuit_report.circuit_section(task, pareto, figures, drawings, stability if len(stability) else None)


def _tracing(layout: Layout, settings: Tracing) -> report.Section:
    belongs = origin(layout, "facts")
    figures = {name: read_svg(need(layout.tracing(f"figures/{name}.svg"), "tracing_figures"), belongs) for name in settings.figures()}
    facts = read_json(need(layout.tracing("facts.json"), "tracing"), belongs)
    counts = {
        f"{split} facts": f"{c['n_traced']} traced, about the subjects of this split alone; of {c['n_rows']} in the file the model gets "
        f"{c['n_wrong'] + c['n_wrong_later']} wrong, {c['n_no_counterfactual']} have no other subject of the same length"
        for split, c in facts["counts"].items()
    }
    aie, pictures = read_tracing(layout)
    counts["test subjects"] = f"{facts['n_subjects']}, over which standard errors are taken"
    counts["probability of"] = {"first_token": "the answer's first token", "joint": "all of the answer's tokens together"}[settings.answer]
    return tracing_report.tracing_section(aie, figures, counts, pictures)


def _lenses(layout: Layout, settings: Lenses | None, task: str) -> report.Section:
    assert settings is not None
    belongs = origin(layout, task)
    figures = {name: read_svg(need(layout.lens(task, f"figures/{name}.svg"), "lens_figures"), belongs) for name in settings.figures()}
    tables = read_tables(layout, settings, task)
    drawings = {
        f"What each layer predicts, by lens: test prompt {number + 1}. Point at a cell to see its most likely tokens.": read_svg(
            need(layout.lens(task, f"figures/prompt_{number}.svg"), "lens_figures"), belongs
        )
        for number in range(settings.pictures)
    }
    return lens_report.lens_section(
        task, tables["loss"], figures, drawings, faithfulness=tables.get("faithfulness"), truthfulness=tables.get("truthfulness")
    )
