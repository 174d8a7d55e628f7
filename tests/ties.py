"""Roundings of two float paths, compared so that the result holds on every processor.

The last bits of a float32 sum depend on the instruction set and the number of threads. A value that is near a tie, half
way between two integers, may therefore round to either neighbor. Every other value must round to the same integer.
"""

from __future__ import annotations

import torch

# In steps of the integer grid. float32 sums differ by about 1e-6 of the largest value, and that is 127 steps.
TIE_DISTANCE = 1e-2


def assert_rounded(integers: torch.Tensor, values: torch.Tensor, distance: float = TIE_DISTANCE) -> None:
    """Each integer is the nearest one to its value, or the other neighbor of a tie within `distance` of the value."""
    error = (integers - values).abs()
    assert float(error.max()) <= 0.5 + distance, f"{int((error > 0.5 + distance).sum())} integers are not the nearest"
