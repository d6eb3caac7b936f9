"""What has no useful derivative: the 0-1 error and a spiking backbone. First order stands still, forward passes learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from zeroflow import ConfigError, TrialConfig, run_trial
from zeroflow.data import load_dataset
from zeroflow.methods import Method, MiniBatch, methods
from zeroflow.models import spiking as spiking_module
from zeroflow.models.access import open_backbone
from zeroflow.models.criteria import criteria, error_rate
from zeroflow.models.spiking import STEPS, SpikingBackbone, firing_rate
from zeroflow.models.tuning import tunings
from zeroflow.optim import create_optimizer
from zeroflow.trial.meters import peak_memory

pytestmark = pytest.mark.usefixtures("some_drawings", "tiny_vit")
TINY = {"name": "zeroflow_tiny_vit", "checkpoint": "none", "image_size": 14}


def drawings() -> MiniBatch:
    """The first training drawings of four classes, twelve of each, 14 x 14."""
    samples = load_dataset("some-drawings").train
    chosen = np.flatnonzero(samples.labels < 4)
    images = torch.nn.functional.interpolate(samples.images(chosen).float() / 255, size=14)
    return MiniBatch(images.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(samples.labels[chosen]))


def spiking() -> SpikingBackbone:
    backbone = open_backbone("spiking", **TINY)
    assert isinstance(backbone, SpikingBackbone)
    backbone.calibrate([drawings().images])
    return backbone


def begun(name: str, backbone: Any, **options: Any) -> Method:
    info = methods.get(name)
    known = {key: value for key, value in options.items() if hasattr(info.options(), key)}
    method = info.build(backbone, info.options(**known))
    method.begin_task(range(4), torch.Generator().manual_seed(0))
    return method.train()


def test_the_error_rate_is_the_share_of_wrong_answers() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = (
        torch.randn(500, 7, generator=generator),
        torch.randint(7, (500,), generator=generator),
    )
    assert torch.equal(error_rate(logits, labels), (logits.argmax(1) != labels).float())
    assert error_rate(torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([0])).tolist() == [0.5], "a tie"
    assert error_rate(torch.tensor([[3.0]]), torch.tensor([0])).tolist() == [0.0], "a single class"


def test_firing_rates_are_those_of_neurons_simulated_in_time() -> None:
    highest = torch.tensor([1.0, 0.5, 2.0])
    current = torch.linspace(-3, 3, 601)[:, None].repeat(1, 3).double() + 1e-4
    spikes = torch.zeros_like(current)
    for sign in (1, -1):
        charge = torch.zeros_like(current) + highest.double() / 2
        for _ in range(STEPS):
            charge += (sign * current).clamp(min=0)
            fires = charge >= highest
            charge -= fires * highest
            spikes += sign * fires
    torch.testing.assert_close(firing_rate(current, highest.double()), spikes * highest / STEPS, rtol=0, atol=1e-12)


def test_a_converted_backbone_answers_nearly_as_before() -> None:
    samples = load_dataset("some-drawings").train
    images = (samples.images(np.arange(0, 240, 15)).float() / 255).expand(-1, 3, -1, -1)
    plain, converted = open_backbone(None, "quickdraw_vit"), open_backbone("spiking", "quickdraw_vit")
    with pytest.raises(RuntimeError, match="calibrate"):
        converted(images)
    converted.calibrate([images])
    with torch.no_grad():
        found = converted(images)
        similar = torch.nn.functional.cosine_similarity(plain(images), found)
    assert float(similar.min()) > 0.9 and float(similar.max()) < 0.99999
    values = found / (converted.highest[-1] / STEPS)
    torch.testing.assert_close(values, values.round(), rtol=0, atol=1e-3)
    assert float(values.abs().max()) <= STEPS + 1e-3


@pytest.mark.parametrize(("count", "every"), [(20, 1), (32, 1), (33, 2), (100, 4)])
def test_calibration_takes_the_wanted_share_of_images_spread_over_all(
    count: int, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"IMAGES": 32, "BATCH": 8, "SHARE": 0.9}.items():
        monkeypatch.setattr(spiking_module, name, value)
    images = torch.rand(count, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    plain, seen = open_backbone(None, **TINY), {}
    monkeypatch.setattr(plain, "emitted", lambda number, values: seen.setdefault(number, []).append(values) or values)
    with torch.no_grad():
        for part in images[::every].split(8):
            plain(part)
    wanted = []
    for parts in seen.values():
        sizes = torch.cat([part.reshape(-1, 32) for part in parts]).abs()
        wanted.append(sizes.kthvalue(round(0.9 * len(sizes)), dim=0).values)
    for batch in (1, 7, count):
        converted = open_backbone("spiking", **TINY)
        converted.calibrate(images.split(batch))
        assert torch.equal(converted.highest, torch.stack(wanted)), f"batches of {batch}"


def test_the_memory_of_calibration_does_not_grow_with_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = open_backbone("spiking", **TINY)

    def peak(batches: int) -> int:
        def calibrate() -> None:
            backbone.calibrate(torch.rand(64, 3, 14, 14) for _ in range(batches))

        return peak_memory(calibrate, backbone, torch.device("cpu"))[1]

    monkeypatch.setattr(spiking_module, "IMAGES", 256)
    assert peak(32) < 1.1 * peak(4)
    few, most = 64 * 4, 64 * 16
    monkeypatch.setattr(spiking_module, "IMAGES", most)
    a_value = 4 * backbone.width * (2 * 5 + 1)  # of an image: two blocks of 5 tokens, the features
    an_image = 4 * 3 * 14 * 14
    assert peak(16) - peak(4) < (most - few) * (an_image + a_value / 10), "most of what a channel did is not kept"


TUNED = [name for name in tunings.names() if name != "none"]


@pytest.mark.parametrize("tune", TUNED)
def test_the_gradient_through_spikes_is_exactly_zero(tune: str) -> None:
    batch = drawings()
    method = begun("finetune", spiking(), tune=tune, dropout=0.0, bottleneck=4)
    with torch.no_grad():
        for value in method.tuning.parameters():
            value += 0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    trained = {name: p for name, p in method.trainable().items() if name.startswith("tuning.")}
    found = torch.autograd.grad(method.loss(method.prepare(batch)), list(trained.values()))
    assert len(found) and all(not gradient.any() for gradient in found)
    plain = begun("finetune", open_backbone(None, **TINY), tune=tune, dropout=0.0, bottleneck=4)
    plain.tuning.load_state_dict(method.tuning.state_dict(), strict=False)
    values = [p for name, p in plain.trainable().items() if name.startswith("tuning.")]
    assert any(gradient.any() for gradient in torch.autograd.grad(plain.loss(plain.prepare(batch)), values))


@pytest.mark.parametrize(
    "name", ["finetune", "replay", "lwf", "generative-replay", "ease", "aper-adapter", "shared-adapter"]
)
def test_the_gradient_of_the_error_rate_is_exactly_zero(name: str) -> None:
    method = begun(name, open_backbone(None, **TINY), dropout=0.0, bottleneck=4)
    method.criterion = criteria["error-rate"]
    values = method.trainable()
    found = torch.autograd.grad(method.loss(method.prepare(drawings())), list(values.values()), allow_unused=True)
    assert found[-1] is not None and all(not part.any() for part in found if part is not None)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["fo-sgd", "fo-adam", "zo-sgd", "zo-fzoo"])
@pytest.mark.parametrize("what", ["error-rate", "spiking"])
def test_forward_passes_learn_where_first_order_stands_still(what: str, rule: str) -> None:
    batch = drawings()
    if what == "error-rate":
        method = begun("finetune", open_backbone(None, **TINY), tune="none", imprint=False)
        method.criterion = criteria["error-rate"]
        steps, wanted, rates = 150, 0.05, {"zo-sgd": 0.3, "zo-fzoo": 0.03}
    else:  # what stands behind the last spike has a slope: hold it still
        method = begun("finetune", spiking(), tune="vpt-shallow", tokens=2, imprint=False)
        method.head.requires_grad_(False)
        batch = MiniBatch(batch.images[::4], batch.labels[::4])
        steps, wanted, rates = 30, 0.1, {"zo-sgd": 1.0, "zo-fzoo": 0.1}
    values = method.trainable()
    before = {name: value.detach().clone() for name, value in values.items()}
    optimizer = create_optimizer(rule, list(values.items()), queries=8, lr=rates.get(rule, 1.0), eps=0.1)
    inputs = method.prepare(batch)
    losses = [float(optimizer.step(lambda: method.loss(inputs))) for _ in range(steps)]
    moved = any(not torch.equal(value, before[name]) for name, value in values.items())
    if rule.startswith("fo-"):
        assert not moved and losses[0] == losses[-1]
    else:
        assert moved and np.mean(losses[:5]) - np.mean(losses[-5:]) > wanted, losses


@pytest.mark.slow
def test_cells_of_both_kinds_run_and_say_what_they_are() -> None:
    small = {
        "backbone": "zeroflow_tiny_vit",
        "checkpoint": "none",
        "image_size": 14,
        "dataset": "some-drawings",
        "tasks": 10,
        "stop_after": 2,
        "epochs": 1,
        "batch_size": 24,
        "method": "finetune",
        "method_options": {"dropout": 0.0},
    }
    make = TrialConfig.from_dict
    usual = make({**small, "optimizer": "zo-sgd"})
    assert usual == make({**small, "optimizer": "zo-sgd", "access": "white-box", "loss": "cross-entropy"})
    assert {"access", "loss"}.isdisjoint(usual.canonical())
    found = {
        (access, loss, rule): run_trial(make({**small, "access": access, "loss": loss, "optimizer": rule, "lr": 0.01}))
        for access, loss in (("spiking", None), (None, "error-rate"))
        for rule in ("zo-sgd", "fo-sgd")
    }
    assert len({result.cell_id for result in found.values()} | {usual.cell_id}) == 5
    exact = found[None, "error-rate", "fo-sgd"]
    untrained = run_trial(make({**small, "optimizer": "fo-sgd", "lr": 1e-30}))
    np.testing.assert_array_equal(exact.accuracy_matrix, untrained.accuracy_matrix)
    halves = [24 * 2 * step.loss for step in exact.steps if step.task == 0]
    np.testing.assert_allclose(
        halves, np.round(halves), atol=1e-4, err_msg="a share of wrong answers, ties counting a half"
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"access": "whitebox"}, "unknown access 'whitebox'; did you mean 'white-box'"),
        ({"access": "spikes"}, "did you mean 'spiking'"),
        ({"access": 3}, "access=3: expected a string"),
        ({"loss": "error"}, "unknown loss 'error'; did you mean 'error-rate'"),
    ],
)
def test_unknown_names_are_told_with_the_nearest(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrialConfig.from_dict(values)


def test_a_method_with_a_loss_of_its_own_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods.get("ease").build, "any_loss", False)
    with pytest.raises(ConfigError, match="method 'ease' has a loss of its own"):
        TrialConfig.from_dict({"loss": "error-rate"})
