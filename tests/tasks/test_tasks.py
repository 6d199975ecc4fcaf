"""Prompts of all tasks, against independent readings of their text, with real and hand-made tokenizers."""

import csv
import dataclasses
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from oacore.config.read import parse_config
from oacore.config.tasks import TASKS
from oacore.errors import UserError
from oacore.estimate.case import Case
from oacore.estimate.sizes import known_sizes
from oacore.tasks import facts, greater_than, ioi
from oacore.tasks.facts import read_facts_file
from oacore.tasks.generate import generate
from oacore.tasks.prompts import (
    SPLITS,
    build,
    encode,
    following,
    split_of,
    stream,
    token_text,
)
from oacore.tasks.text import passages as read_passages

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("OA_SHARED_DATA", ROOT / "../shared/data"))


def shared(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"no {name} in ../shared/data or $OA_SHARED_DATA")
    return path


def word_level(words, **special):
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<bos>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    halves = pre_tokenizers.Split(Regex(r"\d{2}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), halves])
    special = {"bos_token": "<bos>", "unk_token": "<unk>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, name_or_path="words", **special)


@pytest.fixture(scope="session")
def gpt2():
    return AutoTokenizer.from_pretrained(shared("gpt2_bpe"))


@pytest.fixture(scope="session")
def stories():
    return AutoTokenizer.from_pretrained(shared("stories260k"))


@pytest.fixture(scope="session")
def words():
    return word_level(sorted({*ioi.vocabulary(), *greater_than.vocabulary()}))


@pytest.fixture(params=["gpt2", "words"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def settings(n=200, **more):
    return SimpleNamespace(
        n_train=n,
        n_validation=n,
        n_test=n,
        **{"unseen": "subjects", "passages": "paragraphs", "windows": "side_by_side"} | more,
    )


def ids(row):
    return [int(i) for i in row if i >= 0]


def check_form(prompts, tokenizer, n):
    """What holds for the prompts of every task."""
    bos = tokenizer.bos_token_id
    assert prompts.tokens.shape == prompts.counterfactual.shape and len(prompts.tokens) == len(prompts.text) == n
    for name in ("tokens", "lengths", "counterfactual", "answers", "wrong_answers", "subject", "cluster"):
        assert getattr(prompts, name).dtype == np.int32 and len(getattr(prompts, name)) == n
    for text, tokens, length, other in zip(
        prompts.text, prompts.tokens, prompts.lengths, prompts.counterfactual, strict=True
    ):
        assert tokens[0] == other[0] == bos
        if prompts.task == "text":  # a window may end or start within what would be one token
            assert tokenizer.decode(tokens[1:length]) == text
        else:
            assert tokens[1:length].tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert (tokens[length:] == bos).all() and (other[length:] == bos).all()
        assert tokens[1:length].tolist() != other[1:length].tolist()
    assert (prompts.answers[:, 0] >= 0).all()
    for right, wrong in zip(prompts.answers, prompts.wrong_answers, strict=True):
        assert not set(ids(right)) & set(ids(wrong))
    assert len({row.tobytes() for row in prompts.tokens}) == n


# Every task


@pytest.fixture(scope="session")
def facts_file(tmp_path_factory):
    """60 facts about 45 subjects of one to four GPT-2 tokens, in three relations, mid-sentence and first in the
    sentence.
    """
    cities = """Paris:France London:England Rome:Italy Madrid:Spain Berlin:Germany Lisbon:Portugal Athens:Greece
    Warsaw:Poland Budapest:Hungary Prague:Czech Vienna:Austria Dublin:Ireland Oslo:Norway Stockholm:Sweden
    Helsinki:Finland Copenhagen:Denmark Moscow:Russia Kiev:Ukraine Cairo:Egypt Tokyo:Japan Beijing:China Seoul:Korea
    Bangkok:Thailand Hanoi:Vietnam Delhi:India Ankara:Turkey Tehran:Iran Baghdad:Iraq Havana:Cuba Lima:Peru"""
    people = """Ada Lovelace:mathematics|Niels Bohr:physics|Linus Pauling:chemistry|Emmy Noether:mathematics|
    Paul Dirac:physics|Dmitri Mendeleev:chemistry|Srinivasa Ramanujan:mathematics|Max Planck:physics|
    Justus von Liebig:chemistry|Kurt Gödel:logic|Johann Sebastian Bach:music|Clara Schumann:music|
    Erwin Schrödinger:physics|Rosalind Franklin:biology|Gregor Mendel:biology"""
    lines = []
    for i, (city, country) in enumerate(pair.split(":") for pair in cities.split()):
        prompt, relation = f"The city of {city}, as we know, lies in", ("town", "capital")[i % 2]
        lines.append({"subject": city, "prompt": prompt, "answer": country, "relation": relation})
    for person, subject in (pair.strip().split(":") for pair in people.split("|")):
        lines.append(
            {"subject": person, "prompt": f"{person}'s favourite field was", "answer": subject, "relation": "field"}
        )
        lines.append({"subject": person, "prompt": f"In school {person} liked", "answer": subject, "relation": "field"})
    path = tmp_path_factory.mktemp("facts") / "facts.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


@pytest.fixture
def task_settings(facts_file):
    """Small settings of each task by its name."""

    def of(name):
        if name == "text":
            return settings(50, path=shared("text/tinystories_1000.json"), n_tokens=12)
        return settings(None, path=facts_file) if name == "facts" else settings(50)

    return of


@pytest.mark.parametrize("name", TASKS)
def test_form_determinism_and_disjoint_splits(name, gpt2, task_settings):
    wanted = task_settings(name)
    seen = {}
    for split in SPLITS:
        prompts = generate(name, wanted, gpt2, 3, split)
        check_form(prompts, gpt2, 50 if name != "facts" else len(prompts.text))
        assert (prompts.task, prompts.split) == (name, split)
        again = generate(name, wanted, gpt2, 3, split)
        assert again.digest() == prompts.digest() and again.text == prompts.text and again.meta == prompts.meta
        assert (again.counterfactual == prompts.counterfactual).all()
        assert generate(name, wanted, gpt2, 4, split).digest() != prompts.digest()
        seen[split] = {row.tobytes()[: 4 * n] for row, n in zip(prompts.tokens, prompts.lengths, strict=True)}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not seen[one] & seen[other]


@pytest.mark.parametrize("name", ["ioi", "greater_than", "text"])
def test_splits_stay_disjoint_across_seeds_and_sizes(name, gpt2, task_settings):
    wanted = task_settings(name)
    test = set(generate(name, wanted, gpt2, 0, "test").text)
    wanted.n_train = 1000
    for seed in (0, 1):
        assert not test & set(generate(name, wanted, gpt2, seed, "train").text)


def test_split_shares_and_fixed_values():
    keys = [f"prompt {i}" for i in range(20_000)]
    shares = [sum(split_of(key) == split for key in keys) / len(keys) for split in SPLITS]
    assert shares == pytest.approx([0.6, 0.2, 0.2], abs=0.015)  # 4 standard errors
    for key in keys[:200]:
        share = int(hashlib.sha256(key.encode()).hexdigest()[:16], 16) / 16**16
        assert split_of(key) == SPLITS[(share >= 0.6) + (share >= 0.8)]


def test_digest_sees_every_array_and_only_arrays(words):
    prompts = generate("greater_than", settings(5), words, 0, "train")
    for name in ("tokens", "lengths", "counterfactual", "answers", "wrong_answers", "subject", "cluster"):
        changed = getattr(prompts, name).copy()
        changed.flat[-1] += 1
        assert dataclasses.replace(prompts, **{name: changed}).digest() != prompts.digest(), name
    assert dataclasses.replace(prompts, meta={"n": 1}).digest() == prompts.digest()


def test_random_streams_differ_between_splits():
    draws = [tuple(stream(seed, split).integers(1 << 40, size=2)) for seed in (0, 1) for split in SPLITS]
    assert len(set(draws)) == 6


def test_unknown_task_and_split(words):
    with pytest.raises(UserError, match=r"tasks\.sums: no such task; allowed are ioi, greater_than, facts, text"):
        generate("sums", settings(), words, 0, "train")
    with pytest.raises(UserError, match="unknown split 'dev'; allowed are train, validation, test"):
        generate("ioi", settings(), words, 0, "dev")


def test_tasks_need_no_torch_and_no_transformers():
    code = "import sys, oacore.tasks; print([m for m in ('torch', 'transformers', 'pandas') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


# Shared helpers


def test_encode_puts_bos_once_and_nothing_else(gpt2, stories, words):
    assert encode(gpt2, "Hello world") == [50256, 15496, 995]
    assert encode(stories, "Once")[0] == 1 and encode(stories, "Once").count(1) == 1
    assert encode(words, "The war") == [words.bos_token_id, *words.convert_tokens_to_ids(["The", "war"])]
    with_eos = word_level(["The"], bos_token=None, eos_token="<bos>")
    assert encode(with_eos, "The") == [with_eos.eos_token_id, 2]
    with pytest.raises(UserError, match="neither a BOS nor an EOS"):
        encode(word_level(["The"], bos_token=None), "The")


def test_encode_names_an_unknown_word(words):
    with pytest.raises(UserError, match="tokenizer 'words': has no token for 'zebra' in the prompt 'The zebra lasted'"):
        encode(words, "The zebra lasted")


@pytest.fixture
def letters():
    """A tokenizer of letters without an unknown token: what it does not know is dropped without a word."""
    pieces = {letter: number for number, letter in enumerate(["<s>", *"abcdefgh "])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(pieces, [])), bos_token="<s>")


def test_a_character_that_a_tokenizer_drops_is_named(letters, tmp_path):
    assert letters.unk_token_id is None and len(letters("ad\u00e9b")["input_ids"]) == 3
    assert encode(letters, "bad cafe") == [0, *letters("bad cafe")["input_ids"]]
    with pytest.raises(UserError, match="has no token for '\u00e9' in the prompt 'a caf\u00e9'; every character"):
        encode(letters, "a caf\u00e9")
    path = tmp_path / "text.json"
    passages = [f"{a}{b} dead beef cafe {b}{a}" for a in "abcdefgh" for b in "abcdefgh"]
    path.write_text(json.dumps([*passages, "caf\u00e9 dead beef cafe"]))
    settings = SimpleNamespace(
        path=path, n_tokens=5, n_train=2, n_validation=2, n_test=2, passages="paragraphs", windows="side_by_side"
    )
    assert generate("text", settings, letters, 0, "train").meta["n_unknown"] == 1


def test_following_is_what_comes_after_the_context(gpt2, stories, words):
    assert gpt2.decode(following(gpt2, "and", " Mary")) == " Mary"
    assert len(following(stories, "and", " Tim")) == 1  # alone, " Tim" would start with a token for the space
    assert following(words, "and", " zebra") == []
    assert following(gpt2, "an", "d Mary") == []  # "and" is one token


def test_build_refuses_a_counterfactual_of_another_length():
    with pytest.raises(ValueError, match="another length"):
        build("ioi", "train", ["a"], [[0, 1]], [[0, 1, 2]], [[1]], [[2]])


# IOI


def names_in(text):
    return [word for word in re.findall(r"\w+", text) if word in ioi.NAMES]


def test_ioi_word_lists():
    assert len(ioi.TEMPLATES) >= 15 and len(set(ioi.TEMPLATES)) == len(ioi.TEMPLATES)
    assert len(set(ioi.NAMES)) == len(ioi.NAMES) >= 100
    assert not {*ioi.NAMES} & {word.title() for word in (*ioi.PLACES, *ioi.OBJECTS)}
    for template in ioi.TEMPLATES:
        assert template.isascii() and sorted(re.findall(r"{(\w+)}", template)) == ["A", "B", "OBJECT", "PLACE", "S"]
        assert re.fullmatch(r"[\w ,]+ {A} and {B} .*{S} .* to", template)
        assert not names_in(template) and all(template[m.start() - 1] == " " for m in re.finditer("{", template))
    assert len({len(template.split()) for template in ioi.TEMPLATES}) >= 4


def test_ioi_names_answers_and_counterfactuals(tokenizer):
    prompts = generate("ioi", settings(400), tokenizer, 0, "train")
    orders, templates = [], set()
    for text, tokens, length, other, right, wrong in zip(
        prompts.text,
        prompts.tokens,
        prompts.lengths,
        prompts.counterfactual,
        prompts.answers,
        prompts.wrong_answers,
        strict=True,
    ):
        first, second, third = names_in(text)
        assert first != second and third in (first, second)
        io = first if third == second else second
        orders.append(third == second)
        assert tokenizer.decode(ids(right)).strip() == io and tokenizer.decode(ids(wrong)).strip() == third
        assert (tokens == right[0]).sum() == 1 and (
            tokens == wrong[0]
        ).sum() == 2  # names are single tokens in the sentence itself
        moved = np.flatnonzero(tokens != other)
        redrawn = [tokenizer.decode([i]).strip() for i in other[moved]]
        assert {*redrawn} <= {*ioi.NAMES}
        assert len(moved) == 3 and len(set(redrawn)) == 3 and not {*redrawn} & {first, second}
        assert moved[-1] < length
        templates.add(re.sub(r"\b(?:{})\b".format("|".join((*ioi.NAMES, *ioi.PLACES, *ioi.OBJECTS))), "_", text))
    assert 0.4 < np.mean(orders) < 0.6
    assert len(templates) == len(ioi.TEMPLATES)
    assert len(set(prompts.lengths.tolist())) >= 4 and (prompts.subject == -1).all()


def test_ioi_keeps_only_single_tokens(gpt2, monkeypatch):
    monkeypatch.setattr(ioi, "NAMES", (*ioi.NAMES[:8], "Xiulan", "Mary Ann"))
    prompts = generate("ioi", settings(300), gpt2, 0, "train")
    assert prompts.meta["n_names"] == 8 and not any("Xiulan" in text or "Ann " in text for text in prompts.text)


def test_ioi_errors_name_the_tokenizer_and_the_counts(stories):
    with pytest.raises(
        UserError, match=r"tokenizer '.*stories260k' has only 0 of \d+ names as single tokens; at least 6 are needed"
    ):
        generate("ioi", settings(), stories, 0, "train")
    grammar = [word for word in ioi.vocabulary() if word not in {*ioi.NAMES, *ioi.PLACES, *ioi.OBJECTS}]
    with pytest.raises(UserError, match="has only 5 of"):
        generate("ioi", settings(), word_level([*grammar, *ioi.NAMES[:5], "school", "book"]), 0, "train")
    with pytest.raises(UserError, match=r"has only 0 of 20 objects .* at least 1"):
        generate("ioi", settings(), word_level([*grammar, *ioi.NAMES[:6], "school"]), 0, "train")
    lacking = [word for word in grammar if word != "Yesterday"]
    with pytest.raises(UserError, match="has no token for 'Yesterday'"):
        generate("ioi", settings(), word_level([*lacking, *ioi.NAMES[:6], "school", "book"]), 0, "train")


def test_ioi_says_how_many_prompts_there_are():
    grammar = [word for word in ioi.vocabulary() if word not in {*ioi.NAMES, *ioi.PLACES, *ioi.OBJECTS}]
    small = word_level([*grammar, *ioi.NAMES[:6], "school", "book"])
    pairs = list(itertools.permutations(ioi.NAMES[:6], 2))
    every = [
        t.format(A=a, B=b, S=s, PLACE="school", OBJECT="book") for t in ioi.TEMPLATES for a, b in pairs for s in (a, b)
    ]
    there = sum(split_of(text) == "test" for text in every)
    assert len(every) == len(set(every)) == 960
    assert len(generate("ioi", settings(there), small, 0, "test").text) == there
    with pytest.raises(UserError, match=rf"tasks\.ioi\.n_test: {there + 1} wanted, .* only {there} distinct prompts"):
        generate("ioi", settings(there + 1), small, 0, "test")


# Greater-Than


def year_of(text):
    noun, start, century = re.fullmatch(r"The (\w+) lasted from the year (\d{4}) to the year (\d\d)", text).groups()
    assert start[:2] == century and noun in greater_than.NOUNS
    return int(century), int(start[2:])


def test_greater_than_answers(tokenizer):
    prompts = generate("greater_than", settings(500), tokenizer, 0, "train")
    centuries = set()
    for text, tokens, length, other, right, wrong in zip(
        prompts.text,
        prompts.tokens,
        prompts.lengths,
        prompts.counterfactual,
        prompts.answers,
        prompts.wrong_answers,
        strict=True,
    ):
        century, start = year_of(text)
        centuries.add(century)
        assert 2 <= start <= 98
        pieces = {
            y: tokenizer(f"to the year {century}{y:02}", add_special_tokens=False)["input_ids"] for y in range(100)
        }
        ends = {
            y: p[4] for y, p in pieces.items() if len(p) == 5 and p[3] == tokens[length - 1]
        }  # "to the year" + 2 tokens
        assert ids(right) == [id_ for y, id_ in ends.items() if y > start]
        assert ids(wrong) == [id_ for y, id_ in ends.items() if y <= start]
        assert {int(tokenizer.decode([id_])) for id_ in ids(right)} <= set(range(start + 1, 100))
        moved = np.flatnonzero(tokens != other)
        assert (
            len(moved) == 1
            and tokenizer.decode(other[moved]) == "01"
            and tokenizer.decode(tokens[moved]) == f"{start:02}"
        )
    assert centuries >= set(range(11, 19)) and (prompts.subject == -1).all()


def test_greater_than_with_every_year_in_two_tokens(words):
    prompts = generate("greater_than", settings(300), words, 0, "test")
    for text, right, wrong in zip(prompts.text, prompts.answers, prompts.wrong_answers, strict=True):
        start = year_of(text)[1]
        assert [words.decode([i]) for i in ids(right)] == [f"{y:02}" for y in range(start + 1, 100)]
        assert [words.decode([i]) for i in ids(wrong)] == [f"{y:02}" for y in range(start + 1)]


def test_greater_than_years_of_gpt2(gpt2):
    table = greater_than.year_tokens(gpt2)
    assert 10 not in table  # "1001" is "100" + "1"
    assert 63 not in table[18] and 64 in table[18]  # 1863 is one token
    assert 11 not in table[11] and 12 in table[11]  # "1111" is "111" + "1"


def test_greater_than_has_no_prompt_without_an_answer(gpt2, monkeypatch):
    monkeypatch.setattr(greater_than, "CENTURIES", (18,))
    monkeypatch.setattr(greater_than, "STARTS", range(90, 99))
    assert (
        generate("greater_than", settings(1), gpt2, 0, "train").meta["n_years"] == 2
    )  # 1891, 1892; 1894 is the last in two tokens


def test_greater_than_agrees_with_a_published_data_set(gpt2):
    table = greater_than.year_tokens(gpt2)
    with shared("tasks/greater_than_data.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        noun, century, start = re.fullmatch(r"The (\w+) lasted from the year (\d\d)(\d\d) .*", row["clean"]).groups()
        assert greater_than.render(noun, int(century), int(start)) == row["clean"]
        assert greater_than.render(noun, int(century), 1) == row["corrupted"]
        assert int(start) in table[int(century)] and int(start) == int(row["label"])
    assert len(rows) == 1000


def test_greater_than_errors(stories, gpt2):
    with pytest.raises(
        UserError, match=r"greater_than: tokenizer '.*stories260k' splits no year .* \(' 1743' has 5 known tokens\)"
    ):
        generate("greater_than", settings(), stories, 0, "train")
    with pytest.raises(UserError, match=r"tasks\.greater_than\.n_test: 100000 wanted, .* only \d{4} distinct"):
        generate("greater_than", settings(100_000), gpt2, 0, "test")


# The demo model's language


@pytest.mark.parametrize("task", [ioi, greater_than])
def test_sentences_and_vocabulary(task, words):
    assert task.vocabulary() == sorted(set(task.vocabulary()))
    assert all(len(following(words, "the", f" {word}")) == 1 for word in task.vocabulary())
    own = word_level(task.vocabulary())
    held_out = set(generate(task.__name__.split(".")[-1], settings(300), words, 0, "test").text)
    drawn = list(itertools.islice(task.sentences(np.random.default_rng(0), "train"), 2000))
    assert drawn == list(itertools.islice(task.sentences(np.random.default_rng(0), "train"), 2000))
    for text, answer in drawn:
        assert split_of(text) == "train" and text not in held_out
        assert encode(own, text + answer)[:-1] == encode(own, text)  # the answer is one further token
        if task is ioi:
            first, second, third = names_in(text)
            assert third in (first, second) and {third, answer.strip()} == {first, second}
        else:
            assert year_of(text)[1] < int(answer) <= 99
    used = {i for text, answer in drawn for i in encode(own, text + answer)}
    # "00" and "01" are only wrong answers; every other word of the vocabulary is used.
    assert {own.convert_ids_to_tokens(i) for i in range(2, len(own))} - {
        own.convert_ids_to_tokens(i) for i in used
    } <= {"00", "01", "02"}


# Facts


def test_facts_subject_answers_and_counterfactuals(gpt2, facts_file):
    rows = {row["prompt"]: row for row in map(json.loads, facts_file.read_text().splitlines())}
    usable = 0
    for split in SPLITS:
        prompts = generate("facts", settings(None, path=facts_file), gpt2, 0, split)
        by_subject = {row["subject"]: row for row in rows.values()}
        split_subjects = {rows[text]["subject"] for text in prompts.text}
        for text, tokens, length, other, (start, end), right, wrong in zip(
            prompts.text, prompts.tokens, prompts.lengths, prompts.counterfactual, prompts.subject,
            prompts.answers, prompts.wrong_answers, strict=True,
        ):  # fmt: skip
            row = rows[text]
            assert gpt2.decode(tokens[start:end]).strip() == row["subject"]
            assert (
                gpt2.decode(tokens[1:start]) + gpt2.decode(tokens[start:end]) + gpt2.decode(tokens[end:length]) == text
            )
            assert right.tolist() == gpt2(" " + row["answer"], add_special_tokens=False)["input_ids"][:1]
            before, after = text.split(row["subject"])
            replaced = gpt2.decode(other[1:length])
            assert replaced.startswith(before) and replaced.endswith(after)
            new = replaced[len(before) : len(replaced) - len(after)]
            assert new != row["subject"] and new in split_subjects
            if wrong[0] == -1:
                assert by_subject[new]["relation"] != row["relation"] or by_subject[new]["answer"] == row["answer"]
            else:
                assert by_subject[new]["relation"] == row["relation"]
                assert (
                    wrong.tolist() == gpt2(" " + by_subject[new]["answer"], add_special_tokens=False)["input_ids"][:1]
                )
        assert (
            prompts.meta["n_rows"] == prompts.meta["n_no_counterfactual"] + len(prompts.text)
            and prompts.meta["n_wrong"] == 0
        )
        usable += prompts.meta["n_rows"]
    assert usable == len(rows) == 60


def test_facts_prefer_the_same_relation_and_another_answer(gpt2, facts_file):
    every = read_facts_file(facts_file)
    fact_of = {fact.prompt: fact for fact in every}

    def length(text):
        return len(gpt2(text)["input_ids"])

    for split in SPLITS:
        prompts = generate("facts", settings(None, path=facts_file), gpt2, 0, split)
        members = {
            fact.subject
            for fact, its in zip(every, facts.split_facts(every, 0, "subjects"), strict=True)
            if its == split
        }
        for text, wrong in zip(prompts.text, prompts.wrong_answers[:, 0], strict=True):
            own = fact_of[text]
            rivals = [
                f for f in every if f.subject in members and f.relation == own.relation and f.answer != own.answer
            ]
            assert (wrong >= 0) == any(
                length(text.replace(own.subject, rival.subject)) == length(text) for rival in rivals
            )
        assert (
            len(set(prompts.wrong_answers[:, 0].tolist())) >= len(prompts.text) // 4
        )  # not one counterfactual subject for all


def test_facts_without_relations_have_no_wrong_answers(gpt2, facts_file, tmp_path):
    path = tmp_path / "plain.jsonl"
    path.write_text(
        "\n".join(
            json.dumps({k: v for k, v in f._asdict().items() if k != "relation"}) for f in read_facts_file(facts_file)
        )
    )
    prompts = generate("facts", settings(None, path=path), gpt2, 0, "train")
    assert (prompts.wrong_answers == -1).all() and len(prompts.text) > 20


def test_one_usable_fact_is_too_few(gpt2, tmp_path, monkeypatch):
    path = tmp_path / "facts.csv"
    path.write_text("subject,prompt,answer\nOslo,Oslo is in,Norway\nParis,They saw Paris in,France\n")
    monkeypatch.setattr(facts, "split_facts", lambda facts, seed, unseen: ["test"] * len(facts))
    # First in a sentence, "Oslo" is two tokens and "Paris" one; later both are one: only the second fact has a
    # counterfactual.
    with pytest.raises(
        UserError,
        match=r"gives 1 usable facts in the test split "
        r"\(n_rows 2, n_wrong 0, n_no_counterfactual 1, n_usable 1, n_straddling 0\)",
    ):
        generate("facts", settings(None, path=path), gpt2, 0, "test")


def test_facts_splits_are_by_subject(gpt2, facts_file):
    rows = {fact.prompt: fact.subject for fact in read_facts_file(facts_file)}
    subjects = [
        {rows[text] for text in generate("facts", settings(None, path=facts_file), gpt2, 1, s).text} for s in SPLITS
    ]
    assert not subjects[0] & subjects[1] and not subjects[0] & subjects[2] and not subjects[1] & subjects[2]
    assert 20 < len(subjects[0]) <= 27 and len(subjects[1]) <= 9 and len(subjects[2]) <= 9  # of 45: 60 %, 20 %, 20 %


def test_tokens_keep_their_leading_space(stories, gpt2, words):
    ids_of = lambda tokenizer: tokenizer("Once upon a time", add_special_tokens=False)["input_ids"]  # noqa: E731
    for tokenizer in (stories, gpt2):
        texts = [token_text(tokenizer, id_) for id_ in ids_of(tokenizer)]
        assert "".join(texts).strip() == "Once upon a time" and texts[1].startswith(" ")
    assert token_text(words, words.convert_tokens_to_ids("war")) == "war"


def test_facts_deal_every_relation_to_every_split(facts_file):
    every = read_facts_file(facts_file)
    for seed in range(3):
        split_of = facts.split_facts(every, seed, "subjects")
        for relation in {fact.relation for fact in every}:
            own = {its for fact, its in zip(every, split_of, strict=True) if fact.relation == relation}
            assert own == set(SPLITS), f"{relation} is missing in {set(SPLITS) - own}"
    assert facts.split_facts(every, 0, "subjects") != facts.split_facts(every, 1, "subjects")


def test_facts_with_unseen_relations_share_neither_subjects_nor_relations(gpt2, facts_file, tmp_path):
    every = read_facts_file(facts_file)
    split_of = facts.split_facts(every, 0, "subjects_and_relations")
    parts = [[fact for fact, its in zip(every, split_of, strict=True) if its == split] for split in SPLITS]
    for field in ("subject", "relation"):
        a, b, c = ({getattr(fact, field) for fact in part} for part in parts)
        assert a and not (a & b or a & c or b & c), field
    left = [fact for fact, its in zip(every, split_of, strict=True) if not its]
    assert len(left) + sum(map(len, parts)) == len(every) and left
    prompts = generate("facts", settings(None, path=facts_file, unseen="subjects_and_relations"), gpt2, 0, "train")
    assert prompts.meta["n_straddling"] == len(left) and prompts.meta["n_rows"] == len(parts[0])
    path = tmp_path / "plain.csv"
    path.write_text("subject,prompt,answer\nParis,Paris is in,France\nRome,Rome is in,Italy\n")
    with pytest.raises(
        UserError, match=r"tasks.facts.unseen: 'subjects_and_relations', but the file has 0 relations and facts without"
    ):
        generate("facts", settings(None, path=path, unseen="subjects_and_relations"), gpt2, 0, "train")


def test_facts_keep_the_whole_answer(gpt2, facts_file):
    rows = {row["prompt"]: row for row in map(json.loads, facts_file.read_text().splitlines())}
    prompts = generate("facts", settings(None, path=facts_file), gpt2, 0, "train")
    for text, first, whole in zip(prompts.text, prompts.answers, prompts.continuation, strict=True):
        assert gpt2.decode(ids(whole)) == " " + rows[text]["answer"] and first[0] == whole[0]
    ioi_prompts = generate("ioi", settings(20), gpt2, 0, "test")
    assert (ioi_prompts.continuation[:, 0] == ioi_prompts.answers[:, 0]).all()


def test_facts_span_with_a_sentencepiece_tokenizer(stories, facts_file):
    prompts = generate("facts", settings(None, path=facts_file), stories, 0, "train")
    subjects = {fact.prompt: fact.subject for fact in read_facts_file(facts_file)}
    of_text = [subjects[text] for text in prompts.text]
    assert len(set(zip(prompts.cluster.tolist(), of_text, strict=True))) == len(set(of_text)) < len(of_text)
    assert len(set(prompts.cluster.tolist())) == len(set(of_text)), "facts about one subject are one cluster"
    for tokens, text, (start, end) in zip(prompts.tokens, prompts.text, prompts.subject, strict=True):
        assert stories.decode(tokens[start:end]).strip() == subjects[text]
        assert tokens[0] == stories.bos_token_id and start >= 1


def test_facts_that_the_model_does_not_know_are_left_out(gpt2, facts_file):
    every = generate("facts", settings(None, path=facts_file), gpt2, 0, "train")
    answer_of = dict(zip(every.text, every.answers[:, 0], strict=True))

    def complete(tokens, lengths):
        assert tokens.dtype == lengths.dtype == np.int32 and len(tokens) == len(lengths) == every.meta["n_rows"]
        texts = [gpt2.decode(row[1:n]) for row, n in zip(tokens, lengths, strict=True)]
        return np.array([answer_of.get(text, -5) if "field" in text or "school" in text else 0 for text in texts])

    kept = generate("facts", settings(None, path=facts_file), gpt2, 0, "train", complete)
    assert kept.text and all("field" in text or "school" in text for text in kept.text)
    assert kept.meta["n_rows"] == kept.meta["n_wrong"] + kept.meta["n_no_counterfactual"] + len(kept.text)
    assert kept.meta["n_wrong"] > 0
    with pytest.raises(
        UserError, match=r"gives 0 usable facts in the train split \(n_rows \d+, n_wrong \d+,.*at least 2 are needed"
    ):
        generate(
            "facts",
            settings(None, path=facts_file),
            gpt2,
            0,
            "train",
            lambda tokens, lengths: np.zeros(len(tokens), np.int32),
        )


def test_facts_limits_are_upper_limits(gpt2, facts_file):
    assert len(generate("facts", settings(3, path=facts_file), gpt2, 0, "train").text) == 3
    every = generate("facts", settings(None, path=facts_file), gpt2, 0, "train")
    assert generate("facts", settings(10_000, path=facts_file), gpt2, 0, "train").digest() == every.digest()


def test_facts_layouts_agree(tmp_path, facts_file):
    every = read_facts_file(facts_file)
    table, rome = tmp_path / "facts.csv", tmp_path / "known.json"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows(
            [("relation", "prompt", "extra", "answer", "subject"), *((f[3], f[1], "x", f[2], f[0]) for f in every)]
        )
    items = [
        {
            "known_id": i,
            "subject": f[0],
            "attribute": f[2],
            "template": "{}",
            "prediction": "x",
            "prompt": f[1],
            "relation_id": f[3],
        }
        for i, f in enumerate(every)
    ]
    rome.write_text(json.dumps(items, indent=1))
    assert read_facts_file(table) == read_facts_file(rome) == every
    table.write_text(
        "subject,prompt,answer\nParis,Paris is in,France\nParis,Paris is in,Texas\nRome, Rome is in ,Italy\n"
    )
    assert read_facts_file(table) == [("Paris", "Paris is in", "France", ""), ("Rome", "Rome is in", "Italy", "")]


def test_facts_bad_rows_are_listed_with_their_lines(tmp_path):
    path = tmp_path / "facts.csv"
    path.write_text(
        "subject,prompt,answer\nParis,Paris is in,France\nRome,It is in,Italy\n,x,y\nOslo,Oslo\n" + "a,b,c\n" * 20
    )
    with pytest.raises(UserError) as error:
        read_facts_file(path)
    message = str(error.value)
    assert f"tasks.facts.path: {path} has 23 bad rows" in message
    assert (
        "line 3: the prompt 'It is in' does not contain the subject 'Rome'; line 4: no subject; line 5: no answer; "
        "line 6" in message
    )
    assert "line 12" in message and "line 13" not in message
    lines = tmp_path / "facts.jsonl"
    lines.write_text('{"subject": "a", "prompt": "a is", "answer": "b"}\n\nnot json\n[1]\n')
    with pytest.raises(UserError, match=r"2 bad rows .*line 3: not a JSON object; line 4: not a JSON object"):
        read_facts_file(lines)


def test_facts_answers_have_three_names_and_an_indented_object_is_none_of_the_layouts(tmp_path):
    row = {"subject": "Rome", "prompt": "Rome is in"}
    for name in ("answer", "attribute", "object"):
        (tmp_path / "one.jsonl").write_text(json.dumps(row | {name: "Italy"}))
        assert read_facts_file(tmp_path / "one.jsonl")[0].answer == "Italy"
    (tmp_path / "all.json").write_text(json.dumps({"facts": [row | {"answer": "Italy"}]}, indent=2))
    with pytest.raises(UserError, match=r"all.json is one JSON object over several lines; allowed: a JSON list"):
        read_facts_file(tmp_path / "all.json")


def test_facts_file_errors(tmp_path, gpt2, words):
    with pytest.raises(UserError, match=r"tasks.facts.path: cannot read .*none.csv: No such file"):
        read_facts_file(tmp_path / "none.csv")
    broken = tmp_path / "broken.json"
    broken.write_text('[{"subject": ')
    with pytest.raises(UserError, match=r"broken.json is not JSON"):
        read_facts_file(broken)
    few = tmp_path / "few.csv"
    few.write_text("subject,prompt,answer\nParis,Paris is in,France\nRome,Rome is in,Italy\n")
    with pytest.raises(UserError, match=r"gives 0 usable facts in the test split \(n_rows 1"):
        generate("facts", settings(None, path=few), gpt2, 0, "test")
    few.write_text("subject,prompt,answer\n" + "".join(f"war,the war from {y} to,zebra\n" for y in range(10, 40)))
    with pytest.raises(UserError, match="no token for the answer 'zebra'"):
        generate("facts", settings(None, path=few), words, 0, "train")


# Text


@pytest.mark.parametrize("name", ["stories", "gpt2"])
def test_text_windows(name, request):
    tokenizer = request.getfixturevalue(name)
    path = shared("text/tinystories_1000.json")
    prompts = generate("text", settings(100, path=path, n_tokens=16), tokenizer, 0, "validation")
    passages = [passage.strip() for passage in json.loads(path.read_text())]
    encoded = [tokenizer(passage, add_special_tokens=False)["input_ids"] for passage in passages]

    places = {}  # window -> passage and offset of each of its occurrences
    for i, row in enumerate(encoded):
        for at in range(0, len(row) - 14, 15):
            places.setdefault(tuple(row[at : at + 15]), []).append((i, at))
    for tokens, other, right in zip(prompts.tokens, prompts.counterfactual, prompts.answers, strict=True):
        own, others = places[tuple(tokens[1:])], places[tuple(other[1:])]
        assert (
            split_of(passages[own[0][0]]) == split_of(passages[others[0][0]]) == "validation"
            and own[0][0] != others[0][0]
        )
        assert right[0] in [encoded[i][at + 15] for i, at in own if at + 15 < len(encoded[i])]
    owners = [places[tuple(tokens[1:])][0][0] for tokens in prompts.tokens]
    assert prompts.cluster.tolist() == owners, "windows of one passage are one cluster"
    assert prompts.tokens.shape == (100, 16) and (prompts.lengths == 16).all()
    assert (prompts.tokens[:, 0] == tokenizer.bos_token_id).all() and (
        prompts.counterfactual[:, 0] == tokenizer.bos_token_id
    ).all()
    assert (prompts.wrong_answers == -1).all() and (prompts.subject == -1).all()


def test_text_windows_shared_by_passages_stay_in_one_split(tmp_path, gpt2):
    path = tmp_path / "t.json"
    passages = [
        f"Once upon a time there was a dog called number {i} who liked to run around the house." for i in range(200)
    ]
    path.write_text(json.dumps(passages))
    seen = [set(generate("text", settings(5, path=path, n_tokens=6), gpt2, 0, split).text) for split in SPLITS]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]


def test_text_layouts(tmp_path, gpt2):
    passages = [f"Passage {i} begins here.\nIt tells of {i} cats and {i + 7} dogs and then it ends." for i in range(60)]
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, passage in enumerate(passages):
        (folder / f"{i:02}.txt").write_text(passage)
    (folder / "notes.md").write_text("not a passage")
    (tmp_path / "one.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n \r\n".join(passages).encode())
    (tmp_path / "list.json").write_text(json.dumps(passages))
    for name in ("folder", "one.txt", "list.json"):
        assert read_passages(tmp_path / name) == passages
    assert generate("text", settings(8, path=tmp_path / "folder", n_tokens=8), gpt2, 0, "test").meta["n_passages"] == 60


def test_lines_are_passages_where_asked(tmp_path):
    (tmp_path / "t.txt").write_text("one\ntwo\n\nthree \r\n")
    assert read_passages(tmp_path / "t.txt") == ["one\ntwo", "three"]
    assert read_passages(tmp_path / "t.txt", "lines") == ["one", "two", "three"]


def test_windows_begin_where_asked(tmp_path, gpt2):
    passages = [" ".join(f"{i}x{k}" for k in range(30)) for i in range(10, 70)]
    path = tmp_path / "t.json"
    path.write_text(json.dumps(passages))
    encoded = [gpt2(passage, add_special_tokens=False)["input_ids"] for passage in passages]

    def starts(where, seed=0):
        """Places in their passages of all training windows, by passage."""
        prompts = generate("text", settings("all", path=path, n_tokens=9, windows=where), gpt2, seed, "train")
        places = {}
        for owner, tokens in zip(prompts.cluster.tolist(), prompts.tokens[:, 1:].tolist(), strict=True):
            row = encoded[owner]
            places.setdefault(owner, []).append(next(at for at in range(len(row)) if row[at : at + 8] == tokens))
        return {owner: sorted(found) for owner, found in places.items()}

    side_by_side, first, anywhere = (starts(where) for where in ("side_by_side", "first", "anywhere"))
    assert set(side_by_side) == set(first) == set(anywhere)
    for owner, row in enumerate(encoded):
        if owner in first:
            assert first[owner] == [0] and side_by_side[owner] == list(range(0, len(row) - 8, 8))
            begin = anywhere[owner][0]
            assert 0 <= begin < 8 and anywhere[owner] == list(range(begin, len(row) - 8, 8))
    assert len({found[0] for found in anywhere.values()}) > 4
    assert starts("anywhere") == anywhere != starts("anywhere", seed=1)


def test_text_counterfactuals_come_from_another_passage(tmp_path, gpt2):
    path = tmp_path / "t.json"
    animals = ("cat", "dog", "bird", "fish", "hen", "bear", "lion")
    # By their hashes, three of these passages are in the train split, and two in each of the others.
    passages = [" ".join(f"One {animal} and {i} more" for i in range(40)) for animal in animals]
    train = [1, 2, 3]
    assert [i for i in range(7) if split_of(passages[i]) == "train"] == train
    path.write_text(json.dumps(passages))
    prompts = generate("text", settings(20, path=path, n_tokens=6), gpt2, 0, "train")
    at = [
        [f" {animal}" in gpt2.decode(row) for animal in animals] for row in (*prompts.tokens, *prompts.counterfactual)
    ]
    owners = [row.index(True) for row in at]
    assert {*owners} == {*train} and all(own != other for own, other in zip(owners[:20], owners[20:], strict=True))
    path.write_text(json.dumps([passages[train[0]]]))
    with pytest.raises(
        UserError, match=r"has 1 passages of at least 6 tokens .* in the train split, out of 1 passages .* at least 2"
    ):
        generate("text", settings(1, path=path, n_tokens=6), gpt2, 0, "train")


def test_text_leaves_out_passages_with_unknown_words(tmp_path, words):
    path = tmp_path / "t.json"
    path.write_text(
        json.dumps(
            [f"The war lasted from the year 17{i} to the year 18{i}" for i in range(10, 60)] + ["The zebra lasted " * 9]
        )
    )
    for split in SPLITS:
        prompts = generate("text", settings("all", path=path, n_tokens=5), words, 0, split)
        assert prompts.meta["n_unknown"] == 1 and words.unk_token_id not in prompts.tokens
        assert len(set(prompts.text)) == prompts.meta["n_windows"]  # each window once


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*t.txt: No such file"),
        (b"", "holds no text"),
        (b" \n\n ", "holds no text"),
        (b"good \xff bad", r"t.txt is not UTF-8 text \(byte 0xff at offset 5\)"),
        (
            b"too short\n\nto be of use",
            r"has 0 passages of at least 9 tokens \(tasks.text.n_tokens\) in the train split, out of 2 passages",
        ),
    ],
)
def test_text_errors(tmp_path, gpt2, content, message):
    path = tmp_path / "t.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"tasks\.text\.path: .*" + message):
        generate("text", settings(path=path, n_tokens=9), gpt2, 0, "train")


def test_more_text_errors(tmp_path, gpt2):
    path = tmp_path / "t.json"
    for content, message in (
        ("{", "is not JSON"),
        ('{"a": 1}', "not a JSON list of strings"),
        ("[1]", "not a JSON list of strings"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            generate("text", settings(path=path, n_tokens=9), gpt2, 0, "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no text"):
        generate("text", settings(path=tmp_path / "empty", n_tokens=9), gpt2, 0, "train")
    path = shared("text/tinystories_1000.json")
    wanted = rf"tasks.text: n_train {10**6}, n_validation {10**6}, n_test {10**6} wanted; {path} has "
    with pytest.raises(UserError, match=wanted + r"\d+ train, \d+ validation, \d+ test distinct windows; allowed: at"):
        generate("text", settings(10**6, path=path, n_tokens=64), gpt2, 0, "test")


def test_counts_of_text_may_be_shares(tmp_path, gpt2):
    path = tmp_path / "t.json"
    path.write_text(json.dumps([" ".join(f"{i}x{k}" for k in range(30)) for i in range(10, 70)]))
    asked = settings("all", path=path, n_tokens=9)
    asked.n_validation = 0.5
    every, half = (generate("text", asked, gpt2, 0, split) for split in ("train", "validation"))
    assert len(every.tokens) == every.meta["n_windows"] and len(set(every.text)) == len(every.text)
    assert len(half.tokens) == round(0.5 * half.meta["n_windows"]) > 2
    given = parse_config({"model": "demo", "tasks": {"text": {"path": path, "n_tokens": 9, "n_train": 0.5}}})
    counted = Case(given, known_sizes(given), gpu=False).n_prompts("text")
    assert 2 <= counted[0] < len(every.tokens) and counted[1:] == (128, 500), "one word or more is a token"
    with pytest.raises(UserError, match=r"tasks.text.n_test: .*1.5; allowed: a whole number of at least 2, a share"):
        parse_config({"model": "demo", "tasks": {"text": {"n_test": 1.5}}})
