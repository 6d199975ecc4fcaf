"""Memory and arithmetic of effects and interactions: every set of ablated edges is judged as a circuit is."""

from oacore.config.circuits import EDGE_ABLATIONS, EdgeAblation
from oacore.config.interactions import Interactions
from oacore.estimate.case import Case
from oacore.estimate.circuits import held, judgement
from oacore.estimate.need import Need


def interaction_ranking(case: Case, task: str) -> Need:
    """One mask for every head and MLP."""
    settings = _settings(case)
    return _need(case, "interaction_ranking", task, task, case.sizes.graph.n_sources - 1, settings.ablations[0])


def interactions(case: Case, task: str, ablation: EdgeAblation) -> Need:
    """Of k components k (k - 1) / 2 pairs, a total, direct and indirect effect each, and a path into every mediator, as
    if all components were in the first layer.
    """
    settings, graph = _settings(case), case.sizes.graph
    k = min(settings.n_components + len(settings.components), graph.n_sources)
    n_mediators = graph.n_layers if settings.mediators == "layer" else graph.n_sources - 1
    n_sets = k * (k - 1) // 2 + k * (3 + n_mediators)
    return _need(case, "interactions", task, f"{task} {ablation}", n_sets, ablation)


def _settings(case: Case) -> Interactions:
    assert case.config.interactions is not None
    return case.config.interactions


def _need(case: Case, rule: str, task: str, job: str, n_sets: int, ablation: EdgeAblation) -> Need:
    judged = judgement(case, task, n_sets, _settings(case).refit, EDGE_ABLATIONS[ablation])
    return Need(rule, job, held(case, task) | judged.parts, judged.flop, "limits.memory_gb", judged.refusal)
