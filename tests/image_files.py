"""Image data sets as they lie on disk, made for the tests."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np

# CIFAR-100


def write_cifar(data_dir: Path, **replaced: object) -> Path:
    """Small files in the published format: protocol 2, arrays under the module names of NumPy 1."""
    folder = data_dir / "cifar-100-python"
    folder.mkdir()
    contents: dict[str, object] = {"meta": {"fine_label_names": [f"class {i}" for i in range(100)]}}
    for seed, (part, count) in enumerate((("train", 200), ("test", 100))):
        pixels = np.random.RandomState(seed).randint(0, 256, (count, 3072)).astype(np.uint8)
        contents[part] = {"data": pixels, "fine_labels": [(7 * i) % 100 for i in range(count)]}
    for name, content in {**contents, **replaced}.items():
        stored = pickle.dumps(content, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        (folder / name).write_bytes(stored)
    return data_dir
