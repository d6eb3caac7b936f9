"""Methods and tunings: each changes what comes out, and any optimizer trains any method or is refused before."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from cells import drawings
from torch import Tensor

from zeroflow import ConfigError, TrialConfig, run_trial
from zeroflow.data import load_dataset
from zeroflow.data.scenario import View
from zeroflow.methods import methods
from zeroflow.models.backbone import Backbone
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
        (
            "replay",
            {"selection": "herding", "buffer": 89},
            "buffer=89 with selection=herding: .* 90 classes before the last",
        ),
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
