"""Features of a frozen backbone, which may be cached, and a fingerprint of all that they depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from zeroflow.models.backbone import Backbone


class Known(Tensor):
    """A frozen backbone's features ``[N, width]`` in place of images: a tensor subclass that marks them, like ``nn.Parameter``.

    Operations on it return ordinary tensors.

    Attributes:
        images: the images that they were computed from, ``[N, C, H, W]``; None: the consumer needs no images.
    """

    images: Tensor | None
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(features: Tensor, images: Tensor | None = None) -> Known:
        """Mark features as known."""
        known = features.as_subclass(Known)
        known.images = images
        return known


def frozen_features(backbone: Backbone, images: Tensor) -> Tensor:
    """The backbone's features ``[N, width]`` of images; looked up where they are ``Known``."""
    return images.as_subclass(Tensor) if isinstance(images, Known) else backbone(images)


def weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All tensors that a module computes with, by name: parameters, buffers, and the ``unseen_weights`` of its parts."""
    for name, part in module.named_modules():
        own = {**dict(part._parameters), **dict(part._buffers)}
        if unseen := getattr(part, "unseen_weights", None):
            own |= unseen()
        for key, value in own.items():
            if value is not None:
                yield f"{name}.{key}" if name else key, value.detach()


def tensor_bytes(tensor: Tensor) -> Any:
    """The bytes of a tensor of any dtype, for hashing."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of the names, dtypes, shapes and values of all tensors that a module computes with, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, value in weights(module):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(tensor_bytes(value))
    return digest.hexdigest()


def first_not_finite(module: nn.Module, images: Tensor) -> str | None:
    """Find the part of a module that causes non-finite features; None: it is not found.

    Args:
        module: computes the features.
        images: ``[N, C, H, W]`` whose features are not finite.
    """
    for name, value in weights(module):
        if value.is_floating_point() and not value.isfinite().all():
            return f"weights {name} are not finite"
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all():
            found.append(name)

    hooks = [
        part.register_forward_hook(lambda _, __, out, name=name: look(name, out))
        for name, part in module.named_modules()
        if name and not [*part.children()]
    ]
    try:
        with torch.no_grad():
            module(images)
    finally:
        for hook in hooks:
            hook.remove()
    return f"weights are finite, the output of {found[0]} is not" if found else None
