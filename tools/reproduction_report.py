"""The report of tools/reproduce.py: scores beside the paper's, logs, curves, pages."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import cv2
import matplotlib
import mmengine
from jinja2 import Environment, FileSystemLoader

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

if TYPE_CHECKING:
    from mmengine.config import Config
    from reproduce import Job

ROOT = Path(__file__).resolve().parents[1]
PAPER = ROOT / 'configs' / 'paper.yml'
# report.md and report.html of one config or of several.
TEMPLATES = ROOT / 'tools' / 'templates'


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


def batch_deviation(cfg: Config, name: str, processes: int) -> str | None:
    """What a number of processes does to the batch that a config is for."""
    batch = processes * cfg.train_dataloader.get('batch_size', 1)
    batch *= cfg.optim_wrapper.get('accumulative_counts', 1)
    scaling = cfg.get('auto_scale_lr') or {}
    named = re.search(r'_(\d+)xb(\d+)', name)
    recipe = scaling.get('base_batch_size') or (
        int(named[1]) * int(named[2]) if named else batch
    )
    if batch == recipe:
        return None
    rate = 'scaled to that' if scaling.get('enable') else 'not scaled to that'
    return (
        f'{batch} images per iteration, over {processes} process'
        f'{"es" if processes > 1 else ""}; the recipe is for {recipe}. The learning '
        f'rate is {rate}.'
    )


def deviations(job: Job, trained: dict[str, Any], changed: list[str]) -> list[str]:
    """Where a training is known not to have followed the config's recipe.

    Args:
        job: The config, and the settings that override it.
        trained: The record of its training; empty if it was not ours.
        changed: Parts of the config that are not as the training had them.
    """
    found = []
    if job.options:
        found.append(f'Not the config as it stands: {" ".join(job.options)}.')
    if not trained:
        return found
    if batch := batch_deviation(job.cfg, job.name, trained['processes']):
        found.append(batch)
    if parts := sorted({*trained['changed'], *changed}):
        found.append(
            'The config was changed after the training had started: '
            f'{", ".join(parts)}. Train anew in another --work-dir for a result of '
            'this config alone.'
        )
    return found


def describe(job: Job, changed: list[str]) -> dict[str, Any]:
    """All that is on the page of a job.

    Args:
        job: The config, its work dir and what is on record there.
        changed: Parts of the config that are not as the training had them.
    """
    facts = mmengine.load(PAPER).get(job.name, {})
    record = dict(job.record)
    tested = record.get('test', {})
    checkpoint = tested.get('checkpoint') or job.given
    logs = job.work_dir
    if checkpoint:  # a URL is no folder of ours, and has no logs
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
    notes = deviations(job, record.get('train', {}), changed)
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
        'Started from': '; '.join(
            f'{key}: {file}'
            for key, file in record.get('train', {}).get('weights', {}).items()
        ),
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
    for suffix in ('md', 'html'):
        jinja = Environment(
            loader=FileSystemLoader(TEMPLATES),
            autoescape=suffix == 'html',
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        jinja.filters['embed'] = embed
        jinja.filters['path'] = lambda file: quote(os.path.relpath(file, folder))
        text = jinja.get_template(f'reproduction.{suffix}.jinja').render(content)
        (folder / f'report.{suffix}').write_text(text, encoding='utf-8')
