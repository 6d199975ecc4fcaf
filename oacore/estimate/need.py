"""What one job needs."""

from dataclasses import dataclass

Parts = dict[str, float]  # bytes by what they hold

# The keys that lower a part, where it is not the key that lowers the rest of the job.
KEYS = {
    "weights": "dtype",
    "replacements": "circuits.n_prompts or masks.n_prompts",
    "making replacements": "circuits.n_prompts or masks.n_prompts",
    "masks": "circuits.lambdas or masks.n_samples",
    "constants": "lenses.lenses",
}


@dataclass(frozen=True)
class Need:
    """Memory and arithmetic of one job.

    Args:
        rule: its stage.
        job: what the stage is run for: task, method, ...
        parts: bytes at the fullest moment.
        flop: at most: fits may converge earlier.
        key: of the config; lowers the biggest part, but for those in `KEYS`.
        refusal: why the job can't run, if it can't.
    """

    rule: str
    job: str
    parts: Parts
    flop: float
    key: str
    refusal: str = ""

    @property
    def peak_bytes(self) -> float:
        """The sum of all parts."""
        return sum(self.parts.values())

    @property
    def biggest_part(self) -> str:
        """What most of the peak holds."""
        return max(self.parts, key=self.parts.__getitem__)

    @property
    def key_to_lower(self) -> str:
        """The key of the config that lowers the biggest part."""
        return KEYS.get(self.biggest_part, self.key)


def fullest(*moments: Parts) -> Parts:
    """That of several moments of a stage which holds most."""
    return max(moments, key=lambda parts: sum(parts.values()))
