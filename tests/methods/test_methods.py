"""Methods: each does what its paper says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cells import drawings
from torch.nn import functional as F

from zeroflow import ConfigError
from zeroflow.classifiers import classifiers
from zeroflow.methods import (
    EASE,
    EWC,
    L2SP,
    ExperienceReplay,
    FineTuning,
    GenerativeReplay,
    LwF,
    Method,
    MiniBatch,
    methods,
)
from zeroflow.methods.experience_replay import herding
from zeroflow.models.backbone import Backbone
from zeroflow.models.criteria import criteria
from zeroflow.models.factory import create_backbone

pytestmark = pytest.mark.usefixtures("some_drawings", "tiny_vit")
TINY = "zeroflow_tiny_vit"


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return create_backbone()


def tiny_backbone() -> Backbone:
    return create_backbone(TINY, checkpoint="none", image_size=28)


def trained_once(name: str, **options: object) -> Method:
    """A method at its second task, whose values have moved since the first."""
    info = methods.get(name)
    method = info.build(tiny_backbone(), info.options(**{"bottleneck": 4, "dropout": 0.0, **options}))
    generator = torch.Generator().manual_seed(0)
    batch = drawings(20)
    first = [(batch.images[batch.labels < 3], batch.labels[batch.labels < 3])]
    method.begin_task(range(3), generator, first)
    moved(method, generator)
    method.eval()
    method.freeze()
    method.end_task(first)
    method.begin_task(range(3, 5), generator, [(batch.images[batch.labels > 2], batch.labels[batch.labels > 2])])
    return method


@torch.no_grad()
def moved(method: Method, generator: torch.Generator, by: float = 0.05) -> None:
    for value in method.trainable().values():
        value += by * torch.randn(value.shape, generator=generator)


# Methods with one head


def test_replay_is_equation_two() -> None:
    method = trained_once("replay")
    new, old = drawings(4, first=1), drawings(4, first=2)
    both = new._replace(replayed=old.images, replayed_labels=old.labels)
    tasks, plain = 2, FineTuning.losses
    with torch.no_grad():
        expected = plain(method, method.prepare(new)) / tasks + (1 - 1 / tasks) * plain(method, method.prepare(old))
        torch.testing.assert_close(method.losses(method.prepare(both)), expected)
    positions, labels = method.replay(30, torch.Generator().manual_seed(0))
    assert labels is None and len(positions) == 30
    counts = torch.bincount(positions)
    assert counts.max() - counts[counts > 0].min() <= 1 and set(positions.tolist()) <= set(method.memory.tolist())


@pytest.mark.slow
def test_a_reservoir_keeps_every_sample_with_the_same_probability() -> None:
    kept, backbone = np.zeros(60), tiny_backbone()
    for seed in range(400):
        method = ExperienceReplay(backbone, ExperienceReplay.Options(buffer=12, tune="none"))
        for task in range(3):
            method.begin_task(range(2 * task, 2 * task + 2), torch.Generator().manual_seed(seed * 3 + task))
            method.end_task([(torch.zeros(20, 1), torch.zeros(20))])
        assert len(set(method.memory.tolist())) == 12
        kept[method.memory] += 1
    # 400 draws with chance 1/5: standard deviation 8.
    assert abs(kept - 80).max() < 36 and abs(kept.reshape(3, 20).mean(1) - 80).max() < 8


def test_herding_follows_the_class_mean_greedily() -> None:
    features = F.normalize(torch.randn(9, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64), dim=1)
    x, chosen = features.numpy(), []
    for k in range(1, 5):
        left = [i for i in range(9) if i not in chosen]
        chosen.append(min(left, key=lambda i: np.linalg.norm(x.mean(0) - (x[chosen].sum(0) + x[i]) / k)))
    assert herding(features, 4) == chosen
    assert sorted(herding(features, 20)) == list(range(9))


def test_herding_keeps_as_many_of_every_class_and_the_first_ones_of_old_classes() -> None:
    method = ExperienceReplay(tiny_backbone(), ExperienceReplay.Options(selection="herding", buffer=8, tune="none"))
    batch, memories = drawings(20), []
    for classes in (range(2), range(2, 4)):
        own = (batch.labels >= classes.start) & (batch.labels < classes.stop)
        part = [(batch.images[own], batch.labels[own])]
        method.begin_task(classes, torch.Generator().manual_seed(0), part)
        method.end_task(part)
        memories.append(method.memory.tolist())
    before, after = memories
    assert len(before) == len(after) == 8 and after[:4] == before[:2] + before[4:6]
    assert all(position >= 8 for position in after[4:])


def test_made_up_features_have_their_classs_mean_and_covariance() -> None:
    method = trained_once("generative-replay", shrinkage=1e-3)
    assert isinstance(method, GenerativeReplay)
    features = torch.randn(500, 32, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.linspace(0.1, 1, 32))
    method.means[1], method.factors[1] = features.mean(0), method._factor(features)
    drawn, labels = method.replay(6_000, torch.Generator().manual_seed(1))
    assert set(labels.tolist()) == {0, 1, 2}
    own = drawn[labels == 1]
    torch.testing.assert_close(own.mean(0), features.mean(0), rtol=0, atol=0.1)
    torch.testing.assert_close(torch.cov(own.T), torch.cov(features.T), rtol=0, atol=0.15)


@pytest.mark.parametrize("shrinkage", [1e-3, 1e-7])
def test_a_floor_below_rounding_does_not_end_a_run(shrinkage: float) -> None:
    """Fewer samples than features, so that only the floor keeps their covariance invertible."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(6, 32, generator=generator) + 10 * torch.randn(6, 1, generator=generator)
    backbone = tiny_backbone()
    factor = GenerativeReplay(backbone, GenerativeReplay.Options(shrinkage=shrinkage))._factor(features)
    covariance = torch.cov(features.double().T)
    expected = (1 - shrinkage) * covariance + shrinkage * covariance.diagonal().mean() * torch.eye(32)
    torch.testing.assert_close((factor @ factor.T).double(), expected, rtol=1e-4, atol=1e-3)
    assert factor.dtype == torch.float32


def test_the_features_of_generative_replay_stand_still_after_the_first_task() -> None:
    method = trained_once("generative-replay")
    assert set(method.trainable()) == {"head.weight", "head.sigma"}


def test_the_penalty_of_ewc_is_the_fisher_weighted_distance_from_the_last_task() -> None:
    method = trained_once("ewc", fisher="backpropagation", alpha=7.0)
    assert isinstance(method, EWC)
    anchors = {name: value.detach().clone() for name, value in method.trainable().items()}
    moved(method, torch.Generator().manual_seed(5))
    expected = 0.0
    for name, value in method.trainable().items():
        fisher = method.fisher.get_buffer(name.replace(".", "-"))
        rows = len(fisher)
        expected += 0.5 * float((fisher * (value[:rows] - anchors[name][:rows]).square()).sum().detach())
        assert fisher.any() or "prompts" in name
    assert len(method.fisher.get_buffer("head-weight")) == 3, "rows of the new classes are free"
    batch = drawings(4)
    with torch.no_grad():
        inputs = method.prepare(batch)
        torch.testing.assert_close(method.losses(inputs), FineTuning.losses(method, inputs) + 7.0 * expected)


@pytest.mark.slow
def test_fisher_information_from_forward_passes_is_the_mean_of_the_exact_one() -> None:
    """By tensor, over many directions, against per-example gradients."""
    method = trained_once("ewc").double()
    assert isinstance(method, EWC)
    batch = drawings(10)._replace(images=drawings(10).images.double())
    exact: dict[str, float] = {}
    for number in range(10):
        one = MiniBatch(batch.images[number : number + 1], batch.labels[number : number + 1])
        gradients = torch.autograd.grad(
            FineTuning.losses(method, method.prepare(one)).sum(), list(method.trainable().values())
        )
        for name, gradient in zip(method.trainable(), gradients, strict=True):
            exact[name] = exact.get(name, 0.0) + float(gradient.square().mean())
    names = ["head.weight", "head.sigma", "tuning.stack.0.up.weight", "tuning.stack.1.down.bias"]
    draws = {name: [] for name in names}
    before = {name: value.detach().clone() for name, value in method.trainable().items()}
    for _ in range(64):
        for name, squares in method._from_losses(batch):
            if name in draws:
                assert float(squares.min()) == float(squares.max())
                draws[name].append(float(squares.flatten()[0]))
    for name, found in draws.items():
        error = np.std(found) / np.sqrt(len(found))
        assert abs(np.mean(found) - exact[name]) < 4 * error + 1e-3 * exact[name], name
    for name, value in method.trainable().items():
        assert torch.equal(value, before[name]), "measuring moves nothing"


@pytest.mark.parametrize("fisher", ["forward", "backpropagation"])
def test_fisher_information_is_of_the_likelihood_whatever_loss_is_trained(fisher: str) -> None:
    """The 0-1 error has no slope: information of it would be zero, and so would the penalty, for good."""

    def penalty(loss: str) -> float:
        method, batch = trained_once("ewc", fisher=fisher), drawings(20)
        method.criterion = criteria[loss]
        new = batch.labels > 2
        method.choices = torch.Generator().manual_seed(3)
        method.eval()
        method.end_task([(batch.images[new], batch.labels[new])])
        return float(sum(value.sum() for value in method.fisher.buffers()))

    assert penalty("error-rate") == penalty("cross-entropy") > 0


def test_l2sp_holds_all_but_the_new_rows() -> None:
    method = trained_once("l2-sp", alpha=3.0)
    assert isinstance(method, L2SP)
    start = {name: value.detach().clone() for name, value in method.trainable().items()}
    moved(method, torch.Generator().manual_seed(5))
    rows = {"head.weight": 3}
    distance = sum(
        float((value.detach() - start[name])[: rows.get(name, len(value))].square().sum())
        for name, value in method.trainable().items()
    )
    with torch.no_grad():
        inputs = method.prepare(drawings(4))
        torch.testing.assert_close(method.losses(inputs), FineTuning.losses(method, inputs) + 3.0 * distance / 2)


def test_lwf_distils_the_answers_of_the_model_before_the_task() -> None:
    method = trained_once("lwf", alpha=2.0, temperature=2.0)
    assert isinstance(method, LwF)
    batch = drawings(6)
    with torch.no_grad():
        old = method.scores(method.features(batch.images, range(1)))[:, :3].double().numpy()
        moved(method, torch.Generator().manual_seed(5))
        inputs = method.prepare(batch)
        new = method.scores(method.features(batch.images, range(1)))[:, :3].double().numpy()
        found = method.losses(inputs).double().numpy()
        plain = FineTuning.losses(method, inputs[:2]).double().numpy()

    def softmax(x: np.ndarray) -> np.ndarray:
        powers = np.exp(x / 2 - (x / 2).max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)

    kl = (softmax(old) * np.log(softmax(old) / softmax(new))).sum(1)
    np.testing.assert_allclose(found, plain + 2.0 * 4 * kl, rtol=1e-4)
    assert kl.min() > 1e-6


@pytest.mark.parametrize("temperature", [2.0, 100.0, 1e4])
def test_the_distance_of_lwf_is_exact_at_any_temperature(temperature: float) -> None:
    method = trained_once("lwf", temperature=temperature)
    batch = drawings(6)
    moved(method, torch.Generator().manual_seed(5))
    with torch.no_grad():
        inputs = method.prepare(batch)
        new = method.scores(method.features(batch.images, range(1)))[:, :3]
        distances = (method.losses(inputs) - FineTuning.losses(method, inputs[:2])).double().numpy()
    heated = (values.double().numpy().astype(np.longdouble) / temperature for values in (inputs[2], new))
    p, q = (values - np.log(np.exp(values).sum(1, keepdims=True)) for values in heated)
    expected = temperature**2 * (np.exp(p) * (p - q)).sum(1)
    np.testing.assert_allclose(distances, expected, rtol=2e-3, atol=1e-6)


# Several feature spaces


@pytest.mark.parametrize(
    ("frozen_space", "diagonal_only"), [(False, False), (True, False), (False, True), (True, True)]
)
def test_without_reweighting_ease_takes_one_cosine_over_all_spaces(
    backbone: Backbone, frozen_space: bool, diagonal_only: bool
) -> None:
    """Features and prototypes side by side; where only a class's own space counts, its prototype is zero in the others."""
    options = EASE.Options(bottleneck=2, reweight=False, frozen_space=frozen_space, diagonal_only=diagonal_only)
    ease, first = EASE(backbone, options), int(frozen_space)
    ease.tasks = [range(0, 3), range(3, 5)]
    draw = np.random.default_rng(0)
    features, prototypes = draw.normal(size=(7, 2 + first, 6)), draw.normal(size=(2 + first, 5, 6))
    ease.prototypes = torch.from_numpy(prototypes)
    counted = prototypes.copy()
    if diagonal_only:
        counted[first, 3:], counted[first + 1, :3] = 0, 0
    given, known = features.reshape(7, -1), np.concatenate(list(counted), axis=1)
    expected = given @ known.T / np.linalg.norm(given, axis=1)[:, None] / np.linalg.norm(known, axis=1)
    np.testing.assert_allclose(ease.scores(torch.from_numpy(features)), expected, atol=1e-12)


@pytest.mark.parametrize(("reweight", "options", "weight"), [(True, {"beta": 0.3}, 0.3), (False, {}, 1.0)])
def test_discriminants_count_the_bare_backbone_with_beta_or_without_reweighting_as_any_other_space(
    reweight: bool, options: dict, weight: float
) -> None:
    ease = EASE(tiny_backbone(), EASE.Options(bottleneck=2, frozen_space=True, reweight=reweight, **options))
    ease.classifier = classifiers.get("lda").build()
    generator, batch = torch.Generator().manual_seed(0), drawings(30)
    for classes in (range(3), range(3, 5)):
        own = (batch.labels >= classes.start) & (batch.labels < classes.stop)
        ease.begin_task(classes, generator)
        moved(ease, generator)
        ease.eval()
        ease.freeze()
        ease.end_task([(batch.images[own], batch.labels[own])])
    features = ease.features(batch.images, range(3))
    posteriors = [d.scores(features[:, k].double()).log_softmax(1) for k, d in enumerate(ease.discriminants)]
    other = 0.1 if reweight else 1.0  # alpha, by one other task
    expected = torch.cat(
        [
            weight * posteriors[0][:, :3] + posteriors[1][:, :3] + other * posteriors[2][:, :3],
            weight * posteriors[0][:, 3:] + other * posteriors[1][:, 3:] + posteriors[2][:, 3:],
        ],
        dim=1,
    )
    torch.testing.assert_close(ease.scores(features), expected)


# Herding


def test_herding_keeps_the_best_of_every_class_where_classes_have_different_sizes() -> None:
    """Classes of 2, 6, 3 and 5 samples: against a memory kept class by class."""
    method = ExperienceReplay(tiny_backbone(), ExperienceReplay.Options(selection="herding", buffer=8, tune="none"))
    batch, sizes = drawings(40), {0: 2, 1: 6, 2: 3, 3: 5, 4: 4}
    best: dict[int, list[int]] = {}
    first = 0
    for classes in (range(2), range(2, 4), range(4, 5)):
        chosen = torch.cat([torch.nonzero(batch.labels == label)[: sizes[label], 0] for label in classes])
        part = [(batch.images[chosen], batch.labels[chosen])]
        method.begin_task(classes, torch.Generator().manual_seed(0), part)
        method.end_task(part)
        features = F.normalize(method.features(batch.images[chosen], range(1))[:, 0], dim=1)
        for label in classes:
            own = torch.nonzero(batch.labels[chosen] == label)[:, 0]
            best[label] = [first + int(own[i]) for i in herding(features[own], 8)]
        first += len(chosen)
        quota = 8 // classes.stop
        assert method.memory.tolist() == [place for label in range(classes.stop) for place in best[label][:quota]]


def test_a_memory_with_no_room_for_a_sample_of_every_class_is_refused_where_classes_get_equal_shares() -> None:
    """Otherwise nothing would be replayed, and nobody told."""
    herded, drawn = (
        ExperienceReplay(tiny_backbone(), ExperienceReplay.Options(selection=selection, buffer=3, tune="none"))
        for selection in ("herding", "reservoir")
    )
    batch = drawings(20)
    for method in (herded, drawn):
        method.begin_task(range(4), torch.Generator().manual_seed(0))
        method.end_task([(batch.images[batch.labels < 4], batch.labels[batch.labels < 4])])
    with pytest.raises(ConfigError, match=r"buffer=3 with selection=herding: .*4 classes before.*expected at least 4"):
        herded.begin_task(range(4, 5), torch.Generator().manual_seed(0))
    drawn.begin_task(range(4, 5), torch.Generator().manual_seed(0))
    assert len(drawn.memory) == 3


def test_discriminants_that_are_sure_still_tell_which_is_surest() -> None:
    """Each space is sure of its own class: the posteriors differ by less than float64 has room for beside 1."""
    ease = EASE(tiny_backbone(), EASE.Options(bottleneck=2, diagonal_only=True))
    ease.classifier = classifiers.get("lda").build()
    generator = torch.Generator().manual_seed(0)
    ease.tasks, ease.first = [range(2), range(2, 4)], 0
    ease.spaces.extend(classifiers.get("lda").build() for _ in ease.tasks)
    for space, discriminant in enumerate(ease.discriminants):
        discriminant.begin_task(range(4), 3, generator)
        discriminant.weight, discriminant.offset = (
            torch.eye(4, 3, dtype=torch.float64),
            torch.zeros(4, dtype=torch.float64),
        )
        discriminant.weight[2 * space] *= 2
        discriminant.center = torch.zeros(3, dtype=torch.float64)
    # Of class 0 in its space by 90 to 0, of class 2 in its own by 120 to 0, then the other way around.
    features = torch.tensor([[[45.0, 0, 0], [0, 0, 60.0]], [[60.0, 0, 0], [0, 0, 45.0]]])
    scores = ease.scores(features)
    assert scores.argmax(1).tolist() == [2, 0]
    expected = [[-np.log1p(3 * np.exp(-a)), -np.log1p(3 * np.exp(-b))] for a, b in ((90.0, 120.0), (120.0, 90.0))]
    np.testing.assert_allclose(scores[:, [0, 2]].numpy(), expected, rtol=1e-12)
