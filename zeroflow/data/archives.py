"""Download published archives, verify their md5 before unpacking, and install them atomically."""

from __future__ import annotations

import hashlib
import http.client
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from zeroflow.errors import ConfigError
from zeroflow.progress import Progress, silent

BLOCK = 2**20


@dataclass(frozen=True)
class Archive:
    """An archive of a data set's folder.

    Attributes:
        file: its name.
        md5: of the whole archive, as published.
        folder: destination of its content, below ``data_dir``.
        contents: names that identify the folder inside the archive.
        url: where it can be downloaded; None: only through a web page.
    """

    file: str
    md5: str
    folder: str
    contents: Sequence[str]
    url: str | None = None


def obtain(archive: Archive, data_dir: Path, local: Path | None = None, on_progress: Progress = silent) -> Path:
    """Install an archive's content at ``<data_dir>/<folder>``: all of it or, if anything fails, nothing.

    Args:
        archive: what to install.
        data_dir: created if missing.
        local: the archive file, if it has been downloaded already.
        on_progress: progress callback, see ``Progress``; a unit is a byte that is downloaded, then verified, then unpacked.

    Returns:
        The folder.

    Raises:
        ConfigError: there is no network, the file differs from the published one, the archive writes outside its own folder or
            lacks expected content, or the target exists.
    """
    target = data_dir / archive.folder
    if target.exists():
        raise ConfigError(f"{target}: exists already; move it away to create it again")
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{archive.folder}-", dir=data_dir) as scratch:
            file = local or _fetched(archive, Path(scratch) / archive.file, on_progress)
            _check(archive, file, on_progress)
            unpacked = Path(scratch) / "unpacked"
            _unpack(file, unpacked, on_progress)
            _folder_with(archive, unpacked).rename(target)
    except OSError as error:
        raise ConfigError(f"{error.filename or data_dir}: {error.strerror or error}") from error
    return target


def _fetched(archive: Archive, file: Path, on_progress: Progress) -> Path:
    by_hand = f"fetch {archive.file} elsewhere and name it with --archive"
    if archive.url is None:
        raise ConfigError(f"{archive.file} has no download address: {by_hand}")
    try:
        with urllib.request.urlopen(archive.url, timeout=60) as answer, file.open("wb") as out:
            total = int(answer.headers.get("Content-Length") or 0)
            while block := answer.read(BLOCK):
                on_progress("fetching", out.tell(), total)
                out.write(block)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise ConfigError(f"{archive.url}: cannot be downloaded: {reason}; without a network, {by_hand}") from error
    return file


def _check(archive: Archive, file: Path, on_progress: Progress) -> None:
    size, digest = file.stat().st_size, hashlib.md5(usedforsecurity=False)
    with file.open("rb") as content:
        while block := content.read(BLOCK):
            on_progress("checking", content.tell(), size)
            digest.update(block)
    found = digest.hexdigest()
    if found != archive.md5:
        raise ConfigError(
            f"{file}: not the published {archive.file}: md5 {found} ({size} bytes), expected {archive.md5}"
        )


def _unpack(file: Path, folder: Path, on_progress: Progress) -> None:
    """Unpack a zip or tar archive; refuse files and links outside ``folder``."""
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as content:
                for name in content.namelist():
                    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
                        raise ConfigError(f"{file}: {name!r} would be written outside the archive's own folder")
                total, done = sum(info.file_size for info in content.infolist()), 0
                for info in content.infolist():
                    on_progress("unpacking", done, total)
                    content.extract(info, folder)
                    done += info.file_size
        else:
            with file.open("rb") as packed, tarfile.open(fileobj=packed) as content:
                # How much there will be is written nowhere; how much has been read of the archive is known.
                content.extractall(folder, _told(content, packed, file.stat().st_size, on_progress), filter="data")
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise ConfigError(f"{file}: cannot be unpacked: {error}") from error


def _told(
    members: Iterable[tarfile.TarInfo], packed: IO[bytes], size: int, on_progress: Progress
) -> Iterator[tarfile.TarInfo]:
    """The same members; report the position in the archive at each."""
    for member in members:
        on_progress("unpacking", packed.tell(), size)
        yield member


def _folder_with(archive: Archive, unpacked: Path) -> Path:
    """The one folder with the content of the data set, at any depth of the archive."""
    candidates = [unpacked, *sorted(path for path in unpacked.glob("*/") if path.is_dir())]
    for folder in candidates:
        if all((folder / name).exists() for name in archive.contents):
            return folder
    raise ConfigError(f"{archive.file}: no folder with {', '.join(archive.contents)} in it")
