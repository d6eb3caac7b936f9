"""List backbones with their properties, from architectures built without weights and without a network."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch

from zeroflow.errors import ConfigError
from zeroflow.models.factory import default_image_size, non_timm_names
from zeroflow.models.probe import Anatomy, anatomy


class Weights(NamedTuple):
    """Pretrained weights: side of their images in pixels (None: unknown), and whether they are on this machine."""

    image_size: int | None
    here: bool


@dataclass(frozen=True)
class ListedBackbone:
    """An architecture and its pretrained weights.

    Attributes:
        name: of the architecture.
        anatomy: its properties; None: it cannot be built here.
        problem: why it cannot be built here.
        weights: pretrained weights by their full names; empty where timm has none.
    """

    name: str
    anatomy: Anatomy | None
    problem: str | None = None
    weights: Mapping[str, Weights] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The same as plain values for JSON."""
        known = {"problem": self.problem} if self.anatomy is None else self.anatomy._asdict()
        return {**known, "weights": {name: weights._asdict() for name, weights in self.weights.items()}}


def timm_counts() -> tuple[int, int]:
    """Number of timm's architectures, and of their pretrained weights."""
    import timm

    return len(timm.list_models()), len(timm.list_pretrained())


def list_backbones(pattern: str | None = None) -> Iterator[ListedBackbone]:
    """List the backbones that match a pattern, one architecture at a time, each as soon as it has been built.

    Args:
        pattern: shell-style, as in ``timm.list_models``; a name without a tag stands for all of its tags. None: the embedded
            backbone and those of other packages.

    Raises:
        ConfigError: nothing matches; the message names the nearest ones.
    """
    own = non_timm_names()
    names = own if pattern is None else fnmatch.filter(own, pattern)
    found = {} if pattern is None else _of_timm(pattern)
    if not names and not found and pattern is not None:
        raise _nothing_fits(pattern)
    return _built({name: [name] for name in names} | {name: tags for name, tags in found.items() if name not in names})


def _built(names: Mapping[str, list[str]]) -> Iterator[ListedBackbone]:
    own = non_timm_names()
    for name, tags in names.items():
        try:
            like, problem = anatomy(name), None
        except ConfigError as error:
            like, problem = None, str(error)
        weights = {tag: Weights(_image_size(tag, like), name in own or _is_here(tag)) for tag in tags}
        yield ListedBackbone(name, like, problem, weights)


def _image_size(name: str, like: Anatomy | None) -> int | None:
    return default_image_size(name) or (like.image_size if like else None)


def _of_timm(pattern: str) -> dict[str, list[str]]:
    """timm's architectures, each with the full names of its pretrained weights."""
    import timm

    found: dict[str, list[str]] = {name: [] for name in timm.list_models(pattern)}
    for name in timm.list_pretrained(pattern):
        found.setdefault(name.partition(".")[0], []).append(name)
    return found


def _nothing_fits(pattern: str) -> ConfigError:
    import timm

    known = [*non_timm_names(), *(timm.list_pretrained() if "." in pattern else timm.list_models())]
    bare = "".join(character for character in pattern if character not in "*?[]")
    nearest = difflib.get_close_matches(bare, known, n=3, cutoff=0.0)
    return ConfigError(f"no backbone fits {pattern!r}; the nearest: {', '.join(nearest)}")


def _is_here(name: str) -> bool:
    """Whether the file that timm would download for a name is in its cache."""
    import timm
    from huggingface_hub import try_to_load_from_cache

    settings = timm.get_pretrained_cfg(name)
    if settings.hf_hub_id:
        repository, _, revision = settings.hf_hub_id.partition("@")
        file = settings.hf_hub_filename or "pytorch_model.bin"
        # timm takes the safe twin of a file where there is one.
        files = {file, file.replace("pytorch_model.bin", "model.safetensors")}
        return any(isinstance(try_to_load_from_cache(repository, f, revision=revision or None), str) for f in files)
    address = settings.url or ""
    return bool(address) and Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(address).path).name).is_file()
