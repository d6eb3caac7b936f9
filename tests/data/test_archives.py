"""Archives are fetched, checked before anything is unpacked, and put in place whole."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import io
import os
import tarfile
import threading
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from click.testing import CliRunner, Result
from image_files import write_cifar
from PIL import Image

from zeroflow.cli import main
from zeroflow.data import cifar, datasets, load_dataset
from zeroflow.data.archives import Archive, obtain
from zeroflow.errors import ConfigError


class Site(http.server.BaseHTTPRequestHandler):
    """Serves what is in ``files``; of a name with a star only the first half arrives."""

    files: ClassVar[Mapping[str, bytes]] = {}
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        name = self.path.strip("/*")
        self.asked.append(name)
        content = self.files.get(name)
        self.send_response(404 if content is None else 200)
        content = content or b"no such page"
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if "*" in self.path else content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[str]:
    Site.files, Site.asked = {}, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, site: str) -> str:
    """A small archive of CIFAR's format at the address that ``cifar100`` names; its content's url."""
    (tmp_path / "made").mkdir()
    folder = write_cifar(tmp_path / "made") / "cifar-100-python"
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        archive.add(folder, "cifar-100-python")
    Site.files = {"cifar.tar.gz": file.getvalue()}
    offered(monkeypatch, "cifar100", url=f"{site}/cifar.tar.gz", md5=md5(file.getvalue()))
    return f"{site}/cifar.tar.gz"


def offered(monkeypatch: pytest.MonkeyPatch, name: str, **changes: str) -> None:
    info = datasets.get(name)
    assert info.archive is not None
    changed = dataclasses.replace(info, archive=dataclasses.replace(info.archive, **changes))
    monkeypatch.setitem(datasets._entries, name, changed)


def download(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["download", *map(str, arguments)])


def test_the_published_addresses_and_sums() -> None:
    """As on https://www.cs.toronto.edu/~kriz/cifar.html and in PILOT's readme."""
    assert cifar.ARCHIVE.url == "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
    sums = {name: getattr(datasets.get(name).archive, "md5", None) for name in datasets.names()}
    assert sums["cifar100"] == "eb9058c3a382ffc7106e4002c42a8d85"
    assert sums["cub"] == "85e342a2d5f941e740193602057df7a5"
    assert sums["imagenet-a"] == "7f4aaf0b1532b7a0bd670822c152d3c5"
    assert sums["omnibenchmark"] == "f1c30808a707f9197c6c811ea52e5cbb"
    assert sums["quickdraw100"] is None


@pytest.mark.filterwarnings("ignore:.*not the published file")
def test_cifar_is_fetched_checked_unpacked_and_opens(published: str, tmp_path: Path) -> None:
    data_dir = tmp_path / "new" / "data"
    assert "zeroflow download cifar100 --data-dir" in datasets.get("cifar100").where
    done = download("cifar100", "--data-dir", data_dir)
    assert done.exit_code == 0 and done.output.strip() == str(data_dir / "cifar-100-python")
    assert [path.name for path in data_dir.iterdir()] == ["cifar-100-python"]
    assert load_dataset("cifar100", data_dir).class_names[99] == "class 99"
    again = download("cifar100", "--data-dir", data_dir)
    assert (again.exit_code, again.output) == (0, "cifar100: is here already\n") and Site.asked == ["cifar.tar.gz"]


def test_another_file_than_the_published_one_is_never_unpacked(published: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("it was opened"))
    Site.files = {"cifar.tar.gz": Site.files["cifar.tar.gz"] + b"\0"}
    done = download("cifar100", "--data-dir", tmp_path / "data")
    assert done.exit_code == 2
    for part in ("not the published cifar-100-python.tar.gz", md5(Site.files["cifar.tar.gz"]), "bytes), expected"):
        assert part in done.output
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize("how", ["cut off", "not found", "nobody"])
def test_a_failed_transfer_tells_why_and_what_else_to_do(published: str, tmp_path: Path, monkeypatch, how: str) -> None:
    address = {"cut off": f"{published}*", "not found": f"{published}.old", "nobody": "http://127.0.0.1:9/x.tar.gz"}[
        how
    ]
    offered(monkeypatch, "cifar100", url=address)
    done = download("cifar100", "--data-dir", tmp_path / "data")
    assert done.exit_code == 2 and "Traceback" not in done.output
    if how == "cut off":
        assert "not the published" in done.output
    else:
        reason = "Not Found" if how == "not found" else "refused"
        assert f"{address}: cannot be downloaded" in done.output and reason in done.output
        assert "fetch cifar-100-python.tar.gz elsewhere and name it with --archive" in done.output
    assert list((tmp_path / "data").iterdir()) == []


def zipped(path: Path, names: Mapping[str, bytes]) -> str:
    """Write a zip archive; its md5."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in names.items():
            archive.writestr(name, content)
    return md5(path.read_bytes())


@pytest.mark.parametrize("inside", ["", "birds/", "some folder/"])
def test_an_archive_at_hand_is_checked_and_unpacked(tmp_path: Path, monkeypatch, inside: str) -> None:
    image = io.BytesIO()
    Image.new("RGB", (5, 4), (1, 2, 3)).save(image, "png")
    names = {f"{inside}{part}/{i:03d}.Bird/x é.png": image.getvalue() for part in ("train", "test") for i in range(200)}
    file = tmp_path / "cub copy.zip"
    offered(monkeypatch, "cub", md5=zipped(file, {"__MACOSX/._x": b"", **names}))
    done = download("cub", "--archive", file, "--data-dir", tmp_path / "data")
    assert done.exit_code == 0, done.output
    dataset = load_dataset("cub", tmp_path / "data")
    assert len(dataset.class_names) == 200
    assert dataset.train.images(np.array([199]))[0][:, 0, 0].tolist() == [1, 2, 3] and file.exists()


def test_without_an_address_the_archive_must_be_named(tmp_path: Path) -> None:
    done = download("imagenet-a", "--data-dir", tmp_path)
    assert done.exit_code == 2 and "fetch ina.zip elsewhere and name it with --archive" in done.output
    done = download("folder:birds", "--data-dir", tmp_path)
    assert done.exit_code == 2 and "has no published archive. Put the images at <data_dir>/birds/" in done.output
    assert "is here already" in download("quickdraw100", "--data-dir", tmp_path).output


def evil_tar(path: Path, kind: str) -> str:
    """Write a tar archive that tries to reach outside; its md5."""
    with tarfile.open(path, "w") as archive:
        for name in ("set/train/a", "set/test/a"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
        member = tarfile.TarInfo({"parent": "set/../../escaped", "absolute": "/escaped"}.get(kind, "set/link"))
        if kind in ("link", "hard link", "device"):
            member.type = {"link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}[kind]
            member.linkname = "../../escaped"
        archive.addfile(member)
    return md5(path.read_bytes())


@pytest.mark.parametrize("kind", ["parent", "link", "hard link", "device"])
def test_a_tar_archive_cannot_write_outside(tmp_path: Path, kind: str) -> None:
    file, data_dir = tmp_path / "evil.tar", tmp_path / "data"
    archive = Archive("evil.tar", evil_tar(file, kind), "set", ("train", "test"))
    with pytest.raises(ConfigError, match=r"evil\.tar: cannot be unpacked: "):
        obtain(archive, data_dir, file)
    assert list(data_dir.iterdir()) == [] and not list(tmp_path.rglob("escaped"))


def test_an_absolute_name_in_a_tar_archive_stays_inside(tmp_path: Path) -> None:
    file = tmp_path / "evil.tar"
    target = obtain(Archive("evil.tar", evil_tar(file, "absolute"), "set", ("train", "test")), tmp_path / "data", file)
    assert sorted(path.name for path in target.iterdir()) == ["test", "train"] and not Path("/escaped").exists()


@pytest.mark.parametrize("name", ["../escaped", "set/../../escaped", "/escaped", "set\\..\\escaped"])
def test_a_zip_archive_cannot_write_outside(tmp_path: Path, name: str) -> None:
    file, data_dir = tmp_path / "evil.zip", tmp_path / "data"
    archive = Archive(
        "evil.zip", zipped(file, {"set/train/a": b"", "set/test/a": b"", name: b""}), "set", ("train", "test")
    )
    with pytest.raises(ConfigError, match="would be written outside"):
        obtain(archive, data_dir, file)
    assert list(data_dir.iterdir()) == [] and not list(tmp_path.rglob("*escaped*"))


def test_an_archive_of_something_else_and_a_taken_place_are_told(tmp_path: Path) -> None:
    file = tmp_path / "a.zip"
    archive = Archive("a.zip", zipped(file, {"set/train/a": b""}), "set", ("train", "test"))
    with pytest.raises(ConfigError, match=r"a\.zip: no folder with train, test in it"):
        obtain(archive, tmp_path / "data", file)
    (tmp_path / "data" / "set").mkdir()
    with pytest.raises(ConfigError, match="set: exists already; move it away"):
        obtain(archive, tmp_path / "data", file)
    file.write_bytes(b"no archive at all")
    with pytest.raises(ConfigError, match=r"a\.zip: cannot be unpacked"):
        obtain(dataclasses.replace(archive, md5=md5(file.read_bytes())), tmp_path / "other", file)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir(mode=0o500)
    done = download("cifar100", "--data-dir", tmp_path / "data")
    assert done.exit_code == 2 and "Permission denied" in done.output
