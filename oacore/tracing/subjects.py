"""What subjects look like to a model: moments of their token embeddings over the training facts."""

from dataclasses import dataclass

from torch import Tensor

from oacore.engine.forward import embed_tokens
from oacore.models.weights import Model
from oacore.tracing.recall import Recall


@dataclass(frozen=True)
class SubjectStatistics:
    """Moments of the token embeddings of subjects, over every subject token of the training facts."""

    mean: Tensor  # [d]
    std: Tensor  # [d] per coordinate
    scalar_std: float  # of all coordinates together, about their common mean: ROME's sigma


def subject_statistics(model: Model, train: Recall) -> SubjectStatistics:
    """The moments over the subject tokens of these facts, summed in float64."""
    values = embed_tokens(model, train.tokens[train.in_subject]).double()  # [n, d]
    return SubjectStatistics(values.mean(0).float(), values.std(0).float(), float(values.std()))
