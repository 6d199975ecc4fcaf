"""Scikit-learn's digits: 1,797 handwritten digits of 8 x 8 pixels, which come with the package.

Symbols: N images.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from oacore.config.vision import DIGITS, Images
from oacore.store.artefacts import digest_of_tensors

N_CLASSES = 10
BRIGHTEST = 16  # of a pixel
SPLITS = ("network", "train", "validation", "test")


@dataclass(frozen=True)
class Pictures:
    """The images of a split."""

    pixels: Tensor  # [N, 1, 8, 8], 0 to 1
    labels: Tensor  # [N] int64

    def __len__(self) -> int:
        return len(self.labels)


def digits(settings: Images, seed: int) -> dict[str, Pictures]:
    """The splits, drawn without replacement."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = torch.from_numpy(data.images).float()[:, None] / BRIGHTEST
    labels = torch.from_numpy(data.target).long()
    order, splits, begin = torch.randperm(DIGITS, generator=torch.Generator().manual_seed(seed)), {}, 0
    for split in SPLITS:
        rows = order[begin : begin + getattr(settings, f"n_{split}")]
        splits[split], begin = Pictures(pixels[rows], labels[rows]), begin + len(rows)
    return splits


def digest(splits: dict[str, Pictures]) -> str:
    """A hash of all images and labels."""
    return digest_of_tensors(
        {f"{split}/{name}": getattr(of, name) for split, of in splits.items() for name in ("pixels", "labels")}
    )
