r"""Compare configs over several seeds, from the work dirs of reproduce.

    for seed in 0 1 2; do
        python -m mmcls_involution reproduce CONFIG.py OTHER.py --seed $seed \
            --work-dir runs/$seed
    done
    python -m mmcls_involution compare runs/*/CONFIG runs/*/OTHER

Settings of one config are told apart by names: NAME=WORK_DIR.

Prints a Markdown table: mean and sample standard deviation of the test scores, and how
far each config is from the first. Draws loss and validation scores over the training,
as means with a band from the lowest to the highest seed, and every test score.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from mmcls_involution.engine.config import check_picture
from mmcls_involution.engine.errors import UserError
from mmcls_involution.runs.logs import Log, plt, read_log
from mmcls_involution.runs.metrics import METRICS, per_cent
from mmcls_involution.weights.files import identity


@dataclass(frozen=True)
class Run:
    """One training and its test.

    Args:
        folder: Its work dir.
        name: Of its config, or what else it was called.
        seed: Of the training.
        recipes: Fingerprints of the config's parts that decide the training, with the
            number of processes; as far as it is on record, also one that is the same
            wherever the data lie.
        weights: What the training started from, as far as that is on record.
        data: Where its data were, as far as that is on record.
        scores: Of the test, as MMEngine names and scales them.
        log: Losses and validation scores, by iteration.
    """

    folder: Path
    name: str
    seed: int
    recipes: list[dict[str, Any]]
    weights: dict[str, str]
    data: list[str]
    scores: dict[str, float]
    log: Log

    def repeats(self, other: Run) -> bool:
        """Whether it was trained as another run, but for the seed."""
        for key in self.weights.keys() & other.weights.keys():
            starts = {self.weights[key], other.weights[key]}
            # by content; one file may have an address here and a path there
            if len(starts) > 1 and all(start.startswith('sha256 ') for start in starts):
                return False
        return any(recipe in other.recipes for recipe in self.recipes)


def read_run(folder: Path, name: str | None = None) -> Run:
    """Read what the command reproduce has left in a work dir.

    Args:
        folder: The work dir.
        name: What to call the run. Defaults to None: as its config.

    Raises:
        UserError: If it has left no training with a test of it there, or the scores
            are not those of the config.
    """
    try:
        record = json.loads((folder / 'report' / 'record.json').read_text())
        train, test = record['train'], record['test']
        changed, last = train['changed'], folder / train['finished']
        recipes = [
            dict(train[key], processes=train['processes'])
            for key in ('config', 'recipe')
            if key in train
        ]
        weights, data = train.get('weights', {}), train.get('data', [])
        # '[NAME=VALUE ...] python -m mmcls_involution test CONFIG ...'; earlier ones
        # ran tools/test.py, or tools/dist_test.sh
        words = shlex.split(test['command'])
        is_test = re.compile(r'test|([^=]*/)?(dist_)?test\.(py|sh)').fullmatch
        (config, *_) = [after for word, after in pairwise(words) if is_test(word)]
        config = Path(config).name.removesuffix('.py')
        seed, scores = test['meta']['seed'], test['scores']
    except (OSError, LookupError, ValueError) as error:
        raise UserError(
            f'{folder} has no training that is finished and tested '
            f'({type(error).__name__}: {error}). Name work dirs of '
            'python -m mmcls_involution reproduce.'
        ) from error
    problem = None
    if changed:
        problem = f'{", ".join(changed)} of the config was changed during the training'
    # by the last two names: a relative path is one from where reproduce was called
    elif Path(test['checkpoint']).parts[-2:] != last.resolve().parts[-2:] and not (
        # by its content: of a folder that is renamed since, or a link
        last.is_file() and test.get('key', {}).get('checkpoint') == identity(str(last))
    ):
        problem = f'the scores are of {test["checkpoint"]}, not of {last}'
    if problem:
        raise UserError(
            f'{folder}: {problem}. Run reproduce again, in a new work dir if need be.'
        )
    # By iteration, so that configs with epochs and without fit one axis.
    log = read_log(folder, by_epoch=False)
    return Run(folder, name or config, seed, recipes, weights, data, scores, log)


def group(runs: list[Run]) -> dict[str, list[Run]]:
    """Sort runs by name, in the order in which they were given.

    Raises:
        UserError: If two runs of a name differ in more than the seed, or in nothing.
    """
    configs: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        for other in configs[run.name]:
            if not run.repeats(other):
                raise UserError(
                    f'{other.folder} and {run.folder} have trained {run.name} with '
                    'different settings: they are no repetitions of one another. Name '
                    'the settings, as NAME=WORK_DIR.'
                )
            if other.seed == run.seed:
                raise UserError(
                    f'{other.folder} and {run.folder} have the same seed, {run.seed}.'
                )
        configs[run.name].append(run)
    return dict(configs)


def tested(runs: list[Run], key: str) -> list[float]:
    """One score of several tests, in per cent, as far as it could be computed."""
    scores = (per_cent(key, run.scores) for run in runs)
    return [score for score in scores if score is not None]


def table(configs: dict[str, list[Run]], keys: list[str]) -> str:
    """Means, standard deviations and differences, as a Markdown table."""
    labels = [METRICS[key].label for key in keys]
    lines = [
        '| Config | Seeds |' + ''.join(f' {x} | Difference |' for x in labels),
        '| :-- | :-: |' + ' :-: | :-: |' * len(keys),
    ]
    first: dict[str, float] = {}
    for name, runs in configs.items():
        line = f'| {name} | {len(runs)} |'
        for key in keys:
            scores, digits = tested(runs, key), METRICS[key].digits
            if not scores:
                line += ' – | – |'
                continue
            mean = statistics.mean(scores)
            line += f' {mean:.{digits}f}'
            if len(scores) > 1:
                line += f' ± {statistics.stdev(scores):.{digits}f}'
            difference = f'{mean - first[key]:+.{digits}f}' if key in first else ''
            line += f' | {difference} |'
            first.setdefault(key, mean)
        lines.append(line)
    return '\n'.join(lines)


def plot(configs: dict[str, list[Run]], keys: list[str], out: Path) -> None:
    """Draw the losses, and for each score its course and the tests."""
    figure, axes = plt.subplots(
        1, 1 + 2 * len(keys), figsize=(4.2 * (1 + 2 * len(keys)), 3.8), squeeze=False
    )
    loss, *others = axes[0]
    loss.set(xlabel='iteration', ylabel='training loss')
    for i, (name, runs) in enumerate(configs.items()):
        color = f'C{i}'
        points = [
            [(line['step'], line['loss']) for line in run.log.train if 'loss' in line]
            for run in runs
        ]
        number = f'{len(runs)} seed{"s" if len(runs) > 1 else ""}'
        draw_band(loss, points, color, f'{name}, {number}')
        for key, course, tests in zip(keys, others[::2], others[1::2], strict=True):
            points = [
                [
                    (line['x'], per_cent(key, line))
                    for line in run.log.val
                    if key in line
                ]
                for run in runs
            ]
            draw_band(course, points, color, None)
            label = f'{METRICS[key].label}, per cent'
            course.set(xlabel='iteration', ylabel=f'validation {label}')
            scores = tested(runs, key)
            tests.plot([i] * len(scores), scores, 'o', color=color, alpha=0.6)
            if scores:
                mean = statistics.mean(scores)
                tests.hlines(mean, i - 0.25, i + 0.25, color=color)
            tests.set(ylabel=f'test {label}', xlim=(-0.6, len(configs) - 0.4))
            tests.set_xticks([])
    for axis in axes[0]:
        axis.grid(alpha=0.25)
        axis.spines[['top', 'right']].set_visible(False)
    figure.legend(loc='outside upper center', ncols=len(configs), frameon=False)
    figure.set_layout_engine('constrained')
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def draw_band(
    axis: plt.Axes, curves: list[list[tuple]], color: str, label: str | None
) -> None:
    """Draw the mean of curves where all have a point, between lowest and highest."""
    values = defaultdict(list)
    for curve in curves:
        for x, y in curve:
            if y is not None:
                values[x].append(y)
    xs = sorted(x for x, ys in values.items() if len(ys) == len(curves))
    means = [statistics.mean(values[x]) for x in xs]
    marker = '.' if len(xs) < 20 else None
    axis.plot(xs, means, color=color, label=label, marker=marker)
    lows, highs = ([f(values[x]) for x in xs] for f in (min, max))
    axis.fill_between(xs, lows, highs, color=color, alpha=0.2, linewidth=0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        'work_dirs', nargs='+', metavar='[NAME=]WORK_DIR', help='one for each run'
    )
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('work_dirs/comparison.png'),
        help='picture to write (default: %(default)s)',
    )


def main(args: argparse.Namespace) -> None:
    """The command ``compare``."""
    check_picture(args.out, '--out')
    runs = []
    for text in args.work_dirs:
        name, folder = None, text
        if '=' in text and not Path(text).is_dir():
            name, _, folder = text.partition('=')
        runs.append(read_run(Path(folder), name))
    configs = group(runs)
    found = {key for runs in configs.values() for run in runs for key in run.scores}
    keys = [key for key in METRICS if key in found]
    if not keys:
        raise UserError(
            f'None of the scores is known: {", ".join(sorted(found)) or "none"}. '
            f'Expected one of {", ".join(METRICS)}.'
        )
    print(table(configs, keys))
    for name, runs in configs.items():
        places = sorted({', '.join(run.data) for run in runs if run.data})
        if len(places) > 1:
            print(
                f'\nNote: {name} was trained on the data in {" and ".join(places)}: '
                'its runs repeat one another if these are the same.'
            )
    plot(configs, keys, args.out)
    print(f'\nWritten: {args.out}')
