"""Backbones and adapters: what a frozen model computes, and which files it accepts."""

from __future__ import annotations

import pytest
import safetensors.torch
import timm
import torch

from zeroflow import run_trial
from zeroflow.errors import ConfigError
from zeroflow.models.adapters import AdapterStack
from zeroflow.models.factory import create_backbone
from zeroflow.trial.config import TrialConfig

TINY = "vit_tiny_patch16_224"


@pytest.mark.slow
@pytest.mark.parametrize("name", [TINY, "vit_base_patch16_224.augreg_in21k", "vit_medium_patch16_gap_240"])
def test_without_adapters_the_features_are_timms_own(name: str) -> None:
    """Small, with a tag, and with pooled tokens instead of a class token."""
    backbone = create_backbone(name, checkpoint="none", image_size=64)
    reference = timm.create_model(name, num_classes=0, img_size=64).eval()
    reference.load_state_dict(backbone.model.state_dict())
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), reference(images), rtol=1e-4, atol=1e-5)


def test_a_fresh_adapter_changes_nothing_and_a_trained_one_does() -> None:
    backbone = create_backbone(checkpoint="none")
    stack = AdapterStack(backbone.widths, 8).eval()
    images = torch.rand(3, 3, 28, 28)
    with torch.no_grad():
        plain = backbone(images)
        assert torch.equal(backbone(images, stack), plain)
        for adapter in stack:
            adapter.up.weight.normal_(generator=torch.Generator().manual_seed(0))
        assert not torch.allclose(backbone(images, stack), plain)


def test_the_adapter_formula() -> None:
    """scale * (U relu(D h + b_d) + b_u) beside the MLP, with h the residual stream before the MLP's LayerNorm."""
    backbone = create_backbone(checkpoint="none").double()
    stack = AdapterStack(backbone.widths, 8, scale=0.3, dropout=0.0).double()
    with torch.no_grad():
        for number, p in enumerate(stack.parameters()):
            p.normal_(generator=torch.Generator().manual_seed(number)).mul_(0.1)
        images, vit = torch.rand(2, 3, 28, 28, dtype=torch.float64), backbone.model
        x = vit._pos_embed(vit.patch_embed(images))
        for block, adapter in zip(vit.blocks, stack, strict=True):
            h = x + block.attn(block.norm1(x))
            branch = (h @ adapter.down.weight.T + adapter.down.bias).clamp(min=0)
            x = h + block.mlp(block.norm2(h)) + 0.3 * (branch @ adapter.up.weight.T + adapter.up.bias)
        expected = vit.norm(x)[:, 0]
        torch.testing.assert_close(backbone(images, stack), expected, rtol=0, atol=1e-12)


def test_vit_base_adapters_have_the_published_size() -> None:
    stack = AdapterStack([768] * 12, 64)
    assert sum(p.numel() for p in stack.parameters()) == 1_189_632


def test_the_backbone_is_frozen_and_stays_in_evaluation_mode() -> None:
    backbone = create_backbone(checkpoint="none")
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not any(module.training for module in backbone.train().modules())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_local_checkpoint_is_loaded(tmp_path, suffix: str) -> None:
    state = timm.create_model(TINY, num_classes=7, img_size=32).state_dict()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save({"model": state}, path)
    backbone = create_backbone(TINY, checkpoint=str(path), image_size=32)
    assert torch.equal(backbone.model.blocks[3].mlp.fc1.weight, state["blocks.3.mlp.fc1.weight"])


def test_a_checkpoint_of_another_size_or_channel_count_is_fitted(tmp_path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(timm.create_model(TINY, num_classes=0, img_size=32).state_dict(), path)
    images = torch.rand(1, 1, 64, 64)
    assert create_backbone(TINY, checkpoint=str(path), image_size=64, channels=1)(images).shape == (1, 192)
    assert create_backbone(image_size=56)(images.expand(-1, 3, -1, -1)[..., :56, :56]).shape == (1, 192)


class _Evil:
    def __reduce__(self):
        return print, ("ran",)


def test_checkpoints_that_cannot_be_used_are_refused(tmp_path, capsys) -> None:
    garbage, evil, other = tmp_path / "garbage.safetensors", tmp_path / "evil.pth", tmp_path / "other.pth"
    garbage.write_bytes(b"not a checkpoint")
    torch.save({"x": _Evil()}, evil)
    torch.save({"blocks.0.attn.qkv.weight": torch.zeros(3)}, other)
    for path, message in ((garbage, "cannot be read"), (evil, "cannot be read"), (other, "does not fit")):
        with pytest.raises(ConfigError, match=message):
            create_backbone(TINY, checkpoint=str(path))
    assert "ran" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no file"):
        create_backbone(TINY, checkpoint=str(tmp_path / "absent.pth"))


def test_unknown_backbones_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="vit_base_patch16_224"):
        create_backbone("vit_base_patch16_242")
    with pytest.raises(ConfigError, match="augreg_in21k"):
        create_backbone("vit_base_patch16_224.augreg_in21kk")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "size"), [pytest.param("ease", 224, marks=pytest.mark.long), ("aper-adapter", 64), ("simplecil", 224)]
)
def test_the_twelve_block_vit_runs_a_stream(method: str, size: int, few_images) -> None:
    """ViT-B/16 with random weights on a few images, with a forward-only optimizer."""
    config = TrialConfig.from_dict(
        {
            "dataset": few_images,
            "backbone": "vit_base_patch16_224.augreg_in21k",
            "checkpoint": "none",
            "image_size": size,
            "tasks": 2,
            "method": method,
            "optimizer": "zo-sgd",
            "epochs": 1,
            "batch_size": 4,
        }
    )
    result = run_trial(config)
    assert result.accuracy_matrix.shape == (2, 2)
    assert result.summary["forward_passes"] == {"ease": 4, "aper-adapter": 2, "simplecil": 0}[method]
