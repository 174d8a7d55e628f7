"""Ctrl-C that cannot get lost.

Python raises KeyboardInterrupt wherever the main thread happens to be. A library that is being imported, or a callback
from C, may swallow the exception, and the run would go on. The handler therefore also notes the signal, and the next
progress event raises it again.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

EXIT_CODE = 130  # 128 + SIGINT, as shells report it


class Interrupts:
    """Whether Ctrl-C was pressed since `watch` began."""

    def __init__(self) -> None:
        self.noted = False

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Note SIGINT inside the `with`.

        Does nothing where SIGINT is ignored, as in a background job of a shell script, and outside the main thread,
        where Python allows no handler.
        """
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
            yield
            return
        try:
            before = signal.signal(signal.SIGINT, self._handle)
        except ValueError:
            yield
            return
        hook, sys.unraisablehook = sys.unraisablehook, self._hide_swallowed
        self._hook = hook
        try:
            yield
        finally:
            sys.unraisablehook = hook
            signal.signal(signal.SIGINT, before)

    def raise_if_noted(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C was pressed, also if its first exception was swallowed."""
        if self.noted:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.noted = True
        raise KeyboardInterrupt

    def _hide_swallowed(self, unraisable: Any) -> None:
        """Print no traceback of a KeyboardInterrupt in a callback: it is raised again by `raise_if_noted`."""
        if not (self.noted and issubclass(unraisable.exc_type, KeyboardInterrupt)):
            self._hook(unraisable)
