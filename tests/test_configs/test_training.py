"""Every config of ours trains for two iterations, on data of its format."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.runner import Runner
from PIL import Image

ROOT = Path(__file__).parents[2]


def write_images(folder: Path, names: Iterable[str], size: tuple[int, int]) -> None:
    """Noise with a dark left and a light right half, of ``size`` (width, height)."""
    folder.mkdir(parents=True)
    rng, (width, height) = np.random.default_rng(0), size
    for name in names:
        picture = rng.integers(0, 90, (height, width, 3), dtype=np.uint8)
        picture[:, width // 2 :] += 150
        Image.fromarray(picture).save(folder / name)


def write_coco(root: Path, ann_file: str, images: str, classes: Iterable[str]) -> None:
    write_images(root / images, [f'{i}.jpg' for i in range(4)], (96, 64))
    annotations = [
        dict(
            id=i + 1,
            image_id=i // 2,
            category_id=1 + i % 3,
            bbox=[48 * (i % 2), 8, 40, 48],
            area=40 * 48,
            segmentation=[[x, 8, x + 40, 8, x + 40, 56, x, 56]],
            iscrowd=0,
        )
        for i in range(8)
        for x in [48 * (i % 2)]
    ]
    (root / ann_file).parent.mkdir()
    (root / ann_file).write_text(
        json.dumps(
            dict(
                images=[
                    dict(id=i, file_name=f'{i}.jpg', width=96, height=64)
                    for i in range(4)
                ],
                annotations=annotations,
                categories=[dict(id=i, name=n) for i, n in enumerate(classes, 1)],
            )
        )
    )


def write_segmentation(
    root: Path, images: str, labels: str, suffixes: tuple[str, str]
) -> None:
    write_images(root / images, [f'{i}{suffixes[0]}' for i in range(4)], (128, 96))
    (root / labels).mkdir(parents=True)
    halves = np.zeros((96, 128), dtype=np.uint8)
    halves[:, 64:], halves[:8] = 1, 255
    for i in range(4):
        Image.fromarray(halves).save(root / labels / f'{i}{suffixes[1]}')


def write_data(name: str, root: Path) -> None:
    """Four training images (cells: one per class) in the format of ``configs/name``."""
    if name == 'coco':
        from mmdet.datasets import CocoDataset

        classes = CocoDataset.METAINFO['classes']
        write_coco(root, 'annotations/instances_train2017.json', 'train2017', classes)
    elif name == 'bccd':
        write_coco(
            root, 'annotations/train.json', 'images', ('RBC', 'WBC', 'Platelets')
        )
    elif name == 'demo':
        shapes = ('circle', 'square', 'triangle', 'star')
        write_coco(root, 'annotations/train.json', 'images', shapes)
    elif name == 'cityscapes':
        folders = ('leftImg8bit/train/aachen', 'gtFine/train/aachen')
        suffixes = ('_leftImg8bit.png', '_gtFine_labelTrainIds.png')
        write_segmentation(root, *folders, suffixes)
    elif name == 'camvid':
        write_segmentation(root, 'images/train', 'labels/train', ('.jpg', '.png'))
    elif name == 'imagenet':
        files = [f'n0{i}_{i}.JPEG' for i in range(4)]
        write_images(root / 'train', files, (64, 64))
        (root / 'meta').mkdir()
        lines = (f'{file} {249 * i}\n' for i, file in enumerate(files))
        (root / 'meta' / 'train.txt').write_text(''.join(lines))
    else:
        for cell in ('Platelets', 'RBC', 'WBC'):
            write_images(root / 'train' / cell, [f'{cell}.png'], (64, 64))


# folder of configs -> kind, and what names its data
FOLDERS = dict(
    ablations=('classifier', None),
    bccd=('detector', 'BCCD_ROOT'),
    bccd_cells=('classifier', 'BCCD_CELLS_ROOT'),
    camvid=('segmenter', 'CAMVID_ROOT'),
    cityscapes=('segmenter', None),
    coco=('detector', None),
    demo=('detector', 'SHAPES_ROOT'),
    imagenet=('classifier', None),
)


# A quarter of the channels, on small pictures; all else is as shipped.
SLIM = dict(
    detector=[
        'model.neck.in_channels=[64,128,256,512]',
        'train_dataloader.dataset.pipeline.2.scale=(96,64)',
    ],
    segmenter=[
        'train_dataloader.dataset.pipeline.2.scale=(128,96)',
        'train_dataloader.dataset.pipeline.3.crop_size=(64,96)',
        'model.data_preprocessor.size=(64,96)',
    ],
    classifier=['model.head.in_channels=512'],
)


SHIPPED = sorted(
    file for file in (ROOT / 'configs').glob('*/*.py') if file.parent.name != '_base_'
)


PRETRAINED = [
    file
    for file in SHIPPED
    if file.parent.name in ('coco', 'cityscapes') or 'rednet50-in1k-pre' in file.stem
]


CLASSIFIER = ROOT / 'configs/imagenet/rednet50_64xb32-warmup-coslr_in1k.py'


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Data for a folder of configs, made once."""
    roots: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in roots:
            roots[name] = tmp_path_factory.mktemp(name)
            write_data(name, roots[name])
        return roots[name]

    return get


@pytest.fixture
def train_shipped(
    tool: Callable[..., str],
    data: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Runner]:
    """Train a config of ours for two iterations, a quarter or half as wide."""
    runners: list[Runner] = []
    train_runner = Runner.train

    def record(runner: Runner) -> torch.nn.Module:
        runners.append(runner)
        return train_runner(runner)

    monkeypatch.setattr(Runner, 'train', record)

    def train(file: Path, work_dir: Path, *options: str) -> Runner:
        task, variable = FOLDERS[file.parent.name]
        name = 'imagenet' if file.parent.name == 'ablations' else file.parent.name
        options = [
            'model.backbone.base_channels=16', 'model.backbone.stem_channels=32',
            'train_dataloader.batch_size=2', 'train_dataloader.num_workers=0',
            'default_hooks.logger.interval=1', *SLIM[task], *options,
        ]  # fmt: skip
        if variable:
            monkeypatch.setenv(variable, str(data(name)))
        else:
            options.append(f'train_dataloader.dataset.data_root={data(name)}')
        if name == 'imagenet':
            options.append('train_dataloader.dataset.pipeline.1.scale=64')
        loop = 'max_iters=2' if task == 'segmenter' else 'max_epochs=1'
        options.append(f'train_cfg.{loop}')
        if 'upernet' in file.stem:
            options += [
                'model.decode_head.in_channels=[64,128,256,512]',
                'model.auxiliary_head.in_channels=256',
            ]
        elif task == 'segmenter':
            options.append('model.neck.in_channels=[64,128,256,512]')
        if '-g32_' in file.stem:  # 32 channels are the least that share a kernel
            options += [
                'model.backbone.base_channels=32', 'model.backbone.stem_channels=64',
                'model.head.in_channels=1024',
            ]  # fmt: skip
        if 'rcnn' in file.stem:
            options.append('model.train_cfg.rcnn.sampler.num=16')
        if '_r50-in1k-pre' in file.stem:  # torchvision's weights, which are not here
            options.append('model.backbone.init_cfg=None')
        arguments = ['--work-dir', work_dir, '--no-validate', '--cfg-options', *options]
        assert tool('train', task, file, *arguments) == ''
        return runners.pop()

    return train


@pytest.fixture(scope='module')
def pretrained_once() -> list[Path]:
    return []


@pytest.fixture
def pretrained(pretrained_once, train_shipped, tmp_path_factory) -> Path:
    """What our ImageNet config leaves for detectors and segmenters to start from."""
    if not pretrained_once:
        folder = tmp_path_factory.mktemp('pretrained')
        # Two steps at the full rate leave weights that frozen batch norms overflow on.
        train_shipped(CLASSIFIER, folder, 'optim_wrapper.optimizer.lr=1e-3')
        pretrained_once.append(folder / 'epoch_1.pth')
    return pretrained_once[0]


@pytest.mark.parametrize(
    'file', SHIPPED, ids=lambda file: str(file.relative_to(ROOT / 'configs'))
)
def test_every_config_trains_on_data_of_its_format(
    file, train_shipped, request, tmp_path, monkeypatch
):
    if file in PRETRAINED:
        monkeypatch.setenv('REDNET50', str(request.getfixturevalue('pretrained')))
    keep_none = ['checkpoint.interval=-1', 'checkpoint.save_last=False']
    runner = train_shipped(file, tmp_path, *(f'default_hooks.{o}' for o in keep_none))
    logs = next(tmp_path.glob('*/vis_data/scalars.json')).read_text().splitlines()
    losses = [json.loads(line)['loss'] for line in logs if '"loss"' in line]
    assert len(losses) == 2 and np.isfinite(losses).all()
    text = next(tmp_path.glob('*/*.log')).read_text()
    assert ('load backbone. in model from' in text) is (file in PRETRAINED)
    assert ('(3 into 7), zeros around them, in stem.1.' in text) is (file in PRETRAINED)
    assert 'in source state_dict' not in text  # keys missing or unexpected
    parameters = dict(runner.model.named_parameters())
    trained = {name for name, p in parameters.items() if p.requires_grad}
    assert len(trained) > 50
    reached = runner.optim_wrapper.optimizer.state  # has what a gradient came to
    assert {name for name, p in parameters.items() if p in reached} == trained


@pytest.mark.parametrize(
    'file', PRETRAINED, ids=lambda file: str(file.relative_to(ROOT / 'configs'))
)
def test_weights_that_are_not_there_say_how_to_get_them(
    file, tool, tmp_path, monkeypatch
):
    monkeypatch.delenv('REDNET50', raising=False)
    monkeypatch.setenv('MMCLS_INVOLUTION_WEIGHTS', str(tmp_path))
    message = tool('train', FOLDERS[file.parent.name][0], file, '--work-dir', tmp_path)
    assert message.startswith(
        'Error: model.backbone.init_cfg.checkpoint: cannot load paddleclas://RedNet50: '
        f'{tmp_path}/RedNet50_pretrained.pdparams does not exist (there: no '
        '.pdparams). What to do: fetch https://'
    )
    assert message.endswith('model.backbone.init_cfg=None: from random weights.')


@pytest.mark.parametrize(
    ('place', 'expected'),
    [
        ('nowhere.pth', r'nowhere.pth does not exist.*environment variable REDNET50'),
        ('torchvision://resnet51', r"cannot load torchvision://resnet51: 'resnet51'\."),
        (
            'http://127.0.0.1:9/a.pth',
            r'cannot load http://127.0.0.1:9/a.pth: .*refused',
        ),
        ('RedNet50_pretrained.pdparams', 'a file of Paddle.*mmcls_involution convert'),
    ],
)
def test_weights_that_cannot_be_had(place, expected, tool, tmp_path, monkeypatch):
    monkeypatch.setenv('REDNET50', place)
    file = PRETRAINED[0]
    message = tool('train', FOLDERS[file.parent.name][0], file, '--work-dir', tmp_path)
    assert message.startswith('Error: model.backbone.init_cfg.checkpoint: ')
    assert re.search(expected, message), message
