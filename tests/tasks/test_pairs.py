"""Tasks from a file: its reading, splits, answers and refusals, and a whole run beside the built-in task of the same
prompts.
"""

import csv
import json
import re
from itertools import permutations
from pathlib import Path

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import snakemake_dag
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_tasks import check_form, word_level

from oacore.config.read import load_config, parse_config
from oacore.config.tasks import PAIRS, Pairs
from oacore.errors import UserError
from oacore.estimate.case import Case
from oacore.estimate.sizes import known_sizes
from oacore.jobs import planned
from oacore.models.demo import make_tokenizer
from oacore.runner import run_stage
from oacore.store.layout import Layout
from oacore.tasks.counts import counts
from oacore.tasks.generate import check_files, generate
from oacore.tasks.pairs import Pair, clusters, read_pairs, split_pairs
from oacore.tasks.prompts import SPLITS

ROOT = Path(__file__).parents[2]
HEADER = "clean,corrupt,right,wrong\n"
NINE = HEADER + "".join(f"{a} a b,{a} b a,x,y\n" for a in range(10, 19))
TOKENS = word_level(["a", "b", "c", "x", "y", *(str(number) for number in range(10, 40))])


@pytest.fixture(scope="module")
def demo():
    return make_tokenizer()


@pytest.fixture
def write(tmp_path):
    """Writes a file, and gives the settings of a task from it."""

    def write(text, name="mine.csv", **settings):
        (tmp_path / name).write_text(text)
        return Pairs(pairs=tmp_path / name, **settings)

    return write


def prompts_of(settings, tokenizer, split="test", seed=0):
    return generate("mine", settings, tokenizer, seed, split)


def config_of(settings, **more):
    tasks = {"mine": settings.model_dump(mode="json")}
    return parse_config({"tasks": tasks | more.pop("tasks", {})} | more)


def refusal(settings, **more):
    with pytest.raises(UserError) as error:
        check_files(config_of(settings, **more))
    return str(error.value)


# The file


def test_csv_json_lines_and_a_json_list_say_the_same(tmp_path):
    rows = [
        {"Clean": " a b ", "CORRUPT": "b a", "right": ["x", " z"], "wrong": None, "group": 1, "note": "no matter"},
        {"clean": "a c", "corrupt": "c, a", "right": "x", "Wrong": ["y"], "group": "2", "subject": "c"},
    ]
    files = [tmp_path / name for name in ("mine.jsonl", "mine.json", "mine.csv")]
    files[0].write_text("\n\n".join(map(json.dumps, rows)))
    files[1].write_text(json.dumps(rows, indent=1))
    files[2].write_text(
        '\ufeff Clean ,corrupt,RIGHT,wrong,group,subject,note\na b,b a,x| z|,,1,,"no, matter"\n\na c,"c, a",x,y,2,c\n'
    )
    expected = [
        ("a b", "b a", ("x", "z"), (), "", "1", ""),
        ("a c", "c, a", ("x",), ("y",), "", "2", "c"),
    ]
    assert [[pair[1:] for pair in read_pairs(file, "key")] for file in files] == [expected] * 3
    assert [read_pairs(file, "key")[1].place for file in files] == ["line 3", "item 2", "line 4"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["has no rows", "needed are clean, corrupt, right"]),
        (HEADER, ["has no rows"]),
        ("clean,right\na,x\n", ["has no column corrupt;"]),
        ("clean;corrupt;right\na;b;x\n", ["has no column clean, corrupt, right"]),
        ("clean,clean,corrupt,right\na,b,c,x\n", ["has the column clean twice; allowed: once"]),
        ("clean,Clean,corrupt,right\na,b,c,x\n", ["line 2: a column is given twice"]),
        (HEADER + '"a,b,x,y\n', ["is not CSV: after line 1: unexpected end of data"]),
        (HEADER + "a,b,x,y\nc, d,e,x,y\n", ["1 bad rows", "line 3: more cells than columns; a text with a comma"]),
        (
            HEADER + "a,,x,y\nb,c,|,y\n,,,\n",
            ["line 2: no corrupt", "line 3: no right", "line 4: no clean, corrupt, rig"],
        ),
        (HEADER + "a\n", ["line 2: no corrupt, right"]),
        (HEADER + "a,a ,x,y\n", ["line 2: clean and corrupt are the same"]),
        (HEADER + "a,b,x|z,y|z\n", ["line 2: 'z' is right and wrong"]),
        (HEADER + "a,b,x,y\nc,d,x,y\na,b,z,y\n", ["line 4: the two prompts of line 2 once more"]),
        (HEADER + "a,,x,y\n" * 12, ["12 bad rows", "line 11: no corrupt"]),
        ("clean,corrupt,right,split\na,b,x,dev\n", ["line 2: split is 'dev'; allowed: train, validation, test"]),
        ("clean,corrupt,right,split\na,b,x,test\nb,c,x,\n", ["line 3: no split, which other rows have"]),
        (
            "clean,corrupt,right,split\na,b,x,test\na,c,x,train\n",
            ["line 3: its clean prompt is in test, too, at line 2"],
        ),
        ("clean,corrupt,right,subject\na b,b,x,c\n", ["line 2: the clean prompt 'a b' does not contain", "'c'"]),
        (NINE, ["n_test 7 wanted;", "has 5 train, 2 validation, 2 test rows; allowed"]),
    ],
)
def test_what_is_wrong_with_a_file_is_said_before_any_job(write, text, parts):
    settings = write(text, n_test=7)
    message = refusal(settings)
    assert message.startswith("tasks.mine") and str(settings.pairs) in message
    assert all(part in message for part in parts), message
    assert "line 12" not in message, "ten rows are enough"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[1]", ["item 1: not a JSON object"]),
        ('{"clean": "a"}\nno\n', ["line 1: no corrupt, right", "line 2: not a JSON object"]),
        ('{"clean": ["a"], "corrupt": "b", "right": "x"}', ["line 1: clean is ['a']; allowed: a text"]),
        ('{"clean": "a", "corrupt": "b", "right": [["x"]]}', ["right is [['x']]; allowed: a text or a list of texts"]),
        ('{"clean": "a", "corrupt": "b", "right": []}', ["line 1: no right"]),
        ('{"clean": "a", "corrupt": true, "right": "x"}', ["line 1: corrupt is True; allowed: a text"]),
        ('{"clean": "a", "Clean": "b", "corrupt": "c", "right": "x"}', ["line 1: a column is given twice"]),
        ('{\n"clean": "a"}', ["one JSON object over several lines"]),
        ("[", ["is not JSON"]),
    ],
)
def test_what_is_wrong_with_json_is_said_before_any_job(write, text, parts):
    message = refusal(write(text, name="mine.jsonl"))
    assert all(part in message for part in parts), message


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "mine.csv").write_bytes(b"\xff")
    for path, problem in ((tmp_path / "mine.csv", "is not UTF-8 text"), (tmp_path, "cannot read")):
        assert problem in refusal(Pairs(pairs=path))
    with pytest.raises(UserError, match=r"tasks.mine.pairs: '.*none.csv' does not exist"):
        config_of(Pairs(pairs=tmp_path / "none.csv"))


# Splits and counts

texts = st.sampled_from("abcdefghijklmnop")
rows_of_a_file = st.lists(
    st.builds(lambda clean, group: Pair("", clean, f"{clean}!", ("x",), (), "", group, ""), texts, st.just("") | texts),
    min_size=1,
    max_size=30,
)


@hypothesis_settings(deadline=None, max_examples=60)
@given(rows=rows_of_a_file, seed=st.integers(0, 5))
def test_no_group_and_no_clean_prompt_is_in_two_splits(rows, seed):
    """Clusters are the components of the graph in which rows of one group or one clean prompt are neighbours."""
    graph = nx.Graph()
    for number, row in enumerate(rows):
        graph.add_edges_from((number, shared) for shared in (("clean", row.clean), ("group", row.group)) if shared[1])
    components = {frozenset(node for node in part if isinstance(node, int)) for part in nx.connected_components(graph)}
    cluster, split_of = clusters(rows), split_pairs(rows, seed)
    numbers = list(dict.fromkeys(cluster))
    assert {frozenset(i for i, c in enumerate(cluster) if c == number) for number in numbers} == components
    assert numbers == list(range(len(components)))
    assert all(len({split_of[i] for i in part}) == 1 for part in components)
    assert split_of == split_pairs(rows, seed) and set(split_of) <= set(SPLITS)


def test_splits_depend_on_the_seed_and_are_60_20_20():
    rows = [Pair("", str(i), "", (), (), "", "", "") for i in range(200)]
    split_of = split_pairs(rows, 0)
    assert [split_of.count(split) for split in SPLITS] == [120, 40, 40]
    assert split_pairs(rows, 1) != split_of
    assert split_pairs([row._replace(split="test") for row in rows], 0) == ["test"] * 200


@given(
    has=st.tuples(*[st.integers(2, 40)] * 3),
    wanted=st.tuples(*[st.just("all") | st.integers(2, 50) | st.floats(0.01, 0.99)] * 3),
)
def test_counts_are_numbers_shares_or_all(has, wanted):
    settings = Pairs(pairs="mine.csv", **{f"n_{split}": n for split, n in zip(SPLITS, wanted, strict=True)})
    split_of = [split for split, n in zip(SPLITS, has, strict=True) for _ in range(n)]
    expected = [n if w == "all" else w if w >= 2 else round(w * n) for w, n in zip(wanted, has, strict=True)]
    if beyond := [i for i in range(3) if not 2 <= expected[i] <= has[i]]:
        with pytest.raises(UserError) as error:
            counts(settings, "tasks.mine", "mine.csv", split_of, "rows")
        asked = ", ".join(f"n_{SPLITS[i]} {wanted[i]}" for i in beyond)
        there = f"{has[0]} train, {has[1]} validation, {has[2]} test rows"
        assert f"tasks.mine: {asked} wanted; mine.csv has {there}" in str(error.value)
    else:
        assert list(counts(settings, "tasks.mine", "mine.csv", split_of, "rows").values()) == expected


def test_fewer_rows_are_some_of_more_in_the_file_s_order(write):
    text = HEADER + "".join(f"{i} a b,{i} b a,x,y\n" for i in range(10, 40))
    every = prompts_of(write(text), TOKENS, "train")
    some, fewer = (prompts_of(write(text, n_train=n), TOKENS, "train") for n in (0.5, 5))
    assert len(every.text) == 18 and len(some.text) == 9 and len(fewer.text) == 5
    assert every.text == sorted(every.text) and some.text == sorted(some.text)
    assert set(fewer.text) < set(some.text) < set(every.text)
    assert prompts_of(write(text, n_train=5), TOKENS, "train").digest() == fewer.digest()
    assert prompts_of(write(text), TOKENS, "train", seed=1).text != every.text


# Tokens


def test_answers_subject_and_clusters(write):
    """Years are two tokens each: 1712 and 1713 begin alike."""
    settings = write(
        "clean,corrupt,right,wrong,split,group,subject\n"
        + "".join(
            f"{split} a 1010 b,b a 1011 c,1712|x|1713,y|1812,{split},{group},a 1010\n".replace(split, name, 1)
            for split, name, group in (
                ("train", "a", 1), ("train", "b", 1), ("validation", "c", ""), ("validation", "x", ""),
                ("test", "y", 1), ("test", "11", ""), ("test", "12", 1),
            )
        )
    )  # fmt: skip
    prompts = prompts_of(settings, TOKENS)
    check_form(prompts, TOKENS, 3)
    words = [[TOKENS.decode([id_]) for id_ in row] for row in (*prompts.answers, *prompts.wrong_answers)]
    assert words == [["17", "x"]] * 3 + [["y", "18"]] * 3
    assert TOKENS.decode(prompts.continuation[0]) == "17 12"
    assert prompts.cluster.tolist() == [0, 1, 0] and prompts.task == "mine"
    assert prompts.subject.tolist() == [[2, 5]] * 3 and TOKENS.decode(prompts.tokens[0, 2:5]) == "a 10 10"
    assert prompts.meta == {"n_rows": 3, "n_unaligned": 0}


def test_without_wrong_answers_and_subject(write):
    prompts = prompts_of(write(NINE.replace(",y", ",")), TOKENS)
    assert (prompts.wrong_answers == -1).all() and (prompts.subject == -1).all()
    assert prompts.cluster.tolist() == list(range(len(prompts.text)))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("a zebra,a b,x,y", "line 11: tokenizer 'words': has no token for 'zebra' in the prompt 'a zebra'"),
        ("a b,a zebra,x,y", "line 11: tokenizer 'words': has no token for 'zebra'"),
        ("a b,a c,zebra,y", "line 11: the tokenizer has no token for the answer 'zebra' after 'a b'"),
        ("a b,a c,1712,x|1713", "line 11: a right and a wrong answer begin with the same token '17'"),
        ("a b,a,x,y", "line 11: clean 2, corrupt 1"),
    ],
)
def test_what_the_tokenizer_can_not_do_is_said_by_row_whatever_the_split(write, row, problem):
    settings = write(NINE + row + "\n")
    check_files(config_of(settings))
    messages = set()
    for split in SPLITS:
        with pytest.raises(UserError) as error:
            prompts_of(settings, TOKENS, split)
        messages.add(str(error.value))
    assert len(messages) == 1 and problem in messages.pop()
    with pytest.raises(UserError, match=rf"tasks.mine.pairs: .*mine.csv has 1 bad rows .*{re.escape(problem)}"):
        prompts_of(settings, TOKENS)


def test_rows_of_unequal_lengths_are_dropped_and_counted(write):
    text = "clean,corrupt,right,split\n" + "".join(
        f"{i} a b,{i} {'b a' if i % 3 else 'b'},x,{SPLITS[i % 2]}\n{i} b,{i} a,x,test\n" for i in range(10, 22)
    )
    with pytest.raises(
        UserError, match=r"4 bad rows \(allowed: as many tokens .*align: drop\): line 6: clean 3, corrupt"
    ):
        prompts_of(write(text), TOKENS)
    settings = write(text, align="drop")
    train, test = (prompts_of(settings, TOKENS, split) for split in ("train", "test"))
    assert train.meta == {"n_rows": 6, "n_unaligned": 2} and len(train.text) == 4
    assert test.meta == {"n_rows": 12, "n_unaligned": 0} and len(test.text) == 12
    check_files(config_of(write(text, align="drop", n_train=6)))
    with pytest.raises(UserError, match=r"n_train 6 wanted; .* has 4 train, 4 validation, 12 test rows"):
        prompts_of(write(text, align="drop", n_train=6), TOKENS)


# The config


def test_any_number_of_tasks_under_any_names(write):
    """In the config's order, after the built-in ones; and jobs, which get it as JSON, have the same config."""
    mine = write(NINE).model_dump(mode="json")
    config = parse_config(
        {"tasks": {"selected": mine | {"n_train": 0.8}, "ioi": None, "a": mine, "copy": mine | {"n_test": 2}}}
    )
    assert list(config.tasks.selected()) == ["ioi", "selected", "a", "copy"]
    sent = json.loads(json.dumps(config.model_dump(mode="json")))
    assert parse_config(sent) == config and list(parse_config(sent).tasks.selected()) == list(config.tasks.selected())
    assert parse_config({"tasks": {"a": {"pairs": "~"}}}).tasks.selected()["a"].pairs == Path.home()


@pytest.mark.parametrize(
    ("tasks", "parts"),
    [
        ({"iio": None}, ["tasks.iio: unknown key", "or a task of your own with `pairs`", "did you mean 'ioi'?"]),
        ({"mine": {"pair": "x.csv"}}, ["tasks.mine: unknown key", "ioi, greater_than, facts, text"]),
        ({"ioi": {"pairs": "x.csv"}}, ["tasks.ioi.pairs: unknown key"]),
        ({"My-task": {"pairs": "x.csv"}}, ["tasks: 'My-task' is no name for a task; allowed: lower-case letters"]),
        ({"logs": {"pairs": "x.csv"}}, ["tasks: 'logs' is no name for a task", "not logs"]),
        ({"mine": {"pairs": "x.csv", "n_trian": 3}}, ["tasks.mine.n_trian: unknown key", "did you mean 'n_train'?"]),
        ({"mine": {"pairs": None}}, ["tasks.mine.pairs: None"]),
        ({"mine": {"pairs": "x.csv", "align": "pad"}}, ["tasks.mine.align: 'pad'; allowed: refuse, drop"]),
        *(
            ({"mine": {"pairs": "x.csv", "n_test": n}}, [f"tasks.mine.n_test: {n!r}; allowed: a whole", "or all"])
            for n in (1, 1.0, 0, -3, "some", None, [2], float("nan"))
        ),
        ({"mine": {"pairs": "x.csv", "n_test": True}}, ["tasks.mine.n_test: True", "neither true nor false"]),
    ],
)
def test_settings_that_are_refused(tasks, parts):
    with pytest.raises(UserError) as error:
        parse_config({"tasks": tasks})
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_sections_name_the_nearest_task(write):
    for section in ("ablation", "circuits", "lenses"):
        with pytest.raises(UserError, match=rf"{section}.tasks: mime; allowed: .*: mine \(did you mean 'mine'\?\)"):
            config_of(write(NINE), **{section: {"tasks": ["mime"]}})


def test_tracing_needs_a_subject_in_every_row(write):
    traced = {"tracing": {"tasks": ["mine"]}}
    named = "".join(f"{a} a b,{a} b a,x,y,{a}\n" for a in range(10, 19))
    check_files(config_of(write(f"{HEADER.strip()},subject\n{named}"), **traced))
    message = refusal(write(NINE), **traced)
    assert "tracing.tasks: mine" in message and "(tasks.mine.pairs) has 9 rows without a subject: line 2" in message


@pytest.mark.parametrize(
    ("circuits", "why"),
    [({"methods": ["eap"]}, "circuits.methods: 'eap'"), ({"objective": "logit_diff", "methods": ["ugs"]}, "objective")],
)
def test_circuits_that_compare_answers_need_wrong_ones_in_every_row(write, circuits, why):
    settings = write(NINE + "a,b,x,\nb,a,x\n")
    message = refusal(settings, circuits=circuits | {"ablations": ["mean"]})
    assert (
        why in message and "(tasks.mine.pairs) has 2 rows without wrong answers: line 11, line 12; allowed" in message
    )
    other = {"tasks": {"ioi": None}, "circuits": circuits | {"ablations": ["mean"], "tasks": ["ioi"]}}
    check_files(config_of(settings, **other))
    check_files(config_of(settings, circuits={"methods": ["random"], "ablations": ["mean"]}))
    check_files(config_of(write(NINE), circuits=circuits | {"ablations": ["mean"]}))


def test_a_changed_file_is_another_task(write):
    def folder(text, **settings):
        return Layout(config_of(write(text, **settings))).task_dir("mine")

    assert folder(NINE) == folder(NINE) == folder(NINE, name="other.csv")
    assert len({folder(NINE), folder(NINE + "a,b,x,y\n"), folder(NINE, n_train=0.5), folder(NINE, align="drop")}) == 4


def test_an_estimate_counts_the_rows(write):
    config = config_of(write(NINE, n_train=0.6), tasks={"ioi": None})
    case = Case(config, known_sizes(config), gpu=False)
    assert case.n_prompts("mine") == (3, 2, 2) and case.prompt_tokens("mine") == 4
    assert case.n_prompts("ioi") == (1000, 128, 500)


def test_the_page_s_file_is_a_task_of_the_demo_model(demo, write):
    page = (ROOT / "docs/tasks.md").read_text()
    text = re.search(r"^```csv\n(.*?)^```$", page, re.M | re.S)[1]
    settings = write(text)
    for split in SPLITS:
        check_form(prompts_of(settings, demo, split), demo, 3)
    for name in (*Pair._fields[1:], "n_unaligned"):
        assert f"`{name}`" in page


def test_the_shipped_example_suits_the_demo_model(demo, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config("config/pairs.yaml")
    check_files(config)
    (name, settings), = config.tasks.selected().items()  # fmt: skip
    splits = {split: generate(name, settings, demo, config.seed, split) for split in SPLITS}
    assert sum(len(prompts.text) for prompts in splits.values()) == 60
    for prompts in splits.values():
        check_form(prompts, demo, len(prompts.text))
        assert len(set(prompts.cluster.tolist())) == len(prompts.text) / 2, "either order of two names is one group"


# A whole run

FEW = {"n_train": 24, "n_validation": 12, "n_test": 16}
RUN = {
    "model": "demo",
    "device": "cpu",
    "limits": {"threads": 1},
    "ablation": {"methods": ["zero", "mean", "resample", "counterfactual", "optimal"], "optimal": {"max_steps": 4}},
    "circuits": {"methods": ["eap", "random"], "ablations": ["mean"], "sizes": [20, 0.2], "n_prompts": 4},
    "lenses": {"tasks": ["mine"], "lenses": ["oca", "logit"], "oca": {"max_steps": 2}, "pictures": 1},
}


@pytest.fixture(scope="module")
def of_ioi(demo, tmp_path_factory):
    """The config of a run on IOI and on a file of its prompts."""
    root = tmp_path_factory.mktemp("pairs")
    ioi = parse_config({"tasks": {"ioi": FEW}}).tasks.selected()["ioi"]
    with (root / "mine.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["clean", "corrupt", "right", "wrong", "split"])
        for split in SPLITS:
            prompts = generate("ioi", ioi, demo, 0, split)
            texts = [demo.decode(row[1:n]) for row, n in zip(prompts.counterfactual, prompts.lengths, strict=True)]
            right, wrong = (demo.batch_decode(ids) for ids in (prompts.answers, prompts.wrong_answers))
            writer.writerows(zip(prompts.text, texts, right, wrong, [split] * len(texts), strict=True))
    tasks = {"ioi": FEW, "mine": {"pairs": str(root / "mine.csv")}, "mine2": {"pairs": str(root / "mine.csv")}}
    return RUN | {"tasks": tasks, "cache_dir": str(root / "cache"), "results_dir": str(root / "results")}


def test_the_workflow_has_its_jobs(of_ioi, tmp_path):
    """Of two tasks of which one's name begins with the other's."""
    jobs = [job for job in snakemake_dag(of_ioi, tmp_path / "config.yaml", forced=True).jobs if job.rule.name != "all"]
    tasks = {
        stage: sorted(job.wildcards.task for job in jobs if job.params.stage == stage)
        for stage in ("gaps", "circuits", "lens_evaluation")
    }
    every = ["ioi", "mine", "mine2"]
    assert tasks == {"gaps": every, "circuits": sorted(2 * every), "lens_evaluation": ["mine"]}
    layout = Layout(parse_config(of_ioi))
    prompts = {job.wildcards.task_dir: job.params.task for job in jobs if job.params.stage == "prompts"}
    assert prompts == {Path(layout.task_dir(task)).name: task for task in every}


def test_a_file_of_ioi_s_prompts_gives_ioi_s_numbers(of_ioi):
    config = parse_config(of_ioi | {"tasks": {name: of_ioi["tasks"][name] for name in ("ioi", "mine")}})
    check_files(config)
    layout = Layout(config)
    for stage, what in planned(config):
        if stage not in ("figures", "lens_figures", "report") and (stage, what) != ("circuit_figures", {"task": "ioi"}):
            run_stage(stage, config, **what)

    def both(table):
        return [pd.read_csv(table(task), comment="#") for task in ("ioi", "mine")]

    ours, theirs = both(lambda task: layout.ablation(task, "gaps.csv"))
    assert len(ours) == 5 * 20 and ours["gap_nats"].gt(0).mean() > 0.9
    pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    for method in ("eap", "random"):
        ours, theirs = (
            json.loads(path.read_text())
            for task in ("ioi", "mine")
            for path in [Path(layout.circuits(task, f"{method}-mean/0.2-s0.json"))]
        )
        assert ours["edges"] == theirs["edges"]
    pareto = pd.read_csv(layout.circuits("mine", "pareto.csv"), comment="#")
    assert len(pareto) == 4 and np.isfinite(pareto[["kl_nats", "logit_diff"]]).all(axis=None)
    assert set(pd.read_csv(layout.lens("mine", "loss.csv"), comment="#")["lens"]) == {"oca", "logit"}
    assert PAIRS.name not in str(list(Path(config.cache_dir).rglob("*")))


# Templates

TEMPLATE = {
    "n": 12,
    "clean": ["{A} {B} {C}", "10 {B} {A} {C}"],
    "corrupt": ["{B} {A} {C}", "10 {A} {B} {C}"],
    "right": ["{A}"],
    "wrong": "{B}",
    "group": "{C}",
    "subject": "{A}",
    "words": {"A, B": ["a", "b", "c"], "C": ["x", "y"]},
}


def pairs_of(folder, **changes):
    path = folder / "mine.yaml"
    values = {key: value for key, value in (TEMPLATE | changes).items() if value is not None}
    path.write_text(yaml.safe_dump(values))
    return read_pairs(path, "key")


def test_a_template_gives_all_rows_of_its_words(tmp_path):
    found = {pair[1:] for pair in pairs_of(tmp_path, n=24)}
    expected = {
        (clean, corrupt, (a,), (b,), "", c, a)
        for a, b in permutations("abc", 2)
        for c in "xy"
        for clean, corrupt in ((f"{a} {b} {c}", f"{b} {a} {c}"), (f"10 {b} {a} {c}", f"10 {a} {b} {c}"))
    }
    assert found == expected and len(expected) == 24


def test_the_template_of_the_docs_gives_what_it_asks_for(tmp_path):
    (block,) = re.findall(r"```yaml\n(n: .*?)```", (ROOT / "docs/tasks.md").read_text(), re.S)
    (tmp_path / "give.yaml").write_text(block)
    pairs = read_pairs(tmp_path / "give.yaml", "key")
    assert len(pairs) == yaml.safe_load(block)["n"] and all(pair.subject == pair.right[0] for pair in pairs)


def test_rows_of_a_template_are_drawn(tmp_path):
    twelve, six, other = (pairs_of(tmp_path, **more) for more in ({}, {"n": 6}, {"seed": 1}))
    assert twelve[:6] == six and len(set(twelve)) == 12
    assert {pair[1:] for pair in other} != {pair[1:] for pair in twelve}
    many = {"A, B": [f"w{i}" for i in range(400)], "C": [1987, 2.5, "x"]}  # more choices than are listed
    found = pairs_of(tmp_path, n=50, words=many)
    assert len({pair.clean for pair in found}) == 50 and all(pair.right != pair.wrong for pair in found)
    assert {pair.group for pair in found} == {"1987", "2.5", "x"}
    assert pairs_of(tmp_path, n=20, words=many) == found[:20]


def test_a_template_makes_a_task(tmp_path):
    pairs_of(tmp_path, group=None)
    settings = Pairs(pairs=tmp_path / "mine.yaml")
    check_files(config_of(settings, tracing={"tasks": ["mine"]}))
    prompts = [prompts_of(settings, TOKENS, split) for split in SPLITS]
    for split in prompts:
        check_form(split, TOKENS, len(split.text))
        assert (split.subject[:, 1] - split.subject[:, 0] == 1).all()
    assert sum(len(split.text) for split in prompts) == 12


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"n": 25}, "n: 25; allowed: up to 24, all that its words give"),
        ({"clean": ["{A} {B} {C}", "{B} {A} {C}"], "corrupt": ["{B} {A}", "{A} {B}"]}, "the two prompts of row"),
        ({"n": None}, "n: Field required"),
        ({"clean": "{A} {D}", "corrupt": "{A}"}, "clean: {D} in '{A} {D}'; allowed: A, B, C, as in words"),
        ({"clean": "{A", "corrupt": "{A}"}, "clean: '{A': expected '}' before end of string; allowed: slots"),
        ({"clean": "{A!r}", "corrupt": "{A}"}, "clean: '{A!r}': {A}; allowed: a name in braces"),
        ({"clean": "{A.x}", "corrupt": "{A}"}, "{A.x}; allowed: a name in braces"),
        ({"corrupt": "{A}"}, "corrupt: 1 wordings; allowed: 2, as clean has"),
        ({"words": TEMPLATE["words"] | {"D": ["x"]}}, "words: D; allowed: slots that a text has"),
        ({"words": TEMPLATE["words"] | {"A, B": ["a"]}}, "words: A, B: 1 words, 1 different"),
        ({"words": TEMPLATE["words"] | {"C": ["x", "x"]}}, "words: C: 2 words, 1 different"),
        ({"wright": "x"}, "wright: Extra inputs are not permitted (allowed: n, seed, clean"),
        ({"right": [True]}, "right.0: Input should be a valid string"),
    ],
)
def test_what_is_wrong_with_a_template(tmp_path, changes, part):
    with pytest.raises(UserError) as error:
        pairs_of(tmp_path, **changes)
    assert str(error.value).startswith(f"key: {tmp_path / 'mine.yaml'}") and part in str(error.value), error.value
