"""Hugging Face's ResNets as networks of parts, and a folder's images as such a network takes them.

In evaluation a batch normalisation is a linear map for each channel, and becomes part of the convolution before it. A
branch of the basic kind has two convolutions, a bottleneck three.

Symbols: N images, c colors, h and w height and width.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oacore.config.model import is_directory_name
from oacore.config.vision import Pretrained, Vision, image_files
from oacore.errors import UserError
from oacore.models.hub import hub_errors, hub_is_needed_and_there
from oacore.vision.data import UNKNOWN, Pictures, drawn_splits
from oacore.vision.network import Branch, Head

KEY = "vision.pretrained.model"
FURTHEST = 1e-3  # nats, between log-probabilities of the parts and of the model as it came


def load(settings: Pretrained) -> tuple[Any, Any]:
    """Hugging Face's model in evaluation mode on the CPU, and its image processor; never runs code from the hub.

    Raises:
        UserError: no such directory or hub model, unreachable hub, no ResNet.
    """
    from transformers import AutoConfig, AutoImageProcessor, ResNetForImageClassification

    source: str | Path = settings.model
    if is_directory_name(settings.model):
        source = Path(settings.model).expanduser()
    options: dict[str, Any] = {"revision": settings.revision, "trust_remote_code": False}
    with hub_errors(source, settings.revision, KEY):
        options["local_files_only"] = not hub_is_needed_and_there(source)
        config = AutoConfig.from_pretrained(source, **options)
        if config.model_type != "resnet" or config.hidden_act != "relu":
            raise UserError(
                f"{KEY}: {settings.model!r} has the architecture {config.model_type!r}; allowed: resnet with ReLUs, "
                "such as microsoft/resnet-18"
            )
        model = ResNetForImageClassification.from_pretrained(source, **options, dtype=torch.float32)
        return model.eval().requires_grad_(False), AutoImageProcessor.from_pretrained(source, **options)


def skeleton(config: Mapping[str, Any]) -> nn.Sequential:
    """The parts of a network with any weights.

    Args:
        config: as `load`'s model has it, JSON-able.
    """
    from transformers import ResNetConfig, ResNetForImageClassification

    return in_parts(ResNetForImageClassification(ResNetConfig.from_dict(dict(config))).eval())


@torch.no_grad()
def in_parts(model: Any) -> nn.Sequential:
    """A stem, residual branches in order, a head; with the model's weights."""
    embedder, stages = model.resnet.embedder, model.resnet.encoder.stages
    stem = nn.Sequential(_convolution(embedder.embedder), nn.ReLU(), embedder.pooler)
    branches = [_branch(layer) for stage in stages for layer in stage.layers]
    return nn.Sequential(stem, *branches, Head(model.classifier[1])).eval().requires_grad_(False)


def check_parts(network: nn.Sequential, model: Any, pixels: Tensor) -> float:
    """The furthest that log-probabilities of the parts are from the model's own, in nats.

    Raises:
        UserError: that is too far.
    """
    with torch.no_grad():
        away = (network(pixels).log_softmax(-1) - model(pixels).logits.log_softmax(-1)).abs().max().item()
    if not away <= FURTHEST:
        raise UserError(
            f"{KEY}: log-probabilities of its parts are up to {away:.2g} nats from those of transformers; allowed: "
            f"{FURTHEST:g}"
        )
    return away


def pictures(settings: Vision, processor: Any, labels: Mapping[int, str], seed: int) -> dict[str, Pictures]:
    """The splits of the folder's images, drawn without replacement and processed as the model wants them.

    Args:
        labels: names of the model's classes; an image in a folder of that name, or of the first of several that it has
            (`tabby, tabby cat`), is of the class.

    Raises:
        UserError: a file is no image.
    """
    from PIL import Image

    assert settings.pretrained is not None
    classes = {name.strip(): number for number, names in labels.items() for name in (names, names.split(",")[0])}
    files = image_files(settings.pretrained.images)

    def read(rows: Tensor) -> Pictures:
        pixels = []
        for row in rows.tolist():
            try:
                with Image.open(files[row]) as image:
                    pixels.append(processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0])
            except OSError as error:
                raise UserError(f"vision.pretrained.images: {files[row]} can't be read as an image: {error}") from error
        numbers = [classes.get(files[row].parent.name, UNKNOWN) for row in rows.tolist()]
        return Pictures(torch.stack(pixels), torch.tensor(numbers))

    return {split: read(rows) for split, rows in drawn_splits(settings.splits, len(files), seed).items()}


def _branch(layer: Any) -> Branch:
    parts: list[nn.Module] = []
    for number, convolution in enumerate(layer.layer):
        parts += [nn.ReLU()] * (number > 0) + [_convolution(convolution)]
    skip = nn.Identity() if isinstance(layer.shortcut, nn.Identity) else _convolution(layer.shortcut)
    return Branch(nn.Sequential(*parts), skip)


def _convolution(layer: Any) -> nn.Conv2d:
    """A convolution and the normalisation behind it, as one."""
    return nn.utils.fusion.fuse_conv_bn_eval(layer.convolution, layer.normalization)
