"""Networks for small grey images: any `nn.Module` that maps pixels to logits can be a student or a teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Jitter(nn.Module):
    """Images shifted by up to `pixels` each way, each on its own; in training only."""

    def __init__(self, pixels: int = 2) -> None:
        super().__init__()
        self.pixels = pixels

    def forward(self, images: Tensor) -> Tensor:
        if not self.training or not self.pixels:
            return images
        padded = F.pad(images, [self.pixels] * 4, mode="replicate")
        for side in (2, 3):
            start = torch.randint(2 * self.pixels + 1, (len(images), 1), device=images.device)
            at = start + torch.arange(images.shape[side], device=images.device)
            padded = padded.take_along_dim(at[:, None, :, None] if side == 2 else at[:, None, None, :], side)
        return padded


def convolutional(classes: int = 10, width: int = 16, hidden: int = 256, jitter: int = 2, dropout: float = 0.5) -> nn.Module:
    """A convolutional network with dropout that sees shifted images: for 28 x 28 pixels."""
    return nn.Sequential(
        Jitter(jitter),
        nn.Conv2d(1, width, 5, stride=2, padding=2), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Dropout(dropout / 2),
        nn.Linear(2 * width * 49, hidden), nn.ReLU(), nn.Dropout(dropout),
        nn.Linear(hidden, classes),
    )  # fmt: skip


def perceptron(classes: int = 10, width: int = 100, pixels: int = 784) -> nn.Module:
    """Two hidden layers of rectified units, no regularisation: as Hinton's small net."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes)
    )
