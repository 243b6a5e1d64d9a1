"""Let a training go on when its curves cannot be written."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any


def outlive_lost_scalars() -> None:
    """Report a line of ``scalars.json`` that cannot be written, once, and go on.

    MMEngine's ``LocalVisBackend`` opens the file for each line; a disk that is full for
    a minute, or a folder that is away, ends the training in the middle of a line of its
    log, though the log itself (of Python) would have outlived it. No thread about
    it is known to us. Does nothing the second time, or while writing succeeds.
    """
    from mmengine.visualization import LocalVisBackend

    if not hasattr(LocalVisBackend._dump, '__wrapped__'):
        LocalVisBackend._dump = _reporting(LocalVisBackend._dump)


def _reporting(dump: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(dump)
    def wrapper(self: Any, values: dict, file_path: str, file_format: str) -> None:
        from mmengine.logging import print_log

        try:
            Path(file_path).parent.mkdir(parents=True, exist_ok=True)
            dump(self, values, file_path, file_format)
        except OSError as error:
            if not getattr(self, '_lost', False):
                print_log(
                    f'{file_path} cannot be written ({error}): lines of it are lost '
                    'until it can be. Training goes on',
                    logger='current',
                    level=logging.ERROR,
                )
            self._lost = True
        else:
            self._lost = False

    return wrapper
