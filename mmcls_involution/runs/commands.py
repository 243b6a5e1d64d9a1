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
    """A command that we run has failed; the message has its last lines."""


def run_command(
    name: str, command: list[str], show: Callable[[str], None], **options: Any
) -> None:
    """Run a command, handing on each line that it prints; end it if we are ended.

    Args:
        name (str): What to call it, should it fail.
        command (list[str]): Program and arguments.
        show (Callable): Called with each line of its output, as it comes.
        **options: For ``subprocess.Popen``.

    Raises:
        StepError: If it fails.
    """
    tail: deque[str] = deque(maxlen=20)
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
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
        how = 'failed' if code > 0 else f'was ended by signal {-code}'
        raise StepError(f'{name} {how}:\n\n{"".join(tail)}')


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


def call(name: str, command: list[str], descriptor: int, quiet: bool = False) -> None:
    """Run a command with this Python, its output shown as it comes.

    Args:
        name: 'train' or 'test'.
        command: Its command line; ``python`` stands for this Python.
        descriptor: An open file that the command inherits.
        quiet: Whether its output goes nowhere. Defaults to False.

    Raises:
        StepError: If it fails.
    """

    def show(line: str) -> None:
        if not quiet:
            print(line, end='', flush=True)

    env = {**os.environ, 'PYTHONUNBUFFERED': '1'}
    command = [sys.executable, *command[1:]]
    try:
        run_command(f'tools/{name}.py', command, show, env=env, pass_fds=[descriptor])
    except StepError as error:
        # Our tools end with a message of their own; other last lines say less.
        message = re.search(r'^Error: (.*)', str(error), re.MULTILINE | re.DOTALL)
        raise StepError(
            f'tools/{name}.py: {message[1].strip()}' if message else error
        ) from None
