"""Numbers as people read them."""

from __future__ import annotations

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def count(value: float) -> str:
    """Three significant digits with a prefix: 783 k, 1.48 M."""
    for factor, prefix in _PREFIXES:
        if abs(value) >= factor * 0.9995:
            return f"{_three(value / factor)} {prefix}"
    return _three(value)


def share(value: float) -> str:
    return f"{value:.1%}"


def nats(value: float) -> str:
    return f"{value:.3g} nats"


def duration(seconds: float) -> str:
    """38.5 s, 3 min 49 s, 2 h 05 min, 3 d 04 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    minutes, hours = whole // 60, whole // 3600
    if hours == 0:
        return f"{minutes} min {whole % 60:02d} s"
    return f"{hours} h {minutes % 60:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24:02d} h"


def _three(value: float) -> str:
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}" if value != int(value) or abs(value) >= 1000 else f"{value:.0f}"
