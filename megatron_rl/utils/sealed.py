"""JSON files whose last value is the SHA-256 of all before it, so that a changed byte is noticed."""

from __future__ import annotations

import hashlib
import re

_SEAL = re.compile(rb',\n "sha256": "([0-9a-f]{64})"\n}\s*\Z')


def sealed(content: bytes) -> bytes:
    """Returns a JSON object, written with an indent of 1, with its SHA-256 as a further value."""
    body = content.removesuffix(b"\n}")
    return body + b',\n "sha256": "%s"\n}' % hashlib.sha256(body).hexdigest().encode()


def is_intact(content: bytes) -> bool:
    """Returns whether the SHA-256 is right. A file of an earlier version, which has none, counts as intact."""
    seal = _SEAL.search(content)
    return not seal or hashlib.sha256(content[: seal.start()]).hexdigest() == seal[1].decode()
