"""The order of the training rows: new in each epoch, and resumable at any row."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_rl.errors import UserError


class Cursor:
    """Iterates over `size` rows for any number of epochs. The order of an epoch depends on (seed, epoch) only."""

    def __init__(self, size: int, seed: int, shuffle: bool) -> None:
        if size < 1:
            raise ValueError(f"a cursor needs at least one row, not {size}")
        self._size, self._seed, self._shuffle = size, seed, shuffle
        self._epoch = 0
        self._position = 0
        self._order = self._epoch_order()

    @property
    def epoch(self) -> int:
        """Number of completed epochs."""
        return self._epoch

    @property
    def taken(self) -> int:
        """Number of rows taken so far, over all epochs."""
        return self._epoch * self._size + self._position

    def take(self, n: int) -> list[int]:
        """Returns the next n row numbers, across the end of an epoch if necessary."""
        if n < 0:
            raise ValueError(f"cannot take {n} rows")
        rows: list[int] = []
        while len(rows) < n:
            part = self._order[self._position : self._position + n - len(rows)]
            rows.extend(part.tolist())
            self._position += len(part)
            if self._position == self._size:
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._epoch_order()
        return rows

    def state(self) -> dict[str, Any]:
        """Returns the state from which `load_state` continues at exactly this row, as plain values for JSON."""
        return {**self._fixed(), "epoch": self._epoch, "position": self._position}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues from `state`. Raises UserError if the state belongs to other rows or another order of rows."""
        for name, mine in self._fixed().items():
            if state.get(name) != mine:
                raise UserError(
                    f"cannot resume: the checkpoint's order of rows has {name} {state.get(name)}, but this run has "
                    f"{mine}; resume with the same data, seed and shuffle, or start a new run"
                )
        epoch, position = state.get("epoch"), state.get("position")
        if not (isinstance(epoch, int) and isinstance(position, int)) or epoch < 0 or not 0 <= position < self._size:
            raise UserError(f"cannot resume: the checkpoint's position in the training data is damaged: {state}")
        self._epoch, self._position = epoch, position
        self._order = self._epoch_order()

    def _epoch_order(self) -> np.ndarray:
        if not self._shuffle:
            return np.arange(self._size)
        return np.random.default_rng([self._seed, self._epoch]).permutation(self._size)

    def _fixed(self) -> dict[str, int | bool]:
        return {"size": self._size, "seed": self._seed, "shuffle": self._shuffle}
