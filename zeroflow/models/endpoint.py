"""A black box: a backbone that maps images to features and exposes nothing else.

It is any ``Features`` callable: a Python callable, itself or by its name ``module:attribute``, or an HTTP endpoint
(``HttpFeatures``).

The protocol of an endpoint: ``GET /`` returns JSON with ``backbone``, ``checkpoint``, ``image_size`` and ``width``; ``POST /``
takes a body of safetensors (a JSON header and binary tensors) with ``images`` ``[N, C, H, W]``, float32, and returns one with
``features`` ``[N, width]``, float32. Both require ``Authorization: Bearer TOKEN``. Status 503 or 429 means that the queue is
full.
"""

from __future__ import annotations

import http.client
import json
import os
import select
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import SplitResult, urlsplit

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from zeroflow.errors import ConfigError
from zeroflow.models.backbone import OpaqueBackbone, Prefix
from zeroflow.models.factory import EMBEDDED, default_image_size
from zeroflow.models.named import import_callable, is_name

TOKEN = "ZEROFLOW_ENDPOINT_TOKEN"
"""The environment variable that holds the token; it is stored nowhere."""

WAITS = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds to wait before each retry of a failed request."""


MOST_BYTES = 2**28
"""Size limit of a request's body; larger ones are split."""


class EndpointError(RuntimeError):
    """The black box gave no usable answer, after all tries."""


class Refused(EndpointError):
    """The endpoint rejects the request, so a retry is useless."""


def check_address(url: str) -> SplitResult:
    """Parse and check the address of an endpoint.

    Raises:
        ConfigError: it is not an HTTP address, or it contains credentials, which belong elsewhere.
    """
    try:
        parts = urlsplit(url)
        found = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        found = False
    if not found:
        raise ConfigError(
            f"endpoint={url!r}: expected an address such as http://127.0.0.1:8017/, or a callable as my_module:features"
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        plain = f"{parts.scheme}://{parts.hostname}"
        raise ConfigError(f"endpoint={plain!r}...: no user, password or query in an address; set a token in {TOKEN}")
    return parts


def valid_token(given: str | None = None) -> str | None:
    """The token, by default from the environment; None: there is none.

    Raises:
        ConfigError: it contains characters that an HTTP header cannot.
    """
    found = (given or os.environ.get(TOKEN) or "").strip()
    if not (found.isascii() and found.isprintable()):
        raise ConfigError(f"{TOKEN}: expected printable ASCII characters; its value is not shown here")
    return found or None


class Features(Protocol):
    """Images ``[N, C, H, W]`` in, features ``[N, width]`` out."""

    def __call__(self, images: Tensor, /) -> Tensor: ...


class HttpFeatures:
    """Client of an endpoint of the protocol above.

    Args:
        url: such as ``http://127.0.0.1:8017/``.
        timeout: seconds that one request may take.
        token: default: that of the environment variable ``ZEROFLOW_ENDPOINT_TOKEN``.

    Raises:
        ConfigError: the address is invalid, or there is no token.
    """

    def __init__(self, url: str, timeout: float = 30.0, token: str | None = None) -> None:
        parts, found = check_address(url), valid_token(token)
        if not found:
            raise ConfigError(f"endpoint={url!r}: no token; set the environment variable {TOKEN}")
        self.url, self.path = url, parts.path or "/"
        self._headers = {"Authorization": f"Bearer {found}"}
        host = str(parts.hostname)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(host, parts.port, timeout=timeout)
        self.said: dict[str, Any] | None = None
        """What the endpoint has said of itself; it is asked again where the connection was lost."""

    def __call__(self, images: Tensor) -> Tensor:
        body = safetensors.torch.save({"images": images.detach().to("cpu", torch.float32).contiguous()})
        self._drop_closed()
        if self.said is not None and self._connection.sock is None:
            self._check_the_same(self.said)
        answer = self._ask("POST", body)
        try:
            return safetensors.torch.load(answer)["features"]
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise EndpointError(f"its answer is not safetensors with 'features': {type(error).__name__}") from None

    def facts(self) -> dict[str, Any]:
        """The endpoint's description of itself."""
        answer = self._ask("GET")
        try:
            found = json.loads(answer)
        except ValueError:
            raise EndpointError("its answer to GET is not JSON") from None
        if not isinstance(found, dict) or not {"backbone", "image_size", "width"} <= found.keys():
            raise EndpointError("its answer to GET lacks backbone, image_size or width")
        for key in ("image_size", "width"):
            if type(found[key]) is not int or found[key] < 1:
                raise EndpointError(f"its answer to GET says {key}={found[key]!r}: expected an integer >= 1")
        return found

    def _check_the_same(self, said: Mapping[str, Any]) -> None:
        """Ask again what it serves: behind a connection that was lost another server may have started."""
        now = self.facts()
        for key in ("backbone", "checkpoint", "image_size", "width"):
            if said.get(key) != now.get(key):
                raise ConfigError(
                    f"endpoint {self.url}: since its connection was lost it serves {key}={now.get(key)!r}, before "
                    f"{said.get(key)!r}; the cell would mix two models"
                )

    def _drop_closed(self) -> None:
        """Close a connection that the server has closed while it was idle."""
        if (socket := self._connection.sock) and select.select([socket], [], [], 0)[0]:
            self._connection.close()

    def _ask(self, method: str, body: bytes | None = None) -> bytes:
        try:
            self._drop_closed()
            self._connection.request(method, self.path, body, self._headers)
            answer = self._connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise EndpointError(f"{type(error).__name__}: {error}") from None
        if answer.status in (401, 403):
            raise ConfigError(f"endpoint {self.url}: it refused the token in {TOKEN} (status {answer.status})")
        if answer.status != 200:
            said = content[:200].decode(errors="replace").strip().partition("\n")[0]
            why = "its queue is full" if answer.status in (429, 503) else said
            kind = Refused if 400 <= answer.status < 500 and answer.status not in (408, 429) else EndpointError
            raise kind(f"status {answer.status}" + (f" ({why})" if why else ""))
        return content


class BlackBox(OpaqueBackbone):
    """A backbone behind a ``Features`` callable. Requests are counted.

    Args:
        ask: computes the features.
        width: features d.
        image_size: side of the input, pixels.
        waits: seconds to wait before each retry; default: ``WAITS``.
        facts: the endpoint's description of itself; None: it has none, as a callable.

    Attributes:
        requests: number of requests sent, failed tries included.
        images: number of images in all of them.
    """

    def __init__(
        self,
        ask: Features,
        width: int,
        image_size: int,
        waits: Sequence[float] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(width, image_size)
        self.facts = facts
        self._ask, self._waits = ask, WAITS if waits is None else waits
        self.requests = self.images = 0
        self._round: list[Tensor] | None = None  # requests of evaluations, while they are collected
        self._answers: list[Tensor] = []  # for the current evaluation

    @torch.no_grad()
    def forward(self, images: Tensor | Prefix, adapters: Iterable[nn.Module] | None = None) -> Tensor:
        if adapters is not None or isinstance(images, Prefix):
            raise TypeError("a black box has no blocks to add adapters to")
        if self._round is not None:
            self._round.append(images)
            raise _Asked
        return self._answers.pop() if self._answers else self._request(images)

    def together(self, indices: Sequence[int], evaluate: Callable[[int], Any]) -> list[Any]:
        """``[evaluate(i) for i in indices]``, with the first requests of all evaluations merged into one.

        An evaluation that sends a request runs twice: first up to its request, then again with the response. Both runs draw
        the same random numbers (``Objective`` seeds them equally).
        """
        questions: dict[int, Tensor] = {}
        results: dict[int, Any] = {}
        for index in indices:
            with self._collecting() as asked:
                results[index] = evaluate(index)  # and nothing was asked
            if asked:
                questions[index] = asked[0]
        if questions:
            answer = self._request(torch.cat(list(questions.values())))
            parts = torch.split(answer, [len(question) for question in questions.values()])
            for index, part in zip(questions, parts, strict=True):
                self._answers = [part]
                try:
                    results[index] = evaluate(index)
                finally:
                    self._answers = []
        return [results[index] for index in indices]

    @contextmanager
    def _collecting(self) -> Iterator[list[Tensor]]:
        asked: list[Tensor] = []
        self._round = asked
        try:
            yield asked
        except _Asked:
            pass
        finally:
            self._round = None

    @torch.no_grad()
    def _request(self, images: Tensor) -> Tensor:
        """The features, in as few requests as possible."""
        most = max(1, (MOST_BYTES - 2**16) // (4 * images[0].numel()))
        return torch.cat([self._answer(part) for part in torch.split(images, most)])

    def _answer(self, images: Tensor) -> Tensor:
        """The features, from the first try with a valid response."""
        for wait in (*self._waits, None):
            self.requests += 1
            self.images += len(images)
            try:
                # A copy: a callable that works in place must not spoil the next try.
                # A copy: some write the answers to all requests into one buffer of theirs.
                return self._checked(_called(self._ask, images.clone()), len(images)).to(images, copy=True)
            except EndpointError as error:
                if wait is None or isinstance(error, Refused):
                    tries = "" if isinstance(error, Refused) else f" in {len(self._waits) + 1} tries; the last"
                    where = _name_of(self._ask)
                    raise EndpointError(f"black box {where}: no usable answer{tries}: {error}") from error.__cause__
                time.sleep(wait)
        raise AssertionError

    def _checked(self, features: Any, count: int) -> Tensor:
        if not isinstance(features, Tensor) or not features.is_floating_point():
            raise EndpointError(f"features are {getattr(features, 'dtype', type(features).__name__)}, not floats")
        if features.shape != (count, self.width):
            raise EndpointError(f"features have shape {tuple(features.shape)}, expected ({count}, {self.width})")
        if not features.isfinite().all():
            raise EndpointError("features are not finite")
        return features


class _Asked(BaseException):
    """Ends an evaluation whose request is to be merged with others."""


def _called(ask: Features, images: Tensor) -> Any:
    """What a callable returns. An ``OSError`` of it may pass, and becomes an ``EndpointError``; any other error stays: ``Refused``."""
    try:
        return ask(images)
    except (ConfigError, EndpointError, MemoryError):  # the last: a sweep tries the cell again with more
        raise
    except Exception as error:
        kind = EndpointError if isinstance(error, OSError) else Refused
        raise kind(f"{type(error).__name__}: {error}") from error


def _name_of(ask: Features) -> str:
    """A black box in messages: its address, or the ``module:attribute`` of a function or of an object's class."""
    if url := getattr(ask, "url", None):
        return str(url)
    named = ask if hasattr(ask, "__qualname__") else type(ask)
    return f"{named.__module__}:{named.__qualname__}"


def _width_of(ask: Features, size: int) -> int:
    """The number of features that a callable gives for one image, and gives alike when it is asked again."""
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    first, second = (_checked_features(ask, image.clone()) for _ in range(2))
    alike = first.shape == second.shape and torch.allclose(
        first, second, rtol=1e-3, atol=1e-3 * float(first.abs().max())
    )
    if first.isfinite().all() and not alike:
        raise ConfigError(
            f"endpoint {_name_of(ask)}: other features for the same image when asked again; expected a function of the image (a model in evaluation mode, no noise)"
        )
    return first.shape[1]


def _checked_features(ask: Features, image: Tensor) -> Tensor:
    """What a callable gives for one image: ``[1, width]``, float32."""
    with torch.no_grad():
        try:
            probe = _called(ask, image)
        except EndpointError as error:
            raise EndpointError(f"black box {_name_of(ask)}: no answer to 1 image: {error}") from error.__cause__
    if not isinstance(probe, Tensor) or probe.ndim != 2 or len(probe) != 1 or probe.shape[1] < 1:
        shape = f"shape {tuple(probe.shape)}" if isinstance(probe, Tensor) else type(probe).__name__
        raise ConfigError(
            f"endpoint {_name_of(ask)}: 1 image gives {shape}; expected a tensor of shape (1, width), width >= 1"
        )
    return probe.detach().float().cpu().clone()


def open_black_box(
    name: str,
    *,
    checkpoint: str | None = None,
    image_size: int | None = None,
    endpoint: Features | str | None = None,
    timeout: float = 30.0,
) -> BlackBox:
    """Open the black box of a cell.

    Args:
        name: the backbone that the endpoint must serve.
        checkpoint: the weights that it must serve, as in ``create_backbone``.
        image_size: the image size that it must take, pixels.
        endpoint: a callable, its name, or the address of an endpoint, which is asked what it serves.
        timeout: seconds that one request may take.

    Raises:
        ConfigError: no endpoint is given, it cannot be imported, returns no features, or serves something else.
        EndpointError: it does not respond, or a callable fails; what that raised is the ``__cause__``.
    """
    if endpoint is None:
        raise ConfigError(
            "access='black-box' needs an endpoint: placement.endpoint in a grid file, --endpoint, Placement(endpoint=...); "
            "zeroflow serve starts one"
        )
    size = image_size or default_image_size(name)
    if isinstance(endpoint, str) and is_name(endpoint):
        endpoint = import_callable(endpoint)
    if not isinstance(endpoint, str):
        if size is None:
            raise ConfigError(f"image_size: not known for {name!r}; set it")
        return BlackBox(endpoint, _width_of(endpoint, size), size)
    client = HttpFeatures(endpoint, timeout)
    for wait in (*WAITS, None):
        try:
            facts = client.facts()
            break
        except EndpointError as error:
            if wait is None or isinstance(error, Refused):
                tries = "" if isinstance(error, Refused) else f" in {len(WAITS) + 1} tries; the last"
                raise EndpointError(f"black box {endpoint}: no answer{tries}: {error}") from None
            time.sleep(wait)
    wanted = {"backbone": name, "checkpoint": weights_of(name, checkpoint), "image_size": size}
    for key, value in wanted.items():
        if value is not None and facts.get(key, value) != value:
            raise ConfigError(f"endpoint {endpoint}: serves {key}={facts[key]!r}, the cell needs {value!r}")
    client.said = facts
    return BlackBox(client, facts["width"], facts["image_size"], facts=facts)


def weights_of(name: str, checkpoint: str | None) -> str:
    """Normal form of a backbone's checkpoint: ``embedded``, ``hub``, ``none`` or an absolute path."""
    if checkpoint in (None, "hub", "none"):
        return checkpoint or ("embedded" if name == EMBEDDED else "hub")
    return str(Path(checkpoint).expanduser().absolute())
