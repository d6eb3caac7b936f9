"""Frozen features are computed once per machine, and a black box is asked once per store: never another bit in a result."""

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
import torch
from torch import Tensor

from zeroflow import ConfigError, Placement, TrialConfig, TrialResult, run_trial
from zeroflow.classifiers import register_classifier
from zeroflow.classifiers.class_means import ClassMeans
from zeroflow.data import ArraySamples, ImageDataset, class_incremental, class_order, load_dataset, transforms
from zeroflow.methods.aper import APERAdapter
from zeroflow.methods.shared_adapter import SharedAdapter
from zeroflow.methods.simplecil import SimpleCIL
from zeroflow.models import endpoint
from zeroflow.models.access import open_backbone
from zeroflow.models.backbone import Backbone
from zeroflow.models.factory import create_backbone
from zeroflow.models.frozen import fingerprint
from zeroflow.models.timm_backbone import TransformerBackbone
from zeroflow.trial.features import FrozenFeatures

pytestmark = pytest.mark.usefixtures("some_drawings", "tiny_vit")
TINY = {"backbone": "zeroflow_tiny_vit", "checkpoint": "none", "image_size": 14}
SMALL = {**TINY, "dataset": "some-drawings", "tasks": 10, "stop_after": 2, "method": "simplecil"}
IMAGES = 4 * (12 + 5)
"""Of the four classes of two tasks."""
BESIDE = 2 + 48 // 2
"""Images that a cell passes whatever is known: two for the key, a task's 24 for its memory."""


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "zeroflow" / "features"


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images went through a backbone, each time."""
    counts: list[int] = []
    plain = TransformerBackbone.forward

    def counted(self: Backbone, images: Any, adapters: Any = None) -> Tensor:
        if isinstance(images, Tensor):
            counts.append(len(images))
        return plain(self, images, adapters)

    monkeypatch.setattr(TransformerBackbone, "forward", counted)
    return counts


def cell(place: dict[str, Any] | None = None, **settings: Any) -> TrialResult:
    return run_trial(TrialConfig.from_dict({**SMALL, **settings}), Placement(device="cpu", **(place or {})))


def features_of(dataset: ImageDataset, backbone: Backbone | None = None, **how: Any) -> FrozenFeatures:
    settings = {"batch_size": 8, "cache_bytes": 10**9, "names": {}, **how}
    return FrozenFeatures(
        backbone or create_backbone("zeroflow_tiny_vit", checkpoint="none", image_size=14),
        dataset,
        torch.device("cpu"),
        torch.float32,
        **settings,
    )


def by_image(dataset: ImageDataset, found: FrozenFeatures, increments: list[int], **how: Any) -> dict[Any, bytes]:
    """The bits of every image's features as a stream of tasks asks for them."""
    bits = {}
    for task in class_incremental(dataset, increments, transforms.get("plain"), 14, **how).tasks:
        for view in (task.train, task.test):
            part = "train" if view.samples is dataset.train else "test"
            features = found.of(view)
            assert features.shape == (len(view), 32)
            bits |= {(part, int(i)): row.numpy().tobytes() for i, row in zip(view.indices, features, strict=True)}
    return bits


def test_a_classifier_may_work_on_features_in_place(some_drawings: str) -> None:
    """The features of test images are kept from stage to stage, those of a view until another one is asked for."""
    found = []
    for inside in (False, True):

        class Shifted(ClassMeans):
            def _shifted(self, features: Tensor, inside: bool = inside) -> Tensor:
                return features.sub_(0.3).mul_(1.5) if inside else (features - 0.3) * 1.5

            def add(self, features: Tensor, labels: Tensor) -> None:
                super().add(self._shifted(features), labels)

            def scores(self, features: Tensor) -> Tensor:
                return super().scores(self._shifted(features))

        register_classifier(f"shifted-{inside}", "shifts features")(Shifted)
        found.append(cell(method="simplecil", classifier=f"shifted-{inside}", optimizer=None, stop_after=4))
    copied, inside = found
    assert np.array_equal(copied.accuracy_matrix, inside.accuracy_matrix, equal_nan=True)


# Bits


class Together(TransformerBackbone):
    """A backbone whose features tell which images were passed together, as a product's last bits may."""

    def forward(self, images: Any, adapters: Any = None) -> Tensor:
        return super().forward(images, adapters) + images.mean()


@pytest.mark.slow
def test_a_class_is_computed_alone_whatever_the_order_the_tasks_the_cache_and_what_is_held_out() -> None:
    dataset = load_dataset("some-drawings")
    backbone = Together(create_backbone("zeroflow_tiny_vit", checkpoint="none", image_size=14).model)
    expected = {}
    with torch.no_grad():
        for part, samples in (("train", dataset.train), ("test", dataset.test)):
            for label in range(20):
                rows = np.flatnonzero(samples.labels == label)
                for own in (rows[:8], rows[8:]):
                    images = transforms.get("plain").test(samples.images(own), 14)
                    expected |= {
                        (part, int(i)): row.numpy().tobytes() for i, row in zip(own, backbone(images), strict=True)
                    }
    streams: list[dict[str, Any]] = [
        {"increments": [2] * 10},
        {"increments": [20], "order": class_order(20, 7)},
        {"increments": [1, 19], "validation": 0.4},
        {"increments": [5, 10, 5], "order": np.arange(20), "threads": 2},
    ]
    for stream in streams:
        for cache_bytes in (0, 10**9, 10**9):
            found = by_image(dataset, features_of(dataset, backbone, cache_bytes=cache_bytes), **stream)
            assert found == {key: expected[key] for key in found}
            assert len(found) == (20 * 12 if "validation" in stream else 20 * 17)


@pytest.mark.parametrize("settings", [{}, {"validation": 0.25}, {"access": "spiking"}, {"access": "int8"}])
def test_a_cell_has_the_same_result_with_a_cold_a_warm_and_no_cache(
    settings: dict[str, Any], passed: list[int]
) -> None:
    first = cell(**settings)
    assert sum(passed) >= IMAGES
    results = [first, cell(**settings), cell({"cache_bytes": 0}, **settings)]
    for found in results[1:]:
        np.testing.assert_array_equal(found.accuracy_matrix, first.accuracy_matrix)
        assert found.summary["peak_memory_bytes"] == first.summary["peak_memory_bytes"] > 0
    assert "queried_images" not in first.summary


def test_a_second_cell_computes_only_what_no_cell_has_needed_before(passed: list[int]) -> None:
    order = [*range(20)]
    cell(fixed_class_order=order)
    assert sum(passed) == IMAGES + BESIDE
    passed.clear()
    cell(fixed_class_order=order)
    assert sum(passed) == BESIDE
    passed.clear()
    cell(fixed_class_order=[19, 3, 18, 1, *[c for c in order if c not in (19, 3, 18, 1)]])
    assert sum(passed) == 2 * 17 + BESIDE, "classes 1 and 3 are known"


def test_aper_looks_its_frozen_half_up_and_ends_as_without_a_cache() -> None:
    more = {"method": "aper-adapter", "optimizer": "zo-sgd", "lr": 0.01, "epochs": 1, "batch_size": 8}
    cell()
    warm, none = cell(**more), cell({"cache_bytes": 0}, **more)
    np.testing.assert_array_equal(warm.accuracy_matrix, none.accuracy_matrix)
    assert [s.loss for s in warm.steps] == [s.loss for s in none.steps]


def test_spiking_features_are_those_of_their_own_first_task() -> None:
    """What a neuron fires at most is found on the first task: features of another first task are others."""
    for seed in (1993, 5):
        found = [cell(place, access="spiking", class_order_seed=seed) for place in ({}, {}, {"cache_bytes": 0})]
        for other in found[1:]:
            np.testing.assert_array_equal(other.accuracy_matrix, found[0].accuracy_matrix)
    assert len({path.parent for path in Path(os.environ["XDG_CACHE_HOME"]).rglob("train-*")}) == 2


def test_a_class_with_features_of_its_own_takes_images_unless_it_says_otherwise() -> None:
    class Moves(SimpleCIL):
        def features(self, images: Tensor, spaces: range) -> Tensor:
            return images.flatten(1)[:, None]

    class Inherits(SimpleCIL):
        pass

    assert (Moves.takes, Inherits.takes, SharedAdapter.takes) == ("images", "features", "images")


@pytest.mark.parametrize(("merge", "takes"), [(True, "both"), (False, "images")])
def test_aper_needs_frozen_features_where_it_keeps_them(merge: bool, takes: str) -> None:
    backbone = create_backbone("zeroflow_tiny_vit", checkpoint="none", image_size=14)
    assert APERAdapter(backbone, APERAdapter.Options(merge=merge)).takes == takes


# What tells features apart


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        ({"transform": "timm"}, {}), ({"image_size": 7}, {}), ({"access": "int8"}, {}), ({"dtype": "float64"}, {}),
        ({}, {"evaluation_batch": 10}), ({}, {"threads": 2}),
    ],
)  # fmt: skip
def test_what_changes_features_makes_them_anew(settings: dict[str, Any], place: dict[str, Any], cache: Path) -> None:
    cell()
    cell(place, **settings)
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 2


def test_weights_tell_features_apart_and_the_name_of_their_file_does_not(tmp_path: Path, cache: Path) -> None:
    state, keys = create_backbone("zeroflow_tiny_vit", checkpoint="none", image_size=14).model.state_dict(), []
    for number, change in enumerate((0.0, 0.0, 1e-6)):
        file = tmp_path / f"{number}.safetensors"
        safetensors.torch.save_file({**state, "norm.bias": state["norm.bias"] + change}, file)
        cell(checkpoint=str(file))
        keys.append(len([path for path in cache.iterdir() if path.is_dir()]))
    assert keys == [1, 1, 2]


@pytest.mark.parametrize("access", ["white-box", "spiking", "int8", "exported"])
def test_a_fingerprint_changes_with_any_weight(access: str, tmp_path: Path) -> None:
    if access == "exported":
        pytest.importorskip("onnxruntime")
    state = create_backbone("zeroflow_tiny_vit", checkpoint="none", image_size=14).model.state_dict()
    prints = []
    for change in (None, "blocks.1.mlp.fc2.weight", "patch_embed.proj.bias", "norm.weight", None):
        other = {name: value.clone() for name, value in state.items()}
        if change:
            other[change].view(-1)[-1] += 0.125
        file = tmp_path / f"{len(prints)}.safetensors"
        safetensors.torch.save_file(other, file)
        arguments = {"checkpoint": str(file), "image_size": 14}
        prints.append(fingerprint(open_backbone(access, "zeroflow_tiny_vit", **arguments)))
    assert len(set(prints)) == 4 and prints[0] == prints[-1]


def test_another_pixel_or_label_is_another_data_set(passed: list[int]) -> None:
    whole, counts = load_dataset("some-drawings"), []
    pixels, labels = whole.test.images(np.arange(100)), whole.test.labels
    changed = pixels.clone()
    changed[99, 0, 0, 0] += 1
    turned = labels.copy()
    turned[[0, -1]] = turned[[-1, 0]]
    for part in (ArraySamples(pixels, labels), ArraySamples(changed, labels), ArraySamples(pixels, turned)):
        dataset = ImageDataset(whole.name, whole.class_names, whole.train, part)
        by_image(dataset, features_of(dataset), [20])
        counts.append(sum(passed))
        passed.clear()
    assert counts == [2 + 20 * 17, 2 + 5, 2 + 20 * 17], "beside two for the key: all, those of one class, all"


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


# Features that are none


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    state = create_backbone("zeroflow_tiny_vit", checkpoint="none", image_size=14).model.state_dict()
    state["norm.weight"][3] = float("nan")
    safetensors.torch.save_file(state, tmp_path / "broken.safetensors")
    with pytest.raises(ConfigError, match=r"broken.safetensors: weights that are not finite: norm.weight$"):
        create_backbone("zeroflow_tiny_vit", checkpoint=str(tmp_path / "broken.safetensors"), image_size=14)


@pytest.mark.parametrize(
    ("name", "value", "blame"),
    [
        ("blocks.1.norm1.bias", float("nan"), "its weights model.blocks.1.norm1.bias are not finite"),
        ("blocks.0.mlp.fc1.bias", 1e38, "its weights are finite, the output of model.blocks.0.mlp.fc2 is not"),
    ],
)
def test_features_that_are_not_finite_are_refused_with_what_is_to_blame(name: str, value: float, blame: str) -> None:
    dataset, backbone = (
        load_dataset("some-drawings"),
        create_backbone("zeroflow_tiny_vit", checkpoint="none", image_size=14),
    )
    with torch.no_grad():
        backbone.model.get_parameter(name)[:] = value
        backbone.model.blocks[0].mlp.fc2.weight.fill_(1.0)
    first = class_order(20)[0]
    where = rf"data set 'some-drawings', train, class '{dataset.class_names[first]}', image 0: the backbone's features"
    for cache_bytes in (0, 10**9):
        with pytest.raises(ConfigError, match=f"{where} are not finite: {blame}"):
            by_image(dataset, features_of(dataset, backbone, cache_bytes=cache_bytes), [20])


def test_the_image_is_named_whose_features_are_not_finite() -> None:
    dataset, plain = (
        load_dataset("some-drawings"),
        create_backbone("zeroflow_tiny_vit", checkpoint="none", image_size=14),
    )
    odd = transforms.get("plain").test(dataset.test.images(np.array([3 * 5 + 2])), 14)

    class Odd(TransformerBackbone):
        def forward(self, images: Any, adapters: Any = None) -> Tensor:
            same = (images == odd).flatten(1).all(1)
            return super().forward(images, adapters).masked_fill(same[:, None], float("inf"))

    with pytest.raises(ConfigError, match=rf"test, class '{dataset.class_names[3]}', image 2: .* not finite$"):
        by_image(dataset, features_of(dataset, Odd(plain.model), batch_size=2), [20])


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
        assert sum(passed) == 1 + IMAGES and found.summary["queried_images"] == IMAGES
