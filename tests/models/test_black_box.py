"""A backbone that is a black box: what is asked of it, and every way in which a real server can fail."""

from __future__ import annotations

import itertools
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from click.testing import CliRunner
from doors import listening, open_to_the_network, unknown_doors
from places import ROOT, TESTS
from torch import Tensor

from zeroflow import ConfigError, Placement, TrialConfig, run_trial
from zeroflow.cli import main
from zeroflow.grid.grid_file import load_grid, parse_grid
from zeroflow.models import endpoint, named
from zeroflow.models.backbone import Backbone
from zeroflow.models.endpoint import BlackBox, EndpointError, HttpFeatures, open_black_box
from zeroflow.models.factory import create_backbone
from zeroflow.models.tuning import InputPrompt
from zeroflow.optim import list_optimizers
from zeroflow.results import load
from zeroflow.sweep.serve import wanted

pytestmark = pytest.mark.usefixtures("some_drawings", "tiny_vit")
SMALL = {
    "backbone": "zeroflow_tiny_vit", "checkpoint": "none", "image_size": 14, "dataset": "some-drawings", "tasks": 10,
    "stop_after": 2, "epochs": 1, "batch_size": 8, "optimizer": "zo-sgd", "lr": 0.01, "method": "finetune",
    "method_options": {"tune": "input-prompt"},
}  # fmt: skip
SERVER = TESTS / "endpoint_server.py"


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
        **SMALL,
        "stop_after": 1,
        "queries": queries,
        "method_options": {"tune": "input-prompt", "imprint": False},
    }
    box, plain = TrialConfig.from_dict({**config, "access": "black-box"}), TrialConfig.from_dict(config)
    found, white = run_trial(box, Placement(endpoint=ask)), run_trial(plain)
    assert ask.sizes.count(2 * queries * 8) == len(found.steps) == 3
    assert ask.sizes[0] == 1, "the probe for the width"
    summary = found.summary
    assert summary["requests"] == len(ask.sizes) - 1 and summary["queried_images"] == sum(ask.sizes[1:])
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
    config = {**SMALL, "stop_after": 1, "optimizer": name, "method_options": {"tune": "input-prompt", "imprint": False}}
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
    config = {**SMALL, "method": method, "method_options": options}
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
        TrialConfig.from_dict({**SMALL, "access": "black-box", **values})


def test_an_endpoint_may_call_its_backbone_as_it_likes_where_the_image_size_is_named() -> None:
    config = TrialConfig.from_dict({**SMALL, "access": "black-box", "backbone": "of-somebody-else", "checkpoint": None})
    assert run_trial(config, Placement(endpoint=Asked())).summary["avg"] > 0


def test_what_does_not_fit_into_one_request_travels_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**SMALL, "stop_after": 1, "queries": 3, "method_options": {"tune": "input-prompt", "imprint": False}}
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

    assert run_trial(TrialConfig.from_dict({**SMALL, "access": "black-box"}), Placement(endpoint=moody)).steps


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

        config = TrialConfig.from_dict({**SMALL, "access": "black-box", "backbone": "mine"})
        found.append(run_trial(config, Placement(endpoint=ask)))
    smooth, failing = found
    assert [step.loss for step in smooth.steps] == [step.loss for step in failing.steps]
    assert np.array_equal(smooth.accuracy_matrix, failing.accuracy_matrix, equal_nan=True)


def test_a_black_box_without_an_endpoint_says_what_starts_one() -> None:
    with pytest.raises(ConfigError, match="zeroflow serve starts one"):
        run_trial(TrialConfig.from_dict({**SMALL, "access": "black-box"}))


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
        run_trial(TrialConfig.from_dict({**SMALL, "access": "black-box"}), Placement(endpoint=empty))


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
        run_trial(TrialConfig.from_dict({**SMALL, "access": "black-box"}), Placement(endpoint=failing))
    assert caught.value.__cause__ is error and len(sizes) == images, "it is not asked again"


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


# What can go wrong, each with a real process at the other end


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def start(port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Starts a server with a plan on ``port``; waits between tries are short."""
    monkeypatch.setenv(endpoint.TOKEN, "right")
    monkeypatch.setattr(endpoint, "WAITS", (0.05, 0.05, 0.05))
    running: list[subprocess.Popen[bytes]] = []

    def started(plan: str) -> subprocess.Popen[bytes]:
        running.append(subprocess.Popen([sys.executable, str(SERVER), str(port), plan]))
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return running[-1]
            time.sleep(0.05)
        raise TimeoutError("the server did not start")

    yield started
    for process in running:
        process.kill()
        process.wait()


def cell(port: int, timeout: float = 30.0, **settings: Any) -> Any:
    values = {**SMALL, "checkpoint": None, "stop_after": 1, **settings, "access": "black-box"}
    place = Placement(endpoint=f"http://127.0.0.1:{port}/", endpoint_timeout=timeout)
    return run_trial(TrialConfig.from_dict(values), place)


@pytest.mark.slow
def test_a_server_that_recovers_within_the_tries_changes_nothing_but_the_count(port: int, start) -> None:
    start("gnoowoifoffoooo")
    disturbed = cell(port)
    other = run_trial(disturbed.config, Placement(endpoint=HttpFeatures(f"http://127.0.0.1:{port}/")))
    assert [s.loss for s in disturbed.steps] == [s.loss for s in other.steps]
    assert disturbed.summary["requests"] == other.summary["requests"] + 7, "g, n, w, i and three f"


@pytest.mark.parametrize(
    ("plan", "timeout", "message"),
    [
        ("oog", 30.0, "not safetensors"), ("oon", 30.0, "not finite"), ("oow", 30.0, r"shape \(16, 7\), expected \(16, 8\)"),
        ("ooi", 30.0, "int32, not floats"), ("oof", 30.0, r"status 503 \(its queue is full\)"), ("oos", 0.3, "timed out"),
        ("ood", 30.0, "Error"),
    ],
)  # fmt: skip
def test_a_server_that_stays_wrong_fails_the_cell_in_one_sentence(
    plan: str, timeout: float, message: str, port: int, start
) -> None:
    start(plan)
    with pytest.raises(EndpointError, match=rf"no usable answer in 4 tries; the last: .*{message}"):
        cell(port, timeout, method_options={"tune": "input-prompt", "imprint": False})


@pytest.mark.slow
def test_a_server_killed_in_the_middle_of_a_step_and_started_again_is_gone_on_with(
    port: int, start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "WAITS", (0.5,) * 200)
    first = start("ooood")
    again: list[Any] = []

    def revive() -> None:
        first.wait()
        again.append(start("o"))

    thread = threading.Thread(target=revive)
    thread.start()
    found = cell(port)
    thread.join()
    assert first.returncode == 1 and again
    undisturbed = cell(port)
    assert [s.loss for s in found.steps] == [s.loss for s in undisturbed.steps]
    np.testing.assert_array_equal(found.accuracy_matrix, undisturbed.accuracy_matrix)
    assert found.summary["requests"] > undisturbed.summary["requests"]


def test_what_is_refused_is_not_asked_again_and_its_reason_is_told(port: int, start) -> None:
    start("oob")
    with pytest.raises(EndpointError, match=r"no usable answer: status 413 \(a body of at most 7 bytes is expected\)"):
        cell(port, method_options={"tune": "input-prompt", "imprint": False})


def test_a_connection_that_was_ended_while_idle_costs_no_request(port: int, start) -> None:
    start("c")
    box = open_black_box("zeroflow_tiny_vit", image_size=14, endpoint=f"http://127.0.0.1:{port}/")
    for _ in range(4):
        box(torch.zeros(2, 3, 14, 14))
        time.sleep(0.1)
    assert (box.requests, box.images) == (4, 8)


def test_a_server_that_comes_back_as_another_model_ends_the_cell(port: int, start) -> None:
    """Its features would be mixed with those of the first."""
    start("oomo")
    expected = (
        "since its connection was lost it serves checkpoint='another', before None; the cell would mix two models"
    )
    with pytest.raises(ConfigError, match=expected):
        cell(port, method_options={"tune": "input-prompt", "imprint": False})


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:80", "localhost:8017", "http://127.0.0.1:99999/", "http://[::1/", "http://", "ftp://host/", "http://bob:hunter22@h/"],
)  # fmt: skip
def test_what_is_no_address_is_told_before_anything_runs(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(endpoint.TOKEN, "right")
    for refused in (lambda: HttpFeatures(url), lambda: parse_grid({"grid": [{}], "placement": {"endpoint": url}})):
        with pytest.raises(ConfigError, match="an address") as error:
            refused()
        assert "hunter22" not in str(error.value)


def test_a_token_may_end_in_a_newline_and_is_never_shown(port: int, start, monkeypatch) -> None:
    start("o")
    monkeypatch.setenv(endpoint.TOKEN, "right\n")
    assert HttpFeatures(f"http://127.0.0.1:{port}/").facts()["width"] == 8
    for wrong in ("supersecret\ntoken", "supersecret€"):
        monkeypatch.setenv(endpoint.TOKEN, wrong)
        with pytest.raises(ConfigError, match="printable ASCII") as error:
            HttpFeatures(f"http://127.0.0.1:{port}/")
        assert "supersecret" not in str(error.value)


@pytest.mark.parametrize("width", ["8", None, -3, 192.5, True])
def test_an_endpoint_that_says_nonsense_of_itself_is_told(width: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(endpoint.TOKEN, "right")
    monkeypatch.setattr(endpoint, "WAITS", ())
    facts = json.dumps({"backbone": "b", "image_size": 14, "width": width}).encode()
    monkeypatch.setattr(HttpFeatures, "_ask", lambda self, method, body=None: facts)
    with pytest.raises(EndpointError, match=r"width=.*expected an integer >= 1"):
        open_black_box("b", image_size=14, endpoint="http://h/")


def test_other_weights_than_the_cells_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(endpoint.TOKEN, "right")
    monkeypatch.chdir(tmp_path)

    def serving(checkpoint: str | None) -> None:
        said = {"backbone": "quickdraw_vit", "image_size": 28, "width": 8}
        facts = json.dumps({**said, "checkpoint": endpoint.weights_of("quickdraw_vit", checkpoint)}).encode()
        monkeypatch.setattr(HttpFeatures, "_ask", lambda self, method, body=None: facts)

    serving("none")
    with pytest.raises(ConfigError, match="serves checkpoint='none', the cell needs 'embedded'"):
        open_black_box("quickdraw_vit", endpoint="http://h/")
    serving("mine.safetensors")
    open_black_box("quickdraw_vit", checkpoint=str(tmp_path / "mine.safetensors"), endpoint="http://h/")
    with pytest.raises(ConfigError, match="the cell needs 'embedded'"):
        open_black_box("quickdraw_vit", endpoint="http://h/")


def test_nobody_there_a_wrong_token_and_another_backbone_are_told(port: int, start, monkeypatch) -> None:
    with pytest.raises(EndpointError, match="no answer in 4 tries; the last: ConnectionRefusedError"):
        cell(port)
    start("o")
    with pytest.raises(ConfigError, match="serves backbone='zeroflow_tiny_vit', the cell needs 'quickdraw_vit'"):
        open_black_box("quickdraw_vit", endpoint=f"http://127.0.0.1:{port}/")
    monkeypatch.setenv(endpoint.TOKEN, "wrong")
    with pytest.raises(ConfigError, match=r"refused the token in ZEROFLOW_ENDPOINT_TOKEN \(status 401\)"):
        cell(port)
    monkeypatch.delenv(endpoint.TOKEN)
    with pytest.raises(ConfigError, match="no token; set the environment variable ZEROFLOW_ENDPOINT_TOKEN"):
        cell(port)


@pytest.mark.ray
def test_zeroflow_serve_answers_as_the_backbone_refuses_what_is_wrong_and_says_when_it_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(endpoint.TOKEN, "right")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    address = tmp_path / "address"
    command = [sys.executable, "-m", "zeroflow", "serve", "--port", "0", "--queue", "1", "--address-file", str(address)]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 300
        while not address.exists() and server.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        assert address.exists(), server.communicate()[0]
        url = address.read_text().strip()
        local, images = create_backbone(), torch.rand(32, 3, 28, 28, generator=torch.Generator().manual_seed(0))
        box = open_black_box("quickdraw_vit", endpoint=url)
        with torch.no_grad():
            torch.testing.assert_close(box(images), local(images), rtol=1e-4, atol=1e-5)
        seen = listening(server.pid)
        assert any("ServeReplica" in name for name, _ in seen) and not open_to_the_network(seen), seen
        assert unknown_doors(seen, "zeroflow serve") == set()
        for wrong in (images[:, :, :14], images.double()[:, :1], images[0]):
            with pytest.raises(EndpointError, match="status 400"):
                HttpFeatures(url)(wrong)
        with pytest.raises(ConfigError, match="refused the token"):
            HttpFeatures(url, token="wrong").facts()
        answers: list[str] = []

        def ask() -> None:
            try:
                HttpFeatures(url)(images.repeat(8, 1, 1, 1))
                answers.append("done")
            except EndpointError as error:
                answers.append(str(error))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert "done" in answers and "status 503 (its queue is full)" in answers, answers
        (replica,) = [
            p for p in psutil.Process(server.pid).children(recursive=True) if "ServeReplica" in p.cmdline()[0]
        ]
        replica.kill()
        replica.wait(30)
        patient = BlackBox(HttpFeatures(url), local.width, local.image_size, waits=[0.5] * 120)
        with torch.no_grad():
            torch.testing.assert_close(patient(images), local(images), rtol=1e-4, atol=1e-5)
        assert patient.requests > 1, "it was gone, and was started again at the same address"
        config = {
            "method": "simplecil",
            "access": "black-box",
            "dataset": "some-drawings",
            "tasks": 10,
            "stop_after": 1,
        }
        found = run_trial(TrialConfig.from_dict(config), Placement(endpoint=url))
        plain = run_trial(TrialConfig.from_dict({**config, "access": "white-box"}))
        np.testing.assert_array_equal(found.accuracy_matrix, plain.accuracy_matrix)
    finally:
        server.terminate()
        assert server.wait(60) == 0, "it ends in order, as a service manager asks it to"
    with pytest.raises(EndpointError):
        HttpFeatures(url).facts()


@pytest.mark.slow
def test_a_port_that_is_taken_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(endpoint.TOKEN, "right")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "zeroflow", "serve", "--port", str(port)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2 and f"cannot listen on 127.0.0.1:{port}" in result.stderr, result.stderr
    assert "Traceback" not in result.stderr


def test_a_token_is_required_to_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(endpoint.TOKEN, raising=False)
    result = CliRunner().invoke(main, ["serve"])
    assert result.exit_code == 2 and endpoint.TOKEN in result.output
