"""Where a network and its images come from: trained here on digits, or pretrained and on a folder's images.

Imports transformers where a network is a pretrained one.
"""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from oacore.config.vision import Pretrained, Vision
from oacore.store.artefacts import read_tensors
from oacore.store.provenance import Provenance
from oacore.vision.data import N_CLASSES, UNKNOWN, Pictures, digits
from oacore.vision.network import residual_network
from oacore.vision.train import check_accuracy, train
from oacore.vision.units import check_units

N_COMPARED = 8  # images on which a pretrained network's parts are held against the network as it came


class Source(NamedTuple):
    """A network and the images that it is looked at on.

    Args:
        branches: how many each block has.
        facts: what the network was made of, JSON-able; `read_network` needs them.
    """

    network: nn.Sequential
    splits: Mapping[str, Pictures]
    branches: list[int]
    facts: dict[str, Any]


def trained(settings: Vision, seed: int) -> Source:
    """A small network, trained on digits.

    Raises:
        UserError: it has learned too little to be looked at.
    """
    splits = digits(settings.splits, seed)
    network = train(settings.network, splits["network"], seed)
    accuracy, _ = accuracy_and_loss(network, splits["test"], len(splits["test"]))
    assert accuracy is not None
    check_accuracy(accuracy, settings.network)
    branches = [settings.network.branches] * len(settings.network.widths)
    return Source(network, splits, branches, {"versions": _versions("torch", "scikit-learn")})


def pretrained(settings: Vision, named: Pretrained, seed: int) -> Source:
    """A Hugging Face network and a folder's images.

    Raises:
        UserError: either can't be read, or the network does not have the units that are asked for.
    """
    from oacore.vision.pretrained import check_parts, in_parts, load, pictures

    model, processor = load(named)
    network, branches = in_parts(model), list(model.config.depths)
    check_units(network, settings, branches)
    splits = pictures(settings, processor, model.config.id2label, seed)
    away = check_parts(network, model, splits["test"].pixels[:N_COMPARED])
    facts = {
        "pretrained": {"model": named.model, "revision": getattr(model.config, "_commit_hash", None) or named.revision},
        "resnet": model.config.to_dict(),
        "furthest_nats": away,
        "versions": _versions("torch", "transformers"),
    }
    return Source(network, splits, branches, facts)


def read_network(path: str | Path, facts: Mapping[str, Any], settings: Vision) -> nn.Sequential:
    """The network with the weights of a file, in evaluation mode.

    Args:
        facts: of its model.json.

    Raises:
        UserError: the file is damaged or of another network.
    """
    _, weights = read_tensors(path, Provenance({"model_hash": facts["model_hash"]}))
    if "resnet" in facts:
        from oacore.vision.pretrained import skeleton

        network = skeleton(facts["resnet"])
    else:
        network = residual_network(settings.network, N_CLASSES)
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)


@torch.no_grad()
def accuracy_and_loss(network: nn.Sequential, images: Pictures, at_once: int) -> tuple[float | None, float | None]:
    """The share of images that are classified rightly, and the mean cross-entropy in nats; None where an image's class
    is not known.
    """
    if (images.labels == UNKNOWN).any():
        return None, None
    logits: Tensor = torch.cat([network(pixels) for pixels in images.pixels.split(at_once)])
    right = (logits.argmax(-1) == images.labels).double().mean()
    return float(right), float(cross_entropy(logits, images.labels))


def _versions(*names: str) -> dict[str, str]:
    return {name: version(name) for name in names}
