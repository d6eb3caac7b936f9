"""``zeroflow list backbones``: against timm, asked directly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import huggingface_hub.file_download
import pytest
import timm
import torch
from click.testing import CliRunner, Result

from zeroflow import ConfigError, TrialConfig
from zeroflow.cli import main
from zeroflow.models import factory, listing
from zeroflow.models.tuning import tunings
from zeroflow.trial.checks import check_backbone_of


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's."""
    for module in (huggingface_hub.constants, huggingface_hub.file_download):
        if hasattr(module, "HF_HUB_CACHE"):
            monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def listed(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["list", "backbones", *arguments])


def as_json(*arguments: str) -> dict[str, Any]:
    return dict(json.loads(listed(*arguments, "--json").stdout))


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_numbers_are_those_of_the_model_that_timm_builds(name: str) -> None:
    (row,) = as_json(name).items()
    found = row[1]
    model = timm.create_model(name, num_classes=0)
    assert row[0] == name and found["parameters"] == sum(value.numel() for value in model.parameters())
    assert found["width"] == model(torch.zeros(1, 3, 64, 64)).shape[1]
    assert list(found["weights"]) == timm.list_pretrained(name)
    for full, weights in found["weights"].items():
        assert weights["image_size"] == timm.get_pretrained_cfg(full).input_size[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_a_tuning_is_listed_exactly_if_a_cell_may_use_it(name: str) -> None:
    allowed = []
    for tuning in tunings.names():
        values = {"method": "finetune", "method_options": {"tune": tuning}, "optimizer": "zo-sgd", "backbone": name}
        try:
            check_backbone_of(TrialConfig.from_dict({**values, "checkpoint": "none", "image_size": 64}))
            allowed.append(tuning)
        except ConfigError as error:
            assert "cannot be tuned by" in str(error)
    assert as_json(name)[name]["tunings"] == allowed


@pytest.mark.slow
def test_a_pattern_fits_names_and_tags_as_in_timm() -> None:
    found = as_json("convnext_atto*")
    assert list(found) == timm.list_models("convnext_atto*")
    assert [full for row in found.values() for full in row["weights"]] == timm.list_pretrained("convnext_atto*")
    assert list(as_json("resnet18.a[12]_*")["resnet18"]["weights"]) == ["resnet18.a1_in1k", "resnet18.a2_in1k"]
    assert "quickdraw_vit" in as_json("quick*")


def test_a_line_on_the_architecture_and_its_tags_once() -> None:
    lines = listed("resnet18").stdout.splitlines()
    assert lines[0].split()[:2] == ["resnet18", "11.2M"] and "width   512" in lines[0] and "224 px" in lines[0]
    assert "a3_in1k (160 px)" in " ".join(lines[1:]) and "on this machine" not in "".join(lines)


def test_without_a_pattern_those_that_are_here_and_how_many_there_are() -> None:
    shown = listed()
    assert shown.stdout.startswith("quickdraw_vit ") and "(on this machine)" in shown.stdout
    assert f"{len(timm.list_models()):,} architectures of timm" in shown.stdout.splitlines()[-1]
    found = listed("--json")
    assert list(json.loads(found.stdout)) == ["quickdraw_vit"] and "name a pattern" in found.stderr


def test_one_of_another_package_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Blocks(torch.nn.Module):
        image_size = 16

        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(48, 5)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.layer(torch.nn.functional.avg_pool2d(images, 4).flatten(1))

    monkeypatch.setattr(factory, "own_backbones", lambda: {"own_blocks": Blocks})
    found = as_json("own_*")["own_blocks"]
    assert (found["parameters"], found["width"], found["image_size"]) == (48 * 5 + 5, 5, 16)
    assert found["weights"] == {"own_blocks": {"image_size": 16, "here": True}} and "adapter" not in found["tunings"]


def test_weights_that_the_hub_has_left_here_are_told(hub: Path) -> None:
    kept = hub / "models--timm--resnet18.a1_in1k"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("abc")
    (kept / "snapshots" / "abc").mkdir(parents=True)
    assert not any(weights["here"] for weights in as_json("resnet18")["resnet18"]["weights"].values())
    (kept / "snapshots" / "abc" / "model.safetensors").touch()
    here = [full for full, weights in as_json("resnet18")["resnet18"]["weights"].items() if weights["here"]]
    assert here == ["resnet18.a1_in1k"] and "a1_in1k (on this machine)" in listed("resnet18").stdout


@pytest.mark.parametrize(
    ("pattern", "nearest"), [("resnt18", "resnet18"), ("convnxt_atto*", "convnext_atto"), ("resnet18.b1_in1k", "resnet18.a1_in1k")]
)  # fmt: skip
def test_what_fits_nothing_is_answered_with_the_nearest(pattern: str, nearest: str) -> None:
    found = listed(pattern)
    assert found.exit_code == 2 and found.stdout == ""
    assert f"no backbone fits '{pattern}'; the nearest: {nearest}" in " ".join(found.stderr.split())


@pytest.mark.slow
def test_one_that_cannot_be_built_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(name: str) -> Any:
        if name == "convnext_atto":
            raise ConfigError("a package is missing")
        return real(name)

    real = listing.anatomy
    monkeypatch.setattr(listing, "anatomy", torn)
    shown = listed("convnext_atto*")
    assert "convnext_atto_ols" in shown.stdout and "cannot be built here: a package is missing" in shown.stdout
    assert as_json("convnext_atto*")["convnext_atto"]["problem"] == "a package is missing"
