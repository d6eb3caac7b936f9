"""Backbones and grids of one's own: which are taken, and plan tries what a cell will do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image
from torch import Tensor, nn

from zeroflow import Placement, TrialConfig, run_trial
from zeroflow.cli.__main__ import main
from zeroflow.data import load_dataset
from zeroflow.errors import ConfigError
from zeroflow.methods import methods
from zeroflow.models import factory
from zeroflow.models.endpoint import BlackBox
from zeroflow.models.factory import create_backbone
from zeroflow.models.probe import check_tuning
from zeroflow.models.tuning import tunings

SETTINGS = {
    "bottleneck": 4, "scale": 0.5, "dropout": 0.0, "tokens": 3, "border": 2, "rank": 2, "size": 5, "shared": True,
}  # fmt: skip
SIX = (
    "efficientnet_lite0",
    "convnext_atto",
    "resnet10t",
    "swin_tiny_patch4_window7_224",
    "eva02_tiny_patch14_224",
    "vit_tiny_patch16_224",
)


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


# Backbones of one's own


class Averages(nn.Module):
    """Means of a grid of patches, through a trained layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 24)

    def forward(self, images: Tensor) -> Tensor:
        return torch.tanh(self.layer(nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)))


@pytest.mark.slow
def test_a_program_of_torch_export_is_a_backbone(
    tmp_path: Path, some_drawings: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = Averages().eval(), tmp_path / "averages.pt2"
    images = torch.rand(2, 3, 28, 28, generator=seeded())
    torch.export.save(torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)), path)
    backbone = create_backbone(str(path))
    assert (backbone.width, backbone.image_size) == (24, 28)
    torch.testing.assert_close(backbone(images[:1]), model(images[:1]))
    cell = {"dataset": some_drawings, "backbone": str(path), "tasks": 4, "stop_after": 2, "epochs": 1, "batch_size": 16}
    closed = run_trial(TrialConfig.from_dict({**cell, "method": "ranpac"}))
    tuned = run_trial(TrialConfig.from_dict({**cell, "method": "aper-finetune", "optimizer": "fo-sgd"}))
    assert closed.summary["avg"] > 30 and tuned.summary["avg"] > 30
    monkeypatch.chdir(tmp_path)
    assert TrialConfig.from_dict({**cell, "backbone": path.name, "method": "ranpac"}).cell_id == closed.cell_id
    with pytest.raises(ConfigError, match="it is a module of which only images, features and weights are known"):
        check_tuning(str(path), None, None, None, "adapter", SETTINGS)
    with pytest.raises(ConfigError, match=r"image_size=32: .* was exported for 28"):
        create_backbone(str(path), image_size=32)
    torch.export.save(torch.export.export(model, (images,)), path)
    with pytest.raises(ConfigError, match=r"it takes 2 images at a time.*dynamic"):
        create_backbone(str(path))
    path.write_bytes(b"no program")
    with pytest.raises(ConfigError, match=r"averages.pt2: cannot be read"):
        create_backbone(str(path))


class Normalises(nn.Module):
    """A layer on normalised images, which are normalised where they are, or copied first."""

    def __init__(self, inside: bool, *last: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside, self.layers = inside, nn.Sequential(nn.Flatten(), nn.Linear(588, 16), *last, nn.Tanh())

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.sub_(0.5).div_(0.25) if self.inside else (images - 0.5) / 0.25)


@pytest.mark.parametrize("optimizer", ["fo-sgd", "zo-sgd", "forward-grad"])
def test_a_backbone_may_work_on_its_images_in_place(
    optimizer: str, monkeypatch: pytest.MonkeyPatch, some_drawings: str
) -> None:
    """All evaluations of a step pass the same images."""
    built = {f"normalises-{inside}": lambda inside=inside: Normalises(inside) for inside in (False, True)}
    monkeypatch.setattr(factory, "own_backbones", lambda: built)
    cell = {"dataset": some_drawings, "image_size": 14, "tasks": 4, "stop_after": 2, "epochs": 1, "batch_size": 40}
    cell |= {"method": "finetune", "method_options": {"tune": "full"}, "optimizer": optimizer, "lr": 0.001}
    copied, inside = (run_trial(TrialConfig.from_dict({**cell, "backbone": name})) for name in built)
    assert len({step.loss for step in inside.steps}) > 3
    assert [step.loss for step in inside.steps] == [step.loss for step in copied.steps]
    assert np.array_equal(inside.accuracy_matrix, copied.accuracy_matrix, equal_nan=True)


class IntoItsBuffer(nn.Module):
    """As where memory for outputs is bound once: every batch's features are in the same memory."""

    def __init__(self, bound: bool) -> None:
        super().__init__()
        self.bound, self.outputs = bound, torch.empty(256, 16)
        self.weights = nn.Buffer(torch.randn(588, 16, generator=torch.Generator().manual_seed(0)))

    def forward(self, images: Tensor) -> Tensor:
        found = images.flatten(1) @ self.weights
        return self.outputs[: len(images)].copy_(found) if self.bound else found


def test_a_backbone_may_return_the_same_memory_for_every_batch(
    monkeypatch: pytest.MonkeyPatch, some_drawings: str
) -> None:
    built = {f"bound-{bound}": lambda bound=bound: IntoItsBuffer(bound) for bound in (False, True)}
    monkeypatch.setattr(factory, "own_backbones", lambda: built)
    cell = {"dataset": some_drawings, "image_size": 14, "tasks": 4, "method": "slda"}
    small = Placement(evaluation_batch=5)
    free, bound = (run_trial(TrialConfig.from_dict({**cell, "backbone": name}), small) for name in built)
    assert np.array_equal(free.accuracy_matrix, bound.accuracy_matrix, equal_nan=True)


@pytest.mark.slow
def test_a_callable_may_return_the_same_memory_for_every_request() -> None:
    """More images than one request holds."""
    weights, outputs, images = torch.ones(3 * 224 * 224, 1), torch.empty(500, 1), torch.rand(500, 3, 224, 224)
    ask = BlackBox(lambda some: torch.matmul(some.flatten(1), weights, out=outputs[: len(some)]), 1, 224)
    torch.testing.assert_close(ask(images), images.flatten(1) @ weights, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("last", "why"),
    [
        ([nn.Dropout(0.2)], "with every pass"),
        ([nn.BatchNorm1d(16)], "with the images beside it"),
        ([nn.BatchNorm1d(16), nn.Dropout(0.2)], "with every pass"),
    ],
)
def test_a_program_that_was_exported_in_training_mode_is_refused(
    last: list[nn.Module], why: str, tmp_path: Path
) -> None:
    model, images, path = Normalises(False, *last), torch.rand(4, 3, 14, 14), tmp_path / "program.pt2"
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    torch.export.save(torch.export.export(model.train(), (images,), dynamic_shapes=shapes), path)
    with pytest.raises(ConfigError, match=rf"features of an image change {why}.*call model.eval\(\) before"):
        create_backbone(str(path))
    torch.export.save(torch.export.export(model.eval(), (images,), dynamic_shapes=shapes), path)
    torch.testing.assert_close(create_backbone(str(path))(images), model(images))


def test_a_transformers_own_forward_pass_is_kept() -> None:
    from timm.models.vision_transformer import VisionTransformer

    class Shifted(VisionTransformer):
        def forward_features(self, x: Tensor, *more: Any, **named: Any) -> Tensor:
            return super().forward_features((x - 0.5) / 0.25, *more, **named)

    made = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    model, plain = Shifted(**made).eval(), VisionTransformer(**made).eval()
    plain.load_state_dict(model.state_dict())
    images = torch.rand(3, 3, 28, 28, generator=seeded())
    expected = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(factory.wrapped(model)(images), expected)
    torch.testing.assert_close(factory.wrapped(plain)((images - 0.5) / 0.25), expected)


@pytest.mark.parametrize(
    ("tuned_by", "why"), [("adapter", "residual blocks"), ("ssf", "plain transformer"), ("vpt-deep", "no tokens")]
)
def test_a_cell_that_would_train_less_than_it_says_is_refused(tuned_by: str, why: str, some_drawings: str) -> None:
    cell = {"dataset": some_drawings, "backbone": "test_resnet", "checkpoint": "none", "image_size": 32, "tasks": 4}
    cell |= {"method": "finetune", "method_options": {"tune": tuned_by}, "optimizer": "zo-sgd", "lr": 0.001}
    with pytest.raises(ConfigError, match=f"backbone 'test_resnet': it cannot be tuned by '{tuned_by}': .*{why}"):
        run_trial(TrialConfig.from_dict(cell))


@pytest.mark.parametrize(("backbone", "tune"), [("test_mambaout", "norm-affine"), ("test_nfnet", "none")])
def test_layers_that_hold_others_are_trained_or_built_as_plan_says(
    backbone: str, tune: str, some_drawings: str
) -> None:
    cell = {"dataset": some_drawings, "backbone": backbone, "checkpoint": "none", "image_size": 32, "tasks": 4}
    cell |= {"stop_after": 1, "epochs": 1, "method": "finetune", "method_options": {"tune": tune}}
    found = run_trial(TrialConfig.from_dict({**cell, "optimizer": "zo-sgd", "lr": 0.001, "batch_size": 60}))
    model = create_backbone(backbone, checkpoint="none", image_size=32)
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm | nn.BatchNorm2d)]
    head = 5 * model.width + 1
    own = sum(p.numel() for norm in norms for p in norm.parameters()) if tune == "norm-affine" else 0
    assert found.summary["trainable_parameters"] == own + head


def test_an_entry_point_is_a_backbone(monkeypatch: pytest.MonkeyPatch, some_drawings: str) -> None:
    monkeypatch.setattr(factory, "own_backbones", lambda: {"averages": Averages})
    backbone = create_backbone("averages", image_size=28)
    assert backbone(torch.zeros(3, 3, 28, 28)).shape == (3, 24) and not any(
        p.requires_grad for p in backbone.parameters()
    )
    with pytest.raises(ConfigError, match="image_size: not known for backbone 'averages'"):
        create_backbone("averages")
    with pytest.raises(ConfigError, match="brings its own weights"):
        create_backbone("averages", checkpoint="hub", image_size=28)


# What plan says


def planned(tmp_path: Path, command: str = "plan", **cell: Any) -> tuple[int, str]:
    grid = tmp_path / "grid.yaml"
    grid.write_text(yaml.safe_dump({"name": "own", "base": {"checkpoint": "none"}, "grid": [cell]}))
    more = {"plan": [], "sweep": ["--dry-run"]}[command]
    result = CliRunner().invoke(main, [command, "--grid", str(grid), "--results", str(tmp_path / "results"), *more])
    return result.exit_code, result.output


@pytest.mark.parametrize("command", ["plan", "sweep"])
@pytest.mark.parametrize(
    ("cell", "said"),
    [
        (
            {"method": "ease", "backbone": "resnet18"},
            "method 'ease' with backbone 'resnet18': it cannot be tuned by 'adapter': a ResNet is not made of residual blocks that "
            "each end in an MLP; it can by full, input-filter, input-prompt, none, norm-affine",
        ),
        ({"method": "aper-vpt-deep", "backbone": "beit_base_patch16_224"}, "takes no tokens beside those of the image"),
        ({"method": "aper-ssf", "backbone": "vit_base_patch16_xp_224"}, "not timm's plain ones"),
        ({"method": "simplecil", "backbone": "vit_tiny_patch16_224", "image_size": 8}, "smaller than a patch"),
        (
            {"method": "simplecil", "backbone": "vit_tiny_patch16_224", "image_size": 40},
            "would not see the last 8 rows and columns; expected a multiple of 16, such as 32 or 48",
        ),
        ({"method": "simplecil", "backbone": "vit_tiny_patch16_224", "image_size": 8}, "its own images have 224"),
        ({"method": "aper-norm-affine", "backbone": "vgg11"}, "a VGG has no norm with values of its own"),
        ({"method": "simplecil", "backbone": "resnet18", "access": "spiking"}, "a plain vision transformer"),
    ],
)  # fmt: skip
def test_what_a_cell_cannot_do_is_refused_by_plan_and_sweep(
    tmp_path: Path, command: str, cell: dict[str, Any], said: str
) -> None:
    status, output = planned(tmp_path, command, optimizer="fo-sgd", **cell)
    assert status == 2 and said in " ".join(output.split()), output
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("checkpoint", [None, "none"])
def test_an_image_smaller_than_a_patch_is_refused_as_such(checkpoint: str | None) -> None:
    expected = r"image_size=6: smaller than a patch of backbone 'quickdraw_vit', 7 pixels; its own images have 28"
    with pytest.raises(ConfigError, match=expected):
        check_tuning("quickdraw_vit", checkpoint, 6, None, "none", {})
    check_tuning("quickdraw_vit", checkpoint, 7, None, "none", {})


def test_the_embedded_backbone_is_refused_from_the_hub_before_any_work() -> None:
    with pytest.raises(ConfigError, match="'quickdraw_vit' is not on the hub"):
        check_tuning("quickdraw_vit", "hub", None, None, "none", {})


def test_efficiency_refuses_a_backbone_without_places_for_adapters() -> None:
    result = CliRunner().invoke(main, ["efficiency", "--backbone", "resnet18", "--steps", "1"])
    assert result.exit_code == 2 and "it cannot be tuned by 'adapter'" in result.output


@pytest.mark.parametrize(
    ("method", "backbone"),
    [
        *((method, "vit_tiny_r_s16_p8_224") for method in ("aper-ssf", "ease")),
        *(
            ("ease", name)
            for name in (
                "vit_pwee_patch16_reg1_gap_256",
                "vit_small_patch16_18x2_224",
                "vit_dpwee_patch16_reg1_gap_256",
            )
        ),
        *(("aper-block-shift", name) for name in ("convnext_atto", "swin_tiny_patch4_window7_224")),
    ],
)
def test_what_a_cell_can_do_is_planned(tmp_path: Path, method: str, backbone: str) -> None:
    status, output = planned(tmp_path, method=method, backbone=backbone, optimizer="fo-sgd")
    assert status == 0 and "1 to run" in output


# A grid of one's own


@pytest.fixture(scope="module")
def drawings_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of real drawings as an image folder: eight to learn from, three to test."""
    root, whole = tmp_path_factory.mktemp("data"), load_dataset("quickdraw100")
    for part, samples, count in (("train", whole.train, 8), ("test", whole.test, 3)):
        for label in range(4):
            folder = root / "own" / part / whole.class_names[label].replace(" ", "-")
            folder.mkdir(parents=True)
            rows = np.flatnonzero(samples.labels == label)[:count]
            for number, image in enumerate(samples.images(rows)):
                Image.fromarray(image[0].numpy()).save(folder / f"{number}.png")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("backbone", SIX)
def test_a_grid_of_ones_own_changes_the_backbone_by_one_key(drawings_folder: Path, backbone: str) -> None:
    from zeroflow import Placement
    from zeroflow.trial.checks import check_backbone_of

    rows = [
        {"method": "simplecil"},
        {"method": "simplecil", "classifier": "random-projection", "classifier_options": {"dimension": 300}},
        *({"method": "aper-input-filter", "optimizer": name} for name in ("zo-adam", "fo-sgd")),
        {"method": "aper-finetune", "optimizer": "fo-sgd"},
    ]
    for row in rows:
        cell = {
            "dataset": "folder:own",
            "tasks": 2,
            "epochs": 1,
            "batch_size": 8,
            "image_size": 28 if "patch14" in backbone else 32,
            "checkpoint": "none",
        }
        config = TrialConfig.from_dict({**cell, **row, "backbone": backbone})
        check_backbone_of(config)
        result = run_trial(config, Placement(str(drawings_folder)))
        assert result.accuracy_matrix.shape == (2, 2) and result.summary["avg"] > 0, row


def test_every_method_says_what_it_tunes() -> None:
    for _, info in methods.items():
        assert tunings.get(info.build.tunes(info.options())).needs
