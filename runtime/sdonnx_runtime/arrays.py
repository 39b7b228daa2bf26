"""The array types that signatures use."""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.floating[Any]]
"""Latents, embeddings, pictures: float32, which stays so under arithmetic with Python numbers."""

AnyArray: TypeAlias = NDArray[Any]
"""What goes into or comes out of a graph, whatever its element type."""
