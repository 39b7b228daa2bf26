"""The thread that a session runs on."""

import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

_WAIT = 0.2
"""Seconds; a wait without limit would keep Ctrl-C out on Windows."""


class Worker:
    """A thread that makes calls one after another, from the first call until its owner is gone.

    ONNX Runtime keeps what it has on a device for each thread that runs a session: on CUDA the handles of libraries,
    and captured graphs. The thread doesn't keep the owner alive.
    """

    def __init__(self, owner: object, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        weakref.finalize(owner, self._calls.put, None).atexit = False

    def call(self, function: Callable[[], Any], interrupt: Callable[[], None]) -> Any:
        """Call a function on the thread; returns its result, or the exception that it raised.

        An exception in the calling thread meanwhile, such as Ctrl-C, calls ``interrupt`` and then waits for the end.
        """
        outcome = list[Any]()
        done = threading.Event()

        def call() -> None:
            try:
                outcome.append(function())
            except Exception as error:
                outcome.append(error.with_traceback(None))  # whose frames would keep the owner alive
            finally:
                done.set()

        self._start()
        self._calls.put(call)
        try:
            while not done.wait(_WAIT):
                pass
        except BaseException:
            interrupt()
            while not done.is_set():
                with suppress(KeyboardInterrupt):  # an impatient second one must not leave the call behind
                    done.wait(_WAIT)
            raise
        return outcome[0]

    def _start(self) -> None:
        with self._starting:
            if self._thread is None or not self._thread.is_alive():  # it has no copy in a fork
                thread = threading.Thread(target=_work, args=(self._calls,), name=self._name, daemon=True)
                thread.start()
                self._thread = thread


def _work(calls: "SimpleQueue[Callable[[], None] | None]") -> None:
    while (call := calls.get()) is not None:
        call()
        del call  # with what it returned, or the owner would live until the next call
