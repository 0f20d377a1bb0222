"""Standard streams that are missing, full, or read by nobody any more, as services leave them."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

UNREAD = (errno.EPIPE, errno.EIO)  # a pipe whose reader has ended, a terminal that was closed
_dropped = {2}
"""Streams whose reader may go away without a word; that of errors and progress always may."""


class Stream(io.FileIO):
    """A standard stream that fails once at most: what cannot be written from then on is dropped."""

    def write(self, data: ReadableBuffer, /) -> int:
        """How many bytes were written, or dropped."""
        try:
            return super().write(data)
        except OSError as error:
            number = self.fileno()
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            if number == 2 or (number in _dropped and error.errno in UNREAD):
                return memoryview(data).nbytes
            raise OSError(error.errno, error.strerror, "standard output") from None


def prepare_streams() -> None:
    """Gives missing standard streams /dev/null, and makes those that are written to a `Stream`."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # else the next file that is opened would get its number
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            os.set_inheritable(number, True)
            stream = open(number, "w" if number else "r", closefd=False)  # noqa: SIM115 (it stays open)
            setattr(sys, name, stream)
        if number:
            buffer = io.BufferedWriter(Stream(number, "w", closefd=False))
            settings = {"errors": stream.errors, "line_buffering": stream.line_buffering}
            wrapped = io.TextIOWrapper(
                buffer, stream.encoding, write_through=stream.write_through, **settings
            )
            setattr(sys, name, wrapped)


def outlive_reader() -> None:
    """From now on output that nobody reads any more is dropped: the work goes on."""
    _dropped.add(1)
