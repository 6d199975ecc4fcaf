"""Training of the network, in seconds."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from oacore.config.vision import Network
from oacore.draws import prompts_of_step
from oacore.errors import UserError
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
