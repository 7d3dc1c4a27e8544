"""Checks that the weights of a model folder are complete and fit its config.json. Reads headers of files, no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from megatron_rl.errors import UserError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.families import EMBEDDING, HEAD, entries
from megatron_rl.models.hf_format import FolderWeights, Header, check_links, open_weights, read_config, stored_bytes

FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of weights that can be trained, by their names in safetensors files."""
SHOWN = 10
"""Number of problems that a message lists."""
_QUANTISED = re.compile(r"\.(qweight|qzeros|scales|g_idx|weight_packed|weight_scale|weight\.(absmax|quant_))")
"""Tensors that quantised weights have beside, or in place of, a plain weight."""
_BUFFER = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
"""Buffers that older releases of transformers stored. They follow from config.json and are not read."""


def check_weights(folder: Path) -> None:
    """Raises UserError if a file is missing or cut off, or names, shapes or types are not those of config.json's model,
    or if an export could not copy the folder's other files (`hf_format.check_links`).

    Of the contents, only those of an LM head are read that config.json says is tied to the embedding.
    """
    architecture = Architecture.from_hf(read_config(folder))
    check_links(folder)
    weights = open_weights(folder)
    check_names(architecture, weights)
    check_headers(architecture, weights.headers())
    if architecture.tied and HEAD in weights:
        _check_tied(folder, weights)


def check_names(architecture: Architecture, names: Iterable[str]) -> None:
    """Raises UserError unless these are the tensors of the whole model. A tied model may also store an LM head, and any
    model the buffers of its rotary embedding."""
    found = {name for name in names if not _BUFFER.search(name)}
    if quantised := next((name for name in sorted(found) if _QUANTISED.search(name)), None):
        raise UserError(f"{quantised} belongs to quantised weights, and {_UNQUANTISED}")
    needed = {name for entry in entries(architecture) for name in entry.hf_names}
    allowed = needed | {HEAD} if architecture.tied else needed
    problems = [f"missing: {name}" for name in sorted(needed - found)]
    problems += [f"unexpected: {name}" for name in sorted(found - allowed)]
    if problems:
        hint = ""
        if problems == [f"missing: {HEAD}"]:
            hint = "\nIf the LM head of the model is its embedding, config.json needs tie_word_embeddings: true."
        raise UserError(f"The weights are not those of a {architecture.family}:\n  {_listed(problems)}{hint}")


def check_headers(architecture: Architecture, headers: Mapping[str, Header]) -> None:
    """Raises UserError if a tensor's shape is not the model's, or its type is not a floating-point one."""
    wrong_type = {name: header.dtype for name, header in headers.items() if header.dtype not in FLOATS}
    for name, dtype in wrong_type.items():
        if not _BUFFER.search(name):
            raise UserError(f"{name} is stored as {dtype}: the weights are quantised, and {_UNQUANTISED}")
    if problems := list(_wrong_shapes(architecture, headers)):
        raise UserError(f"The weights do not fit the model's config.json:\n  {_listed(problems)}")


_UNQUANTISED = "only floating-point weights can be trained or converted. Use the model without quantisation."


def _wrong_shapes(architecture: Architecture, headers: Mapping[str, Header]) -> Iterator[str]:
    for entry in entries(architecture):
        for name, shape in zip(entry.hf_names, entry.hf_shapes(architecture), strict=True):
            if headers[name].shape != shape:
                yield f"{name}: shape {headers[name].shape}, expected {shape}"


def _check_tied(folder: Path, weights: FolderWeights) -> None:
    parts = (stored_bytes(folder / weights.file_of(name), name) for name in (EMBEDDING, HEAD))
    if any(one != other for one, other in zip(*parts, strict=False)):
        raise UserError(
            f"{folder}: config.json says tie_word_embeddings: true, but {HEAD} in the files differs from {EMBEDDING}. "
            "Set tie_word_embeddings to false in config.json if the model has an LM head of its own; otherwise remove "
            f"{HEAD} from the files."
        )


def _listed(problems: list[str]) -> str:
    more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return "\n  ".join([*problems[:SHOWN], *more])
