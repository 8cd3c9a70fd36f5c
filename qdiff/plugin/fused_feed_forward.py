"""Feed-forward blocks whose activation the second layer's quantizer computes, in the pass in which it reads."""

from __future__ import annotations

from typing import Any

from diffusers.models.activations import GEGLU, GELU
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from qdiff.layers import QuantLinear
from qdiff.plugin.plain import are_plain, drops_nothing, is_inference


class FusedFeedForward(FeedForward):
    """diffusers' block, with one kernel instead of three between its layers. Where anybody could see what is left out
    (a hook, a wrapped layer, dropout, a gradient, autocast), it computes as diffusers does."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not is_inference(hidden_states) or not self._fuses():
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[no-any-return]
        return self._after(self.net[0].proj(hidden_states), None)

    @property
    def takes_quantized(self) -> bool:
        """Whether there is `forward_quantized`."""
        if not self._fuses() or len(self.net) > 3:
            return False
        layer = self.net[0].proj
        return type(layer) is QuantLinear and layer.takes_quantized and are_plain(layer)

    def forward_quantized(self, codes: Tensor, scale: Tensor, residual: Tensor) -> Tensor:
        """residual + self of the tokens that these codes stand for; only with `takes_quantized`.

        Args:
            codes, scale: what `quantize_per_token` makes: int8 [..., K], float32 [...].
            residual: [..., N], whose dtype the block computes in.
        """
        return self._after(self.net[0].proj.forward_quantized(codes, scale, residual.dtype), residual)

    def _after(self, x: Tensor, residual: Tensor | None) -> Tensor:
        first, _, layer, *rest = self.net._modules.values()
        y: Tensor = layer.forward_activated(x, _activation(first), residual)
        for module in rest:
            y = module(y)
        return y

    def _fuses(self) -> bool:
        first, dropout, layer, *_ = self.net._modules.values()
        known = type(layer) is QuantLinear and _activation(first) is not None
        return known and drops_nothing(dropout) and are_plain(first, dropout, layer)


def _activation(module: nn.Module) -> str | None:
    if type(module) is GEGLU:
        return "geglu"
    if type(module) is GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return None
