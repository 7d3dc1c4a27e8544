"""Which tensors are in host memory, and where the host waits for the GPU.

All tensors are really on the CPU. Those that a program makes there on purpose carry a mark: the results of `cpu()`, of
`torch.from_numpy`, of factories without a CUDA device, and of operations whose tensors all carry it.

A blocking copy from the host, and everything that needs a value of the GPU on the host, is counted while
`Waits.places` is a counter: by kind, owner ("ours", "megatron-core", "transformer-engine", "other") and place in code.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

MARK = "_rehearsal_host"
OWNERS = {
    "/megatron_rl/": "ours",
    "/lpreg/": "ours",
    "/megatron/core/": "megatron-core",
    "/transformer_engine/": "transformer-engine",
}
STAND_INS = (
    "/rehearsal/stand_ins/",
    "/rehearsal/site/moe_permutation.py",
    "/tests/flex_reference.py",
    "/triton/runtime/interpreter.py",
)
"""What these read, the kernels that they stand for read on the GPU."""
_READS = {"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "is_nonzero", "__array__"}
_SIZED_BY_VALUES = {"nonzero", "masked_select", "unique", "argwhere", "equal", "allclose", "_unique2", "bincount"}
_COPIES = {"cpu", "to", "cuda", "copy_"}
_FACTORIES = {
    "empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn", "randint", "randperm", "eye", "linspace",
    "scalar_tensor", "empty_strided", "as_tensor",
}  # fmt: skip


class Place(NamedTuple):
    kind: str
    """"wait" if the host needs something of the GPU, "copy" for a blocking copy to the GPU."""
    owner: str
    site: str


class Waits:
    places: Counter[Place] | None = None

    @classmethod
    def count(cls, what: str, kind: str = "wait") -> None:
        if cls.places is None:
            return
        for frame in reversed(traceback.extract_stack()[:-1]):
            if any(part in frame.filename for part in STAND_INS):
                return
            for part, owner in OWNERS.items():
                if part in frame.filename:
                    file = frame.filename.rpartition(part)[2]
                    cls.places[Place(kind, owner, f"{part.strip('/')}/{file}:{frame.lineno} {frame.name}: {what}")] += 1
                    return
        cls.places[Place(kind, "other", what)] += 1

    @classmethod
    @contextmanager
    def counted(cls) -> Iterator[Counter[Place]]:
        """Counts within the block."""
        cls.places = found = Counter()
        try:
            yield found
        finally:
            cls.places = None


def on_host(tensor: torch.Tensor) -> bool:
    return MARK in tensor.__dict__ if hasattr(tensor, "__dict__") else False


_META = torch.Tensor.is_meta.__get__  # type: ignore[attr-defined]


def of_cuda(tensor: torch.Tensor) -> bool:
    return not on_host(tensor) and not _META(tensor)


def is_cuda(device: Any) -> bool:
    """Returns whether a `device` argument names CUDA. A number does."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return type(device) is int or (isinstance(device, str) and device.startswith("cuda"))


def call(func: Any, name: str, args: Any, settings: dict[str, Any]) -> Any:
    """Calls a function of torch with CPU in place of CUDA, counts waits, and marks the result."""
    asked = settings.get("device")
    if is_cuda(asked):
        settings["device"] = torch.device("cpu")
    if settings.get("pin_memory"):
        settings["pin_memory"] = False
    if name in _COPIES and args and isinstance(args[0], torch.Tensor):
        return _copy(func, name, args, settings, asked)
    if name == "pin_memory":
        return args[0]
    tensors = list(_tensors(args)) + list(_tensors(settings.values()))
    if Waits.places is not None:
        _count(name, args, tensors, settings)
    result = func(*args, **settings)
    if name in _FACTORIES:
        if asked is None and name == "as_tensor" and isinstance(args[0], torch.Tensor):
            return result
        if is_cuda(asked):
            if name in ("tensor", "as_tensor"):
                Waits.count(f"torch.{name}", "copy")
        elif asked is not None or torch.get_default_device().type != "cuda":
            _mark(result)
    elif (asked is not None and not is_cuda(asked)) or (asked is None and tensors and all(map(on_host, tensors))):
        _mark(result)
    return result


def _copy(func: Any, name: str, args: Any, settings: dict[str, Any], asked: Any) -> Any:
    """Does cpu(), cuda(), to() and copy_(), which may cross between host and GPU."""
    tensor, blocking = args[0], not settings.get("non_blocking", False)
    if name == "copy_":
        source = args[1]
        blocking = blocking and not (len(args) > 2 and args[2])
        if isinstance(source, torch.Tensor) and on_host(source) != on_host(tensor) and blocking:
            Waits.count("copy_", "wait" if on_host(tensor) else "copy")
        return func(*args, **settings)
    from_host = on_host(tensor)
    if name == "cpu":
        target: Any = "cpu"
    elif name == "cuda":
        target = "cuda"
    else:
        target = asked
        for place, value in enumerate(args[1:], 1):
            if isinstance(value, torch.device | str) or type(value) is int:
                target, args = value, (*args[:place], torch.device("cpu"), *args[place + 1 :])
            elif isinstance(value, torch.Tensor):  # to(other)
                target, args = ("cpu" if on_host(value) else "cuda"), args
    to_host = from_host if target is None else not is_cuda(target)
    if torch.device(target).type == "meta" if isinstance(target, str | torch.device) else False:
        return func(*args, **settings)
    result = tensor if name in ("cpu", "cuda") else func(*args, **settings)
    if to_host != from_host:
        if blocking:
            Waits.count(name, "wait" if to_host else "copy")
        if result is tensor:
            result = tensor.clone()
            result.__dict__.pop(MARK, None)
    if to_host:
        _mark(result)
    return result


def _count(name: str, args: Any, tensors: list[torch.Tensor], settings: dict[str, Any]) -> None:
    if not tensors or on_host(tensors[0]):
        return
    if name in _READS or name in _SIZED_BY_VALUES or (name == "where" and len(args) == 1):
        Waits.count(name)
    elif name in ("__getitem__", "__setitem__"):
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        parts = [part for part in index if isinstance(part, torch.Tensor)]
        if (
            name == "__setitem__"
            and isinstance(args[2], int | float)
            and len(parts) == 1
            and parts[0].dtype == torch.bool
        ):
            return  # torch fills a number in by the mask, and needs no list of places
        if any(part.dtype in (torch.bool, torch.uint8) for part in parts):
            Waits.count("an index by a mask")
        elif any(isinstance(part, list) for part in index) or any(part.ndim and on_host(part) for part in parts):
            Waits.count("an index from the host", "copy")
    elif name == "repeat_interleave" and "output_size" not in settings and not isinstance(args[-1], int):
        Waits.count(name)


def made_on_host(function: Any) -> Any:
    """Returns a function whose results are marked."""

    def call(*args: Any, **settings: Any) -> torch.Tensor:
        result: torch.Tensor = function(*args, **settings)
        _mark(result)
        return result

    return call


def of_same_memory(result: Any, tensor: Any) -> Any:
    """Returns an attribute of a tensor, such as `T`, marked if it is a tensor of the host too."""
    if isinstance(tensor, torch.Tensor) and on_host(tensor):
        _mark(result)
    return result


def _mark(result: Any) -> None:
    for tensor in _tensors((result,)):
        setattr(tensor, MARK, True)


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
