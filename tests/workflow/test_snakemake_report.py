"""`snakemake --report`: every figure and table is in it, with a caption, under its experiment and task."""

import io
import re
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import yaml
from conftest import snakemake_dag
from snakemake.io import apply_wildcards

from oacore.config.read import parse_config
from oacore.jobs import promised
from oacore.store.layout import Layout

ROOT = Path(__file__).parents[2]
CAPTIONS = {path.stem for path in ROOT.glob("workflow/report/*.rst")} - {"workflow"}


def of_another(values, tmp_path):
    """A run of all experiments that is compared with another one."""
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(values))
    return values | {"run": "new", "compare": [str(tmp_path / "other.yaml")]}


def of_models(values, tmp_path):
    """A study, which has its members alone."""
    return values | {"run": "study", "study": {"models": {"one": None}, "tasks": ["ioi"]}}


@pytest.mark.parametrize(
    ("kind", "captions"), [(of_another, CAPTIONS - {"study"}), (of_models, {"study", "page"})], ids=["run", "study"]
)
def test_all_figures_and_whole_tables_are_in_it_with_their_captions(tiny_run, tmp_path, kind, captions):
    values = kind(tiny_run[0].model_dump(mode="json"), tmp_path)
    found, used = {}, set()
    for job in snakemake_dag(values, tmp_path / "config.yaml", forced=True).jobs:
        for path in job.output:
            if "report" in path.flags:
                shown = path.flags["report"]
                caption = Path(shown.caption.get_path_or_uri(secret_free=True))
                assert caption.is_file(), caption
                used.add(caption.stem)
                found[str(path)] = {key: apply_wildcards(text, job.wildcards) for key, text in shown.labels.items()}
    assert used == captions, "each is of some output"
    expected = {path for path in promised(Layout(parse_config(values))) if path.endswith((".svg", ".csv", ".html"))}
    assert set(found) <= expected and all(path.endswith(".csv") for path in expected - set(found))
    # Parts of a table that is there as a whole, and the ranking that only says which components are looked at.
    whole = {Path(path) for path in found}
    for path in map(Path, expected - set(found)):
        assert path.parents[1] / path.name in whole or path.name == "ranking.csv", path
    for path, labels in found.items():
        kinds = {".csv": "table", ".svg": "figure", ".html": "page"}
        assert labels == {"what": kinds[Path(path).suffix], "name": Path(path).stem}


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # how Snakemake calls docutils
def test_snakemake_writes_it(tiny_run, tmp_path):
    """Of the finished run, without a network: Snakemake brings the scripts that its page needs."""
    from snakemake.api import SnakemakeApi
    from snakemake.report.html_reporter import ReportSettings
    from snakemake.settings.types import ConfigSettings, OutputSettings, Quietness, ResourceSettings

    config, layout = tiny_run
    path, page = tmp_path / "config.yaml", tmp_path / "page.html"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    with redirect_stderr(io.StringIO()), SnakemakeApi(OutputSettings(quiet={Quietness.ALL})) as api:
        workflow = api.workflow(
            resource_settings=ResourceSettings(cores=1),
            config_settings=ConfigSettings(configfiles=[path]),
            snakefile=ROOT / "Snakefile",
        )
        workflow.dag().create_report(reporter="html", report_settings=ReportSettings(path=page))
    text = page.read_text()
    categories = re.search(r"var categories = (\{.*?\});", text)[1]
    for task, file in (("ioi", layout.ablation("ioi", "gaps.csv")), ("facts", layout.tracing("facts", "aie.csv"))):
        assert re.search(rf'"{task}": \[[^]]*"{re.escape(str(file))}"', categories), file
    for name in ("Single components", "Circuits", "Lenses", "Tracing of facts", "Behaviour removal", "Vision", "Page"):
        assert f'"{name}": {{' in categories
    assert (
        "Ablation loss gaps of single components on facts" in text and "in nats, measured on held-out prompts" in text
    )
