"""Losses that need no head: what they are, how their mini-batches are drawn, and where they are refused."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch.autograd import forward_ad

from zeroflow import ConfigError, TrialConfig, TrialResult, run_trial
from zeroflow.grid.placement import parse_placement
from zeroflow.methods import methods
from zeroflow.models.criteria import class_means, criteria, ridge
from zeroflow.optim import LocalExecutor
from zeroflow.trial.randomness import balanced_order

pytestmark = pytest.mark.usefixtures("some_drawings", "tiny_vit")
SMALL = {
    "dataset": "some-drawings", "image_size": 14, "tasks": 10, "stop_after": 2, "epochs": 2, "batch_size": 10,
    "backbone": "zeroflow_tiny_vit", "checkpoint": "none", "optimizer": "zo-sgd", "lr": 0.05, "loss": "class-means",
}  # fmt: skip
HEADLESS = ["class-means", "ridge"]
ABLE = ["adapter-per-task", "ease", "finetune", "l2-sp", "lwf", "shared-adapter"]


def features(labels: list[int], width: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of examples with these labels, float64 ``[N, width]``, and the labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(max(labels) + 1, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(labels), width, generator=generator, dtype=torch.float64)
    return centres[labels] + noise, torch.tensor(labels)


def leave_one_out(x: np.ndarray, y: list[int]) -> np.ndarray:
    """Naively: for each example the cosines to the means of all other examples of each class; NaN where its own has none."""
    found = []
    for i, label in enumerate(y):
        cosines = {}
        for c in sorted(set(y)):
            others = [x[j] for j in range(len(y)) if y[j] == c and j != i]
            if others:
                mean = np.mean(others, axis=0)
                cosines[c] = x[i] @ mean / np.linalg.norm(x[i]) / np.linalg.norm(mean)
        logits = {c: 16 * cosine for c, cosine in cosines.items()}
        found.append(np.log(sum(map(np.exp, logits.values()))) - logits[label] if label in logits else np.nan)
    return np.array(found)


def fitted_halves(x: np.ndarray, y: list[int]) -> np.ndarray:
    """With scikit-learn: every second example of a class against a fit on the others, and back; NaN where a class is in one."""
    seen: Counter[int] = Counter()
    half = np.empty(len(y), dtype=int)
    for i, label in enumerate(y):
        half[i], seen[label] = seen[label] % 2, seen[label] + 1
    targets = np.eye(max(y) + 1)[y]
    found = np.full(len(y), np.nan)
    for asked in (0, 1):
        fit = half != asked
        penalty = np.mean(np.sum((x[fit] - x[fit].mean(0)) ** 2, axis=1))
        model = Ridge(alpha=penalty).fit(x[fit], targets[fit])
        for i in np.flatnonzero(~fit):
            if y[i] in {y[j] for j in np.flatnonzero(fit)}:
                found[i] = np.sum((model.predict(x[i : i + 1])[0] - targets[i]) ** 2)
    return found


@pytest.mark.parametrize(("loss", "naive"), [(class_means, leave_one_out), (ridge, fitted_halves)])
@pytest.mark.parametrize("labels", [[0, 1, 2] * 4, [7, 3, 3, 7, 3, 7, 7, 3], [0, 1, 1, 2, 0, 1, 4, 1, 1, 0]])
def test_a_loss_is_that_of_a_naive_computation(loss: Any, naive: Any, labels: list[int]) -> None:
    x, y = features(labels)
    expected = naive(x.numpy(), labels)
    kept = np.isfinite(expected)
    np.testing.assert_allclose(loss(x, y).numpy()[kept] * kept.mean(), expected[kept], rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(float(loss(x, y).mean()), np.nanmean(expected), rtol=1e-8)
    assert not loss(x, y).numpy()[~kept].any(), "what no other example can judge counts nothing"


@pytest.mark.parametrize("loss", HEADLESS)
def test_the_order_of_examples_and_the_names_and_scale_of_classes_mean_nothing(loss: str) -> None:
    x, y = features([0, 1, 2] * 6)
    plain, criterion = criteria[loss](x, y), criteria[loss]
    torch.testing.assert_close(criterion(3 * x, 5 + 2 * y), plain)
    if loss == "class-means":  # which half an example is in goes by the order
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(criterion(x[order], y[order]), plain[order])


@pytest.mark.parametrize("loss", HEADLESS)
@pytest.mark.parametrize("labels", [[0, 1, 2] * 4, [0, 1, 1, 2, 0, 1, 4, 1]])
def test_a_loss_has_the_derivative_that_differences_show(loss: str, labels: list[int]) -> None:
    x, y = features(labels)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda values: criteria[loss](values, y), [x], check_forward_ad=True)


@pytest.mark.parametrize("loss", HEADLESS)
@pytest.mark.parametrize("labels", [[0], [0, 1, 2], [2, 2, 2]])
def test_a_mini_batch_without_two_of_two_classes_teaches_nothing(loss: str, labels: list[int]) -> None:
    x, y = features(labels)
    x.requires_grad_()
    mean = criteria[loss](x, y).mean()
    (gradient,) = torch.autograd.grad(mean, x)
    assert float(mean.detach()) == 0 and not gradient.any()
    with torch.no_grad(), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(
            criteria[loss](forward_ad.make_dual(x.detach(), torch.ones_like(x)), y)
        ).tangent
    assert tangent is None or not tangent.any()


@pytest.mark.parametrize("loss", HEADLESS)
def test_equal_features_and_features_of_zero_have_finite_losses(loss: str) -> None:
    y = torch.tensor([0, 1] * 4)
    for x in (torch.ones(8, 3), torch.zeros(8, 3)):
        x.requires_grad_()
        losses = criteria[loss](x, y)
        (gradient,) = torch.autograd.grad(losses.sum(), x)
        assert losses.isfinite().all() and gradient.isfinite().all()


# Mini-batches


@pytest.mark.parametrize(("classes", "each", "batch"), [(10, 8, 16), (10, 8, 13), (3, 20, 7), (7, 5, 35), (5, 4, 3)])
def test_every_sample_comes_once_and_no_class_more_than_once_more_than_another(
    classes: int, each: int, batch: int
) -> None:
    labels = np.repeat(np.arange(classes), each)
    order = balanced_order(3, 1, 2, labels)
    assert sorted(order.tolist()) == list(range(len(labels)))
    for first in range(0, len(order), batch):
        counts = np.bincount(labels[order[first : first + batch]], minlength=classes)
        assert counts.max() - counts.min() <= 1


def test_classes_of_other_sizes_have_their_share_of_every_mini_batch() -> None:
    sizes = np.array([40, 20, 10, 3])
    labels = np.repeat([5, 2, 9, 4], sizes)
    order = balanced_order(0, 0, 0, labels)
    assert sorted(order.tolist()) == list(range(73))
    for first in range(0, 73, 12):
        own = labels[order[first : first + 12]]
        share = len(own) * sizes / 73
        assert (np.abs(np.array([np.sum(own == label) for label in (5, 2, 9, 4)]) - share) <= 1).all()


def test_an_order_is_that_of_its_seed_task_and_epoch() -> None:
    labels = np.tile(np.arange(5), 12)
    orders = [balanced_order(*words, labels).tolist() for words in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert orders[0] == balanced_order(0, 0, 0, labels).tolist()
    assert len({tuple(order) for order in orders}) == 4
    firsts = [labels[balanced_order(0, 0, epoch, labels)][:5].tolist() for epoch in range(20)]
    assert len({tuple(first) for first in firsts}) > 10, "classes take turns in another order in each epoch"


def test_steps_see_balanced_mini_batches_where_the_loss_compares_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[Counter[int]]] = {}
    build = methods.get("finetune").build
    original = build.prepare

    def prepare(self: Any, batch: Any) -> Any:
        seen[loss].append(Counter(batch.labels.tolist()))
        return original(self, batch)

    monkeypatch.setattr(build, "prepare", prepare)
    for loss in ("cross-entropy", "class-means"):
        seen[loss] = []
        run_trial(TrialConfig.from_dict({**SMALL, "method": "finetune", "loss": loss, "batch_size": 8}))
    assert {tuple(sorted(counts.values())) for counts in seen["class-means"]} == {(4, 4)}
    assert {tuple(sorted(counts.values())) for counts in seen["cross-entropy"]} != {(4, 4)}


# Trials


@functools.cache
def with_a_head(method: str, optimizer: str) -> TrialResult:
    config = {**SMALL, "method": method, "optimizer": optimizer, "method_options": {"bottleneck": 2}}
    return run_trial(TrialConfig.from_dict({**config, "loss": None}))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["zo-sgd", "fo-sgd", "forward-grad"])
@pytest.mark.parametrize("loss", HEADLESS)
@pytest.mark.parametrize("method", [*ABLE, "aper-adapter"])
def test_a_method_learns_without_a_head(method: str, loss: str, optimizer: str) -> None:
    config = {**SMALL, "method": method, "loss": loss, "optimizer": optimizer, "method_options": {"bottleneck": 2}}
    found, plain = run_trial(TrialConfig.from_dict(config)), with_a_head(method, optimizer)
    assert len(found.steps) and np.isfinite([step.loss for step in found.steps]).all()
    assert [step.loss for step in found.steps] != [step.loss for step in plain.steps]
    head = {"finetune": 32 * 4 + 1, "l2-sp": 32 * 4 + 1, "lwf": 32 * 4 + 1}.get(method, 32 * 2 + 1)
    difference = plain.summary["trainable_parameters"] - found.summary["trainable_parameters"]
    assert difference == head, "no value of a head is trained"


@pytest.mark.parametrize("loss", HEADLESS)
def test_first_order_makes_the_loss_smaller(loss: str) -> None:
    config = {**SMALL, "method": "aper-adapter", "loss": loss, "optimizer": "fo-adam", "lr": 1e-2, "epochs": 20}
    options = {"bottleneck": 4, "scale": 1.0, "dropout": 0.0}
    losses = [s.loss for s in run_trial(TrialConfig.from_dict({**config, "method_options": options})).steps]
    assert np.mean(losses[-6:]) < 0.8 * np.mean(losses[:6])


def test_an_untrained_head_holds_the_class_means_of_the_trained_features() -> None:
    config = {**SMALL, "method": "finetune", "optimizer": "fo-sgd", "lr": 0.5, "stop_after": 1}
    options = {"bottleneck": 4, "scale": 1.0, "dropout": 0.0}
    tuned = run_trial(TrialConfig.from_dict({**config, "method_options": options}))
    shared = run_trial(TrialConfig.from_dict({**config, "method": "shared-adapter", "method_options": options}))
    assert [s.loss for s in tuned.steps] == [s.loss for s in shared.steps]
    np.testing.assert_array_equal(tuned.accuracy_matrix, shared.accuracy_matrix)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "ewc"}, "its Fisher information is of single examples"),
        ({"method": "generative-replay"}, "its head is all that learns"),
        ({"method": "replay"}, "class means of old tasks would not follow"),
        ({"method": "ease", "batch_size": 3}, "batch_size=3: .* expected at least 4, two of each of 2 classes"),
        ({"method": "ease", "tasks": 20, "stop_after": None}, "expected tasks of at least two classes"),
        ({"method": "finetune", "probe_every": 2}, "probe_every=2: it looks at a head's loss"),
        ({"method": "joint"}, "class means of old tasks would not follow"),
        ({"method": "finetune", "method_options": {"tune": "none"}}, "there is nothing else to train"),
        ({"method": "aper-adapter", "optimizer": "zo-per-example"}, "'zo-per-example' moves every example"),
        ({"method": "ease", "loss": "class-mean"}, "did you mean 'class-means'"),
    ],
)
def test_what_needs_a_head_or_single_examples_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrialConfig.from_dict({**SMALL, **values})


def test_a_mini_batch_that_is_compared_is_not_cut() -> None:
    config = TrialConfig.from_dict({**SMALL, "method": "ease", "queries": 4})
    cut = parse_placement({"workers_per_trial": 2, "data_shards": 2}, "grid")
    with pytest.raises(ConfigError, match="data_shards=2: loss='class-means' compares the examples"):
        cut.of(config)
    executor = LocalExecutor()
    executor.shards = 2
    with pytest.raises(ConfigError, match="data_shards=2: loss='class-means' compares the examples"):
        run_trial(config, executor=executor)
    assert parse_placement({"workers_per_trial": 4}, "grid").of(config).workers_per_trial == 4
    assert cut.of(TrialConfig.from_dict({**SMALL, "method": "ease", "loss": None})).data_shards == 2


def test_the_error_of_left_out_examples_is_the_share_that_another_class_mean_is_nearer_to() -> None:
    x, y = features([0, 0, 1, 1, 1, 2, 2, 2, 2, 3], seed=4)
    wrong = []
    for i, label in enumerate(y.tolist()):
        means = {
            c: x[[j for j in range(len(y)) if y[j] == c and j != i]].mean(0) for c in range(4) if c != 3 or label != 3
        }
        cosines = {c: float(torch.cosine_similarity(x[i], mean, dim=0)) for c, mean in means.items()}
        wrong += [max(cosines, key=lambda c: cosines[c]) != label] if label != 3 else []  # alone in its class
    found = criteria["class-means-error"](x, y)
    assert 0 < sum(wrong) < len(wrong)
    assert float(found.mean()) == pytest.approx(sum(wrong) / len(wrong), abs=1e-12)
