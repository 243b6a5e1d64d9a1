"""Testing on tiny real data: what it leaves, and what it refuses."""

from __future__ import annotations

import pickle
import shutil
from argparse import Namespace

import pytest
import torch
from mmengine.config import Config

from mmcls_involution.engine.errors import UserError
from mmcls_involution.engine.test import check_out


@pytest.mark.parametrize('task', ['detector', 'segmenter', 'classifier'])
def test_pictures_and_predictions(task, checkpoint, tool, tmp_path):
    file, pictures = checkpoint(task), tmp_path / 'pictures'
    out = tmp_path / ('maps' if task == 'segmenter' else 'predictions.pkl')
    assert (
        tool(
            'test', task, file, '--work-dir', tmp_path / 'work',
            '--show-dir', pictures, '--out', out,
        )
        == ''
    )  # fmt: skip
    assert len([*pictures.glob('**/*.png'), *pictures.glob('**/*.jpg')]) == 4
    if task == 'segmenter':
        assert len(list(out.glob('*.png'))) == 4
    else:
        assert len(pickle.loads(out.read_bytes())) == 4


def test_predictions_outlive_a_metric_that_fails(
    checkpoint, tool, tmp_path, monkeypatch
):
    file, out = checkpoint('detector'), tmp_path / 'predictions.pkl'
    from mmdet.evaluation import CocoMetric

    def fail(self, results):
        raise RuntimeError('of the metric')

    monkeypatch.setattr(CocoMetric, 'compute_metrics', fail)
    with pytest.raises(RuntimeError, match='of the metric'):
        tool('test', 'detector', file, '--work-dir', tmp_path, '--out', out)
    assert len(pickle.loads(out.read_bytes())) == 4


@pytest.mark.parametrize('item', ['pred', 'metrics'])
def test_an_output_that_cannot_be_written_is_refused_first(item, tmp_path, monkeypatch):
    def check(out):
        check_out(
            Config(dict(default_scope='mmdet')), Namespace(out=str(out), out_item=item)
        )

    (tmp_path / 'folder.pkl').mkdir()
    (tmp_path / 'file').touch()
    (tmp_path / 'old.pkl').touch()
    check(tmp_path / 'old.pkl')
    check(tmp_path / 'new' / 'er' / 'a.pkl')
    assert (tmp_path / 'new' / 'er').is_dir()
    for name, message in (
        ('folder.pkl', 'folder.pkl is a folder: name a file'),
        ('file/a.pkl', 'file does not exist: make it'),
    ):
        with pytest.raises(UserError, match=f'--out: .*{message}'):
            check(tmp_path / name)
    for read_only, name in ((tmp_path, 'a.pkl'), (tmp_path / 'old.pkl', 'old.pkl')):
        monkeypatch.setattr('os.access', lambda path, _, no=read_only: path != no)
        with pytest.raises(UserError, match=f'--out: {read_only} is read-only'):
            check(tmp_path / name)


@pytest.mark.parametrize('task', ['detector', 'classifier'])
def test_default_augmentation_of_tests(task, checkpoint, tool, tmp_path):
    assert tool('test', task, checkpoint(task), '--work-dir', tmp_path, '--tta') == ''
    assert len(list(tmp_path.glob('*/*.log'))) == 1


def test_missing_checkpoint(tool, tmp_path):
    message = tool('test', 'segmenter', 'none.pth', '--work-dir', tmp_path)
    assert message.startswith('Error: checkpoint: none.pth does not exist')


@pytest.mark.parametrize('folder', ['histopath/tower', 'path/to', '<mine>'])
def test_a_checkpoint_that_is_there_is_no_placeholder(
    folder, checkpoint, tool, tmp_path
):
    file = tmp_path / folder / 'last.pth'
    file.parent.mkdir(parents=True)
    shutil.copy(checkpoint('segmenter'), file)
    assert tool('test', 'segmenter', file, '--work-dir', tmp_path / 'work') == ''
    message = tool('test', 'segmenter', file.parent / 'no.pth')
    assert ('is a placeholder' in message) == (folder != 'histopath/tower')


@pytest.mark.parametrize(
    ('task', 'flags', 'expected'),
    [
        ('detector', ['--out', 'folder'], 'predictions go to a .pkl file'),
        ('detector', ['--out-item', 'metrics'], 'needs --out'),
        ('detector', ['--out', 'a.txt', '--out-item', 'metrics'], 'metrics go to'),
        ('segmenter', ['--tta'], '--tta needs'),
        ('segmenter', ['--amp'], '--amp needs a GPU'),
        ('classifier', ['--tta', '--show-dir', 'x'], 'cannot draw'),
        ('segmenter', ['--show-dir', 'x', '--interval', '0'], '--interval must be at '),
    ],
)
def test_flag_error_of_tests(task, flags, expected, checkpoint, tool, tmp_path):
    if torch.cuda.is_available() and flags == ['--amp']:
        pytest.skip('this is about machines without a GPU')
    message = tool('test', task, checkpoint(task), '--work-dir', tmp_path, *flags)
    assert message.startswith('Error: ') and expected in message
