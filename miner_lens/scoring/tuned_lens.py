"""TunedLens: an affine map for each layer, from its residual stream to the last layer's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from miner_lens.models.identity import ModelIdentity
from miner_lens.models.result import Result

if TYPE_CHECKING:
    import pandas as pd


def unit(x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
    """Rows scaled to a root mean square of 1, in float32; a row of zeros stays one.

    Example:
        >>> unit(torch.tensor([3.0, 4.0, 0.0, 0.0]))
        tensor([1.2000, 1.6000, 0.0000, 0.0000])
    """
    wide = x.float()
    scale = wide.square().mean(-1, keepdim=True).sqrt()
    return wide / scale.clamp(min=1e-12)


def fit(
    xx: Float[Tensor, "d_model d_model"],
    yx: Float[Tensor, "d_model d_model"],
    x: Float[Tensor, " d_model"],
    y: Float[Tensor, " d_model"],
    ridge: float,
) -> tuple[Float[Tensor, "d_model d_model"], Float[Tensor, " d_model"]]:
    """The affine map that takes x to y with the least squares, held to the identity by a ridge.

    Args:
        xx: The mean of x xᵀ over tokens.
        yx: The mean of y xᵀ.
        x: The mean of x.
        y: The mean of y.
        ridge: What the squares of the map's difference from the identity count, as a share of
            the mean variance of x's coordinates.

    Returns:
        W and b, so that y is about W x + b.

    Example:
        >>> points = torch.randn(50, 3, dtype=torch.float64)
        >>> there = 2 * points + 1
        >>> means = points.T @ points / 50, there.T @ points / 50, points.mean(0), there.mean(0)
        >>> weight, bias = fit(*means, ridge=0.0)
        >>> torch.allclose(points @ weight.T + bias, there)
        True
    """
    spread = xx - torch.outer(x, x)
    moved = yx - torch.outer(y, x) - spread
    identity = torch.eye(len(x), dtype=xx.dtype, device=xx.device)
    held = spread + max(ridge * float(spread.trace()) / len(x), 1e-12) * identity
    weight = identity + torch.linalg.solve(held, moved.T).T
    return weight, y - weight @ x


@dataclass(frozen=True, eq=False, repr=False)
class TunedLens(Result):
    """An affine map for each layer but the last, through which the logit lens sees.

    Attributes:
        weights: W of each layer.
        biases: b of each layer.
        tokens: To how many tokens it was fitted.
        identity: The model.
    """

    filename: ClassVar[str] = "tuned-lens.safetensors"

    weights: Float[Tensor, "layer d_model d_model"]
    biases: Float[Tensor, "layer d_model"]
    tokens: int
    identity: ModelIdentity | None = None

    def translate(
        self, x: Float[Tensor, "*row d_model"], layer: int
    ) -> Float[Tensor, "*row d_model"]:
        """What the last layer is expected to make of a layer's residual stream, in its direction.

        The residual stream is scaled to a root mean square of 1 before, and what comes out has
        about that: the final norm takes the scale out in any case. The last layer's is left alone.

        Raises:
            ValueError: There is no such layer, or the residual stream has another width.
        """
        layers, width = self.biases.shape
        if not 0 <= layer <= layers or x.shape[-1] != width:
            raise ValueError(
                f"This lens is of a model with layers 0 to {layers} of width {width}; it was given "
                f"layer {layer} of width {x.shape[-1]}. Fit one to this model."
            )
        if layer == layers:
            return x
        weight, bias = self.weights[layer].to(x.device), self.biases[layer].to(x.device)
        return (unit(x) @ weight.T + bias).to(x.dtype)

    def to(self, device: torch.device | str) -> TunedLens:
        """The same lens on a device."""
        return replace(self, weights=self.weights.to(device), biases=self.biases.to(device))

    def __repr__(self) -> str:
        layers, width = self.biases.shape
        return f"TunedLens({layers} layers and the last, width {width}, {self.tokens} tokens)"

    def overview(self) -> pd.DataFrame:
        """How far each layer's map is from the identity, and how long its bias is."""
        import pandas as pd

        identity = torch.eye(self.biases.shape[1])
        away = (self.weights - identity).flatten(1).norm(dim=1) / identity.norm()
        columns = {"distance from the identity": away.numpy()}
        columns["bias"] = self.biases.square().mean(1).sqrt().numpy()
        return pd.DataFrame(columns).rename_axis("layer")

    def to_parts(self) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
        """What a file of the lens holds."""
        return {"weights": self.weights, "biases": self.biases}, {"tokens": self.tokens}

    @classmethod
    def from_parts(
        cls,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        identity: ModelIdentity | None,
    ) -> TunedLens:
        """The lens that a file holds."""
        return cls(tensors["weights"], tensors["biases"], metadata["tokens"], identity)
