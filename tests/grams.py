"""H of given tokens in its two exact forms. The matrix is computed in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from msmodelslim_omni.statistics.gram import Gram


def as_matrix(x: torch.Tensor) -> Gram:
    return Gram((x.double().T @ x.double()).float(), None, len(x))


def as_factor(x: torch.Tensor) -> Gram:
    return Gram(None, x, len(x))


FORMS = pytest.mark.parametrize("form", [as_matrix, as_factor])
Form = Callable[[torch.Tensor], Gram]
