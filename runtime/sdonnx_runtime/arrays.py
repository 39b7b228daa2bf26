"""The array types that signatures use."""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float32]
"""Latents, embeddings, pictures: float32 unless a docstring says otherwise."""

AnyArray: TypeAlias = NDArray[Any]
"""What goes into or comes out of a graph, whatever its element type."""
