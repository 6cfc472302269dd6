"""Batches of small images, augmented as residual networks are trained on CIFAR (He et al. 2016, section 4.2)."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from hbfp.errors import HBFPError
from hbfp.training.cifar import CIFAR, SIDE
from hbfp.training.data import Batch

PADDING = 4
"""Pixels by which a crop may leave the image, on each side."""

# Third words of the seeds: two random streams, which would be one where epoch and step have the same number.
_ORDER, _CROPS = 0, 1


@dataclass(frozen=True, slots=True)
class Images:
    """CIFAR in batches: inputs float32 [batch, 3, 32, 32], targets int64 [batch].

    Pixels have mean 0 and deviation 1 in each channel, over the training images. Those of a training batch are cropped
    at random from a frame of four zeros, and every second one, on average, is mirrored. An epoch shows each image once
    and leaves its last, incomplete batch out. All of it depends on seed, step and place in the batch alone.
    """

    cifar: CIFAR
    size: int
    _normal: NDArray[np.float32] = field(init=False, repr=False, compare=False)
    """For each channel, what becomes of the 256 values of a pixel."""

    def __post_init__(self) -> None:
        images, labels = self.cifar.train
        if not 1 <= self.size <= len(labels):
            raise HBFPError(f"a batch has 1 to {len(labels)} images, the training set's number, not {self.size}")
        values = np.arange(256, dtype=np.float64)
        # Counts are exact in any order: the same table on every machine.
        counts = [np.bincount(images[:, channel].reshape(-1), minlength=256) for channel in range(images.shape[1])]
        means = [(count * values).sum() / count.sum() for count in counts]
        deviations = [
            np.sqrt((count * (values - mean) ** 2).sum() / count.sum())
            for count, mean in zip(counts, means, strict=True)
        ]
        table = [(values - mean) / (deviation or 1.0) for mean, deviation in zip(means, deviations, strict=True)]
        object.__setattr__(self, "_normal", np.array(table, np.float32))

    @property
    def steps_per_epoch(self) -> int:
        return len(self.cifar.train[1]) // self.size

    def batch(self, seed: int, step: int) -> Batch:
        images, labels = self.cifar.train
        epoch, part = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng((seed, epoch, _ORDER)).permutation(len(labels))
        rows = order[part * self.size : (part + 1) * self.size]
        draw = np.random.default_rng((seed, step, _CROPS))
        crops = draw.integers(2 * PADDING + 1, size=(self.size, 2))
        mirrored = draw.integers(2, size=self.size)
        frame = np.zeros((self.size, 3, SIDE + 2 * PADDING, SIDE + 2 * PADDING), np.float32)
        frame[:, :, PADDING:-PADDING, PADDING:-PADDING] = self._normalised(images[rows])
        inputs = np.empty((self.size, 3, SIDE, SIDE), np.float32)
        for place, (top, left) in enumerate(crops):
            crop = frame[place, :, top : top + SIDE, left : left + SIDE]
            inputs[place] = crop[:, :, ::-1] if mirrored[place] else crop
        return torch.from_numpy(inputs), torch.from_numpy(labels[rows])

    def validation(self) -> Iterator[Batch]:
        """The test images, as they are."""
        images, labels = self.cifar.test
        for first in range(0, len(labels), self.size):
            part = slice(first, first + self.size)
            yield torch.from_numpy(self._normalised(images[part])), torch.from_numpy(labels[part])

    def _normalised(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.stack([self._normal[channel][images[:, channel]] for channel in range(images.shape[1])], 1)
