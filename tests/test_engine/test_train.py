"""Training on tiny real data: what it leaves, and what it refuses."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config

from mmcls_involution.engine.errors import UserError
from mmcls_involution.engine.train import set_aside_checkpoints
from mmcls_involution.weights.files import latest_checkpoint


@pytest.mark.parametrize('task', ['detector', 'segmenter', 'classifier'])
def test_train_and_test(task, checkpoint, tool, tmp_path):
    file = checkpoint(task)
    state = torch.load(file)
    assert state['meta']['iter'] == 2
    assert all(v.isfinite().all() for v in state['state_dict'].values())
    logs = next(file.parent.glob('*/vis_data/scalars.json')).read_text().splitlines()
    losses = [json.loads(line)['loss'] for line in logs if '"loss"' in line]
    assert len(losses) == 2 and np.isfinite(losses).all()

    out = tmp_path / 'metrics.json'
    assert (
        tool(
            'test', task, file, '--work-dir', tmp_path / 'work',
            '--out', out, '--out-item', 'metrics',
        )
        == ''
    )  # fmt: skip
    saved = json.loads(out.read_text())
    (file,) = (tmp_path / 'work').glob('*/*.json')
    scores = json.loads(file.read_text())
    assert saved and saved.items() <= scores.items()


def test_a_new_run_keeps_the_checkpoints_of_the_earlier_one(checkpoint, tool, tmp_path):
    work = tmp_path / 'work'
    shutil.copytree(checkpoint('segmenter').parent, work)
    earlier = {file.name: file.read_bytes() for file in work.glob('*.pth')}
    options = ['--no-validate', '--cfg-options', 'train_cfg.max_iters=1']
    assert tool('train', 'segmenter', '--work-dir', work, *options) == ''
    (aside,) = work.glob('earlier_*')
    assert {file.name: file.read_bytes() for file in aside.glob('*.pth')} == earlier
    assert [file.name for file in work.glob('*.pth')] == ['iter_1.pth']

    options += [f'load_from={work / "iter_1.pth"}']
    message = tool('train', 'segmenter', '--work-dir', work, *options)
    assert 'own work dir' in message and '--resume' in message
    assert (work / 'iter_1.pth').exists()
    key = 'model.backbone.init_cfg'
    options[-1:] = [f'{key}.type=Pretrained', f'{key}.checkpoint={work / "iter_1.pth"}']
    message = tool('train', 'segmenter', '--work-dir', work, *options)
    assert f'{key}.checkpoint is a checkpoint in this run' in message
    assert (work / 'iter_1.pth').exists()


@pytest.mark.parametrize(
    'template', ['model_{}.pt', 'deep/model_{:03d}.pt', '{}/model.pt', 'newest.pt']
)
@pytest.mark.parametrize('out', [False, True])
@pytest.mark.parametrize('absolute', [False, True])
def test_checkpoints_by_any_name_are_kept(template, out, absolute, tmp_path):
    work = tmp_path / 'work'
    folder = tmp_path / 'out' / 'work' if out else work
    hook = dict(filename_tmpl=str(folder / template) if absolute else template)
    if out:
        hook['out_dir'] = str(tmp_path / 'out')
    last = folder / template.format(12)
    best = folder / f'best_a_{template.format(12).replace("/", "_")}'
    other = last.with_name('model_summary.pt')  # no checkpoint of this run
    work.mkdir()
    for file in (last, best, other):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(file.name)

    cfg = Config(dict(model={}, default_hooks=dict(checkpoint=hook)))
    runner = SimpleNamespace(work_dir=str(work), cfg=cfg, logger=logging.getLogger())
    cfg.load_from = str(last)
    with pytest.raises(UserError, match="load_from is a checkpoint in this run's own"):
        set_aside_checkpoints(runner)
    cfg.resume = True
    set_aside_checkpoints(runner)
    assert last.exists() and best.exists()
    cfg.resume, cfg.load_from = False, None
    set_aside_checkpoints(runner)
    assert not last.exists() and not best.exists() and other.exists()
    kept = {file.read_text() for file in tmp_path.rglob('earlier_*/*')}
    assert kept == {last.name, best.name}


@pytest.mark.parametrize('template', ['epoch_{}.pth', 'deep/e_{:03d}.pt'])
def test_going_back_to_an_earlier_checkpoint(template, tmp_path):
    """Those of after it would be resumed, were the run ended before its first save."""
    names = [template.format(number) for number in (2, 3, 10)]
    bests = [f'best_a_{name.replace("/", "_")}' for name in names]
    for name in (*names, *bests):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        torch.save(dict(state_dict={}), tmp_path / name)
    pointer = tmp_path / 'last_checkpoint'
    pointer.write_text(str(tmp_path / names[2]))
    cfg = Config(dict(model={}, default_hooks=dict(checkpoint={})))
    cfg.default_hooks.checkpoint.filename_tmpl = template
    cfg.resume, cfg.load_from = True, str(tmp_path / names[2])
    runner = SimpleNamespace(
        work_dir=str(tmp_path), cfg=cfg, logger=logging.getLogger()
    )
    set_aside_checkpoints(runner)
    assert all((tmp_path / name).exists() for name in (*names, *bests))
    cfg.load_from = str(tmp_path / names[1])
    set_aside_checkpoints(runner)
    there = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob('*.p*')}
    assert {*names[:2], *bests[:2]} <= there
    assert {Path(name).name for name in there if 'earlier_' in name} == {
        Path(names[2]).name, bests[2]
    }  # fmt: skip
    assert pointer.read_text() == str(tmp_path / names[1])
    assert latest_checkpoint(tmp_path, cfg) == tmp_path / names[1]


def test_flags_come_before_options_before_config(tool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ['--no-validate', '--cfg-options', 'train_cfg.max_iters=1']
    assert tool('train', 'segmenter', *short) == ''
    assert Path('work_dirs/segmenter/iter_1.pth').exists()
    assert tool('train', 'segmenter', *short, 'work_dir=option') == ''
    assert Path('option/iter_1.pth').exists()
    assert tool('train', 'segmenter', *short, 'work_dir=x', '--work-dir', 'flag') == ''
    assert Path('flag/iter_1.pth').exists() and not Path('x').exists()


@pytest.mark.parametrize('task', ['detector', 'classifier'])
def test_both_forms_of_auto_scale_lr(task, tool, tmp_path):
    arguments = ['--work-dir', tmp_path, '--no-validate', '--auto-scale-lr']
    assert tool('train', task, *arguments) == ''
    assert Config.fromfile(tmp_path / f'{task}.py').auto_scale_lr.enable
    (log,) = tmp_path.glob('*/vis_data/scalars.json')
    last = json.loads(log.read_text().splitlines()[-1])
    # two pictures per batch, and the detector's warm-up
    full = 0.01 * 2 / (16 if task == 'detector' else 256)
    assert last['lr'] == pytest.approx(full * (0.55 if task == 'detector' else 1))


def test_config_with_amp_trains_in_float32_on_cpu(tool, tmp_path, monkeypatch):
    monkeypatch.setattr('mmengine.device.get_device', lambda: 'cpu')
    if torch.cuda.is_available():
        pytest.skip('this is about machines without a GPU')
    options = [
        'optim_wrapper.type=AmpOptimWrapper', 'optim_wrapper.loss_scale=dynamic',
        'train_cfg.max_iters=1',
    ]  # fmt: skip
    arguments = ['--work-dir', tmp_path, '--no-validate', '--cfg-options', *options]
    assert tool('train', 'segmenter', *arguments) == ''
    assert (
        Config.fromfile(tmp_path / 'segmenter.py').optim_wrapper.type == 'OptimWrapper'
    )


@pytest.mark.parametrize(
    ('flags', 'expected'),
    [
        (['--resume', 'none.pth'], '--resume: none.pth does not exist'),
        (['--auto-scale-lr'], 'auto_scale_lr=dict'),
        (['--launcher', 'slurm'], 'torch.distributed.run'),
        (['--amp'], '--amp needs a GPU'),
    ],
)
def test_flag_error_is_one_message(flags, expected, tool, tmp_path):
    if torch.cuda.is_available() and flags[0] in ('--launcher', '--amp'):
        pytest.skip('this is about machines without a GPU')
    message = tool('train', 'segmenter', '--work-dir', tmp_path, *flags)
    assert message.startswith('Error: ') and expected in message


@pytest.mark.parametrize(
    ('options', 'found'),
    [
        (['model.backbone.frozen_stages=1'], 'frozen_stages=1 would keep random ones'),
        (
            ['model.backbone.frozen_stages=0', 'model.backbone.norm_eval=True'],
            'frozen_stages=0 and norm_eval=True would keep random ones. To train it '
            'from scratch: model.backbone.frozen_stages=-1 '
            'model.backbone.norm_eval=False',
        ),
        (['model.backbone.frozen_stages=-1'], None),
        (['model.backbone.norm_eval=True', 'load_from=weights.pth'], None),
        (
            ['model.backbone.frozen_stages=1']
            + ['model.backbone.init_cfg.type=Pretrained']
            + ['model.backbone.init_cfg.checkpoint=weights.pth'],
            None,
        ),
        (
            ['model.backbone.frozen_stages=1']
            + ['model.init_cfg.type=Pretrained']
            + ['model.init_cfg.checkpoint=weights.pth'],
            None,
        ),
    ],
)
def test_frozen_noise_is_named(options, found, tool, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('weights.pth').touch()
    # The missing data stops it before it trains.
    options = [*options, f'train_dataloader.dataset.data_root={tmp_path / "none"}']
    message = tool(
        'train', 'detector', '--work-dir', tmp_path, '--cfg-options', *options
    )
    assert 'none' in message
    text = ''.join(capfd.readouterr())
    assert ('has no pre-trained weights' in text) is (found is not None)
    assert (found or '') in text


def test_loss_that_is_not_finite_stops_the_run(tool, tmp_path):
    options = ['optim_wrapper.optimizer.lr=1e30', 'train_cfg.max_iters=4']
    arguments = ['--work-dir', tmp_path, '--no-validate', '--cfg-options', *options]
    message = tool('train', 'segmenter', *arguments)
    found = re.search(r'not finite at iteration (\d): loss nan', message)
    assert found and 'clip_grad' in message
    saved = {file.name for file in tmp_path.glob('*.pth')}
    assert saved == {f'iter_{i}.pth' for i in range(1, int(found[1]))}


# ---------------------------------------------------------------- weights to start from


def test_weights_are_looked_for_by_any_spelling(tool, tmp_path):
    start = dict(type='mmengine.Pretrained', checkpoint='nowhere.pth')
    options = [f'model.backbone.init_cfg.{key}={value}' for key, value in start.items()]
    message = tool(
        'train', 'detector', '--work-dir', tmp_path, '--cfg-options', *options
    )
    assert 'model.backbone.init_cfg.checkpoint: nowhere.pth does not exist' in message


def test_prefix_that_does_not_fit_is_explained(tool, tmp_path):
    bare, work_dir = tmp_path / 'bare.pth', tmp_path / 'work'
    torch.save(dict(state_dict={'stem.0.conv.weight': torch.zeros(16, 3, 3, 3)}), bare)
    start = dict(type='Pretrained', checkpoint=bare, prefix='backbone.')
    options = [f'model.backbone.init_cfg.{key}={value}' for key, value in start.items()]
    message = tool(
        'train', 'detector', '--work-dir', work_dir, '--cfg-options', *options
    )
    assert message.startswith(
        'Error: backbone. is not in the pretrained model: no name'
    )
    assert 'set model.backbone.init_cfg.prefix=None' in message


@pytest.mark.parametrize('name', ['train', 'test'])
def test_malicious_checkpoint_is_refused(name, tool, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path / "owned"}',)

    file = tmp_path / 'evil.pth'
    torch.save(dict(state_dict=Evil()), file)
    arguments = [file] if name == 'test' else ['--cfg-options', f'load_from={file}']
    message = tool(name, 'segmenter', *arguments, '--work-dir', tmp_path / 'work')
    assert message.startswith('Error: Refused to load') and 'system' in message
    assert not (tmp_path / 'owned').exists()


def test_checkpoint_of_another_model(checkpoint, tool, tmp_path):
    other = checkpoint('segmenter')
    message = tool('test', 'classifier', other, '--work-dir', tmp_path)
    assert re.search(r'does not fit the model: \d+ of \d+ parameters', message)
    state = torch.load(other)['state_dict']
    weights = {'other.' + key: value for key, value in state.items()}
    torch.save(dict(state_dict=weights), tmp_path / 'other.pth')
    options = ['--cfg-options', f'load_from={tmp_path / "other.pth"}']
    message = tool('train', 'segmenter', '--work-dir', tmp_path / 'work', *options)
    found = re.search(r'does not fit the model: (\d+) of (\d+) parameters', message)
    assert found and found[1] == found[2], message
