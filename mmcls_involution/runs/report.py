"""What the page of a config says: scores, deviations, commands, environment."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mmengine
from mmengine.config import Config

from mmcls_involution.paths import ROOT
from mmcls_involution.runs.logs import plot, read_log
from mmcls_involution.runs.metrics import METRICS, compare
from mmcls_involution.runs.record import Job

PAPER = ROOT / 'configs' / 'paper.yml'


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


def environment(steps: list[tuple[str, dict]]) -> list[tuple[str, str]]:
    """Where training and test have run; what differs between them is given by step.

    Args:
        steps: Names and records of steps. The examples ran where the test did.
    """
    parts = {n: step['environment'] for n, step in steps if 'Example' not in n}
    table = []
    for key in dict.fromkeys(key for part in parts.values() for key in part):
        values = {name: part.get(key, 'absent') for name, part in parts.items()}
        first, *others = dict.fromkeys(values.values())
        if others:
            first = '; '.join(f'{name}: {value}' for name, value in values.items())
        table.append((key, ' '.join(first.split())))
    return table


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
    names = dict(train='Training', test='Test', examples='Example predictions')
    steps = [
        (name, record[step])
        for step, name in names.items()
        if 'command' in record.get(step, {})
    ]
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
        environment=environment(steps),
    )
