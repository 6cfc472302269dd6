"""Residual networks for small images, after He et al. 2016 (arXiv 1512.03385), section 4.2.

A 3×3 convolution, then stages of residual blocks of two more: each stage but the first halves the sides of its images
and has a width of its own. A mean over the pixels and one linear layer end it. Shortcuts have no parameters: every
second pixel, and zeros for the channels that are new.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import pad, relu

from hbfp.errors import HBFPError


@dataclass(frozen=True, slots=True)
class ResNetShape:
    """Sizes of the model, which has 2 · blocks · stages + 2 layers with weights; as it stands it is ResNet-20."""

    channels: int = 3
    """Of the images."""
    classes: int = 10
    widths: tuple[int, ...] = (16, 32, 64)
    """Channels of each stage."""
    blocks: int = 3
    """Residual blocks of a stage."""

    def __post_init__(self) -> None:
        for name, sizes in (
            ("channels", (self.channels,)),
            ("classes", (self.classes,)),
            ("blocks", (self.blocks,)),
            ("widths", self.widths or (0,)),
        ):
            if min(sizes) < 1:
                raise HBFPError(f"{name}: expected at least 1; found {getattr(self, name)}")
        if list(self.widths) != sorted(self.widths):
            raise HBFPError(
                f"widths: a shortcut adds channels and drops none; found {self.widths}, expected them to rise"
            )

    @property
    def layers(self) -> int:
        """Layers with weights, which give the network its number."""
        return 2 * self.blocks * len(self.widths) + 2


class Block(nn.Module):
    """Two normed convolutions and what comes past them: [batch, inputs, h, w] to [batch, outputs, h/stride, w/stride],
    rounded up."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.added = outputs - inputs
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = relu(self.first_norm(self.first(x)))
        y = self.second_norm(self.second(y))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.added:
            x = pad(x, (0, 0, 0, 0, 0, self.added))
        return relu(x + y)


class ResNet(nn.Module):
    """Images [batch, channels, height, width] -> scores [batch, classes]."""

    def __init__(self, shape: ResNetShape) -> None:
        super().__init__()
        self.shape = shape
        self.stem = nn.Conv2d(shape.channels, shape.widths[0], 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(shape.widths[0])
        self.blocks = nn.ModuleList()
        inputs = shape.widths[0]
        for stage, width in enumerate(shape.widths):
            for number in range(shape.blocks):
                self.blocks.append(Block(inputs, width, 2 if stage and number == 0 else 1))
                inputs = width
        self.head = nn.Linear(inputs, shape.classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = relu(self.stem_norm(self.stem(images)))
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores
