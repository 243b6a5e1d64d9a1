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
import base64
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
from urllib.parse import quote

import cv2
import matplotlib
import mmengine
import preflight
from demo import StepError, run_command
from jinja2 import Environment
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner import CheckpointLoader
from mmengine.utils.dl_utils import collect_env
from preflight import UserError
from train import latest_checkpoint

from mmcls_involution import __version__, compat

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PAPER = ROOT / 'configs' / 'paper.yml'
EXAMPLES = 6
# What decides the result of a training, and of a test.
TRAINING = (
    *('model', 'data_preprocessor', 'train_dataloader', 'train_cfg', 'optim_wrapper'),
    *('param_scheduler', 'custom_hooks', 'load_from'),
)
TESTING = (
    *('model', 'data_preprocessor', 'test_dataloader', 'test_cfg', 'test_evaluator'),
    'custom_hooks',
)


@dataclass(frozen=True)
class Metric:
    """How a score is named, shown and compared.

    Args:
        label: Its usual name.
        scale: Times MMEngine's value gives per cent.
        digits: After the point, as far as the evaluator computes it.
        tolerance: Difference to the paper, in per cent, that another seed may make;
            None for what the paper does not report.
        reason: Where the tolerance comes from.
    """

    label: str
    scale: float = 1
    digits: int = 2
    tolerance: float | None = None
    reason: str = ''


COCO_REASON = (
    'authors of COCO models call differences of 0.2 to 0.3 AP between repeated runs '
    'normal (GitHub facebookresearch/moco#39, PeizeSun/SparseR-CNN#62, '
    'facebookresearch/Mask2Former#46)'
)
IMAGENET_REASON = (
    'the best and the worst of 50 seeds of ResNet-50 on ImageNet lie 0.5 apart (arXiv '
    '2109.08203), so most of them within 0.2 of the mean'
)
METRICS = {
    'coco/bbox_mAP': Metric('box AP', 100, 1, 0.3, COCO_REASON),
    'coco/segm_mAP': Metric('mask AP', 100, 1, 0.3, COCO_REASON),
    'mIoU': Metric(
        'mIoU',
        tolerance=0.5,
        reason='repeated runs on Cityscapes have a standard deviation of about 0.4 '
        '(GitHub locuslab/mdeq#4), and single ones stray farther '
        '(open-mmlab/mmsegmentation#1208)',
    ),
    'accuracy/top1': Metric('top-1', tolerance=0.2, reason=IMAGENET_REASON),
    'accuracy/top5': Metric('top-5', tolerance=0.2, reason=IMAGENET_REASON),
    'single-label/f1-score': Metric('F1, mean over classes'),
}


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
            page = describe(job)
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
    before = job.record.get('train', {}).get('changed', [])
    facts = dict(
        **provenance(command),
        processes=job.gpus or 1,
        config=digests(job.cfg, TRAINING),
        changed=sorted({*before, *changed(job)}) if start else [],
    )
    job.remember('train', **facts)
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
    facts = provenance(command)
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
    facts = provenance(command)
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


def provenance(command: list[str]) -> dict[str, Any]:
    """When, by which command, from which sources and where something was computed."""
    environment = {k: str(v) for k, v in collect_env().items() if 'seed' not in k}
    for library in ('mmcv', 'mmdet', 'mmsegmentation', 'mmpretrain'):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            environment[library] = importlib.metadata.version(library)
    return dict(
        command=shlex.join(command),
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
    with Path(checkpoint).expanduser().open('rb') as file:
        return f'sha256 {hashlib.file_digest(file, "sha256").hexdigest()}'


def digests(cfg: Config, keys: tuple[str, ...]) -> dict[str, str]:
    """Fingerprints of parts of a config, without what only changes the speed."""
    speed = ('num_workers', 'persistent_workers', 'pin_memory')
    found = {}
    for key, part in cfg.to_dict().items():
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


# ------------------------------------------------------------------------------ the log


@dataclass
class Log:
    """The logs of a training, those of its resumed parts joined.

    Args:
        runs: Names of the logs' folders, in order.
        train: Lines about losses, with their iteration as ``step``.
        val: Lines about scores; ``x`` is the epoch or iteration they belong to.
    """

    runs: list[str] = field(default_factory=list)
    train: list[dict] = field(default_factory=list)
    val: list[dict] = field(default_factory=list)


def read_log(folder: Path, by_epoch: bool) -> Log:
    """Join the logs of all runs that led to the last checkpoint of a work dir.

    What a resumed run does again counts in its place; what lies before a run that
    started anew does not count at all.

    Args:
        folder: Work dir; each run has a ``<time>/vis_data/scalars.json`` in it.
        by_epoch: Whether scores are logged by epoch.
    """
    log = Log()
    for file in sorted(folder.glob('*/vis_data/scalars.json')):
        lines = []
        for text in file.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the last one may be torn
                lines.append(json.loads(text))
        config = file.with_name('config.py')
        if not config.is_file() or not re.search(
            r'^resume *= *True$', config.read_text(), re.MULTILINE
        ):
            log = Log()
        first = next((line['step'] for line in lines if 'lr' in line), None)
        if first is not None:
            log.train = [line for line in log.train if line['step'] < first]
            log.val = [line for line in log.val if line['iteration'] < first]
        log.runs.append(file.parents[1].name)
        iteration = 0
        for line in lines:
            if 'lr' in line:
                iteration = line['step']
                log.train.append(line)
                continue
            # MMEngine writes step 0 where an iteration-based loop logs by epoch.
            x = line['step'] if by_epoch else max(line['step'], iteration)
            log.val = [earlier for earlier in log.val if earlier['x'] != x]
            log.val.append({**line, 'x': x, 'iteration': iteration})
    return log


def per_cent(key: str, scores: dict[str, Any]) -> float | None:
    """A score in the paper's unit; None where it was not or could not be computed."""
    value = scores.get(key)
    if not isinstance(value, int | float) or value != value:
        return None
    if key.startswith('coco/') and value < 0:  # pycocotools' sign for undefined
        return None
    return value * METRICS.get(key, Metric(key)).scale


def metrics_of(scores: dict[str, Any], paper: dict[str, float]) -> list[str]:
    """Which scores to show: the paper's, else those we know, else all."""
    return list(paper) or [key for key in METRICS if key in scores] or list(scores)


def plot(log: Log, paper: dict[str, float], by_epoch: bool, out: Path) -> bool:
    """Draw loss and scores over the training; False where the log has neither."""
    logged = {key: None for line in log.val for key in line}
    for key in ('x', 'iteration', 'step', 'time', 'data_time'):
        logged.pop(key, None)
    scores = [key for key in metrics_of(logged, paper) if key in logged]
    losses = dict.fromkeys(
        key
        for line in log.train
        for key in line
        if key.split('.')[-1].startswith('loss')
    )
    panels = bool(losses) + bool(scores)
    if not panels:
        return False
    figure, axes = plt.subplots(
        1, panels, figsize=(5 * panels, 3.6), squeeze=False, layout='constrained'
    )
    axes = list(axes[0])
    if losses:
        axis = axes.pop(0)
        for key in sorted(losses, key='loss'.__ne__):
            points = [(line['step'], line[key]) for line in log.train if key in line]
            if key == 'loss':
                style = dict(label='total', linewidth=2, color='black')
            elif len(losses) > 2:  # a single part is the total
                style = dict(label=key.removeprefix('decode.'), linewidth=1)
            else:
                continue
            marker = '.' if len(points) < 20 else None
            axis.plot(*zip(*points, strict=True), marker=marker, **style)
        axis.set(xlabel='iteration', ylabel='training loss')
        axis.set_ylim(0, 1.05 * axis.dataLim.ymax)
    if scores:
        axis = axes.pop(0)
        for key in scores:
            label = METRICS.get(key, Metric(key)).label
            points = [(line['x'], per_cent(key, line)) for line in log.val]
            points = [(x, y) for x, y in points if y is not None]
            xs, ys = zip(*points, strict=True) if points else ((), ())
            (curve,) = axis.plot(xs, ys, label=label, marker='.')
            if key in paper:
                axis.axhline(
                    paper[key],
                    color=curve.get_color(),
                    linestyle='--',
                    linewidth=1,
                    label=f'{label}, paper: {paper[key]}',
                )
        axis.set(
            xlabel='epoch' if by_epoch else 'iteration',
            ylabel='validation score, per cent',
        )
    for axis in figure.axes:
        axis.legend(
            loc='lower left',
            bbox_to_anchor=(0, 1),
            ncols=3,
            fontsize=8,
            frameon=False,
            borderaxespad=0,
        )
        axis.xaxis.set_major_locator(
            MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)
        )
        axis.spines[['top', 'right']].set_visible(False)
        axis.grid(alpha=0.25)
    figure.savefig(out, dpi=130)
    plt.close(figure)
    return True


# ----------------------------------------------------------------------------- the page


def compare(scores: dict[str, Any], facts: dict[str, dict]) -> list[dict[str, str]]:
    """Rows of the table: what the paper has, what we have, and the verdict.

    Args:
        scores: Of our test, as MMEngine names and scales them; may be empty.
        facts: The config's entry in configs/paper.yml; may be empty.
    """
    paper, resnet = facts.get('scores', {}), facts.get('resnet50', {})
    rows = []
    for key in metrics_of(scores, paper) or ['']:
        metric = METRICS.get(key, Metric(key))
        ours = per_cent(key, scores)
        row = dict(
            metric=metric.label or 'score',
            paper=str(paper[key]) if key in paper else 'none: not in the paper',
            resnet=str(resnet[key]) if key in resnet else '',
            ours='none' if ours is None else f'{ours:.{metric.digits}f}',
            difference='',
            tolerance='' if key not in paper else f'±{metric.tolerance}',
            verdict='not measured' if ours is None else 'nothing to compare with',
        )
        if ours is not None and key in paper:
            # As many digits as the paper and the evaluator have, lest 39.2 be farther
            # than 0.3 from 39.5.
            difference = round(ours - paper[key], metric.digits)
            row['difference'] = f'{difference:+.{metric.digits}f}'
            row['verdict'] = (
                'within tolerance'
                if abs(difference) <= metric.tolerance
                else ('above the paper' if difference > 0 else 'below the paper')
            )
        rows.append(row)
    return rows


def deviations(job: Job, trained: dict[str, Any]) -> list[str]:
    """Where a training is known not to have followed the config's recipe.

    Args:
        job: The config, and the settings that override it.
        trained: The record of its training; empty if it was not ours.
    """
    found = []
    if job.options:
        found.append(f'Not the config as it stands: {" ".join(job.options)}.')
    if not trained:
        return found
    cfg, processes = job.cfg, trained['processes']
    batch = processes * cfg.train_dataloader.get('batch_size', 1)
    batch *= cfg.optim_wrapper.get('accumulative_counts', 1)
    named = re.search(r'_(\d+)xb(\d+)', job.name)
    recipe = (cfg.get('auto_scale_lr') or {}).get('base_batch_size') or (
        int(named[1]) * int(named[2]) if named else batch
    )
    if batch != recipe:
        found.append(
            f'{batch} images per iteration, over {processes} process'
            f'{"es" if processes > 1 else ""}; the recipe is for {recipe}.'
        )
    if parts := sorted({*trained['changed'], *changed(job)}):
        found.append(
            'The config was changed after the training had started: '
            f'{", ".join(parts)}. Train anew in another --work-dir for a result of '
            'this config alone.'
        )
    return found


def describe(job: Job) -> dict[str, Any]:
    """All that is on the page of a job."""
    facts = mmengine.load(PAPER).get(job.name, {})
    record = dict(job.record)
    tested = record.get('test', {})
    checkpoint = tested.get('checkpoint') or job.given
    logs = job.work_dir
    if checkpoint and '://' not in checkpoint:
        logs = Path(checkpoint).expanduser().absolute().parent
    if logs.absolute() != job.work_dir.absolute():
        record.pop('train', None)  # it is about other weights
    train_cfg = job.cfg.get('train_cfg') or {}
    logger = (job.cfg.get('default_hooks') or {}).get('logger') or {}
    by_epoch = 'max_epochs' in train_cfg and logger.get('log_metric_by_epoch', True)
    log = read_log(logs, by_epoch)
    curves = job.folder / 'curves.png'
    if not plot(log, facts.get('scores', {}), by_epoch, curves):
        curves = None

    meta = tested.get('meta', {})
    scores = tested.get('scores', {})
    rows = compare(scores, facts)
    notes = deviations(job, record.get('train', {}))
    for row in rows:
        if job.error and row['ours'] == 'none':
            row['verdict'] = 'failed'
            continue
        if notes and row['difference']:
            row['verdict'] += ', by another recipe'
        if job.error:
            row['verdict'] += '; from before, this call failed'
    if not facts:
        notes.append(
            'The paper has no figure for this config: there is nothing to compare with.'
        )
    if tested and not record.get('train'):
        notes.append('Trained by other means: how is not on record here.')
    about = {
        'Config': str(job.config),
        'Work dir': str(job.work_dir),
        'Checkpoint': checkpoint or 'none yet',
        'Weights': tested.get('key', {}).get('checkpoint', ''),
        'Trained to': ', '.join(
            f'{name} {meta[unit]}'
            for unit, name in (('epoch', 'epoch'), ('iter', 'iteration'))
            if meta.get(unit)
        ),
        'Seed': str(meta.get('seed', 'not in the checkpoint')) if tested else '',
        'Training logs': ', '.join(log.runs),
    }
    steps = [
        (name, record[step])
        for name, step in (
            *(('Training', 'train'), ('Test', 'test')),
            ('Example predictions', 'examples'),
        )
        if 'command' in record.get(step, {})
    ]
    environments = {
        name: step['environment'] for name, step in steps if 'Example' not in name
    }
    keys = dict.fromkeys(key for env in environments.values() for key in env)
    table = []
    for key in keys:
        values = {name: env.get(key, 'absent') for name, env in environments.items()}
        same = len(set(values.values())) == 1
        value = (
            [*values.values()][0]
            if same
            else '; '.join(f'{name}: {value}' for name, value in values.items())
        )
        table.append((key, ' '.join(value.split())))
    pictures = sorted(
        file
        for file in (job.folder / 'examples').rglob('*')
        if file.suffix in ('.png', '.jpg')
    )
    limits: dict[str, list[str]] = {}
    for key in facts.get('scores', {}):
        text = f'±{METRICS[key].tolerance}: {METRICS[key].reason}'
        limits.setdefault(text, []).append(METRICS[key].label)
    return dict(
        name=job.name,
        link=job.work_dir / 'report',
        error=job.error,
        rows=rows,
        tolerances=[f'{" and ".join(keys)} {text}' for text, keys in limits.items()],
        notes=notes,
        about=[(key, value) for key, value in about.items() if value],
        steps=steps,
        curves=curves,
        no_curves=f'{logs} has no log of losses or scores',
        examples=pictures,
        caption=''
        if job.cfg.default_scope == 'mmpretrain' or not pictures
        else 'Left: ground truth; right: prediction.',
        scores=[
            (key, value)
            for key, value in scores.items()
            if isinstance(value, int | float)
        ],
        environment=table,
    )


MARKDOWN = """\
{% macro table(pages) %}
| {{ 'Config | ' if pages|length > 1 }}Score | Paper, RedNet | Paper, ResNet-50 | Ours \
| Difference | Tolerance | Verdict |
|{{ '---|' if pages|length > 1 }}---|---|---|---|---|---|---|
{% for page in pages %}{% for row in page.rows %}
| {% if pages|length > 1 %}[{{ page.name }}]({{ page.link|path }}.md) | {% endif %}\
{{ row.values()|join(' | ') }} |
{% endfor %}{% endfor %}
{% endmacro %}
# {{ title }}

{{ table(pages) }}
{% if pages|length > 1 %}
{% for page in pages if page.error %}
**{{ page.name }} failed**

```text
{{ page.error }}
```

{% endfor %}
{% else %}
{% set page = pages[0] %}
{% if page.error %}
**Failed; what follows is from before.**

```text
{{ page.error }}
```

{% endif %}
{% for text in page.tolerances + page.notes %}
- {{ text }}
{% endfor %}

## What ran

{% for key, value in page.about %}
- {{ key }}: `{{ value }}`
{% endfor %}
{% for name, step in page.steps %}

{{ name }}, {{ step.time }}, {{ step.revision }}:

```sh
{{ step.command }}
```
{% endfor %}

## Curves

{% if page.curves %}
![Loss and scores over the training]({{ page.curves|path }})
{% else %}
None: {{ page.no_curves }}.
{% endif %}

## Example predictions

{{ page.caption }}

{% for file in page.examples %}
![{{ file.stem }}]({{ file|path }})
{% else %}
None.
{% endfor %}

## All scores of the test

{% for key, value in page.scores %}
- {{ key }}: {{ value }}
{% else %}
None.
{% endfor %}

## Environment

{% for key, value in page.environment %}
- {{ key }}: {{ value }}
{% else %}
Nothing has run.
{% endfor %}
{% endif %}

Written {{ now }} by `tools/reproduce.py`.
"""

HTML = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root {
  color-scheme: light dark;
  --text: #1d2126; --soft: #5b6470; --line: #d9dde2; --back: #fff; --panel: #f4f6f8;
  --good: #14713a; --bad: #b3261e; --other: #7a5a00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --text: #e4e7eb; --soft: #9aa4b0; --line: #363c44; --back: #15181c;
    --panel: #1f2429;
    --good: #6fd394; --bad: #ff8a80; --other: #e5c15c;
  }
}
body { color: var(--text); background: var(--back); max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin-top: 2rem; }
a { color: inherit; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 500; }
.facts td { overflow-wrap: anywhere; } .facts th { white-space: nowrap; }
pre { background: var(--panel); padding: .7rem .9rem; border-radius: 6px;
  font-size: .85rem; white-space: pre-wrap; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; border-radius: 6px; background: #fff;
  display: block; }
figure { margin: 0; } figcaption { color: var(--soft); font-size: .8rem;
  overflow-wrap: anywhere; }
.grid { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
.within { color: var(--good); } .below, .failed { color: var(--bad); }
.above, .not { color: var(--other); }
footer, .soft { color: var(--soft); }
</style>
{% macro table(pages) %}
<div class="wide"><table>
<tr>{% if pages|length > 1 %}<th>Config</th>{% endif %}<th>Score</th>
<th>Paper, RedNet</th><th>Paper, ResNet-50</th><th>Ours</th><th>Difference</th>
<th>Tolerance</th><th>Verdict</th></tr>
{% for page in pages %}{% for row in page.rows %}
<tr>{% if pages|length > 1 %}
<td><a href="{{ page.link|path }}.html">{{ page.name }}</a></td>{% endif %}
{% for key, value in row.items() %}
<td{% if key == 'verdict' %} class="{{ value.split()[0] }}"{% endif %}>{{ value }}</td>
{% endfor %}</tr>
{% endfor %}{% endfor %}
</table></div>
{% endmacro %}
<h1>{{ title }}</h1>
{{ table(pages) }}
{% if pages|length > 1 %}
{% for page in pages if page.error %}
<h2 class="failed">{{ page.name }} failed</h2>
<pre>{{ page.error }}</pre>
{% endfor %}
{% else %}
{% set page = pages[0] %}
{% if page.error %}
<h2 class="failed">Failed; what follows is from before</h2>
<pre>{{ page.error }}</pre>
{% endif %}
<ul class="soft">
{% for text in page.tolerances + page.notes %}
<li>{{ text }}</li>
{% endfor %}
</ul>
<h2>What ran</h2>
<table class="facts">
{% for key, value in page.about %}
<tr><th>{{ key }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table>
{% for name, step in page.steps %}
<p>{{ name }}, {{ step.time }}, {{ step.revision }}:</p>
<pre>{{ step.command }}</pre>
{% endfor %}
<h2>Curves</h2>
{% if page.curves %}
<img src="{{ page.curves|embed }}" alt="Loss and scores over the training">
{% else %}
<p>None: {{ page.no_curves }}.</p>
{% endif %}
<h2>Example predictions</h2>
<p class="soft">{{ page.caption }}</p>
<div class="grid">
{% for file in page.examples %}
<figure><img src="{{ file|embed }}" alt="{{ file.stem }}">
<figcaption>{{ file.name }}</figcaption></figure>
{% else %}
<p>None.</p>
{% endfor %}
</div>
<h2>All scores of the test</h2>
<table class="facts">
{% for key, value in page.scores %}
<tr><th>{{ key }}</th><td>{{ value }}</td></tr>
{% else %}
<tr><td>None.</td></tr>
{% endfor %}
</table>
<h2>Environment</h2>
<table class="facts">
{% for key, value in page.environment %}
<tr><th>{{ key }}</th><td>{{ value }}</td></tr>
{% else %}
<tr><td>Nothing has run.</td></tr>
{% endfor %}
</table>
{% endif %}
<footer><p>Written {{ now }} by tools/reproduce.py.</p></footer>
</html>
"""


def embed(file: Path) -> str:
    """A picture as a data URI, photos no wider than a page shows them."""
    if file.name == 'curves.png':
        kind, content = 'png', file.read_bytes()
    else:
        picture = cv2.imread(str(file))
        height, width = picture.shape[:2]
        if width > 960:
            size = (960, round(height * 960 / width))
            picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        quality = [cv2.IMWRITE_JPEG_QUALITY, 88]
        kind, content = 'jpeg', cv2.imencode('.jpg', picture, quality)[1].tobytes()
    return f'data:image/{kind};base64,{base64.b64encode(content).decode()}'


def write(folder: Path, pages: list[dict[str, Any]]) -> None:
    """Write report.md and report.html: one page whole, or several as one table.

    Args:
        folder: Where to; links in the report are relative to it.
        pages: What :func:`describe` gives.
    """
    names = pages[0]['name'] if len(pages) == 1 else f'{len(pages)} configs'
    content = dict(
        title=f'Reproduction of {names}',
        pages=pages,
        now=time.strftime('%Y-%m-%d %H:%M:%S'),
    )
    for suffix, template in (('md', MARKDOWN), ('html', HTML)):
        jinja = Environment(
            autoescape=suffix == 'html',
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        jinja.filters['embed'] = embed
        jinja.filters['path'] = lambda file: quote(os.path.relpath(file, folder))
        text = jinja.from_string(template).render(content)
        (folder / f'report.{suffix}').write_text(text, encoding='utf-8')


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
