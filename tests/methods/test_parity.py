"""The methods reproduce PILOT's own losses, logits and prototypes, through the classes that the sweep uses."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from zeroflow.data import ArraySamples, ImageDataset, Transform, class_incremental
from zeroflow.methods import EASE, APERAdapter, Method, SimpleCIL
from zeroflow.models.factory import build_timm
from zeroflow.models.timm_backbone import TransformerBackbone
from zeroflow.models.weights import load_weights
from zeroflow.optim import create_optimizer
from zeroflow.trial.batches import TaskBatches
from zeroflow.trial.evaluation import DeviceBatches, Evaluation
from zeroflow.trial.training import TaskTrainer

FIXTURES = Path(__file__).parent / "parity"
META = json.loads((FIXTURES / "meta.json").read_text())
TOLERANCE = 1e-9


def scenario():
    with np.load(FIXTURES / "digits32.npz") as z:
        parts = [
            ArraySamples(torch.from_numpy(z[f"x_{part}"]).permute(0, 3, 1, 2).contiguous(), z[f"y_{part}"])
            for part in ("train", "test")
        ]
    dataset = ImageDataset("digits32", tuple("0123456789"), *parts)
    exact = Transform(
        train=lambda images, size, generator: images.double() / 255,
        test=lambda images, size: images.double() / 255,
        description="PILOT's run had float64 input",
    )
    return class_incremental(dataset, [2] * 5, exact, 32, order=np.array(META["class_order"]))


def method(name: str) -> Method:
    geometry = META["geom"]
    vit = build_timm("vit_tiny_patch16_224", geometry)
    load_weights(vit, FIXTURES / "backbone.pt")
    backbone = TransformerBackbone(vit)
    options = {"bottleneck": META["bottleneck"], "dropout": 0.0}
    return {
        "ease": lambda: EASE(backbone, EASE.Options(**options)),
        "aper_adapter": lambda: APERAdapter(backbone, APERAdapter.Options(**options)),
        "simplecil": lambda: SimpleCIL(backbone),
    }[name]()


def set_initial_values(model: Method, task: int) -> None:
    inits = torch.load(FIXTURES / "inits.pt", weights_only=True)
    stack = model.adapters[-1] if isinstance(model, EASE) else model.tuning.stack
    with torch.no_grad():
        for adapter, down in zip(stack, inits["adapter_down"][task], strict=True):
            adapter.down.weight.copy_(down)
        model.head.weight.copy_(inits["head"][task])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ease", "aper_adapter", "simplecil"])
def test_every_loss_logit_and_prototype_equals_pilots(name: str) -> None:
    expected = json.loads((FIXTURES / name / "result.json").read_text())
    arrays = np.load(FIXTURES / name / "arrays.npz")
    settings = expected["hparams"]
    device, dtype = torch.device("cpu"), torch.float64
    model = method(name).double()
    evaluation = Evaluation(model, functools.partial(DeviceBatches, device, dtype, 64))
    stream = scenario()
    for task in stream.tasks:
        model.begin_task(task.classes, torch.Generator())
        model.double()
        losses: list[float] = []
        if trainable := model.trainable():
            set_initial_values(model, task.index)
            optimizer = create_optimizer(
                "fo-sgd",
                list(trainable.items()),
                lr=settings["init_lr"],
                momentum=0.9,
                weight_decay=settings["weight_decay"],
            )
            trainer = TaskTrainer(model, optimizer, settings["tuned_epoch"], "cosine", device, dtype)

            def order(epoch: int, task=task) -> np.ndarray:
                return np.random.RandomState(10000 + 100 * task.index + epoch).permutation(len(task.train))

            trainer.train(TaskBatches(model, task.train, order, settings["batch_size"], task.index, seed=0))
            losses = [step.loss for step in trainer.steps]
        np.testing.assert_allclose(losses, expected["step_losses"][task.index], rtol=0, atol=TOLERANCE)

        model.eval()
        model.freeze()
        model.end_task((images.double(), labels) for images, labels in task.train.plain_batches(64))
        np.testing.assert_allclose(pilot_layout(model), arrays[f"prototypes_{task.index}"], rtol=0, atol=TOLERANCE)

        seen = stream.tasks[: task.index + 1]
        scores = torch.cat([evaluation.scores(t.test, t.index) for t in seen]).numpy()
        logits, labels = arrays[f"logits_{task.index}"], arrays[f"labels_{task.index}"]
        np.testing.assert_allclose(scores, logits, rtol=0, atol=TOLERANCE)
        np.testing.assert_array_equal(scores.argmax(1), logits.argmax(1))
        np.testing.assert_array_equal(torch.cat([t.test.labels for t in seen]).numpy(), labels)
        accuracies = [evaluation.accuracy(t.test, t.index) for t in seen]
        np.testing.assert_allclose(accuracies, expected["acc_matrix"][task.index], rtol=0, atol=TOLERANCE)


def pilot_layout(model: Method) -> np.ndarray:
    """PILOT keeps all spaces of a class side by side."""
    if isinstance(model, EASE):
        return model.prototypes.transpose(0, 1).flatten(1).numpy()
    return model.classifier.means.numpy()
