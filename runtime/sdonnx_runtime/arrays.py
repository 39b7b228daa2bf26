"""The array types that signatures use."""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.floating[Any]]
"""Latents, embeddings, images: float32, which arithmetic with Python numbers keeps."""

AnyArray: TypeAlias = NDArray[Any]
"""A graph's input or output of any dtype."""
