"""Modules of other people's models: sparse gradients, weights the other way around, no forward-mode rules, backward() in a closure."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zeroflow.errors import ConfigError
from zeroflow.optim import create_optimizer, tune


class Conv1D(nn.Module):
    """As in Hugging Face's GPT-2: a linear layer whose weight is ``[in, out]`` and whose input is flattened to rows."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(inputs, outputs))
        self.bias = nn.Parameter(0.3 * torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return rows.view(*x.shape[:-1], -1)


class Matmul(Conv1D):
    """The same as most people would write it."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Unflat(Conv1D):
    """The same by ``F.linear``, which was always understood."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.T, self.bias)


def step_of(kind: type[Conv1D], frozen_bias: bool = False) -> Tensor:
    torch.manual_seed(0)
    model = nn.Sequential(kind(6, 8), nn.GELU(), kind(8, 3)).double()
    for module in model:
        if frozen_bias and isinstance(module, Conv1D):
            module.bias.requires_grad_(False)
    x, y = torch.randn(7, 5, 6, dtype=torch.float64), torch.randint(3, (7, 5))
    optimizer = create_optimizer("zo-per-example", model, lr=0.1, queries=2)
    for _ in range(3):
        optimizer.step(lambda: F.cross_entropy(model(x).transpose(1, 2), y, reduction="none").mean(1))
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("frozen_bias", [False, True])
def test_weights_the_other_way_around_are_displaced_for_each_example(frozen_bias: bool) -> None:
    expected = step_of(Unflat, frozen_bias)
    for kind in (Conv1D, Matmul):
        torch.testing.assert_close(step_of(kind, frozen_bias), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("name", "options"), [("fo-sgd", {}), ("fo-adam", {}), ("zo-sgd", {"hybrid": 2})])
def test_sparse_gradients_are_those_of_a_dense_embedding(name: str, options: dict) -> None:
    ends = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 4, sparse=sparse), nn.Flatten(), nn.Linear(12, 3))
        tokens, y = torch.randint(9, (8, 3)), torch.randint(3, (8,))
        optimizer = create_optimizer(name, model, lr=0.1, **options)
        for _ in range(4):
            optimizer.step(lambda model=model, tokens=tokens, y=y: F.cross_entropy(model(tokens), y))
        ends.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert torch.equal(*ends)


class Rounded(torch.autograd.Function):
    """A function of its own, with a backward rule and no forward-mode one."""

    @staticmethod
    def forward(context, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        return gradient


class Quantized(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Rounded.apply(super().forward(x))


def test_forward_mode_names_the_module_that_has_no_rule() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), Quantized(4, 2)), torch.randn(5, 4)
    before = copy.deepcopy(model.state_dict())
    optimizer = create_optimizer("forward-grad", model, lr=0.1)
    with pytest.raises(TypeError, match=r"forward-grad: Quantized has no forward-mode derivative .*zo-sgd"):
        optimizer.step(lambda: model(x).square().mean())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["zo-sgd", "forward-grad", "es-cma", "fo-sgd"])
def test_a_closure_that_calls_backward_is_told_so(name: str) -> None:
    model, x = nn.Linear(4, 2), torch.randn(5, 4)

    def closure() -> Tensor:
        loss = model(x).square().mean()
        loss.backward()
        return loss

    with pytest.raises(TypeError, match=r"closure: it calls backward\(\); expected only the loss"):
        create_optimizer(name, model, lr=0.1).step(closure)


@pytest.mark.parametrize(
    "name", ["fo-sgd", "forward-grad", "zo-sgd", "zo-adam", "zo-rge", "zo-per-example", "es-cma", "zo-svrg"]
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_an_embeddings_padding_stays_as_torch_promises(name: str) -> None:
    words, kinds = torch.tensor([[1, 2, 0, 0], [3, 0, 0, 0]]), torch.tensor([0, 1])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4, padding_idx=0), nn.Flatten(), nn.Linear(16, 2))
    before = model[0].weight.detach().clone()
    optimizer = create_optimizer(name, model, lr=0.01, queries=4)
    for _ in range(3):
        optimizer.step(
            lambda: F.cross_entropy(model(words), kinds, reduction="none" if optimizer.per_example else "mean")
        )
    assert not model[0].weight[0].any()
    assert (model[0].weight[1:4] != before[1:4]).any(1).all()


def test_what_is_no_dense_tensor_or_shares_memory_is_refused() -> None:
    sparse = nn.Parameter(torch.eye(3).to_sparse())
    with pytest.raises(TypeError, match="layout sparse_coo; expected a dense tensor"):
        create_optimizer("zo-sgd", [sparse], lr=0.1)

    class Own(nn.Parameter): ...

    shared = torch.zeros(4)
    with pytest.raises(ValueError, match="shares memory with another one"):
        create_optimizer("zo-sgd", [Own(shared), Own(shared[:2])], lr=0.1)


def test_lazy_and_expanded_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match=r"1\.weight has no shape yet, .* run the module once"):
        create_optimizer("zo-sgd", nn.Sequential(nn.Linear(2, 3), nn.LazyLinear(1)), lr=0.1)
    expanded = nn.Parameter(torch.ones(1, 3).expand(2, 3))
    with pytest.raises(TypeError, match="a parameter is expanded"):
        create_optimizer("zo-sgd", [expanded], lr=0.1)


@pytest.mark.parametrize("name", ["zo-sgd", "forward-grad", "zo-cge"])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_padding_vector_that_another_layer_reads_is_trained(name: str) -> None:
    """Of a weight tied to a head the row has a gradient through the head."""
    words, kinds = torch.tensor([[1, 2], [3, 0]]), torch.tensor([0, 4])
    torch.manual_seed(0)
    embedding, head = nn.Embedding(6, 4, padding_idx=0), nn.Linear(4, 6, bias=False)
    head.weight = embedding.weight
    model = nn.ModuleList([embedding, head])
    optimizer = create_optimizer(name, model, lr=0.1, queries=24)
    optimizer.step(lambda: F.cross_entropy(head(embedding(words).mean(1)), kinds))
    assert embedding.weight[0].any()


@pytest.mark.parametrize("name", ["fo-sgd", "zo-sgd"])
def test_an_embedding_that_shortens_its_vectors_is_refused(name: str) -> None:
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=0.5), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(TypeError, match=r"0 has max_norm=0\.5, by which a forward pass shortens"):
        create_optimizer(name, model, lr=0.1)
    model[0].requires_grad_(False)
    create_optimizer(name, model, lr=0.1)


def test_a_group_that_is_to_be_maximised_later_is_refused_then_and_by_tune() -> None:
    model, x = nn.Linear(3, 1), torch.randn(5, 3)
    optimizer = create_optimizer("zo-sgd-conserve", model, lr=0.1)
    optimizer.step(lambda: model(x).square().mean())
    optimizer.param_groups[0]["maximize"] = True
    with pytest.raises(ValueError, match="maximize=True of a group"):
        optimizer.step(lambda: model(x).square().mean())
    with pytest.raises(ConfigError, match="maximize=True: tune looks for the smallest loss"):
        tune(lambda: -model(x).square().mean(), [{"params": list(model.parameters()), "maximize": True}], "zo-sgd")
