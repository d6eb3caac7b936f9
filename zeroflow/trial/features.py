"""Features of a data set under a frozen backbone: computed class by class, once per machine, for every cell that needs them.

A class's features are those of its images alone, in file order, at most ``evaluation_batch`` at a time, whoever asks for
which of them: on a CPU the last bits of a product depend on how many rows it has. So no bit depends on the class order, the
cut into tasks, or whether the features were computed, read from disk (``feature_files``) or kept in memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zeroflow.data.dataset import ImageDataset, Samples
from zeroflow.data.scenario import Batch, View
from zeroflow.errors import ConfigError
from zeroflow.models.backbone import Backbone
from zeroflow.models.endpoint import BlackBox
from zeroflow.models.frozen import Known, fingerprint, first_not_finite, tensor_bytes
from zeroflow.trial.feature_files import FeatureFiles

VERSION = 2
"""Of how features are computed and stored; another one knows none of the files of this one."""

_HASHED = 1024  # images at a time


class FrozenFeatures:
    """The features of one cell's data set, backbone and transform.

    Args:
        backbone: on its device, calibrated.
        dataset: as it was opened.
        device: of the images that it is given.
        dtype: of the images that it is given.
        batch_size: images per forward pass, at most.
        cache_bytes: the most that features may take on this machine's disk; 0: they are kept for this cell alone.
        results: what tells the results apart whose cells share the answers of a black box; None: every cell asks for itself.
        names: what else tells these features apart: names of the backbone and the transform, hashes of somebody's own code.

    Attributes:
        reused: images whose features were read from disk.
    """

    def __init__(
        self,
        backbone: Backbone,
        dataset: ImageDataset,
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int,
        *,
        cache_bytes: int,
        results: str | None = None,
        names: Mapping[str, Any],
    ) -> None:
        self.backbone, self.dataset, self.device, self.dtype = backbone, dataset, device, dtype
        self.batch_size, self.cache_bytes, self.results, self.names = batch_size, cache_bytes, results, names
        self.reused = 0
        # Of classes of which some samples may still be asked for, and of the last view.
        self._known: dict[tuple[str, int], Tensor] = {}
        self._last: tuple[View, Tensor] | None = None
        self._files: FeatureFiles | None = None
        self._file_names: dict[
            tuple[str, int], str
        ] = {}  # of classes' files: a class of test data is asked for at every stage
        self._opened = False

    def batches(self, view: View, images: Iterable[Batch] | None = None) -> Iterator[Batch]:
        """A view's samples in order, their features ``Known`` in the place of images, and labels.

        Args:
            view: the samples.
            images: the same samples as images, for those who need these too; default: a batch for each class.
        """
        features, first = self.of(view).clone(), 0  # whoever works on them in place shall not change the next answer
        if images is None:
            sizes = torch.unique_consecutive(view.labels, return_counts=True)[1].tolist()
            for part, labels in zip(torch.split(features, sizes), torch.split(view.labels, sizes), strict=True):
                yield Known.of(part), labels
            return
        for batch, labels in images:
            yield Known.of(features[first : first + len(labels)], batch), labels
            first += len(labels)

    def of(self, view: View) -> Tensor:
        """Features ``[N, width]`` of a view's samples, in its order.

        Raises:
            ConfigError: one is not finite; it says of which image, and what of the backbone is to blame.
        """
        if self._last is None or self._last[0] is not view:
            part = "train" if view.samples is self.dataset.train else "test"
            own = view.samples.labels[view.indices]
            found = torch.empty(len(view), self.backbone.width, dtype=self.dtype)
            for label in dict.fromkeys(own.tolist()):
                rows, here = np.flatnonzero(view.samples.labels == label), np.flatnonzero(own == label)
                features = self._of_class(view, rows, part, label)
                found[torch.from_numpy(here)] = features[torch.from_numpy(np.searchsorted(rows, view.indices[here]))]
                if len(here) < len(rows):
                    self._known[part, label] = features
            self._last = view, found.to(self.device)
        return self._last[1]

    def _of_class(self, view: View, rows: npt.NDArray[np.int64], part: str, label: int) -> Tensor:
        """Features ``[n, width]``, on the CPU, of all images of a class in a part of the data set, which are ``rows`` ``[n]``."""
        if (known := self._known.get((part, label))) is not None:
            return known
        if not self._opened:
            self._files, self._opened = self._open(view, rows), True
        if not (files := self._files):
            return self._computed(view, rows, part, label)
        if (part, label) not in self._file_names:
            self._file_names[part, label] = f"{part}-{label}-{_identity_of_class(view, rows)}"
        name, shape = self._file_names[part, label], (len(rows), self.backbone.width)
        if (found := files.read(name, shape)) is None:
            with files.locked(name):
                if (found := files.read(name, shape)) is None:  # nor has another process made it meanwhile
                    found = self._computed(view, rows, part, label)
                    files.write(name, found)
                    return found
        self.reused += len(rows)
        return found

    @torch.no_grad()
    def _computed(self, view: View, rows: npt.NDArray[np.int64], part: str, label: int) -> Tensor:
        whole, found = dataclasses.replace(view, indices=rows, labels=torch.full((len(rows),), label)), []
        for number, (images, _) in enumerate(whole.plain_batches(self.batch_size)):
            features = self.backbone(images.to(self.device, self.dtype)).to(self.dtype).cpu()
            if not features.isfinite().all():
                bad = int((~features.isfinite().all(1)).nonzero()[0])
                where = f"{part}, class {self.dataset.class_names[label]!r}, image {number * self.batch_size + bad}"
                blame = first_not_finite(self.backbone, images[bad : bad + 1].to(self.device, self.dtype))
                raise ConfigError(
                    f"data set {self.dataset.name!r}, {where}: the backbone's features are not finite"
                    f"{f': its {blame}' if blame else ''}"
                )
            found.append(features)
        return torch.cat(found)

    def _open(self, view: View, rows: npt.NDArray[np.int64]) -> FeatureFiles | None:
        """The files of these features, where ``rows`` are some of a view's samples; None where none are kept."""
        if not self.cache_bytes:
            return None
        if isinstance(self.backbone, BlackBox) and (self.results is None or self.backbone.facts is None):
            return None
        parts = [self.dataset.train, self.dataset.test]
        count = sum(len(part.labels) for part in parts)
        key = hashlib.sha256(json.dumps(self._identity(view, rows), sort_keys=True).encode()).hexdigest()[:32]
        return FeatureFiles(
            key,
            files=len(parts) * len(self.dataset.class_names),
            size=count * self.backbone.width * self.dtype.itemsize,
            limit=self.cache_bytes,
        )

    @torch.no_grad()
    def _identity(self, view: View, rows: npt.NDArray[np.int64]) -> dict[str, Any]:
        """All that features depend on, beside what tells a class's images from others.

        Of a black box what it says of itself and whose results they are for. Otherwise all weights, and what computes with
        them. Of code of somebody's own the hashes are among ``names``; the features of two made images stand for all other, as no
        image of another class may be looked at.
        """
        found: dict[str, Any] = {
            "version": VERSION,
            "train": _identity_of_part(self.dataset.train),
            "test": _identity_of_part(self.dataset.test),
            "size": view.size,
            "dtype": str(self.dtype),
            **self.names,
        }
        if isinstance(self.backbone, BlackBox):
            facts = self.backbone.facts or {}
            said = {key: facts.get(key) for key in ("backbone", "checkpoint", "image_size", "width")}
            return {**found, "black box": said, "results": self.results}
        cuda = self.device.type == "cuda"
        device = torch.cuda.get_device_name(self.device) if cuda else torch.backends.cpu.get_cpu_capability()
        shape = (2, *view.transform.test(view.samples.images(rows[:1]), view.size).shape[1:])
        made = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return {
            **found,
            "weights": fingerprint(self.backbone),
            "class": type(self.backbone).__qualname__,
            "batch": self.batch_size,
            "device": [self.device.type, platform.machine(), device],
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "timm": version("timm"),
            "features": hashlib.sha256(tensor_bytes(self.backbone(made.to(self.device, self.dtype)))).hexdigest(),
        }


def _identity_of_part(samples: Samples) -> str:
    """Changes with the labels of samples, and with their images where these say of themselves what they are."""
    digest = hashlib.sha256(samples.labels.astype(np.int64).tobytes())
    digest.update(file_identity(samples).encode())
    return digest.hexdigest()


def file_identity(samples: Samples) -> str:
    """What samples say of themselves, which changes with their files; empty where they say nothing."""
    said = getattr(samples, "identity", None)
    return str(said()) if callable(said) else ""


def _identity_of_class(view: View, rows: npt.NDArray[np.int64]) -> str:
    """Changes with the images of a class, which are ``rows`` ``[n]``, and with what the transform makes of the first two."""
    samples = view.samples
    first = view.transform.test(samples.images(rows[:2]), view.size).contiguous()
    digest = hashlib.sha256(tensor_bytes(first))
    if not callable(getattr(samples, "identity", None)):
        for start in range(0, len(rows), _HASHED):
            images = samples.images(rows[start : start + _HASHED])
            for part in [images] if isinstance(images, Tensor) else images:
                digest.update(str(tuple(part.shape)).encode())
                digest.update(tensor_bytes(part))
    return digest.hexdigest()[:16]
