"""What every message to a user must fulfil."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from katds.errors import ConfigError


def refused(action: Callable[[], object], *pieces: str) -> str:
    """The message of the ConfigError that `action` raises: at most three sentences, with all pieces in it."""
    with pytest.raises(ConfigError) as caught:
        action()
    message = str(caught.value)
    ends = re.findall(r"[.!?](?=\s|$)", message)
    assert 1 <= len(ends) <= 3, f"{len(ends)} sentences: {message}"
    assert "\n" not in message, message
    for piece in pieces:
        assert piece in message, f"{piece!r} is not in: {message}"
    return message
