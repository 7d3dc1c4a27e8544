"""A transformers model's tensors under the names that its model folder has for them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def as_stored(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Views of the tensors of a `state_dict`, or of others under its names. In memory transformers fuses a layer's
    experts, gate above up: [E, 2 * M, H] and [E, H, M]; folders and weight updates have a tensor each."""
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
