"""A server of the endpoint protocol that misbehaves as it is told: ``endpoint_server.py PORT PLAN``, for the tests of faults.

PLAN is a text of letters, one for each POST, the last one for all that follow: ``o`` a right answer, ``g`` garbage, ``n`` NaN,
``w`` a wrong shape, ``i`` integers, ``s`` slow, ``f`` the queue is full, ``b`` the body is too large, ``c`` right, and the
connection ends without a word, ``d`` the process dies, ``m`` as ``c``, and from then on it says that it serves another checkpoint.
"""

import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import safetensors.numpy

SIDE, WIDTH = 14, 8
port, plan = int(sys.argv[1]), sys.argv[2]
seen, serves = 0, "embedded"


WEIGHT = np.random.RandomState(0).randn(3 * SIDE * SIDE, WIDTH) / 20


def features(images: np.ndarray) -> np.ndarray:
    # Example by example: BLAS rounds otherwise where there are others beside it.
    return np.stack([np.tanh(image.reshape(-1) @ WEIGHT) for image in images]).astype(np.float32)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def reply(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != "Bearer right":
            return self.reply(401)
        facts = {
            "backbone": "zeroflow_tiny_vit",
            "image_size": SIDE,
            "width": WIDTH,
            **({} if serves == "embedded" else {"checkpoint": serves}),
        }
        self.reply(200, json.dumps(facts).encode())

    def do_POST(self) -> None:
        global seen, serves
        kind = plan[min(seen, len(plan) - 1)]
        seen += 1
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer right":
            return self.reply(401)
        if kind == "d":
            os._exit(1)
        if kind == "g":
            return self.reply(200, b"\x00garbage")
        if kind == "f":
            return self.reply(503)
        if kind == "b":
            return self.reply(413, b"a body of at most 7 bytes is expected\n")
        if kind == "s":
            time.sleep(3)
        found = features(safetensors.numpy.load(body)["images"])
        found = {"n": found * np.float32("nan"), "w": found[:, 1:].copy(), "i": found.astype(np.int32)}.get(kind, found)
        self.reply(200, safetensors.numpy.save({"features": found}))
        self.close_connection = kind in "cm"
        serves = "another" if kind == "m" else serves

    def log_message(self, *_: object) -> None: ...


ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
