"""Backbones of a device without backpropagation: int8 kernels, and an exported graph whose adapters are inputs."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from zeroflow import ConfigError, TrialConfig, run_trial
from zeroflow.models.access import accesses, open_backbone
from zeroflow.models.adapters import AdapterStack
from zeroflow.models.exported import ExportedBackbone
from zeroflow.models.int8 import Int8Linear

pytestmark = pytest.mark.usefixtures("some_drawings", "tiny_vit")
TINY = {"name": "zeroflow_tiny_vit", "checkpoint": "none", "image_size": 14}
SMALL = {
    "backbone": "zeroflow_tiny_vit", "checkpoint": "none", "image_size": 14, "dataset": "some-drawings", "tasks": 10,
    "stop_after": 2, "epochs": 1, "batch_size": 24, "optimizer": "zo-sgd", "lr": 0.01,
}  # fmt: skip


@pytest.mark.parametrize("biased", [True, False])
def test_an_int8_layer_is_integer_arithmetic(biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(192, 70, bias=biased)
    values = torch.randn(5, 17, 192, generator=generator)
    int8 = Int8Linear(layer)
    with torch.no_grad():
        found = int8(values)
        alone = int8(values[3:4, 2:3])
    weight = layer.weight.detach().double()
    bias = layer.bias.detach().double() if biased else torch.zeros(70).double()
    rows = weight.abs().amax(1, keepdim=True) / 127
    tokens = values.double().abs().amax(-1, keepdim=True) / int8.top
    product = (values.double() / tokens).round() @ (weight / rows).round().T
    torch.testing.assert_close(found.double(), product * tokens * rows[:, 0] + bias, rtol=0, atol=2e-3)
    error = (found.double() - (values.double() @ weight.T + bias)).abs().max()
    assert 1e-5 < float(error) < 0.1, "rounded, and not by much"
    assert torch.equal(alone[0, 0], found[3, 2]), "no token depends on its neighbours"
    assert torch.equal(int8(torch.zeros(1, 192)), bias.float()[None])
    with pytest.raises(RuntimeError, match="no derivative"):
        int8(values.requires_grad_())


def stack(inner: int, scale: float) -> AdapterStack:
    found = AdapterStack([32, 32], inner, scale=scale, dropout=0.0, generator=torch.Generator().manual_seed(inner))
    with torch.no_grad():
        for value in found.parameters():
            value += 0.2 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    return found


def test_an_exported_graph_answers_as_the_backbone_with_any_adapters_and_any_number_of_images() -> None:
    plain, exported = open_backbone(None, **TINY), open_backbone("exported", **TINY)
    assert isinstance(exported, ExportedBackbone) and not list(exported.parameters())
    assert (exported.width, exported.depth, exported.image_size) == (plain.width, plain.depth, plain.image_size)
    with torch.no_grad():
        for count, adapters in ((1, None), (5, stack(3, 1.0)), (2, stack(8, 0.1))):
            images = torch.rand(count, 3, 14, 14, generator=torch.Generator().manual_seed(count))
            torch.testing.assert_close(exported(images, adapters), plain(images, adapters), rtol=1e-4, atol=1e-5)
            prefix = exported.prefix(images)
            assert torch.equal(exported(prefix, adapters), exported(images, adapters))
    with pytest.raises(RuntimeError, match="no derivative"):
        exported(images, stack(3, 1.0))
    with pytest.raises(TypeError, match="an Adapter for every block"), torch.no_grad():
        exported(images, [nn.Identity()] * 2)


@pytest.mark.parametrize("method", ["simplecil", "ease", "aper-adapter", "replay"])
@pytest.mark.parametrize("access", ["int8", "exported"])
def test_cells_run_on_it_and_come_out_near_the_float_ones(access: str, method: str) -> None:
    options = {} if method == "simplecil" else {"dropout": 0.0, "bottleneck": 4}
    config = {**SMALL, "method": method, "method_options": options}
    plain, found = (run_trial(TrialConfig.from_dict({**config, **more})) for more in ({}, {"access": access}))
    assert found.cell_id != plain.cell_id
    seen = np.tril_indices(2)
    tolerance = 1e-9 if access == "exported" else 25.0  # ten test images a task
    assert np.abs(found.accuracy_matrix[seen] - plain.accuracy_matrix[seen]).max() <= tolerance
    for one, other in zip(found.steps, plain.steps, strict=True):
        assert abs(one.loss - other.loss) < (1e-3 if access == "exported" else 0.1)
    memory = found.summary["peak_memory_bytes"]
    assert memory is None if access == "exported" else 0 < memory < plain.summary["peak_memory_bytes"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"access": "int8", "optimizer": "fo-sgd"}, "optimizer 'fo-sgd' differentiates, and int8 weights"),
        ({"access": "int8", "optimizer": "forward-grad"}, "'forward-grad' differentiates"),
        ({"access": "int8", "epochs": 2, "hybrid_epochs": 1}, "a hybrid run, in its first steps, differentiates"),
        ({"access": "int8", "dtype": "float64"}, "dtype='float64': it computes in float32"),
        ({"access": "int8", "method": "aper-finetune"}, "it trains 'full', and int8 weights cannot be trained"),
        ({"access": "exported", "method": "aper-vpt-deep"}, "it trains 'vpt-deep'.*can be trained: none, adapter"),
        ({"access": "exported"}, r"dropout=0.1: its graph has none; set method_options.dropout to 0"),
        ({"access": "exported", "optimizer": "zo-per-example", "method_options": {"dropout": 0}}, "moves every example"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_before_anything_runs(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrialConfig.from_dict({**SMALL, "method": "ease", **values})


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
    with pytest.raises(ConfigError, match=r"access='exported' needs onnxruntime: pip install 'zeroflow\[bans\]'"):
        accesses["exported"].check_installed()
