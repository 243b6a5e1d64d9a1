"""The demo and its data set; one real run, on a handful of images."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    return import_module('demo')


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / 'tools' / 'dataset_converters'))
    return import_module('shapes')


def call_main(demo: ModuleType, monkeypatch: pytest.MonkeyPatch, work_dir: Path):
    """Run the command line; return the exit code or message, None for success."""
    monkeypatch.chdir(ROOT)  # to come back from where main() goes
    for name in ('CUDA_VISIBLE_DEVICES', 'OMP_NUM_THREADS', 'PYTHONWARNINGS'):
        monkeypatch.setenv(name, '')  # and to forget what it sets
    monkeypatch.setattr(sys, 'argv', ['demo.py', '--work-dir', str(work_dir)])
    try:
        demo.main()
    except SystemExit as stop:
        return stop.code


# -------------------------------------------------------------------------- data


def test_shapes_are_the_same_for_the_same_seed(shapes, tmp_path):
    for name, seed in (('a', 0), ('b', 0), ('c', 1)):
        shapes.generate(tmp_path / name, {'train': 2, 'val': 2}, seed)
    images = {
        name: [
            (tmp_path / name / 'images' / f'{split}_{i:04d}.jpg').read_bytes()
            for split in ('train', 'val')
            for i in range(2)
        ]
        for name in 'abc'
    }
    assert images['a'] == images['b']
    assert len(set(images['a'] + images['c'])) == 8, 'two images are the same'
    train = [tmp_path / name / 'annotations' / 'train.json' for name in 'ab']
    assert train[0].read_bytes() == train[1].read_bytes()


def test_shapes_annotations_fit_the_images(shapes, tmp_path):
    pycocotools = import_module('pycocotools.coco')
    shapes.generate(tmp_path, {'val': 6})
    coco = pycocotools.COCO(tmp_path / 'annotations' / 'val.json')
    assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == list(shapes.CLASSES)
    for info in coco.loadImgs(coco.getImgIds()):
        image = cv2.imread(str(tmp_path / 'images' / info['file_name']))
        assert image.shape[:2] == (info['height'], info['width'])
        annotations = coco.loadAnns(coco.getAnnIds(info['id']))
        assert 2 <= len(annotations) <= 5
        masks = [coco.annToMask(a).astype(bool) for a in annotations]
        assert np.sum(masks, axis=0).max() == 1, 'a pixel shows two shapes'
        for annotation, mask in zip(annotations, masks, strict=True):
            rows, columns = np.nonzero(mask)
            x, y = columns.min(), rows.min()
            box = [x, y, columns.max() + 1 - x, rows.max() + 1 - y]
            assert annotation['bbox'] == box
            assert annotation['area'] == mask.sum()
            # one colour but for noise, and not that of the surroundings
            assert image[mask].std(axis=0).max() < 30


@pytest.mark.parametrize(
    ('cls', 'filled'),
    [('circle', 0.785), ('square', 0.5), ('triangle', 0.325), ('star', 0.33)],
)
def test_outline_fills_its_share_of_the_circumscribed_square(shapes, cls, filled):
    points = shapes.outline(cls, 50, 0.0)
    assert np.linalg.norm(points, axis=1).max() == pytest.approx(50)
    share = shapes.coverage(points + shapes.IMAGE_SIZE / 2).sum() / 100**2
    assert share == pytest.approx(filled, abs=0.03)


# ------------------------------------------------------------------------- steps


@pytest.mark.parametrize(
    ('line', 'progress'),
    [
        (
            'INFO - Epoch(train)  [3][ 50/100]  lr: 1.9e-03  eta: 0:02:05  '
            'time: 0.4  grad_norm: 4.1  loss: 1.8819  loss_rpn_cls: 0.0945',
            'epoch  3  iteration  50/100  loss 1.882  time left 0:02:05',
        ),
        (
            'INFO - Epoch(val) [2][50/50]  coco/bbox_mAP: 0.1  '
            'coco/bbox_mAP_50: 0.3710  coco/segm_mAP_50: 0.3640  time: 0.1',
            'box AP50 0.371  mask AP50 0.364',
        ),
        (
            'INFO - Epoch(test) [20/50]  eta: 0:00:09  time: 0.3',
            'image  20/50  time left 0:00:09',
        ),
        ('loading annotations into memory...', None),
    ],
)
def test_summarize(demo, line, progress):
    assert demo.summarize(line) == progress


def test_contact_sheet(demo, tmp_path):
    pictures = []
    for i in range(4):
        pictures.append(tmp_path / f'{i}.png')
        cv2.imwrite(str(pictures[-1]), np.full((40, 80, 3), 60 * i, np.uint8))
    demo.draw_contact_sheet(pictures, tmp_path / 'sheet.jpg', columns=2)
    sheet = cv2.imread(str(tmp_path / 'sheet.jpg'))
    height, width = sheet.shape[:2]
    for i, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        pixel = sheet[height * (2 * row + 1) // 4, width * (2 * column + 1) // 4]
        np.testing.assert_allclose(pixel, 60 * i, atol=6)


def test_missing_data_are_drawn(demo, monkeypatch, tmp_path):
    monkeypatch.setenv('SHAPES_ROOT', str(tmp_path / 'shapes'))
    ran = []

    def fail(command: list) -> int:
        ran.append(command)
        return 1

    monkeypatch.setattr(demo.subprocess, 'call', fail)
    message = call_main(demo, monkeypatch, tmp_path / 'work')
    assert message == 'error: tools/dataset_converters/shapes.py failed, see above'
    assert ran[0][-2:] == ['--out', tmp_path / 'shapes']


@pytest.mark.parametrize('goes_on', [False, pytest.param(True, marks=pytest.mark.long)])
def test_demo_misses_its_promise_then_goes_on(
    goes_on, demo, shapes, monkeypatch, tmp_path, capsys
):
    """Two epochs on four images teach nothing: the demo must say so."""
    pytest.importorskip('mmdet', reason='mmdet is not installed')
    shapes.generate(tmp_path / 'shapes', {'train': 4, 'val': 3})
    config = tmp_path / 'tiny.py'
    config.write_text(
        f'_base_ = {str(ROOT / demo.CONFIG)!r}\n'
        'train_cfg = dict(max_epochs=2, val_interval=2)\n'
        'default_hooks = dict(logger=dict(interval=1))\n'
    )
    monkeypatch.setenv('SHAPES_ROOT', str(tmp_path / 'shapes'))
    monkeypatch.setattr(demo, 'CONFIG', config)
    work_dir = tmp_path / 'work'

    message = call_main(demo, monkeypatch, work_dir)
    out = capsys.readouterr().out
    assert 'below what the demo promises' in str(message), out
    assert 'TOO LOW' in out
    assert 'epoch  1  iteration' in out
    assert len(list((work_dir / 'report/examples').glob('*.jpg'))) == 3
    assert cv2.imread(str(work_dir / 'demo.jpg')) is not None
    if not goes_on:
        return

    # as if it had been killed in the second epoch
    (work_dir / 'epoch_2.pth').unlink()
    (work_dir / 'last_checkpoint').write_text(str(work_dir / 'epoch_1.pth'))
    monkeypatch.setattr(
        demo, 'PROMISE', {key: (name, -2) for key, (name, _) in demo.PROMISE.items()}
    )
    message = call_main(demo, monkeypatch, work_dir)
    out = capsys.readouterr().out
    assert message is None, out
    assert 'epoch  2  iteration' in out
    assert 'epoch  1  iteration' not in out
    assert 'What to try next' in out
