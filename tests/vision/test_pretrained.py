"""Networks of Hugging Face on a folder's images, against transformers' own passes."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.nn.functional import kl_div
from transformers import AutoImageProcessor, ResNetConfig, ResNetForImageClassification

from oacore.config.read import parse_config
from oacore.config.vision import Vision, image_files
from oacore.errors import UserError
from oacore.runner import run_stage
from oacore.store.artefacts import read_json
from oacore.store.layout import Layout
from oacore.vision.data import UNKNOWN, read_pictures
from oacore.vision.passes import Passes
from oacore.vision.pretrained import FURTHEST, check_parts, in_parts, load, pictures, skeleton
from oacore.vision.source import accuracy_and_loss
from oacore.vision.units import check_units, units_of

SIZE = 32
CLASSES = {0: "tabby, tabby cat", 1: "crane", 2: "sea lion"}
COUNTS = {"n_train": 6, "n_validation": 4, "n_test": 5}


def network(**settings):
    """Untrained, with statistics of normalisation as training leaves them."""
    torch.manual_seed(0)
    widths = (
        [8, 12] if settings.get("layer_type", "basic") == "basic" else [32, 48]
    )  # of which bottlenecks have a quarter
    shape = {"embedding_size": 6, "hidden_sizes": widths, "depths": [3, 2], "layer_type": "basic"} | settings
    config = ResNetConfig(**shape, id2label=CLASSES, label2id={name: number for number, name in CLASSES.items()})
    model = ResNetForImageClassification(config).eval()
    for name, tensor in model.state_dict().items():
        if "running_var" in name or "normalization.weight" in name:
            tensor.copy_(0.5 + torch.rand(tensor.shape))
        elif "normalization" in name and tensor.is_floating_point():
            tensor.copy_(0.5 * torch.randn(tensor.shape))
    with torch.no_grad():  # classes are told apart, and not too surely
        classifier, pixels = model.classifier[1], torch.randn(20, 3, SIZE, SIZE)
        classifier.weight *= 2 / model(pixels).logits.std(0).mean()
        classifier.bias -= model(pixels).logits.mean(0)
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model's directory, and a folder of images of two of its classes, and of an unknown one."""
    root = tmp_path_factory.mktemp("pretrained")
    network().save_pretrained(root / "model")
    processing = {"feature_extractor_type": "ConvNextFeatureExtractor", "size": SIZE, "crop_pct": 0.875, "resample": 3}
    normalised = {"do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.3], "do_resize": True}
    (root / "model/preprocessor_config.json").write_text(json.dumps(processing | normalised))
    draw = np.random.default_rng(0)
    for folder, count in (("tabby", 8), ("crane", 7)):
        (root / "images" / folder).mkdir(parents=True)
        for number in range(count):
            pixels = draw.integers(0, 255, (40 + number, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / folder / f"{number}.png")
    Image.fromarray(pixels[..., 0]).save(root / "images/tabby/gray.JPEG")
    (root / "images/notes.txt").write_text("no image")
    (root / "images/.hidden.png").write_text("no image")
    return root


def asked(place, **more):
    named = {"model": str(place / "model"), "images": str(place / "images")}
    return {"images": COUNTS, "pretrained": named, "replacements": ["optimal", "zero", "resample"]} | more


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_parts_compute_what_transformers_computes(kind, first, early):
    model = network(layer_type=kind, downsample_in_first_stage=first, downsample_in_bottleneck=early)
    parts, pixels = in_parts(model), torch.randn(7, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = model(pixels).logits
        assert torch.allclose(parts(pixels), expected, rtol=1e-4, atol=1e-4) and expected.std(0).min() > 0.1
    assert len(parts) == 7 and check_parts(parts, model, pixels) < FURTHEST
    other = skeleton(json.loads(json.dumps(model.config.to_dict())))
    other.load_state_dict(parts.state_dict())
    assert torch.equal(other(pixels), parts(pixels))
    parts[3].branch[0].weight += 0.1
    with pytest.raises(UserError, match=r"vision\.pretrained\.model: log-probabilities .* nats from those of trans"):
        check_parts(parts, model, pixels)


def test_a_replaced_branch_by_transformers_own_hooks():
    model, pixels = network(layer_type="bottleneck"), torch.randn(4, 3, SIZE, SIZE)
    parts = in_parts(model)
    units = units_of(parts, "branches", 0, (3, 2))
    passes = Passes(parts, units, pixels, 3)
    layers = [layer for stage in model.resnet.encoder.stages for layer in stage.layers]
    with torch.no_grad():
        clean = model(pixels).logits.log_softmax(-1)
        for number, layer in enumerate(layers):
            value = passes.activations()[f"{number + 1}.branch"].mean((0, 2, 3))
            hook = layer.layer.register_forward_hook(
                lambda module, given, out, value=value: value[:, None, None].expand_as(out).clone()
            )
            replaced = model(pixels).logits.log_softmax(-1)
            hook.remove()
            expected = kl_div(replaced, clean, reduction="none", log_target=True).sum(-1)
            gates = torch.ones(4, len(units))
            gates[:, number] = 0
            carried = {place: of.mean((0, 2, 3), keepdim=True) for place, of in passes.activations().items()}
            found = passes.losses_of(torch.arange(4), gates, lambda part, carried=carried: carried)
            assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-5) and expected.max() > 1e-3


def test_pictures_of_a_folder(place):
    settings = Vision(**asked(place))
    model, processor = load(settings.pretrained)
    files = image_files(place / "images")
    assert len(files) == 16 and files == sorted(files)
    splits = pictures(settings, processor, model.config.id2label, 0)
    assert {split: len(of) for split, of in splits.items()} == {"train": 6, "validation": 4, "test": 5}
    pixels = torch.cat([of.pixels for of in splits.values()])
    assert pixels.shape == (15, 3, SIZE, SIZE) and len(pixels.flatten(1).unique(dim=0)) == 15
    labels = torch.cat([of.labels for of in splits.values()])
    theirs = AutoImageProcessor.from_pretrained(place / "model")
    known = {}
    for file in files:
        with Image.open(file) as image:
            known[file] = theirs(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
    for row, label in zip(pixels, labels.tolist(), strict=True):
        (file,) = (file for file, own in known.items() if torch.equal(own, row))
        assert label == {"tabby": 0, "crane": 1}[file.parent.name]
    again, other = (pictures(settings, processor, model.config.id2label, seed) for seed in (0, 1))
    assert torch.equal(again["test"].pixels, splits["test"].pixels)
    assert not torch.equal(other["test"].pixels, splits["test"].pixels)


def test_accuracy_is_told_where_all_classes_are_known(place):
    settings = Vision(**asked(place))
    model, processor = load(settings.pretrained)
    parts = in_parts(model)
    test = pictures(settings, processor, model.config.id2label, 0)["test"]
    with torch.no_grad():
        right = model(test.pixels).logits.argmax(-1) == test.labels
    assert accuracy_and_loss(parts, test, 2)[0] == pytest.approx(right.double().mean().item())
    unknown = pictures(settings, processor, {0: "tabby"}, 0)["test"]
    assert set(unknown.labels.tolist()) == {0, UNKNOWN} and accuracy_and_loss(parts, unknown, 2) == (None, None)


def test_a_file_that_is_no_image(place, tmp_path):
    (tmp_path / "a.png").write_text("no image")
    settings = Vision(**asked(place, images={"n_train": 2, "n_validation": 2, "n_test": 4}))
    settings = settings.model_copy(
        update={"pretrained": settings.pretrained.model_copy(update={"images": place / "images"})}
    )
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes((place / "images/tabby/0.png").read_bytes()[:100])
    broken = settings.model_copy(update={"pretrained": settings.pretrained.model_copy(update={"images": tmp_path})})
    with pytest.raises(UserError, match=r"vision\.pretrained\.images: .*\.png can't be read as an image"):
        pictures(broken, load(settings.pretrained)[1], CLASSES, 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"images": {"n_train": 20}}, ["vision.images: 617 in all splits", "has: 16 (.jpg, .jpeg"]),
        ({"network": {"branches": 1}}, ["vision.network: is not trained where pretrained names one"]),
        ({"pretrained": {"model": "a/b"}}, ["vision.pretrained.images: missing"]),
        ({"pretrained": {"model": "./none", "images": "{images}"}}, ["vision.pretrained.model: 'none' does not exist"]),
        ({"pretrained": {"model": "a/b", "images": "./none"}}, ["images: 'none' does not exist", "folder of images"]),
        ({"pretrained": {"model": "a/b", "images": "{images}", "size": 3}}, ["vision.pretrained.size: unknown key"]),
    ],
)
def test_bad_settings_are_refused_before_any_job(place, change, said):
    text = json.dumps(asked(place) | change).replace("{images}", str(place / "images"))
    with pytest.raises(UserError) as error:
        parse_config({"tasks": {"ioi": None}, "vision": json.loads(text)})
    assert all(part in str(error.value) for part in said), error.value


def test_another_architecture_and_units_that_are_not_there(place, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    settings = Vision(**asked(place))
    with pytest.raises(UserError, match=r"vision\.pretrained\.model: .* has the architecture 'gpt2'; allowed: resnet"):
        load(settings.pretrained.model_copy(update={"model": str(tmp_path)}))
    with pytest.raises(UserError, match=r"vision\.pretrained\.model: 'nobody/nothing' can't be loaded"):
        load(settings.pretrained.model_copy(update={"model": "nobody/nothing"}))
    parts = in_parts(network())
    check_units(parts, settings, (3, 2))
    with pytest.raises(UserError, match=r"vision\.layer: 6; allowed: 0 to 5"):
        check_units(parts, settings.model_copy(update={"layer": 6}), (3, 2))
    few = in_parts(network(depths=[2, 2]))
    with pytest.raises(UserError, match=r"vision\.units: branches, of which the network has 4; allowed: .* 5"):
        check_units(few, settings, (2, 2))


def test_paths_may_begin_at_home(place, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    settings = asked(place, pretrained={"model": "~/model", "images": "~/images"})
    config = parse_config({"tasks": {"ioi": None}, "cache_dir": "c", "vision": settings})
    assert config.vision.pretrained.images == place / "images"
    assert (
        Layout(config).vision_dir
        == Layout(parse_config({"tasks": {"ioi": None}, "cache_dir": "c", "vision": asked(place)})).vision_dir
    )


def test_the_folder_names_what_is_cached(place, tmp_path):
    def folder(**change):
        return Layout(
            parse_config({"tasks": {"ioi": None}, "cache_dir": "c", "vision": asked(place) | change})
        ).vision_dir

    first = folder()
    assert first.startswith("c/model-") and folder(n_pairs=3) == first
    assert folder(images=COUNTS | {"n_test": 4}) != first
    (place / "images/new.png").write_bytes((place / "images/tabby/0.png").read_bytes())
    assert folder() != first
    (place / "images/new.png").unlink()
    assert folder() == first


def test_the_stages_from_a_folder_to_the_figures(place, tmp_path):
    settings = asked(
        place, n_pairs=1, ig_steps=2, budgets=[400], seeds=[0], layer=2,
        fit={"batch_size": 3, "first_round": 4, "max_steps": 8},
    )  # fmt: skip
    places = {"cache_dir": str(tmp_path / "cache"), "results_dir": str(tmp_path / "results")}
    config = parse_config({"tasks": {"ioi": None}, "device": "cpu", "vision": settings} | places)
    run_stage("vision_model", config)
    layout = Layout(config)
    facts = read_json(layout.vision_model("model.json"))
    assert facts["n_branches"] == [3, 2] and facts["furthest_nats"] < FURTHEST
    assert facts["pretrained"]["model"] == str(place / "model") and facts["accuracy"]["test"] is not None
    assert len(read_pictures(layout.vision_model("images.safetensors"))["test"]) == 5
    for units in config.vision.units:
        run_stage("vision", config, units=units)
    run_stage("vision_figures", config)
    importance = pd.read_csv(layout.vision("importance.csv"))
    counts = importance[importance["method"] == "zero"]["units"].value_counts()
    assert counts.to_dict() == {"channels": 8, "branches": 5, "blocks": 2}

    model = ResNetForImageClassification.from_pretrained(place / "model").eval()
    test = read_pictures(layout.vision_model("images.safetensors"))["test"]
    layers = [layer for stage in model.resnet.encoder.stages for layer in stage.layers]
    with torch.no_grad():
        clean = model(test.pixels).logits.log_softmax(-1)
        layers[3].layer.register_forward_hook(lambda module, given, out: torch.zeros_like(out))
        lost = kl_div(model(test.pixels).logits.log_softmax(-1), clean, reduction="none", log_target=True).sum(-1)
    found = importance.query("units == 'branches' and unit == 'branch 4' and method == 'zero'")
    assert found["importance_nats"].item() == pytest.approx(lost.mean().item(), rel=1e-3)
    for name in config.vision.figures():
        assert (tmp_path / "results/demo/vision/figures" / f"{name}.svg").exists(), name
