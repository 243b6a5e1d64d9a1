"""Lay out the text of a config once, not at every checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def remember_config_text() -> None:
    """Keep the last text that MMEngine laid out, and what it was laid out from.

    ``Config.pretty_text`` is asked for several times when a training starts and at each
    checkpoint, and lays the same text out anew by yapf, which takes seconds for a
    detector. A config that has changed gives another text, and so does not get the old
    one. No thread about it is known to us. Does nothing the second time.
    """
    from mmengine.config import config

    if not hasattr(config.FormatCode, '__wrapped__'):
        config.FormatCode = _remembering(config.FormatCode)


def _remembering(lay_out: Callable[..., tuple]) -> Callable[..., tuple]:
    last: list[Any] = [None, None]

    @functools.wraps(lay_out)
    def wrapper(*args: Any, **kwargs: Any) -> tuple:
        if last[0] != (args, kwargs):
            last[:] = (args, kwargs), lay_out(*args, **kwargs)
        return last[1]

    return wrapper
