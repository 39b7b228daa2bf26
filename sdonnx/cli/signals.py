"""Signals that end the program: Ctrl-C, SIGTERM, SIGHUP, and Ctrl-Break on Windows."""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

_DEFAULTS = {
    "SIGINT": signal.default_int_handler,
    "SIGTERM": signal.SIG_DFL,
    "SIGHUP": signal.SIG_DFL,
    "SIGBREAK": signal.SIG_DFL,
}
"""The signals and their handlers at the start; one that has another, as below nohup, stays as it is."""

PATIENCE = 2.0
"""Seconds after a signal in which further ones are ignored, so that clean-up can finish."""


class Interrupted(KeyboardInterrupt):
    """A signal came.

    Python kills itself with SIGINT at the end if a KeyboardInterrupt, but none of its subclasses, passed an ``exec``,
    as in imports of libraries.
    """


class Signals:
    """How this process ends when a signal asks it to: at once, or by KeyboardInterrupt where there is something to
    clean up. The exit code is 128 plus the signal's number.
    """  # fmt: skip

    def __init__(self) -> None:
        self.received: int | None = None
        """The first signal, by number."""
        self._time = 0.0
        self._handled: list[int] | None = None

    def exit_at_once(self) -> None:
        """From now on, a signal ends the process without clean-up: for the time in which libraries load or unload.

        An exception would be lost there, or turned into another one.
        """
        self._set_handler(self._exit)

    def interrupt(self) -> None:
        """From now on, a signal raises KeyboardInterrupt."""
        self._set_handler(self._raise)

    def ignore(self) -> None:
        """From now on, a signal does nothing: Python's last act is to restore the handlers that kill the process."""
        self._set_handler(signal.SIG_IGN)

    def raise_if_received(self) -> None:
        """Raise KeyboardInterrupt if a signal came, whatever became of its exception."""
        if self.received is not None:
            raise Interrupted

    def _set_handler(self, handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        if self._handled is None:
            known = {getattr(signal, name): default for name, default in _DEFAULTS.items() if hasattr(signal, name)}
            self._handled = [number for number, default in known.items() if signal.getsignal(number) is default]
        for number in self._handled:
            signal.signal(number, handler)

    def _exit(self, number: int, _frame: FrameType | None) -> None:
        if self._is_new(number):
            with suppress(OSError):
                os.write(2, b"stopped\n")
            os._exit(128 + (self.received or number))

    def _raise(self, number: int, _frame: FrameType | None) -> None:
        if self._is_new(number):
            raise Interrupted

    def _is_new(self, number: int) -> bool:
        """Note a signal, unless it follows another one soon."""
        now = time.monotonic()
        if self.received is not None and now - self._time < PATIENCE:
            return False
        self.received, self._time = self.received or number, now
        return True


SIGNALS = Signals()


def _report_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Print what Python ignores, as in finalizers, but not that a signal came there: its number is known."""
    if not issubclass(unraisable.exc_type, Interrupted):
        sys.__unraisablehook__(unraisable)


def run_until_signal(run: Callable[[], object], clean_up: Callable[[], object]) -> None:
    """Call ``run``; if a signal interrupts it, clean up, print "stopped" and exit, whichever error came of it."""
    atexit.register(SIGNALS.ignore)
    sys.unraisablehook = _report_unraisable
    try:
        try:
            SIGNALS.interrupt()
            run()
        finally:
            SIGNALS.exit_at_once()
    except BaseException:
        SIGNALS.exit_at_once()  # if the signal came within the other one
        if SIGNALS.received is None:
            raise
    if SIGNALS.received is not None:
        clean_up()
        with suppress(AttributeError, OSError, ValueError):  # stderr may be closed, or its terminal gone
            sys.stderr.write("stopped\n")
            sys.stderr.flush()
        sys.exit(128 + SIGNALS.received)
