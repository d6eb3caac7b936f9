"""Check every image of a data set once, and cache the decoded pixels for all processes of a machine.

The first time that files are opened, every image is decoded: all unreadable ones are reported at once, before any training, and
the pixels of the others are written to one file, ``$XDG_CACHE_HOME/zeroflow/decoded/<key>/pixels``, which all processes map into
memory. The key covers the files' paths, sizes, times and the decoder's version, so changed files are checked again. Where the
pixels do not fit, or the cache is not writable, images are decoded on every access: slower, same bits.

Every image has a checksum in ``places.npy``, compared with the pixels whenever they are read, and the places have one in
``checksum``, compared when they are opened. What is not as it was written is decoded anew from its file.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import io
import os
import shutil
import threading
import time
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zeroflow.data.ahead import prefetched
from zeroflow.defaults import CACHE_BYTES
from zeroflow.errors import ConfigError, all_at_once

CHUNK = 16  # images that a thread decodes at a time
SAMPLED = 32  # images whose size tells that of all
UNUSED_SECONDS = 7 * 86400  # after which decoded images make room for others
VERSION = 3  # of what a file is decoded to, and of how that is kept; another one knows nothing of this one's


@runtime_checkable
class EncodedSamples(Protocol):
    """Samples whose images are decoded on access; they can be checked, and cached decoded."""

    @property
    def labels(self) -> npt.NDArray[np.int64]: ...

    def images(self, indices: npt.NDArray[np.int64]) -> list[Tensor]:
        """As of ``Samples``; ``ConfigError`` names an image that cannot be read."""
        ...

    def identity(self) -> str:
        """The ``fingerprint`` of all that the images are decoded from."""
        ...


def fingerprint(files: Iterable[Path], *words: object) -> str:
    """Hash of the files' paths, sizes and times, of the words, and of the decoder's version, as 32 hexadecimal digits.

    Of the times also that of the last change of the file's entry, which no program sets back.
    """
    import PIL
    from PIL import features

    digest = hashlib.sha256(repr((VERSION, PIL.__version__, features.version("libjpeg_turbo"), words)).encode())
    for path in files:
        found = path.stat()
        name = os.fsencode(os.path.abspath(path))  # noqa: PTH100 (links stay as they are named)
        digest.update(b"%d %d %d %d %b" % (len(name), found.st_size, found.st_mtime_ns, found.st_ctime_ns, name))
    return digest.hexdigest()[:32]


@dataclass(frozen=True, eq=False)
class DecodedSamples:
    """Decoded images in a memory-mapped file, read from disk on access; what is damaged there is decoded anew.

    Attributes:
        pixels: uint8, one image after the other, each ``[H, W, C]``.
        places: int64 ``[N, 5]``: first byte, C, H and W of each image, and the ``checksum`` of its pixels.
        source: the samples that they were decoded from.
        folder: where they lie; its name is the fingerprint of the source.
    """

    pixels: Tensor
    places: npt.NDArray[np.int64]
    source: EncodedSamples
    folder: Path
    _damaged: threading.Event = field(default_factory=threading.Event, repr=False)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        return self.source.labels

    def identity(self) -> str:
        """Fingerprint of the samples that they were decoded from."""
        return self.folder.name

    def images(self, indices: npt.NDArray[np.int64]) -> list[Tensor]:
        found = []
        for index, (first, channels, height, width, expected) in zip(
            indices, self.places[indices].tolist(), strict=True
        ):
            # What is compared is the copy: the file may change. And transforms may work in place.
            own = self.pixels[first : first + channels * height * width].clone()
            if zlib.crc32(own.numpy().data) == expected:
                found.append(own.view(height, width, channels).permute(2, 0, 1))
            else:
                self._give_up()
                found += self.source.images(np.array([index]))
        return found

    def _give_up(self) -> None:
        """Tell, once, that the cache is damaged, and take its checksum: whoever opens these images next makes it anew."""
        if not self._damaged.is_set():
            self._damaged.set()
            warnings.warn(
                f"{self.folder}: not as it was written; what is damaged is decoded anew from its file", stacklevel=3
            )
            with suppress(OSError):
                (self.folder / "checksum").unlink()


def prepared(
    samples: EncodedSamples, *, threads: int | None = None, cache_bytes: int = CACHE_BYTES
) -> EncodedSamples | DecodedSamples:
    """Check every image, unless that has been done before, and cache them decoded where there is room.

    Args:
        samples: as they were opened.
        threads: number of threads that decode; default: one per CPU that this process may use.
        cache_bytes: limit for the decoded images of all data sets on this machine; 0: decode on every access.

    Returns:
        The same samples, decoded or not.

    Raises:
        ConfigError: images cannot be read; the message lists all of them.
    """
    key, threads = samples.identity(), len(os.sched_getaffinity(0)) if threads is None else threads
    cache = cache_folder()
    folder, stamp = cache / "decoded" / key, cache / "verified" / key
    if cache_bytes and (found := _open(folder, samples)):
        return found
    with _locked(cache / "verified" / f"{key}.lock") as locked:
        if cache_bytes and (found := _open(folder, samples)):  # another process has made it meanwhile
            return found
        if cache_bytes and locked:
            shutil.rmtree(folder, ignore_errors=True)  # of another size, or damaged: it would take the new one's room
        checked = _size_when_checked(stamp)
        fits = locked and _make_room(folder.parent, _estimate(samples) if checked is None else checked, cache_bytes)
        if checked is not None and not fits:
            return samples
        draft = _Draft(folder) if fits else None
        try:
            places = _decode_all(samples, threads, draft)
            kept = draft is not None and draft.finish(places)
        finally:
            if draft:
                draft.drop()
        if locked:
            with suppress(OSError):
                new = stamp.with_suffix(".new")
                new.write_text(str(places[:, 1:4].prod(axis=1).sum()))
                new.replace(stamp)
    return (_open(folder, samples) if kept else None) or samples


def cache_folder() -> Path:
    """This machine's cache for all cells: ``$XDG_CACHE_HOME/zeroflow``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zeroflow"


def checksum(image: Tensor) -> int:
    """CRC-32 of an image's pixels, uint8 ``[C, H, W]``, in the order in which they are kept."""
    return zlib.crc32(image.permute(1, 2, 0).contiguous().numpy().data)


def _checksum_of_places(key: str, content: bytes) -> str:
    # With the key, so that the places of other images are no right ones.
    return hashlib.sha256(key.encode() + content).hexdigest()


def _open(folder: Path, samples: EncodedSamples) -> DecodedSamples | None:
    """The decoded images; None where there are none, or their places are not as they were written."""
    try:
        content = (folder / "places.npy").read_bytes()
        if (folder / "checksum").read_text() != _checksum_of_places(folder.name, content):
            return None
        places = np.load(io.BytesIO(content))
        size = (folder / "pixels").stat().st_size
        if len(places) != len(samples.labels) or size != places[-1, 0] + places[-1, 1:4].prod():
            return None
        with suppress(OSError):
            os.utime(folder)  # when it was last used
        # Private: what somebody writes into an image by mistake reaches neither the file nor other processes.
        pixels = torch.from_file(str(folder / "pixels"), shared=False, size=size, dtype=torch.uint8)
    except (OSError, ValueError, RuntimeError, IndexError):
        return None
    return DecodedSamples(pixels, places, samples, folder)


def _size_when_checked(stamp: Path) -> int | None:
    """Bytes of the decoded images, as they were found when all were right; None: they have not been checked."""
    try:
        return int(stamp.read_text())
    except (OSError, ValueError):  # the latter after a power cut
        return None


@contextmanager
def _locked(lock: Path) -> Iterator[bool]:
    """Lock the images until no other process prepares them; yields False if the cache is not writable."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        warnings.warn(
            f"{lock.parent}: {error.strerror}: images are checked again each time they are opened", stacklevel=4
        )
        yield False
        return
    with file:
        yield True


def _estimate(samples: EncodedSamples) -> int:
    """Estimate the size of the decoded images in bytes from a few of them; 0: none of these can be read."""
    count, sizes = len(samples.labels), []
    for index in np.unique(np.linspace(0, count - 1, SAMPLED).astype(np.int64)):
        with suppress(ConfigError):
            sizes += [image.numel() for image in samples.images(np.array([index]))]
    return int(np.mean(sizes) * count) if sizes else 0


def _make_room(folder: Path, needed: int, limit: int) -> bool:
    """Whether ``needed`` bytes fit within the limit and half of the disk's free space; unused entries are deleted first."""
    if not 0 < needed <= limit:
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sizes = {pixels.parent: pixels.stat().st_size for pixels in folder.glob("*/pixels")}
        for old in sorted(sizes, key=lambda path: path.stat().st_mtime):
            unused = time.time() - old.stat().st_mtime > UNUSED_SECONDS
            if unused and (sum(sizes.values()) + needed > limit or needed > shutil.disk_usage(folder).free // 2):
                shutil.rmtree(old, ignore_errors=True)
                del sizes[old]
        return sum(sizes.values()) + needed <= limit and needed <= shutil.disk_usage(folder).free // 2
    except OSError:
        return False


class _Draft:
    """A folder of decoded images that is being written; it gets its name once it is complete and on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.draft = folder, folder.with_name(f".{folder.name}")
        self.file: BinaryIO | None = None
        self.drop()  # what a process that was killed has left
        with self._guarded():
            self.draft.mkdir()
            self.file = (self.draft / "pixels").open("wb")

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.drop()
            warnings.warn(f"{self.folder}: {error.strerror}: images are decoded whenever they are needed", stacklevel=6)

    def write(self, image: Tensor) -> None:
        with self._guarded():
            if self.file:
                self.file.write(image.permute(1, 2, 0).contiguous().numpy().data)

    def finish(self, places: npt.NDArray[np.int64]) -> bool:
        """Whether the images are cached."""
        with self._guarded():
            if self.file:
                self.file.flush()
                os.fsync(self.file.fileno())
                content = io.BytesIO()
                np.save(content, places)
                said = _checksum_of_places(self.folder.name, content.getvalue()).encode()
                for name, data in (("places.npy", content.getvalue()), ("checksum", said)):
                    with (self.draft / name).open("wb") as file:
                        file.write(data)
                        file.flush()
                        os.fsync(file.fileno())
                shutil.rmtree(self.folder, ignore_errors=True)
                self.draft.rename(self.folder)
                return True
        return False

    def drop(self) -> None:
        if self.file:
            with suppress(OSError):
                self.file.close()
            self.file = None
        shutil.rmtree(self.draft, ignore_errors=True)


def _decode_all(samples: EncodedSamples, threads: int, draft: _Draft | None) -> npt.NDArray[np.int64]:
    """Decode every image, into the draft if there is one; returns ``DecodedSamples.places``.

    Raises:
        ConfigError: with the problems of all images that cannot be read.
    """

    def decode(first: int) -> list[tuple[Tensor, int] | ConfigError]:
        found: list[tuple[Tensor, int] | ConfigError] = []
        for index in range(first, min(first + CHUNK, len(samples.labels))):
            try:
                found += [(image, checksum(image)) for image in samples.images(np.array([index]))]
            except ConfigError as error:
                found.append(error)
        return found

    places, problems, end = [], [], 0
    makers = (functools.partial(decode, first) for first in range(0, len(samples.labels), CHUNK))
    for images in prefetched(makers, threads):
        for one in images:
            if isinstance(one, ConfigError):
                problems.append(str(one))
                continue
            image, said = one
            places.append((end, *image.shape, said))
            end += image.numel()
            if draft and not problems:
                draft.write(image)
    if problems:
        raise all_at_once("images that cannot be read:", problems)
    return np.array(places, dtype=np.int64)
