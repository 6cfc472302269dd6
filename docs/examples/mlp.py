"""A perceptron that torch trained and `hbfp.save_model` stored, computed where there is no torch: numpy and hbfp alone.

    python mlp.py MODEL.safetensors INPUTS.npy OUTPUTS.npy

The model is an `nn.Sequential` of `nn.Linear` with `nn.ReLU` between, converted or frozen. The bits are torch's.
"""

import sys

import numpy as np

import hbfp


class Perceptron:
    def __init__(self, path: str) -> None:
        tensors = hbfp.load(path)  # encoded weights as hbfp.BlockArray, biases as numpy arrays
        places = sorted({name.partition(".")[0] for name in tensors}, key=int)
        self.layers = [(hbfp.prepack(tensors[f"{place}.weight"]), tensors.get(f"{place}.bias")) for place in places]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """x [rows, inputs], any floats; float32 [rows, outputs]."""
        first, *others = self.layers
        x = hbfp.linear(x, *first)  # activations are encoded on the way in, in the weight's format
        for layer in others:
            x = hbfp.linear(np.maximum(x, 0), *layer)
        return x


if __name__ == "__main__":
    model, inputs, outputs = sys.argv[1:]
    np.save(outputs, Perceptron(model)(np.load(inputs)))
