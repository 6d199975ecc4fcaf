"""Put all results of a run into one HTML page."""

from typing import Any

from oacore.ablation.report import ablation_section, methods_section
from oacore.circuits.report import circuit_methods_section, circuit_section
from oacore.compare.report import comparison_section
from oacore.config.read import compared_runs
from oacore.config.run import Config
from oacore.config.study import Study
from oacore.config.vision import Vision
from oacore.inputs import provenance_of, provenance_of_several
from oacore.interactions.report import interaction_methods_section, interaction_section
from oacore.jobs import INTERACTION_TABLES, STUDY_TABLES, VISION_TABLES, Files
from oacore.lenses.report import lens_methods_section, lens_section
from oacore.removal.plots import TYPES
from oacore.removal.report import removal_methods_section, removal_section
from oacore.report.page import provenance_section, write
from oacore.report.parts import Section
from oacore.store.artefacts import read_json, read_svg, read_table
from oacore.store.provenance import Provenance
from oacore.study.member import of_all
from oacore.study.report import study_methods_section, study_sections
from oacore.tasks.stored import read_facts
from oacore.tracing.report import traced_counts, tracing_methods_section, tracing_section
from oacore.vision.report import vision_methods_section, vision_section


def run(config: Config, inputs: Files, outputs: Files) -> None:
    """Write report.html."""
    if config.study is not None:
        _write_study(config, config.study, inputs, outputs)
        return
    facts = read_json(inputs["model"])
    sections, counts = [], {}
    for task in config.tasks.selected():
        provenance = provenance_of(config, inputs["model"], task)
        of_prompts = read_facts(inputs[f"prompts_{task}"], provenance)
        counts[task] = of_prompts["counts"]
        if task in config.ablation_tasks():
            sections.append(_ablation(inputs, task, provenance, of_prompts["example"]))
        if task in config.circuit_tasks():
            sections.append(_circuits(config, inputs, task, provenance))
        if task in config.interaction_tasks():
            sections.append(_interactions(inputs, task, provenance))
        if task in config.tracing_tasks():
            sections.append(_tracing(config, inputs, task, provenance))
        if task in config.lens_tasks():
            sections.append(_lenses(inputs, task, provenance))
    if config.removal is not None:
        sections.append(_removal(config, inputs))
    if config.vision is not None:
        sections.append(_vision(config.vision, inputs))
    for other, path in zip(compared_runs(config), inputs.all("comparisons"), strict=True):
        provenance = Provenance({"model_hash": facts["model_hash"], "compared_with": other})
        sections.append(comparison_section(other, f"{path.stem}.html", read_table(path, provenance)))
    appendix = [methods_section(config.ablation.methods)] if config.ablation_tasks() else []
    if config.circuits is not None:
        appendix.append(circuit_methods_section(config.circuits.methods, config.circuits.ablations))
    if config.interactions is not None:
        appendix.append(interaction_methods_section(config.interactions.ablations))
    if config.removal is not None:
        appendix.append(removal_methods_section(config.removal.methods, config.removal.ablations))
    if config.tracing is not None:
        appendix.append(tracing_methods_section(config.tracing.corruption_names()))
    if config.lenses is not None:
        appendix.append(lens_methods_section(config.lenses.lenses))
    if config.vision is not None:
        appendix.append(vision_methods_section(config.vision.measures()))
    appendix.append(provenance_section(config.model_dump(mode="json")))
    write(outputs["report"], "Optimal ablation", _run_facts(config, facts, counts), sections, appendix)
    print(f"report: {outputs['report'].resolve()}")


def _write_study(config: Config, settings: Study, inputs: Files, outputs: Files) -> None:
    """The page of several models."""
    facts = dict(zip(settings.models, map(read_json, inputs.all("member")), strict=True))
    provenance = of_all(facts)
    tables = {name: read_table(inputs[name], provenance) for name in STUDY_TABLES}
    sections = study_sections(facts, tables, _svgs(inputs, "figures", provenance), outputs["report"])
    run_facts = {
        "Members": {name: f"{of['model']}, {of['n_weights']:,} weights" for name, of in facts.items()},
        "Run": {"name": config.run, "seed": str(config.seed), "precision": config.dtype},
    }
    appendix = [study_methods_section(settings.methods), provenance_section(config.model_dump(mode="json"))]
    write(outputs["report"], "Optimal ablation", run_facts, sections, appendix)
    print(f"report: {outputs['report'].resolve()}")


def _run_facts(config: Config, facts: dict[str, Any], counts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was run: the model, the prompts, seed and versions."""
    sizes, parity = facts["sizes"], facts["parity"]
    return {
        "Model": {
            "name": facts["model"],
            "family": facts["family"],
            "layers × heads": f"{sizes['n_layers']} × {sizes['n_heads']}",
            "width": sizes["d_model"],
            "vocabulary": sizes["d_vocab"],
            "edges": sizes["n_edges"],
            "revision": facts["revision"] or "none (local)",
            "weight hash": facts["model_hash"][:16],
            f"parity with {parity['of']}": f"{parity['max_abs_log_prob']:.1e} nats (gate {parity['tolerance']:g})",
        },
        "Prompts": {task: ", ".join(f"{c[split]['n_prompts']} {split}" for split in c) for task, c in counts.items()},
        "Run": {"name": config.run, "seed": str(config.seed), "precision": config.dtype, **facts["versions"]},
    }


def _svgs(inputs: Files, name: str, provenance: Provenance) -> dict[str, str]:
    """The drawings of an input by the names of their files, in order."""
    return {path.stem: read_svg(path, provenance) for path in inputs.all(name)}


def _ablation(inputs: Files, task: str, provenance: Provenance, example: dict[str, object]) -> Section:
    gaps = read_table(inputs[f"gaps_gaps_{task}"], provenance, dtype={"head": "Int64"})
    summary = read_table(inputs[f"gaps_summary_{task}"], provenance)
    return ablation_section(task, gaps, summary, _svgs(inputs, f"figures_figures_{task}", provenance), example)


def _circuits(config: Config, inputs: Files, task: str, provenance: Provenance) -> Section:
    assert config.circuits is not None
    pareto = read_table(inputs[f"circuit_figures_pareto_{task}"], provenance)
    fronts = read_table(inputs[f"circuit_figures_fronts_{task}"], provenance)
    stability = read_table(inputs[f"circuit_figures_stability_{task}"], provenance)
    drawings = _svgs(inputs, f"circuit_figures_drawings_{task}", provenance)
    captioned = {
        f"A circuit under {ablation} ablation. Point at an edge to see its score.": drawings[f"circuit_{ablation}"]
        for ablation in config.circuits.ablations
    }
    figures = _svgs(inputs, f"circuit_figures_figures_{task}", provenance)
    return circuit_section(task, pareto, fronts, figures, captioned, stability if len(stability) else None)


def _interactions(inputs: Files, task: str, provenance: Provenance) -> Section:
    tables = {name: read_table(inputs[f"interaction_figures_{name}_{task}"], provenance) for name in INTERACTION_TABLES}
    return interaction_section(task, **tables, figures=_svgs(inputs, f"interaction_figures_figures_{task}", provenance))


def _removal(config: Config, inputs: Files) -> Section:
    assert config.removal is not None
    provenance = provenance_of_several(config, inputs["model"], "removal", config.removal.tasks())
    front = read_table(inputs["removal_figures_front"], provenance, dtype=TYPES)
    figures = _svgs(inputs, "removal_figures_figures", provenance)
    (forget,) = (f"{task} ({pattern})" if pattern else task for task, pattern in config.removal.forget.items())
    return removal_section(forget, front, figures)


def _tracing(config: Config, inputs: Files, task: str, provenance: Provenance) -> Section:
    assert config.tracing is not None
    figures = _svgs(inputs, f"tracing_figures_figures_{task}", provenance)
    facts = read_json(inputs[f"tracing_facts_{task}"], provenance)
    counts = {f"{split} facts": traced_counts(c) for split, c in facts["counts"].items()}
    counts["test subjects"] = str(facts["n_subjects"])
    counts["standard errors"] = f"over {facts['n_clusters']} groups of facts that are not independent"
    whose = {"first_token": "the answer's first token", "joint": "all of the answer's tokens together"}
    counts["probability of"] = whose[config.tracing.answer]
    aie = read_table(inputs[f"tracing_aie_{task}"], provenance)
    # Tokens may read "NA" or "null".
    pictures = read_table(inputs[f"tracing_pictures_{task}"], provenance, keep_default_na=False)
    return tracing_section(task, aie, figures, counts, pictures)


def _lenses(inputs: Files, task: str, provenance: Provenance) -> Section:
    figures = _svgs(inputs, f"lens_figures_figures_{task}", provenance)
    drawings = _svgs(inputs, f"lens_figures_drawings_{task}", provenance).values()
    caption = "What each layer predicts, by lens: test prompt {}. Point at a cell to see its most likely tokens."
    captioned = {caption.format(number): svg for number, svg in enumerate(drawings, 1)}
    loss = read_table(inputs[f"lens_evaluation_loss_{task}"], provenance)
    tables = {
        name: read_table(inputs[f"lens_{name}_table_{task}"], provenance)
        for name in ("faithfulness", "truthfulness")
        if f"lens_{name}_table_{task}" in inputs.named()
    }
    return lens_section(task, loss, figures, captioned, **tables)


def _vision(settings: Vision, inputs: Files) -> Section:
    facts = read_json(inputs["vision_model"])
    provenance = Provenance({name: facts[name] for name in ("model_hash", "images_hash")})
    tables = {name: read_table(inputs[f"vision_figures_{name}"], provenance) for name in VISION_TABLES}
    figures = _svgs(inputs, "vision_figures_figures", provenance)
    return vision_section(**tables, figures=figures, facts=facts, reference=f"shapley_{settings.replacements[0]}")
