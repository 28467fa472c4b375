"""Crops of a photograph as calibration data: python examples/foreign-onnx/images.py MODEL.onnx

The photograph comes with scikit-learn. images.npz has the crops, in the size and under the name of the model's input.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
from PIL import Image
from sklearn import datasets

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
PHOTOGRAPH, COUNT = "china.jpg", 96


def main(model: str) -> None:
    """Write images.npz into the working directory."""
    (given,) = onnx.load(model, load_external_data=False).graph.input
    size = given.type.tensor_type.shape.dim[-1].dim_value
    photograph = Image.open(Path(datasets.__file__).parent / "images" / PHOTOGRAPH)
    np.savez("images.npz", **{given.name: crops(photograph, size, COUNT)})


def crops(image: Image.Image, size: int, count: int) -> np.ndarray:
    """Squares of random places and sizes as float32 [count, 3, size, size]."""
    rng = np.random.default_rng(0)
    squares = []
    for _ in range(count):
        side = int(rng.integers(120, min(image.size)))
        left, top = (int(rng.integers(0, length - side + 1)) for length in image.size)
        square = image.crop((left, top, left + side, top + side)).resize((size, size))
        squares.append((np.asarray(square, np.float32) / 255 - MEAN) / DEVIATION)
    return np.stack(squares).transpose(0, 3, 1, 2).astype(np.float32)


if __name__ == "__main__":
    main(sys.argv[1])
