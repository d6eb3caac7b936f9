"""A black box behind an address: every way in which a real server can fail, and ours, ``zeroflow serve``."""

from __future__ import annotations

import json
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
from cells import PROMPTED
from click.testing import CliRunner
from doors import listening, open_to_the_network, unknown_doors
from places import ROOT, TESTS

from zeroflow import ConfigError, Placement, TrialConfig, run_trial
from zeroflow.cli import main
from zeroflow.grid.grid_file import parse_grid
from zeroflow.models import endpoint
from zeroflow.models.endpoint import BlackBox, EndpointError, HttpFeatures, open_black_box
from zeroflow.models.factory import create_backbone

pytestmark = pytest.mark.usefixtures("some_drawings", "tiny_vit")
SERVER = TESTS / "endpoint_server.py"


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
    values = {**PROMPTED, "checkpoint": None, "stop_after": 1, **settings, "access": "black-box"}
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


def answers_at_once(url: str, images: torch.Tensor) -> list[str]:
    """What eight that ask at once are told."""
    answers: list[str] = []

    def ask() -> None:
        try:
            HttpFeatures(url)(images)
            answers.append("done")
        except EndpointError as error:
            answers.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


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
        answers = answers_at_once(url, images.repeat(8, 1, 1, 1))
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
