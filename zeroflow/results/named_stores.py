"""Stores by name below one folder, for readers who take those that are there: which are not, and what makes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zeroflow.results.store import Store


def named_stores(folder: str | Path, names: Sequence[str]) -> tuple[list[Store], list[str]]:
    """The stores that have been written, in the order of ``names``, and for each of the others a sentence.

    Args:
        folder: holds a folder for each store.
        names: of grids (``sweeps/<name>.yaml``), or ``trajectories``.
    """
    stores = {name: Store(Path(folder) / name) for name in names}
    here = [store for store in stores.values() if store.exists()]
    missing = [
        f"{name} is not there yet; in the checkout, `{command(name)}` makes it."
        for name, store in stores.items()
        if not store.exists()
    ]
    return here, missing


def command(name: str) -> str:
    """What makes the store ``results/<name>``."""
    if name == "trajectories":
        return "zeroflow trajectories --grid sweeps/figure6_quickdraw.yaml --results results/trajectories"
    return f"python sweeps/full_grid.py --grid sweeps/{name}.yaml --results results/{name}"
