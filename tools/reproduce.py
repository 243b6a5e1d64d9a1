"""Train and test configs, and report how close they come to the paper.

    python tools/reproduce.py CONFIG [CONFIG ...] [--checkpoint FILE ...] [--gpus N]

For each config: tools/train.py, tools/test.py on the last checkpoint, and one page,
report.md and report.html, in the work dir: the scores beside the paper's, loss and
score curves, example predictions, commands, seed, revision and environment. Several
configs share one more page with one table. With --checkpoint nothing is trained.

Start it at any stage and as often as you like. An interrupted training goes on from its
last checkpoint, a finished one is not repeated, nor is a test whose checkpoint and
config are as they were.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mmengine
import preflight
from demo import StepError, run_command
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner import CheckpointLoader
from mmengine.utils.dl_utils import collect_env
from model_converters.checkpoint_utils import sha256
from preflight import UserError
from reproduction_report import batch_deviation, compare, describe, write
from train import latest_checkpoint

from mmcls_involution import __version__, compat

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = 6
# What decides the result of a training, and of a test.
TRAINING = (
    *('model', 'data_preprocessor', 'train_dataloader', 'train_cfg', 'optim_wrapper'),
    *('param_scheduler', 'custom_hooks', 'load_from', 'auto_scale_lr'),
)
TESTING = (
    *('model', 'data_preprocessor', 'test_dataloader', 'test_cfg', 'test_evaluator'),
    'custom_hooks',
)


# ------------------------------------------------------------------- command line, jobs


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('configs', nargs='+', metavar='CONFIG', help='config file')
    parser.add_argument(
        '--checkpoint',
        nargs='+',
        metavar='FILE',
        help='test these files or URLs, one per config, instead of training',
    )
    parser.add_argument(
        '--work-dir',
        help='folder for logs, checkpoints and the report; of several configs each '
        'gets a folder of its name in it (default: as of train.py)',
    )
    parser.add_argument('--seed', type=int, help='seed of the training')
    parser.add_argument(
        '--gpus', type=int, help='train and test in this many processes (dist_train.sh)'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help='settings that override every config, as of train.py',
    )
    return parser.parse_args()


@dataclass
class Job:
    """One config on its way to a report."""

    config: Path
    options: list[str]
    work_dir: Path
    cfg: Config
    given: str | None = None
    seed: int | None = None
    gpus: int | None = None
    error: str | None = None
    # What earlier calls have done, by step: kept in work_dir/report/record.json.
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
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / 'record.json.part'
        part.write_text(json.dumps(self.record, indent=1, default=str))
        part.replace(self.folder / 'record.json')


def prepare(args: argparse.Namespace) -> list[Job]:
    """Read every config and checkpoint path before any work is started.

    Raises:
        UserError: If one of them cannot be used, or two would share a work dir.
    """
    given = args.checkpoint or [None] * len(args.configs)
    if len(given) != len(args.configs):
        raise UserError(
            f'--checkpoint names {len(given)} files for {len(args.configs)} configs. '
            'Give one per config, in the same order.'
        )
    if args.gpus is not None and args.gpus < 1:
        raise UserError(f'--gpus {args.gpus}: at least one process is needed')
    for option in args.cfg_options:
        if '=' not in option:
            raise UserError(f'--cfg-options {option}: expected KEY=VALUE')
    parser = argparse.ArgumentParser()
    parser.add_argument('config')
    preflight.add_common_arguments(parser)
    jobs: list[Job] = []
    for config, checkpoint in zip(args.configs, given, strict=True):
        flags = ['--cfg-options', *args.cfg_options] if args.cfg_options else []
        if args.work_dir:
            several = len(args.configs) > 1
            work_dir = Path(args.work_dir, Path(config).stem if several else '')
            flags += ['--work-dir', str(work_dir)]
        cfg = preflight.load_config(parser.parse_args([config, *flags]))
        preflight.check_checkpoint(checkpoint, '--checkpoint')
        job = Job(
            *(Path(config), args.cfg_options, Path(cfg.work_dir), cfg, checkpoint),
            *(args.seed, args.gpus),
        )
        for other in jobs:
            if other.work_dir.absolute() == job.work_dir.absolute():
                raise UserError(
                    f'{other.config} and {config} would both work in {job.work_dir}. '
                    'Reproduce them one by one, each with its own --work-dir.'
                )
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            job.record = json.loads((job.folder / 'record.json').read_text())
        jobs.append(job)
    return jobs


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


# -------------------------------------------------------------------------------- steps


def reproduce(job: Job) -> dict[str, Any]:
    """Do the steps of a job that are not yet done, and write its report.

    What fails is kept in ``job.error`` and stands in the report.

    Returns:
        What the report says; see :func:`describe`.
    """
    try:
        with lock(job) as descriptor:
            try:
                run_steps(job, descriptor)
            except (StepError, UserError, pickle.UnpicklingError) as error:
                job.error = str(error)
            except Exception as error:
                traceback.print_exc()
                job.error = f'{type(error).__name__}: {error}'
            print(f'[4/4] Report: {job.work_dir / "report.html"}', flush=True)
            page = describe(job, changed(job))
            write(job.work_dir, [page])
    except UserError as error:  # the folder is in use: nothing is written there
        job.error = str(error)
        page = dict(
            name=job.name, link=job.folder, error=job.error, rows=compare({}, {})
        )
    return page


def run_steps(job: Job, descriptor: int) -> None:
    """Train, test and draw, as far as that is not yet done."""
    check(job)
    checkpoint, finished = look_at_training(job)
    if job.given:
        print(f'[1/4] Training: none, {job.given} is given', flush=True)
    elif finished:
        print(f'[1/4] Training: finished, {checkpoint}', flush=True)
    else:
        checkpoint = train(job, checkpoint, descriptor)
    key = dict(checkpoint=identity(checkpoint), config=digests(job.cfg, TESTING))
    test(job, checkpoint, key, descriptor)
    draw_examples(job, checkpoint, key, descriptor)


def check(job: Job) -> None:
    """Look for what would stop a training or, days later, the test after it.

    Raises:
        UserError: As of ``preflight.check``; or if the training that is to go on has
            another seed than is asked for.
    """
    init_default_scope(job.cfg.default_scope)  # the toolboxes differ between jobs
    if not look_at_training(job)[1]:
        preflight.check(job.cfg, ('train', 'val', 'test'))


def look_at_training(job: Job) -> tuple[str | None, bool]:
    """The checkpoint to test so far, and whether training is finished with it.

    Raises:
        UserError: If it was trained with another seed than is asked for.
    """
    if job.given:
        return job.given, True
    latest = latest_checkpoint(job.work_dir)
    if latest is None:
        return None, False
    meta = read_meta(str(latest))
    if job.seed is not None and meta.get('seed', job.seed) != job.seed:
        raise UserError(
            f'--seed {job.seed}: {latest} was trained with seed {meta["seed"]}. Give '
            'another --work-dir for another seed.'
        )
    loop = job.cfg.get('train_cfg') or {}
    done = any(
        loop.get(f'max_{unit}s') and meta.get(unit, 0) >= loop[f'max_{unit}s']
        for unit in ('epoch', 'iter')
    )
    # A training may have ended before that: by early stopping, say.
    record = job.record.get('train', {})
    ended = record.get('finished') == latest.name and not changed(job)
    return str(latest), done or ended


def train(job: Job, start: str | None, descriptor: int) -> str:
    """Train, from the checkpoint ``start`` if there is one; returns the last one."""
    print(f'[1/4] Training: {job.work_dir}', flush=True)
    seed = [] if job.seed is None else [f'randomness.seed={job.seed}']
    command = tool(job, 'train', '--work-dir', job.work_dir, '--resume', options=seed)
    before = job.record.get('train', {})
    facts = dict(
        **provenance(job, command),
        processes=job.gpus or 1,
        # A resumed training reads them from its checkpoint.
        weights=before.get('weights', {}) if start else pretrained(job.cfg),
        config=digests(job.cfg, TRAINING),
        changed=sorted({*before.get('changed', []), *changed(job)}) if start else [],
    )
    job.remember('train', **facts)
    if deviation := batch_deviation(job.cfg, job.name, facts['processes']):
        print(
            f'      Note: {deviation} See --gpus, and --cfg-options with '
            'train_dataloader.batch_size=... or auto_scale_lr.enable=True.',
            flush=True,
        )
    call('train.py', command, descriptor)
    latest = latest_checkpoint(job.work_dir)
    if latest is None:
        raise StepError(
            f'tools/train.py left no checkpoint in {job.work_dir}. Does the config '
            'have a CheckpointHook?'
        )
    job.remember('train', **facts, finished=latest.name)
    return str(latest)


def test(job: Job, checkpoint: str, key: dict, descriptor: int) -> None:
    """Test the checkpoint, unless that has been done with this very config."""
    if job.record.get('test', {}).get('key') == key:
        print(f'[2/4] Test: finished, {checkpoint}', flush=True)
        return
    print(f'[2/4] Test: {checkpoint}', flush=True)
    job.record.pop('test', None)
    out = job.folder / 'scores.json'
    command = tool(
        *(job, 'test', checkpoint, '--work-dir', job.folder / 'test'),
        *('--out', out, '--out-item', 'metrics'),
    )
    facts = provenance(job, command)
    call('test.py', command, descriptor)
    scores, meta = mmengine.load(out), read_meta(checkpoint)
    job.remember(
        'test', key=key, checkpoint=checkpoint, meta=meta, scores=scores, **facts
    )


def draw_examples(job: Job, checkpoint: str, key: dict, descriptor: int) -> None:
    """Draw predictions of some images, spread evenly over the test set."""
    folder = job.folder / 'examples'
    if job.record.get('examples', {}).get('key') == key:
        print(f'[3/4] Examples: finished, {folder}', flush=True)
        return
    shutil.rmtree(folder, ignore_errors=True)
    option, dataset = 'test_dataloader.dataset', job.cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        option, dataset = f'{option}.dataset', dataset.dataset
    hook = (job.cfg.get('default_hooks') or {}).get('visualization')
    if not hook or 'datasets' in dataset:
        print(
            '[3/4] Examples: none. They need a visualization hook in default_hooks, '
            'and one data set.',
            flush=True,
        )
        job.remember('examples', key=key)
        return
    print(f'[3/4] Examples: {folder}', flush=True)
    length = len(DATASETS.build(dataset))
    number = min(EXAMPLES, length)
    indices = ','.join(str((2 * i + 1) * length // (2 * number)) for i in range(number))
    options = [f'{option}.indices=[{indices}]']
    if job.cfg.default_scope == 'mmpretrain':  # its text is illegible on small photos
        options.append('default_hooks.visualization.rescale_factor=4')
    command = tool(
        *(job, 'test', checkpoint, '--work-dir', job.folder / 'test'),
        *('--show-dir', folder),
        options=options,
        alone=True,
    )
    facts = provenance(job, command)
    # Quiet, lest the scores of so few images be taken for a result.
    call('test.py', command, descriptor, quiet=True)
    job.remember('examples', key=key, **facts)


def tool(
    job: Job,
    name: str,
    *arguments: Any,
    options: Sequence[str] = (),
    alone: bool = False,
) -> list[str]:
    """The command line of train.py or test.py.

    Args:
        job: The config, the settings that override it, the number of processes.
        name: 'train' or 'test'.
        *arguments: What follows the config.
        options: Further settings, for this command.
        alone: Whether one process does it: only the first of several draws pictures.
    """
    tools = Path(os.path.relpath(ROOT / 'tools'))
    positional, flags = [job.config], list(arguments)
    if name == 'test':
        positional.append(flags.pop(0))
    if job.gpus and not alone:
        command = ['bash', tools / f'dist_{name}.sh', *positional, job.gpus, *flags]
    else:
        command = ['python', tools / f'{name}.py', *positional, *flags]
    if job.options or options:
        command += ['--cfg-options', *job.options, *options]
    return [str(part) for part in command]


def call(name: str, command: list[str], descriptor: int, quiet: bool = False) -> None:
    """Run a command with this Python, its output shown as it comes.

    Raises:
        StepError: If it fails.
    """

    def show(line: str) -> None:
        if not quiet:
            print(line, end='', flush=True)

    python = Path(sys.executable)
    if command[0] == 'python':
        command = [str(python), *command[1:]]
    path = os.pathsep.join([str(python.parent), os.environ.get('PATH', '')])
    env = {**os.environ, 'PATH': path, 'PYTHONUNBUFFERED': '1'}
    try:
        run_command(f'tools/{name}', command, show, env=env, pass_fds=[descriptor])
    except StepError as error:
        # Our tools end with a message of their own; other last lines say less.
        message = re.search(r'^Error: (.*)', str(error), re.MULTILINE | re.DOTALL)
        raise StepError(
            f'tools/{name}: {message[1].strip()}' if message else error
        ) from None


# -------------------------------------------------------------------- what is on record


def provenance(job: Job, command: list[str]) -> dict[str, Any]:
    """When, by which command, from which sources and where something was computed."""
    # The config names data and weights by them.
    variables = [
        f'{name}={shlex.quote(os.environ[name])}'
        for name in preflight.places(job.cfg)
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
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return f'{__version__}, not in a git repository'
    commit, _, dirty = found.stdout.strip().partition('-')
    return f'{__version__}, git {commit}' + (', with local changes' if dirty else '')


def read_meta(checkpoint: str) -> dict[str, Any]:
    """Epoch, iteration and seed of a local checkpoint, as far as it has them."""
    if '://' in checkpoint:
        return {}
    content = CheckpointLoader.load_checkpoint(checkpoint, 'cpu', logger='silent')
    meta = content.get('meta') or {}
    return {key: meta[key] for key in ('epoch', 'iter', 'seed') if key in meta}


def identity(checkpoint: str) -> str:
    """What tells this checkpoint from any other: its sha256, or its URL."""
    if '://' in checkpoint:
        return checkpoint
    return f'sha256 {sha256(Path(checkpoint).expanduser())}'


def pretrained(cfg: Config) -> dict[str, str]:
    """What a training starts from: identities by the keys that name them."""
    files = preflight.starting_points(cfg)
    return {key: identity(file) for key, file in files.items()}


def digests(cfg: Config, keys: tuple[str, ...]) -> dict[str, str]:
    """Fingerprints of parts of a config.

    Without what only changes the speed, and without the places of pre-trained weights,
    which :func:`pretrained` identifies.
    """
    speed = ('num_workers', 'persistent_workers', 'pin_memory')
    content, found = cfg.to_dict(), {}
    for _, part in preflight.dicts(content):
        if part.get('type') == 'Pretrained':
            part.pop('checkpoint', None)
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


def main() -> None:
    args = parse_args()
    compat.apply()
    # `kill` ends us as Ctrl-C does: with the tool that we run.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with preflight.one_message_per_error():
        jobs = prepare(args)
        try:
            for job in jobs[1:]:
                try:
                    check(job)
                except (UserError, pickle.UnpicklingError) as error:
                    # It may be put right before its turn.
                    print(f'Note: {job.name} would fail. {error}', flush=True)
            pages = []
            for i, job in enumerate(jobs, 1):
                print(f'== {job.name} ({i}/{len(jobs)})', flush=True)
                pages.append(reproduce(job))
        except KeyboardInterrupt:
            sys.exit('\nInterrupted: the same command goes on from the last checkpoint')
        if len(jobs) > 1:
            folder = Path(args.work_dir or 'work_dirs')
            folder.mkdir(parents=True, exist_ok=True)
            write(folder, pages)
            print(f'== One table: {folder / "report.html"}')
    for page in pages:
        for row in page['rows']:
            print(f'{page["name"]}: {row["metric"]} {row["ours"]}, {row["verdict"]}')
    if failed := [page for page in pages if page['error']]:
        sys.exit(
            '\n'.join(f'Error: {page["name"]}: {page["error"]}' for page in failed)
        )


if __name__ == '__main__':
    main()
