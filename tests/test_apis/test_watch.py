"""Pictures at every validation of a training, and scalars in TensorBoard."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.runner import Runner

from mmcls_involution.apis import WatchHook, watch
from mmcls_involution.ops import record_kernels

# what validates twice
TWICE = dict(
    detector='train_cfg.max_epochs=2',
    segmenter='train_cfg.val_interval=1',
    classifier='train_cfg.max_epochs=2',
)
WATCH = 'default_hooks.watch'
TENSORBOARD = find_spec('tensorboard') is not None


@pytest.fixture
def train(tool):
    """Train a tiny model; give the message that the command ended with."""

    def run(kind: str, work_dir: Path, *options: str) -> str:
        arguments = ['--work-dir', work_dir, '--cfg-options', TWICE[kind], *options]
        return tool('train', kind, *arguments)

    return run


def watching(*options: str) -> list[str]:
    hook = [f'{WATCH}.type=mmcls_involution.apis.WatchHook']
    return [*hook, *(f'{WATCH}.{o}' for o in (f'tensorboard={TENSORBOARD}', *options))]


@pytest.mark.parametrize('kind', TWICE)
def test_one_option_draws_the_same_images_at_every_validation(kind, train, tmp_path):
    layer = 'backbone.layer2.1.conv2'
    options = watching('images=2', 'score_thr=0', f'layers=[{layer}]')
    assert train(kind, tmp_path, *options) == ''
    (folder,) = tmp_path.glob('*/vis_data')
    images = ('0_dark_0', '1_dark_1') if kind == 'classifier' else ('0_0', '1_1')
    pictures = {
        f'{name}_{step}.png'
        for step in (1, 2)
        for name in (*(f'{i}_prediction' for i in images), f'{images[0]}_kernels')
    }
    assert {file.name for file in (folder / 'vis_image').iterdir()} == pictures
    for file in (folder / 'vis_image').iterdir():
        assert cv2.imread(str(file)).std() > 10
    kernels = [cv2.imread(str(f)) for f in sorted(folder.rglob('*kernels*'))]
    assert not np.array_equal(*kernels)
    if TENSORBOARD:
        _check_events(folder, {name.rsplit('_', 1)[0] for name in pictures})


def test_the_training_stays_as_it_is(train, tmp_path):
    """Bit for bit; and without layers the picture has the last one of each size."""
    weights = []
    for name, options in (('watched', watching()), ('plain', [])):
        seed = 'randomness.seed=0'
        assert train('classifier', tmp_path / name, seed, *options) == ''
        file = tmp_path / name / 'epoch_2.pth'
        weights.append(torch.load(file, weights_only=True)['state_dict'])
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    picture, _ = tmp_path.rglob('*_kernels_*.png')
    assert cv2.imread(str(picture)).shape[0] > 1500  # ten rows


def _check_events(folder: Path, pictures: set[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.glob('events.out.tfevents.*')
    events = EventAccumulator(str(file))
    events.Reload()
    tags = events.Tags()
    assert set(tags['images']) == pictures
    assert [event.step for event in events.Images(min(pictures))] == [1, 2]
    assert 'loss' in tags['scalars'] and 'lr' in tags['scalars']
    assert any('mAP' in t or 'mIoU' in t or 'top1' in t for t in tags['scalars'])


def test_kernels_are_those_of_the_points(train, tmp_path, monkeypatch):
    drawn = {}

    def compare(self, runner: Runner, name: str, one: dict, step: int) -> None:
        with record_kernels(runner.model) as drawn['expected']:
            runner.model.val_step(one)
        original(self, runner, name, one, step)

    original = WatchHook._draw_kernels
    monkeypatch.setattr(WatchHook, '_draw_kernels', compare)

    def draw(view, points):
        drawn.update(view=view, points=points)
        return draw_kernels(view, points)

    draw_kernels = watch.draw_kernels
    monkeypatch.setattr(watch, 'draw_kernels', draw)
    layer = 'backbone.layer3.1.conv2'
    options = watching(f'layers=[{layer}]', 'points=[(0,1),(0.5,0.25)]')
    assert train('classifier', tmp_path, *options) == ''
    (found,) = drawn['view'].layers
    assert found.name == layer
    torch.testing.assert_close(found.kernels, drawn['expected'][layer][0][0])
    assert drawn['points'] == [(0, 63), (32, 16)]
    assert not np.isnan(drawn['view'].source).any()


def test_a_model_without_involutions_is_watched_too(train, tmp_path):
    resnet = [
        'model.backbone.type=ResNet',
        'model.backbone.depth=18',
        'model.backbone.stem_channels=16',
        'model.head.in_channels=128',
    ]
    assert train('classifier', tmp_path, *watching(), *resnet) == ''
    names = [file.name for file in tmp_path.rglob('vis_image/*')]
    assert len(names) == 8 and not any('kernels' in name for name in names)


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        ('points=[(3,0.5)]', 'points are pairs of x and y from 0 to 1'),
        ('layers=[backbone.layer1.0.conv1]', 'mean backbone.layer1.0.conv2'),
    ],
)
def test_what_it_refuses_before_training(option, message, train, tmp_path):
    assert message in train('classifier', tmp_path, *watching(option))
    assert not list(tmp_path.glob('*.pth'))


def test_without_tensorboard(train, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, 'find_spec', lambda name: None)
    message = train(
        'classifier', tmp_path, f'{WATCH}.type=mmcls_involution.apis.WatchHook'
    )
    assert 'pip install tensorboard' in message
    assert 'default_hooks.watch.tensorboard=False' in message
