"""What is on record of a config's trainings and tests, and where it came from."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.utils.dl_utils import collect_env

from mmcls_involution import __version__
from mmcls_involution.engine.config import dicts, places
from mmcls_involution.engine.errors import UserError
from mmcls_involution.paths import ROOT
from mmcls_involution.weights.files import (
    identity,
    is_pretrained,
    starting_points,
    write_text,
)

# What decides the result of a training, and of a test.
TRAINING = (
    *('model', 'data_preprocessor', 'train_dataloader', 'train_cfg', 'optim_wrapper'),
    *('param_scheduler', 'custom_hooks', 'load_from', 'auto_scale_lr'),
)
TESTING = (
    *('model', 'data_preprocessor', 'test_dataloader', 'test_cfg', 'test_evaluator'),
    'custom_hooks',
)


@dataclass
class Job:
    """One config on its way to a report.

    Args:
        config: Its file, or the name of one of this package.
        options: Settings that override it, each as ``KEY=VALUE``.
        work_dir: Where its training writes; the report is in ``report`` there.
        cfg: What the two make.
        given: Checkpoint file or URL to test in place of a training's, if any.
        seed: Of the training. Defaults to None: the config's, else a drawn one.
        gpus: Number of processes. Defaults to None: one, without a launcher.
        error: What has failed, if anything.
        show: Called with each line that its training and its test print.
        record: What earlier calls have done, by step: ``report/record.json``.
    """

    config: Path
    options: list[str]
    work_dir: Path
    cfg: Config
    given: str | None = None
    seed: int | None = None
    gpus: int | None = None
    error: str | None = None
    show: Callable[[str], None] = functools.partial(print, end='', flush=True)
    record: dict[str, dict] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.config.stem

    @property
    def folder(self) -> Path:
        return self.work_dir / 'report'

    def remember(self, step: str, **facts: Any) -> None:
        """Note on disk what a step has done."""
        self.record[step] = facts
        text = json.dumps(self.record, indent=1, default=str)
        write_text(self.folder / 'record.json', text)


@contextlib.contextmanager
def lock(job: Job) -> Iterator[int]:
    """Keep other calls out of the work dir; yields the descriptor that holds the lock.

    The tools that we start inherit it: where this process is killed and its training
    lives on, the lock does too.

    Raises:
        UserError: If it is taken.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder / 'lock').open('a+') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f'{job.work_dir} is in use: an earlier call, or a training that it '
                f'started, is still at work there (pgrep -ag {file.read().strip()}). '
                'Wait for its end, or end it, and call again.'
            ) from None
        file.truncate(0)
        print(os.getpgid(0), file=file, flush=True)
        yield file.fileno()


def provenance(job: Job, command: list[str]) -> dict[str, Any]:
    """When, by which command, from which sources and where something was computed."""
    # The config names data and weights by them.
    variables = [
        f'{name}={shlex.quote(os.environ[name])}'
        for name in places(job.cfg)
        if name in os.environ
    ]
    environment = {k: str(v) for k, v in collect_env().items() if 'seed' not in k}
    for library in ('mmcv', 'mmdet', 'mmsegmentation', 'mmpretrain'):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            environment[library] = importlib.metadata.version(library)
    return dict(
        command=' '.join([*variables, shlex.join(command)]),
        time=time.strftime('%Y-%m-%d %H:%M:%S'),
        revision=revision(),
        environment=environment,
    )


def revision() -> str:
    """Version of the package, and the git revision it is at, where there is one."""
    command = ['git', '-C', str(ROOT), 'describe', '--always', '--dirty', '--exclude=*']
    try:
        if not (ROOT / '.git').exists():  # an installation, perhaps inside another's
            raise FileNotFoundError
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return f'{__version__}, not in a git repository'
    commit, _, dirty = found.stdout.strip().partition('-')
    return f'{__version__}, git {commit}' + (', with local changes' if dirty else '')


def pretrained(cfg: Config) -> dict[str, str]:
    """What a training starts from: identities by the keys that name them."""
    files = starting_points(cfg)
    return {key: identity(file) for key, file in files.items()}


def data_roots(cfg: Config) -> list[str]:
    """Where the data of a training lie."""
    parts = (part for _, part in dicts(cfg.get('train_dataloader')))
    return sorted({str(part['data_root']) for part in parts if part.get('data_root')})


def digests(
    cfg: Config, keys: tuple[str, ...], weights: dict[str, str] | None = None
) -> dict[str, str]:
    """Fingerprints of parts of a config.

    Without what only changes the speed, and without the places of pre-trained weights,
    which :func:`pretrained` identifies.

    Args:
        cfg (Config): The config.
        keys (tuple[str, ...]): Its parts.
        weights (dict[str, str], optional): What :func:`pretrained` gives: for what is
            the same on another machine, where ``load_from`` counts by its identity and
            ``data_root`` not at all. Defaults to None.
    """
    speed = ('num_workers', 'persistent_workers', 'pin_memory')
    content, found = cfg.to_dict(), {}
    for _, part in dicts(content):
        if is_pretrained(part):
            part.pop('checkpoint', None)
        if weights is not None:
            part.pop('data_root', None)
    if 'load_from' in (weights or {}):
        content['load_from'] = weights['load_from']
    for key, part in content.items():
        if key in keys:
            if key.endswith('_dataloader'):
                part = {name: part[name] for name in part if name not in speed}
            text = json.dumps(part, sort_keys=True, default=str)
            found[key] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found


def changed(job: Job) -> list[str]:
    """Parts of the config that differ from what our training was last started with."""
    before = job.record.get('train', {}).get('config')
    now = digests(job.cfg, TRAINING)
    if before is None:
        return []
    return sorted(key for key in before | now if before.get(key) != now.get(key))
