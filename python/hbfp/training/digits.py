"""A classifier of handwritten digits: a residual network small enough to train in seconds."""

from torch import Tensor, nn

from hbfp.training.resnet import ResNet, ResNetShape

SIDE = 8
"""Pixels of an image's side."""


class DigitsClassifier(nn.Module):
    """Pixels [batch, 64], row by row -> scores [batch, 10]: one residual block of 3×3 convolutions for each width."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128)) -> None:
        super().__init__()
        self.network = ResNet(ResNetShape(channels=1, widths=widths, blocks=1))

    def forward(self, pixels: Tensor) -> Tensor:
        scores: Tensor = self.network(pixels.unflatten(-1, (1, SIDE, SIDE)))
        return scores
