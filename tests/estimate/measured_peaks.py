"""Run the stages' library functions on a scaled-down Llama-3-8B and print their peak memory:
`python tests/estimate/measured_peaks.py fp32`.

A script of its own, since peaks want a fresh process: VmHWM is set back before each case (/proc/self/clear_refs), and
MALLOC_MMAP_THRESHOLD_ must be small, or glibc keeps freed tensors and the peak is that of an earlier case.

Prints one JSON object per case: its name, measured bytes over the process before the model, predicted bytes by part.
"""

import ctypes
import gc
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from oacore.ablation import gaps, optimal
from oacore.ablation.components import Component, components_of
from oacore.circuits.constants import constant_scales
from oacore.circuits.eap import eap_ig_scores
from oacore.circuits.evaluate import circuit_losses, refit_constants
from oacore.circuits.learn import learn
from oacore.circuits.passes import Examples, Passes
from oacore.circuits.replacements import Replacements, TrainingPrompts, starting_constants
from oacore.circuits.search import Knob
from oacore.circuits.ugs import UniformSampler
from oacore.config.ablation import Method
from oacore.config.circuits import EDGE_ABLATIONS
from oacore.config.lenses import LENSES, lens_and_init
from oacore.config.read import parse_config
from oacore.engine.activations import read_final, read_statistics, write_activations
from oacore.engine.clean import Batch, clean_pass
from oacore.engine.masked import Engine
from oacore.engine.statistics import Statistics
from oacore.estimate import circuits, table
from oacore.estimate.case import Case
from oacore.estimate.need import Parts
from oacore.estimate.sizes import Sizes, number_bytes
from oacore.lenses.fit import fit_lens
from oacore.lenses.lens import LensSources
from oacore.lenses.rows import RowCache
from oacore.models.load import canonical
from oacore.store.provenance import Provenance
from oacore.tasks.prompts import Prompts
from oacore.tracing.fit import fit_place_constants
from oacore.tracing.places import NOWHERE, place
from oacore.tracing.recall import recall_of
from oacore.tracing.subjects import subject_statistics

# Llama-3-8B is d 4096, f 14336, 32 heads of 128, 8 keys, V 128256, 32 layers: here d and f an eighth,
# heads and keys a quarter, V a sixteenth, and 4 layers: 22 M weights, a minute of two cores for all cases.
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 8016,
    "num_hidden_layers": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
CONFIG = {
    "model": "demo",  # its name alone: sizes are those above
    "device": "cpu",
    "tasks": {
        "ioi": {"n_train": 64, "n_validation": 16, "n_test": 48},
        "facts": {"n_train": 16, "n_validation": 8, "n_test": 8},
    },
    "limits": {"tokens_per_batch": 1344, "memory_gb": 0.25},
    "ablation": {
        "methods": ["resample", "counterfactual", "optimal"],
        "optimal": {"max_steps": 1, "batch_size": 8},
    },
    "circuits": {
        "methods": ["ugs", "eap_ig"],
        "lambdas": [1e-4, 1e-3],
        "sizes": [100, 1000],
        "n_prompts": 16,
        "masks": {"n_steps": 1, "n_samples": 4, "n_prompts": 4},
        "refit": {"max_steps": 1, "batch_size": 8},
    },
    "tracing": {
        "windows": [3],
        "positions": ["last"],
        "sites": ["mlp"],
        "fit": {"max_steps": 1, "batch_size": 8},
    },
    "lenses": {"oca": {"max_steps": 1}, "tuned": {"max_steps": 1}},
}


def status(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    return next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(key)
    )


def random_prompts(task: str, split: str, n: int, n_tokens: int, seed: int) -> Prompts:
    """Any tokens do: memory asks for shapes alone."""
    draw = torch.Generator().manual_seed(seed)
    tokens, other = (
        torch.randint(1, SHAPE["vocab_size"], (n, n_tokens), generator=draw).int().numpy() for _ in range(2)
    )
    tokens[:, 0] = other[:, 0] = 0
    ids = tokens[:, -1:].copy()
    lengths, subject = torch.full((n,), n_tokens).int().numpy(), torch.tensor([[2, 4]]).repeat(n, 1).int().numpy()
    about = {
        "task": task,
        "split": split,
        "text": ["-"] * n,
        "meta": {},
        "subject": subject,
        "continuation": ids,
        "cluster": torch.arange(n).int().numpy(),
    }
    return Prompts(
        tokens=tokens, lengths=lengths, counterfactual=other, answers=ids, wrong_answers=ids % 9 + 1, **about
    )


class Stages:
    """One model and its cases, in the order in which they need each other."""

    def __init__(self, dtype: str, folder: Path):
        self.config = parse_config(CONFIG | {"dtype": dtype})
        hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()
        sizes = Sizes.of(hf.config.to_dict(), number_bytes(self.config))
        self.model = canonical(hf.bfloat16() if dtype == "bf16" else hf)
        del hf
        self.case = Case(self.config, sizes, gpu=False)
        self.path, self.budget = folder / "activations.h5", self.config.limits.tokens_per_batch
        T = self.case.prompt_tokens("ioi")
        self.splits = {
            split: random_prompts("ioi", split, n, T, seed) for seed, (split, n) in enumerate(self.counts("ioi"))
        }
        self.facts = {
            split: random_prompts("facts", split, n, self.case.prompt_tokens("facts"), seed)
            for seed, (split, n) in enumerate(self.counts("facts"))
        }

    def counts(self, task: str) -> list[tuple[str, int]]:
        return list(zip(("train", "validation", "test"), self.case.n_prompts(task), strict=True))

    def batch(self, split: str, *, counterfactual: bool = False) -> Batch:
        prompts = self.splits[split]
        tokens = torch.from_numpy(prompts.counterfactual if counterfactual else prompts.tokens).long()
        return Batch(tokens, torch.from_numpy(prompts.lengths).long())

    def statistics(self) -> Statistics:
        return read_statistics(self.path)

    def first_heads(self, n: int) -> list[Component]:
        """Of layer 0, where the most blocks follow: all components would take the same memory, and minutes."""
        return components_of(self.model, ("head",))[:n]

    def activations(self) -> None:
        write_activations(self.path, self.model, self.splits, Provenance(), tokens_per_batch=self.budget)

    def optimal(self) -> None:
        items, statistics = self.first_heads(8), self.statistics()
        start = optimal.starting_means(self.model, items, statistics, positional=False)
        batches = self.batch("train"), self.batch("validation")
        optimal.fit_constants(
            self.model,
            items,
            statistics,
            *batches,
            self.config.ablation.optimal,
            start=start,
            tokens_per_batch=self.budget,
        )

    def gaps(self) -> None:
        items, statistics = self.first_heads(2), self.statistics()
        fitted: dict[Method, torch.Tensor] = {
            "optimal": optimal.starting_means(self.model, items, statistics, positional=False)
        }
        prompts = self.batch("test"), self.batch("test", counterfactual=True)
        gaps.evaluate(
            self.model, items, self.config.ablation.methods, statistics, fitted, *prompts, tokens_per_batch=self.budget
        )

    def passes(self, engine: Engine) -> dict[str, Passes]:
        found = {}
        for split, prompts in self.splits.items():
            batch, other = self.batch(split), self.batch(split, counterfactual=True)
            answers, wrong = (torch.from_numpy(ids).long() for ids in (prompts.answers, prompts.wrong_answers))
            examples = Examples(batch, other, engine.prompts(batch), read_final(self.path, split), answers, wrong)
            found[split] = Passes(engine, examples, self.config.limits.memory_gb * 1e9)
        return found

    def circuits(self, method: str, ablation: str) -> None:
        settings, statistics = self.config.circuits, self.statistics()
        assert settings is not None
        engine = Engine(self.model)
        passes = self.passes(engine)
        train = passes["train"].examples
        start = starting_constants(ablation, TrainingPrompts(engine, statistics, train.batch, train.counterfactual))
        scales, graph = constant_scales(self.model, statistics), engine.graph
        if method == "judgement":
            n_circuits = self.case.n_circuits("ugs")
            masks = torch.rand(n_circuits, graph.n_destinations, graph.n_sources).gt(0.5) & torch.from_numpy(
                graph.valid.copy()
            )
            masks = graph.prune(masks).float()
            names = [str(index) for index in range(len(masks))]
            constants, _ = refit_constants(
                passes["train"], passes["validation"], start, scales, masks, settings.refit, names=names
            )
            circuit_losses(
                passes["test"], masks, Replacements(engine, ablation, passes["test"].examples, start), constants
            )
            return
        replacements = Replacements(engine, ablation, train, start)
        if method == "eap_ig":
            eap_ig_scores(passes["train"], replacements, "kl", torch.arange(settings.n_prompts), 2)
            return
        knobs = [Knob(value, 0) for value in settings.lambdas]
        fitted = ablation == "optimal"
        masks, fitted = settings.masks, ablation == "optimal"
        prices = list(settings.lambdas)
        learn(
            UniformSampler(), knobs, prices, passes["train"], replacements, scales, "kl", masks, train_constants=fitted
        )

    def tracing_fit(self) -> None:
        settings = self.config.tracing
        assert settings is not None
        recall = {split: recall_of(prompts, "first_token") for split, prompts in self.facts.items()}
        places = [place("mlp", "last", layer, 3, self.model.n_layers) for layer in range(self.model.n_layers)] + [
            NOWHERE
        ]
        statistics = subject_statistics(self.model, recall["train"])
        fit_place_constants(
            self.model,
            places,
            recall["train"],
            recall["validation"],
            statistics,
            settings.fit,
            tokens_per_batch=self.budget,
        )

    def lens_fit(self, name: str) -> None:
        settings = self.config.lenses
        assert settings is not None
        lens, init = lens_and_init(name)
        cache = RowCache(self.path, Provenance())
        sources = LensSources(self.model, cache, self.batch("train"), settings, self.config.seed, self.budget)
        fit_lens(LENSES[lens], init, sources, getattr(settings, LENSES[lens].fit))

    def cases(self) -> list[tuple[str, Callable[[], None], Parts]]:
        case, need = self.case, table.RULES
        found = [
            ("activations", self.activations, need["activations"](case, "ioi").parts),
            ("optimal", self.optimal, need["optimal"](case, "ioi", "optimal").parts),
            ("gaps", self.gaps, need["gaps"](case, "ioi").parts),
        ]
        for method, ablation in (("ugs", "optimal"), ("ugs", "counterfactual"), ("eap_ig", "counterfactual")):
            run = lambda method=method, ablation=ablation: self.circuits(method, ablation)  # noqa: E731
            cost = circuits.search(case, "ioi", method, ablation)
            found.append((f"{method} {ablation}", run, circuits.held(case, "ioi") | cost.parts))
        refit = case.config.circuits.refit
        cost = circuits.judgement(case, "ioi", case.n_circuits("ugs"), refit, EDGE_ABLATIONS["optimal"])
        run = lambda: self.circuits("judgement", "optimal")  # noqa: E731
        found.append(("judgement", run, circuits.held(case, "ioi") | cost.parts))
        found.append(("tracing_fit", self.tracing_fit, need["tracing_fit"](case, "facts").parts))
        for name in ("oca", "tuned-random"):
            found.append(
                (f"lens {name}", lambda name=name: self.lens_fit(name), need["lens_fit"](case, "ioi", name).parts)
            )
        return found


def main(dtype: str) -> None:
    libc = ctypes.CDLL(None)
    tiny = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SHAPE | {"num_hidden_layers": 1, "vocab_size": 97})
    ).eval()
    clean_pass(canonical(tiny), torch.zeros(2, 8, dtype=torch.long), torch.tensor([8, 8]))  # imports and work buffers
    del tiny
    with tempfile.TemporaryDirectory() as folder:
        gc.collect()
        libc.malloc_trim(0)
        base = status("VmRSS")
        for name, run, parts in Stages(dtype, Path(folder)).cases():
            gc.collect()
            libc.malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            run()
            print(json.dumps({"case": name, "measured": status("VmHWM") - base, "parts": parts}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
