"""What of a finished run is shared, and the checksums that say whether it arrived.

Files lie as they do in the run's folder: safetensors, JSON and CSV alone, nothing that runs. `run.json` has the
settings, `checksums.json` a SHA-256 of every other file but the card, which its owner may edit.
"""

import shutil
from pathlib import Path, PurePosixPath

from oacore.config.model import is_directory_name
from oacore.config.read import input_files
from oacore.config.run import Config
from oacore.errors import UserError
from oacore.jobs import files_of, planned
from oacore.store.artefacts import digest_of_file, read_json, write_json
from oacore.store.layout import Layout

CARD, RUN, CHECKSUMS = "README.md", "run.json", "checksums.json"
SUFFIXES = (".safetensors", ".json", ".csv", ".seal")  # a seal is the JSON beside a table
PLACES = {"cache_dir", "results_dir", "compare", "limits", "device", "store_weights"}  # of the machine, not of the run
# Scores of masks are in the circuits' own files; a comparison is about another run, too.
LEFT_OUT = ("search", "comparison")


def shared_files(layout: Layout) -> list[str]:
    """What a finished run shares, by the paths within its folder.

    Raises:
        UserError: the run is not finished.
    """
    if not Path(layout.report).is_file():
        raise UserError(f"{layout.report}: missing; allowed: the config of a finished run")
    folder, found = Path(layout.results_dir), dict[str, None]()
    for stage, wildcards in planned(layout.config):
        outputs = files_of(layout, stage, **wildcards)[1]
        for name, paths in outputs.named().items():
            if {stage, name}.isdisjoint(LEFT_OUT):
                found |= dict.fromkeys(paths)
        if stage == "circuits":  # where the ablation type is fitted
            found[str(outputs["pareto"].with_name("constants.safetensors"))] = None
    mine = [Path(path) for path in found if Path(path).is_relative_to(folder)]
    mine += [path.with_name(f".{path.name}.seal") for path in mine if path.suffix == ".csv"]
    there = [path.relative_to(folder) for path in mine if path.suffix in SUFFIXES and path.is_file()]
    return sorted(path.as_posix() for path in there)


def write_bundle(config: Config, folder: Path) -> None:
    """Write the files, `run.json` and `checksums.json` into an empty folder."""
    layout = Layout(config)
    names = shared_files(layout)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(layout.results_dir, name), folder / name)
    model = read_json(layout.model_json) | {"model": model_name(config)}
    write_json(folder / RUN, {"settings": _settings(config), "model": model})
    write_json(folder / CHECKSUMS, {"files": {name: digest_of_file(folder / name) for name in [*names, RUN]}})


def model_name(config: Config) -> str:
    """A model's name; of a directory the last part of its path."""
    return Path(config.model).expanduser().name if is_directory_name(config.model) else config.model


def _settings(config: Config) -> dict[str, object]:
    """The settings of a run, without where they lie on this machine: of its files and a model's folder the names."""
    values = config.model_dump(mode="json", exclude=PLACES) | {"model": model_name(config)}
    names = {str(path): path.name for _, path in input_files(config)}
    return {key: _named(value, names) for key, value in values.items()}


def _named(value: object, names: dict[str, str]) -> object:
    if isinstance(value, dict):
        return {key: _named(inner, names) for key, inner in value.items()}
    if isinstance(value, list):
        return [_named(inner, names) for inner in value]
    return names.get(value, value) if isinstance(value, str) else value


def checked_files(folder: Path) -> list[str]:
    """The files that a bundle lists, each of them there and as it was written.

    Raises:
        UserError: the folder is none of a run's, a file is missing, damaged or edited, or a name leads elsewhere or is
            of another type of file.
    """
    if not (folder / CHECKSUMS).is_file():
        raise UserError(f"{folder}: no {CHECKSUMS}; allowed: what `python -m oacore push` has written")
    listed: dict[str, str] = read_json(folder / CHECKSUMS)["files"]
    for name, digest in listed.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or path.suffix not in SUFFIXES:
            raise UserError(f"{folder / CHECKSUMS}: {name!r}; allowed: files of its own folder, {', '.join(SUFFIXES)}")
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing; push it again")
        if digest_of_file(folder / name) != digest:
            raise UserError(f"{folder / name}: damaged or edited, its checksum does not fit; push it again")
    return [*listed, CHECKSUMS, *([CARD] if (folder / CARD).is_file() else [])]
