"""Seconds as people read them."""

from __future__ import annotations


def clock(seconds: float) -> str:
    """Seconds as people read them: `3:07`, `2:03:07`.

    >>> clock(187), clock(7387)
    ('3:07', '2:03:07')
    """
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"
