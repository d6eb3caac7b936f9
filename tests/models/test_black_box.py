"""A backbone that is a black box: what is asked of it, and callables by their names."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cells import PROMPTED
from click.testing import CliRunner
from torch import Tensor

from zeroflow import ConfigError, Placement, TrialConfig, run_trial
from zeroflow.cli import main
from zeroflow.grid.grid_file import load_grid, parse_grid
from zeroflow.models import endpoint, named
from zeroflow.models.backbone import Backbone
from zeroflow.models.endpoint import EndpointError, open_black_box
from zeroflow.models.factory import create_backbone
from zeroflow.models.tuning import InputPrompt
from zeroflow.optim import list_optimizers
from zeroflow.results import load
from zeroflow.sweep.serve import wanted

pytestmark = pytest.mark.usefixtures("some_drawings", "tiny_vit")


class Asked:
    """The tiny backbone as a callable; remembers how many images each request had."""

    def __init__(self) -> None:
        self.backbone: Backbone = create_backbone("zeroflow_tiny_vit", checkpoint="none", image_size=14)
        self.sizes: list[int] = []

    def __call__(self, images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.sizes.append(len(images))
        return self.backbone(images)


# What is asked


@pytest.mark.parametrize("queries", [1, 3])
def test_all_evaluations_of_a_step_travel_in_one_request(queries: int) -> None:
    """24 images of a task in batches of 8 are three steps; with a first task of two classes."""
    ask = Asked()
    config = {
        **PROMPTED,
        "stop_after": 1,
        "queries": queries,
        "method_options": {"tune": "input-prompt", "imprint": False},
    }
    box, plain = TrialConfig.from_dict({**config, "access": "black-box"}), TrialConfig.from_dict(config)
    found, white = run_trial(box, Placement(endpoint=ask)), run_trial(plain)
    assert ask.sizes.count(2 * queries * 8) == len(found.steps) == 3
    assert ask.sizes[:2] == [1, 1], "the probe for the width, and that features are of the image alone"
    summary = found.summary
    assert summary["requests"] == len(ask.sizes) - 2 and summary["queried_images"] == sum(ask.sizes[2:])
    assert summary["images_per_point"] == summary["queried_images"] / summary["avg"]
    np.testing.assert_allclose([s.loss for s in found.steps], [s.loss for s in white.steps], rtol=1e-5)
    np.testing.assert_array_equal(found.accuracy_matrix, white.accuracy_matrix)
    assert summary["price"] is None
    assert run_trial(box, Placement(endpoint=ask, price_per_1000_images=2.0)).summary["price"] == pytest.approx(
        summary["queried_images"] / 500
    )


FORWARD = [name for name in list_optimizers("zo-*") if name not in ("zo-per-example",)]


@pytest.mark.parametrize("name", FORWARD)
def test_every_forward_pass_optimizer_makes_the_same_steps_as_in_this_process(name: str) -> None:
    config = {
        **PROMPTED,
        "stop_after": 1,
        "optimizer": name,
        "method_options": {"tune": "input-prompt", "imprint": False},
    }
    found = run_trial(TrialConfig.from_dict({**config, "access": "black-box"}), Placement(endpoint=Asked()))
    white = run_trial(TrialConfig.from_dict(config))
    np.testing.assert_allclose([s.loss for s in found.steps], [s.loss for s in white.steps], rtol=1e-4, equal_nan=True)
    assert found.summary["forward_passes"] == white.summary["forward_passes"]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("simplecil", {}), ("aper-input-prompt", {}), ("replay", {"tune": "input-prompt"}), ("lwf", {"tune": "input-prompt"}),
        ("generative-replay", {"tune": "input-prompt"}), ("ewc", {"tune": "input-prompt"}), ("joint", {"tune": "none"}),
    ],
)  # fmt: skip
def test_methods_that_touch_nothing_inside_run(method: str, options: dict[str, Any]) -> None:
    config = {**PROMPTED, "method": method, "method_options": options}
    found = run_trial(TrialConfig.from_dict({**config, "access": "black-box"}), Placement(endpoint=Asked()))
    white = run_trial(TrialConfig.from_dict(config))
    np.testing.assert_allclose([s.loss for s in found.steps], [s.loss for s in white.steps], rtol=1e-3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "ease", "method_options": {}}, "it trains 'adapter', and a black box takes images and gives features"),
        ({"method": "aper-vpt-deep", "method_options": {}}, "can be trained: none, input-prompt, input-filter"),
        ({"optimizer": "fo-sgd"}, "optimizer 'fo-sgd' differentiates"),
        ({"optimizer": "forward-grad"}, "optimizer 'forward-grad' differentiates"),
        ({"optimizer": "zo-per-example"}, "moves every example of a mini-batch on its own"),
        ({"optimizer": "zo-per-example", "method_options": {"tune": "none"}}, "moves every example of a mini-batch"),
        ({"backbone": "zeroflow_tiny_vti", "image_size": None}, "unknown backbone"),
        ({"access": ["black-box"]}, "access=.*expected a string"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_said_before_anything_runs(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrialConfig.from_dict({**PROMPTED, "access": "black-box", **values})


def test_an_endpoint_may_call_its_backbone_as_it_likes_where_the_image_size_is_named() -> None:
    config = TrialConfig.from_dict(
        {**PROMPTED, "access": "black-box", "backbone": "of-somebody-else", "checkpoint": None}
    )
    assert run_trial(config, Placement(endpoint=Asked())).summary["avg"] > 0


def test_what_does_not_fit_into_one_request_travels_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**PROMPTED, "stop_after": 1, "queries": 3, "method_options": {"tune": "input-prompt", "imprint": False}}
    box = TrialConfig.from_dict({**config, "access": "black-box"})
    whole, ask = run_trial(box, Placement(endpoint=Asked())), Asked()
    monkeypatch.setattr(endpoint, "MOST_BYTES", 2**16 + 4 * 20 * 3 * 14 * 14)
    found = run_trial(box, Placement(endpoint=ask))
    assert max(ask.sizes) == 20 and found.summary["queried_images"] == whole.summary["queried_images"]
    np.testing.assert_allclose([s.loss for s in found.steps], [s.loss for s in whole.steps], rtol=1e-5)


def test_a_callable_that_fails_for_a_moment_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "WAITS", (0.01,))
    ask, failures = Asked(), [TimeoutError("slow")]

    def moody(images: Tensor) -> Tensor:
        if len(images) > 1 and failures:
            raise failures.pop()
        return ask(images)

    assert run_trial(TrialConfig.from_dict({**PROMPTED, "access": "black-box"}), Placement(endpoint=moody)).steps


def test_a_callable_that_works_in_place_may_fail_and_is_asked_with_the_same_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(endpoint, "WAITS", (0.01,))
    weights, found = torch.randn(588, 16, generator=torch.Generator().manual_seed(0)) / 20, []
    for fails in (False, True):
        calls = itertools.count()

        def ask(images: Tensor, fails=fails, calls=calls) -> Tensor:
            images = images.sub_(0.5).div_(0.25)
            if fails and next(calls) % 3 == 2:
                raise ConnectionError("reset by peer")
            return torch.tanh(images.flatten(1) @ weights)

        config = TrialConfig.from_dict({**PROMPTED, "access": "black-box", "backbone": "mine"})
        found.append(run_trial(config, Placement(endpoint=ask)))
    smooth, failing = found
    assert [step.loss for step in smooth.steps] == [step.loss for step in failing.steps]
    assert np.array_equal(smooth.accuracy_matrix, failing.accuracy_matrix, equal_nan=True)


def test_a_black_box_without_an_endpoint_says_what_starts_one() -> None:
    with pytest.raises(ConfigError, match="zeroflow serve starts one"):
        run_trial(TrialConfig.from_dict({**PROMPTED, "access": "black-box"}))


def test_an_input_prompt_is_a_frame_and_a_pattern_of_low_rank() -> None:
    prompt = InputPrompt(3, 14, border=2, rank=1, generator=torch.Generator().manual_seed(0))
    assert not prompt.pattern().any(), "at first it changes nothing"
    with torch.no_grad():
        prompt.frame += 1
        pattern = prompt.pattern()
        assert float(pattern.sum()) == 3 * (14**2 - 10**2) and not pattern[:, 2:-2, 2:-2].any()
        prompt.rows += torch.randn(prompt.rows.shape)
        assert [int(torch.linalg.matrix_rank(part[2:-2, 2:-2])) for part in prompt.pattern()] == [1, 1, 1]


def test_a_sweep_serves_what_its_cells_need_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"method": "simplecil", "access": "black-box"}
    grid = parse_grid({"grid": [base, {"method": "simplecil"}]})
    served = wanted(grid.cells, grid.placement, local=True)
    assert served is not None and served.backbone == "quickdraw_vit" and served.host == "127.0.0.1"
    named = parse_grid({"grid": [base], "placement": {"endpoint": "http://127.0.0.1:1/"}})
    monkeypatch.delenv(endpoint.TOKEN, raising=False)
    with pytest.raises(ConfigError, match="no token"):
        wanted(named.cells, named.placement, local=True)
    monkeypatch.setenv(endpoint.TOKEN, "right")
    assert wanted(named.cells, named.placement, local=True) is None
    with pytest.raises(ConfigError, match="started elsewhere"):
        wanted(grid.cells, grid.placement, local=False)
    two = parse_grid({"grid": [{**base, "image_size": [28, 14]}]})
    with pytest.raises(ConfigError, match="2 different backbones"):
        wanted(two.cells, two.placement, local=True)


# A callable by its name


BLOCKS = """
import torch

def features(images):
    return torch.nn.functional.avg_pool2d(images, 4).flatten(1)

def wide(images):
    return images

class Features: ...

SIZE = 28
"""
ANY = {"backbone": "of-somebody-else", "image_size": 28, "method": "simplecil", "access": "black-box", "stop_after": 1}


def blocks(images: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(images, 4).flatten(1)


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that holds a module, and is not on the path."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(named, "_searched", [])
    (tmp_path / "own_blocks.py").write_text(BLOCKS)
    (tmp_path / "broken_blocks.py").write_text("import own_blocks\nimport not_installed_anywhere")
    yield tmp_path
    for module in ("own_blocks", "broken_blocks"):
        sys.modules.pop(module, None)


def test_a_callable_of_the_current_folder_is_a_black_box_by_its_name(
    beside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(beside)
    monkeypatch.delenv(endpoint.TOKEN, raising=False)
    config = TrialConfig.from_dict({**ANY, "dataset": "some-drawings"})
    found, direct = (run_trial(config, Placement(endpoint=ask)) for ask in ("own_blocks:features", blocks))
    np.testing.assert_array_equal(found.accuracy_matrix, direct.accuracy_matrix)
    assert found.summary["queried_images"] == direct.summary["queried_images"] > 0
    settings = [f"--set={key}={value}" for key, value in {**ANY, "dataset": "some-drawings"}.items()]
    shown = CliRunner().invoke(main, ["run", *settings, "--endpoint", "own_blocks:features", "--json"])
    assert json.loads(shown.stdout)["avg"] == direct.summary["avg"], shown.output


def test_a_callable_beside_the_grid_file_is_found_before_any_work(
    beside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(endpoint.TOKEN, raising=False)
    (beside / "grid.yaml").write_text(json.dumps({"grid": [ANY], "placement": {"endpoint": "own_blocks:features"}}))
    grid = load_grid(beside / "grid.yaml")
    for local in (True, False):
        assert wanted(grid.cells, grid.placement, local=local) is None
    assert Path(str(sys.modules["own_blocks"].__file__)).parent == beside


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_block:features", "no module 'own_block'; did you mean 'own_blocks'"),
        ("own_blocks.inner:features", "no module 'own_blocks.inner'"),
        ("own_blocks:feature", "unknown name in module own_blocks 'feature'; did you mean 'features'"),
        ("own_blocks:SIZE", "it is of type int; expected a function"),
        ("own_blocks:Features", "it is a class; expected a function"),
        ("broken_blocks:features", "broken_blocks cannot be imported: .*'not_installed_anywhere'"),
    ],
)
def test_a_name_that_leads_nowhere_ends_the_plan_with_one_message(name: str, message: str, beside: Path) -> None:
    (beside / "grid.yaml").write_text(json.dumps({"grid": [ANY], "placement": {"endpoint": name}}))
    result = CliRunner().invoke(main, ["plan", "--grid", str(beside / "grid.yaml"), "--results", str(beside / "out")])
    said = " ".join(result.stderr.split())
    assert result.exit_code == 2 and f"placement.endpoint='{name}': " in said and re.search(message, said), (
        result.output
    )
    assert not (beside / "out").exists()


def test_what_is_no_features_is_told_before_the_first_request(beside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(beside)
    with pytest.raises(
        ConfigError, match=r"1 image gives shape \(1, 3, 28, 28\); expected a tensor of shape \(1, width\)"
    ):
        open_black_box("of-somebody-else", image_size=28, endpoint="own_blocks:wide")


def test_a_callable_without_features_is_refused() -> None:
    def empty(images: Tensor) -> Tensor:
        return images.new_zeros(len(images), 0)

    message = r"endpoint test_black_box:.*empty: 1 image gives shape \(1, 0\); expected .* \(1, width\), width >= 1"
    with pytest.raises(ConfigError, match=message):
        run_trial(TrialConfig.from_dict({**PROMPTED, "access": "black-box"}), Placement(endpoint=empty))


@pytest.mark.parametrize(
    ("error", "images"), [(ZeroDivisionError("by 0"), 1), (ZeroDivisionError("by 0"), 2), (OSError("away"), 1)]
)
def test_what_a_callable_raises_ends_the_cell_in_one_sentence(error: Exception, images: int) -> None:
    ask, sizes = Asked(), []

    def failing(given: Tensor) -> Tensor:
        sizes.append(len(given))
        if len(given) >= images:
            raise error
        return ask(given)

    message = rf"^black box test_black_box:.*failing: no .*answer.*: {type(error).__name__}: {error}$"
    with pytest.raises(EndpointError, match=message) as caught:
        run_trial(TrialConfig.from_dict({**PROMPTED, "access": "black-box"}), Placement(endpoint=failing))
    assert caught.value.__cause__ is error and len(sizes) == (1 if images == 1 else 3), "it is not asked again"


@pytest.mark.parametrize("noise", ["dropout", "statistics", "none"])
def test_a_callable_that_answers_differently_each_time_is_refused(noise: str) -> None:
    """A model left in training mode: its accuracies would be those of its noise."""
    ask, seen = Asked(), torch.zeros(())

    def noisy(images: Tensor) -> Tensor:
        features = ask(images)
        if noise == "dropout":
            return torch.nn.functional.dropout(features, 0.1)
        seen.add_(noise == "statistics")
        return features / (1 + seen)

    config = TrialConfig.from_dict({**PROMPTED, "access": "black-box", "stop_after": 1, "epochs": 1})
    if noise == "none":
        assert run_trial(config, Placement(endpoint=noisy)).summary["avg"] > 0
        return
    with pytest.raises(ConfigError, match="other features for the same image when asked again"):
        run_trial(config, Placement(endpoint=noisy))


def test_a_callable_short_of_memory_says_so_itself() -> None:
    """A sweep recognises that error, and tries the cell again with more."""

    def large(images: Tensor) -> Tensor:
        raise MemoryError

    with pytest.raises(MemoryError):
        open_black_box("of-somebody-else", image_size=28, endpoint=large)


def test_zeroflow_run_shows_what_a_callable_raises_without_a_traceback(
    beside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(beside)
    (beside / "own_blocks.py").write_text("def features(images):\n    return 1 / 0\n")
    settings = [f"--set={key}={value}" for key, value in {**ANY, "dataset": "some-drawings"}.items()]
    shown = CliRunner().invoke(main, ["run", *settings, "--endpoint", "own_blocks:features"])
    said = " ".join(shown.stderr.split())
    assert shown.exit_code == 1 and "black box own_blocks:features: no answer to 1 image: ZeroDivisionError" in said


@pytest.mark.ray
@pytest.mark.slow
def test_workers_of_a_sweep_import_a_callable_beside_the_grid_file(beside: Path, tmp_path: Path, sweep_here) -> None:
    (beside / "grid.yaml").write_text(json.dumps({"grid": [ANY], "placement": {"endpoint": "own_blocks:features"}}))
    run = sweep_here("sweep", "--grid", beside / "grid.yaml", "--results", tmp_path / "out", "--no-report")
    assert run.exit_code == 0, run.output
    (row,) = load(tmp_path / "out", "trials").to_pylist()
    direct = run_trial(TrialConfig.from_dict(ANY), Placement(endpoint=blocks)).summary
    assert row["avg"] == direct["avg"] and row["queried_images"] == direct["queried_images"]
