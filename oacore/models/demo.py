"""The embedded model: a small GPT-2 and the synthetic language that it is trained on, so that the pipeline runs without
a download.

The language holds the sentences of the `ioi` and `greater_than` tasks, restricted to their `train` split, and facts
about people with a first and a last name, told in several wordings. One wording per fact is held out, to measure that
facts and not sentences were learned.

`python -m oacore.models.demo` trains the one that is shipped, with the default settings, in place of
`oacore/models/demo_model/`. To be done after every change of the language or of the defaults; a test notices. Training
amplifies rounding: on another machine it gives another model, and with it other numbers everywhere.
"""

import csv
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import oacore.tasks.greater_than as greater_than
import oacore.tasks.ioi as ioi
from oacore.config.model import SHIPPED_DEMO, DemoModel
from oacore.errors import UserError
from oacore.fits.resume import NOT_KEPT, Resumable, State
from oacore.models.architecture import demo_architecture
from oacore.progress import progress
from oacore.store.artefacts import digest_of_file, write_json
from oacore.store.atomic import atomic_directory
from oacore.tasks.prompts import encode, pad, words

BOS = "<bos>"
N_THREADS = 1  # fixed: another number rounds differently, and on a busy machine two wait for one another
# Of a batch: IOI, Greater-Than, facts. Copying a name is learned last and needs the most sentences; every fact must
# come often enough to be learned by heart.
SHARES = (0.52, 0.16, 0.32)
N_TEXT = 6000  # sentences of text.json, half of each kind; those that the model was trained on are not among them
ANSWER_WEIGHT = 4.0  # of the answer's loss beside the mean over all tokens: one token in 7 to 20 carries the task
FIRST_NAMES = words(
    "Anselm Bettina Corwin Delphine Emeric Fenella Godric Hedwig Ingmar Jolanta "
    "Kasimir Leopold Mirela Norbert Ottilie Percival Quentin Rosalind Sigmund Tatiana"
)
LAST_NAMES = words(
    "Abbot Brandt Calder Dunmore Ekstrom Farrow Grimaldi Holt "
    "Iverson Jarvis Kessler Lindqvist Marlowe Novak Orsini Pembroke"
)


class Relation(NamedTuple):
    """A kind of fact: how it is told, with a place for the subject, and its answers."""

    name: str
    wordings: tuple[str, ...]
    answers: tuple[str, ...]


RELATIONS = (
    Relation(
        "lives in",
        ("{} lives in the city of", "The home of {} is in", "You can meet {} in the streets of", "Friends visit {} in"),
        words("Lisbon Vienna Oslo Cairo Lima Kyoto Dublin Prague Havana Nairobi"),
    ),
    Relation(
        "works as",
        ("{} works as a", "By profession {} is a", "People know {} as a good", "Clients call {} the best"),
        words("baker judge pilot dentist farmer tailor painter nurse miner broker"),
    ),
)


class ToldFact(NamedTuple):
    """One fact in one wording."""

    subject: str
    prompt: str
    answer: str
    relation: str
    held_out: bool


def facts(n_subjects: int, seed: int) -> list[ToldFact]:
    """Every fact in every wording. Each fact has one held-out wording; the held-out wordings take turns.

    Raises:
        UserError: more subjects than names.
    """
    rng = np.random.default_rng(seed)
    names = [f"{first} {last}" for first, last in itertools.product(FIRST_NAMES, LAST_NAMES)]
    if n_subjects > len(names):
        raise UserError(f"demo_model.n_subjects: {n_subjects}; allowed: at most {len(names)}")
    told = []
    for index, chosen in enumerate(rng.permutation(len(names))[:n_subjects]):
        for relation in RELATIONS:
            answer = relation.answers[rng.integers(len(relation.answers))]
            for number, wording in enumerate(relation.wordings):
                held_out = number == index % len(relation.wordings)
                told.append(ToldFact(names[chosen], wording.format(names[chosen]), answer, relation.name, held_out))
    return told


def make_tokenizer() -> Any:
    """A word-level tokenizer over the language; years split in two-digit halves."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    sentences = [wording.format("") for relation in RELATIONS for wording in relation.wordings]
    spoken = {word for sentence in sentences for word in sentence.split()}
    answers = {answer for relation in RELATIONS for answer in relation.answers}
    vocabulary = sorted({*ioi.vocabulary(), *greater_than.vocabulary(), *spoken, *answers, *FIRST_NAMES, *LAST_NAMES})
    ids = {word: index for index, word in enumerate([BOS, "<unk>", *vocabulary])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    halves = pre_tokenizers.Split(Regex(r"\d{2}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), halves])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    tokens = {"bos_token": BOS, "eos_token": BOS, "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=True,  # "the garden, Tyler", not "the garden , Tyler"
        name_or_path="demo",
        **tokens,
    )


class Sentences(NamedTuple):
    """Sentences of one kind, answer included."""

    tokens: Tensor  # [B, T]
    lengths: Tensor  # [B]; the answer is at lengths - 1


def examples(tokenizer: Any, sentences: list[tuple[str, str]]) -> Sentences:
    """Encode (prompt, answer) pairs."""
    rows = [encode(tokenizer, f"{prompt}{answer}") for prompt, answer in sentences]
    return Sentences(torch.from_numpy(pad(rows, 0)).long(), torch.tensor([len(row) for row in rows]))


def training_sentences(settings: DemoModel) -> list[Iterator[tuple[str, str]]]:
    """Endless (prompt, answer) per kind of sentence: IOI, Greater-Than, facts."""
    rngs = [np.random.default_rng([settings.seed, kind]) for kind in range(3)]
    told = [fact for fact in facts(settings.n_subjects, settings.seed) if not fact.held_out]

    def told_facts() -> Iterator[tuple[str, str]]:
        while True:
            for index in rngs[2].permutation(len(told)):
                yield told[index].prompt, f" {told[index].answer}"

    return [ioi.sentences(rngs[0], "train"), greater_than.sentences(rngs[1], "train"), told_facts()]


def text(settings: DemoModel) -> list[str]:
    """Sentences of the language that training did not see, for tasks on plain text: IOI and Greater-Than in turn."""
    kinds = [
        task.sentences(np.random.default_rng([settings.seed, 50 + kind]), "test")
        for kind, task in enumerate((ioi, greater_than))
    ]
    pairs = itertools.islice(zip(*kinds, strict=True), N_TEXT // 2)
    return list(dict.fromkeys(prompt + answer for pair in pairs for prompt, answer in pair))


def loss_of(model: Any, batch: Sentences) -> Tensor:
    """Mean next-token loss in nats, with the answers weighted up."""
    logits = model(batch.tokens[:, :-1]).logits
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), batch.tokens[:, 1:], reduction="none"
    )  # [B, T - 1]
    real = torch.arange(1, batch.tokens.shape[1]) < batch.lengths[:, None]
    answer = losses.gather(1, batch.lengths[:, None] - 2).mean()
    return losses[real].mean() + ANSWER_WEIGHT * answer


def train_model(settings: DemoModel, tokenizer: Any, resumable: Resumable = NOT_KEPT) -> Any:
    """A trained Hugging Face GPT-2; the same settings give the same bits on one machine, interrupted or not."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(settings.seed)
    architecture: dict[str, Any] = {
        **demo_architecture(settings),
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = GPT2LMHeadModel(GPT2Config(**architecture, **special))
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, settings.learning_rate, total_steps=settings.n_steps, pct_start=0.15
    )
    sizes = [max(1, round(share * settings.batch_size)) for share in SHARES]
    done = 0
    if (state := resumable.load()) is not None:
        done = int(state["step"])
        _restore(state, model, optimiser, schedule)
    kinds = [
        itertools.islice(kind, done * size, None)
        for kind, size in zip(training_sentences(settings), sizes, strict=True)
    ]
    with progress(what="demo model", unit="steps", total=settings.n_steps, initial=done) as bar:
        for step in range(done, settings.n_steps):
            # One pass per kind: their lengths differ by three times, so one padded batch would be half padding.
            losses = [
                loss_of(model, examples(tokenizer, list(itertools.islice(kind, size))))
                for kind, size in zip(kinds, sizes, strict=True)
            ]
            optimiser.zero_grad(set_to_none=True)
            torch.stack(losses).sum().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            bar.set_postfix_str(f"loss {sum(loss.item() for loss in losses):.2f}", refresh=False)
            bar.update()
            resumable.save_sometimes(_state(step + 1, model, optimiser))
    return model.eval()


def _state(done: int, model: Any, optimiser: torch.optim.AdamW) -> State:
    """Weights and moments after so many steps."""
    state = {"step": torch.tensor(done)}
    for name, weight in model.named_parameters():
        moments = optimiser.state[weight]
        state |= {f"{name}/value": weight, f"{name}/first": moments["exp_avg"], f"{name}/second": moments["exp_avg_sq"]}
    return state


def _restore(state: State, model: Any, optimiser: torch.optim.AdamW, schedule: Any) -> None:
    """Go back to a state of `_state`: every rate follows from the step."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(state[f"{name}/value"])
            optimiser.state[weight] = {
                "step": state["step"].float(),
                "exp_avg": state[f"{name}/first"],
                "exp_avg_sq": state[f"{name}/second"],
            }
    done = int(state["step"])
    schedule.load_state_dict(schedule.state_dict() | {"last_epoch": done - 1, "_step_count": done})
    schedule.step()


@torch.no_grad()
def answer_log_probs(model: Any, batch: Sentences) -> Tensor:
    """Log-probabilities [B, V] where the answer is predicted."""
    logits = model(batch.tokens).logits[torch.arange(len(batch.tokens)), batch.lengths - 2]
    return torch.log_softmax(logits.float(), -1)


def measure(model: Any, tokenizer: Any, settings: DemoModel, n: int = 500) -> dict[str, float]:
    """Held-out IOI accuracy, probability mass on valid years, and accuracy on held-out wordings of facts."""
    rng = np.random.default_rng([settings.seed, 99])
    ioi_batch = examples(tokenizer, list(itertools.islice(ioi.sentences(rng, "test"), n)))
    ioi_answers = ioi_batch.tokens.gather(1, ioi_batch.lengths[:, None] - 1)[:, 0]
    years = list(itertools.islice(greater_than.sentences(rng, "test"), n))
    start = torch.tensor([int(prompt.split(" year ")[1][2:4]) for prompt, _ in years])
    ends = torch.tensor(tokenizer.convert_tokens_to_ids([f"{year:02}" for year in range(100)]))
    mass = answer_log_probs(model, examples(tokenizer, years)).exp()[:, ends]  # [n, 100]
    unseen = [(fact.prompt, f" {fact.answer}") for fact in facts(settings.n_subjects, settings.seed) if fact.held_out]
    fact_batch = examples(tokenizer, unseen)
    fact_answers = fact_batch.tokens.gather(1, fact_batch.lengths[:, None] - 1)[:, 0]
    return {
        "ioi_accuracy": (answer_log_probs(model, ioi_batch).argmax(-1) == ioi_answers).float().mean().item(),
        "year_mass": (mass * (torch.arange(100) > start[:, None])).sum(-1).mean().item(),
        "fact_accuracy": (answer_log_probs(model, fact_batch).argmax(-1) == fact_answers).float().mean().item(),
    }


def build_demo(directory: str | Path, settings: DemoModel, resumable: Resumable = NOT_KEPT) -> dict[str, float]:
    """Train the demo model and write it as a Hugging Face directory with `facts.csv` (all wordings), `labels.csv` (one
    relation as labelled examples), `text.json` (sentences) and `training.json`.

    Returns the held-out measurements.

    Raises:
        UserError: a measurement is below its required value; nothing is written then.
    """
    n_threads = torch.get_num_threads()
    torch.set_num_threads(N_THREADS)
    try:
        tokenizer = make_tokenizer()
        model = train_model(settings, tokenizer, resumable)
        measured = measure(model, tokenizer, settings)
    finally:
        torch.set_num_threads(n_threads)
    required = {
        "ioi_accuracy": settings.min_ioi_accuracy,
        "year_mass": settings.min_year_mass,
        "fact_accuracy": settings.min_fact_accuracy,
    }
    failed = [
        f"{name} is {measured[name]:.3f}, required {least:g}"
        for name, least in required.items()
        if measured[name] < least
    ]
    if failed:
        raise UserError(f"demo model: training failed: {'; '.join(failed)} (demo_model.n_steps: {settings.n_steps})")
    _write(Path(directory), model, tokenizer, settings, measured)
    return measured


def write_data(directory: Path, settings: DemoModel) -> None:
    """What the language has for tasks: `facts.csv`, `labels.csv` and `text.json`."""
    told = facts(settings.n_subjects, settings.seed)
    labelled = [fact for fact in told if fact.relation == RELATIONS[0].name]
    for name, header, rows in (
        ("facts.csv", ("subject", "prompt", "answer", "relation"), [fact[:4] for fact in told]),
        ("labels.csv", ("text", "label"), [fact[1:3] for fact in labelled]),
    ):
        with open(directory / name, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([header, *rows])
    (directory / "text.json").write_text(json.dumps(text(settings), indent=0) + "\n", encoding="utf-8")


def _write(directory: Path, model: Any, tokenizer: Any, settings: DemoModel, measured: dict[str, float]) -> None:
    """Into a temporary folder first, so that the directory is complete or absent."""
    with atomic_directory(directory) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_data(temporary, settings)
        files = {path.name: digest_of_file(path) for path in sorted(temporary.iterdir())}
        write_json(
            temporary / "training.json", {"settings": settings.model_dump(), "held_out": measured, "files": files}
        )


if __name__ == "__main__":
    print(build_demo(SHIPPED_DEMO, DemoModel()))
