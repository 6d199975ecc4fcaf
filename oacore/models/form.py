"""Whether weights that were put together elsewhere are of a form that the engine computes. What they mean, the parity
gate sees.
"""

from torch import Tensor

from oacore.errors import UserError
from oacore.models.weights import ACTIVATIONS, Block, Model, Norm

# By the letters of the symbols that all modules share; G for KV, and P positions.
SHAPES = {"W_E": "Vd", "W_pos": "Pd", "W_U": "Vd", "b_U": "V"}
OF_BLOCK = {
    **{"W_Q": "dHk", "W_K": "dGk", "W_V": "dGk", "W_O": "Hkd", "b_Q": "Hk", "b_K": "Gk", "b_V": "Gk", "b_O": "d"},
    **{"W_in": "df", "W_gate": "df", "W_out": "fd", "b_in": "f", "b_out": "d"},
}
OF_NORMS = dict.fromkeys(("attention_norm", "mlp_norm", "attention_post_norm", "mlp_post_norm"), "d")
OF_HEADS = {"query_norm": "Hk", "key_norm": "Gk"}  # or k alone


class _Sizes:
    """What each letter stands for, by the first tensor that has it."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def check(self, name: str, tensor: Tensor | None, letters: str) -> None:
        """UserError unless the tensor is absent, or of floats and of this shape."""
        if tensor is None:
            return
        shape = list(tensor.shape)
        fits = len(shape) == len(letters) and all(
            self.known.setdefault(letter, size) == size for letter, size in zip(letters, shape, strict=True)
        )
        if not fits:
            allowed = ", ".join(
                f"{letter} = {self.known[letter]}" if letter in self.known else letter for letter in letters
            )
            raise UserError(f"register: {name} has the shape {shape}; allowed: [{allowed}]")
        if not tensor.is_floating_point():
            raise UserError(f"register: {name} is of {tensor.dtype}; allowed: floating point")

    def check_norm(self, name: str, norm: Norm | None, letters: str) -> None:
        """As `check`, of a norm's weight and bias."""
        if norm is not None:
            self.check(f"{name}.weight", norm.weight, letters)
            self.check(f"{name}.bias", norm.bias, letters)


def check_form(model: Model) -> None:
    """Hold shapes and parts against what `oacore.engine` computes.

    Raises:
        UserError: naming the first weight or part of another form, and the form that is allowed.
    """
    sizes = _Sizes()
    for name, letters in SHAPES.items():
        sizes.check(name, getattr(model, name), letters)
    for number, block in enumerate(model.blocks):
        _check_block(f"blocks.{number}", block, sizes)
    sizes.check_norm("final_norm", model.final_norm, "d")
    longest = sizes.known.get("P", model.max_length)
    post_norms = {norm is None for block in model.blocks for norm in (block.attention_post_norm, block.mlp_post_norm)}
    for wrong, found, allowed in (
        (not model.blocks, "no blocks", "one or more"),
        (model.activation not in ACTIVATIONS, f"activation {model.activation!r}", ", ".join(ACTIVATIONS)),
        (not 2 <= model.max_length <= longest, f"max_length {model.max_length}", f"2 to {longest}, the positions"),
        (len(post_norms) > 1, "post-norms of some blocks' parts", "of all, or of none"),
    ):
        if wrong:
            raise UserError(f"register: {found}; allowed: {allowed}")
    try:
        model.centred  # noqa: B018
    except ValueError as error:
        raise UserError(f"register: {error}") from None


def _check_block(at: str, block: Block, sizes: _Sizes) -> None:
    for name, letters in OF_BLOCK.items():
        sizes.check(f"{at}.{name}", getattr(block, name), letters)
    for name, letters in OF_NORMS.items():
        sizes.check_norm(f"{at}.{name}", getattr(block, name), letters)
    for name, letters in OF_HEADS.items():
        norm = getattr(block, name)
        of_each = norm is not None and norm.weight.dim() == 1
        sizes.check_norm(f"{at}.{name}", norm, "k" if of_each else letters)
    heads, groups = sizes.known["H"], sizes.known["G"]
    biases = {bias is None for bias in (block.b_Q, block.b_K, block.b_V)}
    post_norms = [norm for norm in (block.attention_post_norm, block.mlp_post_norm) if norm is not None]
    for wrong, found, allowed in (
        (heads % groups, f"{heads} heads for {groups} keys", "a multiple of the keys"),
        (len(biases) > 1, "biases of some of Q, K and V", "of all, or of none"),
        (any(not norm.rms or norm.bias is not None for norm in post_norms), "a post-norm", "RMSNorm without a bias"),
    ):
        if wrong:
            raise UserError(f"register: {at}: {found}; allowed: {allowed}")
