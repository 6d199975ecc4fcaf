"""Images in splits, and scikit-learn's digits: 1,797 handwritten digits of 8 x 8 pixels, which come with the package.

Symbols: N images, c colors, h and w height and width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from oacore.config.vision import DIGITS
from oacore.store.artefacts import ANY, digest_of_tensors, read_tensors, write_tensors
from oacore.store.provenance import Provenance

N_CLASSES = 10
BRIGHTEST = 16  # of a pixel
UNKNOWN = -1  # label of an image without one
PARTS = ("pixels", "labels")


@dataclass(frozen=True)
class Pictures:
    """The images of a split."""

    pixels: Tensor  # [N, c, h, w]; of digits 0 to 1
    labels: Tensor  # [N] int64

    def __len__(self) -> int:
        return len(self.labels)


def drawn_splits(counts: Mapping[str, int], n: int, seed: int) -> dict[str, Tensor]:
    """So many of n rows for each split, drawn without replacement."""
    order, splits, begin = torch.randperm(n, generator=torch.Generator().manual_seed(seed)), dict[str, Tensor](), 0
    for split, count in counts.items():
        splits[split], begin = order[begin : begin + count], begin + count
    return splits


def digits(counts: Mapping[str, int], seed: int) -> dict[str, Pictures]:
    """The splits, with so many digits each."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = torch.from_numpy(data.images).float()[:, None] / BRIGHTEST
    labels = torch.from_numpy(data.target).long()
    return {split: Pictures(pixels[rows], labels[rows]) for split, rows in drawn_splits(counts, DIGITS, seed).items()}


def digest(splits: Mapping[str, Pictures]) -> str:
    """A hash of all images and labels."""
    return digest_of_tensors(_tensors(splits))


def write_pictures(path: str | Path, splits: Mapping[str, Pictures], provenance: Provenance) -> None:
    """Write all splits."""
    write_tensors(path, _tensors(splits), provenance)


def read_pictures(path: str | Path, provenance: Provenance = ANY) -> dict[str, Pictures]:
    """The splits that `write_pictures` wrote.

    Raises:
        UserError: the file is damaged or of other images.
    """
    _, tensors = read_tensors(path, provenance)
    splits = dict.fromkeys(name.partition("/")[0] for name in tensors)
    return {split: Pictures(*(tensors[f"{split}/{part}"] for part in PARTS)) for split in splits}


def _tensors(splits: Mapping[str, Pictures]) -> dict[str, Tensor]:
    return {f"{split}/{part}": getattr(of, part) for split, of in splits.items() for part in PARTS}
