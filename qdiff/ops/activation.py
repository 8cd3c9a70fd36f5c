"""The functions between two linear layers that the second one's quantizer computes as it reads."""

import torch.nn.functional as F
from torch import Tensor

# Of the last dimension; "geglu" takes K values and then K gates, and makes K values of them.
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "geglu")


def activate(x: Tensor, activation: str) -> Tensor:
    """Gaussian error linear units (arXiv 1606.08415), exact or approximated by tanh, or values gated by them
    (arXiv 2002.05202), each step rounded to x's dtype."""
    if activation == "geglu":
        values, gates = x.chunk(2, dim=-1)
        return values * F.gelu(gates)
    if activation == "none":
        return x
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def activated_width(x: Tensor, activation: str) -> int:
    """The size of the last dimension of `activate(x, activation)`."""
    return x.shape[-1] // (2 if activation == "geglu" else 1)


def check_activation(x: Tensor, activation: str) -> None:
    """Raise a ValueError unless x can be activated this way."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    if activation == "geglu" and x.shape[-1] % 2:
        raise ValueError(f"x: got {tuple(x.shape)}, expected as many values as gates in the last dimension")
