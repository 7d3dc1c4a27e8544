"""Types of the arrays that batches are made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]
"""Indices, counts and lengths."""
Mask = npt.NDArray[np.bool_]
