"""Closed-form classifiers: their numbers against other implementations and against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from feature_streams import Array, Stream, build, learn, probes, stream
from numpy.typing import NDArray
from sklearn.covariance import oas
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge as ReferenceRidge
from torch import Tensor

from zeroflow.classifiers import LDA, QDA, RandomProjection, Ridge
from zeroflow.classifiers.normal_equations import factor


def joined(tasks: Stream) -> tuple[Array, NDArray[np.int64]]:
    return torch.cat([x for x, _ in tasks]).numpy(), torch.cat([y for _, y in tasks]).numpy()


def one_hot(labels: NDArray[np.int64]) -> Array:
    return np.eye(labels.max() + 1)[labels]


def relative(scores: Tensor | Array) -> Array:
    """Scores less their mean over the classes: what decides, and all that softmax sees."""
    scores = np.asarray(scores)
    return scores - scores.mean(axis=1, keepdims=True)


@pytest.mark.parametrize("amount", [0.0, 0.03, 1.0])
def test_lda_is_scikit_learns(amount: float) -> None:
    tasks, x = stream(), probes()
    found = learn(build("lda", shrinkage="fixed", amount=amount), tasks).scores(x)
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=amount, priors=[1 / 6] * 6).fit(*joined(tasks))
    np.testing.assert_allclose(relative(found), relative(reference.decision_function(x.numpy())), rtol=0, atol=1e-8)


def test_lda_shrinks_as_oas_of_deviations_from_class_means() -> None:
    tasks = stream(each=9)
    tasks[1] = (tasks[1][0][:-5], tasks[1][1][:-5])  # classes of different sizes
    x, y = joined(tasks)
    deviations = x - np.stack([x[y == c].mean(0) for c in range(6)])[y]
    classifier = learn(build("lda"), tasks)
    assert isinstance(classifier, LDA)
    np.testing.assert_allclose(
        classifier.covariance(), oas(deviations, assume_centered=True)[0], rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("options", [{}, {"shrinkage": "fixed"}])
@pytest.mark.parametrize("classes", [1, 2, 20, 100])
def test_lda_with_a_single_image_of_every_class_is_nearest_to_it(classes: int, options: dict[str, str]) -> None:
    """There is no variance within classes, and rounding is none either."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(classes, 32, generator=generator)
        classifier = build("lda", **options)
        assert isinstance(classifier, LDA)
        classifier.begin_task(range(classes), 32, generator)
        classifier.add(x, torch.arange(classes))
        assert not classifier.covariance().any()
        classifier.end_task()
        asked = torch.randn(200, 32, generator=generator)
        assert torch.equal(classifier.scores(asked).argmax(1), torch.cdist(asked, x).argmin(1))


def test_lda_without_variance_in_some_features_takes_the_others_as_they_are() -> None:
    """Classes differ in a feature that is the same in all images of a class: it decides."""
    tasks = stream(tasks=1, classes=2)
    features, labels = tasks[0]
    features[:, 3] = 0.1 + labels / 3
    classifier = learn(build("lda", shrinkage="fixed"), tasks)
    assert isinstance(classifier, LDA)
    covariance = classifier.covariance()
    assert not covariance[3].any() and not covariance[:, 3].any() and (covariance.diagonal() > 0).sum() == 11
    assert torch.equal(classifier.scores(features).argmax(1), labels)


def test_a_matrix_that_rounding_has_made_negative_gets_a_ridge() -> None:
    lower = factor(-1e-17 * torch.eye(3, dtype=torch.float64))
    assert lower.isfinite().all() and (lower.diagonal() > 0).all()


def test_lda_does_not_mind_features_far_from_zero() -> None:
    x = probes()
    near = relative(learn(build("lda"), stream()).scores(x))
    far = learn(build("lda"), stream(offset=1e3))
    np.testing.assert_allclose(relative(far.scores(x + 1e3)), near, rtol=1e-6, atol=1e-6)
    # float32 carries 1e3 to 6e-5 only, and scores are no worse than that.
    np.testing.assert_allclose(relative(far.scores((x + 1e3).float())), near, rtol=1e-2, atol=2e-2)


def test_ridge_is_scikit_learns_joint_solution() -> None:
    tasks, x = stream(), probes()
    features, labels = joined(tasks)
    reference = ReferenceRidge(alpha=0.7, fit_intercept=False, solver="cholesky").fit(features, one_hot(labels))
    found = learn(build("ridge", ridge=0.7), tasks, cut=7).scores(x)
    np.testing.assert_allclose(found, reference.predict(x.numpy()), rtol=0, atol=1e-8)


def chosen_ridge(features: Array, labels: NDArray[np.int64]) -> float:
    """RanPAC's choice from its formulas: each candidate is fitted and tried on its own."""
    held = np.zeros(len(labels), dtype=bool)
    for c in np.unique(labels):
        held[np.flatnonzero(labels == c)[4::5]] = True
    wanted, errors = one_hot(labels), []
    for power in range(-8, 9):
        fit = features[~held]
        u, s, vt = np.linalg.svd(fit, full_matrices=False)
        s = np.where(s > 1e-7 * s[0], s, 0)
        weight = vt.T @ ((s / (s**2 + 10.0**power))[:, None] * (u.T @ wanted[~held]))
        errors.append(((features[held] @ weight - wanted[held]) ** 2).sum())
    return 10.0 ** (int(np.argmin(errors)) - 8)


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize(
    ("each", "dimension"), [(30, 0), (30, 20), (30, 200), (7, 50)], ids=["ridge", "primal", "dual", "few"]
)
def test_lambda_is_chosen_and_random_projection_solved_as_the_formulas_say(
    each: int, dimension: int, scale: float
) -> None:
    tasks, x = [(scale * x, y) for x, y in stream(each=each)], scale * probes()
    name, options = ("random-projection", {"dimension": dimension}) if dimension else ("ridge", {})
    generator = torch.Generator().manual_seed(7)
    w = torch.randn(12, dimension, generator=generator).double().numpy()

    def expand(features: Array) -> Array:
        return np.maximum(features @ w, 0) if dimension else features

    ridges = [chosen_ridge(expand(features.numpy()), labels.numpy()) for features, labels in tasks]
    classifier = learn(build(name, **options), tasks, cut=13)
    assert isinstance(classifier, Ridge)
    assert classifier.ridge == ridges[-1] and 1e-8 < ridges[-1] < 1e8
    features, labels = joined(tasks)
    h = expand(features)
    weight = np.linalg.solve(h.T @ h + ridges[-1] * np.eye(h.shape[1]), h.T @ one_hot(labels))
    np.testing.assert_allclose(classifier.scores(x), expand(x.numpy()) @ weight, rtol=0, atol=1e-8)


def test_without_five_samples_of_a_class_lambda_stays() -> None:
    tasks = stream(each=30)
    classifier = learn(build("ridge"), tasks[:1])
    assert isinstance(classifier, Ridge)
    before = float(classifier.ridge)
    classifier.begin_task(range(2, 4), 12, torch.Generator())
    classifier.add(tasks[1][0][:3], tasks[1][1][:3])
    classifier.end_task()
    assert classifier.ridge == before and classifier.scores(probes()).shape == (40, 4)


@pytest.mark.parametrize("width", [4, 12])
def test_gram_matrices_are_summed_up_in_blocks(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setattr("zeroflow.classifiers.normal_equations.BLOCK", 5)
    features, labels = joined(stream(width=width))
    found = learn(build("ridge", ridge=1e-3), stream(width=width)).scores(probes(width))
    reference = (
        ReferenceRidge(alpha=1e-3, fit_intercept=False).fit(features, one_hot(labels)).predict(probes(width).numpy())
    )
    np.testing.assert_allclose(found, reference, rtol=0, atol=1e-8)


def test_the_projection_is_as_wide_as_published_or_narrower_for_narrow_features() -> None:
    assert RandomProjection.draws and not Ridge.draws
    for width, dimension, expected in ((192, 0, 2000), (192, 3, 3)):
        classifier = RandomProjection(RandomProjection.Options(dimension=dimension))
        classifier.begin_task(range(2), width, torch.Generator().manual_seed(0))
        assert classifier.gram.shape == (expected, expected)
    assert RandomProjection().expanded_width(512, torch.Generator()) == 10_000


@pytest.mark.parametrize("options", [{}, {"shrinkage": 10.0, "off_diagonal": 0.5}])
def test_qda_is_fecam_as_its_formulas_say(options: dict[str, float]) -> None:
    tasks, x = stream(each=8), probes()
    gamma1, gamma2 = options.get("shrinkage", 1.0), options.get("off_diagonal", 0.0)
    features, labels = joined(tasks)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    seen = x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True)
    expected = []
    for c in range(6):
        of_class = features[labels == c]
        s = np.cov(of_class.T)
        off = ~np.eye(12, dtype=bool)
        shrunk = s + gamma1 * np.diag(s).mean() * np.eye(12) + gamma2 * s[off].mean() * off
        deviation = np.sqrt(np.diag(shrunk))
        away = seen - of_class.mean(0)
        expected.append(-np.einsum("ni,ij,nj->n", away, np.linalg.inv(shrunk / np.outer(deviation, deviation)), away))
    found = learn(build("qda", **options), tasks, cut=11).scores(x)
    np.testing.assert_allclose(found, np.stack(expected, axis=1), rtol=0, atol=1e-8)


def test_qda_with_a_single_image_of_a_class_measures_plain_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(3, 12, generator=generator)
    classifier = QDA()
    classifier.begin_task(range(3), 12, generator)
    classifier.add(x, torch.arange(3))
    classifier.end_task()
    f, seen = (v / v.norm(dim=1, keepdim=True) for v in (x, probes().float()))
    torch.testing.assert_close(classifier.scores(probes().float()), -(torch.cdist(seen, f) ** 2), rtol=1e-5, atol=1e-5)
