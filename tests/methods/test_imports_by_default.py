"""Which imported files a cell's results belong to: also those that it uses without naming them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import zeroflow
from zeroflow import TrialConfig
from zeroflow.imports import imports_of
from zeroflow.registry import registered_meanwhile

IMPLICIT = {
    "a_transform.py": """
from zeroflow.data.transforms import Transform, as_rgb, fitted, transforms

def test(images, size):
    return as_rgb(fitted(images, size))

transforms.register("{0}-t", Transform(train=lambda images, size, generator: test(images, size), test=test, description="x"))
""",
    "a_dataset.py": """
import dataclasses
from zeroflow.data.dataset import datasets, register_dataset

@register_dataset("{0}-d", classes=100, transform="{0}-t", image_size=28, where="", description="x")
def load(data_dir):
    return dataclasses.replace(datasets.get("quickdraw100").load(data_dir), name="{0}-d")
""",
    "a_classifier.py": """
from zeroflow.classifiers import register_classifier
from zeroflow.classifiers.class_means import ClassMeans

@register_classifier("{0}-c", "x")
class Mine(ClassMeans): ...
""",
    "a_tuning.py": """
from zeroflow.models.tuning import InputPrompt, tunings

class Mine(InputPrompt): ...

tunings.register("{0}-p", Mine)
""",
    "a_method.py": """
from dataclasses import dataclass
from zeroflow.methods.finetune import FineTuning
from zeroflow.methods.method import register_method
from zeroflow.methods.simplecil import SimpleCIL

@register_method("{0}-m", "x")
class Mine(SimpleCIL):
    own_classifier = "{0}-c"

@register_method("{0}-tuned", "x")
class Tuned(FineTuning):
    @dataclass(frozen=True)
    class Options(FineTuning.Options):
        tune: str = "{0}-p"
""",
    "an_heir.py": """
from zeroflow.methods.method import methods, register_method

@register_method("{0}-heir", "x")
class Heir(methods.get("{0}-m").build):
    own_classifier = "lda"
""",
}
"""Files of one's own that need each other by default; the names in them begin alike."""


class Undone(Exception):
    pass


@pytest.fixture
def undone() -> Iterator[None]:
    """What is registered meanwhile is not there for other tests, some of which list all that there is."""
    with suppress(Undone), registered_meanwhile():
        yield
        raise Undone


@pytest.mark.usefixtures("undone")
def test_a_file_counts_that_a_cell_uses_without_naming_it(tmp_path: Path) -> None:
    """The transform of its data set, the classifier of its method, what its options are by default, what a class extends."""
    for name, text in IMPLICIT.items():
        (tmp_path / name).write_text(text.format("implicit"))
        zeroflow.import_file(tmp_path / name)
    stream = {"tasks": 20, "stop_after": 1, "checkpoint": "none", "image_size": 28}
    plain = {"dataset": "quickdraw100", "method": "simplecil", **stream}
    own = {"dataset": "implicit-d", "method": "simplecil"}
    for values, expected in (
        ({}, []),
        (own, ["a_dataset.py", "a_transform.py"]),
        ({**own, "transform": "implicit-t"}, ["a_dataset.py", "a_transform.py"]),
        ({**own, "transform": "plain"}, ["a_dataset.py"]),
        ({"method": "implicit-m"}, ["a_classifier.py", "a_method.py"]),
        ({"method": "implicit-m", "classifier": "lda"}, ["a_method.py"]),
        ({"classifier": "implicit-c"}, ["a_classifier.py"]),
        ({"method": "implicit-tuned", "optimizer": "zo-sgd"}, ["a_method.py", "a_tuning.py"]),
        ({"method": "implicit-heir"}, ["a_method.py", "an_heir.py"]),
    ):
        assert sorted(imports_of(TrialConfig.from_dict({**plain, **values}))) == expected, values


@pytest.mark.slow
def test_results_of_another_text_of_a_file_that_no_key_names_are_refused(tmp_path: Path) -> None:
    def command(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        whole = [sys.executable, "-m", "zeroflow.cli", name, *arguments, "--results=out"]
        whole += [f"--import={file}" for file in IMPLICIT]
        return subprocess.run(whole, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    for name, text in IMPLICIT.items():
        (tmp_path / name).write_text(text.format("mine"))
    (tmp_path / "grid.yaml").write_text("grid: [{dataset: mine-d, method: mine-m, tasks: 20, stop_after: 1}]")
    plan = ["plan", "--grid=grid.yaml"]
    run = ["run", "--set=dataset=mine-d", "--set=method=mine-m", "--set=tasks=20", "--set=stop_after=1"]
    done = command(*run)
    assert done.returncode == 0, done.stderr
    for edited, again in (("a_transform.py", plan), ("a_classifier.py", run)):
        before = (tmp_path / edited).read_text()
        (tmp_path / edited).write_text(f"{before}# edited\n")
        refused = command(*again)
        assert refused.returncode == 2 and f"was computed with another {edited} (" in refused.stderr, refused.stdout
        (tmp_path / edited).write_text(before)
