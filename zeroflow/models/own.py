"""Backbones of your own: any module with images in and features out, from a package or a file of ``torch.export``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from zeroflow.errors import ConfigError
from zeroflow.models.backbone import Backbone, Prefix
from zeroflow.models.timm_backbone import norms

EXPORTED = ".pt2"
"""Suffix of a file of ``torch.export``."""


class ModuleBackbone(Backbone):
    """Any torch module that maps images ``[N, C, H, W]`` to features ``[N, d]``, frozen.

    It gets a copy of the images, so it may work in place: all evaluations of a step pass the same ones.

    Args:
        module: maps images to features.
        name: for messages.
        image_size: side of the images, pixels; default: the module's attribute ``image_size``.
        channels: of the images.

    Raises:
        ConfigError: the image size is unknown, two images do not give two rows of features, or the features of an image are
            not always the same.
    """

    def __init__(self, module: nn.Module, name: str, image_size: int | None = None, channels: int = 3) -> None:
        super().__init__()
        size = image_size or getattr(module, "image_size", None)
        if not isinstance(size, int):
            raise ConfigError(f"image_size: not known for backbone {name!r}; set it")
        self.module, self._image_size = module.requires_grad_(False), size
        if isinstance(module, nn.Module) and not isinstance(module, torch.fx.GraphModule):
            module.eval()  # an exported graph keeps the mode that it was exported in
        images = torch.rand(3, channels, size, size, generator=torch.Generator().manual_seed(0))
        try:
            with torch.no_grad():
                found, with_another, again = (self.module(images[pair]) for pair in ([0, 1], [0, 2], [0, 1]))
        except Exception as error:
            raise ConfigError(f"backbone {name!r} with 2 images of {size} x {size}: {error}") from error
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != 2:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ConfigError(f"backbone {name!r}: 2 images give {shape}; expected features of shape (2, d)")
        for other, why, most in ((again, "with every pass", 1e-3), (with_another, "with the images beside it", 0.1)):
            if (found[0] - other[0]).float().norm() > most * found[0].float().norm():
                raise ConfigError(
                    f"backbone {name!r}: the features of an image change {why}, as with dropout or batch norms in training "
                    f"mode{'; call model.eval() before torch.export' if name.endswith(EXPORTED) else ''}"
                )
        self._width = found.shape[1]

    @property
    def like(self) -> Tensor:
        own = next(self.parameters(), None)
        return torch.zeros(()) if own is None else own

    @property
    def width(self) -> int:
        return self._width

    @property
    def image_size(self) -> int:
        return self._image_size

    def train(self, mode: bool = True) -> ModuleBackbone:
        return self  # see above

    def lacks(self, part: str) -> str | None:
        if part in ("blocks", "sequence", "layers"):
            return "it is a module of which only images, features and weights are known"
        if part == "norms" and not any(True for norm in norms(self) for _ in norm.parameters(recurse=False)):
            return "it has no norm with values of its own"
        if part == "weights" and next(self.parameters(), None) is None:
            return "it has no weights"
        return None

    def forward(self, images: Tensor | Prefix, adapters: Iterable[nn.Module] | None = None) -> Tensor:
        if adapters is not None:
            raise TypeError("a module of your own has no known blocks to add adapters to")
        assert isinstance(images, Tensor), "a module of your own has no prefix"
        found = self.module(images.clone())
        # A copy: some write every batch's features into one buffer of theirs.
        return cast(Tensor, found.clone() if isinstance(found, Tensor) else found)


def open_exported(file: Path, image_size: int | None = None, channels: int = 3) -> ModuleBackbone:
    """Open the backbone in a file of ``torch.export``.

    Raises:
        ConfigError: the file cannot be read, or its program takes anything but images, a fixed number of images only, or
            another image size.
    """
    try:
        with torch.no_grad():  # it makes views of its weights
            program = torch.export.load(file)
        names = program.graph_signature.user_inputs
        given: list[Any] = [node.meta["val"] for node in program.graph.nodes if node.name in names]
    except Exception as error:
        raise ConfigError(f"backbone {file}: cannot be read as a program of torch.export: {error}") from error
    if len(given) != 1 or given[0].ndim != 4:
        raise ConfigError(f"backbone {file}: expected a program of one input, images [N, C, H, W]")
    count, *_, side = given[0].shape
    if isinstance(count, int):
        raise ConfigError(
            f"backbone {file}: it takes {count} images at a time, no other number; export it with a dynamic first dimension: "
            "torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))"
        )
    own = side if isinstance(side, int) else None
    if own and image_size and own != image_size:
        raise ConfigError(f"image_size={image_size}: backbone {file} was exported for {own}")
    return ModuleBackbone(program.module(), str(file), own or image_size, channels)
