"""WeightChecks: limits of weights and scales, asked of a card once for many weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..errors import QuantError
from ..runtime import to_cpu


class WeightChecks:
    """Numbers that must not exceed a limit, and the faults to raise if they do.

    A number of the CPU is checked at once. To know a number of a card, the host waits for the card; such numbers are
    collected, and `raise_fault` waits once for all of them. Until then the results of faulty weights are meaningless.
    name: the Linear that is being rounded, for the messages of collected numbers.
    """

    def __init__(self) -> None:
        self.name = ""
        self._collected: list[tuple[torch.Tensor, float, Callable[[float], QuantError], str]] = []

    def at_most(self, number: torch.Tensor, limit: float, fault: Callable[[float], QuantError]) -> None:
        """number: float32, of one element; NaN exceeds every limit. fault: makes the error from the number."""
        if number.device.type != "cpu":
            self._collected.append((number, limit, fault, self.name))
        elif not (value := float(number)) <= limit:
            raise fault(value)

    def raise_fault(self) -> None:
        """Raise the first fault of the collected numbers."""
        self.checked([])

    def checked(self, results: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Float32 results on the CPU, copied together with the collected numbers. Raises the first fault of these."""
        collected, self._collected = self._collected, []
        on_cpu = to_cpu([*results, *(number for number, *_ in collected)])
        for number, (_, limit, fault, name) in zip(on_cpu[len(results) :], collected, strict=True):
            if not (value := float(number)) <= limit:
                error = fault(value)
                raise QuantError(f"{name}.weight: {error.message}", error.hint) if name else error
        return on_cpu[: len(results)]
