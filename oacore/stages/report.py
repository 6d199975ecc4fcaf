"""Put all results of a run into one HTML page."""

from pathlib import Path
from typing import Any

import pandas as pd

from oacore import circuit_report, report
from oacore.activations import read_facts
from oacore.config import Circuits, Config
from oacore.layout import Layout
from oacore.stages.common import model_facts, need


def run(config: Config) -> None:
    """Write report.html."""
    layout = Layout(config)
    facts = model_facts(layout)
    sections, counts = [], {}
    for task in config.tasks.selected():
        gaps = pd.read_csv(need(layout.ablation(task, "gaps.csv"), "gaps"), dtype={"head": "Int64"})
        summary = pd.read_csv(need(layout.ablation(task, "summary.csv"), "gaps"))
        names = config.ablation.figures()
        figures = {name: need(layout.ablation(task, f"{name}.svg"), "figures").read_text(encoding="utf-8") for name in names}
        path = need(layout.prompts(task), "prompts")
        about_prompts = read_facts(path)
        counts[task] = about_prompts["counts"]
        sections.append(report.ablation_section(task, gaps, summary, figures, about_prompts["example"]))
        if task in config.circuit_tasks():
            sections.append(_circuits(layout, config.circuits, task))
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
    appendix = [report.methods_section(config.ablation.methods)]
    if config.circuits is not None:
        appendix.append(circuit_report.circuit_methods_section(config.circuits.methods, config.circuits.ablations))
    appendix += [report.provenance_section(config.model_dump(mode="json"))]
    report.write(layout.report, "Optimal ablation", about, sections, appendix)
    print(f"report: {Path(layout.report).resolve()}")


def _circuits(layout: Layout, settings: Circuits | None, task: str) -> report.Section:
    assert settings is not None

    def text(name: str) -> str:
        return need(layout.circuits(task, f"figures/{name}.svg"), "circuit_figures").read_text(encoding="utf-8")

    pareto, stability = (pd.read_csv(need(layout.circuits(task, f"{name}.csv"), "circuit_figures")) for name in ("pareto", "stability"))
    drawings = {
        f"A circuit under {ablation} ablation. Point at an edge to see its score.": text(f"circuit_{ablation}")
        for ablation in settings.ablations
    }
    figures = {name: text(name) for name in settings.figures()}
    return circuit_report.circuit_section(task, pareto, figures, drawings, stability if len(stability) else None)
