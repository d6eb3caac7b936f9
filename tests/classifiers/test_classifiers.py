"""Closed-form classifiers: their numbers against other implementations and against their formulas, and what never shows.

What never shows: how a task is cut into mini-batches, which process summed up what, in which order classes came, and whether a
stream was interrupted.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.covariance import oas
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge as ReferenceRidge
from torch import Tensor

import zeroflow
from zeroflow.classifiers import LDA, QDA, Classifier, RandomProjection, Ridge, classifiers
from zeroflow.classifiers.normal_equations import factor

Array = NDArray[np.float64]
Stream = list[tuple[Tensor, Tensor]]

SMALL = {"random-projection": {"dimension": 50}}
"""Options that make tests fast."""
EVERY = [name for name, _ in classifiers.items()]


def build(name: str, **options: object) -> Classifier:
    info = classifiers.get(name)
    return info.build(info.options(**{**SMALL.get(name, {}), **options}))


def stream(
    *, tasks: int = 3, classes: int = 2, each: int = 30, width: int = 12, seed: int = 0, offset: float = 0.0
) -> Stream:
    """Tasks of Gaussian classes with a common, skewed covariance; the samples of a task are shuffled. float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    found = []
    for task in range(tasks):
        labels = torch.arange(task * classes, (task + 1) * classes).repeat(each)
        labels = labels[torch.randperm(len(labels), generator=generator)]
        means = 2 * torch.randn((task + 1) * classes, width, generator=generator, dtype=torch.float64)
        noise = torch.randn(len(labels), width, generator=generator, dtype=torch.float64) @ mix
        found.append((means[labels] + noise + offset, labels))
    return found


def learn(classifier: Classifier, tasks: Stream, cut: int = 1000) -> Classifier:
    """The whole stream, ``cut`` samples at once."""
    begun = 0
    generator = torch.Generator().manual_seed(7)
    for features, labels in tasks:
        end = int(labels.max()) + 1
        classifier.begin_task(range(begun, end), features.shape[1], generator)
        for part in range(0, len(labels), cut):
            classifier.add(features[part : part + cut], labels[part : part + cut])
        classifier.end_task()
        begun = end
    return classifier


def probes(width: int = 12, count: int = 40) -> Tensor:
    return 3 * torch.randn(count, width, generator=torch.Generator().manual_seed(99), dtype=torch.float64)


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


@pytest.mark.parametrize("name", EVERY)
def test_cuts_of_a_task_do_not_show(name: str) -> None:
    tasks, x = stream(each=40), probes()
    whole = learn(build(name), tasks).scores(x)
    for cut in (1, 17):
        torch.testing.assert_close(learn(build(name), tasks, cut).scores(x), whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", EVERY)
def test_the_order_of_tasks_does_not_show(name: str) -> None:
    tasks, x = stream(), probes()
    options = {"ridge": 0.1} if issubclass(classifiers.get(name).build, Ridge) else {}  # a choice is the last task's
    inorder = learn(build(name, **options), tasks).scores(x)
    turned: Stream = []
    for position, task in enumerate((2, 0, 1)):
        features, labels = tasks[task]
        turned.append((features, labels + 2 * (position - task)))
    found = learn(build(name, **options), turned).scores(x)
    torch.testing.assert_close(found, inorder[:, [4, 5, 0, 1, 2, 3]], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in EVERY), ("ridge", {"ridge": 0.1}), ("random-projection", {"ridge": 0.1})],
)
def test_two_merge_into_one(name: str, options: dict[str, float]) -> None:
    (features, labels), x = stream(tasks=1, classes=4, each=40)[0], probes()
    # A choice of lambda holds out samples by the order they came in; of two halves the first one's come first.
    halves = [build(name, **options), build(name, **options)]
    for number, classifier in enumerate(halves):
        classifier.begin_task(range(4), 12, torch.Generator().manual_seed(7))
        half = slice(number * 80, number * 80 + 80)
        classifier.add(features[half], labels[half])
    halves[0].merge(halves[1])
    halves[0].end_task()
    whole = learn(build(name, **options), [(features, labels)]).scores(x)
    torch.testing.assert_close(halves[0].scores(x), whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", EVERY)
def test_a_stream_goes_on_from_saved_buffers(name: str) -> None:
    tasks, x = stream(), probes()
    whole = build(name)
    saved = {key: value.clone() for key, value in learn(whole, tasks[:2]).state_dict().items()}
    before = whole.scores(x)
    assert "projection" not in saved

    restored, generator = build(name), torch.Generator().manual_seed(7)
    for start in (0, 2):
        restored.begin_task(range(start, start + 2), 12, generator)
    for key, value in saved.items():
        setattr(restored, key, value)
    assert torch.equal(restored.scores(x), before)
    for classifier in (whole, restored):
        classifier.begin_task(range(4, 6), 12, generator)
        classifier.add(*tasks[2])
        classifier.end_task()
    assert torch.equal(restored.scores(x), whole.scores(x))


def singular() -> dict[str, Stream]:
    """Features whose statistics cannot be inverted."""
    constant, doubled = stream(), stream()
    for features, _ in constant:
        features[:, 3] = 5.0
    for features, _ in doubled:
        features[:, 3] = features[:, 4]
    same = [(torch.ones_like(x), y) for x, y in stream()]
    zero = [(torch.zeros_like(x), y) for x, y in stream()]
    return {
        "constant": constant,
        "doubled": doubled,
        "few": stream(each=1),
        "same": same,
        "zero": zero,
        "few, far": stream(each=2, offset=1e3),
    }


SINGULAR_OPTIONS = [
    ("lda", {}), ("lda", {"shrinkage": "fixed"}), ("ridge", {}), ("ridge", {"ridge": 1e-30}), ("random-projection", {}),
    ("random-projection", {"ridge": 1e-30}), ("qda", {}), ("qda", {"shrinkage": 0.0}),
]  # fmt: skip


@pytest.mark.parametrize("kind", singular())
@pytest.mark.parametrize(("name", "options"), SINGULAR_OPTIONS)
def test_singular_statistics_still_give_scores(name: str, options: dict[str, object], kind: str) -> None:
    tasks = singular()[kind]
    classifier = learn(build(name, **options), tasks)
    assert classifier.scores(probes()).isfinite().all()
    seen = torch.cat([x for x, _ in tasks])
    scores = classifier.scores(seen)
    assert scores.isfinite().all()
    if kind in ("constant", "doubled"):
        # What tells nothing new does no harm: as good as without it.
        labels = torch.cat([y for _, y in tasks])
        without = [(torch.cat([x[:, :3], x[:, 4:]], dim=1), y) for x, y in tasks]
        other = learn(build(name, **options), without).scores(torch.cat([seen[:, :3], seen[:, 4:]], dim=1))
        right, right_without = ((s.argmax(1) == labels).double().mean() for s in (scores, other))
        assert right > right_without - 0.05


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused_by_name(name: str, bad: float) -> None:
    classifier = build(name)
    classifier.begin_task(range(2), 12, torch.Generator())
    features = torch.zeros(4, 12)
    features[2, 5] = bad
    with pytest.raises(ValueError, match=f"'{name}'.*finite.* 1 of 4"):
        classifier.add(features, torch.tensor([0, 0, 1, 1]))


@pytest.mark.parametrize("name", EVERY)
def test_statistics_stay_precise_whatever_becomes_of_the_model(name: str) -> None:
    classifier = learn(build(name).to(torch.float32), stream()).to(torch.float32).half()
    precise = {key: value.dtype for key, value in classifier.named_buffers() if key != "projection"}
    assert set(precise.values()) == {torch.float64}
    x = probes()
    exact = classifier.scores(x)
    for dtype in (torch.float32, torch.bfloat16):
        assert classifier.scores(x.to(dtype)).dtype == dtype
    torch.testing.assert_close(classifier.scores(x.float()).double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_no_graph_is_built(name: str) -> None:
    tasks = [(x.requires_grad_(), y) for x, y in stream()]
    with zeroflow.gradient_ban(), torch.no_grad():
        found = learn(build(name), tasks).scores(probes())
    with zeroflow.gradient_ban():
        again = learn(build(name), stream()).scores(probes())
    assert torch.equal(found, again)
    # Features that carry a graph leave none in the statistics.
    classifier = learn(build(name), tasks)
    assert not any(value.requires_grad for value in classifier.buffers())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lda", {"shrinkage": "oa"}, "shrinkage='oa': expected oas or fixed"),
        ("lda", {"shrinkage": "fixed", "amount": 1.5}, r"amount=1.5: expected a share in \[0, 1\]"),
        ("lda", {"amount": 0.5}, "amount=0.5: expected together with shrinkage=fixed"),
        ("ridge", {"ridge": -1.0}, "ridge=-1.0: expected a number > 0, or 0"),
        ("random-projection", {"dimension": -1}, "dimension=-1: expected an integer >= 1, or 0"),
        ("random-projection", {"ridge": -1.0}, "ridge=-1.0"),
        ("qda", {"shrinkage": -1.0}, "shrinkage=-1.0: expected a number >= 0"),
        ("qda", {"off_diagonal": -1.0}, "off_diagonal=-1.0: expected a number >= 0"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, **options)
