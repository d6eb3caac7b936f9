"""Data sets and a backbone made for the tests."""

from __future__ import annotations

import os

# Several test processes share few cores, and small models only wait for each other's threads: an hour becomes minutes. Before
# torch is imported, and for the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from everything import everything
from pages import CHROMIUM, DRIVER, FLAGS
from pyarrow import fs
from torch import Tensor

from zeroflow.cli import main
from zeroflow.data import ArraySamples, ImageDataset, load_dataset
from zeroflow.data.dataset import datasets, register_dataset
from zeroflow.results import Store


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What shares a Ray comes first, so that one process of several takes all of it, and one Ray is started."""
    items.sort(key=lambda item: not shares_ray(item))


def shares_ray(item: pytest.Item | None) -> bool:
    return "ray_here" in getattr(item, "fixturenames", ())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """The shared Ray ends after the last test that needs it: its processes do not idle beside all that follows."""
    try:
        yield
    finally:
        if shares_ray(item) and not shares_ray(nextitem):
            import ray

            ray.shutdown()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is kept for all cells of a machine is the tests' own, and goes with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of a test's own, with nothing in it; its folder, which is not there yet."""
    home = tmp_path_factory.mktemp("home") / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home / "zeroflow"


@pytest.fixture(scope="session")
def few_images() -> str:
    """A registered data set of 4 classes with 2 training and 1 test image each, 40 x 40 RGB."""
    name = "few-images"
    if name not in datasets.names():

        @register_dataset(
            name, classes=4, transform="plain", image_size=40, where="made by the tests", description="4 classes"
        )
        def load(data_dir=None) -> ImageDataset:
            generator = torch.Generator().manual_seed(0)

            def part(per_class: int) -> ArraySamples:
                labels = np.repeat(np.arange(4), per_class)
                pixels = torch.randint(0, 256, (len(labels), 3, 40, 40), generator=generator, dtype=torch.uint8)
                return ArraySamples(pixels, labels)

            return ImageDataset(name, ("a", "b", "c", "d"), part(2), part(1))

    return name


@pytest.fixture(scope="session")
def some_drawings() -> str:
    """A registered part of QuickDraw-100: its first 20 classes with 12 training and 5 test drawings each."""
    name = "some-drawings"
    if name not in datasets.names():

        @register_dataset(
            name, classes=20, transform="drawings", image_size=28, where="made by the tests", description="20 classes"
        )
        def load(data_dir=None) -> ImageDataset:
            whole = load_dataset("quickdraw100")

            def part(samples, per_class: int) -> ArraySamples:
                chosen = np.concatenate([np.flatnonzero(samples.labels == label)[:per_class] for label in range(20)])
                return ArraySamples(samples.images(chosen), samples.labels[chosen])

            return ImageDataset(name, whole.class_names[:20], part(whole.train, 12), part(whole.test, 5))

    return name


@pytest.fixture(scope="session")
def tiny_vit() -> dict[str, Any]:
    """Settings of a cell on a vision transformer of two blocks with random weights: its steps take milliseconds."""
    import timm
    from timm.models.vision_transformer import VisionTransformer

    if not timm.is_model("zeroflow_tiny_vit"):

        @timm.models.register_model
        def zeroflow_tiny_vit(pretrained: bool = False, **settings: Any) -> VisionTransformer:
            given = {key: value for key, value in settings.items() if key in ("img_size", "num_classes", "in_chans")}
            return VisionTransformer(
                **{"img_size": 14, "patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2, **given}
            )

    return {"backbone": "zeroflow_tiny_vit", "checkpoint": "none", "image_size": 14}


@pytest.fixture
def ray_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ray of this process, which all sweeps that tests run in it share: its workers have imported all.

    More logical CPUs than there may be real ones: bits do not depend on who is how fast.
    """
    import ray

    from zeroflow.sweep.local_ray import start_local_ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if not ray.is_initialized():
        start_local_ray(num_cpus=4)


@pytest.fixture
def sweep_here(ray_here: None) -> Callable[..., Result]:
    """``zeroflow sweep`` or ``search`` in this process, on the Ray that it shares."""

    def run(command: str, *arguments: object) -> Result:
        return CliRunner().invoke(main, [command, *map(str, arguments)], catch_exceptions=False)

    return run


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with nothing in it yet."""
    return Store(tmp_path / "results")


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store that there is something of for every table and figure; nobody writes into it."""
    return everything(Store(tmp_path_factory.mktemp("results")))


ACCESS_DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 server with an empty bucket ``bucket``; as Amazon's, it knows nobody without credentials."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log_request(self, *_: object) -> None: ...

    backend = DomainDispatcherApplication(create_backend_app)

    def application(environ: dict[str, Any], start_response: Any) -> Any:
        if "HTTP_AUTHORIZATION" in environ:
            return backend(environ, start_response)
        start_response("403 Forbidden", [("Content-Type", "application/xml")])
        return [ACCESS_DENIED]

    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"127.0.0.1:{server.server_port}"
    fs.S3FileSystem(
        access_key="key",
        secret_key="secret",
        region="us-east-1",
        endpoint_override=address,
        scheme="http",
        allow_bucket_creation=True,
    ).create_dir("bucket")
    yield address
    server.shutdown()
    thread.join()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same, with the environment of someone who uses it."""
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{s3_server}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_CONFIG_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if not CHROMIUM or not DRIVER:
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images went through a backbone, each time."""
    from zeroflow.models.timm_backbone import TransformerBackbone

    counts: list[int] = []
    plain = TransformerBackbone.forward

    def counted(self: Any, images: Any, adapters: Any = None) -> Tensor:
        if isinstance(images, Tensor):
            counts.append(len(images))
        return plain(self, images, adapters)

    monkeypatch.setattr(TransformerBackbone, "forward", counted)
    return counts
