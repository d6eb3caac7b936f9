"""Preprocessing belongs to weights: against timm's own, in cells' ids, and on the way to the features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from everything import cell as finished
from everything import simplecil
from image_files import IMAGENET, photo
from PIL import Image

from zeroflow import Placement, TrialConfig, run_trial
from zeroflow.data import Preprocessing, transform_of, transforms
from zeroflow.data.preprocessing import CROP_MODES, RANGES
from zeroflow.data.transforms import center_crop, evaluation_crop, normalised, random_resized_crop
from zeroflow.errors import ConfigError
from zeroflow.grid.grid_file import parse_grid
from zeroflow.grid.plan import make_plan
from zeroflow.models.factory import preprocessing_of
from zeroflow.results import Store
from zeroflow.results.rows import tables
from zeroflow.results.summary import summary
from zeroflow.trial.stream import scenario_of

CLIP, DINO = "vit_base_patch16_clip_224.openai", "vit_base_patch14_dinov2.lvd142m"
SIGLIP, AUGREG = "vit_base_patch16_siglip_224.webli", "vit_base_patch16_224.augreg_in21k"
CONVNEXT = "convnext_base.fb_in22k_ft_in1k"
PHOTOS = {"transform": "timm", "method": "simplecil"}


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def config(**values: Any) -> TrialConfig:
    return TrialConfig.from_dict({**PHOTOS, **values})


# Images


def timms_own(name: str, size: int, **changes: Any) -> Any:
    settings = timm.data.resolve_data_config(
        {"img_size": size, **changes}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict()
    )
    return timm.data.create_transform(**settings, is_training=False)


@pytest.mark.parametrize(("height", "width"), [(211, 157), (97, 301), (64, 64), (40, 53)])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (CLIP, {}), (DINO, {}), (SIGLIP, {}), (AUGREG, {}), (CONVNEXT, {}), (AUGREG, {"crop_mode": "border"}),
        (CLIP, {"crop_mode": "border", "crop_pct": 1.0}), (CLIP, {"crop_mode": "squash", "crop_pct": 0.7}),
        (DINO, {"interpolation": "bilinear"}),
    ],
)  # fmt: skip
def test_test_images_are_timms_own(name: str, changes: dict[str, Any], height: int, width: int) -> None:
    """Up to two of 256 grey values: timm resamples with Pillow, which rounds its weights and after each direction otherwise."""
    image = photo(height, width)
    made = config(backbone=name, image_size=64, preprocessing=changes).preprocessing
    for size in (64, 61):
        expected = timms_own(name, size, **changes)(image)
        off = (transform_of("timm", made).test([tensor(image)], size)[0] - expected).abs()
        assert bool((off.amax((1, 2)) <= 2 / 255 / torch.tensor(made["std"]) + 1e-6).all())
        assert float(off.mean()) < 0.2 / 255 / min(made["std"])
        batch = transform_of("timm", made).test(tensor(image)[None], size)[0]
        assert torch.equal(batch, transform_of("timm", made).test([tensor(image)], size)[0])


@pytest.mark.parametrize(("height", "width"), [(211, 157), (97, 301), (40, 53)])
def test_the_nearest_pixel_is_that_of_timm(height: int, width: int) -> None:
    """Of sizes at which no place is as near to one pixel as to the next."""
    image, changes = photo(height, width), {"interpolation": "nearest", "crop_pct": 0.8}
    made = config(backbone=CLIP, preprocessing=changes).preprocessing
    torch.testing.assert_close(
        transform_of("timm", made).test([tensor(image)], 64)[0],
        timms_own(CLIP, 64, **changes)(image),
        rtol=0,
        atol=1e-6,
    )


def test_a_single_colour_is_normalised_exactly_in_training_and_test() -> None:
    made = Preprocessing(
        mean=(0.1, 0.5, 0.9), std=(0.25, 1, 3), interpolation="bilinear", crop_pct=0.8, crop_mode="squash"
    )
    photos, image = transform_of("timm", made.values()), torch.tensor([0, 51, 255], dtype=torch.uint8)[:, None, None]
    expected = torch.tensor([(0 - 0.1) / 0.25, (0.2 - 0.5) / 1, (1 - 0.9) / 3])[:, None, None]
    for found in (
        photos.test([image.expand(3, 30, 41)], 16),
        photos.train([image.expand(3, 30, 41)], 16, torch.Generator()),
    ):
        torch.testing.assert_close(found[0], expected.expand(3, 16, 16), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_training_crops_are_pilots_boxes_with_the_weights_interpolation(interpolation: str) -> None:
    images = [tensor(photo(50 + 9 * i, 80 - 5 * i, i)) for i in range(8)]
    made = Preprocessing(interpolation=interpolation)
    ours = transform_of("timm", made.values()).train(images, 24, torch.Generator().manual_seed(3))
    mean, std = (torch.tensor(colour)[:, None, None] for colour in (made.mean, made.std))
    pilots = transforms.get("pilot").train(images, 24, torch.Generator().manual_seed(3))
    off = (ours * std + mean - pilots).abs()
    assert float(off.mean()) < 0.06, "the same boxes, the same mirroring"
    assert (float(off.max()) < 1e-6) == (interpolation == "bilinear")


def test_pilot_is_as_it_was() -> None:
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as photos

    image = tensor(photo(300, 211))
    larger = photos.resize(image, [256], InterpolationMode.BICUBIC, antialias=True)
    expected = photos.center_crop(larger, [224, 224]).float() / 255
    assert torch.equal(transforms.get("pilot").test([image], 224)[0], expected)
    assert transforms.get("pilot").test is center_crop and transforms.get("pilot").train is random_resized_crop
    assert [name for name, transform in transforms.items() if transform.with_preprocessing] == ["timm"]


def test_drawings_are_made_grey_or_not_and_bordered_alike() -> None:
    grey = torch.randint(0, 256, (2, 1, 20, 31), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for mode in ("center", "squash", "border"):
        transform = transform_of("timm", Preprocessing(crop_mode=mode).values())
        assert torch.equal(transform.test(grey, 16), transform.test(grey.expand(2, 3, 20, 31), 16))
        assert torch.equal(transform.test(grey, 16), transform.test(list(grey), 16))


# What weights ask for


def test_every_tag_of_timms_vision_transformers_is_read_as_timm_reads_it() -> None:
    names, others = timm.list_models(module="vision_transformer", pretrained=True), 0
    assert len(names) > 100
    for name in names:
        found = Preprocessing.of(preprocessing_of(name))
        resolved = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        for key, value in found.values().items():
            expected = resolved[key]
            assert value == (list(expected) if isinstance(expected, tuple) else expected), (name, key)
        others += found.mean != (0.5, 0.5, 0.5)
    assert others > 50


def test_weights_without_a_tag_get_timms_default_and_the_embedded_ones_their_own(tiny_vit: dict[str, Any]) -> None:
    assert config(**tiny_vit).preprocessing == IMAGENET
    endpoint = {"backbone": "my-endpoints/own", "access": "black-box", "image_size": 32}
    assert config(**endpoint).preprocessing == IMAGENET
    resolved = timm.data.resolve_data_config({"img_size": 32})
    assert {key: list(v) if isinstance(v, tuple) else v for key, v in resolved.items() if key in IMAGENET} == IMAGENET
    assert config().preprocessing == {
        "mean": [0.0] * 3,
        "std": [1.0] * 3,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "squash",
    }
    untagged = timm.get_pretrained_cfg("vit_base_patch16_224")
    assert config(backbone="vit_base_patch16_224").preprocessing["mean"] == list(untagged.mean)


# Cells


def test_the_id_says_what_the_images_become() -> None:
    plain = config(backbone=AUGREG)
    own = plain.canonical()["preprocessing"]
    assert own == {**IMAGENET, "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9}
    same: list[dict[str, Any]] = [
        {},
        own,
        dict(reversed(own.items())),
        {"mean": (0.5, 0.5, 0.5)},
        {"crop_pct": 0.9, "interpolation": "bicubic"},
    ]
    assert {config(backbone=AUGREG, preprocessing=given).cell_id for given in same} == {plain.cell_id}
    ones = [config(preprocessing={"std": std, "crop_pct": pct}) for std, pct in (((1, 1, 1), 1), ([1.0] * 3, 1.0))]
    assert ones[0] == ones[1] and ones[0].cell_id == ones[1].cell_id
    changes: list[dict[str, Any]] = [
        {"mean": [0.5, 0.5, 0.4]},
        {"std": [1, 1, 1]},
        {"interpolation": "nearest"},
        {"crop_pct": 1},
        {"crop_mode": "squash"},
    ]
    ids = {config(backbone=AUGREG, preprocessing=change).cell_id for change in changes}
    assert len(ids) == 5 and plain.cell_id not in ids
    for one in (plain, *(config(backbone=AUGREG, preprocessing=change) for change in changes)):
        again = TrialConfig.from_dict(one.canonical())
        assert again == one and again.canonical() == one.canonical() == json.loads(json.dumps(one.canonical()))
        assert again.cell_id == one.cell_id and TrialConfig(**one.canonical()) == one


def test_cells_that_do_not_normalise_keep_their_ids_and_know_no_preprocessing() -> None:
    for transform in ("plain", "drawings", "pilot"):
        found = config(transform=transform, preprocessing={})
        assert found.preprocessing == {} and "preprocessing" not in found.canonical()
        assert found.cell_id == config(transform=transform).cell_id


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"meen": [0, 0, 0]}, "preprocessing: unknown key 'meen'; did you mean 'mean'"),
        ({"crop": 0.9}, "did you mean 'crop_"),
        ({"mean": 0.5}, r"preprocessing.mean=0.5: expected three numbers in \[-1000, 1000\]"),
        ({"mean": [0.5, 0.5]}, "three numbers in"),
        ({"mean": [0.5, 0.5, float("nan")]}, "three numbers in"),
        ({"mean": [0.5, 0.5, True]}, "three numbers in"),
        ({"mean": ["0.5"] * 3}, "three numbers in"),
        ({"std": [0.5, 0.5, 0]}, r"preprocessing.std=\[0.5, 0.5, 0\]: expected three numbers in \[1e-06, 1e\+06\]"),
        ({"std": [0.5, 0.5, -1]}, "three numbers in"),
        ({"mean": [1e308] * 3}, r"preprocessing.mean=\[1e\+308, .*: expected three numbers in \[-1000, 1000\]"),
        ({"mean": [0, 0, -1001]}, "three numbers in"),
        ({"mean": [10**400] * 3}, "three numbers in"),
        ({"std": [1, 1, 1e-7]}, "three numbers in"),
        ({"std": [1, 1, 1e7]}, "three numbers in"),
        ({"crop_pct": 1e-9}, r"preprocessing.crop_pct=1e-09: expected a share in \[0.1, 1\]"),
        ({"crop_pct": 0.099}, "a share in"),
        ({"std": [0.5, 0.5, float("inf")]}, "three numbers in"),
        ({"crop_pct": 0}, r"preprocessing.crop_pct=0: expected a share in \[0.1, 1\]"),
        ({"crop_pct": 1.15}, "a share in"),
        ({"crop_pct": float("nan")}, "a share in"),
        ({"crop_pct": "90%"}, "a share in"),
        ({"interpolation": "bicubik"}, "unknown preprocessing.interpolation 'bicubik'; did you mean 'bicubic'"),
        ({"interpolation": 3}, "unknown preprocessing.interpolation 3"),
        ({"crop_mode": "centre"}, "unknown preprocessing.crop_mode 'centre'; did you mean 'center'"),
        ("imagenet", "preprocessing='imagenet': expected a mapping"),
        (None, "preprocessing=None: expected a mapping"),
    ],
)
def test_wrong_preprocessing_is_refused_with_key_and_value(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(preprocessing=given)


@pytest.mark.parametrize("mode", CROP_MODES)
@pytest.mark.parametrize("side", [0, 1])
def test_the_extremes_of_every_range_give_finite_images(mode: str, side: int) -> None:
    mean, std, crop_pct = (RANGES[key][side] for key in ("mean", "std", "crop_pct"))
    own = Preprocessing(mean=(mean,) * 3, std=(std,) * 3, crop_pct=crop_pct, crop_mode=mode)
    batch = normalised(evaluation_crop([tensor(photo(9, 20))], 16, own), own)
    assert batch.shape == (1, 3, 16, 16) and bool(batch.isfinite().all())


def test_where_there_is_nothing_to_normalise_preprocessing_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"preprocessing=\{'crop_pct': 0.9\}: transform 'drawings' takes none; timm does"
    ):
        config(transform="drawings", preprocessing={"crop_pct": 0.9})


def test_weights_that_ask_for_the_impossible_are_named_and_can_be_overruled(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = timm.get_pretrained_cfg(AUGREG)
    settings.crop_mode = "spiral"
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name, allow_unregistered=True: settings)
    preprocessing_of.cache_clear()
    try:
        with pytest.raises(ConfigError, match=f"backbone '{AUGREG}': its weights ask for unknown .*crop_mode 'spiral'"):
            config(backbone=AUGREG)
        assert config(backbone=AUGREG, preprocessing={"crop_mode": "center"}).preprocessing["crop_mode"] == "center"
    finally:
        preprocessing_of.cache_clear()


# Grids, stores, tables


def test_a_grid_reaches_into_preprocessing_with_dotted_keys_and_rules(tmp_path: Path) -> None:
    content = {
        "base": {**PHOTOS, "preprocessing.crop_pct": [0.9, 1.0]},
        "grid": [{"backbone": [CLIP, AUGREG]}],
        "settings": [
            {
                "when": {"preprocessing.crop_pct": ">= 1", "backbone": CLIP},
                "set": {"preprocessing": {"crop_mode": "squash"}},
            }
        ],
    }
    grid = parse_grid(content)
    found = [(c.backbone, c.preprocessing["crop_pct"], c.preprocessing["crop_mode"]) for c in grid.cells]
    assert sorted(found) == sorted(
        [(CLIP, 0.9, "center"), (AUGREG, 0.9, "center"), (CLIP, 1.0, "squash"), (AUGREG, 1.0, "center")]
    )
    (squashed,) = (c for c in grid.cells if c.preprocessing["crop_mode"] == "squash")
    assert "crop_pct=1.0 crop_mode=squash" in squashed.label() and "crop" not in config(backbone=CLIP).label()
    described = make_plan(grid, Store(tmp_path), None).describe(None).splitlines()
    lines = [line for line in described if line.startswith("preprocessing")]
    assert len(lines) == 4
    assert lines[0] == (
        f"preprocessing of {CLIP}: mean 0.481455 0.457827 0.408211, std 0.26863 0.261303 0.275777, bicubic, center crop 0.9 (1 cell)"
    )
    embedded = parse_grid({"grid": [{"method": "simplecil"}]})
    assert "preprocessing" not in make_plan(embedded, Store(tmp_path), None).describe(None)


def test_a_stored_result_keeps_it_and_a_table_shows_it_where_it_differs(tmp_path: Path) -> None:
    store = Store(tmp_path)
    own, other = config(backbone=AUGREG).preprocessing, config(backbone=CLIP).preprocessing
    cells = [finished(80, transform="timm", preprocessing=own), simplecil(transform="timm", preprocessing=own)]
    for one in (*cells, finished(70, backbone="other", transform="timm", preprocessing=other), finished(60, tasks=2)):
        store.write(tables(one))
    rows = store.load("trials").to_pylist()
    kept = {json.dumps(json.loads(row["preprocessing"])) if row["preprocessing"] else None for row in rows}
    assert kept == {json.dumps(dict(sorted(own.items()))), json.dumps(dict(sorted(other.items()))), None}
    for row in rows:
        assert TrialConfig(**json.loads(row["config"])).cell_id == row["cell_id"]
    assert all("preprocessing" not in row.shown for row in summary(store.load("trials"))), "it follows the backbone"
    store.write(tables(finished(75, transform="timm", preprocessing={**own, "crop_pct": 1.0})))
    shown = {row.avg.mean: row.shown["preprocessing"] for row in summary(store.load("trials")) if row.avg}
    assert "crop_pct=0.9" in shown[75.0] and "crop_pct=1 " in shown[70.0] and "mean=[0.5, 0.5, 0.5]" in shown[70.0]
    compared = {row.avg.mean: row.vs_simplecil for row in summary(store.load("trials")) if row.avg}
    assert compared[75.0] == 10.0 and compared[70.0] is None, "SimpleCIL on other images is no measure"


# What reaches the network


def test_a_cell_gets_its_own_preprocessing(few_images: str, tiny_vit: dict[str, Any]) -> None:
    from zeroflow.data import load_dataset

    made = {"mean": [0.2] * 3, "std": [0.1, 0.2, 0.4], "crop_pct": 1.0}
    wanted = config(dataset=few_images, tasks=2, **tiny_vit, preprocessing=made)
    dataset = load_dataset(few_images)
    (images, _), *_ = scenario_of(wanted, dataset, 40).tasks[0].test.plain_batches()
    own = dataset.test.images(scenario_of(wanted, dataset, 40).tasks[0].test.indices)
    expected = (own / 255 - 0.2) / torch.tensor([0.1, 0.2, 0.4])[:, None, None]
    torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-5)


def test_cached_features_of_two_preprocessings_are_not_mixed(
    few_images: str, tiny_vit: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    given: list[dict[str, Any]] = [
        {"crop_pct": 1.0},
        {"crop_pct": 0.5},
        {"mean": [0.0] * 3},
        {"std": [0.1] * 3},
        # Of square images that makes the same as the first: the same features, and yet kept apart.
        {"crop_pct": 1.0, "crop_mode": "squash"},
    ]
    shared = {"dataset": few_images, "tasks": 2, **tiny_vit, "image_size": 42}
    cells = [config(**shared, preprocessing=one) for one in given]
    for number, one in enumerate(cells):
        run_trial(one, Placement(device="cpu"))
        folders = [path for path in (tmp_path / "zeroflow" / "features").iterdir() if path.is_dir()]
        assert len(folders) == number + 1
    for one in cells:
        cached, fresh = (run_trial(one, Placement(device="cpu", cache_bytes=room)) for room in (10**9, 0))
        assert np.array_equal(cached.accuracy_matrix, fresh.accuracy_matrix, equal_nan=True)
