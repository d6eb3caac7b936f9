"""Features on this machine's disk: ``$XDG_CACHE_HOME/zeroflow/features/<key>/<part>-<class>-<images>.safetensors``.

The key stands for all that the features depend on, beside the class's images. A file appears whole, and holds a checksum: what is torn or damaged counts
as missing. Room is taken for a key as a whole, and the keys used least recently make it. Where there is none, or the folder
cannot be written, nothing is kept: slower, same bits.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from zeroflow.data.decoded import cache_folder
from zeroflow.models.frozen import tensor_bytes

_HEADER = 512
"""Bytes of a file beside its features, at most."""


class FeatureFiles:
    """The files of one key.

    Args:
        key: names the folder.
        files: how many there will be.
        size: bytes of all features in them.
        limit: the most that features of all keys may take on this machine.
    """

    def __init__(self, key: str, *, files: int, size: int, limit: int) -> None:
        self.folder: Path | None = cache_folder() / "features" / key
        with self._or_nothing():
            if not _room(self.folder, size + files * _HEADER, limit):
                self.folder = None

    @contextmanager
    def _or_nothing(self) -> Iterator[None]:
        """Keep nothing from now on if the disk refuses."""
        try:
            yield
        except OSError as error:
            # A folder that is gone has made room for others.
            if self.folder and not (isinstance(error, FileNotFoundError) and self.folder.parent.is_dir()):
                warnings.warn(f"{self.folder.parent}: {error.strerror}: features are not kept", stacklevel=5)
            self.folder = None

    def read(self, name: str, shape: tuple[int, int]) -> Tensor | None:
        """Features of this shape; None where there are none, or the file is not as it was written."""
        if not self.folder:
            return None
        try:
            with safetensors.safe_open(self.folder / f"{name}.safetensors", "pt") as file:
                found, said = file.get_tensor("features"), file.metadata() or {}
        except (OSError, safetensors.SafetensorError):
            return None
        right = found.shape == shape and said.get("sha256") == self._checksum(name, found)
        return found if right else None

    def write(self, name: str, features: Tensor) -> None:
        """Keep features, unless the disk refuses."""
        if not self.folder:
            return
        content = safetensors.torch.save({"features": features}, {"sha256": self._checksum(name, features)})
        draft = None
        with self._or_nothing():
            try:
                with tempfile.NamedTemporaryFile(dir=self.folder, prefix=f".{name}-", delete=False) as file:
                    draft = Path(file.name)
                    file.write(content)
                draft.replace(self.folder / f"{name}.safetensors")
            except OSError:
                if draft:
                    draft.unlink(missing_ok=True)
                raise

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Wait until no other process makes the same features; where that cannot be told, two may make them."""
        file = None
        if self.folder:
            with suppress(OSError):
                file = (self.folder / f".{name}.lock").open("w")
                fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if file:
                with suppress(OSError):
                    Path(file.name).unlink(missing_ok=True)  # who waits for it holds it all the same
                file.close()

    def _checksum(self, name: str, features: Tensor) -> str:
        assert self.folder
        # With names, so that a file in the place of another one is no right file.
        digest = hashlib.sha256(f"{self.folder.name}/{name} {features.dtype}".encode())
        digest.update(tensor_bytes(features))
        return digest.hexdigest()


def _room(folder: Path, needed: int, limit: int) -> bool:
    """Whether ``needed`` bytes have their place in ``folder``: below the limit, and in half of the disk's free space."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        taken = {other: _taken(other) for other in folder.parent.iterdir() if other.is_dir() and other != folder}
        new = not (folder / "size").is_file()
        if needed > limit or (new and needed > shutil.disk_usage(folder.parent).free // 2):
            return False
        for old in sorted(taken, key=_last_used):
            if sum(taken.values()) + needed <= limit:
                break
            shutil.rmtree(old, ignore_errors=True)
            del taken[old]
        folder.mkdir(exist_ok=True)
        (folder / "size").write_text(str(needed))  # and so it was used now
    return True


def _taken(folder: Path) -> int:
    try:
        return int((folder / "size").read_text())
    except (OSError, ValueError):
        return 0


def _last_used(folder: Path) -> float:
    try:
        return (folder / "size").stat().st_mtime
    except OSError:
        return 0.0
