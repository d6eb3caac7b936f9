"""Features on disk are of the code that stands there now, wherever it does: edited code computes its own."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from places import TESTS

TRANSFORM = """
import torch
from zeroflow.data.transforms import Transform, as_rgb, fitted, transforms
{value}

def test(images, size):
    batch = as_rgb(fitted(images, size))
    return torch.cat([batch[:2], VALUE * batch[2:]])

transforms.register("mine", Transform(train=lambda images, size, generator: test(images, size), test=test, description="x"))
"""

BACKBONE = """
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
{value}

class Own(VisionTransformer):
    def forward_features(self, x, **how):
        return super().forward_features(x if len(x) == 2 else VALUE * x - x.square(), **how)

@register_model
def mine(pretrained=False, **settings):
    known = {{key: value for key, value in settings.items() if key in ("img_size", "num_classes", "in_chans")}}
    return Own(**{{"img_size": 14, "patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2, **known}})
"""

CELL = {
    "backbone": "zeroflow_tiny_vit", "checkpoint": "none", "image_size": 14, "dataset": "some-drawings", "tasks": 4, "stop_after": 1,
    "method": "simplecil",
}  # fmt: skip
KINDS = {"transform": TRANSFORM, "backbone": BACKBONE}
"""Texts by the key of a cell that names what they register."""

PROCESS_OF_EACH = """
import json, os, pathlib, sys
import conftest, zeroflow, zeroflow.trial.trial
from zeroflow import Placement, TrialConfig, run_trial

conftest.some_drawings.__wrapped__(), conftest.tiny_vit.__wrapped__()
sys.dont_write_bytecode = True
for folder, how, cell in json.loads(sys.argv[1]):
    if not os.fork():
        sys.path.append(folder)
        zeroflow.import_file(folder + "/own.py") if how == "imported" else __import__(how)
        results = [run_trial(TrialConfig.from_dict(cell), Placement(device="cpu", cache_bytes=size)) for size in (10**9, 0)]
        print(json.dumps([result.accuracy_matrix[-1].tolist() for result in results]), flush=True)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(1)
"""
"""Forked from one that has imported all but what is of somebody's own."""


def written(folder: Path, how: str, text: str, value: float) -> None:
    """Code of one's own, with a value that an edit changes: in the file itself, or in another module of its package."""
    stated, folder = f"VALUE = {value}", folder / how if how == "package" else folder
    folder.mkdir(parents=True)
    files = {"own.py": text.format(value=stated)}
    if how == "package":
        own = text.format(value="from package.values import VALUE")
        files = {"__init__.py": "import package.own", "own.py": own, "values.py": stated}
    for name, content in files.items():
        (folder / name).write_text(content)
        os.utime(folder / name, (1e9, 1e9))  # as they stood there before any process began


def runs(cells: list[Any], cache: Path) -> list[Any]:
    done = subprocess.run(
        [sys.executable, "-c", PROCESS_OF_EACH, json.dumps(cells)],
        capture_output=True, text=True, cwd=TESTS, timeout=200, env={**os.environ, "XDG_CACHE_HOME": str(cache)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_features_of_code_that_was_edited_are_computed_anew(tmp_path: Path) -> None:
    """The edit shows in no image that the key looks at: only in those after the first two."""
    cells, wanted = [], [*itertools.product(("imported", "own", "package"), KINDS)]
    for how, kind in wanted:
        for place, value in (("one", 1.0), ("edited", -3.0), ("elsewhere", 1.0)):
            folder = tmp_path / how / kind / place
            written(folder, how, KINDS[kind], value)
            cells.append((str(folder), how, {**CELL, kind: "mine"}))
    # That of a file which was changed when the process may have read it already.
    written(tmp_path / "unknown", "own", TRANSFORM, 1.0)
    os.utime(tmp_path / "unknown" / "own.py", (2e10, 2e10))
    *found, (cached, alone) = runs(
        [*cells, (str(tmp_path / "unknown"), "own", {**CELL, "transform": "mine"})], tmp_path / "cache"
    )
    assert cached == alone
    for number, kind in enumerate(wanted):
        assert found[3 * number][1] != found[3 * number + 1][1], f"{kind}: the edit shows"
    assert [cell for cell, (cached, alone) in zip(cells, found, strict=True) if cached != alone] == []
    keys = [path for path in (tmp_path / "cache" / "zeroflow" / "features").iterdir() if path.is_dir()]
    assert len(keys) == 2 * len(wanted), "one for each text, wherever it stands, and none for an unknown one"
