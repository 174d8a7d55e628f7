"""librosa without numba's compilation, which takes 30 s in a new environment.

librosa compiles some functions when it is imported. load() and resample() call none of them, so plain Python functions
take their place. Import this module before librosa is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import numba


def _uncompiled(*arguments: Any, **options: Any) -> Callable[..., Any]:
    """A decorator of numba, with or without arguments, that returns the function unchanged."""
    if len(arguments) == 1 and callable(arguments[0]) and not options:
        return arguments[0]
    return lambda function: function


with mock.patch.multiple(numba, jit=_uncompiled, guvectorize=_uncompiled, vectorize=_uncompiled, stencil=_uncompiled):
    import librosa
    import librosa.core.audio
    import librosa.core.spectrum
    import librosa.util.utils

__all__ = ["librosa"]
