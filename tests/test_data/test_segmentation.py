"""The full check on label maps, sound ones and damaged ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from check_cases import CONFIGS, beside
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image

from mmcls_involution.data import checks


@pytest.fixture
def seg(seg_root, tmp_path) -> Path:
    return shutil.copytree(seg_root, tmp_path / 'seg')


def paint(path: Path, values: list[int], size: tuple[int, int] = (64, 64)) -> None:
    """Write a label map with one pixel of each value."""
    label = np.zeros(size, dtype=np.uint8)
    label.flat[: len(values)] = values
    Image.fromarray(label).save(path)


def test_sound_segmentation(seg, run):
    paint(seg / 'labels' / '1.png', [1, 255])
    assert run('segmenter', seg) == []


@pytest.mark.parametrize(
    'damage, kind, detail',
    [
        (lambda file: file.unlink(), 'missing label', 'does not'),
        (lambda file: file.write_text('?'), 'undecodable label', 'cannot identify'),
        (lambda file: paint(file, [2, 2, 254]), 'label value', 'has 2, 254 (3 pixels)'),
        (lambda file: paint(file, [], (64, 32)), 'label size', 'is 32x64, its image 6'),
        (
            lambda file: Image.new('RGB', (64, 64)).save(file),
            'undecodable label',
            'shape (64, 64, 3)',
        ),
    ],
)
def test_damaged_label(seg, run, damage, kind, detail):
    damage(seg / 'labels' / '2.png')
    (found,) = run('segmenter', seg)
    assert found[:2] == (kind, str(seg / 'labels' / '2.png'))
    assert detail in found[2]


def test_images_without_labels(seg, run):
    """Those of a test, which only predicts."""
    text = CONFIGS['segmenter'].replace('train_', 'test_')
    text = text.replace(", seg_map_path='labels'", '')
    assert run('segmenter', seg, split='test', text=text) == []


def test_torn_label(seg, run):
    file = seg / 'labels' / '2.png'
    file.write_bytes(file.read_bytes()[:-30])
    (found,) = run('segmenter', seg)
    assert found[:2] == ('undecodable label', str(file))


def test_palette_label_counts_by_index(seg, run):
    label = Image.open(seg / 'labels' / '0.png').convert('P')
    label.putpalette([9, 9, 9, 200, 200, 200])
    label.save(seg / 'labels' / '0.png')
    assert run('segmenter', seg) == []


def test_label_without_an_image(seg, run):
    (seg / 'images' / '3.png').unlink()
    assert run('segmenter', seg) == [
        ('missing image', str(seg / 'labels' / '3.png'), 'is a label without an image')
    ]


@pytest.mark.parametrize(
    ('kind', 'number', 'rules'),
    [
        ('FCNHead', 1, ['number of classes']),
        ('FCNHead', 19, []),  # more do no harm
        ('STDCHead', 1, []),  # tells borders from areas
    ],
)
def test_classes_of_an_auxiliary_head(seg, run, kind, number, rules):
    """One that is left as it was stops training at the first label it does not have."""
    key = 'model.auxiliary_head'
    options = [f'{key}.type={kind}', f'{key}.num_classes={number}']
    assert [row[0] for row in run('segmenter', seg, *options)] == rules


def test_wrong_suffix(seg, run):
    found = run('segmenter', seg, 'train_dataloader.dataset.img_suffix=.jpg')
    assert found == [
        (
            'no data',
            str(seg / 'images'),
            'no file name ends in .jpg; there are 0.png, 1.png, 2.png and 1 more',
        )
    ]


@pytest.mark.parametrize(
    'option, sound, wrong',
    [
        ('train_dataloader.dataset.reduce_zero_label=True', [0, 1, 2, 255], [3, 254]),
        ('model.decode_head.ignore_index=9', [0, 1, 9], [2, 255]),
    ],
)
def test_values_that_the_config_allows(seg, run, option, sound, wrong):
    file = seg / 'labels' / '0.png'
    for name in ('1.png', '2.png', '3.png'):
        paint(seg / 'labels' / name, sound)
    paint(file, sound + wrong)
    ((kind, place, detail),) = run('segmenter', seg, option)
    assert (kind, place) == ('label value', str(file))
    assert detail == f'has {", ".join(map(str, wrong))} ({len(wrong)} pixels)'


NO_FOREGROUND = 'bottom (1 of 2 classes) in 4 label maps; ignored is '


@pytest.mark.parametrize(
    ('values', 'options', 'detail'),
    [
        # Half of one map, and a quarter more of the next ones: 44 % of all pixels.
        ([0, 255], [], f'{NO_FOREGROUND}255, 56.2% of all pixels'),
        (
            [0, 1],
            ['train_dataloader.dataset.reduce_zero_label=True'],
            f'{NO_FOREGROUND}0 (by reduce_zero_label), 43.8% of all pixels',
        ),
        ([0, 0], [], 'bottom (1 of 2 classes) in 4 label maps'),
        (
            [255, 255],
            [],
            'top, bottom (2 of 2 classes) in 4 label maps; ignored is 255',
        ),
    ],
)
def test_masks_with_one_class_alone(seg, run, values, options, detail):
    for file in (seg / 'labels').iterdir():
        label = np.array(Image.open(file))
        Image.fromarray(np.array(values, np.uint8)[label]).save(file)
    ((rule, place, text),) = run('segmenter', seg, *options)
    assert (rule, place) == ('one class alone', str(seg / 'labels'))
    assert text.startswith(detail)


def test_one_class_beside_a_set_with_others(seg, run, tmp_path):
    """Photos of the background stand beside others; all sets may not be such."""
    background = shutil.copytree(seg, tmp_path / 'background')
    for file in (background / 'labels').iterdir():
        paint(file, [])
    text = beside('segmenter', background)
    quick = text.replace("img_suffix='.png'", "img_suffix='.png', pipeline=STEPS")
    quick = f"STEPS = [dict(type='LoadAnnotations')]\n{quick}"
    cfg = Config.fromstring(quick.replace('{root}', str(seg)), '.py')
    init_default_scope('mmseg')
    assert [row[0] for row in run('segmenter', background)] == ['one class alone']
    assert run('segmenter', seg, text=text) == []
    assert [*checks.check_split_quickly(cfg, 'train')] == []

    for file in (seg / 'labels').iterdir():
        paint(file, [])
    expected = [('one class alone', str(root / 'labels')) for root in (seg, background)]
    assert [row[:2] for row in run('segmenter', seg, text=text)] == expected
    found = checks.check_split_quickly(cfg, 'train')
    assert [(finding.rule, finding.place) for finding in found] == expected


def test_class_without_pixels(seg, run, tmp_path):
    options = [
        'train_dataloader.dataset.metainfo.classes=[top,middle,bottom]',
        'model.decode_head.num_classes=3',
    ]
    assert run('segmenter', seg, *options) == [
        (
            'class without pixels',
            str(seg / 'labels'),
            'bottom (1 of 3 classes) in 4 label maps',
        )
    ]


@pytest.fixture
def cityscapes(tmp_path) -> Path:
    """The folders of Cityscapes with two images and their labelTrainIds."""
    root = tmp_path / 'cityscapes'
    for kind in ('leftImg8bit', 'gtFine'):
        (root / kind / 'train' / 'ulm').mkdir(parents=True)
    for i in range(2):
        name = f'train/ulm/ulm_{i}'
        Image.new('RGB', (64, 32)).save(root / f'leftImg8bit/{name}_leftImg8bit.png')
        paint(root / f'gtFine/{name}_gtFine_labelIds.png', [7, 33], (32, 64))
        paint(
            root / f'gtFine/{name}_gtFine_labelTrainIds.png',
            [*range(19), 255],
            (32, 64),
        )
    return root


def test_sound_cityscapes(cityscapes, run):
    assert run('cityscapes', cityscapes) == []


def test_cityscapes_as_it_is_unpacked(cityscapes, run, capsys):
    for file in cityscapes.rglob('*_labelTrainIds.png'):
        file.unlink()
    (cityscapes / 'gtFine/train/ulm/ulm_0_gtFine_polygons.json').write_text('{}')
    (cityscapes / 'gtFine/train/ulm/ulm_1_gtFine_labelIds.png').unlink()
    found = run('cityscapes', cityscapes)
    assert [row[0] for row in found] == ['missing labelTrainIds'] * 2
    assert found[0][2] == 'there is _labelIds.png and _polygons.json'
    assert 'unpack gtFine_trainvaltest.zip' in found[1][2]
    assert 'tools/dataset_converters/cityscapes.py' in capsys.readouterr().out


def test_cityscapes_with_label_ids(cityscapes, run):
    suffix = 'train_dataloader.dataset.seg_map_suffix=_gtFine_labelIds.png'
    found = run('cityscapes', cityscapes, suffix)
    assert [row[0] for row in found] == ['label value'] * 2
    assert found[0][2] == 'has 33 (1 pixels); training needs its labelTrainIds'


def test_some_of_the_classes_of_cityscapes(cityscapes, run):
    """The files keep their numbers; the other classes are read as 255."""
    options = (
        'train_dataloader.dataset.metainfo.classes=[road,car]',
        'model.decode_head.num_classes=2',
    )
    assert run('cityscapes', cityscapes, *options) == []
    paint(
        cityscapes / 'gtFine/train/ulm/ulm_0_gtFine_labelTrainIds.png', [19], (32, 64)
    )
    (found,) = run('cityscapes', cityscapes, *options)
    assert found[0] == 'label value'
