"""A finished run pushed and pulled: to a folder in full, to the hub as far as its client is asked the right things."""

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import yaml

from oacore.__main__ import main
from oacore.circuits.mib_file import load_circuit
from oacore.config.read import parse_config
from oacore.errors import UserError
from oacore.sharing.bundle import CARD, CHECKSUMS, RUN
from oacore.sharing.hub import pull, push
from oacore.store.artefacts import read_json, read_table, write_json


@pytest.fixture(scope="module")
def pushed(tiny_run, tmp_path_factory):
    """The finished tiny run in a folder, and the folder."""
    config, layout = tiny_run
    folder = tmp_path_factory.mktemp("shared") / "run"
    push(config, str(folder))
    return config, layout, folder


@pytest.fixture
def copy(pushed, tmp_path):
    """A copy of the pushed folder, to do anything to."""
    return Path(shutil.copytree(pushed[2], tmp_path / "copy"))


def test_what_is_pushed_is_pulled(pushed, tmp_path):
    _, layout, folder = pushed
    files = pull(str(folder), tmp_path / "pulled")
    assert {path.suffix for path in map(Path, files)} == {".safetensors", ".json", ".csv", ".seal", ".md"}
    wanted = {
        *("ioi/ablation/gaps.csv", "ioi/ablation/constants-optimal.safetensors", "text/lens/oca.safetensors"),
        *("ioi/circuits/ugs-optimal/0.1-s0.json", "ioi/circuits/ugs-optimal/constants.safetensors"),
        *("removal/ugs-optimal/ablations.safetensors", "ioi/circuits/ugs-optimal/losses.safetensors"),
    }
    assert wanted | {CARD, CHECKSUMS, RUN} <= set(files)
    assert not [name for name in files if name.endswith("search.safetensors")]
    there = {
        path.relative_to(tmp_path / "pulled").as_posix() for path in tmp_path.glob("pulled/**/*") if path.is_file()
    }
    assert there == set(files)
    for name in wanted:
        assert (tmp_path / "pulled" / name).read_bytes() == Path(layout.results_dir, name).read_bytes()
    # With our own readers, too.
    assert len(read_table(tmp_path / "pulled/ioi/ablation/gaps.csv"))
    assert load_circuit(tmp_path / "pulled/ioi/circuits/ugs-optimal/0.1-s0.json", signed=True).n_edges


def test_no_place_of_this_machine_is_in_the_settings(pushed):
    config, _, folder = pushed
    found = read_json(folder / RUN)
    assert str(config.cache_dir) not in (folder / RUN).read_text()
    parse_config(found["settings"])
    assert found["settings"]["circuits"]["methods"] == list(config.circuits.methods)


def test_paths_of_files_become_names(tmp_path):
    from oacore.sharing.bundle import _settings

    (tmp_path / "mine.csv").write_text("clean,corrupt,right\n1 a,1 b,x\n")
    config = parse_config({"tasks": {"mine": {"pairs": str(tmp_path / "mine.csv")}}})
    assert _settings(config)["tasks"]["mine"]["pairs"] == "mine.csv"


def test_the_card_has_numbers_with_errors_and_its_lines_run(pushed, capsys):
    _, layout, folder = pushed
    card = (folder / CARD).read_text()
    head, body = card.split("---\n", 2)[1:]
    assert yaml.safe_load(head) == {"tags": ["interpretability", "optimal-ablation"]}, "no licence, and no base model"
    gaps = read_table(layout.ablation("ioi", "gaps.csv"))
    largest = gaps[gaps["method"] == "optimal"].nlargest(1, "gap_nats").iloc[0]
    assert re.search(rf"^\| {largest['component']} \| [\d.]+ ± [\d.]+", body, re.M)
    assert re.search(r"^\| ugs \| 0\.1 \| 0 \| \d+ \| [\d.]+ ± [\d.]+", body, re.M)
    assert re.search(r"^\| oca \|  \| [\d.]+ ± [\d.]+", body, re.M)
    (lines,) = re.findall(r"```python\n(.*?)```", body, re.S)
    assert len([line for line in lines.splitlines() if line]) <= 10 and "circuits/ugs-optimal/" in lines
    found = {}
    exec(lines, found)
    assert len(found["table"]) == len(gaps) and found["edges"] and found["constants"] and found["lens"]


def test_a_licence_and_a_hub_model_are_in_the_metadata():
    from oacore.sharing.card import _metadata

    config = parse_config({"model": "openai-community/gpt2", "tasks": {"ioi": {}}})
    head = yaml.safe_load(_metadata(config, "mit").split("---\n")[1])
    assert head["license"] == "mit" and head["base_model"] == "openai-community/gpt2"


def damaged(folder):
    path = folder / "ioi/ablation/constants-optimal.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def missing(folder):
    (folder / "ioi/ablation/gaps.csv").unlink()


def elsewhere(folder):
    (folder.parent / "secret.json").write_text("{}")
    write_json(folder / CHECKSUMS, {"files": {"../secret.json": ""}})


def code(folder):
    (folder / "model.py").write_text("print(1)")
    write_json(folder / CHECKSUMS, {"files": {"model.py": ""}})


def edited(folder):
    path = folder / CHECKSUMS
    path.write_text(path.read_text().replace("gaps.csv", "gasp.csv"))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (damaged, r"constants-optimal\.safetensors: damaged or edited, its checksum does not fit"),
        (missing, r"gaps\.csv: missing"),
        (elsewhere, r"'\.\./secret\.json'; allowed: files of its own folder"),
        (code, r"'model\.py'; allowed: files of its own folder, \.safetensors, \.json, \.csv"),
        (edited, r"checksums\.json: damaged or edited"),
        (lambda folder: (folder / CHECKSUMS).unlink(), r"no checksums\.json; allowed: what `python -m oacore push`"),
    ],
)
def test_what_did_not_arrive_is_refused(copy, tmp_path, harm, said):
    harm(copy)
    with pytest.raises(UserError, match=said):
        pull(str(copy), tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_nothing_is_overwritten_unasked(pushed, tmp_path):
    config, _, folder = pushed
    for attempt in (lambda: push(config, str(folder)), lambda: pull(str(folder), folder)):
        with pytest.raises(UserError, match=r"--to: .*run exists; allowed: a folder that does not"):
            attempt()
    unfinished = config.model_copy(update={"run": "unfinished"})
    with pytest.raises(UserError, match=r"report\.html: missing; allowed: the config of a finished run"):
        push(unfinished, str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


class Hub:
    """In place of the hub's client: a repository is a folder."""

    endpoint = "https://hub"

    def __init__(self, root):
        self.root, self.private = root, {}

    def repo_exists(self, name):
        return (self.root / name).is_dir()

    def create_repo(self, name, *, private):
        (self.root / name).mkdir(parents=True)
        (self.root / name / ".gitattributes").write_text("")
        self.private[name] = private

    def list_repo_files(self, name):
        return [path.relative_to(self.root / name).as_posix() for path in (self.root / name).rglob("*.*")]

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)


def test_hub(pushed, tmp_path, monkeypatch, capsys):
    config, _, folder = pushed
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(hub.root / name))
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert main(["push", str(file), "--to", "me/run"]) == 0
    assert capsys.readouterr().out == "pushed: https://hub/me/run\n" and hub.private == {"me/run": True}
    assert 'snapshot_download("me/run")' in (hub.root / "me/run" / CARD).read_text()
    assert main(["push", str(file), "--to", "me/run"]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: --to: 'me/run' has \d+ files, such as .*; allowed: a new name, or --overwrite\n", said)
    assert main(["push", str(file), "--to", "me/run", "--overwrite", "--license", "mit"]) == 0
    assert "license: mit" in (hub.root / "me/run" / CARD).read_text()
    assert main(["pull", "me/run", "--to", str(tmp_path / "pulled")]) == 0
    assert "files, whose checksums fit" in capsys.readouterr().out
    ours, theirs = (json.loads((of / CHECKSUMS).read_text()) for of in (folder, tmp_path / "pulled"))
    assert ours == theirs


def test_what_the_hub_says_is_one_line(pushed, tmp_path):
    """Of the real client, which the tests keep offline."""
    with pytest.raises(
        UserError, match=r"^source: 'me/none': .*; allowed: owner/name on a reachable hub, or a folder$"
    ):
        pull("me/none", tmp_path / "pulled")
    with pytest.raises(UserError, match=r"^--to: 'me/none': .*; allowed: owner/name on a reachable hub, or a folder$"):
        push(pushed[0], "me/none")
