"""Train the network of `vision:` on its images."""

from importlib.metadata import version

import torch

from oacore import __version__
from oacore.config.run import Config
from oacore.jobs import Files
from oacore.store.artefacts import digest_of_tensors, write_json
from oacore.store.provenance import Provenance
from oacore.vision.data import digest, digits
from oacore.vision.train import accuracy_and_loss, check_accuracy, train, write_network

N_THREADS = 1  # the same bits whatever limits.threads, as the cache is shared


def run(config: Config, inputs: Files, outputs: Files) -> None:
    """Write model.json: accuracy and loss by split, hashes; and the weights."""
    settings = config.vision
    assert settings is not None
    torch.set_num_threads(N_THREADS)
    splits = digits(settings.images, config.seed)
    network = train(settings.network, splits["network"], config.seed)
    measured = {split: accuracy_and_loss(network, images) for split, images in splits.items()}
    check_accuracy(measured["test"][0], settings.network)
    model_hash = digest_of_tensors(network.state_dict())
    write_network(outputs["weights"], network, Provenance({"model_hash": model_hash}))
    facts = {
        "model_hash": model_hash,
        "images_hash": digest(splits),
        "n_weights": sum(tensor.numel() for tensor in network.state_dict().values()),
        "n_images": {split: len(images) for split, images in splits.items()},
        "accuracy": {split: numbers[0] for split, numbers in measured.items()},
        "loss_nats": {split: numbers[1] for split, numbers in measured.items()},
        "versions": {"oacore": __version__, **{name: version(name) for name in ("torch", "scikit-learn")}},
    }
    write_json(outputs["model"], facts)
    print(f"vision: {facts['n_weights']} weights, test accuracy {measured['test'][0]:.3f}")
