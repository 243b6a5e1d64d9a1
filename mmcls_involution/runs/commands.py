"""Running train and test as commands of their own, and showing what they print."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from mmcls_involution.runs.record import Job


class StepError(Exception):
    """A command that we run has failed."""


def command_line(
    job: Job,
    name: str,
    *arguments: Any,
    options: Sequence[str] = (),
    alone: bool = False,
) -> list[str]:
    """The command line of ``train`` or ``test``.

    Args:
        job: The config, the settings that override it, the number of processes.
        name: 'train' or 'test'.
        *arguments: What follows the config.
        options: Further settings, for this command.
        alone: Whether one process does it: only the first of several draws pictures.
    """
    command = ['python', '-m', 'mmcls_involution', name, job.config, *arguments]
    if job.gpus and not alone:
        launch = ('torch.distributed.run', f'--nproc_per_node={job.gpus}')
        port = f'--master_port={os.environ.get("PORT", 29500)}'
        command[2:2] = [*launch, port, '-m']
        command += ['--launcher', 'pytorch']
    if job.options or options:
        command += ['--cfg-options', *job.options, *options]
    return [str(part) for part in command]


def call(
    name: str, command: list[str], descriptor: int, show: Callable[[str], None]
) -> None:
    """Run a command with this Python; end it if we are ended.

    Args:
        name: 'train' or 'test'.
        command: Its command line; ``python`` stands for this Python.
        descriptor: An open file that the command inherits.
        show: Called with each line of its output, as it comes.

    Raises:
        StepError: If it fails; the message has its last lines.
    """
    tail: deque[str] = deque(maxlen=20)
    process = subprocess.Popen(
        [sys.executable, *command[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, 'PYTHONUNBUFFERED': '1'},
        pass_fds=[descriptor],
    )
    try:
        for line in process.stdout:
            tail.append(line)
            show(line)
        code = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if code:
        last = ''.join(tail)
        # Our tools end with a message of their own; other last lines say less.
        message = re.search(r'^Error: (.*)', last, re.MULTILINE | re.DOTALL)
        if message:
            raise StepError(f'{name}: {message[1].strip()}')
        how = 'failed' if code > 0 else f'was ended by signal {-code}'
        raise StepError(f'{name} {how}:\n\n{last}')
