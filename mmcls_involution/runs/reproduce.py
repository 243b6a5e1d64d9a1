"""Train and test configs, and report how close they come to the paper.

    python -m mmcls_involution reproduce CONFIG [CONFIG ...] [--checkpoint FILE ...]

For each config: a training, a test of the last checkpoint, and one page,
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
import json
import pickle
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import mmengine
from mmengine.registry import DATASETS, init_default_scope

from mmcls_involution.engine import checks
from mmcls_involution.engine.config import add_common_arguments, load_config
from mmcls_involution.engine.errors import UserError
from mmcls_involution.runs.commands import StepError, call, command_line
from mmcls_involution.runs.metrics import compare
from mmcls_involution.runs.page import write
from mmcls_involution.runs.record import (
    TESTING,
    TRAINING,
    Job,
    changed,
    data_roots,
    digests,
    lock,
    pretrained,
    provenance,
)
from mmcls_involution.runs.report import batch_deviation, describe
from mmcls_involution.weights.files import (
    check_checkpoint,
    identity,
    latest_checkpoint,
    read_meta,
)

EXAMPLES = 6  # pictures of predictions


# ------------------------------------------------------------------- command line, jobs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument('configs', nargs='+', metavar='CONFIG', help='as of train')
    parser.add_argument(
        '--checkpoint',
        nargs='+',
        metavar='FILE',
        help='test these files or URLs, one per config, instead of training',
    )
    parser.add_argument(
        '--work-dir',
        help='folder for logs, checkpoints and the report; of several configs each '
        'gets a folder of its name in it (default: as of train)',
    )
    parser.add_argument('--seed', type=int, help='seed of the training')
    parser.add_argument(
        '--gpus', type=int, help='train and test in this many processes'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help='settings that override every config, as of train',
    )


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
    add_common_arguments(parser)
    jobs: list[Job] = []
    for config, checkpoint in zip(args.configs, given, strict=True):
        flags = ['--cfg-options', *args.cfg_options] if args.cfg_options else []
        if args.work_dir:
            several = len(args.configs) > 1
            work_dir = Path(args.work_dir, Path(config).stem if several else '')
            flags += ['--work-dir', str(work_dir)]
        cfg = load_config(parser.parse_args([config, *flags]))
        check_checkpoint(checkpoint, '--checkpoint')
        place, options = Path(cfg.work_dir), args.cfg_options
        job = Job(Path(config), options, place, cfg, checkpoint, args.seed, args.gpus)
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
        UserError: As of ``check``; or if the training that is to go on has
            another seed than is asked for.
    """
    init_default_scope(job.cfg.default_scope)  # the toolboxes differ between jobs
    if not look_at_training(job)[1]:
        checks.check(job.cfg, ('train', 'val', 'test'))


def look_at_training(job: Job) -> tuple[str | None, bool]:
    """The checkpoint to test so far, and whether training is finished with it.

    Raises:
        UserError: If it was trained with another seed than is asked for.
    """
    if job.given:
        return job.given, True
    latest = latest_checkpoint(job.work_dir, job.cfg)
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
    ended = record.get('finished') == Path(latest).name and not changed(job)
    return str(latest), done or ended


def train(job: Job, start: str | None, descriptor: int) -> str:
    """Train, from the checkpoint ``start`` if there is one; returns the last one."""
    print(f'[1/4] Training: {job.work_dir}', flush=True)
    seed = [] if job.seed is None else [f'randomness.seed={job.seed}']
    command = command_line(
        job, 'train', '--work-dir', job.work_dir, '--resume', options=seed
    )
    before = job.record.get('train', {})
    # A resumed training reads them from its checkpoint.
    weights = before.get('weights', {}) if start else pretrained(job.cfg)
    facts = dict(
        **provenance(job, command),
        processes=job.gpus or 1,
        weights=weights,
        config=digests(job.cfg, TRAINING),
        recipe=digests(job.cfg, TRAINING, weights),
        data=data_roots(job.cfg),
        changed=sorted({*before.get('changed', []), *changed(job)}) if start else [],
    )
    job.remember('train', **facts)
    if deviation := batch_deviation(job.cfg, job.name, facts['processes']):
        print(
            f'      Note: {deviation} See --gpus, and --cfg-options with '
            'train_dataloader.batch_size=... or auto_scale_lr.enable=True.',
            flush=True,
        )
    call('train', command, descriptor, job.show)
    latest = latest_checkpoint(job.work_dir, job.cfg)
    if latest is None:
        raise StepError(
            f'The training left no checkpoint in {job.work_dir}. Does the config '
            'have a CheckpointHook?'
        )
    job.remember('train', **facts, finished=Path(latest).name)
    return str(latest)


def test(job: Job, checkpoint: str, key: dict, descriptor: int) -> None:
    """Test the checkpoint, unless that has been done with this very config."""
    if job.record.get('test', {}).get('key') == key:
        print(f'[2/4] Test: finished, {checkpoint}', flush=True)
        return
    print(f'[2/4] Test: {checkpoint}', flush=True)
    job.record.pop('test', None)
    out = job.folder / 'scores.json'
    command = command_line(
        *(job, 'test', checkpoint, '--work-dir', job.folder / 'test'),
        *('--out', out, '--out-item', 'metrics'),
    )
    facts = provenance(job, command)
    call('test', command, descriptor, job.show)
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
    command = command_line(
        *(job, 'test', checkpoint, '--work-dir', job.folder / 'test'),
        *('--show-dir', folder),
        options=options,
        alone=True,
    )
    facts = provenance(job, command)
    # Quiet, lest the scores of so few images be taken for a result.
    call('test', command, descriptor, show=lambda line: None)
    job.remember('examples', key=key, **facts)


def main(args: argparse.Namespace) -> None:
    """The command ``reproduce``."""
    # `kill` ends us as Ctrl-C does: with the tool that we run.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
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
