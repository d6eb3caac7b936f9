"""Files of frozen features, torn, shared, bounded; and a black box, which is asked once per store."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
from cells import by_image, features_of

from zeroflow import Placement, TrialConfig, TrialResult, run_trial
from zeroflow.data import load_dataset
from zeroflow.models import endpoint
from zeroflow.models.factory import create_backbone

pytestmark = pytest.mark.usefixtures("some_drawings", "tiny_vit")
TINY = {"backbone": "zeroflow_tiny_vit", "checkpoint": "none", "image_size": 14}
SMALL = {**TINY, "dataset": "some-drawings", "tasks": 10, "stop_after": 2, "method": "simplecil"}
IMAGES = 4 * (12 + 5)
"""Of the four classes of two tasks."""


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "zeroflow" / "features"


def cell(place: dict[str, Any] | None = None, **settings: Any) -> TrialResult:
    return run_trial(TrialConfig.from_dict({**SMALL, **settings}), Placement(device="cpu", **(place or {})))


# Files


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def _flip_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[12] ^= 1
    path.write_bytes(content)


def _swap(path: Path) -> None:
    other = next(p for p in path.parent.glob(f"{path.name.split('-')[0]}-*.safetensors") if p != path)
    path.write_bytes(other.read_bytes())


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [_truncate, _flip, _flip_header, _swap, _empty, _remove])
def test_a_damaged_file_counts_as_missing_and_is_made_anew(
    damage: Callable[[Path], None], cache: Path, passed: list[int]
) -> None:
    dataset = load_dataset("some-drawings")
    expected = by_image(dataset, features_of(dataset), [20])
    path = sorted(cache.glob("*/train-*.safetensors"))[0]
    right = path.read_bytes()
    damage(path)
    passed.clear()
    assert by_image(dataset, features_of(dataset), [20]) == expected
    assert sum(passed) == 2 + 12, "the damaged class alone"
    assert path.read_bytes() == right
    assert not [*path.parent.glob(".*")]


SCRIPT = """
import sys, torch
from zeroflow import Placement, TrialConfig, run_trial
from zeroflow.models.timm_backbone import TransformerBackbone
plain, count = TransformerBackbone.forward, []
def counted(self, images, adapters=None):
    count.append(len(images))
    return plain(self, images, adapters)
TransformerBackbone.forward = counted
config = TrialConfig.from_dict({"method": "simplecil", "stop_after": 1, "class_order_seed": 1993})
print("ready", flush=True)
sys.stdin.readline()
found = run_trial(config, Placement(device="cpu"))
print(found.summary["avg"], sum(count))
"""


@pytest.mark.slow
def test_two_processes_at_once_share_the_work_and_get_the_same() -> None:
    both = [
        subprocess.Popen([sys.executable, "-c", SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in both:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=300)[0].split() for process in both]
    assert said[0][0] == said[1][0]
    assert sum(int(count) for _, count in said) == 10 * 100 + 2 * (2 + 48), "each image once, beside what each must"


def size_of(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())


@pytest.mark.slow
def test_all_files_stay_below_the_bound_and_what_was_used_least_recently_makes_room(cache: Path) -> None:
    dataset = load_dataset("some-drawings")
    needed = 340 * 32 * 4 + 40 * 512
    limit = 2 * needed + needed // 2

    def used(name: str, limit: int) -> set[str]:
        by_image(dataset, features_of(dataset, names={"name": name}, cache_bytes=limit), [20])
        return {path.name for path in cache.iterdir() if path.is_dir()}

    a = used("a", limit)
    ab = used("b", limit)
    assert a < ab and len(ab) == 2
    for old in ab:
        os.utime(cache / old / "size", (1000, 1000))
    assert used("a", limit) == ab, "and so a is used later than b"
    ac = used("c", limit)
    assert a < ac and len(ac) == 2 and ac != ab
    assert size_of(cache) <= limit
    assert used("d", needed - 1) == ac, "what never fits makes nobody go"
    assert used("a", needed) == a, "a lower bound holds at once"
    assert size_of(cache) <= needed


def test_a_cache_that_cannot_be_written_is_told_once_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = cell({"cache_bytes": 0})
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = cell()
    np.testing.assert_array_equal(found.accuracy_matrix, expected.accuracy_matrix)
    assert ["features are not kept" in str(one.message) for one in told] == [True]


def test_a_full_disk_is_told_once_and_leaves_no_torn_file(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    expected = cell({"cache_bytes": 0})
    whole = tempfile.NamedTemporaryFile

    def full(*arguments: Any, **named: Any) -> Any:
        file = whole(*arguments, **named)

        def write(content: bytes) -> int:
            file.file.write(content[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

        file.write = write
        return file

    monkeypatch.setattr("zeroflow.trial.feature_files.tempfile.NamedTemporaryFile", full)
    with pytest.warns(UserWarning, match="No space left on device: features are not kept") as told:
        found = cell()
    assert len(told) == 1
    np.testing.assert_array_equal(found.accuracy_matrix, expected.accuracy_matrix)
    assert [path.name for path in cache.glob("*/*")] == ["size"]


# A black box


class Endpoint(ThreadingHTTPServer):
    """An endpoint of the protocol that remembers how many images each request had."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        weight, asked = np.random.RandomState(0).randn(3 * 14 * 14, 8) / 20, self.asked

        class Handler(BaseHTTPRequestHandler):
            def reply(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                self.reply(json.dumps({"backbone": "zeroflow_tiny_vit", "image_size": 14, "width": 8}).encode())

            def do_POST(self) -> None:
                images = safetensors.numpy.load(self.rfile.read(int(self.headers["Content-Length"])))["images"]
                asked.append(len(images))
                found = np.stack([np.tanh(image.reshape(-1) @ weight) for image in images]).astype(np.float32)
                self.reply(safetensors.numpy.save({"features": found}))

            def log_message(self, *_: object) -> None: ...

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv(endpoint.TOKEN, "right")
    server = Endpoint()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


BOX = {"access": "black-box", "checkpoint": None, "fixed_class_order": [*range(20)]}


@pytest.mark.slow
def test_a_black_box_is_asked_for_an_image_once_per_store(server: Endpoint) -> None:
    place = {"endpoint": server.url, "results": "/somewhere/results", "price_per_1000_images": 10.0}
    first = cell(place, **BOX).summary
    assert sum(server.asked) == first["queried_images"] == IMAGES and first["requests"] == len(server.asked)
    assert first["reused_images"] == 0 and first["price"] == pytest.approx(0.68)
    server.asked.clear()
    again = cell(place, **BOX).summary
    assert server.asked == [] and (again["requests"], again["queried_images"], again["price"]) == (0, 0, 0)
    assert again["reused_images"] == IMAGES
    for key in ("avg", "last", "images_per_point", "peak_memory_bytes"):
        assert again[key] == first[key], "what the method needs does not depend on who asked"
    other = cell(
        {**place, "evaluation_batch": 7, "threads": 2}, **{**BOX, "fixed_class_order": [3, 2, *range(4, 20), 0, 1]}
    )
    assert sum(server.asked) == other.summary["queried_images"] == IMAGES // 2 == other.summary["reused_images"]


@pytest.mark.slow
def test_other_results_ask_again_and_so_does_a_cell_that_has_none(server: Endpoint) -> None:
    for results in ("/a", "/b", None, None):
        server.asked.clear()
        found = cell({"endpoint": server.url, "results": results}, **BOX, validation=0.25)
        assert sum(server.asked) == found.summary["queried_images"] == 4 * 12, "held-out images are those of the class"


@pytest.mark.slow
def test_aper_asks_a_black_box_for_its_frozen_half_once_per_store(server: Endpoint) -> None:
    place = {"endpoint": server.url, "results": "/somewhere/results"}
    more = {**BOX, "method": "aper-input-prompt", "optimizer": "zo-sgd", "lr": 0.01, "epochs": 1, "batch_size": 8}
    alone = cell({"endpoint": server.url}, **more)
    cell(place, **BOX)
    shared = cell(place, **more)
    assert shared.summary["queried_images"] == alone.summary["queried_images"] - IMAGES
    assert shared.summary["reused_images"] == IMAGES
    np.testing.assert_array_equal(shared.accuracy_matrix, alone.accuracy_matrix)


def test_a_callable_is_asked_by_every_cell(passed: list[int]) -> None:
    backbone = create_backbone("zeroflow_tiny_vit", checkpoint="none", image_size=14)
    for _ in range(2):
        passed.clear()
        found = cell({"endpoint": lambda images: backbone(images), "results": "/somewhere"}, access="black-box")
        assert sum(passed) == 2 + IMAGES and found.summary["queried_images"] == IMAGES
