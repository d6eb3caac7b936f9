"""Weights from files as people have them: which are loaded, to the bit, which are ignored, and which are refused."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from weight_files import MODELS, VIT, State, build, in_file, in_shards

from zeroflow.errors import ConfigError
from zeroflow.models.weights import load_weights, read_weights


def features(model: nn.Module, name: str, **settings: Any) -> Tensor:
    side = {**MODELS.get(name, {}), **settings}.get("img_size", 64)
    with torch.no_grad():
        images = torch.rand(2, settings.get("in_chans", 3), side, side, generator=torch.Generator().manual_seed(0))
        return model.forward_head(model.forward_features(images), pre_logits=True)


def under(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def elsewhere(state: State) -> State:
    """Weights that must not be taken."""
    return {name: value + 1 for name, value in state.items()}


DINO_HEAD = {
    "mlp.0.weight": torch.ones(8, 4), "mlp.0.bias": torch.ones(8), "mlp.2.weight": torch.ones(8, 8),
    "last_layer.weight_g": torch.ones(9, 1), "last_layer.weight_v": torch.ones(9, 8),
}  # fmt: skip


OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


FORMS: dict[str, Callable[[State, Path], Path]] = {
    "safetensors": lambda state, folder: in_file(state, folder, "weights.safetensors"),
    "shards": lambda state, folder: in_shards(state, folder, ".safetensors"),
    "torch-shards": lambda state, folder: in_shards(state, folder, ".bin"),
    "parameters": lambda state, folder: in_file({k: nn.Parameter(v, v.is_floating_point()) for k, v in state.items()}, folder),
    "training": lambda state, folder: in_file(
        {"model": state, "optimizer": OPTIMIZER, "epoch": 3, "args": argparse.Namespace(lr=0.1)}, folder, "last.pth.tar"
    ),
    "ema": lambda state, folder: in_file({"state_dict": elsewhere(state), "state_dict_ema": under("module.", state)}, folder),
    "ema-beside": lambda state, folder: in_file(
        {"state_dict": {**under("model.", elsewhere(state)), **under("ema_model.module.", state)}}, folder, "last.ckpt"
    ),
    "averaged": lambda state, folder: in_file({"n_averaged": torch.tensor(4), **under("module.", state)}, folder),
    "compiled": lambda state, folder: in_file(under("_orig_mod.module.", state), folder, "pytorch_model.bin"),
    "lightning": lambda state, folder: in_file(
        {"state_dict": {**under("model.backbone.", state), "model.head.weight": torch.ones(5, 9)}, "callbacks": {"a": 1}},
        folder, "last.ckpt",
    ),
    "dino": lambda state, folder: in_file(
        {
            "student": under("module.backbone.", elsewhere(state)), "optimizer": OPTIMIZER,
            "teacher": {**under("backbone.", state), **under("head.", DINO_HEAD)}, "dino_loss": {"center": torch.ones(1, 9)},
        },
        folder,
    ),
    "teacher-beside": lambda state, folder: in_file(
        {"model": {**under("student.backbone.", elsewhere(state)), **under("teacher.backbone.", state)}}, folder
    ),
    "nested": lambda state, folder: in_file({"epoch": torch.tensor(1), "run": {"net": {"model": {"model": state}}}}, folder),
    "some-head": lambda state, folder: in_file({**state, **under("my_thing.", DINO_HEAD)}, folder),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_weights_are_found_in_every_form(name: str, tmp_path: Path) -> None:
    """Features to the bit, from a classifier's file into a headless model."""
    trained = build(name, 1, classes=7)
    expected = features(trained, name)
    for form, save in FORMS.items():
        folder = tmp_path / form
        folder.mkdir()
        model = build(name, 2)
        assert not torch.equal(features(model, name), expected)
        load_weights(model, save(trained.state_dict(), folder))
        assert torch.equal(features(model, name), expected), form


class Small(nn.Module):
    """No model of timm's: tied weights, counted batches, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.block1 = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.inner = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        self.inner["b"].weight = self.inner["a"].weight
        self.register_buffer("table", torch.arange(3.0), persistent=False)


@pytest.mark.parametrize("seed", range(20))
def test_any_prefix_in_any_container_is_found(seed: int, tmp_path: Path) -> None:
    draw, model, other = random.Random(seed), Small(), Small()
    parts = ["module", "_orig_mod", "model", "backbone", "teacher", "net", "encoder", "0", "a"]
    prefix = "".join(f"{draw.choice(parts)}." for _ in range(draw.randrange(5)))
    content: dict[str, Any] = under(prefix, model.state_dict())
    content[f"{draw.choice(parts)}.head.weight" if prefix else "head.weight"] = torch.ones(2, 4)
    for _ in range(draw.randrange(4)):
        content = {draw.choice(["state_dict", "model", "ema", "whatever"]): content, "epoch": 3, "optimizer": OPTIMIZER}
    load_weights(other, in_file(content, tmp_path))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_of_equal_prefixes_the_shortest_is_taken(tmp_path: Path) -> None:
    model, other = Small(), Small()
    state = model.state_dict()
    load_weights(other, in_file({**under("copy.of.it.", elsewhere(state)), **under("net.", state)}, tmp_path))
    assert torch.equal(other.inner["a"].weight, state["inner.a.weight"])


def test_averages_and_optimizers_that_name_no_weights_are_passed_over(tmp_path: Path) -> None:
    model, other = Small(), Small()
    state = model.state_dict()
    content = {
        "ema": {"decay": torch.tensor(0.9), "shadow_params": list(state.values())},
        "network": state,
        "optim_g": {**under("exp_avg.", elsewhere(state)), **under("exp_avg_sq.", elsewhere(state))},
    }
    load_weights(other, in_file(content, tmp_path))
    assert torch.equal(other.inner["a"].weight, state["inner.a.weight"])


def test_what_a_model_can_do_without_may_be_missing_or_there(tmp_path: Path) -> None:
    """Tied weights saved once, no count of batches, and a buffer that is not saved any more."""
    model, other = Small(), Small()
    state = {
        name: v
        for name, v in model.state_dict().items()
        if name not in ("inner.b.weight", "block1.1.num_batches_tracked")
    }
    load_weights(other, in_file({**state, "table": torch.zeros(9)}, tmp_path))
    assert torch.equal(other.inner["b"].weight, model.inner["a"].weight) and torch.equal(other.table, torch.arange(3.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_other_precisions_become_float32_and_integers_stay(dtype: torch.dtype, suffix: str, tmp_path: Path) -> None:
    state = build("resnet10t", 1).state_dict()
    path = in_file({n: v.to(dtype) if v.is_floating_point() else v for n, v in state.items()}, tmp_path, f"w.{suffix}")
    found = read_weights(path)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[n], v.to(dtype).float() if v.is_floating_point() else v) for n, v in state.items())
    assert {v.dtype for v in found.values()} == {torch.float32, torch.int64}
    model = build("resnet10t", 2)
    load_weights(model, path)
    assert model.bn1.num_batches_tracked == 3 and torch.equal(model.fc(model.bn1.weight), found["bn1.weight"])


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.bool])
def test_integers_are_no_weights(kind: torch.dtype, tmp_path: Path) -> None:
    """As quantized ones are saved, beside scales that are not in the file or in another place."""
    state = build("resnet10t", 1).state_dict()
    path = in_file({**state, "conv1.0.weight": (100 * state["conv1.0.weight"]).to(kind)}, tmp_path, "w.pth")
    model = build("resnet10t", 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"integers in place of weights, as of a quantized model: conv1\.0\.weight$"):
        load_weights(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Through timm's own conversion


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        (VIT, {"img_size": 64}),
        (VIT, {"img_size": 64, "patch_size": 8, "in_chans": 1}),
        ("vit_tiny_r_s16_p8_224", {"img_size": 96, "in_chans": 1}),
        ("eva02_tiny_patch14_224", {"img_size": 56}),
        ("swin_tiny_patch4_window7_224", {"window_size": 4}),
        ("convnext_atto", {"in_chans": 1}),
        ("resnet10t", {"in_chans": 5}),
    ],
)
def test_another_image_size_or_number_of_channels_is_fitted_as_timm_does(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    path = in_file(build(name, 1).state_dict(), tmp_path, "weights.safetensors")
    model = build(name, 2, **settings)
    load_weights(model, path)
    timms = timm.create_model(
        name,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(path), "custom_load": False},
        num_classes=0,
        **{**MODELS[name], **settings},
    ).eval()
    assert torch.equal(features(model, name, **settings), features(timms, name, **settings))


def test_grey_weights_fit_a_model_for_colours_and_grey_images_give_the_same_features(tmp_path: Path) -> None:
    grey, model = build("resnet10t", 1, in_chans=1), build("resnet10t", 2)
    load_weights(model, in_file(grey.state_dict(), tmp_path))
    with torch.no_grad():
        images = torch.rand(2, 1, 64, 64)
        torch.testing.assert_close(model(images.expand(-1, 3, -1, -1)), grey(images))


def test_names_of_the_original_dinov2_fit(tmp_path: Path) -> None:
    """With registers, a mask token, and a position for the class token."""
    settings = {"img_size": 28, "depth": 2, "embed_dim": 64, "num_heads": 2}
    name = "vit_small_patch14_reg4_dinov2"
    trained, model = build(name, 1, **settings), build(name, 2, **settings)
    state = trained.state_dict()
    state["register_tokens"], state["mask_token"] = state.pop("reg_token"), torch.ones(1, 64)
    state["pos_embed"] = torch.cat([torch.zeros(1, 1, 64), state["pos_embed"]], dim=1)
    teacher = {**under("backbone.", state), **under("dino_head.", DINO_HEAD)}
    load_weights(model, in_file({"teacher": teacher}, tmp_path))
    assert torch.equal(features(model, name, **settings), features(trained, name, **settings))


def test_a_masked_autoencoder_fits_and_its_decoder_is_ignored(tmp_path: Path) -> None:
    trained, model, larger = build(VIT, 1), build(VIT, 2), build(VIT, 2, img_size=64)
    decoder = {
        "mask_token": torch.ones(1, 1, 8),
        "decoder_pos_embed": torch.ones(1, 5, 8),
        "decoder_embed.weight": torch.ones(8, 192),
        "decoder_blocks.0.attn.qkv.weight": torch.ones(24, 8),
        "decoder_norm.weight": torch.ones(8),
    }
    path = in_file({"model": {**trained.state_dict(), **decoder}}, tmp_path)
    load_weights(model, path)
    load_weights(larger, path)
    assert torch.equal(features(model, VIT), features(trained, VIT))
    assert larger.pos_embed.shape == (1, 17, 192) and torch.equal(larger.pos_embed[:, 0], trained.pos_embed[:, 0])


def test_names_of_the_original_clip_fit(tmp_path: Path) -> None:
    name, settings = "vit_base_patch32_clip_224", {"img_size": 64, "depth": 1, "embed_dim": 64, "num_heads": 1}
    trained, model = build(name, 1, **settings), build(name, 2, **settings)
    state = trained.state_dict()
    clip = {"visual.proj": torch.ones(64, 8), "logit_scale": torch.ones(()), "positional_embedding": torch.ones(77, 64)}
    clip |= under("transformer.resblocks.0.mlp.c_fc.", {"weight": torch.ones(8, 2), "bias": torch.ones(8)})
    clip["visual.class_embedding"], clip["visual.positional_embedding"] = (
        state["cls_token"][0, 0],
        state["pos_embed"][0],
    )
    for ours, theirs in {
        "patch_embed.proj.weight": "conv1.weight",
        "norm_pre.weight": "ln_pre.weight",
        "norm_pre.bias": "ln_pre.bias",
        "norm.weight": "ln_post.weight",
        "norm.bias": "ln_post.bias",
    }.items():
        clip[f"visual.{theirs}"] = state[ours]
    parts = {
        "norm1.": "ln_1.",
        "norm2.": "ln_2.",
        "attn.qkv.": "attn.in_proj_",
        "attn.proj.": "attn.out_proj.",
        "mlp.fc1.": "mlp.c_fc.",
        "mlp.fc2.": "mlp.c_proj.",
    }
    for ours, theirs in parts.items():
        for kind in ("weight", "bias"):
            clip[f"visual.transformer.resblocks.0.{theirs}{kind}"] = state[f"blocks.0.{ours}{kind}"]
    load_weights(model, in_file(clip, tmp_path))
    assert torch.equal(features(model, name, **settings), features(trained, name, **settings))


# What is refused


@pytest.mark.parametrize(
    "extra",
    [
        {"norm_pre.weight": torch.ones(192), "norm_pre.bias": torch.ones(192)},
        {"blocks.2.attn.qkv.weight": torch.ones(576, 192)},
        {"blocks.0.adapter.down.weight": torch.ones(8, 192)},
        {"dist_token": torch.ones(1, 1, 192)},
        {"reg_token": torch.ones(1, 4, 192)},
        {"fc_norm.weight": torch.ones(192)},
        {"rel_pos_bias.relative_position_bias_table": torch.ones(9, 3)},
        {"attn_pool.latent": torch.ones(1, 1, 192), "attn_pool.q.weight": torch.ones(192, 192)},
        {"stem.conv.weight": torch.ones(3, 3, 3, 3)},
        {"blocks.0.ls1.gamma": torch.ones(192)},
    ],
)
def test_what_changes_features_is_never_left_out(extra: State, tmp_path: Path) -> None:
    model = build(VIT, 1)
    before = features(model, VIT)
    path = in_file(under("module.", {**build(VIT, 2).state_dict(), **extra}), tmp_path)
    with pytest.raises(ConfigError, match="does not fit") as refusal:
        load_weights(model, path)
    assert next(iter(extra)) in str(refusal.value) and "'module.'" in str(refusal.value)
    assert torch.equal(features(model, VIT), before), "a refusal changes nothing"


def test_a_further_layer_of_numbered_layers_is_no_head(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    longer = nn.Sequential(*model, nn.Linear(4, 4))
    with pytest.raises(ConfigError, match=r"2 that the model does not have: 2\.weight, 2\.bias"):
        load_weights(model, in_file(longer.state_dict(), tmp_path))


def test_a_refusal_counts_and_names_what_does_not_fit(tmp_path: Path) -> None:
    state = build(VIT, 1).state_dict()
    del state["cls_token"], state["blocks.0.norm1.bias"]
    state["norm.weight"], state["odd.scale"] = torch.ones(7), torch.ones(3)
    with pytest.raises(ConfigError) as refusal:
        load_weights(build(VIT, 2), in_file(state, tmp_path, "mine.pth"))
    title, *lines = str(refusal.value).splitlines()
    assert title.endswith("mine.pth: does not fit the model vit_tiny_patch16_224")
    assert "2 of the model's 30 weights missing: cls_token, blocks.0.norm1.bias" in lines[0]
    assert "1 that the model does not have: odd.scale" in lines[1]
    assert "1 of another shape: norm.weight [7], expected [192]" in lines[2]
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("saved", "settings", "advice"),
    [
        ("resnet10t", {}, "of a ResNet, such as resnet50"),
        ("convnext_atto", {}, "of a ConvNeXt"),
        ("swin_tiny_patch4_window7_224", {}, "of a Swin"),
        (VIT, {"embed_dim": 96}, "another size"),
        (VIT, {"depth": 3}, "a relative"),
    ],
)
def test_weights_of_another_model_say_which(saved: str, settings: dict[str, Any], advice: str, tmp_path: Path) -> None:
    path = in_file(build(saved, 1, **settings).state_dict(), tmp_path)
    with pytest.raises(ConfigError, match=advice) as refusal:
        load_weights(build(VIT, 2), path)
    assert len(str(refusal.value).splitlines()) <= 6


def test_weights_that_are_not_finite_are_named_and_those_of_a_head_do_not_matter(tmp_path: Path) -> None:
    trained, model = build(VIT, 1, classes=3), build(VIT, 2)
    state = trained.state_dict()
    state["head.bias"][1] = float("nan")
    load_weights(model, in_file(state, tmp_path))
    state["norm.bias"][1], state["blocks.1.mlp.fc1.weight"][0, 0] = float("inf"), float("nan")
    with pytest.raises(ConfigError, match=r"not finite: blocks\.1\.mlp\.fc1\.weight, norm\.bias$"):
        load_weights(model, in_file({n: v.half() for n, v in state.items()}, tmp_path))
