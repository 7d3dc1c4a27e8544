"""Objects of the user's own code, named in a configuration as `package.module:attribute`."""

from __future__ import annotations

import importlib
import os
import re
import sys
from typing import Any

from megatron_rl.errors import UserError

_PATTERN = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def is_import_path(text: str) -> bool:
    """Whether `text` has the form `package.module:attribute`."""
    return _PATTERN.fullmatch(text) is not None


def import_object(path: str, key: str) -> Any:
    """Returns the attribute that `path` names, from a module on sys.path or in the working folder.

    key: the configuration key that holds the path, for messages.

    Raises UserError for a text of another form, a module that cannot be imported, and a missing attribute.
    """
    if not is_import_path(path):
        raise UserError(f"{key}={path!r}: an import path of the form package.module:attribute is expected")
    module_name, _, attribute = path.partition(":")
    # A console script, unlike `python -m`, leaves the working folder out. Last, so that it shadows nothing installed.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything while it loads
        raise UserError(
            f"{key}={path!r}: module {module_name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, attribute):
        raise UserError(f"{key}={path!r}: module {module_name!r} has no {attribute!r}.")
    return getattr(module, attribute)
