"""Where the teacher reads: after the student's chunk, or beside its next one on a CUDA stream of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Side:
    """A second stream that waits for what was queued on the current one before the last `mark`.

    One for the life of an engine: memory that was allocated on a stream can be used again on that stream only.

    Args:
        beside: False, or a device that is not CUDA: there is one stream, and nothing to wait for.
    """

    def __init__(self, device: torch.device, beside: bool) -> None:
        self._stream = torch.cuda.Stream(device) if beside and device.type == "cuda" else None
        self._marked: torch.cuda.Event | None = None

    def mark(self) -> None:
        """All that is queued on the current stream by now has to be done before the side goes on."""
        if self._stream is not None:
            self._marked = torch.cuda.current_stream().record_event()

    def join(self) -> None:
        """What is queued on the current stream from now on waits for the side: it may free what the side has read."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Queues on the side; reading a result on the host within waits for the side only."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            assert self._marked is not None, "the side was never told where to begin"
            self._stream.wait_event(self._marked)
            yield
