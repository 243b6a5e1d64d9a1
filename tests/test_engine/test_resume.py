"""Trainings that are resumed, and those that cannot be."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch

TWICE = dict(
    detector=('train_cfg.max_epochs=2', 'epoch_1.pth', 'epoch_2.pth'),
    segmenter=('train_cfg.max_iters=4', 'iter_2.pth', 'iter_4.pth'),
)


@pytest.mark.parametrize('task', TWICE)
def test_resumed_run_equals_uninterrupted_run(task, tool, tmp_path):
    option, half, last = TWICE[task]
    whole, auto, named = (tmp_path / name for name in ('whole', 'auto', 'named'))
    arguments = ['--no-validate', '--cfg-options', option]
    assert tool('train', task, '--work-dir', whole, *arguments) == ''
    # A run that was killed there, in a work dir that was moved: last_checkpoint names
    # a file that is gone.
    auto.mkdir()
    shutil.copy(whole / half, auto)
    (auto / 'last_checkpoint').write_text(str(tmp_path / 'gone' / half))
    for folder, resume in ((auto, []), (named, [whole / half])):
        arguments[:1] = ['--no-validate', '--resume', *resume]
        assert tool('train', task, '--work-dir', folder, *arguments) == ''
        del arguments[1 : 2 + len(resume)]
        assert_same_training_state(torch.load(whole / last), torch.load(folder / last))


def assert_same_training_state(a: dict, b: dict) -> None:
    """Compare counters, weights, optimizer and schedules bit for bit."""
    for key in ('epoch', 'iter', 'seed'):
        assert a['meta'][key] == b['meta'][key]
    assert a['state_dict'].keys() == b['state_dict'].keys()
    for key, value in a['state_dict'].items():
        assert torch.equal(value, b['state_dict'][key]), key
    assert a['param_schedulers'] == b['param_schedulers']
    assert a['optimizer']['param_groups'] == b['optimizer']['param_groups']
    assert a['optimizer']['state'].keys() == b['optimizer']['state'].keys() != set()
    for i, state in a['optimizer']['state'].items():
        for key, value in state.items():
            assert torch.equal(value, b['optimizer']['state'][i][key]), (i, key)
    losses = [c['message_hub']['log_scalars']['train/loss'].data[0] for c in (a, b)]
    assert np.array_equal(*losses)


def test_resume_takes_the_files_of_its_own_folder_alone(checkpoint, tool, tmp_path):
    """A copied work dir, and another run under the name that the first one had."""
    work, copy = tmp_path / 'work', tmp_path / 'copy'
    for folder in (work, copy):
        shutil.copytree(checkpoint('segmenter').parent, folder)
        (folder / 'last_checkpoint').write_text(str(work / 'iter_2.pth'))
    shutil.copy(work / 'iter_1.pth', work / 'iter_2.pth')
    options = ['--no-validate', '--cfg-options', 'train_cfg.max_iters=3']
    assert tool('train', 'segmenter', '--work-dir', copy, '--resume', *options) == ''
    assert not list(copy.glob('earlier_*'))
    assert {f'iter_{i}.pth' for i in (1, 2, 3)} == {f.name for f in copy.glob('*.pth')}
    log = max(copy.glob('*/vis_data/scalars.json')).read_text().splitlines()
    assert [json.loads(line)['step'] for line in log] == [3]


def test_resume_keeps_the_best_checkpoint_of_the_other_run(tool, tmp_path):
    work, copy = tmp_path / 'work', tmp_path / 'copy'
    options = ['--cfg-options', 'default_hooks.checkpoint.save_best=mIoU']
    assert tool('train', 'segmenter', '--work-dir', work, *options) == ''
    (best,) = work.glob('best_*.pth')
    shutil.copytree(work, copy)
    state = torch.load(copy / 'iter_2.pth')
    assert state['message_hub']['runtime_info']['best_ckpt'] == str(best)
    state['message_hub']['runtime_info']['best_score'] = -1.0
    torch.save(state, copy / 'iter_2.pth')
    options += ['train_cfg.max_iters=4']
    assert tool('train', 'segmenter', '--work-dir', copy, '--resume', *options) == ''
    assert best.exists()
    assert [file.name for file in copy.glob('best_*')] == ['best_mIoU_iter_4.pth']


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        (
            ['model.decode_head.channels=8'],
            r'The config says model.decode_head.channels=8 \(before: 16\). 22 '
            r'parameters do not fit: .*conv_seg.weight is \[2, 16, 1, 1\], in the '
            r'model \[2, 8, ',
        ),
        (
            ['model.backbone.depth=38'],
            r'depth=38 \(before: 26\). \d+ parameters do not fit: .* is missing',
        ),
        (
            ['model.decode_head.in_channels=[16,16]',
             'model.decode_head.feature_strides=[4,8]',
             'model.decode_head.in_index=[0,1]'],
            r'parameters of it are not in the model: decode_head.scale_heads.2',
        ),
        (
            ['optim_wrapper.optimizer._delete_=True',
             'optim_wrapper.optimizer.type=AdamW'],
            r'optimizer SGD has .*momentum.* that of the config, AdamW, .*betas',
        ),
        (
            ['optim_wrapper.paramwise_cfg.bias_lr_mult=2'],
            r'optimizer has (\d+) parameters in 1 group\(s\), that of the config \1 '
            r'parameters in \1 group',
        ),
        (
            ['param_scheduler.0.type=LinearLR'],
            'Its param_scheduler is PolyLR, that of the config LinearLR',
        ),
        (
            ['param_scheduler=None'],
            'Its param_scheduler is PolyLR, that of the config none',
        ),
    ],
)  # fmt: skip
def test_resume_of_another_training(options, expected, checkpoint, tool, tmp_path):
    work = tmp_path / 'work'
    shutil.copytree(checkpoint('segmenter').parent, work)
    before = sorted(work.rglob('*'))
    options = ['--cfg-options', *options, 'train_cfg.max_iters=3']
    message = tool('train', 'segmenter', '--work-dir', work, '--resume', *options)
    assert re.search(expected, message), message
    assert f'load_from={work / "iter_2.pth"}' in message
    assert sorted(work.rglob('*')) == before


def test_resume_of_bare_weights(checkpoint, tool, tmp_path):
    weights, work = tmp_path / 'weights.pth', tmp_path / 'work'
    torch.save(
        dict(state_dict=torch.load(checkpoint('segmenter'))['state_dict']), weights
    )
    message = tool('train', 'segmenter', '--work-dir', work, '--resume', weights)
    assert 'holds weights, and no state of a training' in message
    assert not work.exists()


def test_settings_that_a_resumed_run_passes_over(checkpoint, tool, tmp_path, capfd):
    start = checkpoint('segmenter')
    arguments = ['--work-dir', tmp_path, '--resume', start, '--no-validate']
    options = ['train_cfg.max_iters=3']
    assert tool('train', 'segmenter', *arguments, '--cfg-options', *options) == ''
    assert 'is resumed with its own' not in ''.join(capfd.readouterr())
    options += ['optim_wrapper.optimizer.lr=0.5', 'param_scheduler.0.power=2']
    options += ['optim_wrapper.optimizer.type=torch.optim.SGD']  # the same one
    assert tool('train', 'segmenter', *arguments, '--cfg-options', *options) == ''
    assert (
        f'{start} is resumed with its own lr 0.01 (the config has 0.5), its '
        'param_scheduler (the config has another one). To use'
    ) in ''.join(capfd.readouterr())


def test_resume_passes_over_a_file_cut_short(checkpoint, tool, tmp_path):
    first = checkpoint('segmenter')
    shutil.copytree(first.parent, tmp_path / 'work')
    torn = tmp_path / 'work' / 'iter_3.pth'
    torn.write_bytes(first.read_bytes()[:5000])
    (tmp_path / 'work' / 'last_checkpoint').write_text(str(torn))
    assert (
        tool(
            'train', 'segmenter', '--work-dir', tmp_path / 'work', '--resume',
            '--no-validate', '--cfg-options', 'train_cfg.max_iters=3',
        )
        == ''
    )  # fmt: skip
    assert torch.load(torn)['meta']['iter'] == 3


def test_resume_with_nothing_to_resume_keeps_load_from(checkpoint, tool, tmp_path):
    start = checkpoint('segmenter')
    assert (
        tool(
            'train', 'segmenter', '--work-dir', tmp_path, '--resume', '--no-validate',
            '--cfg-options', f'load_from={start}', 'optim_wrapper.optimizer.lr=0',
            'train_cfg.max_iters=1',
        )
        == ''
    )  # fmt: skip
    ours, theirs = torch.load(tmp_path / 'iter_1.pth'), torch.load(start)
    assert ours['meta']['iter'] == 1
    key = 'decode_head.conv_seg.weight'
    assert torch.equal(ours['state_dict'][key], theirs['state_dict'][key])
