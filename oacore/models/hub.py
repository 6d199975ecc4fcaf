"""What transformers and the hub give: tokenizers, configs and plain Hugging Face models."""

import urllib.error
import urllib.request
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from oacore.config.model import ARCHITECTURES, check_architecture, is_directory_name
from oacore.errors import UserError
from oacore.models.weights import DTYPES

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
HUB_TIMEOUT = 5.0  # seconds until the hub counts as unreachable and only its local cache is used


def load_tokenizer(source: str | Path, revision: str | None = None) -> Any:
    """The fast tokenizer of a directory or hub model; imports transformers.

    Raises:
        UserError: there is none, or the hub can't be reached.
    """
    folder = Path(source).expanduser()
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"model: {str(source)!r} has no tokenizer, and transformers would invent one; allowed: a model directory "
            f"with one of {', '.join(TOKENIZER_FILES)}"
        )
    from transformers import AutoTokenizer

    with hub_errors(source, revision):
        return AutoTokenizer.from_pretrained(
            source,
            revision=revision,
            local_files_only=not hub_is_needed_and_there(source),
            trust_remote_code=False,
            use_fast=True,
        )


def load_hugging_face(source: str | Path, *, revision: str | None = None, dtype: str = "fp32") -> Any:
    """The plain Hugging Face model on the CPU in evaluation mode; never runs code from the hub.

    Raises:
        UserError: as `load`.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    hugging_face_config(source, revision=revision)
    if is_directory_name(str(source)):
        source = Path(source).expanduser()
        logging.disable_progress_bar()  # of weights that are on disk; a download shows its progress
    with hub_errors(source, revision):
        return AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            local_files_only=not hub_is_needed_and_there(source),
            dtype=DTYPES[dtype],
            trust_remote_code=False,
            attn_implementation="eager",
        ).eval()


def hugging_face_config(source: str | Path, *, revision: str | None = None) -> Any:
    """The Hugging Face config of a directory or hub model, of a supported architecture.

    Raises:
        UserError: as `load`.
    """
    from transformers import AutoConfig

    if is_directory_name(str(source)):
        if not Path(source).expanduser().is_dir():
            raise UserError(
                f"model: {str(source)!r} is not a directory; allowed: a Hugging Face name, or an existing model "
                "directory"
            )
        source = Path(source).expanduser()
        check_architecture(str(source), source / "config.json")
    with hub_errors(source, revision):
        only_local = not hub_is_needed_and_there(source)
        config = AutoConfig.from_pretrained(
            source, revision=revision, local_files_only=only_local, trust_remote_code=False
        )
        if config.model_type not in ARCHITECTURES:
            raise UserError(
                f"model: {str(source)!r} has the architecture {config.model_type!r}; allowed: "
                f"{', '.join(ARCHITECTURES)}"
            )
        return config


def hub_is_needed_and_there(source: str | Path) -> bool:
    """Whether to ask the hub: not for a directory, nor when it does not answer, since the hub's own client retries for
    23-46 s.
    """
    return not Path(source).is_dir() and _hub_answers()


@cache
def _hub_answers() -> bool:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_TIMEOUT).close()
    except urllib.error.HTTPError:
        return True  # it answered
    except (OSError, ValueError):
        return False
    return True


@contextmanager
def hub_errors(source: str | Path, revision: str | None, key: str = "model") -> Any:
    """Turn the many exceptions of a failed load into one sentence with the cause."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, safetensors and hub errors alike
        where = f"{key}: {str(source)!r}" + (f" (revision {revision!r})" if revision else "")
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = (
            "a complete model directory"
            if Path(source).is_dir()
            else "a model on a reachable hub, in its local cache, or a directory"
        )
        raise UserError(f"{where} can't be loaded ({type(error).__name__}: {cause}); allowed: {hint}") from error
