"""Downloads that leave a whole file or none, however many processes ask for it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout  # torch needs it, too
from mmengine.logging import print_log

from mmcls_involution.engine.errors import UserError
from mmcls_involution.weights.files import put_in_place

PATIENCE = 60  # seconds without a byte from the server


def cache_folder() -> Path:
    """Where torch.hub keeps checkpoints: ``$TORCH_HOME/hub/checkpoints``."""
    return Path(torch.hub.get_dir()) / 'checkpoints'


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Let one process at a time make a file; the others wait.

    The lock ends with the process that holds it, however it ends.

    Args:
        path (Path): The file. Its folder is made if need be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f'.{path.name}.lock'))
    try:
        lock.acquire(timeout=1)
    except Timeout:
        print_log(f'Waiting for the process that makes {path}', logger='current')
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def download(url: str, path: Path, check: Callable[[Path], Any]) -> None:
    """Fetch a file with a progress bar, unless it is there.

    Args:
        url (str): Of the file.
        path (Path): Where it is put once it is whole and right.
        check (Callable[[Path], Any]): Raises a UserError for a wrong file.

    Raises:
        UserError: If it cannot be had, or is wrong. Nothing is left behind then.
        OSError: If it cannot be written.
    """
    if path.is_file():
        return
    with alone(path):
        if path.is_file():
            return
        print_log(f'Downloading {url}', logger='current')
        for old in path.parent.glob(f'.{path.name}.*.partial'):  # of a killed process
            old.unlink()
        unchecked = path.with_name(f'.{path.name}.unchecked')
        timeout = socket.getdefaulttimeout()
        try:
            socket.setdefaulttimeout(PATIENCE)  # torch.hub would wait for ever
            torch.hub.download_url_to_file(url, str(unchecked))
            check(unchecked)
            put_in_place(unchecked, path)
        except (HTTPException, OSError, UserError, ValueError) as error:
            reason = str(error).replace(str(unchecked), 'what came')
            raise UserError(f'cannot download {url}: {reason}') from None
        finally:
            socket.setdefaulttimeout(timeout)
            unchecked.unlink(missing_ok=True)
