"""Tunings of few values: each starts as the backbone it tunes, and is what it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from zeroflow import ConfigError, Placement, TrialConfig, run_trial
from zeroflow.methods import methods
from zeroflow.models.access import open_backbone
from zeroflow.models.backbone import Backbone
from zeroflow.models.factory import build_timm
from zeroflow.models.timm_backbone import TransformerBackbone
from zeroflow.models.tuning import BlockShift, InputFilter, NormAffine, Subspace, Tuning, create_tuning, tunings
from zeroflow.optim import gradient_ban

pytestmark = pytest.mark.usefixtures("some_drawings", "tiny_vit")
TINY = {"name": "zeroflow_tiny_vit", "checkpoint": "none", "image_size": 14}
SETTINGS = {
    "bottleneck": 4, "scale": 1.0, "dropout": 0.0, "tokens": 3, "border": 2, "rank": 2, "size": 5, "shared": True,
}  # fmt: skip
SMALL = {
    "dataset": "some-drawings", "image_size": 14, "tasks": 10, "stop_after": 2, "epochs": 2, "batch_size": 10,
    "backbone": "zeroflow_tiny_vit", "checkpoint": "none", "optimizer": "zo-sgd", "lr": 0.05, "loss": "class-means",
}  # fmt: skip
STILL = sorted(set(tunings.names()) - {"none", "ssf", "input-prompt", "vpt-shallow", "vpt-deep"})
"""Those that change nothing at first: SSF starts at random, and a prompt of zeros is a token."""
NEW = ["input-filter", "block-shift", "norm-affine"]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return open_backbone(None, **TINY).double()


def made(name: str, backbone: Backbone, seed: int = 0, **settings: Any) -> Tuning:
    tuning = create_tuning(name, backbone, torch.Generator().manual_seed(seed), {**SETTINGS, **settings})
    return tuning.to(backbone.like)


def pictures(count: int = 4, size: int = 14) -> Tensor:
    """Random images, normalised as photos are, float64."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def features(tuning: Tuning, backbone: Backbone, images: Tensor) -> Tensor:
    return tuning(backbone, tuning.prefix(backbone, images))


@torch.no_grad()
def moved(tuning: Tuning, by: float = 0.1) -> Tuning:
    generator = torch.Generator().manual_seed(2)
    for value in tuning.parameters():
        if value.requires_grad:
            value += by * torch.randn(value.shape, generator=generator, dtype=torch.float64)
    return tuning


@pytest.mark.parametrize("subspace", [0, 7])
@pytest.mark.parametrize("name", STILL)
@pytest.mark.parametrize("access", ["white-box", "spiking"])
def test_a_fresh_tuning_gives_the_frozen_features_and_a_moved_one_others(access: str, name: str, subspace: int) -> None:
    backbone = open_backbone(access, **TINY).double()
    images = pictures()
    backbone.calibrate([images])
    tuning = made(name, backbone, subspace=subspace)
    with torch.no_grad():
        torch.testing.assert_close(features(tuning, backbone, images), backbone(images), rtol=1e-10, atol=1e-12)
        assert not torch.allclose(features(moved(tuning), backbone, images), backbone(images), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("subspace", [0, 5])
@pytest.mark.parametrize("name", NEW)
def test_derivatives_are_what_differences_show(name: str, subspace: int, backbone: Backbone) -> None:
    tuning, images, eps = moved(made(name, backbone, subspace=subspace), 0.02), pictures(), 1e-6
    values = {key: value for key, value in tuning.named_parameters() if value.requires_grad}
    generator = torch.Generator().manual_seed(3)
    direction = {
        key: torch.randn(value.shape, generator=generator, dtype=torch.float64) for key, value in values.items()
    }
    readout = torch.randn(backbone.width, generator=generator, dtype=torch.float64)

    def loss() -> Tensor:
        return (features(tuning, backbone, images) @ readout).square().mean()

    def at(step: float) -> float:
        with torch.no_grad():
            for key, value in values.items():
                value += step * direction[key]
            found = float(loss())
            for key, value in values.items():
                value -= step * direction[key]
        return found

    slope = (at(eps) - at(-eps)) / (2 * eps)
    gradients = torch.autograd.grad(loss(), list(values.values()))
    backward = sum(float((g * direction[key]).sum()) for key, g in zip(values, gradients, strict=True))
    np.testing.assert_allclose(backward, slope, rtol=1e-5)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        for key, value in values.items():
            value.copy_(forward_ad.make_dual(value.detach().clone(), direction[key]))
        forward = forward_ad.unpack_dual(loss()).tangent
    np.testing.assert_allclose(float(forward), slope, rtol=1e-5)


# The filter


def filtered(images: np.ndarray, tuning: InputFilter) -> np.ndarray:
    """With SciPy: the kernel spelled out pixel by pixel, edges repeated, and what leaves an image's range shrunk to a tenth.

    A weight is shared by all pixels at its distance.
    """
    rings, gain, offset = (value.detach().numpy() for value in (tuning.rings, tuning.gain, tuning.offset))
    size = 2 * tuning.margin + 1
    middle = size // 2
    everywhere = [(y - middle) ** 2 + (x - middle) ** 2 for y in range(size) for x in range(size)]
    distances, pixels = np.unique(everywhere, return_counts=True)
    weights, distances = rings / pixels, distances.tolist()
    found = np.empty_like(images)
    for n in range(len(images)):
        for c in range(images.shape[1]):
            own = c if len(gain) > 1 else 0
            kernel = np.array(
                [
                    [weights[own, distances.index((y - middle) ** 2 + (x - middle) ** 2)] for x in range(size)]
                    for y in range(size)
                ]
            )
            image = images[n, c]
            values = gain[own] * ndimage.correlate(image, kernel, mode="nearest") + offset[own]
            low, high = image.min(), image.max()
            values = np.where(values > high, high + 0.1 * (values - high), values)
            found[n, c] = np.where(values < low, low + 0.1 * (values - low), values)
    return found


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("size", "rings"), [(1, 1), (3, 3), (5, 6), (7, 10)])
def test_a_filter_is_one_number_for_each_distance(size: int, rings: int, shared: bool, backbone: Backbone) -> None:
    tuning = moved(made("input-filter", backbone, size=size, shared=shared), 0.3)
    assert isinstance(tuning, InputFilter)
    assert sum(value.numel() for value in tuning.parameters()) == (rings + 2) * (1 if shared else 3)
    images = pictures()
    with torch.no_grad():
        np.testing.assert_allclose(
            tuning.filtered(images).numpy(), filtered(images.numpy(), tuning), rtol=1e-10, atol=1e-12
        )


def test_a_filter_does_the_same_in_all_directions(backbone: Backbone) -> None:
    tuning, images = moved(made("input-filter", backbone), 0.3), pictures()
    assert isinstance(tuning, InputFilter)
    with torch.no_grad():
        plain = tuning.filtered(images)
        for turned in (lambda x: x.rot90(1, (2, 3)), lambda x: x.flip(3), lambda x: x.transpose(2, 3)):
            torch.testing.assert_close(tuning.filtered(turned(images)), turned(plain))


def test_a_fresh_filter_gives_images_back_bit_by_bit() -> None:
    tuning = InputFilter(3, 5)
    for images in (pictures().float(), torch.zeros(2, 3, 8, 8), torch.rand(2, 3, 3, 3)):
        assert torch.equal(tuning.filtered(images), images)


def test_paper_stays_paper_up_to_the_edge(backbone: Backbone) -> None:
    tuning = made("input-filter", backbone)
    assert isinstance(tuning, InputFilter)
    with torch.no_grad():
        tuning.rings[0] = torch.tensor([0.4, 0.1, 0.02, 0.01, 0.005, 0.02])
        for paper in (0.0, 0.7):
            found = tuning.filtered(torch.full((1, 3, 9, 9), paper, dtype=torch.float64))
            torch.testing.assert_close(found, torch.full_like(found, float(found[0, 0, 4, 4])))


# The others


@pytest.mark.slow
def test_a_vision_transformer_has_as_many_trained_values_as_its_blocks_and_norms_say() -> None:
    with torch.device("meta"):
        vit = TransformerBackbone(build_timm("vit_base_patch16_224", {"depth": 12}))
    counts = {
        name: sum(
            p.numel() for p in tunings.get(name).of(vit, torch.Generator(), SETTINGS).parameters() if p.requires_grad
        )
        for name in NEW
    }
    assert counts == {"input-filter": 8, "block-shift": 12 * 768, "norm-affine": 25 * 2 * 768}


def test_shifts_are_added_behind_blocks(backbone: Backbone) -> None:
    tuning, images = moved(made("block-shift", backbone)), pictures()
    assert isinstance(tuning, BlockShift)
    with torch.no_grad():
        tokens = backbone.tokens(images)
        for block, shift in zip(backbone.model.blocks, tuning.shifts, strict=True):
            tokens = block(tokens) + shift
        expected = backbone.model.norm(tokens)[:, 0]
        torch.testing.assert_close(features(tuning, backbone, images), expected)


def test_norms_are_tuned_and_everything_else_is_the_backbones_own(backbone: Backbone) -> None:
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    tuning = moved(made("norm-affine", backbone))
    assert isinstance(tuning, NormAffine)
    for name, value in tuning.tuned.named_parameters():
        own = backbone.get_parameter(name)
        assert ("norm" in name) == value.requires_grad == (value.data_ptr() != own.data_ptr()), name
    other = open_backbone(None, **TINY).double()
    other.load_state_dict(tuning.tuned.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(features(tuning, backbone, pictures()), other(pictures()))
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


# Subspaces


@pytest.mark.parametrize("dimensions", [1, 6, 100])
def test_values_move_in_a_subspace_alone(dimensions: int, backbone: Backbone) -> None:
    plain, tuning = made("adapter", backbone), made("adapter", backbone, subspace=dimensions)
    assert isinstance(tuning, Subspace)
    start = torch.cat([value.detach().flatten() for value in plain.parameters()])

    @torch.no_grad()
    def displaced(z: Tensor) -> Tensor:
        tuning.z.copy_(z)
        return torch.cat([value.flatten() for value in tuning.moved().values()]) - start

    generator = torch.Generator().manual_seed(0)
    assert not displaced(torch.zeros(dimensions)).any(), "it starts where the tuning starts"
    columns = torch.stack([displaced(row) for row in torch.eye(dimensions)], dim=1)
    torch.testing.assert_close(columns.T @ columns, torch.eye(dimensions).double())
    assert ((columns != 0).sum(1) == 1).all(), "each value belongs to one coordinate"
    z = torch.randn(dimensions, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(displaced(z), columns @ z)
    assert 0.4 < float((columns.sum(1) > 0).double().mean()) < 0.6, "signs are drawn"


def test_a_subspace_goes_by_its_seed_and_is_in_no_state(backbone: Backbone) -> None:
    one, same, other = (made("adapter", backbone, seed=seed, subspace=9) for seed in (0, 0, 1))
    assert isinstance(one, Subspace) and isinstance(same, Subspace) and isinstance(other, Subspace)
    with torch.no_grad():
        for tuning in (one, same, other):
            tuning.z.copy_(torch.arange(9))
        assert torch.equal(one.projected(), same.projected()) and not torch.equal(one.projected(), other.projected())
    own = sum(value.numel() for value in made("adapter", backbone).state_dict().values())
    assert sum(value.numel() for value in one.state_dict().values()) == own + 9
    assert [name for name, value in one.named_parameters() if value.requires_grad] == ["z"]


def test_a_subspace_is_no_larger_than_what_it_is_of(backbone: Backbone) -> None:
    assert made("input-filter", backbone, subspace=8)
    with pytest.raises(ConfigError, match="subspace=9: expected at most 8, the values of InputFilter"):
        made("input-filter", backbone, subspace=9)


def test_no_graph_is_built_where_no_gradient_is_asked_for(backbone: Backbone) -> None:
    with gradient_ban():
        for name in STILL:
            tuning = made(name, backbone, subspace=3)
            with torch.no_grad():
                assert not features(tuning, backbone, pictures(2)).requires_grad


# Trials


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["zo-adam", "fo-sgd", "forward-grad"])
@pytest.mark.parametrize(
    ("method", "options", "trained"),
    [
        ("aper-input-filter", {}, 8),
        ("aper-input-filter", {"size": 3, "shared": False}, 15),
        ("aper-block-shift", {}, 2 * 32),
        ("aper-norm-affine", {}, 5 * 2 * 32),
        ("aper-adapter", {"subspace": 11}, 11),
        ("aper-ssf", {"subspace": 11}, 11),
        ("aper-vpt-deep", {"subspace": 11, "merge": False}, 11),
        ("shared-adapter", {"subspace": 11}, 11),
        *(("finetune", {"tune": name}, None) for name in NEW),
        ("l2-sp", {"tune": "block-shift", "subspace": 11}, 11),
        ("lwf", {"tune": "adapter", "subspace": 11}, 11),
    ],
)
def test_few_values_are_trained(method: str, options: dict[str, Any], trained: int | None, optimizer: str) -> None:
    config = TrialConfig.from_dict({**SMALL, "method": method, "method_options": options, "optimizer": optimizer})
    result = run_trial(config)
    losses = [step.loss for step in result.steps]
    assert np.isfinite(losses).all() and len(losses)
    assert trained is None or result.summary["trainable_parameters"] == trained
    still = run_trial(TrialConfig.from_dict({**config.canonical(), "lr": 1e-12}))
    assert [step.loss for step in still.steps][1:] != losses[1:], "something moves"


@pytest.mark.parametrize("access", ["black-box", "exported", "int8", "spiking"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("aper-input-filter", {}), ("finetune", {"tune": "input-filter"}), ("aper-block-shift", {}),
        ("aper-input-prompt", {"subspace": 5}), ("aper-adapter", {"subspace": 5, "dropout": 0.0}),
    ],
)  # fmt: skip
def test_few_values_can_be_trained_where_gradients_cannot_be_had(
    access: str, method: str, options: dict[str, Any]
) -> None:
    config = {**SMALL, "method": method, "method_options": options, "access": access}
    inside = {"black-box": {"aper-block-shift", "aper-adapter"}, "exported": {"aper-block-shift"}}.get(access, set())
    if method in inside:
        with pytest.raises(ConfigError, match=r"it trains '(block-shift|adapter)', and"):
            TrialConfig.from_dict(config)
        return
    asked = open_backbone(None, **TINY)
    result = run_trial(TrialConfig.from_dict(config), Placement(endpoint=lambda images: asked(images)))
    assert np.isfinite([step.loss for step in result.steps]).all() and len(result.steps)
    if access in ("black-box", "exported"):
        white = run_trial(TrialConfig.from_dict({**config, "access": None}))
        np.testing.assert_allclose([s.loss for s in result.steps], [s.loss for s in white.steps], rtol=1e-3, atol=1e-5)


def test_an_interrupted_trial_in_a_subspace_has_the_bits_of_another(tmp_path: Any) -> None:
    options = {"subspace": 5}
    config = TrialConfig.from_dict({**SMALL, "method": "aper-adapter", "method_options": options, "stop_after": 3})
    whole = run_trial(config)

    def interrupt(stage: int, accuracy: Any, samples: Any) -> None:
        if stage == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_trial(config, folder=tmp_path, on_stage=interrupt)
    np.testing.assert_array_equal(run_trial(config, folder=tmp_path).accuracy_matrix, whole.accuracy_matrix)


def test_class_means_may_be_those_of_adapted_features_alone() -> None:
    backbone = open_backbone(None, **TINY)
    images = pictures().float()
    found = {}
    for merge in (True, False):
        info = methods.get("aper-input-filter")
        method = info.build(backbone, info.options(merge=merge))
        method.begin_task(range(2), torch.Generator().manual_seed(0))
        with torch.no_grad():
            method.tuning.offset.fill_(0.2)
        method.freeze()
        method.end_task([(images, torch.tensor([0, 1, 0, 1]))])
        found[merge] = method.features(images, range(1))[:, 0]
        assert method.scores(found[merge][:, None]).shape == (4, 2)
    width = backbone.width
    torch.testing.assert_close(found[True][:, :width], backbone(images))
    torch.testing.assert_close(found[True][:, width:], found[False])
    assert not torch.allclose(found[False], found[True][:, :width])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "aper-input-filter", "method_options": {"size": 4}}, "size=4: expected an odd number >= 1"),
        ({"method": "finetune", "method_options": {"tune": "input-filter", "size": -1}}, "size=-1: expected an odd"),
        ({"method": "aper-adapter", "method_options": {"subspace": -1}}, "subspace=-1: expected an integer >= 0"),
        ({"method": "finetune", "method_options": {"tune": "none", "subspace": 5}}, "tune='none' has no values"),
        ({"method": "finetune", "method_options": {"tune": "input-filtre"}}, "did you mean 'input-filter'"),
        ({"method": "ease", "method_options": {"subspace": 5}}, "unknown option of method 'ease'"),
        *(
            ({"method": method, "method_options": {"subspace": 5}, "optimizer": optimizer, "loss": None}, message)
            for method in ("aper-adapter", "shared-adapter", "finetune")
            for optimizer, message in (
                ("zo-per-example", "every example of a mini-batch on its own, which coordinates"),
                ("fo-sgd-checkpoint", "computes layers again on the way back"),
            )
        ),
        (
            {"method": "aper-norm-affine", "access": "int8"},
            "it trains 'norm-affine', and int8 weights cannot be trained",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrialConfig.from_dict({**SMALL, **values})
