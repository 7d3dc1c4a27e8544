"""Objects of the user's own code, named in a configuration as `package.module:attribute`."""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable
from functools import partial
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


def import_callable(path: str, key: str) -> Any:
    """Returns the function or class that `path` names. Raises UserError as `import_object` does, and for any other
    object."""
    found = import_object(path, key)
    if not callable(found):
        attribute = path.rpartition(":")[2]
        raise UserError(f"{key}={path!r}: {attribute!r} is a {type(found).__name__}, not a function or class.")
    return found


def own_function(path: str, key: str) -> Callable[..., Any]:
    """Returns the function that `path` names, such that its exceptions become UserErrors; see `call_own`."""
    return partial(call_own, path, key, import_callable(path, key))


def call_own(path: str, key: str, function: Callable[..., Any], /, *arguments: Any) -> Any:
    """Calls a function of the user's own code. Its exceptions become UserErrors that name the key and the line."""
    try:
        return function(*arguments)
    except UserError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)[1:]
        own = [frame for frame in frames if frame.filename == frames[0].filename]
        place = f" in {own[-1].filename}, line {own[-1].lineno}" if own else ""
        raise UserError(f"{key}={path!r}: {type(error).__name__}{place}: {error}") from error
