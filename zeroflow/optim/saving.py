"""Save and restore an optimizer: its own state is stored as bytes in the first parameter group of a state dict.

Every way of saving optimizers keeps parameter groups; ``torch.distributed.checkpoint`` drops all other keys, and loads tensors
and dicts only where it has seen the same ones before.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from zeroflow.optim.asking import Candidate, ToldLosses
from zeroflow.optim.buffers import Still
from zeroflow.optim.composition import Composition
from zeroflow.optim.directions.direction import FULL_FORWARDS
from zeroflow.optim.flat import FlatParameters
from zeroflow.optim.surroundings import undisturbed

OWN = "zeroflow"
"""Key in the first group; in the groups of an optimizer itself it is empty, to reserve the place."""


def packed(own: Mapping[str, Any]) -> bytes:
    """Serialise numbers and tensors."""
    file = io.BytesIO()
    torch.save(dict(own), file)
    return file.getvalue()


def unpacked(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The unpacked state, and torch's own part of the state dict.

    Raises:
        ValueError: it is not the state of a zeroflow optimizer.
    """
    groups = [dict(group) for group in state_dict["param_groups"]]
    content = groups[0].pop(OWN, b"") if groups else b""
    own = state_dict.get(OWN)  # earlier versions had it beside torch's keys
    if content:
        own = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if own is None:
        raise ValueError("state_dict: expected one of a zeroflow optimizer (key 'zeroflow'), found only torch's keys")
    return own, {"state": state_dict["state"], "param_groups": groups}


class Saving(torch.optim.Optimizer):
    """The part of ``ThreeStepOptimizer`` that saves and restores it."""

    composition: Composition
    flat: FlatParameters
    inner: torch.optim.Optimizer
    steps: int
    forwards: int
    equivalents: int
    skipped: int
    seed: int
    queries: int
    _memory: dict[str, Any]
    _adapted: dict[str, Any]
    _mask: Tensor | None
    _still: Still
    _told: ToldLosses | None
    _candidates: list[Candidate]
    _rule: Callable[[], torch.optim.Optimizer]
    _load_moments: Callable[[Mapping[Any, Any] | None], None]
    _pull_state: Callable[[], None]
    _like_vector: Callable[[Any], Any]

    @property
    def full_forwards(self) -> int:
        """How many of the forward passes were made on closures of ``full``."""
        return int(self._memory.get(FULL_FORWARDS, 0))

    def state_dict(self) -> dict[str, Any]:
        """As in torch, with the counters that key the randomness and all other state: training resumes bit for bit.

        State that belongs to no single parameter is in the first group's ``"zeroflow"`` as bytes, since every way of saving
        optimizers keeps groups (``torch.distributed.checkpoint`` and others drop other keys).
        """
        rounded = self.flat.half is not None  # torch rounds moments to the parameters' precision
        # A rule around a rule, as Lookahead, has a state of its own.
        wraps = type(self.inner).state_dict is not torch.optim.Optimizer.state_dict
        own = {
            "steps": self.steps,
            "forwards": self.forwards,
            "equivalents": self.equivalents,
            "skipped": self.skipped,
            "seed": self.seed,
            "queries": self.queries,
            "size": self.flat.size,
            "kind": self.composition.kind,
            "layout": self._layout(),
            "memory": self._memory,
            "mask": self._mask,
            "estimator": self._adapted,
            "masters": self.flat.vector if rounded else None,
            "rule": self.inner.state_dict()["state"] if rounded or wraps else None,
            "told": self._told.rounds if self._told else None,
        }
        state = super().state_dict()
        state["param_groups"][0][OWN] = packed(own)
        return state

    @undisturbed
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As in torch. For half-precision parameters the state includes the float32 master copy.

        Raises:
            ValueError: the state belongs to another kind of optimizer, or to other parameters.
        """
        own, torchs = unpacked(state_dict)
        if own["size"] != self.flat.size:
            raise ValueError(f"state_dict: of {own['size']} trained components, this optimizer has {self.flat.size}")
        if own.get("kind", self.composition.kind) != self.composition.kind:  # earlier versions did not say
            raise ValueError(f"state_dict: of {own['kind']}; this optimizer is {self.composition.kind}")
        if own.get("layout", self._layout()) != self._layout():
            raise ValueError(
                "state_dict: of an optimizer whose parameters were in another order, or others: those with names (of a module, or as "
                "named_parameters()) are laid out by name, those without in the order they are given; build both alike"
            )
        super().load_state_dict(torchs)
        self.param_groups[0][OWN] = b""
        self.inner = self._rule()
        self._load_moments(own["rule"])
        self.steps, self.forwards, self.skipped = own["steps"], own["forwards"], own["skipped"]
        self.equivalents = own["equivalents"]
        self.seed, self.queries = own["seed"], own["queries"]
        self._memory = {k: self._like_vector(v) for k, v in copy.deepcopy(own["memory"]).items()}
        self._adapted = copy.deepcopy(own.get("estimator", {}))
        self._mask = None if own["mask"] is None else self._like_vector(own["mask"].clone())
        self._candidates, told = [], own.get("told")
        self._told = ToldLosses(told, self._names()) if told else None
        if self.flat.half is not None and own["masters"] is not None:
            self.flat.vector.copy_(own["masters"])
            self.flat.show()
        self._pull_state()

    def _layout(self) -> list[list[int]]:
        """Of each parameter in the vector its place in the order of the groups, and its shape."""
        every = [parameter for group in self.param_groups for parameter in group["params"]]
        places = {parameter: place for place, parameter in enumerate(every)}
        return [[places[parameter], *parameter.shape] for parameter in self.flat.parameters]

    def _names(self) -> list[str]:
        """Names of the parameters in the vector; numbers where they were given without names."""
        every = [parameter for group in self.param_groups for parameter in group["params"]]
        given = [name for group in self.param_groups for name in group.get("param_names", [])]
        names = dict(zip(every, given or map(str, range(len(every))), strict=True))
        return [names[parameter] for parameter in self.flat.parameters]

    def __getstate__(self) -> dict[str, Any]:
        # torch's own leaves out all that a step needs; a scheduler's patch of ``step`` must not come along.
        state = {key: value for key, value in self.__dict__.items() if key != "step"}
        return {**state, "_candidates": []}  # which are asked again

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._still = set()
        if "flat" in state:
            self.flat.bind()
