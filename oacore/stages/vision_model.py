"""Train the network of `vision:` on its images, or take a pretrained one to pieces."""

import torch

from oacore import __version__
from oacore.config.run import Config
from oacore.jobs import Files
from oacore.store.artefacts import digest_of_tensors, write_json, write_tensors
from oacore.store.provenance import Provenance
from oacore.vision.data import digest, write_pictures
from oacore.vision.network import rows_at_once
from oacore.vision.source import accuracy_and_loss, pretrained, trained

N_THREADS = 1  # the same bits whatever limits.threads, as the cache is shared


def run(config: Config, inputs: Files, outputs: Files) -> None:
    """Write model.json: accuracy and loss by split, hashes; the weights; and the images of all splits."""
    settings = config.vision
    assert settings is not None
    torch.set_num_threads(N_THREADS)
    named = settings.pretrained
    source = trained(settings, config.seed) if named is None else pretrained(settings, named, config.seed)
    network, splits = source.network, source.splits
    at_once = rows_at_once(network, splits["test"].pixels, config.limits.tokens_per_batch)
    measured = {split: accuracy_and_loss(network, images, at_once) for split, images in splits.items()}
    facts = {
        "model_hash": digest_of_tensors(network.state_dict()),
        "images_hash": digest(splits),
        "n_weights": sum(tensor.numel() for tensor in network.state_dict().values()),
        "n_branches": source.branches,
        "n_images": {split: len(images) for split, images in splits.items()},
        "accuracy": {split: numbers[0] for split, numbers in measured.items()},
        "loss_nats": {split: numbers[1] for split, numbers in measured.items()},
        **source.facts,
    }
    facts["versions"] = {"oacore": __version__, **source.facts["versions"]}
    write_tensors(outputs["weights"], network.state_dict(), Provenance({"model_hash": facts["model_hash"]}))
    write_pictures(outputs["images"], splits, Provenance({"images_hash": facts["images_hash"]}))
    write_json(outputs["model"], facts)
    accuracy = facts["accuracy"]["test"]
    told = "classes of images not known" if accuracy is None else f"test accuracy {accuracy:.3f}"
    print(f"vision: {facts['n_weights']} weights, {told}")
