"""The standard error of a difference between runs, on numbers whose error is known."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from oacore.compare.numbers import MEASURED, joined
from oacore.errors import UserError
from oacore.jobs import Files, files_of, planned
from oacore.metrics import clustered_means_and_ses
from oacore.store.artefacts import read_table, write_table
from oacore.store.provenance import Provenance
from oacore.store.samples import read_samples, write_samples

GAPS = MEASURED[0]
N, OF_A_CLUSTER = 240, 4
CLUSTERS = np.arange(N) // OF_A_CLUSTER
ROWS = ("a0.h0", "a0.h1", "m0")


def gaps_of(folder, values, rows=ROWS, prompts="these"):
    """Files of a job that measured [R, N]: the table of their means, and the values."""
    means, errors = clustered_means_and_ses(torch.from_numpy(values), CLUSTERS)
    table = pd.DataFrame({"component": rows, "method": "mean", "gap_nats": means, "se_nats": errors})
    files = Files({"gaps": str(folder / "gaps.csv"), "by_prompt": str(folder / "gaps-by-prompt.safetensors")})
    write_table(files["gaps"], table, Provenance())
    write_samples(
        files["by_prompt"], {"gap_nats": torch.from_numpy(values)}, CLUSTERS, {"prompts": prompts}, Provenance()
    )
    return files


@pytest.fixture
def measured(tmp_path):
    """Two runs whose losses rise and fall together by about 1 nat, 0.1 nats apart give or take 0.01."""
    random = np.random.default_rng(0)
    hard = np.repeat(random.normal(size=N // OF_A_CLUSTER), OF_A_CLUSTER)  # a subject, or a passage
    first = 2 + hard + random.normal(size=(len(ROWS), N))
    change = 0.1 + 0.01 * random.normal(size=(len(ROWS), N // OF_A_CLUSTER)).repeat(OF_A_CLUSTER, 1)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    return tmp_path, first, first + change


def by_hand(change):
    """Of clusters of one size: the spread of their means over the root of their number."""
    means = change.reshape(len(change), -1, OF_A_CLUSTER).mean(2)
    return means.std(1, ddof=1) / np.sqrt(means.shape[1])


def test_the_same_prompts_are_paired(measured):
    folder, first, second = measured
    numbers = joined(GAPS, {"task": "ioi"}, gaps_of(folder / "first", first), gaps_of(folder / "second", second))
    assert numbers["paired"].all() and (numbers["table"] == "ioi/ablation/gaps.csv").all()
    np.testing.assert_allclose(numbers["difference"], (second - first).mean(1))
    np.testing.assert_allclose(numbers["se"], by_hand(second - first))
    assert (numbers["se"] * 50 < np.hypot(numbers["first_se"], numbers["second_se"])).all()
    assert (numbers["in_se"] > 50).all()


def test_clusters_count_as_one(measured):
    """Four prompts of a subject that change alike are no four prompts: the error is twice that of independent ones."""
    folder, first, second = measured
    numbers = joined(GAPS, {"task": "ioi"}, gaps_of(folder / "first", first), gaps_of(folder / "second", second))
    independent = (second - first).std(1, ddof=1) / np.sqrt(N)
    np.testing.assert_allclose(numbers["se"] / independent, np.sqrt(OF_A_CLUSTER), rtol=0.01)


def test_rows_are_found_by_name(measured):
    """In another order, and beside others."""
    folder, first, second = measured
    turned = gaps_of(folder / "second", second[[2, 0]], (ROWS[2], ROWS[0]))
    numbers = joined(GAPS, {"task": "ioi"}, gaps_of(folder / "first", first), turned)
    assert numbers["row"].tolist() == ["a0.h0 mean", "m0 mean"]
    np.testing.assert_allclose(numbers["se"], by_hand((second - first)[[0, 2]]))


@pytest.mark.parametrize("why", ["other prompts", "no values", "a table without them"])
def test_errors_are_added_where_nothing_can_be_paired(measured, why):
    folder, first, second = measured
    files = [
        gaps_of(folder / "first", first),
        gaps_of(folder / "second", second, prompts="others" if why == "other prompts" else "these"),
    ]
    if why == "no values":
        files[1]["by_prompt"].unlink()
    kind = replace(GAPS, samples="") if why == "a table without them" else GAPS
    numbers = joined(kind, {"task": "ioi"}, *files)
    assert not numbers["paired"].any()
    np.testing.assert_allclose(numbers["se"], np.hypot(numbers["first_se"], numbers["second_se"]))
    assert (numbers["in_se"].abs() < 2).all(), "what pairing sees is lost in the spread of prompts"


def test_values_of_another_table_are_refused(measured):
    folder, first, second = measured
    files = gaps_of(folder / "first", first), gaps_of(folder / "second", second)
    gaps_of(folder / "second", second[:2], ROWS[:2])
    write_table(files[1]["gaps"], read_table(files[0]["gaps"]), Provenance())
    with pytest.raises(UserError, match=r"second/gaps-by-prompt\.safetensors: 2 rows, and its table has 3"):
        joined(GAPS, {"task": "ioi"}, *files)


@pytest.mark.parametrize("kind", [kind for kind in MEASURED if kind.samples], ids=lambda kind: kind.table)
def test_what_a_stage_stores_by_prompt_has_the_table_s_means_and_errors(tiny_run, kind):
    """Of every experiment, in the finished run."""
    config, layout = tiny_run
    jobs = [wildcards for stage, wildcards in planned(config) if stage == kind.stage]
    assert jobs
    for wildcards in jobs:
        files = files_of(layout, kind.stage, **wildcards)[1]
        table, samples = read_table(files[kind.output]), read_samples(files[kind.samples])
        means, errors = clustered_means_and_ses(samples.values[kind.column or kind.value], samples.cluster)
        np.testing.assert_allclose(means, table[kind.value], rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(errors, table[kind.se], rtol=1e-6, atol=1e-12)
