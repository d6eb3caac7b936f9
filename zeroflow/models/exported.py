"""A backbone as an exported ONNX graph, run by ONNX Runtime: no parameters, no autograd; the weights of adapters are inputs.

A plain transformer becomes two graphs, so that the part that no adapter changes is computed once for all evaluations of a
step: images -> ``Prefix``, and ``Prefix`` and adapters -> features. The inner width of adapters and the number of images are
dynamic. Any other backbone becomes one graph, images -> features.
"""

from __future__ import annotations

import functools
import hashlib
import io
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zeroflow.models.adapters import Adapter
from zeroflow.models.backbone import Backbone, BlockPass, OpaqueBackbone, Prefix
from zeroflow.models.factory import create_backbone
from zeroflow.models.timm_backbone import TransformerBackbone

_WEIGHTS = ("down", "down_bias", "up", "up_bias")
_INPUTS = ("hidden", "output", *_WEIGHTS, "scale")


class ExportedBackbone(OpaqueBackbone):
    """The graphs of ``export``, loaded into ONNX Runtime with torch's number of threads."""

    unseen_bytes = None

    def __init__(self, name: str, **arguments: Any) -> None:
        import onnxruntime

        graphs = export(name, tuple(arguments.items()))
        super().__init__(graphs.width, graphs.image_size, graphs.widths)
        self._digest = hashlib.sha256(graphs.front + graphs.rest).digest()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self._front, self._rest = (
            onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"]) if graph else None
            for graph in (graphs.front, graphs.rest)
        )

    def lacks(self, part: str) -> str | None:
        if part == "blocks" and not self.widths:
            return "its graph takes images alone: it is not that of a plain vision transformer"
        return None if part == "blocks" else super().lacks(part)

    def unseen_weights(self) -> dict[str, Tensor]:
        """A digest of all graphs, which contain all weights."""
        return {"graphs": torch.frombuffer(bytearray(self._digest), dtype=torch.uint8)}

    def prefix(self, images: Tensor) -> Prefix | Tensor:
        if self._rest is None:
            return images
        return Prefix(*self._run(self._front, {"images": images}))

    def forward(self, images: Tensor | Prefix, adapters: Iterable[nn.Module] | None = None) -> Tensor:
        if self._rest is None:
            assert isinstance(images, Tensor) and adapters is None, "its graph takes images alone"
            return self._run(self._front, {"images": images})[0]
        first = images if isinstance(images, Prefix) else self.prefix(images)
        given = (*first, *weights(adapters, self.depth, self.width))
        return self._run(self._rest, dict(zip(_INPUTS, given, strict=True)))[0]

    def _run(self, session: Any, given: Mapping[str, Tensor]) -> list[Tensor]:
        if torch.is_grad_enabled() and any(value.requires_grad for value in given.values()):
            raise RuntimeError("an exported graph has no derivative; evaluate it under torch.no_grad()")
        return [
            torch.from_numpy(out) for out in session.run(None, {name: x.detach().numpy() for name, x in given.items()})
        ]


def weights(adapters: Iterable[nn.Module] | None, depth: int, width: int) -> Sequence[Tensor]:
    """Adapters as inputs of the graph: down ``[depth, b, width]``, its bias, up ``[depth, width, b]``, its bias, scale ``[]``.

    None stands for adapters that add nothing.
    """
    if adapters is None:
        zeros = torch.zeros
        return zeros(depth, 1, width), zeros(depth, 1), zeros(depth, width, 1), zeros(depth, width), zeros(())
    stack: list[Any] = list(adapters)
    if not all(isinstance(adapter, Adapter) for adapter in stack):
        raise TypeError("an exported graph takes an Adapter for every block, nothing else")
    parts: Any = [(a.down.weight, a.down.bias, a.up.weight, a.up.bias) for a in stack]
    return *(torch.stack(part) for part in zip(*parts, strict=True)), torch.tensor(float(stack[0].scale))


class Graphs:
    """The graphs as bytes, ``rest`` empty where there is only one, and the shape of their backbone."""

    def __init__(self, backbone: Backbone) -> None:
        self.width, self.image_size = backbone.width, backbone.image_size
        images = torch.zeros(2, getattr(backbone, "channels", 3), self.image_size, self.image_size)
        if not isinstance(backbone, TransformerBackbone):
            self.widths: Sequence[int] = ()
            self.front, self.rest = _graph(backbone, [images], ["images"], ["features"], {}), b""
            return
        self.widths, depth = backbone.widths, backbone.depth
        self.front = _graph(_Front(backbone), [images], ["images"], ["hidden", "output"], {})
        adapters = [torch.zeros(depth, 2, self.width), torch.zeros(depth, 2)]
        adapters += [torch.zeros(depth, self.width, 2), torch.zeros(depth, self.width), torch.tensor(1.0)]
        inner = {"down": {1: "inner"}, "down_bias": {1: "inner"}, "up": {2: "inner"}}
        given = [*backbone.prefix(images), *adapters]
        self.rest = _graph(_Rest(backbone), given, list(_INPUTS), ["features"], inner)


@functools.lru_cache(maxsize=4)
def export(name: str, arguments: tuple[tuple[str, Any], ...]) -> Graphs:
    """Export a backbone; the arguments are those of ``create_backbone``."""
    return Graphs(create_backbone(name, **dict(arguments)))


class _Front(nn.Module):
    def __init__(self, backbone: TransformerBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(self.backbone.prefix(images))  # type: ignore[return-value]


class _Rest(_Front):
    def forward(self, hidden: Tensor, output: Tensor, *adapters: Tensor) -> Tensor:  # type: ignore[override]
        down, down_bias, up, up_bias, scale = adapters

        def adapted(number: int, block: BlockPass, tokens: Tensor) -> Tensor:
            hidden, output = block.halves(tokens)
            inner = torch.relu(F.linear(hidden, down[number], down_bias[number]))
            return block.added(output, scale * F.linear(inner, up[number], up_bias[number]))

        return self.backbone.stepped(Prefix(hidden, output), adapted)


def _graph(
    module: nn.Module, given: list[Tensor], inputs: list[str], outputs: list[str], more: dict[str, dict[int, str]]
) -> bytes:
    file: Any = io.BytesIO()
    axes: dict[str, Any] = {
        name: {0: "images"} for name in ("images", "hidden", "output", "features") if name in inputs + outputs
    }
    with warnings.catch_warnings(), torch.no_grad():
        # The newer exporter takes twenty times as long for the same graph.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            tuple(given),
            file,
            dynamo=False,
            opset_version=17,
            input_names=inputs,
            output_names=outputs,
            dynamic_axes=axes | more,
        )
    return bytes(file.getvalue())
