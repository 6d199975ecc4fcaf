"""Does tracing find a recall whose layer is known? `tests/bench/bench_recall.py` prints peaks for all corruptions."""

import bench_recall
import pytest
from bench_recall import FIT, curves, peaks, splits

from planted.recall import recall


@pytest.mark.parametrize("seed", [1, 2])
def test_oat_peaks_at_the_recall_and_is_sharper_than_noise(seed, monkeypatch):
    """The paper's estimator finds the layers; chance between fits is what the cautious one is without."""
    monkeypatch.setattr(bench_recall, "FIT", FIT.model_copy(update={"max_steps": 60, "batch_size": 10}))
    planted = recall(seed, per_subject=2)
    table = curves(planted, seed, ("oat", "oat_cautious", "gaussian-3"), n_draws=3)
    found = {(name, site): rest for name, site, *rest in peaks(table)}
    for site, layer in (("mlp", planted.recall_layer), ("attention", planted.mover_layer)):
        for name in ("oat", "oat_cautious"):
            assert found[name, site][0] == layer and found[name, site][1] > 0.9
        assert found["oat_cautious", site][2] > 10 * found["gaussian-3", site][2], "ratio of peak to off-peak mass"


def test_the_facts_are_split_by_subject():
    (train, validation, test), numbers = splits(recall(0, per_subject=2), 0)
    spans = [
        {tuple(row[a:b]) for row, (a, b) in zip(part.tokens.tolist(), part.subject.tolist(), strict=True)}
        for part in (train, validation, test)
    ]
    assert not spans[0] & spans[1] and not spans[0] & spans[2] and not spans[1] & spans[2]
    assert len(set(numbers.tolist())) == len(spans[2]) == 7 and sum(map(len, spans)) == 36
