"""Uniform gradient sampling turned round: theta is the probability that an edge, or a component, stays, and a price is
paid for what does not.

Symbols: F fits, R samples of a fit's step, E edges, S sources, J destinations.
"""

import torch
from torch import Tensor

from oacore.circuits.edges import Edges
from oacore.circuits.learn import KEPT, Sampler, learn
from oacore.circuits.ugs import UniformSampler
from oacore.config.circuits import EDGE_ABLATIONS
from oacore.fits.resume import State
from oacore.models.graph import Graph
from oacore.removal.constants import with_components, with_edges
from oacore.removal.request import Chosen, RemovalRequest

# Logit: at 4 too few ablated edges are seen: 150 steps under zero ablation left the demo model's forgotten accuracy at
# 0.94 and 1.00, from 3 at 0.85 and 0.90.
START = 3.0


class EdgeSampler(UniformSampler):
    """The masks of UGS; lambda weighs the expected number of ablated edges instead of that of kept ones."""

    def start(self, n_fits: int, n_edges: int) -> State:
        """Logits at `START`, [F, E]."""
        return {"logit": torch.full((n_fits, n_edges), START)}

    def sample(self, parameters: State, noise: Tensor, second: State, schedule: Tensor) -> tuple[Tensor, Tensor]:
        """Masks alpha [F, R, E], and how much of each edge is ablated [F, E]."""
        alpha, theta = super().sample(parameters, noise, second, schedule)
        return alpha, 1 - theta


class ComponentSampler(EdgeSampler):
    """One mask for all edges out of a component; the input's are kept. A component's logit is the mean of its edges'
    parameters, which Adam moves alike.

    Args:
        source: [E] the source of each edge.
    """

    def __init__(self, source: Tensor, dynamic_window: bool = False):
        super().__init__(dynamic_window)
        self.source, n_edges = source, len(source)
        self.count = torch.bincount(source).to(torch.float32)  # [S] edges out of each
        order = torch.arange(n_edges, device=source.device)
        self.first = torch.full((len(self.count),), n_edges, device=source.device).scatter_reduce(
            0, source, order, "amin"
        )  # [S] whose noise is the component's

    def sample(self, parameters: State, noise: Tensor, second: State, schedule: Tensor) -> tuple[Tensor, Tensor]:
        """Masks alpha [F, R, E], and [F, E], over whose edges a component's share of being ablated is spread."""
        alpha, ablated = super().sample(
            self._by_source(parameters), noise[..., self.first], self._by_source(second), schedule
        )
        is_input = self.source == 0
        edges = alpha[..., self.source].masked_fill(is_input, 1.0)
        return edges, (ablated / self.count)[..., self.source].masked_fill(is_input, 0.0)

    def score(self, parameters: State) -> Tensor:
        """theta [F, E], of the edge's source."""
        return self._by_source(parameters)["logit"].sigmoid()[..., self.source].masked_fill(self.source == 0, 1.0)

    def _by_source(self, of_edges: State) -> State:
        """Means [F, S] of values [F, E]."""
        values = of_edges["logit"]
        total = values.new_zeros(len(values), len(self.count)).index_add(1, self.source, values)
        return {"logit": total / self.count}


def edges(request: RemovalRequest) -> list[Chosen]:
    """Ablations of edges, one for each price and seed."""
    scores = _scores(request, EdgeSampler(request.settings.masks.dynamic_window))
    return with_edges(request, (scores > KEPT) & _valid(request.behaviours.engine.graph))


def components(request: RemovalRequest) -> list[Chosen]:
    """Ablations of components, one for each price and seed."""
    graph, device = request.behaviours.engine.graph, request.behaviours.model.device
    source = Edges.of(graph, device).index % graph.n_sources
    scores = _scores(request, ComponentSampler(source, request.settings.masks.dynamic_window))
    return with_components(request, ((scores <= KEPT) & _valid(graph)).any(1))


def _scores(request: RemovalRequest, sampler: Sampler) -> Tensor:
    """theta [F, J, S] of all prices, learned side by side, 0 where there is no edge."""
    task, prices = request.behaviours.learning, [knob.value for knob in request.knobs]
    start = task.start(request.ablation)
    learned = learn(
        sampler,
        request.knobs,
        prices,
        task.passes["train"],
        task.replacements(request.ablation, "train", start),
        task.constant_scales,
        "kl",
        request.settings.masks,
        train_constants=EDGE_ABLATIONS[request.ablation].fitted,
        resumable=request.resumable.part("search", [[knob.value, knob.seed] for knob in request.knobs]),
        what=request.what,
    )
    return learned.scores.cpu()


def _valid(graph: Graph) -> Tensor:
    return torch.from_numpy(graph.valid.copy())
