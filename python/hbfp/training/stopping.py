"""Ctrl-C, and the SIGTERM of schedulers, service managers and torchrun: noted first, acted upon between two steps."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType, MappingProxyType


class Terminated(KeyboardInterrupt):
    """SIGTERM: whatever stops for Ctrl-C stops for it, too."""


SIGNALS: Mapping[int, type[KeyboardInterrupt]] = MappingProxyType(
    {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
)
"""What each signal is raised as."""


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Callable[[], int]]:
    """Within, the first signal is noted, and its number told to who asks (0: none); the second does what it did."""
    noted = 0
    # Only the main thread is given signals; and who started us in the background asked that Ctrl-C be ignored.
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in SIGNALS}
        before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal noted
        noted = number
        put_back()

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: noted
    finally:
        put_back()
