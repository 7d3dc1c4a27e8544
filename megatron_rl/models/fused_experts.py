"""Splits the experts that transformers fuses in memory into the separate tensors that a model folder stores."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def as_stored(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns views of the tensors under the names that model folders and weight updates use.

    values: the tensors of a transformers `state_dict`, or others under the same names. In memory transformers fuses
    the E experts of a layer, gate above up: [E, 2 * M, H] and [E, H, M]. A folder has one tensor per expert and matrix.
    """
    stored: dict[str, Tensor] = {}
    for name, value in values.items():
        if name.endswith("experts.gate_up_proj"):
            for expert, halves in enumerate(value):
                for part, half in zip(("gate_proj", "up_proj"), halves.chunk(2), strict=True):
                    stored[name.replace("gate_up_proj", f"{expert}.{part}.weight")] = half
        elif name.endswith("experts.down_proj"):
            for expert, matrix in enumerate(value):
                stored[name.replace("down_proj", f"{expert}.down_proj.weight")] = matrix
        else:
            stored[name] = value
    return stored
