"""The number of steps of gradient descent that refine scales, which take half of a tiny run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from msmodelslim_omni.processors import expected_error

ALL_STEPS = expected_error._STEPS
FEW_STEPS = 10


@contextmanager
def steps(count: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expected_error, "_STEPS", count)
        yield
