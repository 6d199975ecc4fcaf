"""Push a finished run to the Hugging Face hub or into a folder, and pull one: `python -m oacore push`, `pull`.

Nothing is overwritten unasked: a folder that exists is refused, and a repository that has files without `--overwrite`.
New repositories are private. The hub's own client does the rest; tokens are its matter.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from oacore.config.model import is_directory_name
from oacore.config.run import Config
from oacore.errors import UserError
from oacore.sharing.bundle import CARD, SUFFIXES, checked_files, shared_files, write_bundle
from oacore.sharing.card import card
from oacore.store.atomic import atomic_directory
from oacore.store.layout import Layout

BEFORE_ANY = {".gitattributes"}  # what the hub puts into a new repository


def push(config: Config, to: str, *, licence: str | None = None, public: bool = False, overwrite: bool = False) -> str:
    """Write a run's circuits, constants, lenses and tables, with a card, to `owner/name` or a folder.

    Args:
        licence: as the hub names it, for the card's metadata; None leaves that to the owner.
        public: of a new repository; an old one stays what it is.
        overwrite: files of the same names in a repository that has some; others stay.

    Returns:
        Where it is.

    Raises:
        UserError: the run is not finished, there is something already, or what the hub says.
    """
    if is_directory_name(to):
        folder = Path(to).expanduser()
        _check_new(folder)
        with atomic_directory(folder) as temporary:
            _write(config, temporary, to, licence)
        return str(folder.resolve())
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as name, _hub_errors("--to", to):
        _write(config, Path(name), to, licence)
        api = HfApi()
        if api.repo_exists(to):
            if (there := sorted({*api.list_repo_files(to)} - BEFORE_ANY)) and not overwrite:
                raise UserError(
                    f"--to: {to!r} has {len(there)} files, such as {there[0]}; allowed: a new name, or --overwrite"
                )
        else:
            api.create_repo(to, private=not public)
        api.upload_folder(repo_id=to, folder_path=name, commit_message=f"Run {config.run}")
    return f"{api.endpoint}/{to}"


def pull(source: str, to: Path, revision: str | None = None) -> list[str]:
    """Fetch a shared run into a new folder, every file checked; returns their names.

    Args:
        source: `owner/name`, or a folder.
        revision: branch, tag or commit of a repository.

    Raises:
        UserError: the folder exists, a file is missing, damaged or edited, or what the hub says.
    """
    to = to.expanduser()
    _check_new(to)
    folder = Path(source).expanduser() if is_directory_name(source) else _downloaded(source, revision)
    files = checked_files(folder)
    with atomic_directory(to) as temporary:
        for name in files:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, temporary / name)
    return files


def _write(config: Config, folder: Path, to: str, licence: str | None) -> None:
    write_bundle(config, folder)
    (folder / CARD).write_text(card(config, shared_files(Layout(config)), to, licence), encoding="utf-8")


def _check_new(folder: Path) -> None:
    if folder.exists():
        raise UserError(f"--to: {folder} exists; allowed: a folder that does not")


def _downloaded(source: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [CARD, *(f"*{suffix}" for suffix in SUFFIXES)]
    with _hub_errors("source", source):
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))


@contextmanager
def _hub_errors(what: str, name: str) -> Iterator[None]:
    """What the hub's client says, in one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # OSError, ValueError, and its HTTP library's own
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{what}: {name!r}: {cause}; allowed: owner/name on a reachable hub, or a folder") from error
