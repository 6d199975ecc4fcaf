"""Join what the members of a study cost, and draw how that grows."""

import pandas as pd

from oacore.config.run import Config
from oacore.jobs import STUDY_PARTS, Files
from oacore.report.figures import save
from oacore.store.artefacts import read_json, read_table, write_table
from oacore.store.provenance import Provenance
from oacore.study.exponents import exponents, payoff
from oacore.study.member import of_all
from oacore.study.plots import study_figures
from oacore.study.tables import COUNTS


def run(config: Config, inputs: Files, outputs: Files) -> None:
    """Write the tables of all members, exponents.csv, payoff.csv, and the figures."""
    assert config.study is not None
    names = list(config.study.models)
    facts = dict(zip(names, map(read_json, inputs.all("member")), strict=True))
    provenance = of_all(facts)
    tables = {}
    for part in STUDY_PARTS:
        types = {name: kind for name, kind in COUNTS.items() if part != "comparison"}
        of_members = []
        for name, path in zip(names, inputs.all(part), strict=True):
            table = read_table(path, Provenance({"model_hash": facts[name]["model_hash"], "member": name}), dtype=types)
            if part == "comparison":
                table.insert(0, "model", name)
                table.insert(1, "n_weights", facts[name]["n_weights"])
            of_members.append(table)
        tables[part] = pd.concat(of_members, ignore_index=True)
    tables |= {"exponents": exponents(tables["cost"]), "payoff": payoff(tables["accuracy"])}
    for name, table in tables.items():
        write_table(outputs[name], table, provenance)
    figures = study_figures(tables["cost"], tables["accuracy"], tables["exponents"], tables["payoff"])
    for svg in outputs.all("figures", ".svg"):
        save(figures[svg.stem], svg.with_suffix(""), provenance)
