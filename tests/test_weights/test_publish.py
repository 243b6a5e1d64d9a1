"""Checkpoints to publish."""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from weights_cases import Bomb, Weights, digest, load_anywhere, renamed, same


def trained(weights: Weights) -> dict:
    """As MMEngine saves, with what does not load in any program."""
    return dict(
        meta=dict(
            epoch=12,
            mmengine_version='0.10.7',
            cfg='model = ...',
            seed=np.int64(5),
            dataset_meta=dict(
                classes=('a', 'b'), palette=np.array([[1, 2, 3]]), label_map={0: 1}
            ),
        ),
        state_dict=OrderedDict(weights),
        optimizer=dict(state={0: torch.rand(3)}),
        param_schedulers=[dict(last_step=3)],
        message_hub=dict(runtime_info=dict(iter=3)),
    )


def published(folder: Path) -> Path:
    (path,) = folder.glob('small-*.pth')
    assert re.fullmatch(r'small-[0-9a-f]{8}\.pth', path.name)
    assert digest(path).startswith(path.stem[-8:])
    return path


@pytest.mark.parametrize('name', ['small', 'small.pth'])
def test_publish(name, weights, command, tmp_path, capsys):
    torch.save(trained(weights), tmp_path / 'epoch_12.pth')
    for _ in range(2):  # the second time there is nothing to do
        assert command('publish', tmp_path / 'epoch_12.pth', tmp_path / name) == ''
    path = published(tmp_path)
    result = load_anywhere(path)
    assert same(result['state_dict'], weights)
    assert result.keys() == {'meta', 'state_dict'}
    meta = result['meta']
    assert meta.pop('mmcls_involution_version')
    assert meta == dict(
        epoch=12,
        mmengine_version='0.10.7',
        cfg='model = ...',
        seed=5,
        dataset_meta=dict(
            classes=('a', 'b'), palette=[[1, 2, 3]], label_map={0: 1}
        ),
    )  # fmt: skip
    output = capsys.readouterr().out
    assert digest(path) in output
    assert 'left out: message_hub, optimizer, param_schedulers' in output
    assert len(list(tmp_path.iterdir())) == 2


def test_publish_a_bare_state_dict(weights, command, tmp_path):
    torch.save(renamed(weights, '', 'module.'), tmp_path / 'bare.pth')
    assert command('publish', tmp_path / 'bare.pth', tmp_path / 'small') == ''
    assert same(load_anywhere(published(tmp_path))['state_dict'], weights)


ODD_META = [None, 'text', [1, 2], 3, torch.zeros(3)]


@pytest.mark.parametrize('meta', ODD_META, ids=str)
def test_meta_data_that_are_no_dict(meta, weights, command, tmp_path):
    content = {'state_dict': weights, 'meta': meta, 1: 2}
    torch.save(content, tmp_path / 'odd.pth')
    assert command('publish', tmp_path / 'odd.pth', tmp_path / 'small') == ''
    result = load_anywhere(published(tmp_path))
    assert same(result['state_dict'], weights)
    assert [*result['meta']] == ['mmcls_involution_version']


@pytest.mark.parametrize('averaged', ['text', [1], {1: torch.rand(1)}, {'module.a': 1}])
def test_averaged_weights_that_are_none(averaged, weights, command, tmp_path):
    torch.save(dict(state_dict=weights, ema_state_dict=averaged), tmp_path / 'odd.pth')
    message = command('publish', tmp_path / 'odd.pth', tmp_path / 'small')
    assert 'ema_state_dict is not of the model' in message


@pytest.fixture
def averaged(tmp_path) -> tuple[Path, Weights, Weights]:
    """A checkpoint that EMAHook wrote; the averaged weights and the trained ones."""
    from mmengine.hooks import EMAHook
    from mmengine.runner import Runner

    model = torch.nn.Linear(2, 1)
    runner = Runner.__new__(Runner)
    runner.model = model
    hook = EMAHook(momentum=0.5)
    hook.before_run(runner)
    with torch.no_grad():
        model.weight += 1
    hook.ema_model.update_parameters(model)
    with torch.no_grad():
        model.weight += 1
    hook.ema_model.update_parameters(model)
    trained = {n: v.clone() for n, v in model.state_dict().items()}
    average = {n: v.clone() for n, v in hook.ema_model.module.state_dict().items()}
    checkpoint = dict(meta={}, state_dict=model.state_dict())
    hook.before_save_checkpoint(runner, checkpoint)
    torch.save(checkpoint, tmp_path / 'ema.pth')
    assert not same(trained, average)
    return tmp_path / 'ema.pth', average, trained


def test_publish_averaged_weights(averaged, command, tmp_path):
    file, average, _ = averaged
    assert command('publish', file, tmp_path / 'small') == ''
    assert same(load_anywhere(published(tmp_path))['state_dict'], average)


def test_publish_weights_that_are_not_averaged(averaged, command, tmp_path):
    file, _, trained = averaged
    assert command('publish', file, tmp_path / 'small', '--no-ema') == ''
    assert same(load_anywhere(published(tmp_path))['state_dict'], trained)


def test_no_ema_needs_ema(weights, command, tmp_path):
    torch.save(trained(weights), tmp_path / 'epoch_12.pth')
    message = command(
        'publish', tmp_path / 'epoch_12.pth', tmp_path / 'small', '--no-ema'
    )
    assert 'has no ema_state_dict' in message
    assert len(list(tmp_path.iterdir())) == 1


def test_publish_overwrites_no_other_file(weights, command, tmp_path):
    torch.save(weights, tmp_path / 'bare.pth')
    assert command('publish', tmp_path / 'bare.pth', tmp_path / 'small') == ''
    path = published(tmp_path)
    path.write_text('damaged')
    message = command('publish', tmp_path / 'bare.pth', tmp_path / 'small')
    assert 'exists and is another file' in message
    assert path.read_text() == 'damaged'
    assert len(list(tmp_path.iterdir())) == 2


def test_publish_refuses_code(weights, command, tmp_path):
    torch.save(dict(state_dict=weights, meta=Bomb()), tmp_path / 'bad.pth')
    assert 'Refused to load' in command('publish', tmp_path / 'bad.pth', tmp_path / 'x')
    assert len(list(tmp_path.iterdir())) == 1
