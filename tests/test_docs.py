"""The documentation says what is so: its code runs, its links lead somewhere, the names and keys in it exist."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import transformers as tf
from conftest import GATED, random_hf
from test_tasks import check_form, settings, word_level

import oacore
from oacore.config import model, tasks
from oacore.config.ablation import ABLATION_TYPES
from oacore.config.explain import describe_fields
from oacore.config.read import load_config
from oacore.config.run import Config
from oacore.engine.activations import write_activations
from oacore.engine.parity import open_model
from oacore.errors import UserError
from oacore.models import hub
from oacore.models.demo import make_tokenizer
from oacore.models.load import canonical
from oacore.store.provenance import Provenance
from oacore.tasks import greater_than
from oacore.tasks.prompts import SPLITS
from oacore.tasks.stored import read_prompts, write_prompts

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "config/README.md", ROOT / "kernels/README.md", *sorted(ROOT.glob("docs/*.md"))]


def blocks(page, language):
    """The fenced blocks of one language in a page, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)


def prose(page):
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


# Links and names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", found.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, (
                f"{page.name}: {target}"
            )


def exists(name):
    """Whether a dotted name is a module of ours, or an attribute (of a class: also a field) reached from one."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            if not hasattr(found, part) and part not in getattr(found, "__dataclass_fields__", {}):
                return False
            found = getattr(found, part, None)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_names_of_the_library_exist(page):
    text = prose(page)
    missing = [name for name in set(re.findall(r"`((?:oacore|oakernels)(?:\.\w+)+)`", text)) if not exists(name)]
    paths = set(re.findall(r"`((?:oacore|tests|workflow|kernels|config)/[\w./-]+)`", text))
    assert not missing + [path for path in paths if not (ROOT / path).exists()]


KEYS = {key for key, *_ in describe_fields()}
SECTIONS = {key[: match.start()] for key in KEYS for match in re.finditer(r"\.", key)}


def is_key(name):
    """A key, a section, or `section.*`; pages of one section may leave its name out: `masks.n_steps`."""
    name = name.removesuffix(".*")
    return any(key == name or key.endswith(f".{name}") for key in KEYS | SECTIONS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_config_keys_exist(page):
    """Whatever in backticks starts like a section of the config is a key of it."""
    first = {section.split(".")[-1] for section in SECTIONS}
    named = [name for name in re.findall(r"`([a-z_]+(?:\.(?:\w+|\*))+)`", prose(page)) if name.split(".")[0] in first]
    files = re.compile(r"\.(csv|json|md|svg|png|html|h5|yaml|py|safetensors)$")
    assert not [name for name in named if not is_key(name) and not files.search(name)]


def test_the_checkers_see_what_is_wrong():
    assert (
        exists("oacore.ablation.gaps.evaluate")
        and exists("oacore.models.weights.Block.W_Q")
        and exists("oacore.config.run.Config.model_fields")
    )
    assert (
        not exists("oacore.ablation.gaps.evaluated")
        and not exists("oacore.gasp")
        and not exists("oacore.models.weights.Block.W_X")
    )
    assert (
        is_key("ablation.optimal.max_steps")
        and is_key("masks.n_steps")
        and is_key("circuits.refit.*")
        and is_key("limits")
    )
    assert not is_key("ablation.optimal.steps") and not is_key("mask.n_steps")


def test_every_page_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text()
    assert not [page.name for page in ROOT.glob("docs/*.md") if f"](docs/{page.name})" not in text]


# docs/ablation.md


def test_ablation_page_has_every_method_key_and_figure():
    text = (ROOT / "docs/ablation.md").read_text()
    settings = Config.model_validate({"tasks": {"ioi": {}}}).ablation
    for name in (*settings.methods, *settings.figures()):
        assert f"| `{name}`" in text or f"`{name}`," in text, name
    for key, default, _ in describe_fields():
        if key.startswith("ablation.optimal."):
            assert re.search(rf"`{re.escape(key)}`.* \| .*\b{re.escape(default)}\b", text), key
    assert set(ABLATION_TYPES) == set(settings.methods)


def test_shares_measured_are_those_of_the_pages_that_it_cites():
    """Numbers that stand on two pages are the same on both."""
    page, stories, readme = (
        (ROOT / name).read_text() for name in ("docs/ablation.md", "docs/stories260k.md", "README.md")
    )
    for method in ("zero", "mean", "resample", "counterfactual"):
        share, ioi, years = re.search(
            rf"^\| gap\(optimal\) / gap\({method}\) \| (.*?) \| (.*?) \| (.*?) \|$", page, re.M
        ).groups()
        assert re.search(rf"^\| {method}\b.*\| {re.escape(share)} \|", stories, re.M), method
        assert re.search(rf"^\| (its share of the|of the) {method} gap.*\| {ioi} \| {years} \|", readme, re.M), method


# docs/cache.md


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """A folder with prompts.h5 and activations.h5 of Greater-Than on a tiny random model, in fp32."""
    folder = tmp_path_factory.mktemp("cache")
    tokenizer = make_tokenizer()
    hf = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=32, n_layer=2, n_head=2))
    counts = SimpleNamespace(n_train=20, n_validation=4, n_test=15)
    prompts = {split: greater_than.generate(counts, tokenizer, 0, split) for split in SPLITS}
    provenance = Provenance({"task": "greater_than", "model_hash": "m"})
    write_prompts(folder / "prompts.h5", prompts, provenance)
    hashes = {split: own.digest() for split, own in prompts.items()}
    write_activations(folder / "activations.h5", canonical(hf), prompts, provenance.requiring(prompts_hash=hashes))
    return folder


def test_cache_page_reads_what_we_write(cached, monkeypatch):
    monkeypatch.chdir(cached)
    plain, ours = blocks("docs/cache.md", "python")
    found = {}
    exec(plain, found)
    prompts = read_prompts("prompts.h5", "test")
    assert found["texts"].tolist() == prompts.text and np.array_equal(found["tokens"], prompts.tokens)
    assert found["about"]["counts"]["test"]["n_prompts"] == 15
    assert found["residual"].shape == (15, 2, 32) and found["residual"].dtype == np.float32
    exec(ours, found)
    assert np.array_equal(found["some"].numpy(), found["residual"][10:15])
    assert found["batch"]["train/residual"].shape[1:] == (2, 32)
    changed = ours.replace('about["model_hash"]', '"another"')
    with pytest.raises(UserError, match="model_hash"):
        exec(changed, found)


def test_cache_page_reads_bfloat16(tmp_path, monkeypatch, cached):
    import torch

    from oacore.store.writer import Writer

    shutil.copy(cached / "prompts.h5", tmp_path)
    values = torch.randn(3, 2, 4).bfloat16()
    with Writer(tmp_path / "activations.h5", Provenance()) as writer:
        writer.append("test/residual", values)
        writer.put("statistics/head/mean", np.zeros((2, 2, 2), np.float32))
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(blocks("docs/cache.md", "python")[0], found)
    assert np.array_equal(found["residual"], values.float().numpy())


def test_cache_page_lists_every_dataset_and_attribute(cached):
    text = (ROOT / "docs/cache.md").read_text()
    for name in ("prompts.h5", "activations.h5"):
        with h5py.File(cached / name) as file:
            datasets = json.loads(file.attrs["datasets"])
            assert all(file[dataset].fletcher32 and f"checksums/{dataset}" in file for dataset in datasets)
        for dataset in datasets:
            group, _, last = dataset.rpartition("/")
            row = (
                f"`{{split}}/{last}`"
                if group in SPLITS
                else f"`{last}`"
                if group.startswith("statistics/")
                else f"`{dataset}`"
            )
            row = f"`statistics/{{source}}/{last}`" if last in ("mean_positional", "cf_mean", "mean") else row
            assert row in text, f"{name}: {dataset}"
    with h5py.File(cached / "prompts.h5") as file:
        assert (
            file["test/tokens"].dtype == file["test/subject"].dtype == np.int32 and file["test/text"].dtype.kind == "S"
        )
    with h5py.File(cached / "activations.h5") as file:
        shortest = int(file["statistics/shortest"][0])
        assert file["statistics/head/mean_positional"].shape == (2, 2, shortest + 1, 16)
        assert file["statistics/input/cf_mean"].shape == (shortest + 1, 32)


# docs/extending.md


@pytest.fixture(scope="module")
def agreement():
    """The page's task as a module."""
    module = types.ModuleType("agreement")
    exec(blocks("docs/extending.md", "python")[0], module.__dict__)
    return module


@pytest.fixture(scope="module")
def words(agreement):
    nouns = [f"{noun}{end}" for noun in agreement.NOUNS for end in ("", "s")]
    return word_level(["The", "near", "the", "is", "are", *nouns])


@pytest.fixture(scope="module")
def my_model(words, tmp_path_factory):
    """A folder in which `my-model` is a tiny random model with a tokenizer that suits the task."""
    folder = tmp_path_factory.mktemp("extending")
    random_hf("gpt2", scale=0.5).save_pretrained(folder / "my-model")
    words.save_pretrained(folder / "my-model")
    return folder


def test_the_task_makes_valid_prompts(agreement, words):
    assert len(blocks("docs/extending.md", "python")[0].splitlines()) <= 40
    splits = {split: agreement.generate(settings(60), words, 0, split) for split in SPLITS}
    for prompts in splits.values():
        check_form(prompts, words, 60)
        for text, right, wrong, other in zip(
            prompts.text, prompts.answers, prompts.wrong_answers, prompts.counterfactual, strict=True
        ):
            plural = text.split()[1].endswith("s")
            assert [words.decode([*right]), words.decode([*wrong])] == (["are", "is"] if plural else ["is", "are"])
            swapped = words.decode(other[1:]).split()
            assert swapped[1].endswith("s") != plural and swapped[2:] == text.split()[2:]
    assert not set(splits["train"].text) & (set(splits["validation"].text) | set(splits["test"].text))
    assert agreement.generate(settings(60), words, 0, "test").digest() == splits["test"].digest()
    with pytest.raises(UserError, match=r"tasks\.agreement: tokenizer 'words' has not the verbs"):
        agreement.generate(settings(60), word_level(["The", "the", "near", "is"]), 0, "test")
    with pytest.raises(UserError, match=r"tasks\.agreement\.n_test"):
        agreement.generate(settings(10**5), words, 0, "test")


def test_the_task_has_room_for_the_default_numbers_of_prompts(agreement, words):
    default = tasks.Task()
    assert len(agreement.generate(default, words, 0, "train").text) == default.n_train
    assert len(agreement.generate(default, words, 0, "test").text) == default.n_test


def test_the_task_runs_through_the_library(agreement, my_model, monkeypatch, capsys):
    monkeypatch.chdir(my_model)
    found = dict(agreement.__dict__)
    exec(blocks("docs/extending.md", "python")[1], found)
    shown = capsys.readouterr().out
    gaps = found["table"].pivot(index="component", columns="method", values="gap_nats")
    errors = found["table"].pivot(index="component", columns="method", values="se_nats")
    assert len(gaps) == 3 * 5 and np.isfinite(gaps.to_numpy()).all() and (gaps > -1e-6).all().all()
    assert "a0.h1" in shown and "median_ratio_optimal_to_method" in shown
    for method in ("zero", "mean"):
        assert (gaps["optimal"] <= gaps[method] + 2 * errors[method] + 1e-6).all(), method
    assert gaps["optimal"].sum() < gaps["mean"].sum() < gaps["zero"].sum()


def apply(diff, root):
    """Make the page's edits in a copy of the repository; each must fit in exactly one place."""
    for hunk in re.split(r"^@@ ", diff, flags=re.M)[1:]:
        name, _, body = hunk.partition("\n")
        lines = body.splitlines()
        before, after = ("\n".join(line[1:] for line in lines if not line.startswith(sign)) for sign in "+-")
        text = (root / name).read_text()
        assert text.count(before) == 1, f"docs/extending.md: {name} has this {text.count(before)} times:\n{before}"
        (root / name).write_text(text.replace(before, after))


def test_the_edits_bring_the_task_into_the_pipeline(my_model, tmp_path):
    """In a copy of the library: its file, the page's edits, a config, all stages to the report; and a misspelled key is
    refused.
    """
    for package in ("oacore", "kernels"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "oacore/tasks/agreement.py").write_text(blocks("docs/extending.md", "python")[0])
    apply(blocks("docs/extending.md", "diff")[0], tmp_path)
    (tmp_path / "my.yaml").write_text(
        f"model: {my_model / 'my-model'}\ndevice: cpu\nlimits: {{threads: 1}}\n"
        "tasks: {agreement: {n_train: 24, n_validation: 8, n_test: 12}}\n"
        "ablation: {methods: [zero, counterfactual, optimal], optimal: {max_steps: 4}}\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, tmp_path / "kernels")))}

    def run(*arguments):
        command = [sys.executable, "-m", "oacore", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    result = run("all", "--config", "my.yaml")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "agreement" in (tmp_path / "results/demo/report.html").read_text()
    assert (tmp_path / "results/demo/agreement/ablation/gaps.csv").read_text().count("\n") == 1 + 3 * 15
    assert len(list(tmp_path.glob("cache/my--model-*/agreement-*/prompts.h5"))) == 1
    result = run("estimate", "my.yaml")
    assert result.returncode == 0 and "agreement" in result.stdout, result.stdout + result.stderr
    (tmp_path / "my.yaml").write_text("tasks: {agreement: {n_trian: 3}}")
    assert "tasks.agreement.n_trian: unknown key" in run("model", "--config", "my.yaml").stderr


@pytest.mark.parametrize(
    ("family", "own", "passes"),
    [
        ("StableLm", {}, True),
        ("StableLm", {"qk_layernorm": True}, False),
        ("Granite", {"embedding_multiplier": 3.0, "residual_multiplier": 0.5}, False),
    ],
)
def test_what_one_more_architecture_needs(family, own, passes, tmp_path, monkeypatch):
    """The page's three examples: the parity gate tells them apart."""
    import torch

    more = (*model.ARCHITECTURES, family.lower())
    for module in (model, hub):
        monkeypatch.setattr(module, "ARCHITECTURES", more)
    torch.manual_seed(1)
    hf = tf.AutoModelForCausalLM.from_config(
        getattr(tf, f"{family}Config")(**GATED, pad_token_id=0, **own), attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.dim() == 1))
    hf.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    if passes:
        assert open_model(tmp_path, device="cpu")[1].max_abs_log_prob < 1e-4
    else:
        with pytest.raises(UserError, match="differs from Hugging Face's"):
            open_model(tmp_path, device="cpu")


def test_a_model_class_of_ones_own(tmp_path, monkeypatch):
    """A one-layer transformer without norms in 30 lines has learned its task and goes through gaps and circuits."""
    monkeypatch.chdir(tmp_path)
    of_model, of_task = blocks("docs/extending.md", "python")[-2:]
    assert len([line for line in of_model.splitlines() if line]) <= 30
    found = {}
    exec(of_model, found)
    for call in ('load("modular-addition"', "edges=12"):
        assert of_task.count(call) == 1
    short = of_task.replace('load("modular-addition"', 'load("modular-addition", threads=1')
    exec(short.replace("edges=12", 'edges=12, optimal={"max_steps": 2}, refit={"max_steps": 2}'), found)
    assert (found["logits"](found["tokens"])[:, -1].argmax(-1) == (found["a"] + found["b"]) % 11 + 3).all()
    assert "parity with its own forward pass" in repr(found["model"]) and found["circuit"].n_edges == 12
    gaps = found["gaps"].table.pivot(index="component", columns="method", values="gap_nats")
    assert set(gaps.index) == {"a0.h0", "a0.h1", "a0.h2", "a0.h3", "m0"} and (gaps > 0.01).all(axis=None)
    assert gaps["optimal"].sum() < gaps[["zero", "mean"]].sum().min()


# docs/python.md


def test_ten_lines_of_python_run(tmp_path, monkeypatch):
    """On a copy of the demo model and of the example's prompts, with short fits; then the page's other blocks."""
    shutil.copytree(model.SHIPPED_DEMO, tmp_path / "my-model")
    shutil.copy(ROOT / "config/pairs-example.csv", tmp_path / "my.csv")
    monkeypatch.chdir(tmp_path)
    lines, settings, to_config = blocks("docs/python.md", "python")
    assert lines == blocks("README.md", "python")[0] and len(lines.splitlines()) <= 10
    masks = {"n_steps": 40, "n_samples": 2, "learning_rate": 6}
    short = {
        'load("my-model"': ", threads=1",
        "gaps(model, task": ', methods=["zero", "optimal"], optimal={"max_steps": 2}',
        "edges=100": f', lambdas=[1e-2], masks={masks}, refit={{"max_steps": 2}}',
    }
    for call, more in short.items():
        assert lines.count(call) == 1
        lines = lines.replace(call, f"{call}{more}")
    found = {}
    exec(lines, found)
    assert found["circuit"].n_edges <= 100 and found["circuit"].draw().svg.startswith("<svg")
    assert set(found["gaps"].table["method"]) == {"zero", "optimal"}
    exec(settings.replace("350", "2"), found)
    assert set(found["fronts"].table["method"]) == {"eap", "random"}
    exec(to_config, found)
    config = load_config("my-model.yaml")
    assert config == found["gaps"].settings.model_copy(update={"run": "my-run"})


def test_the_python_page_has_every_function_and_attribute():
    text = (ROOT / "docs/python.md").read_text()
    assert not [name for name in oacore.API if f"`oa.{name}(" not in text]
    for name in ("table", "tables", "figures", "config", "folder"):
        assert f"`result.{name}`" in text and exists(f"oacore.api.Result.{name}")
    for name in ("edges", "n_edges", "kl_nats", "se_nats", "draw", "save", "evaluate"):
        assert re.search(rf"`{name}[`(]", text) and exists(f"oacore.api.Circuit.{name}")
