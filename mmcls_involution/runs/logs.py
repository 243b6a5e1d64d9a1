"""The logs of a training: reading those of its parts, drawing them."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

from mmcls_involution.runs.metrics import METRICS, Metric, metrics_of, per_cent  # noqa: E402


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
