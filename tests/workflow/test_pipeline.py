"""The pipeline end to end on the embedded model, its outputs compared with the definitions and with a second way of
computing them.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from oacore.config.model import SHIPPED_DEMO
from oacore.config.read import load_config
from oacore.config.run import Config
from oacore.engine.activations import read_clean_log_probs, read_statistics
from oacore.engine.forward import residual_after
from oacore.engine.prompts import batch_of
from oacore.errors import UserError
from oacore.jobs import VISION_TABLES, jobs
from oacore.models.load import load
from oacore.runner import run_stage
from oacore.store.housekeeping import NEEDED
from oacore.store.items import FOLDER
from oacore.store.layout import Layout, circuit_file
from oacore.store.provenance import Provenance
from oacore.store.reader import Reader
from oacore.tasks.stored import read_prompts

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests/configs/tiny.yaml"


def snakemake(*arguments, cwd=ROOT, **options):
    command = [sys.executable, "-m", "snakemake", "--cores", "2", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, **options)


def roots(cache, results):
    return ["--config", f"cache_dir={cache}", f"results_dir={results}"]


FIT = ["converged", "steps"]  # of the columns of a fitted number


@pytest.fixture(scope="session")
def finished(tiny_run):
    """Config, layout and gap tables of the finished tiny run."""
    config, layout = tiny_run
    return config, layout, {task: pd.read_csv(layout.ablation(task, "gaps.csv")) for task in config.ablation_tasks()}


def names_in(folder):
    """Names of a folder's files, without the seals of tables, which each of them must have, and lists of items."""
    names = {path.name for path in Path(folder).iterdir()}
    seals = {f".{name}.seal" for name in names if name.endswith(".csv")}
    assert seals <= names
    return {name for name in names if not name.endswith(NEEDED)} - seals - {"logs"}


def test_outputs_are_exactly_those_promised(finished):
    config, layout, _ = finished
    figures = {f"{name}.{kind}" for name in config.ablation.figures() for kind in ("svg", "png")}
    for task in config.ablation_tasks():
        assert (
            names_in(layout.ablation(task, ""))
            == {"gaps.csv", "gaps-by-prompt.safetensors", "summary.csv"}
            | {f"constants-{method}.safetensors" for method in config.ablation.fitted()}
            | figures
        )
        assert {path.name for path in Path(layout.task_dir(task)).iterdir()} - {"logs"} == {
            "prompts.h5",
            "activations.h5",
        }
    assert Path(layout.model_json).is_file() and Path(layout.report).is_file()
    circuits = config.circuits
    found = names_in(layout.circuits("ioi", ""))
    folders = {f"{method}-{ablation}" for method in circuits.methods for ablation in circuits.ablations}
    assert found == {"pareto.csv", "fronts.csv", "stability.csv", "edge_frequency.csv", "figures"} | folders
    names = {f"{name}.{kind}" for name in circuits.figures() for kind in ("svg", "png")} | {
        f"circuit_{name}.svg" for name in circuits.ablations
    }
    assert {path.name for path in Path(layout.circuits("ioi", "figures")).iterdir()} == names
    for method in circuits.methods:
        for ablation in circuits.ablations:
            files = {circuit_file(knob, seed) for knob in circuits.knobs(method) for seed in circuits.seeds}
            files |= {"search.safetensors", "pareto.csv", "losses.safetensors"} | (
                {"constants.safetensors"} if ablation == "optimal" else set()
            )
            assert names_in(layout.circuits("ioi", f"{method}-{ablation}")) == files

    assert names_in(layout.tracing("facts", "")) - {"figures"} == {
        "aie.csv",
        "aie-by-prompt.safetensors",
        "pictures.csv",
        "facts.json",
        "constants.safetensors",
    }
    names = {f"{name}.{kind}" for name in config.tracing.figures() for kind in ("svg", "png")}
    assert {path.name for path in Path(layout.tracing("facts", "figures")).iterdir()} == names


def test_effects_are_complete(finished):
    config, layout, _ = finished
    settings, folder = config.interactions, Path(layout.interactions("ioi", ""))
    tables = {"effects.csv", "paths.csv", "interactions.csv"}
    assert names_in(folder) == tables | {"ranking.csv", "figures", *settings.ablations}
    parts = tables | {"by-prompt.safetensors"}
    assert all(names_in(folder / ablation) == parts for ablation in settings.ablations)
    figures = {f"{name}.{kind}" for name in settings.figures() for kind in ("svg", "png")}
    assert {path.name for path in (folder / "figures").iterdir()} == figures
    ranking = pd.read_csv(folder / "ranking.csv")
    assert len(ranking) == 20 and ranking["validation_nats"].is_monotonic_decreasing
    most = set(ranking["component"][: settings.n_components])
    effects, paths, pairs = (pd.read_csv(folder / f"{name}.csv") for name in ("effects", "paths", "interactions"))
    fit = ["converged", "steps", "left_nats"]
    of_effects = [f"{name}{se}_nats" for name in ("total", "direct", "indirect", "self_repair") for se in ("", "_se")]
    assert list(effects.columns) == ["component", "method", *of_effects, "n_prompts", *fit]
    assert list(paths.columns) == ["component", "mediator", "method", "nats", "se_nats", "n_prompts", *fit]
    assert list(pairs.columns) == ["first", "second", "method", "interaction_nats", "se_nats", "n_prompts", *fit]
    for table, each in ((effects, 3), (pairs, 3)):
        assert (table["method"].value_counts() == each).all() and set(table["method"]) == set(settings.ablations)
        assert (table["n_prompts"] == 48).all()
        assert (table[fit].notna().all(axis=1) == (table["method"] == "optimal")).all()
    assert set(effects["component"]) == most == set(pairs["first"]) | set(pairs["second"])
    # The direct effect is the path to the logits.
    direct = paths[paths["mediator"] == "logits"].set_index(["component", "method"])["nats"]
    assert (effects.set_index(["component", "method"])["direct_nats"] == direct).all()
    repair = effects["direct_nats"] - effects["total_nats"] - effects["self_repair_nats"]
    assert repair.abs().max() < 1e-12


def test_removal_is_complete(finished):
    config, layout, _ = finished
    settings, folder = config.removal, Path(layout.removal(""))
    of_each = {f"{method}-{ablation}" for method in settings.methods for ablation in settings.ablations}
    assert names_in(folder) == {"front.csv", "figures", *of_each}
    assert all(names_in(folder / name) == {"front.csv", "ablations.safetensors"} for name in of_each)
    figures = {f"{name}.{kind}" for name in settings.figures() for kind in ("svg", "png")}
    assert {path.name for path in (folder / "figures").iterdir()} == figures
    front = pd.read_csv(folder / "front.csv")
    roles = ["forget_accuracy", "forget_se", "paraphrase_accuracy", "paraphrase_se"]
    roles += ["retain_kl_nats", "retain_se", "held_out_kl_nats", "held_out_se"]
    columns = ["method", "ablation", "knob", "seed", "ablations", "accuracy_before", *roles]
    columns += ["relearn_steps", "relearned", "relearn_accuracy", "converged", "steps", "left_nats"]
    assert list(front.columns) == [*columns, "validation_loss_nats"]
    assert list(front["method"]) == ["ugs", "gap"] and (front["accuracy_before"] > 0.9).all()
    assert front[roles].notna().all(axis=None) and front["relearn_steps"].notna().all()


def test_an_exported_removal_answers_as_the_table_says(finished, tmp_path):
    """The plain model of the directory, on the forgotten test prompts."""
    from transformers import AutoModelForCausalLM

    from oacore.removal.export import export
    from oacore.removal.loss import correct

    config, layout, _ = finished
    folder = tmp_path / "without"
    assert export(config, folder, "gap", "optimal", 1) < 1e-5
    front = pd.read_csv(layout.removal("front.csv")).set_index("method").loc["gap"]
    prompts, task = read_prompts(layout.prompts("facts"), "test"), config.removal.forget
    rows = [row for row, text in enumerate(prompts.text) if re.search(task["facts"], text)]
    every = [read_prompts(layout.prompts("facts"), split) for split in ("train", "validation", "test")]
    known = {
        int(of.answers[row, 0]) for of in every for row, text in enumerate(of.text) if re.search(task["facts"], text)
    }
    answers = torch.from_numpy(prompts.answers[rows]).long()
    wrong = torch.tensor([sorted(known - {int(answer)}) for (answer,) in answers])
    batch = batch_of(prompts).take(torch.tensor(rows))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(input_ids=batch.tokens).logits[torch.arange(len(rows)), batch.lengths - 1]
    assert float(correct(logits, answers, wrong).double().mean()) == pytest.approx(front["forget_accuracy"], abs=1e-9)
    for arguments, said in (
        (("ugs", "optimal", 1), "--method: 'ugs'; allowed: methods of the run that ablate components: gap"),
        (("gap", "optimal", 7), "--knob, --seed: 7-s0; allowed: 1-s0"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            export(config, tmp_path / "other", *arguments)
    with pytest.raises(UserError, match=r"--output: .*without exists; allowed: a folder that does not"):
        export(config, folder, "gap", "optimal", 1)
    assert {path.name for path in tmp_path.iterdir()} == {"without"}


def test_importances_are_complete(finished):
    config, layout, _ = finished
    settings, folder = config.vision, Path(layout.vision(""))
    tables = {f"{name}.csv" for name in VISION_TABLES}
    assert names_in(folder) == tables | {"figures", *settings.units}
    assert all(names_in(folder / units) == tables | {"by-image.safetensors"} for units in settings.units)
    figures = {f"{name}.{kind}" for name in settings.figures() for kind in ("svg", "png")}
    assert {path.name for path in (folder / "figures").iterdir()} == figures
    assert {"model.json", "weights.safetensors"} <= names_in(layout.vision_dir)
    importance, agreement, curves, sanity = (pd.read_csv(folder / f"{name}.csv") for name in VISION_TABLES)
    measures = [*settings.measures()]
    counts = importance.value_counts(["units", "method"])
    assert (counts["channels"] == 8).all() and (counts["blocks"] == 2).all()
    assert set(importance["method"]) == set(measures) and len(measures) == 6
    assert (importance["n_images"] == 40).all() and (importance["se_nats"] >= 0).all()
    fitted = importance["method"].isin(["optimal", "shapley_optimal"])
    assert (importance[["converged", "steps", "left_nats"]].notna().all(axis=1) == fitted).all()
    assert set(agreement["units"]) == set(curves["units"]) == set(sanity["units"]) == {"channels"}, (
        "two blocks have no order"
    )
    whole = agreement[agreement["budget"].isna()]
    assert set(whole["reference"]) == {"shapley_optimal", "shapley_zero"} and len(whole) == 2 * (len(measures) - 1)
    assert (agreement["forward_passes"] <= agreement["budget"].fillna(np.inf)).all()
    assert agreement["spearman"].dropna().between(-1, 1).all() and agreement["spearman"].notna().any()
    assert (curves.value_counts(["method", "replacement", "direction"]) == 9).all()
    assert curves.loc[curves["n_replaced"] == 0, "nats"].abs().max() == 0
    # With everything replaced the order does not matter, and Shapley values share that out.
    of_all = curves[curves["n_replaced"] == 8].groupby("replacement")["nats"]
    assert ((of_all.max() - of_all.min()) < 1e-5 * of_all.max()).all()
    sums = importance[importance["units"] == "channels"].groupby("method")["importance_nats"].sum()
    for replacement in settings.replacements:
        assert sums[f"shapley_{replacement}"] == pytest.approx(of_all.max()[replacement], rel=1e-4)
    assert sums["integrated_gradients_zero"] == pytest.approx(sums["shapley_zero"], rel=0.2)  # by four points
    assert set(sanity["randomised"]) == {"head", "all"} and set(sanity["method"]) == {
        "zero", "optimal", "integrated_gradients_zero", "conductance",
    }  # fmt: skip


@pytest.mark.parametrize("effect", ["total", "direct", "pair"])
def test_an_effect_by_the_brute_force(finished, effect):
    """A number of the mean again: every destination gathered edge by edge, the means from the cache of activations."""
    from test_masked_forward import brute_force

    from oacore.metrics import kl_divergence

    _, layout, _ = finished
    model = load(SHIPPED_DEMO, device="cpu").model
    batch = batch_of(read_prompts(layout.prompts("ioi"), "test"))
    statistics = read_statistics(layout.activations("ioi"))
    means = [statistics.mean["input"][None]]
    for layer, block in enumerate(model.blocks):
        written = torch.einsum("hk,hkd->hd", statistics.mean["head"][layer], block.W_O)
        means += [written, statistics.mean["mlp"][layer][None]]
    replacements = torch.cat(means)[:, None].expand(-1, batch.tokens.shape[1], -1)
    tables = (pd.read_csv(layout.interactions("ioi", f"{name}.csv")) for name in ("effects", "interactions"))
    effects, pairs = (table[table["method"] == "mean"] for table in tables)
    pair = pairs.iloc[0]
    effects = effects.set_index("component").loc[[pair["first"], pair["second"]]]
    components = list(effects.index) if effect == "pair" else [pair["first"]]
    mask = torch.from_numpy(model.graph.valid.copy()).float()
    sources = [model.graph.source_index(name) for name in components]
    mask[-1 if effect == "direct" else slice(None), sources] = 0
    target = read_clean_log_probs(layout.activations("ioi"), model, "test", slice(0, len(batch)))
    losses = [
        kl_divergence(target[n], brute_force(model, batch.tokens[n], int(batch.lengths[n]), mask, replacements))
        for n in range(len(batch))
    ]
    found = (
        pair["interaction_nats"] + effects["total_nats"].sum()
        if effect == "pair"
        else effects[f"{effect}_nats"].iloc[0]
    )
    assert found == pytest.approx(float(torch.stack(losses).mean()), rel=1e-3, abs=1e-5)


def test_aie_table_is_complete(finished):
    config, layout, _ = finished
    table, tracing = pd.read_csv(layout.tracing("facts", "aie.csv")), config.tracing
    columns = (
        "corruption,site,position,window,layer,aie,se,p_clean,p_corrupted,p_restored,n,aie_normalised,se_normalised"
    )
    assert ",".join(table.columns) == f"{columns},converged,steps,left"
    fitted = table["corruption"].isin(["oat", "oat_cautious", "oat_shared"])
    assert (table[[*FIT, "left"]].notna().all(axis=1) == fitted).all() and fitted.any()
    assert not table[columns.split(",")].isna().any().any()
    keys = ["corruption", "site", "position", "window", "layer"]
    n_places = len(tracing.sites) * len(tracing.positions) * len(tracing.windows) * 4
    assert len(table) == len(tracing.corruption_names()) * n_places and not table.duplicated(keys).any()
    assert (table["aie"] - (table["p_restored"] - table["p_corrupted"])).abs().max() < 1e-6
    assert (table["n"] == 32).all() and (table["p_clean"] > 0.5).all()
    # What the last block writes at the last token is all that the prediction depends on, whatever the corruption.
    last = table[(table["site"] == "block") & (table["position"] == "last") & (table["layer"] == 3)]
    assert len(last) and (last["p_restored"] - last["p_clean"]).abs().max() < 1e-5
    assert (last["aie_normalised"] - 1).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("corruption", "site", "position"), [("mean", "mlp", "last_subject"), ("oat", "attention", "last")]
)
def test_an_effect_with_plain_hugging_face(finished, corruption, site, position):
    """A number in aie.csv again, by forward hooks on Hugging Face's own model; OAT's constants from their file."""
    from transformers import AutoModelForCausalLM

    _, layout, _ = finished
    hf = AutoModelForCausalLM.from_pretrained(SHIPPED_DEMO).eval()
    train, test = (read_prompts(layout.prompts("facts"), split) for split in ("train", "test"))
    position_of = {"last": test.lengths - 1, "last_subject": test.subject[:, 1] - 1}[position]
    tokens, rows, answers = (
        torch.from_numpy(test.tokens).long(),
        torch.arange(len(test.text)),
        torch.from_numpy(test.answers[:, 0]).long(),
    )
    inside = (torch.arange(tokens.shape[1]) >= torch.from_numpy(test.subject[:, :1])) & (
        torch.arange(tokens.shape[1]) < torch.from_numpy(test.subject[:, 1:])
    )
    fitted = load_file(layout.tracing("facts", "constants.safetensors"))
    spans = [ids[a:b] for ids, (a, b) in zip(train.tokens, train.subject, strict=True)]
    mean = hf.transformer.wte.weight[torch.cat([torch.from_numpy(span).long() for span in spans])].mean(0)
    layer = 1
    module = hf.transformer.h[layer].mlp if site == "mlp" else hf.transformer.h[layer].attn
    kept = {}

    def run(constant=None, *, restore=False):
        def corrupt(_, __, output):
            return output if constant is None else torch.where(inside[..., None], constant, output)

        def at_site(_, __, output):
            value = output if site == "mlp" else output[0]
            if constant is None:
                kept["clean"] = value.clone()
            elif restore:
                value = value.clone()
                value[rows, position_of] = kept["clean"][rows, position_of]
            return value if site == "mlp" else (value, *output[1:])

        hooks = [hf.transformer.wte.register_forward_hook(corrupt), module.register_forward_hook(at_site)]
        with torch.no_grad():
            logits = hf(tokens).logits
        for hook in hooks:
            hook.remove()
        return logits[rows, torch.from_numpy(test.lengths).long() - 1].softmax(-1)[rows, answers]

    own = fitted[f"{site}.{position}.{layer}-{layer}"] if corruption == "oat" else mean
    clean, corrupted = run(), run(fitted["corrupted"] if corruption == "oat" else mean)
    restored = run(own, restore=True)
    table = pd.read_csv(layout.tracing("facts", "aie.csv"))
    keys = {"corruption": corruption, "site": site, "position": position, "window": 1, "layer": layer}
    row = table[(table[list(keys)] == pd.Series(keys)).all(axis=1)].iloc[0]
    for name, value in (("p_clean", clean), ("p_corrupted", corrupted), ("p_restored", restored)):
        assert row[name] == pytest.approx(float(value.mean()), abs=1e-5), name


def test_pictures_agree_with_themselves(finished):
    _, layout, _ = finished
    table = pd.read_csv(layout.tracing("facts", "pictures.csv"), keep_default_na=False)
    assert set(table["fact"]) == {0, 1} and set(table["corruption"]) == {"oat_shared", "gaussian-3"}
    for _, picture in table.groupby("fact"):
        assert picture["in_subject"].any() and picture["prompt"].nunique() == picture["answer"].nunique() == 1
        words = picture[picture["in_subject"]].drop_duplicates("position")["token"]
        assert " ".join(words) in picture["prompt"].iloc[0]
        before = picture[(picture["position"] < picture[picture["in_subject"]]["position"].min())]
        assert (before["p_restored"] - before["p_corrupted"]).abs().max() < 1e-5, (
            "causal attention: nothing before the subject changes"
        )
        last = picture[
            (picture["site"] == "block") & (picture["position"] == picture["position"].max()) & (picture["layer"] >= 2)
        ]
        assert (last["p_restored"] - last["p_clean"]).abs().max() < 1e-5


def test_lens_outputs_are_those_promised(finished):
    config, layout, _ = finished
    lenses, folder = config.lenses, Path(layout.lens("text", ""))
    found = names_in(folder) - {"figures"}
    tables = {f"{name}.csv" for name in (*lenses.tables(), "pictures")}
    assert found == tables | {f"{name}.safetensors" for name in (*lenses.fitted_files(), "loss-by-prompt")}
    names = {f"{name}.{kind}" for name in lenses.figures() for kind in ("svg", "png")} | {"prompt_0.svg"}
    assert {path.name for path in (folder / "figures").iterdir()} == names
    loss = pd.read_csv(folder / "loss.csv")
    columns = ["lens", "init", "layer", "kl_nats", "se_nats", "top1_agreement", "n"]
    assert list(loss.columns) == [*columns, *FIT, "left_nats"]
    assert (loss[[*FIT, "left_nats"]].notna().all(axis=1) == ~loss["lens"].isin(["logit", "mean", "resample"])).all()
    assert len(loss) == len(lenses.files()) * 4 and (loss["n"] == 60).all() and (loss["kl_nats"] > 0).all()
    wide = loss[loss["init"].isna()].pivot(index="layer", columns="lens", values="kl_nats")
    assert (
        (wide["oca"] < wide["mean"] * 1.05).all()
        and (wide["oca"] < wide["resample"]).all()
        and (wide["oca"] < wide["logit"]).all()
    )
    lengths = pd.read_csv(folder / "lengths.csv")
    assert set(lengths["n_tokens"]) == {6, 11} and len(lengths) == 2 * len(loss)
    # Windows of the fitted length are the task's own: the same numbers, by a pass of the model instead of the cache.
    again = lengths[lengths["n_tokens"] == 11].reset_index(drop=True)
    assert (again["kl_nats"] / loss["kl_nats"] - 1).abs().max() < 1e-3
    faithfulness = pd.read_csv(folder / "faithfulness.csv")
    assert len(faithfulness) == 2 * 2 * 6 and faithfulness["similarity"].between(-1, 1).all()
    truthfulness = pd.read_csv(folder / "truthfulness.csv")
    assert len(truthfulness) == 2 * 2 * 5 and truthfulness["accuracy"].between(0, 1).all()
    last = truthfulness[truthfulness["layer"] == 4].pivot(index="demonstrations", columns="lens", values="accuracy")
    assert (last["oca"] == last["logit"]).all(), "after all blocks every lens is the model"


def test_a_lens_loss_with_plain_hugging_face(finished):
    """A number in loss.csv again: Hugging Face's model with attention's outputs replaced by the constants from their
    file.
    """
    from transformers import AutoModelForCausalLM

    _, layout, _ = finished
    hf = AutoModelForCausalLM.from_pretrained(SHIPPED_DEMO).eval()
    prompts = read_prompts(layout.prompts("text"), "test")
    tokens = torch.from_numpy(prompts.tokens).long()
    rows = (torch.arange(len(tokens)), torch.from_numpy(prompts.lengths).long() - 1)
    constants = load_file(layout.lens("text", "oca.safetensors"))["constants"]
    loss = pd.read_csv(layout.lens("text", "loss.csv"))
    with torch.no_grad():
        clean = hf(tokens).logits[rows].log_softmax(-1)
        for start in (0, 2):
            hooks = [
                hf.transformer.h[layer].attn.register_forward_hook(
                    lambda _, __, output, value=constants[start, layer]: (value.expand_as(output[0]), *output[1:])
                )
                for layer in range(start, 4)
            ]
            lens = hf(tokens).logits[rows].log_softmax(-1)
            for hook in hooks:
                hook.remove()
            kl = (clean.exp() * (clean - lens)).sum(-1)
            row = loss[(loss["lens"] == "oca") & (loss["layer"] == start)].iloc[0]
            assert row["kl_nats"] == pytest.approx(float(kl.mean()), rel=1e-3)
            assert row["top1_agreement"] == pytest.approx(float((lens.argmax(-1) == clean.argmax(-1)).float().mean()))


def test_pareto_table_is_complete(finished):
    config, layout, _ = finished
    pareto = pd.read_csv(layout.circuits("ioi", "pareto.csv"))
    columns = "method,ablation,objective,knob,seed,edges,nodes,kl_nats,se_nats,validation_kl_nats,logit_diff"
    columns += ",fit_seconds,peak_mb"
    assert ",".join(pareto.columns) == f"{columns},converged,steps,left_nats"
    assert not pareto[columns.split(",")].isna().any().any()
    assert (pareto[[*FIT, "left_nats"]].notna().all(axis=1) == (pareto["ablation"] == "optimal")).all()
    n_knobs = sum(len(config.circuits.knobs(method)) for method in config.circuits.methods)
    assert len(pareto) == n_knobs * len(config.circuits.seeds) * len(config.circuits.ablations)
    assert (pareto["objective"] == pareto["method"].map(lambda name: "logit_diff" if name == "eap" else "kl")).all()
    stability = pd.read_csv(layout.circuits("ioi", "stability.csv"))
    assert (
        len(stability) == n_knobs * len(config.circuits.ablations)
        and (stability["n_circuits"] == len(config.circuits.seeds)).all()
    )


def test_losses_of_prompts_belong_to_the_table_and_fronts_to_them(finished):
    config, layout, _ = finished
    pareto, prompts = pd.read_csv(layout.circuits("ioi", "pareto.csv")), read_prompts(layout.prompts("ioi"), "test")
    for (method, ablation), rows in pareto.groupby(["method", "ablation"]):
        kl = load_file(layout.circuits("ioi", f"{method}-{ablation}/losses.safetensors"))["kl"]
        assert kl.shape == (len(rows), len(prompts.lengths))
        np.testing.assert_allclose(kl.double().mean(1), rows["kl_nats"], rtol=1e-6)
    fronts = pd.read_csv(layout.circuits("ioi", "fronts.csv"))
    n_methods = len(config.circuits.methods)
    assert len(fronts) == len(config.circuits.ablations) * n_methods * (n_methods - 1)
    compared = fronts[fronts["verdict"] != "apart"]
    # Of some seeds alone the fronts may have a size in common.
    assert len(compared) and compared["n_seeds"].between(1, len(config.circuits.seeds)).all()
    assert ((compared["low"] <= compared["high"]) & (compared["edges_low"] <= compared["edges_high"])).all()


@pytest.mark.parametrize("ablation", ["optimal", "counterfactual"])
def test_a_circuit_file_measured_by_the_brute_force(finished, ablation):
    """The KL in pareto.csv again: the circuit from its MIB file, its constants from theirs, every destination gathered
    edge by edge.
    """
    from test_masked_forward import brute_force

    from oacore.circuits.mib_file import load_circuit
    from oacore.engine.masked import Engine
    from oacore.metrics import kl_divergence

    _, layout, _ = finished
    model = load(SHIPPED_DEMO, device="cpu").model
    prompts = read_prompts(layout.prompts("ioi"), "test")
    batch, other = batch_of(prompts), batch_of(prompts, counterfactual=True)
    folder = Path(layout.circuits("ioi", f"ugs-{ablation}"))
    row = pd.read_csv(folder / "pareto.csv").iloc[1]
    circuit = load_circuit(folder / circuit_file(row["knob"], int(row["seed"])), model.graph)
    assert circuit.n_edges == row["edges"]
    T = batch.tokens.shape[1]
    if ablation == "optimal":
        found = {name: value[1] for name, value in load_file(folder / "constants.safetensors").items()}
        parts = [found["input"]]
        for layer, block in enumerate(model.blocks):
            parts += [*(found["head"][layer] @ block.W_O), found["mlp"][layer]]
        replacements = torch.stack(parts).expand(-1, T, -1)[None].expand(len(batch), -1, -1, -1)
    else:
        values = Engine(model).sources(other)
        replacements = torch.cat((torch.zeros_like(values[:, :, :1]), values), 2)
    mask = torch.from_numpy(circuit.mask).float()
    target = read_clean_log_probs(layout.activations("ioi"), model, "test", slice(0, len(batch)))
    losses = [
        kl_divergence(target[n], brute_force(model, batch.tokens[n], int(batch.lengths[n]), mask, replacements[n]))
        for n in range(len(batch))
    ]
    assert row["kl_nats"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-3, abs=1e-5)


def test_mib_tools_on_a_finished_run(finished, tmp_path, capsys):
    from oacore.__main__ import main

    config, layout, _ = finished
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    circuit = layout.circuits("ioi", "exact-counterfactual/40-s0.json")
    assert main(["mib-score", "--config", str(path), "--circuit", circuit]) == 0
    out = capsys.readouterr().out
    assert 0 < float(re.search(r"^CPR (\S+)", out, re.M).group(1)) < 1.5
    exported = tmp_path / "mib"
    assert main(["mib-export", "--config", str(path), "--circuit", circuit, "--output", str(exported)]) == 2
    assert "optimal ablation" in capsys.readouterr().err and not exported.exists()
    circuit = layout.circuits("ioi", "ugs-optimal/0.001-s0.json")
    assert main(["mib-export", "--config", str(path), "--circuit", circuit, "--output", str(exported)]) == 0
    assert {file.name for file in exported.iterdir()} == {"importances.json", "constants.safetensors"}


def test_a_run_verifies_against_what_it_recorded(finished, tmp_path, capsys):
    """The tables of a real run have what its headline numbers are taken from."""
    from oacore.__main__ import main

    config, _, tables = finished
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    folder = str(config.results_dir / config.run)
    assert main(["verify", str(path), "--record", folder]) == 0 and main(["verify", str(path)]) == 0
    assert re.search(r": (\d+) numbers, \1 same, 0 in range, 0 differs, 0 missing$", capsys.readouterr().out.strip())
    expected = pd.read_csv(tmp_path / "config.expected.csv")
    assert {f"{task}/ablation/gaps.csv" for task in tables} < set(expected["table"])
    assert {"ioi/circuits/pareto.csv", "facts/tracing/aie.csv", "text/lens/loss.csv"} < set(expected["table"])
    optimal = tables["ioi"][tables["ioi"]["method"] == "optimal"]["gap_nats"].median()
    of_ioi = expected[
        (expected["table"] == "ioi/ablation/gaps.csv") & (expected["selection"] == "method=optimal, median")
    ]
    assert of_ioi["expected"].tolist() == pytest.approx([optimal], rel=1e-5)


def test_a_circuit_of_another_model_is_refused(finished, tmp_path, shared_data, capsys):
    from oacore.__main__ import main

    config, _, _ = finished
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert (
        main(
            ["mib-score", "--config", str(path), "--task", "ioi", "--circuit", str(shared_data / "mib/ioi-eap-ig.json")]
        )
        == 2
    )
    assert "that of the model" in capsys.readouterr().err


def test_demo_model_meets_its_requirements(finished):
    _, layout, _ = finished
    measured = json.loads((SHIPPED_DEMO / "training.json").read_text())["held_out"]
    assert measured["ioi_accuracy"] >= 0.98
    assert measured["year_mass"] >= 0.9
    assert measured["fact_accuracy"] >= 0.9
    facts = json.loads(Path(layout.model_json).read_text())
    assert facts["parity"]["max_abs_log_prob"] < 1e-4
    assert facts["sizes"]["n_layers"] == facts["sizes"]["n_heads"] == 4 and facts["sizes"]["d_model"] == 128


def test_gap_table_is_complete(finished):
    config, _, tables = finished
    for task, gaps in tables.items():
        columns = ["component", "kind", "layer", "head", "method", "gap_nats", "se_nats", "n_prompts"]
        assert list(gaps.columns) == [*columns, *FIT, "left_nats"]
        fitted = gaps["method"].isin(["optimal", "optimal_positional"])
        assert (gaps[[*FIT, "left_nats"]].notna().all(axis=1) == fitted).all() and fitted.any()
        assert len(gaps) == 20 * len(config.ablation.methods)
        assert not gaps[columns].drop(columns="head").isna().any().any(), task
        assert (gaps["gap_nats"] >= 0).all()


@pytest.mark.parametrize("other", ["mean", "zero", "resample"])
def test_optimal_gap_is_least_for_every_component(finished, other):
    for task, gaps in finished[2].items():
        wide = gaps.pivot(index="component", columns="method", values=["gap_nats", "se_nats"])
        slack = 2 * (wide["se_nats"]["optimal"] ** 2 + wide["se_nats"][other] ** 2) ** 0.5
        worse = wide["gap_nats"]["optimal"] - wide["gap_nats"][other] - slack
        assert (worse <= 1e-6).all(), f"{task}: {worse[worse > 1e-6]}"
        if task == "ioi":  # 32 facts, some about one subject, are too few to tell the medians of small gaps apart
            assert wide["gap_nats"]["optimal"].median() < wide["gap_nats"][other].median()


def test_positional_gap_is_no_larger(finished):
    for gaps in finished[2].values():
        wide = gaps.pivot(index="component", columns="method", values=["gap_nats", "se_nats"])
        slack = 2 * (wide["se_nats"]["optimal"] ** 2 + wide["se_nats"]["optimal_positional"] ** 2) ** 0.5
        assert (wide["gap_nats"]["optimal_positional"] <= wide["gap_nats"]["optimal"] + slack + 1e-6).all()


def test_summary_follows_from_the_gaps(finished):
    _, layout, tables = finished
    for task, gaps in tables.items():
        summary = pd.read_csv(layout.ablation(task, "summary.csv")).set_index("method")
        wide = gaps.pivot(index="component", columns="method", values="gap_nats")
        for method in wide:
            assert summary.loc[method, "median_ratio_optimal_to_method"] == pytest.approx(
                (wide["optimal"] / wide[method])[wide[method] > 0].median(), rel=1e-6
            )
            rank = wide[method].rank().corr(wide["counterfactual"].rank())
            assert summary.loc[method, "spearman_with_counterfactual"] == pytest.approx(rank, rel=1e-6)


def test_gap_of_a_fitted_constant_with_plain_hugging_face(finished):
    """The number in gaps.csv again, by a forward hook on Hugging Face's own model and the constant from its file."""
    from transformers import AutoModelForCausalLM

    _, layout, tables = finished
    gaps = tables["ioi"]
    hf = AutoModelForCausalLM.from_pretrained(SHIPPED_DEMO).eval()
    prompts = read_prompts(layout.prompts("ioi"), "test")
    batch = batch_of(prompts)
    last = (torch.arange(len(batch)), batch.lengths - 1)
    constants = load_file(layout.constants("ioi", "optimal"))
    with torch.no_grad():
        clean = hf(batch.tokens).logits[last].double().log_softmax(-1)
        for name in ("a1.h2", "a3.h1", "m0", "m2"):
            layer = hf.transformer.h[int(name[1])]

            def replace(module, inputs, output=None, name=name):
                value = (inputs[0] if output is None else output).clone()
                columns = slice(32 * int(name[-1]), 32 * int(name[-1]) + 32) if output is None else slice(None)
                value[:, 1:, columns] = constants[name][0]
                return value if output is not None else (value,)

            place = (
                layer.mlp.register_forward_hook(replace)
                if name[0] == "m"
                else layer.attn.c_proj.register_forward_pre_hook(replace)
            )
            ablated = hf(batch.tokens).logits[last].double().log_softmax(-1)
            place.remove()
            losses = (clean.exp() * (clean - ablated)).sum(-1)
            row = gaps[(gaps["component"] == name) & (gaps["method"] == "optimal")].iloc[0]
            assert losses.mean().item() == pytest.approx(row["gap_nats"], rel=1e-3, abs=1e-6)
            assert (losses.std() / len(losses) ** 0.5).item() == pytest.approx(row["se_nats"], rel=1e-3, abs=1e-6)


def test_cached_targets_are_the_models(finished):
    from transformers import AutoModelForCausalLM

    _, layout, _ = finished
    model = load(SHIPPED_DEMO, device="cpu").model
    hf = AutoModelForCausalLM.from_pretrained(SHIPPED_DEMO).eval()
    for split in ("validation", "test"):
        batch = batch_of(read_prompts(layout.prompts("facts"), split))
        with torch.no_grad():
            expected = hf(batch.tokens).logits[torch.arange(len(batch)), batch.lengths - 1].log_softmax(-1)
        found = read_clean_log_probs(layout.activations("facts"), model, split, slice(0, len(batch)))
        assert (found - expected).abs().max() < 1e-4
        answers = torch.from_numpy(read_prompts(layout.prompts("facts"), split).answers[:, 0]).long()
        assert (found.argmax(-1) == answers).all(), "facts are those that the model completes correctly"


def test_cached_residuals_are_what_enters_each_block(finished):
    _, layout, _ = finished
    model = load(SHIPPED_DEMO, device="cpu").model
    batch = batch_of(read_prompts(layout.prompts("ioi"), "test"))
    rows = (torch.arange(len(batch)), batch.lengths - 1)
    with Reader(layout.activations("ioi")) as reader:
        stored = torch.from_numpy(reader["test/residual"][:])  # [N, L, d]
    for layer in range(model.n_layers):
        expected = residual_after(model, batch.tokens, layer)[rows]
        assert (stored[:, layer] - expected).abs().max() < 1e-4


def test_cache_of_another_model_is_refused(finished):
    _, layout, _ = finished
    with pytest.raises(UserError, match="model_hash"):
        read_statistics(layout.activations("ioi"), Provenance({"model_hash": "another"}))


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.fetched = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.fetched += [v for k, v in attributes if k in ("src", "href") and v and not v.startswith(("#", "data:"))]


def test_report_is_one_offline_page_with_everything(finished):
    config, layout, _ = finished
    text = Path(layout.report).read_text()
    page = _Page()
    page.feed(text)
    assert not page.fetched and "script" not in page.tags
    of_circuits = len(config.circuits.figures()) + len(
        config.circuits.ablations
    )  # fronts, and a drawing for each ablation type
    of_tracing = len(config.tracing.figures())
    of_lenses = len(config.lenses.figures()) + config.lenses.pictures
    of_ablation = len(config.ablation_tasks()) * len(config.ablation.figures())
    of_others = sum(len(section.figures()) for section in (config.interactions, config.removal, config.vision))
    assert page.tags.count("figure") == of_ablation + of_circuits + of_others + of_tracing + of_lenses
    for word in (
        "ioi",
        "facts",
        json.loads(Path(layout.model_json).read_text())["model_hash"][:16],
        "optimal_positional",
        "seed",
    ):
        assert word in text.replace("<wbr>", "")


def test_nothing_to_be_done_and_what_a_change_re_runs(finished, tmp_path):
    """On the command line; every other key is in test_staleness.py, without a process for each."""
    _, layout, _ = finished
    where = roots(layout.config.cache_dir, layout.config.results_dir)
    assert "Nothing to be done" in snakemake("--configfile", TINY, *where).stderr
    tiny = yaml.safe_load(TINY.read_text())
    path = tmp_path / "changed.yaml"
    tiny["circuits"]["thresholds"], tiny["limits"] = [0.06], {"threads": 2}
    path.write_text(yaml.safe_dump(tiny))
    output = snakemake("-n", "--configfile", path, *where).stdout
    jobs = {
        name: int(count) for name, count in re.findall(r"^(\w+)\s+(\d+)$", output, re.M)
    }  # the table is there twice
    assert jobs == {"circuits_acdc": 2, "circuit_figures": 1, "report": 1, "all": 1, "total": 5}


def test_the_command_line_computes_the_same_bits(finished, tmp_path):
    """`python -m oacore` and Snakemake call the same stages; the same seed gives bit-identical files."""
    config, layout, _ = finished
    values = config.model_dump(mode="json") | {"results_dir": str(tmp_path / "results")}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "oacore", "all", "--config", path],
        cwd=ROOT,
        check=True,
        capture_output=True,
        env=environment,
    )
    again = Layout(load_config(path))
    for task in config.ablation_tasks():
        for name in (
            "constants-optimal.safetensors",
            "constants-optimal_positional.safetensors",
            "gaps.csv",
            "summary.csv",
            "gap_distributions.svg",
        ):
            assert Path(again.ablation(task, name)).read_bytes() == Path(layout.ablation(task, name)).read_bytes(), (
                f"{task} {name}"
            )
    for folder in (
        layout.tracing("facts", ""),
        layout.lens("text", ""),
        layout.interactions("ioi", ""),
        layout.interactions("ioi", "optimal"),
        layout.vision(""),
        layout.vision("channels"),
        layout.removal(""),
        layout.removal("ugs-optimal"),
    ):
        for path in Path(folder).iterdir():
            if path.is_file():
                same = Path(str(path).replace(layout.results_dir, again.results_dir))
                assert same.read_bytes() == path.read_bytes(), path
    for method in config.circuits.methods:
        for ablation in config.circuits.ablations:
            for path in Path(layout.circuits("ioi", f"{method}-{ablation}")).iterdir():
                if path.name not in ("pareto.csv", ".pareto.csv.seal"):  # which hold how long it took
                    same = Path(again.circuits("ioi", f"{method}-{ablation}/{path.name}"))
                    assert same.read_bytes() == path.read_bytes(), path


@pytest.fixture
def fresh(finished, tmp_path):
    """A config like the tiny one with one task, in empty folders."""
    _, theirs, _ = finished
    values = yaml.safe_load(TINY.read_text())
    values |= {
        "tasks": {"ioi": values["tasks"]["ioi"]},
        "cache_dir": str(tmp_path / "cache"),
        "results_dir": str(tmp_path / "results"),
    }
    values["ablation"] |= {"methods": ["mean", "counterfactual", "optimal"], "tasks": ["ioi"]}
    values["circuits"] |= {"methods": ["ugs"], "ablations": ["optimal"], "seeds": [0]}
    values["interactions"]["ablations"] = ["mean"]
    del values["removal"], values["tracing"], values["lenses"], values["vision"]  # of other tasks
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    layout = Layout(load_config(path))
    return path, layout, theirs


def files_in(folder):
    return {path for path in folder.rglob("*") if path.is_file()}


def test_interrupted_while_writing_every_stage_leaves_nothing(fresh, tmp_path, monkeypatch):
    """Ctrl-C at the worst moment, between writing a file and its rename: no stage leaves a file, and all run again
    afterwards.
    """
    path, layout, theirs = fresh
    config = load_config(path)

    def interrupted(*_):
        raise KeyboardInterrupt

    for stage, what, output in jobs(config):
        before = files_in(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run_stage(stage, config, **what)
        assert files_in(tmp_path) == before, stage
        run_stage(stage, config, **what)
        assert Path(output).is_file()
    for name in ("constants-optimal.safetensors",):
        assert Path(layout.ablation("ioi", name)).read_bytes() == Path(theirs.ablation("ioi", name)).read_bytes()


def test_ctrl_c_in_a_fit_and_the_next_run_goes_on(fresh, tmp_path):
    """A real SIGINT to the whole workflow: the checkpoint is taken up, and the result is that of a run that nobody
    stopped.
    """
    path, layout, theirs = fresh
    # What comes before is there; of items, the fit's own would be among them.
    shutil.copytree(theirs.model_dir, layout.model_dir, ignore=shutil.ignore_patterns(FOLDER))
    command = [
        sys.executable,
        "-m",
        "snakemake",
        layout.constants("ioi", "optimal"),
        "--cores",
        "1",
        "--configfile",
        str(path),
    ]
    checkpoint = Path(layout.ablation("ioi", ".constants-optimal-checkpoint-fit.safetensors"))
    with open(tmp_path / "out.txt", "w") as out:
        job = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True)
        deadline = time.monotonic() + 120
        while not checkpoint.exists() and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(job.pid, signal.SIGINT)
        job.wait(timeout=60)
    assert checkpoint.exists(), (tmp_path / "out.txt").read_text()
    assert not Path(layout.constants("ioi", "optimal")).exists()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert not re.search(r"constants: 0/|ioi optimal: 0/", again.stdout + again.stderr), "it began again at step 0"
    assert (
        Path(layout.constants("ioi", "optimal")).read_bytes() == Path(theirs.constants("ioi", "optimal")).read_bytes()
    )
    assert not checkpoint.exists()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"tasks": {"iio": {}}}, ["tasks.iio: unknown key", "did you mean 'ioi'?"]),
        ({"model": "./no-such-model", "tasks": {"ioi": {}}}, ["model: './no-such-model' is not a directory"]),
        ({"seed": "one"}, ["seed: 'one'"]),
    ],
)
def test_bad_config_stops_before_any_job(tmp_path, change, parts):
    path = tmp_path / "bad.yaml"
    values = yaml.safe_load(TINY.read_text())
    for section in ("removal", "tracing", "lenses", "vision"):  # of tasks that are not in every change
        del values[section]
    values["ablation"]["tasks"] = None
    path.write_text(yaml.safe_dump(values | change))
    result = snakemake("--configfile", path, *roots(tmp_path / "cache", tmp_path / "results"))
    assert result.returncode != 0
    assert all(part in result.stderr for part in parts), result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "cache").exists()


def test_a_key_that_is_given_twice_stops_before_any_job(tmp_path):
    """Snakemake itself takes the second."""
    path = tmp_path / "bad.yaml"
    path.write_text(TINY.read_text() + "run: other\n")
    result = snakemake("--configfile", path, *roots(tmp_path / "cache", tmp_path / "results"))
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert "bad.yaml: not valid YAML: 'run' is first given" in result.stderr, result.stderr
    assert not (tmp_path / "cache").exists()


def test_bad_facts_stop_before_any_job(tmp_path):
    (tmp_path / "facts.csv").write_text("subject,prompt,answer\nParis,Paris is in,France\nRome,It is in,Italy\n")
    path = tmp_path / "bad.yaml"
    values = yaml.safe_load(TINY.read_text()) | {"tasks": {"facts": {"path": str(tmp_path / "facts.csv")}}}
    for section in (
        "circuits",
        "interactions",
        "removal",
        "lenses",
        "vision",
    ):  # of other tasks, or patterns of other facts
        del values[section]
    del values["ablation"]["tasks"]  # of other tasks
    path.write_text(yaml.safe_dump(values))
    result = snakemake("--configfile", path, *roots(tmp_path / "cache", tmp_path / "results"))
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert (
        "tasks.facts.path" in result.stderr
        and "line 3: the prompt 'It is in' does not contain the subject 'Rome'" in result.stderr
    )
    assert not (tmp_path / "cache").exists()


def test_bad_input_in_a_job_gives_one_error(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    path = tmp_path / "bad.yaml"
    text = yaml.safe_load(TINY.read_text()) | {"tasks": {"text": {"path": str(tmp_path / "empty.txt")}}}
    for section in ("circuits", "interactions", "removal", "tracing", "vision"):  # of other tasks
        del text[section]
    del text["ablation"]["tasks"]
    path.write_text(yaml.safe_dump(text))
    config = load_config(path).model_copy(update={"cache_dir": tmp_path / "cache"})
    assert isinstance(config, Config)
    Path(Layout(config).model_dir).mkdir(parents=True)
    result = subprocess.run(
        [sys.executable, "-m", "oacore", "prompts", "--config", path], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert re.fullmatch(r"error: .*model\.json: missing; run the stage `model` first\n", result.stderr)


def test_jobs_ask_for_memory_that_holds_the_weights(tmp_path):
    """8 billion weights in bf16 are 16 GB, 28 GB with what else a job needs."""
    (tmp_path / "config.json").write_text((ROOT / "docs/llama-3.1-8b.json").read_text())
    values = {"model": str(tmp_path), "dtype": "bf16", "tasks": {"ioi": {}}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    result = snakemake("-n", "--configfile", path)
    assert result.returncode == 0, result.stderr
    asked = {int(found) for found in re.findall(r"mem_mb=(\d+)", result.stdout + result.stderr)}
    assert len(asked) == 1 and 27000 < asked.pop() < 29000


def test_gpt2_config_dry_runs():
    result = snakemake("-n", "--configfile", "config/gpt2.yaml")
    assert result.returncode == 0, result.stderr
    assert "greater_than" in result.stdout and "constants-optimal_positional.safetensors" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["all", "--task", "ioi"], "unrecognized arguments: --task ioi"),
        (["report", "--task", "facts"], "unrecognized arguments: --task facts"),
        (["optimal", "--lens", "oca"], "unrecognized arguments: --lens oca"),
        (["estimate", "a.yaml", "b.yaml"], "unrecognized arguments: b.yaml"),
        (["mib-export", "--circuit", "c.json"], "the following arguments are required: --output"),
        (["nope"], "invalid choice: 'nope'"),
    ],
)
def test_an_option_holds_where_it_means_something(arguments, said, capsys):
    from oacore.__main__ import main

    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and said in capsys.readouterr().err


def test_command_line_lists_its_stages():
    result = subprocess.run(
        [sys.executable, "-m", "oacore", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    rules = re.findall(
        r"^ *rule (\w+):", "\n".join(file.read_text() for file in (ROOT / "workflow/rules").glob("*.smk")), re.M
    )
    assert {
        "demo",
        "model",
        "prompts",
        "activations",
        "optimal",
        "gaps",
        "figures",
        "circuit_figures",
        "tracing",
        "report",
    } < set(rules)
    assert set(rules) <= set(re.findall(r"^    (\w+)\s", result.stdout, re.M))


@pytest.mark.parametrize("stage", ["figures", "report"])
def test_stages_without_a_model_import_no_transformers(finished, stage, tmp_path):
    config, _, _ = finished
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    run = f"assert main(['{stage}', '--config', '{path}']) == 0"
    code = f"import sys; from oacore.__main__ import main; {run}; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
