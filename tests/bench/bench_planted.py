"""Edge AUROC of every circuit method against planted circuits, whose true edges are known.

    python tests/bench/bench_planted.py [--circuits induction chain] [--seeds 0 1 2] [--ablation optimal] [--methods
    exact ugs]

Learned masks are scored by the probability that they keep an edge, from one fit with one lambda for all circuits; ACDC
by the number of thresholds that do. Methods that train no constants take the mean where the ablation type is optimal.
`planted.circuit` says for which ablation types the truth holds.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from planted.circuit import Planted, auroc, chain, induction

from oacore.circuits import acdc
from oacore.circuits.constants import Constants, constant_scales
from oacore.circuits.eap import eap_ig_scores, eap_scores
from oacore.circuits.hcgs import HardConcreteSampler
from oacore.circuits.learn import Knob, Sampler, learn
from oacore.circuits.passes import Examples, Passes
from oacore.circuits.replacements import Replacements
from oacore.circuits.ugs import UniformSampler
from oacore.config.circuits import EDGE_ABLATIONS, EdgeAblation, MaskFit
from oacore.engine.clean import clean_pass
from oacore.engine.forward import at, final_norm
from oacore.engine.masked import Engine
from oacore.engine.statistics import Statistics

CIRCUITS = {"induction": induction, "chain": chain}
ABLATIONS = ("optimal", "mean", "counterfactual")
LAMBDA, STEPS, MEMORY_GB = 1e-3, 600, 1.0
THRESHOLDS = np.geomspace(1e-5, 1.0, 11)  # of ACDC, in nats
IG_STEPS = 5


class Setting:
    """What methods take: one planted circuit, one ablation type."""

    def __init__(self, planted: Planted, ablation: EdgeAblation):
        model, batch = planted.model, planted.prompts
        clean = clean_pass(model, batch.tokens, batch.lengths)
        values = {"input": clean.entering[0], "head": torch.stack(clean.z, 2), "mlp": torch.stack(clean.mlp, 2)}
        pooled = {name: value[:, 1:].flatten(0, 1) for name, value in values.items()}
        mean, std = ({name: getattr(value, moment)(0) for name, value in pooled.items()} for moment in ("mean", "std"))
        self.scales = constant_scales(model, Statistics(int(batch.lengths.min()), mean, std, {}, {}))
        start = Constants(*(mean[name].unsqueeze(-2)[None] for name in Constants._fields))
        engine = Engine(model)
        final = final_norm(model, at(clean.entering[-1], clean.last))[:, 0]
        examples = Examples(batch, planted.counterfactual, engine.prompts(batch), final, planted.answers, planted.wrong)
        self.passes = Passes(engine, examples, MEMORY_GB * 1e9)
        self.all = torch.arange(len(examples))
        self.replacements = Replacements(engine, ablation, examples, start)


def exact(setting: Setting, seed: int) -> np.ndarray:
    """KL [J, S] in nats of ablating one edge, for each: a pass of its own over all prompts."""
    passes, replacements = setting.passes, setting.replacements
    valid = passes.engine.graph.valid
    written = replacements.of(setting.all)
    scores = np.zeros(valid.shape)
    for j, s in np.argwhere(valid):
        mask = torch.tensor(valid, dtype=torch.float32)
        mask[j, s] = 0
        scores[j, s] = passes.losses(
            "kl", setting.all, setting.all, mask[None], written, owned=replacements.per_prompt
        ).mean()
    return scores


def eap(setting: Setting, seed: int) -> np.ndarray:
    return eap_scores(setting.passes, setting.replacements, "logit_diff", setting.all).numpy()


def eap_ig(setting: Setting, seed: int) -> np.ndarray:
    return eap_ig_scores(setting.passes, setting.replacements, "kl", setting.all, IG_STEPS).numpy()


def acdc_kept(setting: Setting, seed: int) -> np.ndarray:
    masks, _ = acdc.acdc(setting.passes, setting.replacements, THRESHOLDS.tolist(), setting.all[:16], "kl")
    return masks.sum(0)


def learned(sampler: Sampler) -> Callable[[Setting, int], np.ndarray]:
    def fit(setting: Setting, seed: int) -> np.ndarray:
        fitted = learn(
            sampler,
            [Knob(LAMBDA, seed)],
            [LAMBDA],
            setting.passes,
            setting.replacements,
            setting.scales,
            "kl",
            MaskFit(n_steps=STEPS),
            train_constants=EDGE_ABLATIONS[setting.replacements.ablation].fitted,
        )
        return fitted.scores[0].numpy()

    return fit


METHODS: dict[str, Callable[[Setting, int], np.ndarray]] = {
    "exact": exact,
    "eap": eap,
    "eap_ig": eap_ig,
    "acdc": acdc_kept,
    "ugs": learned(UniformSampler()),
    "hcgs": learned(HardConcreteSampler()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--circuits", nargs="+", choices=CIRCUITS, default=list(CIRCUITS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--ablation", choices=ABLATIONS, default="optimal")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # tiny models: a second thread only waits
    print(f"{arguments.ablation} ablation; lambda {LAMBDA:g}, {STEPS} steps")
    print("circuit    seed  method   AUROC  seconds")
    for circuit in arguments.circuits:
        for seed in arguments.seeds:
            planted = CIRCUITS[circuit](seed)
            setting = Setting(planted, arguments.ablation)
            for method in arguments.methods:
                start = time.perf_counter()
                scores = METHODS[method](setting, seed)
                seconds = time.perf_counter() - start
                quality = auroc(np.abs(scores), planted.true_edges, planted.model.graph.valid)
                print(f"{circuit:<10} {seed:>4}  {method:<8} {quality:.3f}  {seconds:7.1f}", flush=True)


if __name__ == "__main__":
    main()
