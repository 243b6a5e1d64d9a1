"""Logs, verdicts, and what stands on the page."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest

from mmcls_involution.runs import report
from mmcls_involution.runs.logs import read_log
from mmcls_involution.runs.metrics import METRICS, compare
from mmcls_involution.runs.page import write
from mmcls_involution.runs.record import TRAINING, Job, changed, digests

ROOT = Path(__file__).parents[2]


def write_log(folder: Path, time: str, resume: bool, lines: list[dict]) -> None:
    data = folder / time / 'vis_data'
    data.mkdir(parents=True)
    (data / 'config.py').write_text(f'a = 1\nresume = {resume}\n')
    text = '\n'.join(map(json.dumps, lines))
    (data / 'scalars.json').write_text(
        text + '\n{"lr": 0.1, "lo'
    )  # killed while writing


def train_line(step: int, loss: float) -> dict:
    return dict(lr=0.1, loss=loss, iter=step, step=step)


def test_logs_of_a_resumed_training_are_joined(tmp_path):
    # An abandoned training; one killed after iteration 30, its last checkpoint at 20;
    # the one that went on from there.
    write_log(tmp_path, '1', False, [train_line(10 * i, 9) for i in range(1, 9)])
    write_log(
        *(tmp_path, '2', False),
        [train_line(10, 5), dict(mIoU=1, step=10), train_line(20, 4)]
        + [dict(mIoU=2, step=20), train_line(30, 3), dict(mIoU=3, step=30)],
    )
    write_log(
        tmp_path,
        '3',
        True,
        [train_line(30, 2), train_line(40, 1), dict(mIoU=4, step=40)],
    )
    log = read_log(tmp_path, by_epoch=False)
    assert log.runs == ['2', '3']
    assert [(line['step'], line['loss']) for line in log.train] == [
        *((10, 5), (20, 4), (30, 2), (40, 1))
    ]
    # The score at 30 was of weights that are lost.
    assert [(line['x'], line['mIoU']) for line in log.val] == [
        (10, 1),
        (20, 2),
        (40, 4),
    ]


def test_scores_logged_by_epoch(tmp_path):
    lines = [
        train_line(50, 1),
        dict(mIoU=1, step=1),
        train_line(100, 1),
        dict(mIoU=2, step=2),
    ]
    write_log(tmp_path, '1', False, lines)
    write_log(tmp_path, '2', True, [train_line(100, 1), dict(mIoU=3, step=2)])
    log = read_log(tmp_path, by_epoch=True)
    assert [(line['x'], line['mIoU']) for line in log.val] == [(1, 1), (2, 3)]
    # Epochs shorter than the logger's interval leave no line about losses.
    write_log(tmp_path, '3', True, [dict(mIoU=4, step=2), dict(mIoU=5, step=3)])
    log = read_log(tmp_path, by_epoch=True)
    assert [(line['x'], line['mIoU']) for line in log.val] == [(1, 1), (2, 4), (3, 5)]
    # An iteration-based loop that logs by epoch says step 0: the last iteration counts.
    (tmp_path / 'other').mkdir()
    lines = [
        train_line(50, 1),
        dict(mIoU=1, step=0),
        train_line(100, 1),
        dict(mIoU=2, step=0),
    ]
    write_log(tmp_path / 'other', '1', False, lines)
    log = read_log(tmp_path / 'other', by_epoch=False)
    assert [(line['x'], line['mIoU']) for line in log.val] == [(50, 1), (100, 2)]


@pytest.mark.parametrize(
    ('ours', 'difference', 'verdict'),
    [
        (0.395, '+0.0', 'within tolerance'),
        (0.392, '-0.3', 'within tolerance'),
        (0.398, '+0.3', 'within tolerance'),
        (0.391, '-0.4', 'below the paper'),
        (0.399, '+0.4', 'above the paper'),
        (-1, '', 'not measured'),
        (float('nan'), '', 'not measured'),
        (None, '', 'not measured'),
    ],
)
def test_verdict(ours, difference, verdict):
    facts = dict(scores={'coco/bbox_mAP': 39.5}, resnet50={'coco/bbox_mAP': 37.7})
    scores = {'coco/bbox_mAP_50': 0.6} | (
        {} if ours is None else {'coco/bbox_mAP': ours}
    )
    (row,) = compare(scores, facts)
    assert (row['paper'], row['resnet']) == ('39.5', '37.7')
    assert (row['difference'], row['verdict']) == (difference, verdict)


def paper_job(tmp_path: Path, options: list[str]) -> object:
    """A finished test of the paper's Faster R-CNN, as far as the record goes."""
    from mmengine.config import Config

    file = ROOT / 'configs' / 'coco' / 'faster-rcnn_rednet50_fpn_1x_coco.py'
    job = Job(file, options, tmp_path, Config.fromfile(file))
    facts = dict(command='x', time='t', revision='r', environment={})
    config = digests(job.cfg, TRAINING)
    job.remember('train', **facts, processes=8, changed=[], config=config)
    checkpoint = str(tmp_path / 'epoch_12.pth')
    scores = {'coco/bbox_mAP': 0.396, 'coco/bbox_mAP_50': 0.61}
    job.remember(
        'test', checkpoint=checkpoint, scores=scores, meta=dict(epoch=12), **facts
    )
    return job


def test_page_of_a_paper_config(tmp_path):
    pytest.importorskip('mmdet')

    def describe(job: object) -> dict:
        return report.describe(job, changed(job))

    job = paper_job(tmp_path, [])
    page = describe(job)
    (row,) = page['rows']
    assert list(row.values()) == [
        *('box AP', '39.5', '37.7', '39.6', '+0.1', '±0.3', 'within tolerance')
    ]
    assert page['notes'] == [] and 'moco#39' in page['tolerances'][0]
    assert page['curves'] is None
    write(tmp_path, [page])
    assert 'has no log' in (tmp_path / 'report.md').read_text()

    job.record['train']['processes'] = 1
    page = describe(job)
    assert page['notes'] == [
        '2 images per iteration, over 1 process; the recipe is for 16. The learning '
        'rate is not scaled to that.'
    ]
    assert page['rows'][0]['verdict'] == 'within tolerance, by another recipe'
    job.cfg.auto_scale_lr.enable = True
    assert describe(job)['notes'][0].endswith('The learning rate is scaled to that.')
    job.error = 'no space left'
    assert describe(job)['rows'][0]['verdict'].endswith('this call failed')
    job.cfg.optim_wrapper.optimizer.lr = 1
    assert 'optim_wrapper' in describe(job)['notes'][1]
    page = describe(paper_job(tmp_path, ['model.x=1']))
    assert page['notes'] == ['Not the config as it stands: model.x=1.']


def test_page_of_a_downloaded_checkpoint(tmp_path):
    """The training in the work dir is not that of the weights."""
    pytest.importorskip('mmdet')
    job = paper_job(tmp_path, [])
    write_log(tmp_path, '1', False, [train_line(10, 5)])
    steps = ['Training', 'Test']
    assert [name for name, _ in report.describe(job, [])['steps']] == steps
    job.record['test']['checkpoint'] = 'https://example.com/epoch_12.pth'
    page = report.describe(job, [])
    assert [name for name, _ in page['steps']] == ['Test']
    assert page['notes'] == ['Trained by other means: how is not on record here.']
    assert page['curves'] is None


def test_paper_figures_are_known_scores():
    table = import_module('mmengine').load(report.PAPER)
    assert len(table) == 16
    for name, facts in table.items():
        assert (
            facts['params'] > 0
            and facts['flops'] > 0
            and len(facts['input_shape']) == 2
        )
        assert set(facts.get('resnet50', {})) <= set(facts['scores'])
        for key, value in facts['scores'].items():
            assert METRICS[key].tolerance and METRICS[key].reason
            assert 30 < value < 100, (name, 'per cent')
