"""The embedded model's language, and what its training promises; the trained model itself is tested in
tests/workflow.
"""

import itertools

import numpy as np
import pytest
import torch

from oacore.config.model import DemoModel
from oacore.errors import UserError
from oacore.fits import resume
from oacore.models import demo
from oacore.store.artefacts import read_tensors
from oacore.store.provenance import Provenance
from oacore.tasks import greater_than, ioi
from oacore.tasks.facts import Fact, split_facts
from oacore.tasks.prompts import SPLITS, split_of

SHORT = DemoModel(n_steps=3, batch_size=12)


@pytest.fixture(scope="module")
def tokenizer():
    return demo.make_tokenizer()


def test_every_word_of_the_language_is_one_token(tokenizer):
    rng = np.random.default_rng(0)
    told = [f"{fact.prompt} {fact.answer}" for fact in demo.facts(DemoModel().n_subjects, 0)]
    spoken = [
        prompt + answer
        for module in (ioi, greater_than)
        for prompt, answer in itertools.islice(module.sentences(rng, "train"), 50)
    ]
    for sentence in told + spoken:
        assert tokenizer.unk_token_id not in tokenizer(sentence).input_ids, sentence
    assert len(tokenizer("1743", add_special_tokens=False).input_ids) == 2
    assert tokenizer("The war").input_ids[0] == tokenizer.bos_token_id


def test_facts_have_two_token_subjects_and_one_held_out_wording_each(tokenizer):
    facts = demo.facts(DemoModel().n_subjects, 0)
    assert {len(tokenizer(fact.subject, add_special_tokens=False).input_ids) for fact in facts} == {2}
    assert len({fact.prompt for fact in facts}) == len(facts)
    for _, wordings in itertools.groupby(facts, key=lambda fact: (fact.subject, fact.relation)):
        assert sum(fact.held_out for fact in wordings) == 1
    held_out = [fact.prompt.replace(fact.subject, "{}") for fact in facts if fact.held_out]
    assert set(held_out) == {wording for relation in demo.RELATIONS for wording in relation.wordings}, (
        "every wording has its turn"
    )
    firsts = [fact.subject.split()[0] for fact in facts]
    assert max(firsts.count(name) for name in firsts) > 8, "a first name alone does not tell who it is"


def test_names_are_words_of_their_own():
    """A name that IOI or a fact's wording also has would carry another meaning into its facts."""
    told = [text for relation in demo.RELATIONS for text in (*relation.wordings, *relation.answers)]
    others = {*ioi.vocabulary(), *greater_than.vocabulary(), *(word for text in told for word in text.split())}
    names = (*demo.FIRST_NAMES, *demo.LAST_NAMES)
    assert not others & {*names} and len({*names}) == len(names)


def test_facts_have_enough_test_subjects_for_standard_errors_over_them():
    told = [Fact(*fact[:4]) for fact in demo.facts(DemoModel().n_subjects, 0)]
    subjects = {split: set() for split in SPLITS}
    for fact, split in zip(told, split_facts(told, 0, "subjects"), strict=True):
        subjects[split].add(fact.subject)
    assert len(subjects["test"]) >= 30 and len(subjects["validation"]) >= 30
    assert len(subjects["train"]) >= 2 * len(subjects["test"])


def test_training_never_sees_what_is_measured():
    kinds = demo.training_sentences(SHORT)
    for kind in kinds[:2]:
        assert {split_of(prompt) for prompt, _ in itertools.islice(kind, 200)} == {"train"}
    held_out = {fact.prompt for fact in demo.facts(SHORT.n_subjects, SHORT.seed) if fact.held_out}
    assert not held_out & {prompt for prompt, _ in itertools.islice(kinds[2], 1000)}


def test_training_is_bit_identical(tokenizer):
    torch.manual_seed(123)
    first = demo.train_model(SHORT, tokenizer).state_dict()
    torch.manual_seed(456)
    second = demo.train_model(SHORT, tokenizer).state_dict()
    other = demo.train_model(SHORT.model_copy(update={"seed": 1}), tokenizer).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_interrupted_training_goes_on_to_the_same_bits(tokenizer, tmp_path, monkeypatch):
    settings = SHORT.model_copy(update={"n_steps": 6})
    whole = demo.train_model(settings, tokenizer).state_dict()
    monkeypatch.setattr(resume, "SECONDS_BETWEEN_SAVES", 0.0)
    resumable = resume.Resumable.beside(tmp_path / "demo", Provenance(), "oacore.models.demo")
    calls, loss_of = itertools.count(), demo.loss_of

    def stops(model, batch):
        if next(calls) == 3 * 4:  # a pass for each kind of sentence
            raise KeyboardInterrupt
        return loss_of(model, batch)

    monkeypatch.setattr(demo, "loss_of", stops)
    with pytest.raises(KeyboardInterrupt):
        demo.train_model(settings, tokenizer, resumable)
    assert int(read_tensors(resumable.path)[1]["step"]) == 4
    steps = []
    monkeypatch.setattr(demo, "loss_of", lambda model, batch: steps.append(0) or loss_of(model, batch))
    resumed = demo.train_model(settings, tokenizer, resumable).state_dict()
    assert len(steps) == 3 * 2
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_model_that_learned_too_little_is_refused_and_not_written(tmp_path):
    with pytest.raises(
        UserError, match=r"training failed: ioi_accuracy is 0\.\d+, required 0\.98; year_mass .* fact_accuracy"
    ):
        demo.build_demo(tmp_path / "demo", SHORT)
    assert list(tmp_path.iterdir()) == []


def test_too_many_subjects():
    with pytest.raises(UserError, match=r"demo_model\.n_subjects: 1000; allowed: at most 320"):
        demo.facts(1000, 0)


def test_the_tokenizer_writes_as_people_do(tmp_path):
    """After it was saved and read, too."""
    from transformers import AutoTokenizer

    demo.make_tokenizer().save_pretrained(tmp_path)
    text = "When Mary and Tyler went to the garden, Tyler gave"
    for tokenizer in (demo.make_tokenizer(), AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer.decode(tokenizer(text).input_ids[1:]) == text
