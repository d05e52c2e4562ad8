"""What `smol-vl` is shown: coloured shapes and handwritten digits, and the tower that sees them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, layer_norm

from miner_lens import organisms
from miner_lens.data import digits
from miner_lens.data.datasets import COLOURS, SHAPES
from miner_lens.training.smol import Step, learn
from miner_lens.training.train_shapes import MERGE, PATCH, SIDE, TIME, Pictures, grids

TOWER: dict[str, Any] = {
    "depth": 3,
    "embed_dim": 96,
    "num_heads": 4,
    "mlp_ratio": 4,
    "initializer_range": 0.05,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": TIME,
}
TOKENS = (SIDE // PATCH // MERGE) ** 2
CLASSES = [len(SHAPES), len(COLOURS), len(digits.NUMBERS)]
# The last block of digits of the training split, kept for checking.
CHECKED_FROM = 1167


class Digits:
    """The handwritten digits of the training split, drawn anew: turned, moved, thicker, larger."""

    def __init__(self, rows: range, pictures: Pictures) -> None:
        file = load_digits()
        self.ink = torch.from_numpy(file.images[rows.start : rows.stop]).float() / 16
        self.values = torch.from_numpy(file.target[rows.start : rows.stop])
        self.pictures = pictures

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """So many digits, their values [n] and their patches [n, patch, ...]."""

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(n, generator=generator)

        rows = torch.randint(len(self.ink), (n,), generator=generator)
        angle, shear = uniform(-0.25, 0.25), uniform(-0.25, 0.25)
        wide, high = uniform(0.85, 1.25), uniform(0.85, 1.2)
        matrix = torch.stack(
            [
                torch.stack([wide * angle.cos(), shear - angle.sin(), uniform(-0.2, 0.2)], -1),
                torch.stack([angle.sin(), high * angle.cos(), uniform(-0.15, 0.15)], -1),
            ],
            1,
        )
        grid = affine_grid(matrix, [n, 1, SIDE, SIDE], align_corners=False)
        ink = grid_sample(self.ink[rows, None], grid, align_corners=False)
        ink = ink.clamp(0, 1) ** uniform(0.6, 1.6)[:, None, None, None]
        noise = torch.rand(n, 1, 8, 8, generator=generator) - 0.5
        noise = nn.functional.interpolate(noise, SIDE, mode="bilinear")
        ink = (ink + 0.25 * uniform(0, 1)[:, None, None, None] * noise * (ink > 0)).clamp(0, 1)
        return self.values[rows], self.patches(ink)

    def plain(self) -> tuple[Tensor, Tensor]:
        """All of them as they are."""
        drawn = [np.asarray(digits.drawing(ink.numpy() * 16)) for ink in self.ink]
        pixels = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float()
        return self.values, self.pictures.patches(pixels)

    def patches(self, ink: Tensor) -> Tensor:
        """Patches of black ink on white paper, [n, patch, ...]."""
        return self.pictures.patches((255 - 255 * ink).round().expand(-1, 3, -1, -1))


def features(model: Any, patches: Tensor) -> Tensor:
    """The merged tokens of pictures, [picture, pos, hidden]."""
    n = len(patches)
    tokens: Tensor = model.model.visual(patches.flatten(0, 1), grid_thw=grids(n)).pooler_output
    return tokens.view(n, TOKENS, -1)


def begin_with_shapes(model: Any) -> None:
    """Give the tower the weights of the organism `shapes`, but the merger's last layer."""
    weights = load_file(Path(organisms.path("shapes")) / "model.safetensors")
    prefix = next(name for name in weights if name.endswith("patch_embed.proj.weight"))
    prefix = prefix.removesuffix("patch_embed.proj.weight")
    tower = {name[len(prefix) :]: w for name, w in weights.items() if name.startswith(prefix)}
    own = model.model.visual.state_dict()
    fitting = {name: w for name, w in tower.items() if w.shape == own[name].shape}
    model.model.visual.load_state_dict(fitting, strict=False)
    last = model.model.visual.merger.mlp[2]
    nn.init.normal_(last.weight, std=0.05)
    nn.init.zeros_(last.bias)


def train_tower(
    model: Any, pictures: Pictures, folder: Path, seed: int, steps: int, batch: int = 48
) -> None:
    """Teach the tower shape, colour and digit through linear heads that are then dropped.

    Args:
        model: A Qwen2-VL whose tower is `TOWER`.
        pictures: easy-VQA's training images.
        folder: Where the stage is kept.
        seed: The seed.
        steps: How many steps.
        batch: Pictures of each kind in a step.
    """
    shown = Digits(range(CHECKED_FROM), pictures)
    check = Digits(range(CHECKED_FROM, digits.FIRST_TEST_ROW), pictures).plain()
    width = model.config.text_config.hidden_size
    heads = nn.Linear(width, sum(CLASSES))
    tower = model.model.visual

    def read(patches: Tensor) -> Sequence[Tensor]:
        pooled = layer_norm(features(model, patches), (width,)).mean(1)
        return torch.split(heads(pooled), CLASSES, -1)

    def lesson(step: Step) -> tuple[Tensor, dict[str, float]]:
        drawn = pictures.draw(batch, step.generator)
        values, patches = shown.draw(batch, step.generator)
        shape, colour, _ = read(drawn.patches)
        *_, digit = read(patches)
        losses = [
            cross_entropy(shape, drawn.shapes),
            cross_entropy(colour, drawn.colours),
            cross_entropy(digit, values, label_smoothing=0.05),
        ]
        right = {"digit": (digit.argmax(-1) == values).float().mean().item()}
        right["shape"] = (shape.argmax(-1) == drawn.shapes).float().mean().item()
        if step.number % 100 == 99:
            with torch.no_grad():
                hits = read(check[1])[2].argmax(-1) == check[0]
            right["unseen digit"] = hits.float().mean().item()
        return sum(losses, torch.zeros(())), right

    parameters = dict(
        itertools.chain(
            ((f"visual.{name}", p) for name, p in tower.named_parameters()),
            ((f"heads.{name}", p) for name, p in heads.named_parameters()),
        )
    )
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    learn("tower", folder, parameters, lesson, steps, 1.5e-3, seed, warmup=100, weight_decay=0.05)
    tower.requires_grad_(False)
    with torch.no_grad():  # tokens as large as the decoder's own
        size = model.get_input_embeddings().weight.std() / features(model, check[1]).std()
        for tensor in (tower.merger.mlp[2].weight, tower.merger.mlp[2].bias):
            tensor *= size
