"""Read weights from files as found in practice: sharded, in a container, under a prefix, with a head, in half precision.

A file fits a headless model as it is, or by timm's own conversion for that model (another image size, other input channels,
original DINOv2, MAE or CLIP names), or not at all: no weight that a feature depends on is silently skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import sys
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zeroflow.errors import ConfigError, all_at_once

State = dict[str, Tensor]
"""Tensors by name."""

_EMA = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema")
_CONTAINERS = (*_EMA, "state_dict", "model_state_dict", "model", "teacher", "student")
_LEFTOVER = re.compile(r"mask_token$|decoder_")
"""Remains of masked pretraining: the mask token, and MAE's decoder."""


class Fit(NamedTuple):
    """Comparison of weights with a model.

    Attributes:
        state: weights that the model takes.
        missing: names that the model has and the file lacks.
        unexpected: names that the file has and the model lacks.
        misshapen: names with their actual and expected shapes.
    """

    state: State
    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]

    @property
    def problems(self) -> int:
        """Names that do not fit; 0: the state can be loaded."""
        return len(self.missing) + len(self.unexpected) + len(self.misshapen)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a file's weights into a headless model; on an error the model stays as it was.

    Names may have any prefix (``module.``, ``model.backbone.``): the one with most of the model's names is taken, if tied that
    of an EMA or a teacher, then the shortest. Other prefixes belong to other modules. Also ignored: heads of any name, remains
    of masked pretraining (``mask_token``, ``decoder_*``), and buffers that the model computes itself.

    Args:
        model: a timm model with ``num_classes=0``, or any module without its head.
        path: see ``read_weights``.

    Raises:
        ConfigError: the file cannot be read, a weight is an integer or not finite, or one is missing, unknown or of another
            shape.
    """
    weights = read_weights(path)
    prefix = _prefix(weights, model)
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    best = _fit(model, own)
    if best.problems:
        for converted in _converted(model, (own, _headless(model, own), weights)):
            best = min(best, _fit(model, converted), key=lambda fit: fit.problems)
            if not best.problems:
                break
        else:
            raise _misfit(path, model, best, prefix, weights)
    wanted = _wanted(model)
    if whole := [
        n for n, value in best.state.items() if wanted[n].is_floating_point() and not value.is_floating_point()
    ]:
        raise ConfigError(f"checkpoint {path}: integers in place of weights, as of a quantized model: {_few(whole)}")
    if broken := [name for name, value in best.state.items() if not value.isfinite().all()]:
        raise ConfigError(f"checkpoint {path}: weights that are not finite: {_few(broken)}")
    model.load_state_dict(best.state, strict=False)


def read_weights(path: Path) -> State:
    """A file's tensors by name; floating-point tensors become float32.

    Of a training checkpoint only the weights are read. Of several sets, EMA weights are preferred (``state_dict_ema``,
    ``model_ema``, ``ema``), as in timm; then ``state_dict``, ``model_state_dict``, ``model``, ``teacher``, ``student``; then
    the set with most tensors.

    Args:
        path: ``.safetensors``; an index of shards (``*.safetensors.index.json``, ``*.bin.index.json``); anything else is
            read as a file of ``torch.save`` (``.pt``, ``.pth``, ``.bin``, ``.ckpt``, ``.tar``), without running code in it.

    Raises:
        ConfigError: the file or one of its shards is missing or cannot be read, or contains no tensors, or one that is complex
            or has no values of its own (sparse, quantized, on the meta device).
    """
    weights = _sharded(path) if path.name.endswith(".index.json") else _whole(path)
    if not weights:
        raise ConfigError(f"checkpoint {path}: cannot be used: no tensors by name in it; expected a model's state_dict")
    if unusual := [name for name, value in weights.items() if not _is_usual(value)]:
        raise ConfigError(f"checkpoint {path}: cannot be used: tensors that are no plain real numbers: {_few(unusual)}")
    return {name: _plain(value) for name, value in weights.items()}


def _is_usual(value: Tensor) -> bool:
    return value.layout is torch.strided and not (value.is_complex() or value.is_quantized or value.is_meta)


def _plain(value: Tensor) -> Tensor:
    return value.detach().float() if value.is_floating_point() else value.detach()


# Files


def _whole(path: Path) -> State:
    """The weights in one file."""
    import safetensors.torch

    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        _check_sums(path)
        # Namespace, which only holds what argparse has read, is beside the weights of timm's and MAE's checkpoints.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return _unwrapped(torch.load(path, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        raise ConfigError(f"checkpoint {path}: cannot be read: {_unsafe(path) or _line(error)}") from error
    except Exception as error:
        kind = "safetensors" if path.suffix == ".safetensors" else "a file of torch.save"
        reason = f"KeyError: {error}" if isinstance(error, KeyError) else _line(error)
        raise ConfigError(f"checkpoint {path}: cannot be read as {kind}: {reason}") from error


def _check_sums(path: Path) -> None:
    """Compare the parts of a file of ``torch.save`` with its checksums, which ``torch.load`` does not.

    Raises:
        ValueError: one differs.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if broken := file.testzip():
                raise ValueError(f"damaged: {broken} in it is not what its checksum says")


def _unsafe(path: Path) -> str:
    """The objects in a file that ``weights_only`` refuses, as a message; empty if the problem is another."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            asked = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:
        return ""
    return f"it asks for {_few(asked)}, which could run code; save the model's state_dict() alone" if asked else ""


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _sharded(index: Path) -> State:
    """All shards that an index names by ``weight_map``: name of a tensor -> file beside the index."""
    try:
        places = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(places.values()))
        outside = [shard for shard in shards if PurePath(shard).is_absolute() or ".." in PurePath(shard).parts]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"checkpoint {index}: cannot be read as an index of shards: {type(error).__name__}: {_line(error)}; "
            'expected {"weight_map": {NAME: SHARD, ...}}'
        ) from error
    if outside:  # by name: the hub's cache links to files elsewhere
        raise ConfigError(f"checkpoint {index}: shards outside its folder: {_few(outside)}")
    if absent := [shard for shard in shards if not (index.parent / shard).is_file()]:
        raise ConfigError(f"checkpoint {index}: {len(absent)} of {len(shards)} shards are not there: {_few(absent)}")
    contents = {shard: _whole(index.parent / shard) for shard in shards}
    if lost := [f"{name} in {shard}" for name, shard in places.items() if name not in contents[shard]]:
        raise ConfigError(f"checkpoint {index}: tensors that are not in their shard: {_few(lost)}")
    return {name: contents[shard][name] for name, shard in places.items()}


def _unwrapped(content: object) -> State:
    """The weights in what ``torch.load`` gave: see ``read_weights``."""
    if not isinstance(content, Mapping):
        return {}
    for key in _CONTAINERS:
        found = _unwrapped(content.get(key))
        if any(value.ndim for value in found.values()):  # of EMA without names of its weights only the decay is seen
            return found
    named = {name: value for name, value in content.items() if isinstance(name, str)}
    inner = [_unwrapped(value) for name, value in named.items() if name not in _CONTAINERS and "optim" not in name]
    return max([{n: v for n, v in named.items() if isinstance(v, Tensor)}, *inner], key=len)


# Names


def _prefix(weights: State, model: nn.Module) -> str:
    """The prefix with most of the model's names; the common prefix of all weights if none has at least half of them."""
    wanted, found = _wanted(model), Counter[str]()
    for name in weights:
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
        found.update(name[:start] for start in starts if name[start:] in wanted)
    best = max(found, key=lambda prefix: (found[prefix], _is_average(prefix), -len(prefix)), default="")
    if 2 * found[best] >= len(wanted):
        return best
    shared = os.path.commonprefix(list(weights))  # noqa: RUF071 (names, not paths)
    return shared[: shared.rfind(".") + 1]


def _is_average(prefix: str) -> bool:
    return not {"ema", "teacher"}.isdisjoint(re.split(r"[._]", prefix))


def _wanted(model: nn.Module) -> State:
    """The tensors that a model saves."""
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


def _headless(model: nn.Module, weights: State) -> State:
    """Weights without heads, remains of pretraining, and buffers that the model computes itself."""
    wanted, heads = _wanted(model), _heads(model, weights)
    computed = {name for name, _ in model.named_buffers()} - wanted.keys()

    def ignored(name: str) -> bool:
        return name in computed or name.startswith(heads) or _LEFTOVER.match(name) is not None

    return {name: value for name, value in weights.items() if name in wanted or not ignored(name)}


def _heads(model: nn.Module, weights: State) -> tuple[str, ...]:
    """Modules that only a head can be: ``("head.", "fc.")``.

    A head is timm's classifier, or a module that the model lacks, at the top level or next to norms only (``head.norm`` and
    ``head.fc``), that takes features ``[N, d]``: its weight is a matrix, and it has no tensor of more dimensions. One whose name
    differs from the model's own by a number only (``layer5``, ``fc2``) is another layer.
    """
    wanted = _wanted(model)
    modules = {step for name in wanted for step in _steps(name)}
    with_matrices = {step for name, value in wanted.items() if value.ndim > 1 for step in _steps(name)}
    numbered = {re.sub(r"\d+", "#", step) for step in modules}
    groups: dict[str, list[str]] = defaultdict(list)
    for name in weights:
        steps = _steps(name)
        new = next((step for step in steps if step not in modules), None)
        if new is not None and steps[0] not in with_matrices:
            groups[new].append(name)

    def is_head(step: str, names: list[str]) -> bool:
        matrix = any(weights[name].ndim == 2 and "weight" in name for name in names)
        further = re.search(r"\d", step) is not None and re.sub(r"\d+", "#", step) in numbered
        return matrix and not further and all(weights[name].ndim <= 2 for name in names)

    return (*_listed(model, "classifier"), *(step for step, names in groups.items() if is_head(step, names)))


def _steps(name: str) -> list[str]:
    """``a.b.weight`` -> ``["a.", "a.b."]``."""
    return [name[: dot.end()] for dot in re.finditer(r"\.", name)]


def _listed(model: nn.Module, key: str) -> tuple[str, ...]:
    """Modules that a model's timm configuration lists under a key (``first_conv``, ``classifier``), with a dot appended."""
    settings = getattr(model, "pretrained_cfg", None)
    named = settings.get(key) if isinstance(settings, Mapping) else None
    return tuple(f"{name}." for name in ([named] if isinstance(named, str) else named or ()))


# Fitting


def _fit(model: nn.Module, weights: State) -> Fit:
    """Compare weights with those of the model."""
    wanted, weights = _wanted(model), _headless(model, weights)
    state = {name: value for name, value in weights.items() if name in wanted and value.shape == wanted[name].shape}
    # A tensor that the model has under two names is often saved under one; counts of batches change no feature.
    given = {id(wanted[name]) for name in weights if name in wanted}
    missing = [n for n, value in wanted.items() if id(value) not in given and not n.endswith("num_batches_tracked")]
    misshapen = [
        f"{name} {list(value.shape)}, expected {list(wanted[name].shape)}"
        for name, value in weights.items()
        if name in wanted and name not in state
    ]
    return Fit(state, missing, [name for name in weights if name not in wanted], misshapen)


def _converted(model: nn.Module, sources: tuple[State, ...]) -> Iterator[State]:
    """The weights with the model's input channels, first under their own names, then converted by timm's functions for it."""
    conversions: list[Callable[[dict[str, Any], nn.Module], State]] = [lambda state, model: state, *_timms(model)]
    for convert in conversions:
        for source in sources:
            try:  # with a copy, for conversions take entries out
                converted = _with_channels(model, convert(dict(source), model))
            except Exception:
                continue  # the source has another layout than the conversion expects
            yield converted


def _timms(model: nn.Module) -> list[Callable[[dict[str, Any], nn.Module], State]]:
    """``checkpoint_filter_fn`` of the module that builds the model (hybrids have their own), and of its class's module."""
    from timm.models import is_model, model_entrypoint

    homes = [kind.__module__ for kind in type(model).__mro__]
    settings = getattr(model, "pretrained_cfg", None)
    name = settings.get("architecture") if isinstance(settings, Mapping) else None
    if name and is_model(name):
        homes.insert(0, model_entrypoint(name).__module__)
    found = [getattr(sys.modules.get(home), "checkpoint_filter_fn", None) for home in dict.fromkeys(homes)]
    return [conversion for conversion in found if conversion is not None]


def _with_channels(model: nn.Module, weights: State) -> State:
    """Weights whose first convolutions take the model's input channels, by timm's rule."""
    from timm.models import adapt_input_conv

    wanted, weights = _wanted(model), dict(weights)
    first = next((f"{name}." for name, module in model.named_modules() if isinstance(module, nn.Conv2d)), None)
    for conv in _listed(model, "first_conv") or ((first,) if first else ()):
        name = f"{conv}weight"
        have, want = weights.get(name), wanted.get(name)
        if have is None or want is None or have.ndim != 4 or have.shape[1] == want.shape[1]:
            continue
        channels = int(getattr(model, "in_chans", want.shape[1]))
        # Of a file for other than colour images its own number of channels is the one to start from.
        base = {} if have.shape[1] % 3 == 0 else {"base_chans": have.shape[1]}
        weights[name] = adapt_input_conv(channels, have, **base)
    return weights


# Messages


_FAMILIES = {
    ".embeddings.patch_embeddings.": "of Hugging Face's transformers: timm has most of them under names of its own, at the hub",
    ".layers.0.blocks.0.attn.qkv.": "of a Swin transformer, such as swin_tiny_patch4_window7_224",
    ".blocks.0.attn.qkv.": "of a vision transformer, such as vit_base_patch16_224",
    ".layer1.0.conv1.": "of a ResNet, such as resnet50",
    ".stages.0.blocks.0.conv_dw.": "of a ConvNeXt, such as convnext_tiny",
}
"""Parts of names that reveal an architecture."""


def _misfit(path: Path, model: nn.Module, fit: Fit, prefix: str, weights: State) -> ConfigError:
    settings, wanted = getattr(model, "pretrained_cfg", None), len(_wanted(model))
    name = settings.get("architecture") if isinstance(settings, Mapping) else None
    lines = [f"of the file's names those under {prefix!r} are taken"] if prefix else []
    lines += [
        f"{len(names)} {what}: {_few(names, shown=3, by='; ' if names is fit.misshapen else ', ')}"
        for names, what in (
            (fit.missing, f"of the model's {wanted} weights missing"),
            (fit.unexpected, "that the model does not have"),
            (fit.misshapen, "of another shape"),
        )
        if names
    ]
    title = f"checkpoint {path}: does not fit the model {name or type(model).__name__}"
    return all_at_once(title, [*lines, _advice(path, model, fit, weights)])


def _advice(path: Path, model: nn.Module, fit: Fit, weights: State) -> str:
    """What the user should do instead."""
    if re.search(r"-of-\d+\.\w+$", path.name):
        return "the file is one shard of several: name the index beside it (*.index.json)"
    wanted = _wanted(model)
    for mark, family in _FAMILIES.items():
        if any(mark in f".{name}" for name in weights) and not any(mark in f".{name}" for name in wanted):
            return f"the names in the file are {family}; set backbone to the model that the file is of"
    if not fit.missing and not fit.unexpected:
        return "the file is of the same architecture in another size: set backbone to that size's"
    if 2 * len(fit.missing) < len(wanted):
        return "the file is of a relative of the model: set backbone to the variant that the file is of"
    return f"expected names such as {_few(list(wanted), shown=2)}: save timm's model.state_dict(), or set backbone to the file's"


def _few(names: list[str], *, shown: int = 10, by: str = ", ") -> str:
    return by.join([*names[:shown], "..."] if len(names) > shown else names)
