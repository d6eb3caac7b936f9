"""What never shows in a closed-form classifier, and what it refuses.

What never shows: how a task is cut into mini-batches, which process summed up what, in which order classes came, and whether a
stream was interrupted.
"""

from __future__ import annotations

import pytest
import torch
from feature_streams import Stream, build, learn, probes, stream

import zeroflow
from zeroflow.classifiers import Ridge, classifiers

EVERY = [name for name, _ in classifiers.items()]


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
        ("qda", {"off_diagonal": 2.0}, r"off_diagonal=2.0: expected a number <= shrinkage \(1.0\)"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, **options)
