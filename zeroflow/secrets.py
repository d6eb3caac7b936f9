"""Redact secrets from whatever goes into results and logs."""

from __future__ import annotations

import os
import re

_NAMES = re.compile(r"SECRET|TOKEN|PASSW|CREDENTIAL|PRIVATE|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
_NO_SECRETS = re.compile(r"(PATH|FILE|MODE|DIR|URL)$", re.IGNORECASE)
_SHORTEST = 8
"""Characters: shorter values (``true``, ``1``) are no secrets, and would be cut out of every word."""

_IN_ADDRESS = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")


def without_secrets(text: str) -> str:
    """Redact the values of environment variables whose names say that they are secret, and credentials in URLs."""
    values = {
        value.strip() for name, value in os.environ.items() if _NAMES.search(name) and not _NO_SECRETS.search(name)
    }
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= _SHORTEST:
            text = text.replace(value, "***")
    return _IN_ADDRESS.sub("***", text)
