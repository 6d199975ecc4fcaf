"""Training of the network, in seconds, and its file."""

from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from oacore.config.vision import Network
from oacore.draws import prompts_of_step
from oacore.errors import UserError
from oacore.store.artefacts import read_tensors, write_tensors
from oacore.store.provenance import Provenance
from oacore.vision.data import N_CLASSES, Pictures
from oacore.vision.network import residual_network

LARGEST_NORM, WEIGHT_DECAY = 1.0, 1e-2


def train(settings: Network, images: Pictures, seed: int) -> nn.Sequential:
    """A network trained on images; the same seed and number of threads give the same bits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = residual_network(settings, N_CLASSES)
    rate = settings.learning_rate
    optimiser = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=settings.n_steps)
    for step in range(settings.n_steps):
        rows = prompts_of_step(len(images), settings.batch_size, seed, step)
        loss = cross_entropy(network(images.pixels[rows]), images.labels[rows])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), LARGEST_NORM)
        optimiser.step()
        schedule.step()
    return network.eval().requires_grad_(False)


@torch.no_grad()
def accuracy_and_loss(network: nn.Sequential, images: Pictures) -> tuple[float, float]:
    """The share of images that are classified rightly, and the mean cross-entropy in nats."""
    logits = network(images.pixels)
    right = (logits.argmax(-1) == images.labels).double().mean()
    return float(right), float(cross_entropy(logits, images.labels))


def check_accuracy(accuracy: float, settings: Network) -> None:
    """Refuse a network that has learned too little to be looked at.

    Raises:
        UserError: says what was reached, and what is required.
    """
    if accuracy < settings.min_accuracy:
        raise UserError(
            f"vision.network: training failed: accuracy is {accuracy:.3f}, required {settings.min_accuracy:g} "
            f"(vision.network.n_steps: {settings.n_steps})"
        )


def write_network(path: str | Path, network: nn.Sequential, provenance: Provenance) -> None:
    """Write the weights."""
    write_tensors(path, network.state_dict(), provenance)


def read_network(path: str | Path, settings: Network, provenance: Provenance) -> nn.Sequential:
    """The network that `write_network` wrote.

    Raises:
        UserError: the file is damaged or of other settings.
    """
    _, weights = read_tensors(path, provenance)
    network = residual_network(settings, N_CLASSES)
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)
