"""Tuning of a quantized model behind the rounding, for `--effort best`: the model is walked forward and backward.

factors.py holds a factor per output channel of each 4-bit Linear and per channel of each norm, and what is added to
biases; head.py the loss at the logits and its gradient; walk.py the layers with factors in them; distill.py the epochs.
own_texts.py adds samples that the model writes itself, before the first layer is quantized.
May import: calibration, plan, models, numerics, runtime, storage, errors.
Left out on purpose: rounding. Integers and zero points are not changed here.
"""

from __future__ import annotations

from .distill import refuse_effort, tune
from .factors import SolvedLayer
from .head import Head
from .own_texts import add_own_texts

__all__ = ["Head", "SolvedLayer", "add_own_texts", "refuse_effort", "tune"]
