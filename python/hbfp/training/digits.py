"""A classifier of handwritten digits: the smallest network that still has a first, a middle and a last layer."""

from torch import Tensor, nn


class DigitsClassifier(nn.Module):
    """Pixels [batch, 64] -> scores [batch, 10] through two hidden layers."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.first = nn.Linear(64, width)
        self.middle = nn.Linear(width, width)
        self.last = nn.Linear(width, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.first(pixels).relu()
        hidden = self.middle(hidden).relu()
        scores: Tensor = self.last(hidden)
        return scores
