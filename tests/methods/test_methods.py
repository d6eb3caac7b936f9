"""Methods and tunings: each does what its paper says, and each changes what comes out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from zeroflow import ConfigError, TrialConfig, run_trial
from zeroflow.classifiers import classifiers
from zeroflow.data import load_dataset
from zeroflow.data.scenario import View
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
from zeroflow.models.factory import build_timm, create_backbone
from zeroflow.models.timm_backbone import TransformerBackbone
from zeroflow.models.tuning import SSF, Full, Prompts, tunings
from zeroflow.optim import list_optimizers
from zeroflow.trial.evaluation import Evaluation

pytestmark = pytest.mark.usefixtures("some_drawings", "tiny_vit")
PRETRAINED = {
    "dataset": "some-drawings", "image_size": 14, "tasks": 4, "epochs": 2, "batch_size": 16, "optimizer": "fo-sgd", "lr": 0.05,
}  # fmt: skip
TINY = "zeroflow_tiny_vit"
SMALL = {**PRETRAINED, "backbone": TINY, "checkpoint": "none", "tasks": 10, "stop_after": 2, "batch_size": 10}
"""Two tasks of two classes, in steps of milliseconds."""
ONE_HEAD = [name for name, info in methods.items() if info.build.one_head]
SETTINGS = {"bottleneck": 8, "scale": 1.0, "dropout": 0.0, "tokens": 5}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return create_backbone()


def drawings(count: int, first: int = 0) -> MiniBatch:
    """Some training drawings of the classes 0..4, in turn."""
    samples = load_dataset("some-drawings").train
    chosen = np.array([np.flatnonzero(samples.labels == i % 5)[first + i // 5] for i in range(count)])
    images = (samples.images(chosen).float() / 255).expand(-1, 3, -1, -1).contiguous()
    return MiniBatch(images, torch.from_numpy(samples.labels[chosen]))


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


@dataclass(frozen=True)
class Outcome:
    """Of a trial: its steps' losses by task, and the scores of the first task's test samples after the last one."""

    losses: dict[int, list[float]]
    scores: Tensor


_OUTCOMES: dict[str, Outcome] = {}


def outcome(**settings: Any) -> Outcome:
    """What a small cell with these settings ends with; each is run once. Dropout, which hits other images, is left out."""
    options = {"dropout": 0.0, **settings.pop("method_options", {})}
    config = TrialConfig.from_dict({**SMALL, **settings, "method_options": options})
    if config.cell_id not in _OUTCOMES:
        scores: dict[int, Tensor] = {}
        original = Evaluation.scores

        def kept(self: Evaluation, test: View, task: int) -> Tensor:
            scores[task] = original(self, test, task)
            return scores[task]

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Evaluation, "scores", kept)
            steps = run_trial(config).steps
        losses = {task: [step.loss for step in steps if step.task == task] for task in range(2)}
        _OUTCOMES[config.cell_id] = Outcome(losses, scores[0])
    return _OUTCOMES[config.cell_id]


def differ(one: Outcome, other: Outcome) -> bool:
    """Whether the models that came out answer differently, by more than rounding."""
    return not torch.allclose(one.scores, other.scores, rtol=1e-5, atol=1e-7)


@torch.no_grad()
def moved(method: Method, generator: torch.Generator, by: float = 0.05) -> None:
    for value in method.trainable().values():
        value += by * torch.randn(value.shape, generator=generator)


# Tunings


def test_a_vision_transformer_of_the_paper_has_as_many_trained_values_as_published() -> None:
    with torch.device("meta"):
        vit = TransformerBackbone(build_timm("vit_base_patch16_224", {"depth": 12}))
    counts = {
        name: sum(
            p.numel()
            for p in tunings.get(name).of(vit, torch.Generator(), {**SETTINGS, "bottleneck": 64}).parameters()
            if p.requires_grad
        )
        for name in ("adapter", "vpt-shallow", "vpt-deep", "ssf", "none")
    }
    assert counts == {"adapter": 1_189_632, "vpt-shallow": 5 * 768, "vpt-deep": 12 * 5 * 768, "ssf": 205_824, "none": 0}


def test_a_tuning_that_changes_nothing_gives_the_frozen_features(backbone: Backbone) -> None:
    images, frozen = drawings(4).images, backbone(drawings(4).images)
    ssf = SSF(backbone)
    with torch.no_grad():
        for name, value in ssf.named_parameters():
            if value.requires_grad:
                value.fill_(1.0 if name.endswith("scale") else 0.0)
    for tuning in (ssf, Full(backbone), tunings.get("adapter").of(backbone, torch.Generator(), SETTINGS)):
        torch.testing.assert_close(tuning(backbone, tuning.prefix(backbone, images)), frozen, rtol=1e-4, atol=1e-5)


def test_scales_and_shifts_stand_behind_every_layer() -> None:
    """Against frozen weights that were scaled and shifted themselves."""
    plain, changed = create_backbone().double(), create_backbone().double()
    ssf = SSF(plain, torch.Generator().manual_seed(0)).double()
    values = {name: value for name, value in ssf.named_parameters() if value.requires_grad}
    images = drawings(3).images.double()
    with torch.no_grad():
        for number, value in enumerate(values.values()):
            value += 0.3 * torch.rand(value.shape, generator=torch.Generator().manual_seed(number))
        for name, value in values.items():
            if name.endswith("scale"):
                place = name.removeprefix("tuned.").removesuffix(".1.scale")
                layer = changed.get_submodule(place.replace("patch_embed.norm", "patch_embed.proj"))
                layer.weight.mul_(value.reshape(-1, *[1] * (layer.weight.ndim - 1)))
                layer.bias.mul_(value).add_(values[name.replace("scale", "shift")])
        expected = changed.whole(images)
    torch.testing.assert_close(ssf(plain, images), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["vpt-shallow", "vpt-deep"])
def test_prompts_enter_behind_the_patches_and_leave(name: str, backbone: Backbone) -> None:
    tuning = tunings.get(name).of(backbone, torch.Generator(), SETTINGS)
    assert isinstance(tuning, Prompts) and not tuning.prompts.any()
    torch.nn.init.normal_(tuning.prompts)
    images, vit = drawings(3).images, backbone.model
    with torch.no_grad():
        tokens = backbone.tokens(images)
        for number, block in enumerate(vit.blocks):
            if name == "vpt-deep" or number == 0:
                tokens = torch.cat([tokens[:, :17], tuning.prompts[number].repeat(3, 1, 1)], dim=1)
            tokens = block(tokens)
        expected = vit.norm(tokens)[:, 0]
        found = tuning(backbone, tuning.prefix(backbone, images))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# Methods with one head


@pytest.mark.slow
def test_fine_tuning_forgets_and_joint_training_does_not() -> None:
    common = {**PRETRAINED, "epochs": 4, "lr": 0.3, "method_options": {"bottleneck": 8, "scale": 1.0, "dropout": 0.0}}
    tuned, joint = (run_trial(TrialConfig.from_dict({**common, "method": name})) for name in ("finetune", "joint"))
    assert tuned.summary["fgt"] > joint.summary["fgt"] + 10
    assert joint.summary["last"] > tuned.summary["last"] + 5
    # 20 samples a class, 5 classes a task: all samples so far at every stage.
    assert [s.task for s in joint.steps].count(3) == 4 * -(-joint_samples(4) // 16)


def joint_samples(stages: int) -> int:
    labels = load_dataset("some-drawings").train.labels
    return stages * len(labels) // 4


@pytest.mark.slow
def test_an_imprinted_head_is_the_class_mean_classifier_until_it_is_trained() -> None:
    config = TrialConfig.from_dict(
        {**PRETRAINED, "method": "finetune", "method_options": {"tune": "none"}, "lr": 1e-12}
    )
    simplecil = run_trial(TrialConfig.from_dict({**PRETRAINED, "method": "simplecil"}))
    np.testing.assert_allclose(run_trial(config).accuracy_matrix, simplecil.accuracy_matrix, atol=1e-9)
    random = replace(config, method_options={"tune": "none", "imprint": False})
    assert run_trial(random).summary["last"] < simplecil.summary["last"] / 2


@pytest.mark.parametrize("optimizer", ["fo-sgd", "zo-sgd"])
@pytest.mark.parametrize("name", sorted(set(ONE_HEAD) - {"finetune"}))
def test_what_a_method_adds_to_fine_tuning_changes_the_outcome(name: str, optimizer: str) -> None:
    common = {"optimizer": optimizer, "lr": 0.05 if optimizer == "fo-sgd" else 1e-2}
    plain, other = (outcome(**common, method=m) for m in ("finetune", name))
    if name != "l2-sp":  # which holds the first task's values too
        assert other.losses[0] == plain.losses[0]
    assert other.losses[1] != plain.losses[1] and differ(other, plain)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["zo-sgd", "zo-adam"])
@pytest.mark.parametrize(
    "changed", [{"hybrid_epochs": 1}, *({"optimizer_options": {k: 0.5}} for k in ("history", "sparsity"))]
)
def test_every_enhancement_changes_the_outcome(changed: dict, optimizer: str) -> None:
    common = {"method": "ease", "optimizer": optimizer, "lr": 1e-3}
    assert differ(outcome(**common), outcome(**common, **changed))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "option", "values"),
    [
        ("ewc", "alpha", (0.0, 100.0)),
        ("ewc", "fisher", ("forward", "backpropagation")),
        ("l2-sp", "alpha", (0.0, 10.0)),
        ("lwf", "alpha", (0.0, 5.0)),
        ("lwf", "temperature", (1.0, 4.0)),
        ("replay", "selection", ("reservoir", "herding")),
        ("replay", "buffer", (10, 80)),
        ("generative-replay", "covariance", ("full", "diagonal")),
        ("generative-replay", "shrinkage", (0.1, 0.9)),
    ],
)
def test_every_setting_changes_the_outcome(name: str, option: str, values: tuple) -> None:
    one, other = (outcome(lr=0.1, method=name, method_options={option: value}) for value in values)
    assert differ(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ewc", "l2-sp", "lwf"])
def test_without_its_penalty_a_method_is_fine_tuning(name: str) -> None:
    plain, other = outcome(method="finetune"), outcome(method=name, method_options={"alpha": 0.0})
    for task in range(2):
        np.testing.assert_allclose(other.losses[task], plain.losses[task], rtol=1e-6)
    torch.testing.assert_close(other.scores, plain.scores, rtol=1e-5, atol=1e-6)


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


@pytest.mark.slow
def test_one_shared_adapter_moves_old_classes_and_one_for_each_task_does_not() -> None:
    common = {**SMALL, "epochs": 4, "lr": 0.5, "method_options": {"bottleneck": 8, "scale": 1.0, "dropout": 0.0}}
    shared = run_trial(TrialConfig.from_dict({**common, "method": "shared-adapter"}))
    own = run_trial(TrialConfig.from_dict({**common, "method": "adapter-per-task"}))
    diagonal = {**common, "method": "ease", "method_options": {**common["method_options"], "diagonal_only": True}}
    np.testing.assert_array_equal(own.accuracy_matrix, run_trial(TrialConfig.from_dict(diagonal)).accuracy_matrix)
    assert [s.loss for s in shared.steps if s.task == 0] == [s.loss for s in own.steps if s.task == 0]
    assert [s.loss for s in shared.steps if s.task == 1] != [s.loss for s in own.steps if s.task == 1]


# Any optimizer with any method, or a reason


@pytest.mark.parametrize("name", methods.names())
def test_every_optimizer_trains_every_method_or_is_refused_before(name: str) -> None:
    refused = set()
    for optimizer in list_optimizers():
        try:
            TrialConfig.from_dict({"method": name, "optimizer": optimizer})
        except ConfigError as error:
            assert f"method '{name}' cannot be trained with optimizer '{optimizer}': " in str(error)
            refused.add(optimizer)
    per_example_cannot = {
        "replay",
        "aper-vpt-shallow",
        "aper-vpt-deep",
        "aper-finetune",
        "aper-input-prompt",
        "aper-input-filter",
        "aper-norm-affine",
        "foro",
    }
    assert refused == ({"zo-per-example"} if name in per_example_cannot else set())


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["fo-sgd-checkpoint", "forward-grad", "zo-per-example"])
@pytest.mark.parametrize("name", [name for name, info in methods.items() if info.build.trains])
def test_the_optimizers_that_ask_most_of_a_method_train_it(name: str, optimizer: str) -> None:
    common = {**SMALL, "epochs": 1, "lr": 1e-4, "method": name, "optimizer": optimizer}
    try:
        config = TrialConfig.from_dict(common)
    except ConfigError:
        pytest.skip("refused")
    result = run_trial(config)
    assert np.isfinite([s.loss for s in result.steps]).all() and len(result.steps)


def test_exact_fisher_information_is_refused_where_gradients_are_banned() -> None:
    exact = {"method": "ewc", "method_options": {"fisher": "backpropagation"}}
    assert TrialConfig.from_dict({**exact, "optimizer": "fo-adam"})
    with pytest.raises(ConfigError, match="takes gradients; fisher=forward takes none"):
        TrialConfig.from_dict({**exact, "optimizer": "forward-grad"})


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("finetune", {"tune": "adaptor"}, "did you mean 'adapter'"),
        ("replay", {"buffer": 0}, "buffer=0: expected a number > 0"),
        ("replay", {"selection": "random"}, "selection='random': expected reservoir or herding"),
        ("generative-replay", {"shrinkage": 0.0}, "shrinkage=0.0"),
        ("generative-replay", {"covariance": "none"}, "expected full or diagonal"),
        ("ewc", {"fisher": "exact"}, "expected forward or backpropagation"),
        ("ewc", {"alpha": -1.0}, "alpha=-1.0"),
        ("lwf", {"temperature": 0.0}, "temperature=0.0"),
        ("aper-vpt-deep", {"tokens": 0}, "tokens=0"),
        ("aper-ssf", {"tokens": 5}, "unknown option of method 'aper-ssf'"),
        ("ease", {"alpha": -0.1}, "alpha=-0.1: expected a number >= 0"),
        ("ease", {"beta": 0.5}, "beta=0.5: expected together with frozen_space and reweight"),
        ("ease", {"beta": 0.5, "frozen_space": True, "reweight": False}, "beta=0.5: expected together with"),
        ("ease", {"frozen_space": True}, "frozen_space=True: .*without weight; expected beta > 0, or reweight=False"),
        ("ease", {"alpha": 0.5, "reweight": False}, "alpha=0.5: expected 0.1, its default, .*reweight=False"),
        ("ease", {"alpha": 0.5, "diagonal_only": True}, "alpha=0.5: expected 0.1, its default, .*diagonal_only=True"),
    ],
)
def test_bad_options_are_refused(method: str, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrialConfig.from_dict({"method": method, "method_options": options})


# Function values


@pytest.mark.slow
def test_function_values_are_the_losses_of_old_and_new_samples() -> None:
    config = TrialConfig.from_dict({**SMALL, "method": "finetune", "epochs": 4, "probe_every": 3})
    result, plain = run_trial(config), run_trial(replace(config, probe_every=None))
    assert [s.loss for s in result.steps] == [s.loss for s in plain.steps], "looking changes nothing"
    per_task = len(result.steps) // 2
    expected = [(t, t * per_task + s) for t in range(2) for s in [*range(0, per_task, 3), per_task]]
    assert [(p.task, p.step) for p in result.probes] == expected
    assert all((p.loss_old is None) == (p.task == 0) for p in result.probes)
    old = [p.loss_old for p in result.probes if p.task == 1]
    assert old[-1] > old[0], "what is not trained gets worse"
    with pytest.raises(
        ConfigError, match=r"method 'ease' has no loss of old tasks while it trains; expected one of ewc, "
    ):
        TrialConfig.from_dict({"method": "ease", "probe_every": 5})


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
    posteriors = [d.scores(features[:, k]).log_softmax(1) for k, d in enumerate(ease.discriminants)]
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
    with pytest.raises(ConfigError, match=r"buffer=3 with selection=herding: .*4 classes so far.*expected at least 4"):
        herded.begin_task(range(4, 5), torch.Generator().manual_seed(0))
    drawn.begin_task(range(4, 5), torch.Generator().manual_seed(0))
    assert len(drawn.memory) == 3
