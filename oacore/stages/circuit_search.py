"""Find the circuits of one method under one ablation type: every knob and seed."""

import resource
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from oacore.artefacts import digest_of_tensors, write_json
from oacore.circuits import acdc, attribution, fixed
from oacore.circuits.circuit import by_size, by_threshold
from oacore.circuits.hcgs import HardConcreteSampler
from oacore.circuits.learn import Knob, Sampler, learn
from oacore.circuits.patching import Passes, Replacements
from oacore.circuits.topk import TopKSampler
from oacore.circuits.ugs import UniformSampler
from oacore.codehash import codehash
from oacore.config import FITTED, LEARNED, CircuitMethod, Circuits, Config, EdgeAblation
from oacore.errors import UserError
from oacore.layout import Layout, short_hash
from oacore.resume import Kept
from oacore.stages.circuit_setting import Found, Setting, bool_masks, check_sizes, circuit_folder
from oacore.stages.common import model_facts

KEPT = 0.5  # the one threshold for learned scores


def run(config: Config, task: str, method: CircuitMethod, ablation: EdgeAblation) -> None:
    """Write search.safetensors, and timing.json beside it, which no equal run repeats to the bit."""
    settings = config.circuits
    assert settings is not None
    layout = Layout(config)
    n_edges = model_facts(layout)["sizes"]["n_edges"]
    if method not in (*LEARNED, "acdc", "manual") or method == "topk":
        check_sizes(settings.sizes, n_edges)
    folder = circuit_folder(layout, task, method, ablation)
    setting = Setting.open(config, task)
    start = time.perf_counter()
    if method in LEARNED:
        found = _learned(setting, settings, method, ablation, _checkpoint(folder))
    else:
        found = _judged(setting, settings, method, ablation, folder)
    seconds = time.perf_counter() - start
    facts = {**setting.identity, "method": method, "ablation": ablation, "objective": settings.objective_of(method)}
    found.save(folder / "search.safetensors", facts)
    for checkpoint in folder.glob(".search-checkpoint*.safetensors"):
        checkpoint.unlink()
    timing = {"seconds": round(seconds, 3), "seconds_per_circuit": seconds / len(found.knobs), "peak_mb": peak_mb()}
    write_json(folder / "timing.json", {**facts, **timing})
    print(f"{task} {method} {ablation}: {len(found.knobs)} circuits of {', '.join(str(int(n)) for n in found.masks.sum((1, 2)))} edges")


def peak_mb() -> float:
    """Peak memory: of the GPU where there is one in use, else of this process."""
    if torch.cuda.is_initialized():
        return round(torch.cuda.max_memory_allocated() / 1e6, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1)


def _learned(setting: Setting, settings: Circuits, method: CircuitMethod, ablation: EdgeAblation, checkpoint: Path) -> Found:
    graph, masks = setting.engine.graph, settings.masks
    knobs = [Knob(value, seed) for value in settings.knobs(method) for seed in settings.seeds]
    trained = ablation in FITTED
    sampler: Sampler
    sizes = check_sizes(tuple(knob.value for knob in knobs), graph.n_edges) if method == "topk" else []
    if method == "topk":
        sampler = TopKSampler(torch.tensor(sizes, dtype=torch.float32), masks.dynamic_window)
    else:
        sampler = UniformSampler(masks.dynamic_window) if method == "ugs" else HardConcreteSampler()
    start = setting.start(ablation)
    learned = learn(
        sampler,
        knobs,
        [0.0] * len(knobs) if method == "topk" else [knob.value for knob in knobs],
        setting.passes["train"],
        setting.replacements(ablation, "train", start),
        setting.scales,
        settings.objective,
        masks,
        train_constants=trained,
        checkpoint=checkpoint,
        identity=short_hash([*_about(setting, settings, method, ablation), masks.model_dump(), [(k.value, k.seed) for k in knobs]]),
        what=f"{setting.task} {method} {ablation}",
    )
    scores = learned.scores.double().cpu().numpy()
    kept = by_size(graph, scores, np.array(sizes)) if method == "topk" else by_threshold(graph, scores, KEPT)
    curves = {"steps": learned.curve_steps, "losses": learned.curve_losses, "sizes": learned.curve_sizes}
    return Found(bool_masks(kept), learned.scores, [knob.value for knob in knobs], [knob.seed for knob in knobs], curves)


def _about(setting: Setting, settings: Circuits, method: CircuitMethod, ablation: EdgeAblation) -> list[object]:
    """What a checkpoint belongs to, whatever the method."""
    return [setting.identity, method, ablation, settings.objective, codehash("oacore.stages.circuit_search"), torch.__version__]


def _checkpoint(folder: Path, seed: int | str = "") -> Path:
    """Where a search is kept: learned masks of all seeds at once, others seed by seed."""
    return folder / f".search-checkpoint{seed}.safetensors"


def _judged(setting: Setting, settings: Circuits, method: CircuitMethod, ablation: EdgeAblation, folder: Path) -> Found:
    """Circuits of the methods that train nothing."""
    graph, passes, values = setting.engine.graph, setting.passes["train"], settings.knobs(method)
    masks, scores = [], []
    sizes = np.array(check_sizes(values, graph.n_edges)) if method not in ("acdc", "manual") else np.array([])
    for seed in settings.seeds:
        if method == "manual":
            kept = fixed.manual_ioi(graph)[None]
            found = kept.astype(float)
        elif method == "random":
            kept = fixed.random_circuits(graph, sizes.tolist(), seed)
            found = kept.astype(float)
        else:
            constants = setting.of_components(ablation)
            replacements = setting.replacements(ablation, "train", constants)
            chosen = _prompts(setting, settings, seed)
            if method == "acdc":
                identity = short_hash(
                    [*_about(setting, settings, method, ablation), values, chosen.tolist(), digest_of_tensors(constants._asdict())]
                )
                state = Kept(_checkpoint(folder, seed), identity)
                kept, found = acdc.acdc(passes, replacements, values, chosen, settings.objective, kept=state)
            else:
                ranking = _ranking(passes, replacements, method, chosen, settings).cpu().numpy()
                kept = by_size(graph, np.abs(ranking), sizes)
                found = np.broadcast_to(ranking, kept.shape)
        masks.append(kept)
        scores.append(found)
    n_seeds = len(settings.seeds)
    if not all(np.isfinite(found).all() for found in scores):
        raise UserError(f"{setting.task} {method} {ablation}: scores are not finite; allowed: a model with finite weights and activations")
    by_knob = [(knob, seed) for knob in range(len(values)) for seed in range(n_seeds)]
    return Found(
        bool_masks(np.stack([masks[seed][knob] for knob, seed in by_knob])),
        torch.from_numpy(np.stack([scores[seed][knob] for knob, seed in by_knob]).astype(np.float32)),
        [values[knob] for knob, _ in by_knob],
        [settings.seeds[seed] for _, seed in by_knob],
        {},
    )


def _ranking(passes: Passes, replacements: Replacements, method: CircuitMethod, chosen: Tensor, settings: Circuits) -> Tensor:
    """Scores [J, S] of a method that ranks edges."""
    objective = settings.objective_of(method)
    if method == "eap":
        return attribution.eap_scores(passes, replacements, objective, chosen)
    if method == "eap_ig":
        return attribution.eap_ig_scores(passes, replacements, objective, chosen, settings.ig_steps)
    return attribution.exact_scores(passes, replacements, objective, chosen)


def _prompts(setting: Setting, settings: Circuits, seed: int) -> Tensor:
    """The training prompts that edges are judged on: the first of the seed's own order."""
    order = torch.randperm(len(setting.passes["train"].examples), generator=torch.Generator().manual_seed(seed))
    return order[: settings.n_prompts].to(setting.engine.model.device)
