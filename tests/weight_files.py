"""Models with weights of their own, and files of them, for the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

State = dict[str, Tensor]


MODELS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 2},
    "vit_tiny_r_s16_p8_224": {"img_size": 64, "depth": 2},
    "resnet10t": {"channels": (16, 16, 32, 32)},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)},
    "eva02_tiny_patch14_224": {"img_size": 28, "depth": 2},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 2, "depths": (1, 1, 1, 1), "embed_dim": 24},
}


VIT = "vit_tiny_patch16_224"


def build(name: str, seed: int, *, classes: int = 0, **settings: Any) -> nn.Module:
    """A model in evaluation mode in which no tensor is as it was made: not even norms and their statistics."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = timm.create_model(name, num_classes=classes, **{**MODELS.get(name, {}), **settings}).eval()
        for value in model.state_dict().values():
            value.add_(3) if value.dtype == torch.int64 else value.add_(0.1 * torch.rand(value.shape))
    return model


def in_shards(state: State, folder: Path, suffix: str) -> Path:
    names = list(state)
    shards = {f"part-{n:05}-of-00003{suffix}": names[n::3] for n in range(3)}
    for shard, chosen in shards.items():
        part = {name: state[name] for name in chosen}
        safetensors.torch.save_file(part, folder / shard) if suffix == ".safetensors" else torch.save(
            part, folder / shard
        )
    index = folder / f"model{suffix}.index.json"
    places = {name: shard for shard, chosen in shards.items() for name in chosen}
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


def in_file(content: object, folder: Path, name: str = "weights.pth") -> Path:
    path = folder / name
    safetensors.torch.save_file(content, path) if name.endswith(".safetensors") else torch.save(content, path)
    return path
