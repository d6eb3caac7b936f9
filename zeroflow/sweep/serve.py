"""A backbone behind an HTTP endpoint of Ray Serve: images in, features out, nothing else (``zeroflow.models.endpoint``)."""

from __future__ import annotations

import asyncio
import hmac
import importlib.util
import logging
import secrets
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import safetensors
import safetensors.torch
import torch

from zeroflow.errors import ConfigError
from zeroflow.grid.placement import SweepPlacement
from zeroflow.models.endpoint import MOST_BYTES, TOKEN, valid_token, weights_of
from zeroflow.models.factory import create_backbone
from zeroflow.models.named import find_modules_in, import_callable, is_name
from zeroflow.models.probe import check_buildable
from zeroflow.sweep.environment import changed_environment
from zeroflow.sweep.local_ray import start_local_ray
from zeroflow.trial.config import TrialConfig

MOST_WORKERS = 64
"""Of a cell, each with one question at a time: a sweep's own endpoint has room for all of them."""


@dataclass(frozen=True)
class Served:
    """What is served, and where.

    Attributes:
        backbone: as in ``create_backbone``.
        checkpoint: as in ``create_backbone``.
        image_size: as in ``create_backbone``.
        host: of the endpoint.
        port: of the endpoint; 0: a free one.
        queue: requests that may wait; one more is answered with 503.
        threads: of the forward passes.
    """

    backbone: str
    checkpoint: str | None = None
    image_size: int | None = None
    host: str = "127.0.0.1"
    port: int = 0
    queue: int = 16
    threads: int = 1


class FeatureServer:
    """What Ray Serve runs: one request after the other, each a whole mini-batch."""

    def __init__(self, served: Served) -> None:
        _listen_only_at(served.host, served.port)
        torch.set_num_threads(served.threads)
        self.token = valid_token()
        self.backbone = create_backbone(
            served.backbone, checkpoint=served.checkpoint, image_size=served.image_size
        ).eval()
        self.facts = {
            "backbone": served.backbone,
            "checkpoint": weights_of(served.backbone, served.checkpoint),
            "image_size": self.backbone.image_size,
            "width": self.backbone.width,
        }

    async def __call__(self, request: Any) -> Any:
        from starlette.responses import JSONResponse, Response

        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
            return Response("a token is required\n", status_code=401)
        if request.method == "GET":
            return JSONResponse(self.facts)
        if int(request.headers.get("content-length") or MOST_BYTES + 1) > MOST_BYTES:
            return Response(f"a body of at most {MOST_BYTES} bytes is expected\n", status_code=413)
        try:
            answer = await asyncio.to_thread(self.answer, await request.body())
        except (ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
            return Response(f"{type(error).__name__}: {error}\n", status_code=400)
        return Response(answer, media_type="application/octet-stream")

    @torch.no_grad()
    def answer(self, body: bytes) -> bytes:
        images = safetensors.torch.load(body)["images"]
        side = self.backbone.image_size
        if images.ndim != 4 or images.shape[1:] != (3, side, side) or images.dtype != torch.float32:
            raise ValueError(
                f"images: expected float32 [N, 3, {side}, {side}], got {images.dtype} {list(images.shape)}"
            )
        return safetensors.torch.save({"features": self.backbone(images).contiguous()})


def check_installed() -> None:
    """Raise ``ConfigError`` where Ray Serve is missing."""
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        raise ConfigError("a backbone is served by Ray Serve: pip install 'zeroflow[bans]', or name placement.endpoint")


def variables() -> dict[str, str]:
    """What Ray's processes must find in their environment when it starts; a token is made where there is none."""
    return {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",  # one thread less between a request and its answer
        # Clients ask the replica itself: Ray's proxy takes a third of a mini-batch's forward pass to hand it on.
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        TOKEN: valid_token() or secrets.token_urlsafe(24),
    }


def start(served: Served) -> str:
    """Start serving on the running Ray, which was started with these ``variables``, and give the address.

    Raises:
        ConfigError: the port is taken.
    """
    from ray import serve

    served = replace(served, port=_port(served.host, served.port))
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(
        proxy_location="HeadOnly",  # without a proxy no replica takes HTTP; this one is not asked
        http_options={"host": "127.0.0.1", "port": _port("127.0.0.1"), "request_timeout_s": 600},
        logging_config={"log_level": "ERROR", "enable_access_log": False},
    )
    deployment = serve.deployment(
        FeatureServer,
        name="backbone",
        num_replicas=1,
        max_ongoing_requests=1,
        max_queued_requests=served.queue,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=1,
        health_check_timeout_s=600,
    )
    serve.run(deployment.bind(served), name="zeroflow", route_prefix="/")
    return f"http://{served.host}:{served.port}/"


@contextmanager
def serving(served: Served) -> Iterator[str]:
    """Serve on a Ray of this process's own, which ends with it; gives the address.

    Raises:
        ConfigError: the port is taken.
    """
    import ray

    _port(served.host, served.port)
    with changed_environment(variables()):
        start_local_ray(num_cpus=1)
        try:
            yield start(served)
        finally:
            ray.shutdown()


def _port(host: str, port: int = 0) -> int:
    """A port that is free; raises ``ConfigError`` where that one is not."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that has just ended is no obstacle
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error.strerror}; name another port, or 0 for any"
            ) from None
        return int(probe.getsockname()[1])


def _listen_only_at(host: str, port: int) -> None:
    """Where the replica that this process is will listen."""
    from ray.serve._private import replica

    bind, start = replica.add_port_to_grpc_server, replica.start_asgi_http_server
    # Ray opens a door for other deployments, of which there are none: to everyone, on every interface, without a token.
    replica.add_port_to_grpc_server = lambda server, address: bind(server, address.replace("[::]", "127.0.0.1"))
    # Ray chooses a port itself, and another one for a replica that is started again; its clients' connections to the one before
    # still hold the port for a while.
    replica.start_asgi_http_server = lambda app, options, **more: start(
        app, options.model_copy(update={"host": host, "port": port}), **{**more, "enable_so_reuseport": True}
    )


def wanted(cells: Sequence[TrialConfig], placement: SweepPlacement, *, local: bool) -> Served | None:
    """What a sweep has to serve itself, for its black boxes without a named endpoint; None: nothing.

    Raises:
        ConfigError: there are several of them, it cannot be built, Ray is not this process's own, Ray Serve is missing, or an
            endpoint is named and no token is there, or no such callable.
    """
    boxes = [config for config in cells if config.access == "black-box"]
    named = {placement.of(config).endpoint for config in boxes}
    ask = {
        (config.backbone, config.checkpoint, config.image_size)
        for config in boxes
        if placement.of(config).endpoint is None
    }
    for endpoint in sorted(filter(None, named)):
        if is_name(endpoint):
            find_modules_in(*filter(None, [placement.folder]))
            import_callable(endpoint, "placement.endpoint")
        elif local and not valid_token():
            raise ConfigError(
                f"placement.endpoint={endpoint!r}: no token; put it into the environment variable {TOKEN}"
            )
    if not ask:
        return None
    if len(ask) > 1 or not local:
        why = (
            f"{len(ask)} different backbones are"
            if len(ask) > 1
            else "this Ray was started elsewhere, where no token is"
        )
        raise ConfigError(
            f"access='black-box': {why}; start endpoints with zeroflow serve, and name placement.endpoint"
        )
    check_installed()
    backbone, checkpoint, image_size = ask.pop()
    check_buildable(backbone, checkpoint, image_size)
    return Served(backbone, checkpoint, image_size, queue=len(cells) * MOST_WORKERS)


def placed_at(placement: SweepPlacement, url: str) -> SweepPlacement:
    """The placement with an endpoint for the cells that name none."""
    return replace(placement, cell=replace(placement.cell, endpoint=placement.cell.endpoint or url))
