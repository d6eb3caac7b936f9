"""Mutated checkpoints: each gives the features of its tensors, or one refusal that names it."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import safetensors.torch
import torch
from mutations import Check, damaged, judged, numbers

from zeroflow.models.factory import create_backbone

KINDS = (
    "nan",
    "huge",
    "half",
    "bfloat",
    "double",
    "integer",
    "complex",
    "shape",
    "lost",
    "misspelt",
    "further",
    "prefix",
    "head",
    "empty",
    "int8",
    "strided",
)


def changed_state(state: dict[str, Any], random: Random) -> tuple[str, dict[Any, Any], dict[str, torch.Tensor] | None]:
    """A changed state, and the tensors that a model has to take from it; None: it must be refused."""
    name = random.choice([key for key in state if not key.startswith("head")])
    value, new = state[name], dict(state)

    def put(what: str, tensor: Any, fits: bool) -> tuple[str, dict[Any, Any], dict[str, torch.Tensor] | None]:
        new[name] = tensor
        return f"{name}: {what}", new, {**state, name: tensor.float()} if fits else None

    spoilt = value.clone()
    kind = random.choice(KINDS)
    if kind in ("nan", "huge"):
        spoilt = spoilt.double()
        spoilt.view(-1)[random.randrange(spoilt.numel())] = {
            "nan": random.choice((float("nan"), float("-inf"))),
            "huge": 1e300,
        }[kind]
        return put(kind, spoilt, False)
    if kind in ("half", "bfloat", "double"):
        dtype = {"half": torch.float16, "bfloat": torch.bfloat16, "double": torch.float64}[kind]
        new = {key: each.to(dtype) for key, each in state.items()}
        return kind, new, {key: each.float() for key, each in new.items()}
    if kind in ("integer", "int8"):
        return put(kind, (value * 100).to(torch.int64 if kind == "integer" else torch.int8), True)
    if kind == "complex":
        return put(kind, torch.complex(value, value), False)
    if kind == "shape":
        return put(kind, torch.cat([value, value]), False)
    if kind == "empty":
        return put(kind, value[:0], False)
    if kind == "strided":
        return put(kind, torch.stack([value, value], -1)[..., 0], True)
    if kind == "lost":
        del new[name]
        return f"{name}: lost", new, None
    if kind == "misspelt":
        new[name[:-1]] = new.pop(name)
        return f"{name}: misspelt", new, None
    if kind == "further":
        new["blocks.7.norm1.weight"] = torch.ones(32)
        return kind, new, None
    if kind == "prefix":
        prefix = random.choice(("module.", "model.backbone.", "encoder."))
        return prefix, {prefix + key: each for key, each in state.items()}, state
    new["head.weight"], new["head.bias"] = torch.ones(5, 32), torch.ones(5)
    return kind, new, state


def in_a_container(state: dict[Any, Any], random: Random) -> tuple[str, Any]:
    """A state as training scripts save it."""
    state = dict(state)
    others: dict[str, Any] = {
        "alone": state,
        "state_dict": {"state_dict": state, "epoch": 3, "optimizer": {"state": {0: {"momentum": torch.ones(3)}}}},
        "model": {"model": state, "args": None},
        "twice nested": {"checkpoint": {"model_state_dict": state}},
        "beside others": {**state, 3: torch.ones(2), "epoch": 4, "name": "x", "when": None},
    }
    kind = random.choice(list(others))
    return kind, others[kind]


@pytest.mark.parametrize("some", numbers(50))
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_mutated_checkpoint_gives_the_features_of_its_tensors_or_is_refused(
    suffix: str, some: range, tiny_vit: dict[str, Any], tmp_path: Path
) -> None:
    settings = {"name": tiny_vit["backbone"], "image_size": tiny_vit["image_size"], "checkpoint": "none"}
    original = create_backbone(**settings, seed=1).model.state_dict()
    images = torch.rand(2, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    by_hand = create_backbone(**settings)

    def one(random: Random, number: int) -> tuple[str, Check, str]:
        file = tmp_path / f"{number}{suffix}"
        what, state, expected = "", original, original
        bytes_changed = number % 3 == 0
        if not bytes_changed:
            what, state, expected = changed_state(original, random)
        if suffix == ".pt":
            kind, content = in_a_container(state, random)
            what = f"{what}, {kind}"
            torch.save(content, file)
        else:
            safetensors.torch.save_file({key: value.contiguous() for key, value in state.items()}, file)
        if bytes_changed:
            more, data = damaged(file.read_bytes(), random)
            what += more
            file.write_bytes(data)

        def check() -> str | None:
            backbone = create_backbone(**{**settings, "checkpoint": str(file)})
            wanted = expected
            if bytes_changed and suffix == ".safetensors":
                wanted = safetensors.torch.load_file(file)
            if wanted is None:
                return "accepted, expected a refusal"
            by_hand.model.load_state_dict(wanted)
            with torch.no_grad():
                found, right = backbone.model(images), by_hand.model(images)
            return None if torch.equal(found, right) and found.isfinite().all() else "other features"

        return what, check, file.name

    assert not (found := judged(f"checkpoint {suffix}", some, one)), "\n".join(found)
