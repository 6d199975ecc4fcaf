"""What may be a model, and the embedded one: shipped, or trained by the workflow."""

import json
from pathlib import Path
from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from oacore.config.base import Settings, nearest
from oacore.errors import UserError

# Hugging Face `model_type` of every family that oacore.models.load can read.
ARCHITECTURES = ("gpt2", "gpt_neox", "llama", "mistral", "phi3", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2")

# `model_type` of a directory that `oacore.register` has written, and the file there that says so.
REGISTERED, REGISTERED_FILE = "registered", "registered.json"

# `model:` of the embedded model: as it is shipped with the package, or trained by the workflow.
DEMO, DEMO_TRAINED = "demo", "demo-trained"
SHIPPED_DEMO = Path(__file__).parents[1] / "models" / "demo_model"
# Keys of the embedded model's shape. At their defaults they are left out of all names, as before there were such keys.
SIZES = ("n_layers", "n_heads", "d_model")


class DemoModel(Settings):
    """Training of the embedded model; the shipped one was trained with the defaults."""

    n_layers: int = Field(4, ge=1, description="blocks")
    n_heads: int = Field(4, ge=1, description="heads of a block")
    d_model: int = Field(128, ge=1, description="width; a multiple of n_heads")
    seed: int = Field(0, ge=0, description="seed of its initial weights and training sentences")
    n_steps: int = Field(600, ge=1, description="training steps")
    batch_size: int = Field(160, ge=1, description="sentences a step")
    learning_rate: float = Field(2e-3, gt=0, description="peak of the one-cycle schedule")
    n_subjects: int = Field(160, ge=2, description="people that the model learns facts about")
    min_ioi_accuracy: float = Field(
        0.98, ge=0, le=1, description="held-out IOI accuracy below which training counts as failed"
    )
    min_year_mass: float = Field(
        0.9, ge=0, le=1, description="held-out probability mass on valid years below which training counts as failed"
    )
    min_fact_accuracy: float = Field(
        0.9, ge=0, le=1, description="accuracy on held-out wordings of facts below which training counts as failed"
    )

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> "DemoModel":
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model: {self.d_model}; allowed: a multiple of n_heads, {self.n_heads}")
        return self

    @model_serializer(mode="wrap")
    def _sizes_where_they_differ(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # The shipped model, and every cache of one that was trained, are named by settings without sizes.
        defaults = {name: DemoModel.model_fields[name].default for name in SIZES}
        return {name: value for name, value in serialise(self).items() if value != defaults.get(name)}


def is_directory_name(model: str) -> bool:
    """Whether `model:` means a directory: it exists, or it looks like a path (a hub name is `name` or `owner/name`)."""
    return Path(model).expanduser().is_dir() or model.startswith((".", "/", "~")) or model.count("/") > 1


def description_of(directory: Path) -> Path:
    """The file that says what a model directory has: Hugging Face's config.json, or that of `oacore.register`."""
    registered = directory / REGISTERED_FILE
    return registered if registered.is_file() else directory / "config.json"


def check_architecture(model: str, path: Path) -> str:
    """The `model_type` that a model's config.json, or `description_of` it, names.

    Raises:
        UserError: the file is missing or unreadable, or the architecture is neither one of `ARCHITECTURES` nor
            `REGISTERED`.
    """
    try:
        model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        raise UserError(
            f"model: {model!r} has no readable config.json; allowed: a directory as written by save_pretrained"
        ) from None
    if model_type not in (*ARCHITECTURES, REGISTERED):
        raise UserError(
            f"model: {model!r} has the architecture {model_type!r}; allowed: "
            f"{', '.join(ARCHITECTURES)}, or a directory that oacore.register wrote{nearest(model_type, ARCHITECTURES)}"
        )
    return str(model_type)
