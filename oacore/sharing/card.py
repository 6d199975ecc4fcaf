"""The card of a shared run, README.md: what was measured on which model, numbers with their errors, how to load it."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import pandas as pd

from oacore.circuits.fronts import front
from oacore.config.circuits import leading
from oacore.config.model import is_directory_name
from oacore.config.run import Config
from oacore.report.numbers import DAGGER, WHOSE_SE, Estimate, human
from oacore.sharing.bundle import model_name
from oacore.store.artefacts import read_json, read_table
from oacore.store.layout import Layout

LARGEST = 5  # gaps shown
TAGS = ["interpretability", "optimal-ablation"]


def card(config: Config, files: list[str], source: str, licence: str | None) -> str:
    """The card as Markdown, with the hub's metadata before it.

    Args:
        files: that are shared, by their paths.
        source: where they will lie: a name on the hub, or a folder.
        licence: as the hub names it; None leaves it to the owner.
    """
    layout = Layout(config)
    model = read_json(layout.model_json)
    parts = [
        f"# {config.run}: optimal ablation of {model_name(config)}",
        "What each part of the model matters for, measured by replacing it; written by the optimal-ablation pipeline "
        f"(oacore {model['versions']['oacore']}). {', '.join(config.tasks.selected())}; {config.dtype}, seed "
        f"{config.seed}, weight hash `{model['model_hash'][:16]}`. All settings are in `run.json`. Losses are in nats, "
        f"on held-out prompts. {WHOSE_SE} {DAGGER} marks numbers whose fit had not converged when its steps ended.",
        *_tables(config, layout),
        "## Load it",
        f"```python\n{example(config, files, source)}```",
        f"`python -m oacore pull {source} --to FOLDER` fetches all files and checks their SHA-256.",
    ]
    return _metadata(config, licence) + "\n\n".join(parts) + "\n"


def _metadata(config: Config, licence: str | None) -> str:
    from huggingface_hub import ModelCardData

    of_hub = not config.is_demo and not is_directory_name(config.model)
    data: dict[str, Any] = {"license": licence} if licence else {}
    data |= {"base_model": config.model} if of_hub else {}
    return f"---\n{ModelCardData(tags=TAGS, **data).to_yaml()}\n---\n\n"


def _tables(config: Config, layout: Layout) -> Iterator[str]:
    for task in config.ablation_tasks():
        gaps = read_table(layout.ablation(task, "gaps.csv"))
        method = "optimal" if "optimal" in set(gaps["method"]) else gaps["method"].iloc[0]
        largest = gaps[gaps["method"] == method].nlargest(LARGEST, "gap_nats")
        yield f"## {task}: components\n\nThe largest ablation loss gaps under {method} ablation."
        yield _markdown(largest, {"component": "component"}, ("gap", "gap_nats", "se_nats"))
    for task in config.circuit_tasks():
        pareto = read_table(layout.circuits(task, "pareto.csv"))
        ablation = pareto["ablation"].iloc[0]
        best = pd.concat([front(of) for _, of in pareto[pareto["ablation"] == ablation].groupby("method", sort=False)])
        yield f"## {task}: circuits\n\nThe front of each method under {ablation} ablation; KL(model ‖ circuit)."
        shown = {name: name for name in ("method", "knob", "seed", "edges")}
        yield _markdown(best, shown, ("KL", "kl_nats", "se_nats"))
    for task in config.lens_tasks():
        loss = read_table(layout.lens(task, "loss.csv"))
        middle = loss[loss["layer"] == loss["layer"].max() // 2 + 1]
        yield f"## {task}: lenses\n\nKL(model ‖ lens) at layer {middle['layer'].iloc[0]}, half way up."
        yield _markdown(middle.fillna({"init": ""}), {"lens": "lens", "init": "init"}, ("KL", "kl_nats", "se_nats"))


def _markdown(table: pd.DataFrame, names: dict[str, str], number: tuple[str, str, str]) -> str:
    title, value, se = number
    rows = [[*names, title], ["---"] * (len(names) + 1)]
    for row in table.to_dict("records"):
        named = [
            f"{row[column]:g}" if isinstance(row[column], float) else str(row[column]) for column in names.values()
        ]
        rows.append([*named, human(Estimate(row[value], row[se], finished=row["converged"] is not False))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def example(config: Config, files: list[str], source: str) -> str:
    """Ten lines of Python that load a table, a circuit, constants and a lens, of each what there is."""

    def first(*patterns: str) -> str | None:
        return next((name for pattern in patterns for name in files if fnmatchcase(name, pattern)), None)

    circuits = config.circuits
    folder = f"{leading(circuits.methods)}-{circuits.ablations[0]}" if circuits is not None else ""
    lines = ["import json", "", "import pandas as pd", "from safetensors.torch import load_file", ""]
    if is_directory_name(source):
        lines.append(f'folder = "{source}"')
    else:
        lines[3:3] = ["from huggingface_hub import snapshot_download"]
        lines.append(f'folder = snapshot_download("{source}")')
    if table := first("*/gaps.csv", "*/pareto.csv", "*/loss.csv"):
        lines.append(f'table = pd.read_csv(f"{{folder}}/{table}")')
    if circuit := first(f"*/circuits/{folder}/*.json"):
        lines.append(f'circuit = json.load(open(f"{{folder}}/{circuit}"))')
        lines.append('edges = [name for name, edge in circuit["edges"].items() if edge["in_graph"]]')
    if constants := first("*/ablation/constants-*.safetensors"):
        lines.append(f'constants = load_file(f"{{folder}}/{constants}")  # of each component')
    if lens := first("*/lens/oca.safetensors", "*/lens/tuned*.safetensors"):
        lines.append(f'lens = load_file(f"{{folder}}/{lens}")')
    return "\n".join(lines) + "\n"
