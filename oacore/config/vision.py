"""`vision:` optimal ablation of a convolutional network, beside Shapley values and attributions; and the registries of
what replaces a unit and of how its importance is measured.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from oacore.config.base import LocalPath, OptimalFit, Settings
from oacore.config.colors import ACCENT, BLUE, GOLD, GREEN, INK, PURPLE, SLATE, TEAL
from oacore.config.rows import Look, Row, registry

Whole = Annotated[int, Field(ge=1)]
UnitKind = Literal["channels", "branches", "blocks"]
FEWEST_RANKED = 5  # units whose order says something
DIGITS = 1797
MB_OF_AN_IMAGE = 25  # of a ResNet-50's branches, at 224 x 224 pixels
IMAGE_FILES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


@dataclass(frozen=True)
class Replacement(Row):
    """What replaces a unit's output; `code` gives it, see `oacore.vision.replacements`.

    Args:
        look: of what is measured with it in figures.
        fitted: constants are fitted.
        per_place: there is one constant for each channel and place of the picture, not one for each channel.
        of_partner: it is the unit's output on another image.
        path: integrated gradients may start from it.
    """

    look: Look
    fitted: bool = False
    per_place: bool = False
    of_partner: bool = False
    path: bool = False


_VALUES = "oacore.vision.replacements"
REPLACEMENTS = registry(
    (
        Replacement("zero", f"{_VALUES}:zero", "A replaced channel is zero.", Look(INK, "X"), path=True),
        Replacement(
            "mean", f"{_VALUES}:mean", "Its mean over training images and places.", Look(SLATE, "s"), path=True
        ),
        Replacement(
            "resample", f"{_VALUES}:resample", "Its output on another test image.", Look(BLUE, "D"), of_partner=True
        ),
        Replacement(
            "optimal",
            f"{_VALUES}:mean",
            "The constant of each channel that makes the loss smallest, fitted on training images from the mean.",
            Look(ACCENT, "o"),
            fitted=True,
        ),
        Replacement(
            "optimal_positional",
            f"{_VALUES}:mean_per_place",
            "The constants of each channel and place that make the loss smallest, fitted on training images from the "
            "mean at each place.",
            Look(GOLD, "P"),
            fitted=True,
            per_place=True,
        ),
    )
)


@dataclass(frozen=True)
class Measure(Row):
    """A way from a network to the importance of its units.

    Args:
        look: in figures.
        family: `ablation` ablates each unit alone, `shapley` random sets of them, `path` takes gradients.
        replacement: what replaces a unit, or what a path starts from; empty where it starts from an empty picture.
    """

    look: Look
    family: Literal["ablation", "shapley", "path"]
    replacement: str = ""


def _measures() -> list[Measure]:
    rows = [
        Measure(
            row.name, "oacore.vision.measures:ablation", f"KL with the unit alone replaced. {row.note}", row.look,
            "ablation", row.name,
        )
        for row in REPLACEMENTS.values()
    ]  # fmt: skip
    rows += [
        Measure(
            f"shapley_{row.name}", "oacore.vision.measures:shapley",
            f"Shapley value of the KL with a set of units replaced. {row.note}", Look(PURPLE, row.look.marker),
            "shapley", row.name,
        )
        for row in REPLACEMENTS.values()
    ]  # fmt: skip
    rows += [
        Measure(
            f"integrated_gradients_{row.name}", "oacore.vision.measures:integrated_gradients",
            f"Integrated gradients of the KL, from all units replaced to none. {row.note}",
            Look(GREEN, row.look.marker), "path", row.name,
        )
        for row in REPLACEMENTS.values()
        if row.path
    ]  # fmt: skip
    rows.append(
        Measure(
            "conductance", "oacore.vision.measures:conductance",
            "Layer conductance of the KL: integrated gradients from an empty picture, through the unit.",
            Look(TEAL, "^"), "path",
        )
    )  # fmt: skip
    return rows


MEASURES = registry(_measures())

if TYPE_CHECKING:
    ReplacementName = str
else:
    ReplacementName = Literal[tuple(REPLACEMENTS)]


def image_files(folder: Path) -> list[Path]:
    """The images in a folder and in folders of it, in the order of their names; hidden ones are left out."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_FILES and path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


class Images(Settings):
    """How the images are split."""

    n_network: int = Field(
        700,
        ge=20,
        description="images to train the network on; it is too sure of them to say what a unit is worth; none with "
        "`pretrained`",
    )
    n_train: int = Field(500, ge=2, description="images to fit constants on, and to take means of")
    n_validation: int = Field(150, ge=2, description="images that stop the fits of constants")
    n_test: int = Field(447, ge=4, description="images on which everything is measured")


class Pretrained(Settings):
    """A network that others have trained, on images of one's own, instead of a small one on digits."""

    model: str = Field(
        min_length=1,
        description="Hugging Face name or directory of a ResNet for image classification, such as microsoft/resnet-18",
    )
    revision: str | None = Field(None, description="branch, tag or commit of a Hugging Face model")
    images: LocalPath = Field(
        description="folder with images, in folders of their own or not; where those have the names of the network's "
        "classes its accuracy is told"
    )


class Network(Settings):
    """The residual network, which the workflow trains."""

    widths: tuple[Whole, ...] = Field(
        (8, 16, 32),
        min_length=1,
        max_length=4,  # of 8 x 8 pixels
        description="channels of each block; every later one halves the picture",
    )
    branches: int = Field(2, ge=1, description="residual branches of a block")
    n_steps: int = Field(400, ge=1, description="training steps")
    batch_size: int = Field(64, ge=1, description="images a training step")
    learning_rate: float = Field(1e-2, gt=0, description="peak of the one-cycle schedule")
    min_accuracy: float = Field(
        0.9, ge=0, le=1, description="accuracy on test images below which training counts as failed"
    )


class ConstantsFit(OptimalFit):
    """Fitting of a unit's constants."""

    learning_rate: float = Field(
        0.2, gt=0, description="Adam step as a round begins, in standard deviations of the channel"
    )
    batch_size: int = Field(16, ge=1, description="images a step, shared by all units")
    first_round: int = Field(
        20,
        ge=1,
        description="steps of the first round, in which the rate falls to zero; every further one has twice as many",
    )
    max_steps: int = Field(300, ge=1, description="cap on the steps of all rounds; the last one ends there")


class Vision(Settings):
    """Importance of the units of a convolutional network. The section's presence asks for it."""

    units: tuple[UnitKind, ...] = Field(
        ("channels", "branches", "blocks"),
        min_length=1,
        description="what to ablate: channels of the picture after one residual branch, residual branches, or all "
        "branches of a block together",
    )
    layer: int = Field(4, ge=0, description="channels: after how many residual branches; 0 is the stem")
    replacements: tuple[ReplacementName, ...] = Field(
        ("optimal", "optimal_positional", "mean", "zero", "resample"),
        min_length=1,
        description="what a replaced unit carries; Shapley values under the first are what figures compare with",
    )
    n_pairs: int = Field(
        16, ge=1, description="pairs of a random order of the units and its reverse, for each test image"
    )
    ig_steps: int = Field(16, ge=2, description="points on a path of gradients")
    budgets: tuple[Whole, ...] = Field(
        (4000, 16000, 64000), description="forward passes at which methods are compared beside their full runs"
    )
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0, 1, 2), min_length=1, description="draws of images and orders at each budget"
    )
    images: Images = Images()
    network: Network = Network()
    pretrained: Pretrained | None = None
    fit: ConstantsFit = ConstantsFit()

    def n_units(self, kind: UnitKind) -> int:
        """How many units of a kind the network that the workflow trains has."""
        widths, branches = self.network.widths, self.network.branches
        if kind == "channels":
            return widths[max(0, self.layer - 1) // branches]
        return len(widths) * branches if kind == "branches" else len(widths)

    def ranked(self, kind: UnitKind) -> bool:
        """Whether there are enough units of a kind to compare orders; of a pretrained network there have to be."""
        return kind != "blocks" if self.pretrained else self.n_units(kind) >= FEWEST_RANKED

    @property
    def packages(self) -> dict[str, str]:
        """Packages that only this section needs, by what is imported."""
        return {"captum": "captum"} | ({} if self.pretrained else {"sklearn": "scikit-learn"})

    @property
    def splits(self) -> dict[str, int]:
        """Images of each split."""
        used = {"n_network"} if self.pretrained else set()
        return {name.removeprefix("n_"): count for name, count in self.images.model_dump(exclude=used).items()}

    def measures(self) -> tuple[str, ...]:
        """The rows of `MEASURES` that these replacements give, in the registry's order."""
        return tuple(
            row.name for row in MEASURES.values() if not row.replacement or row.replacement in self.replacements
        )

    @property
    def images_mb(self) -> int:
        """Memory for what a pretrained network puts out on all images, at every branch."""
        return MB_OF_AN_IMAGE * sum(self.splits.values()) if self.pretrained else 0

    def of_network(self) -> dict[str, Any]:
        """What determines the network and the splits, JSON-able, but for what lies in files."""
        if self.pretrained is None:
            return self.model_dump(mode="json", include={"network", "images"})
        return {"revision": self.pretrained.revision, "images": self.splits}

    def read_by(self, kind: UnitKind) -> dict[str, Any]:
        """What the measurements of one kind of units depend on beside the network, JSON-able."""
        keys = {"replacements", "n_pairs", "ig_steps", "budgets", "seeds", "fit"} | (
            {"layer"} if kind == "channels" else set()
        )
        return self.model_dump(mode="json", include=keys)

    def figures(self) -> tuple[str, ...]:
        """Names of the figures that these settings give (`oacore.vision.plots.vision_figures`)."""
        kinds = [f"importance_{kind}" for kind in self.units]
        ranked = [kind for kind in self.units if self.ranked(kind)]
        rows = [REPLACEMENTS[name] for name in self.replacements]
        curves = ranked if any(not row.of_partner and not row.per_place for row in rows) else []
        return (*kinds, *(f"agreement_{kind}" for kind in ranked), *(f"curves_{kind}" for kind in curves))

    @model_validator(mode="after")
    def _it_makes_sense(self) -> "Vision":
        for name in ("units", "replacements", "budgets", "seeds"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: {', '.join(map(str, values))} repeats a value; allowed: each once")
        if self.pretrained is not None:
            if "network" in self.model_fields_set:
                raise ValueError("network: is not trained where pretrained names one; allowed: one of the two")
            return self
        if (asked := sum(self.splits.values())) > DIGITS:
            raise ValueError(f"images: {asked} in all splits; allowed: {DIGITS} in all")
        if self.layer > (most := self.n_units("branches")):
            raise ValueError(f"layer: {self.layer}; allowed: 0 to {most}, the network's residual branches")
        return self
