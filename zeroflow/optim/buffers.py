"""A model's buffers during the evaluations of a step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from zeroflow.optim.executor import Numbers

Place = tuple[nn.Module, str]
"""A module and the name of a buffer of it."""


Still = set[tuple[int, str]]
"""Keys of buffers that are known not to move."""


LARGE = 2**20
"""Numbers of a buffer that is refused to move once it was seen still: a table or a quantised weight, not a statistic."""


SAMPLED = 1024
"""Numbers of a large buffer that are looked at to see whether it moves."""


class _AtRest:
    """Buffers that were seen still, however many: their values are compared all at once.

    By value: version counters tell neither of kernels that move statistics behind them nor of ``.data`` and numpy.
    """

    def __init__(self, ones: Sequence[tuple[Place, Tensor]]) -> None:
        self._groups = _grouped(ones)

    def __iter__(self) -> Iterator[tuple[Place, Tensor, Tensor]]:
        """Places, tensors and the values that they had."""
        for group, before in self._groups:
            parts = torch.split(before, [tensor.numel() for _, tensor in group])
            yield from ((p, tensor, part.view(tensor.shape)) for (p, tensor), part in zip(group, parts, strict=True))

    @property
    def disturbed(self) -> bool:
        """Whether any may have moved."""
        replaced = any(_at(place) is not tensor for group, _ in self._groups for place, tensor in group)
        return replaced or not all(torch.equal(_together(group), before) for group, before in self._groups)


class _Samples:
    """Some numbers of buffers that cannot be put back, compared all at once."""

    def __init__(self, ones: Sequence[tuple[Place, Tensor]]) -> None:
        self._groups = _grouped([(place, some) for place, tensor in ones if (some := _sample(tensor)) is not None])

    @property
    def moved(self) -> Place | None:
        """The place of one that has moved; None: none has."""
        for group, before in self._groups:
            # By bytes: a number that is none equals itself.
            changed = _together(group).view(torch.uint8) != before.view(torch.uint8)
            if changed.any():
                parts = torch.split(changed, [some.numel() * some.element_size() for _, some in group])
                return next(place for (place, _), part in zip(group, parts, strict=True) if part.any())
        return None


def _grouped(ones: Sequence[tuple[Place, Tensor]]) -> list[tuple[list[tuple[Place, Tensor]], Tensor]]:
    """Those of one dtype and device, and the values that they have now, one behind the other."""
    groups: dict[tuple[torch.dtype, torch.device], list[tuple[Place, Tensor]]] = {}
    for place, tensor in ones:
        groups.setdefault((tensor.dtype, tensor.device), []).append((place, tensor))
    return [(group, _together(group)) for group in groups.values()]


def _together(group: Sequence[tuple[Place, Tensor]]) -> Tensor:
    with torch.no_grad():
        return torch.cat([tensor.reshape(-1) for _, tensor in group])


class Buffers:
    """A model's buffers, such as batch norm's statistics: restored after every evaluation, updated once a step.

    Modules move them in place or put another tensor in their place. Most never change. Those that did not change in one step
    are only looked at in the steps after it, all together, until they do change.
    One that was None, or changes its shape, is put in place whole.

    Args:
        places: of all buffers, of modules in training mode and in evaluation mode, in which few move (an observer's).
        still: those known not to change, the same in all processes; kept by the caller from step to step.
        alone: whether no other process, and no log, has to know what moves. Otherwise small buffers always take part.

    Attributes:
        settled: whether their values after this step are known.
    """

    def __init__(self, places: Sequence[Place], still: Still | None = None, *, alone: bool = True) -> None:
        self._still, self._alone = set() if still is None else still, alone
        # Others have to know how many numbers to expect: always those of modules in training mode.
        looked_at = [place for place in places if alone or place[0].training]
        there = [(p, tensor) for p in looked_at if (tensor := _at(p)) is not None and _can_follow(tensor)]
        # What others have to know is numbers, of which a place without a tensor has none.
        self._empty = [p for p in looked_at if alone and p[0].training and _at(p) is None]
        self._tensors = [(place, tensor) for place, tensor in there if _key(place) not in self._still]
        resting = [one for one in there if _key(one[0]) in self._still]
        others = [] if alone else [p for p in places if not p[0].training]
        resting += [(p, tensor) for p in others if (tensor := _at(p)) is not None and _can_follow(tensor)]
        self._rest = _AtRest([one for one in resting if one[1].numel() <= LARGE])
        fixed = [one for one in resting if one[1].numel() > LARGE]
        fixed += [(p, t) for p in places if (t := _at(p)) is not None and not _can_follow(t)]
        self._fixed = [(place, tensor, _version(tensor)) for place, tensor in fixed]
        self._samples = _Samples(fixed)
        self._seen = self._seen_moving = False  # in an evaluation of this step
        self._after: list[tuple[Tensor, Tensor]] = []
        self._moved: list[bool] = []
        self._others: dict[Place, Tensor] = {}  # new tensors of another kind than was there
        self.settled = not self._tensors and not self._empty

    @property
    def seen_still(self) -> bool:
        """Whether an evaluation in this process changed none."""
        return self._seen and not self._seen_moving

    @property
    def still(self) -> Numbers:
        """The ``numbers`` of buffers that did not move."""
        return (0.0,) * len(self._tensors)

    @property
    def width(self) -> int:
        """How many ``numbers`` there are at most."""
        return len(self._tensors) + sum(len(_real(t)) for _, t in self._tensors)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Restore buffers that change inside.

        Raises:
            ValueError: one of a module in evaluation mode changes, of which other processes or a log would have to know; or one
                that cannot be followed.
        """
        before = [(place, tensor, tensor.clone()) for place, tensor in self._tensors]
        moved = False
        try:
            yield
            moved = bool(self._found_others(before)) or any(_changed(*one) for one in before)
        finally:
            self._restore(before)
            woken = self._woken()
        self._seen, self._seen_moving = True, self._seen_moving or moved or bool(woken)
        self._check_fixed()

    def _check_fixed(self) -> None:
        for (module, name), tensor, before in self._fixed:
            now = _at((module, name))
            if now is not tensor:
                module._buffers[name] = tensor
            if _version(tensor) != before or (now is not None and now is not tensor and not _equal(now, tensor)):
                _refuse_moved((module, name))

    def check_written(self) -> None:
        """Look for what was written past the versions of buffers that cannot be put back; once a step, at theta.

        Raises:
            ValueError: there is some.
        """
        if (place := self._samples.moved) is not None:
            _refuse_moved(place)

    def _woken(self) -> list[tuple[Place, Tensor]]:
        """Put back what an evaluation has moved of those at rest, and let them take part from now on; which these are."""
        if not self._rest.disturbed:
            return []
        before = list(self._rest)
        try:
            kinds = self._found_others(before)
            found = [
                (place, tensor) for place, tensor, values in before if place in kinds or _changed(place, tensor, values)
            ]
        finally:
            restore(before)
        if found and not self._alone:
            (module, name), _ = found[0]
            raise ValueError(
                f"buffer {name!r} of {type(module).__name__} moves in an evaluation, and its module is in evaluation mode: "
                "neither a log nor other processes follow it then; put the module in training mode or keep the buffer still"
            )
        if found:
            self._still.difference_update(_key(place) for place, _ in found)
            self._tensors += found
            self._rest = _AtRest([(place, tensor) for place, tensor, _ in before if place not in dict(found)])
            self.settled = False
        return found

    @contextmanager
    def remembered(self) -> Iterator[None]:
        """Restore buffers that change inside, and record their new values."""
        before = [(place, tensor, tensor.clone()) for place, tensor in self._tensors]
        try:
            yield
            self._others = {place: tensor.clone() for place, tensor in self._found_others(before).items()}
            alike = [place not in self._others for place, _, _ in before]
            self._after = [
                (tensor, _now(place, tensor).clone() if same else values)
                for (place, tensor, values), same in zip(before, alike, strict=True)
            ]
            self._moved = [same and _changed(*one) for one, same in zip(before, alike, strict=True)]
        finally:
            self._restore(before)

    def _found_others(self, before: Sequence[tuple[Place, Tensor, Tensor]]) -> dict[Place, Tensor]:
        """Tensors of another kind than what was in their place.

        Raises:
            ValueError: other processes or a log would have to know of it.
        """
        found = {place: now for place in self._empty if (now := _at(place)) is not None}
        for place, tensor, values in before:
            now = _at(place)
            if now is not None and (_now(place, tensor) is not now or now.shape != values.shape):
                found[place] = now
                if not self._alone:
                    raise ValueError(
                        f"buffer {place[1]!r} of {type(place[0]).__name__} goes from shape {tuple(values.shape)} to "
                        f"{tuple(now.shape)} in an evaluation, which neither a log nor other processes can follow; keep its shape"
                    )
        return found

    def _restore(self, before: Sequence[tuple[Place, Tensor, Tensor]]) -> None:
        restore(before)
        for module, name in self._empty:
            module._buffers[name] = None

    def numbers(self, share: float, first: bool) -> Numbers:
        """The recorded values, to be summed over shards for ``take``: which ones changed, then all values.

        Args:
            share: this shard's share of the mini-batch.
            first: whether integers are taken from this shard.
        """
        weights = [share if not _integral(tensor) else float(first) for tensor, _ in self._after]
        values = [(_real(after) * weight).tolist() for (_, after), weight in zip(self._after, weights, strict=True)]
        return (*map(float, self._moved), *itertools.chain.from_iterable(values))

    def take(self, numbers: Sequence[float]) -> bool:
        """Record the sum over all shards; returns whether anything changed."""
        moved, values = numbers[: len(self._tensors)], torch.tensor(numbers[len(self._tensors) :], dtype=torch.float64)
        self._after, self.settled, place = [], True, 0
        for (place_of, tensor), flag in zip(self._tensors, moved, strict=True):
            size = len(_real(tensor))
            if flag:
                after = torch.empty_like(tensor, memory_format=torch.contiguous_format)
                (torch.view_as_real(after) if after.is_complex() else after).view(-1).copy_(
                    values[place : place + size]
                )
                self._after.append((tensor, after))
            elif place_of not in self._others and (self._alone or tensor.numel() > LARGE):
                self._still.add(_key(place_of))
            place += size
        return bool(self._after or self._others)

    def release(self) -> None:
        """Set the buffers to the recorded values."""
        for tensor, values in self._after:
            _write(tensor, values)
        for (module, name), tensor in self._others.items():
            module._buffers[name] = tensor


def places_of(module: nn.Module | None) -> list[Place]:
    """All buffers of a module and of those in it."""
    parts = () if module is None else module.modules()
    return [(m, name) for m in parts for name in m._buffers.keys()]  # noqa: SIM118 (a scripted module's are no dictionary)


def _at(place: Place) -> Tensor | None:
    """The tensor in a place; a scripted module's buffers are no dictionary."""
    module, name = place
    return module._buffers[name] if name in module._buffers else None  # noqa: SIM401


def _can_follow(tensor: Tensor) -> bool:
    """Whether its values can be compared and written: not those of expanded, sparse, quantised and such tensors."""
    return not _is_strange(tensor) and all(
        stride or size <= 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def _is_strange(tensor: Tensor) -> bool:
    kinds = tensor.is_quantized or tensor.is_meta or tensor.is_nested or tensor.is_conj()
    return kinds or tensor.layout is not torch.strided


def _version(tensor: Tensor) -> int:
    """Changes when a tensor is written to, other than by ``.data`` and numpy."""
    return 0 if tensor.is_inference() else tensor._version


def _sample(tensor: Tensor) -> Tensor | None:
    """A view of some of its numbers ``[n]``; None where that cannot be had."""
    if _is_strange(tensor) or not tensor.numel():
        return None
    seen = tensor.detach()
    if not seen.is_contiguous():
        for dimension, stride in enumerate(tensor.stride()):
            seen = seen if stride else seen.narrow(dimension, 0, 1)  # an expanded one holds these numbers alone
        seen = seen.permute(
            [dimension for _, dimension in sorted((-stride, d) for d, stride in enumerate(seen.stride()))]
        )
    return seen.view(-1)[:: max(1, seen.numel() // SAMPLED)] if seen.is_contiguous() else None


def _refuse_moved(place: Place) -> None:
    module, name = place
    kind = "" if (tensor := _at(place)) is None else f", {tuple(tensor.shape)},"
    raise ValueError(
        f"buffer {name!r} of {type(module).__name__}{kind} begins to move: it is too large to be put back after every evaluation, "
        "or of a kind that cannot be; keep it still, or write it outside of the closure"
    )


def _equal(first: Tensor, second: Tensor) -> bool:
    try:
        return torch.equal(first, second)
    except (RuntimeError, NotImplementedError):  # sparse ones cannot be compared
        return False


def _key(place: Place) -> tuple[int, str]:
    return id(place[0]), place[1]


def _now(place: Place, tensor: Tensor) -> Tensor:
    """The tensor that is in a place now, if it is one of the same kind."""
    found = _at(place)
    same = found is not None and found.shape == tensor.shape and found.dtype == tensor.dtype
    return found if found is not None and same else tensor


def _changed(place: Place, tensor: Tensor, values: Tensor) -> bool:
    now = _now(place, tensor)
    if now.shape != values.shape:
        return True  # it was resized
    return not torch.equal(now, values) and not bool(((now == values) | ((now != now) & (values != values))).all())


def restore(before: Sequence[tuple[Place, Tensor, Tensor]]) -> None:
    """Put tensors back into their places, with the values that they had."""
    for (module, name), tensor, values in before:
        module._buffers[name] = tensor
        _write(tensor, values)


def _write(tensor: Tensor, values: Tensor) -> None:
    # Nobody else may write to a tensor that was made in inference mode.
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        if tensor.shape != values.shape:
            tensor.resize_(values.shape)
        tensor.detach().copy_(values)


def _integral(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _real(tensor: Tensor) -> Tensor:
    """A tensor's real numbers, float64 ``[n]`` on the CPU."""
    real = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return real.reshape(-1).to("cpu", torch.float64)
