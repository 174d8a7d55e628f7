"""H of given tokens in its three forms. The matrix is computed in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from msmodelslim_omni.statistics.gram import Gram, GramBuilder
from msmodelslim_omni.statistics.spilled import Spill


def as_matrix(x: torch.Tensor) -> Gram:
    return Gram((x.double().T @ x.double()).float(), None, len(x))


def as_factor(x: torch.Tensor) -> Gram:
    return Gram(None, x, len(x))


def as_spilled(x: torch.Tensor) -> Gram:
    """On disk, in strips of 7 rows and flushed after every 7 tokens; GPTQ takes strips of 128 rows."""
    builder = GramBuilder(x.shape[1], None, torch.device("cpu"), Spill(None, 7))
    for part in x.split(7):
        builder.add(part)
    return builder.finish()


FORMS = pytest.mark.parametrize("form", [as_matrix, as_factor, as_spilled])
Form = Callable[[torch.Tensor], Gram]
