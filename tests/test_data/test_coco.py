"""The full check on data sets in COCO format, sound ones and damaged ones."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from check_cases import CONFIGS, beside, edit, tear
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image

from mmcls_involution.data import checks, images
from mmcls_involution.data.rules import RULES


def annotation(**changes) -> Callable[[dict], None]:
    return lambda content: content['annotations'][1].update(changes)


def image(**changes) -> Callable[[dict], None]:
    return lambda content: content['images'][1].update(changes)


@pytest.mark.parametrize(
    'change, expected',
    [
        (image(width=63), ('image size', '1.png', 'is 64x64, its annotations say 63')),
        (image(width='wide'), ('malformed entry', 'image 1.png', "'wide'")),
        (image(width='64'), ('malformed entry', 'image 1.png', "('64', 64): expected")),
        (lambda c: c['images'][1].pop('height'), ('malformed entry', '1.png', 'heigh')),
        (annotation(id=1), ('duplicate id', 'annotation id 1', '2 times')),
        (annotation(id=1.0), ('duplicate id', 'annotation id 1', '2 times')),
        (image(file_name=None), ('malformed entry', 'image None', 'expected text')),
        (annotation(image_id=9), ('unknown image', 'annotation 2', 'image_id 9')),
        (annotation(category_id=7), ('no such category', 'category_id 7', '1 annot')),
        (annotation(bbox=[4, 4, 0, 9]), ('box without area', '2 of 0.png', '0, 9]')),
        (annotation(area=0), ('box without area', '2 of 0.png', 'area 0')),
        (annotation(bbox=[50, 4, 20, 9]), ('box outside the image', '2 of 0.', '20')),
        (annotation(bbox=[-5, 4, 20, 9]), ('box outside the image', '2 of 0.', '-5')),
        (annotation(bbox=[4, 60, 2, 9]), ('box outside the image', '2 of 0.', '60')),
        (
            annotation(bbox=[1, 2, 3]),
            ('malformed entry', 'annotation 2', 'expected 4 numb'),
        ),
        (annotation(bbox=None), ('malformed entry', 'annotation 2', 'bbox None')),
        (annotation(bbox=[1, 2, float('nan'), 3]), ('malformed entry', '2', 'nan')),
        (annotation(image_id=[1]), ('malformed entry', 'annotation 2', 'an id is a')),
        (lambda c: c['annotations'][1].pop('area'), ('malformed entry', '2', 'area')),
        (annotation(bbox=['4', '4', '9', '9']), ('malformed entry', '2', 'expected 4')),
        (annotation(iscrowd='0'), ('malformed entry', '2', "iscrowd '0': expected 0")),
        (annotation(image_id='1'), ('unknown image', '2', "'1'; the images have 1")),
        (annotation(id=0), ('annotation id', 'annotation id 0', '')),
        (annotation(id='b'), ('annotation id', '1 annotation ids that are text', '')),
        (annotation(bbox=[4, 4, 0.5, 9]), ('box without area', '2 of 0.png', '0.5')),
    ],
)
def test_damaged_annotations(coco, run, change, expected):
    edit(coco, change)
    (found,) = run('detector', coco)
    assert found[0] == expected[0]
    assert expected[1] in found[1] and expected[2] in found[2]


@pytest.mark.parametrize('value', [None, 0, 'missing', 'byte order mark'])
def test_what_everybody_means(coco, run, value):
    """An object of a file that does not speak of crowds is one to be found."""

    def change(content):
        for item in content['annotations']:
            item['iscrowd'] = value
            if value == 'missing':
                del item['iscrowd']

    if value == 'byte order mark':
        text = (coco / 'ann.json').read_text()
        (coco / 'ann.json').write_text(text, encoding='utf-8-sig')
    else:
        edit(coco, change)
    assert run('detector', coco) == []


ALL_CROWD = 'none of its annotations can be trained on: 8 with iscrowd=1'


@pytest.mark.parametrize(
    ('change', 'detail'),
    [
        (lambda content: content['annotations'].clear(), 'it has no annotations'),
        (lambda content: content.pop('annotations'), 'it has no annotations'),
        (
            lambda content: [a.update(iscrowd=1) for a in content['annotations']],
            ALL_CROWD,
        ),
        (
            lambda content: [
                a.update(image_id=str(a['image_id'])) for a in content['annotations']
            ],
            'none of its annotations can be trained on: 8 of an unknown image',
        ),
        (
            lambda content: [
                a.update(category_id=str(a['category_id']))
                for a in content['annotations']
            ],
            'none of its annotations can be trained on: 8 of an unknown category',
        ),
    ],
)
def test_nothing_to_train_on(coco, run, change, detail):
    edit(coco, change)
    found = run('detector', coco)
    (row,) = (row for row in found if row[0] == 'nothing to train on')
    assert row == ('nothing to train on', str(coco / 'ann.json'), detail)


def test_background_beside_a_set_with_objects(coco, run, tmp_path):
    """Photos without objects, or unlabelled ones, are one of several data sets."""
    background = shutil.copytree(coco, tmp_path / 'background')
    edit(background, lambda content: content['annotations'].clear())
    text = beside('detector', background)
    assert run('detector', coco, text=text) == []
    edit(coco, lambda content: content['annotations'].clear())
    found = run('detector', coco, text=text)
    assert [row[:2] for row in found] == [
        ('nothing to train on', str(root / 'ann.json')) for root in (coco, background)
    ]


def test_class_of_a_set_beside_others(coco, run, tmp_path):
    """What one lacks, another one may have; what all lack is named by itself."""
    other = shutil.copytree(coco, tmp_path / 'other')
    for root, category in ((coco, 1), (other, 2)):
        edit(
            root,
            lambda content, category=category: content.update(
                annotations=[
                    a for a in content['annotations'] if a['category_id'] == category
                ]
            ),
        )
    assert [row[0] for row in run('detector', coco)] == ['class without objects']
    assert run('detector', coco, text=beside('detector', other)) == []
    for root in (coco, other):
        edit(root, lambda c: c['categories'].append(dict(id=3, name='disc')))
    text = beside('detector', other).replace("'bar')", "'bar', 'disc')")
    found = run('detector', coco, text=text.replace('num_classes=2', 'num_classes=3'))
    assert found == [
        ('class without objects', str(root / 'ann.json'), 'disc (1 of 3 classes)')
        for root in (coco, other)
    ]


def test_class_without_objects_and_counts(coco, run, capsys):
    def change(content):
        for item in content['annotations'][1::2]:
            item['iscrowd'] = 1

    edit(coco, change)
    ((rule, place, detail),) = run('detector', coco)
    assert (rule, place) == ('class without objects', str(coco / 'ann.json'))
    assert detail == (
        'bar (1 of 2 classes); annotations that are not used: 4 with iscrowd=1'
    )
    assert 'objects by class: square 4, bar 0' in capsys.readouterr().out


def test_run_length_masks_where_polygons_are_read(coco, run):
    """MMDetection takes their objects for ignored ones; areas are so anyhow."""
    code = dict(size=[64, 64], counts=[0, 4096])
    edit(coco, annotation(segmentation=code))
    edit(coco, lambda c: c['annotations'][0].update(segmentation=code, iscrowd=1))
    step = 'train_dataloader.dataset.pipeline.0'
    options = [f'{step}.with_mask=True', f'{step}.poly2mask=False']
    assert run('detector', coco, *options[:1]) == []
    ((rule, place, _),) = run('detector', coco, *options)
    assert (rule, place) == ('run-length mask', 'annotation 2 of 0.png')
    assert RULES[rule].warns and 'poly2mask=True' in RULES[rule].fix

    edit(coco, lambda c: [a.update(segmentation=code) for a in c['annotations']])
    (detail,) = (
        row[2]
        for row in run('detector', coco, *options)
        if row[0] == 'nothing to train on'
    )
    assert '7 with a run-length mask, which poly2mask=False leaves out' in detail


@pytest.mark.parametrize(
    ('mask', 'rule', 'detail'),
    [
        ([8, 8, 32, 8, 32, 32], 'broken mask', 'a flat list'),
        ([[8, 8, 32, 32]], 'short polygon', 'a polygon of 4 numbers'),
        ([[8, 8, 32, 8, 32, 32, 8]], 'short polygon', 'a polygon of 7 numbers'),
        ([['8', '8', '32', '8', '32', '32']], 'broken mask', 'something else than nu'),
        ('8,8,32,8,32,32', 'broken mask', 'expected polygons'),
        ([[8, 8, 32, 8, 32, float('nan')]], 'broken mask', 'something else than nu'),
        ([[8, 8, 66, 8, 32, 32]], 'mask outside the image', '66, 32; image 64x64'),
        ([[8, 8, 32, -2, 32, 32]], 'mask outside the image', 'from 8, -2 to 32'),
        ([[8, 8, 65, 8, 32, 65]], None, ''),
        (
            dict(size=[32, 64], counts=[2048]),
            'broken mask',
            'code is of 64x32, not 64x',
        ),
        (dict(counts=[4096]), 'broken mask', 'needs "counts" and "size"'),
        ([], 'no mask', ''),
        (None, 'no mask', ''),
        (dict(size=[64, 64], counts=[0, 4096]), None, ''),
        ([[8, 8, 32, 8, 32, 32]], None, ''),
    ],
)
def test_masks(coco, run, mask, rule, detail):
    edit(coco, annotation(segmentation=mask))
    assert run('detector', coco) == []
    found = run('detector', coco, 'train_dataloader.dataset.pipeline.0.with_mask=True')
    assert [row[:2] for row in found] == (
        [(rule, 'annotation 2 of 0.png')] if rule else []
    )
    assert all(detail in row[2] for row in found)


def test_masks_that_are_evaluated(coco, run):
    """pycocotools takes four numbers for a box."""
    edit(coco, annotation(segmentation=[[8, 8, 32, 32]]))
    text = CONFIGS['detector'].replace('train_', 'val_')
    options = ['val_evaluator.type=CocoMetric', 'val_evaluator.metric=[bbox,segm]']
    assert run('validation', coco, *options[:1], split='val', text=text) == []
    ((rule, place, _),) = run('validation', coco, *options, split='val', text=text)
    assert (rule, place) == ('broken mask', 'annotation 2 of 0.png')


def test_masks_that_validation_loads(coco, run):
    """They stop it where they are missing, be they evaluated or not."""
    edit(coco, lambda content: content['annotations'][2].pop('segmentation'))
    text = CONFIGS['detector'].replace('train_', 'val_')
    options = ['val_evaluator.type=CocoMetric', 'val_evaluator.metric=bbox']
    assert run('validation', coco, *options, split='val', text=text) == []
    options.append('val_dataloader.dataset.pipeline.0.with_mask=True')
    found = run('validation', coco, *options, split='val', text=text)
    assert found == [('no mask', 'annotation 3 of 1.png', 'has no segmentation')]


def test_message_before_a_run_names_the_file(coco):
    edit(coco, annotation(bbox=None))
    text = CONFIGS['detector'].replace('{root}', str(coco))
    cfg = Config.fromstring(text, '.py')
    init_default_scope('mmdet')
    (finding,) = checks.check_split_quickly(cfg, 'train')
    assert finding.message.startswith(f'{coco / "ann.json"}: annotation 2')


def test_nothing_to_score(coco, run):
    edit(coco, lambda c: [a.update(iscrowd=1) for a in c['annotations']])
    text = CONFIGS['detector'].replace('train_', 'val_')
    (found,) = run('validation', coco, split='val', text=text)
    detail = 'none of its annotations counts: 8 with iscrowd=1'
    assert found == ('nothing to score', str(coco / 'ann.json'), detail)


@pytest.mark.parametrize('written', [False, True])
def test_no_annotations_to_score(coco, run, written, tmp_path):
    """As in a validation set that nobody has labelled; lists of test images have none.

    Beside a set with objects one may have photos of the background alone.
    """
    other = shutil.copytree(coco, tmp_path / 'other')
    edit(coco, lambda content: content['annotations'].clear())
    options = ['val_evaluator.type=CocoMetric', f'val_evaluator.format_only={written}']
    options.append(f'val_evaluator.ann_file={coco / "ann.json"}')
    text = CONFIGS['detector'].replace('train_', 'val_')
    found = run('validation', coco, *options, split='val', text=text)
    right = ('nothing to score', str(coco / 'ann.json'), 'it has no annotations')
    assert found == ([] if written else [right])
    text = beside('detector', other).replace('train_', 'val_')
    assert run('validation', coco, *options, split='val', text=text) == []


def test_image_too_narrow_to_be_resized(coco, run):
    Image.new('RGB', (2000, 3)).save(coco / '1.png')
    edit(coco, image(width=2000, height=3))
    step = 'train_dataloader.dataset.pipeline.0'
    options = [f'{step}.type=Resize', f'{step}.scale=(64,64)']
    options += [f'{step}.keep_ratio=True']
    (found,) = [r for r in run('detector', coco, *options) if r[0] == 'too narrow']
    assert found[1:] == (str(coco / '1.png'), 'is 2000x3, and resized to 64x0')


def test_root_category_that_roboflow_adds(coco, run):
    def add(name):
        def change(content):
            root = dict(id=0, name=name, supercategory='none')
            content['categories'].insert(0, root)
            for category in content['categories'][1:]:
                category['supercategory'] = name

        return change

    file = (coco / 'ann.json').read_text()
    edit(coco, add('shapes'))
    assert run('detector', coco) == []
    option = 'train_dataloader.dataset.metainfo.classes=[disc,bar]'
    ((rule, _, detail),) = (
        r for r in run('detector', coco, option) if r[0] == 'classes'
    )
    assert "'shapes' is the root that Roboflow adds" in detail
    assert detail.endswith("The file has, in this order: ('square', 'bar')")

    (coco / 'ann.json').write_text(file)
    edit(coco, add('bar'))
    ((rule, place, detail),) = run('detector', coco)
    assert rule == 'category twice'
    assert detail.startswith(
        "'bar' is category 0 (0 annotations) and 2 (4 annotations); 0 is the root that"
    )
    command = re.search(r'python -c (.*) takes it out', detail)[1]
    subprocess.run(f'{sys.executable} -c {command}', shell=True, check=True)
    assert run('detector', coco) == []


def test_other_annotations_than_objects_do_not_stop_a_run(coco):
    def change(content):
        for i in range(4):
            segment = dict(id=i, category_id=1, bbox=[0, 0, 9, 9], area=81, iscrowd=0)
            content['annotations'].append(
                dict(image_id=i + 1, file_name=f'{i}.png', segments_info=[segment])
            )
        del content['annotations'][:-4]

    edit(coco, change)
    text = CONFIGS['detector'].replace('CocoDataset', 'CocoPanopticDataset')
    cfg = Config.fromstring(text.replace('{root}', str(coco)), '.py')
    init_default_scope('mmdet')
    found = list(checks.check_split_quickly(cfg, 'train'))
    assert not [
        f for f in found if f.rule in ('malformed entry', 'nothing to train on')
    ]


def test_backslash_in_a_file_name(coco, run):
    edit(coco, image(file_name='photos\\1.png'))
    (found,) = run('detector', coco)
    assert found[0] == 'missing image' and 'write / in its place' in found[2]
    edit(coco, lambda content: content.update(images=content['images'][1:2]))
    found = run('detector', coco)
    assert found[0][0] == 'image folder' and 'write / in its place' in found[0][2]


def test_a_box_may_exceed_its_image_by_a_pixel(coco, run):
    edit(coco, annotation(bbox=[-1, 4, 66, 9]))
    assert run('detector', coco) == []


def test_images_with_one_id_or_one_file(coco, run):
    edit(coco, image(id=1, file_name='0.png'))
    found = run('detector', coco)
    assert [row[:2] for row in found if 'duplicate' in row[0]] == [
        ('duplicate id', 'image id 1'),
        ('duplicate', "image '0.png'"),
    ]
    # what the two annotations of the lost id 2 say
    assert [row[0] for row in found[2:]] == ['unknown image'] * 2


def test_category_that_classes_do_not_name(coco, run):
    def add(content):
        content['categories'].append(dict(id=3, name='disc'))
        annotation(category_id=3)(content)

    edit(coco, add)
    (found,) = run('detector', coco)
    assert found[:2] == ('unknown category', 'disc (id 3), not among classes')


def test_classes_that_do_not_fit_the_file(coco, run):
    edit(coco, lambda content: content['categories'][0].update(name='disc'))
    rules = [row[0] for row in run('detector', coco)]
    assert rules == ['classes', 'unknown category']


@pytest.mark.parametrize('split', ['val', 'test'])
def test_order_of_classes_in_another_split(coco, run, tmp_path, split):
    """Each data set fits its file, but square is label 0 of one and 1 of the other."""
    other = shutil.copytree(coco, tmp_path / 'other')
    edit(other, lambda content: content['categories'].reverse())
    text = f"""{CONFIGS['detector']}
{split}_dataloader = dict(dataset=dict(
    train_dataloader['dataset'], data_root={str(other)!r}))
"""
    option = f'{split}_dataloader.dataset.metainfo.classes=[bar,square]'
    ((rule, place, _),) = run('detector', coco, text=text, split=split)
    assert (rule, place[:4]) == ('classes', f'{split}_'[:4])
    assert run('detector', coco, option, text=text, split=split) == [
        (
            'order of classes',
            f'{split}_dataloader.dataset',
            "'bar' is class 0 here, and class 1 of train_dataloader.dataset",
        )
    ]
    edit(other, lambda content: content['categories'].reverse())
    assert run('detector', coco, text=text, split=split) == []


def test_order_of_classes_beside_a_set(coco, run, tmp_path):
    """MMDetection's ConcatDataset takes what it likes, and trains on both."""
    other = shutil.copytree(coco, tmp_path / 'other')
    edit(other, lambda content: content['categories'].reverse())
    text = beside('detector', other).replace(
        f'data_root={str(other)!r}',
        f"data_root={str(other)!r}, metainfo=dict(classes=('bar', 'square'))",
    )
    ((rule, place, _),) = run('detector', coco, text=text)
    assert rule == 'order of classes'
    assert place == 'train_dataloader.dataset.datasets.1'


def test_category_whose_name_is_no_text(coco, run):
    def change(content):
        content['annotations'].clear()
        content['categories'][1]['name'] = [42]

    edit(coco, change)
    rules = [row[0] for row in run('detector', coco)]
    assert rules == ['classes', 'nothing to train on']


def test_masks_are_needed_where_masks_are_trained(coco, run):
    edit(coco, lambda content: content['annotations'][2].pop('segmentation'))
    assert run('detector', coco) == []
    option = 'train_dataloader.dataset.pipeline.0.with_mask=True'
    assert run('detector', coco, option) == [
        ('no mask', 'annotation 3 of 1.png', 'has no segmentation')
    ]


@pytest.mark.parametrize('content', ['{"images": [', '[]', '{"images": []}', '{}'])
def test_file_that_is_no_coco(coco, run, content):
    (coco / 'ann.json').write_text(content)
    ((rule, place, _),) = run('detector', coco)
    assert rule == 'no COCO file' and 'is not a COCO annotation file' in place


@pytest.mark.parametrize('damage', ['.png', '.jpg', 'empty', 'text'])
def test_undecodable_image(coco, run, damage):
    path = coco / '2.png'
    if damage.startswith('.'):
        tear(path, damage)
    else:
        path.write_text('' if damage == 'empty' else '<html>404</html>')
    assert run('detector', coco) == [
        ('undecodable image', str(path), 'cannot be decoded')
    ]


def test_torn_jpeg_where_opencv_fills_it_up(monkeypatch, coco, run):
    """OpenCV before 5 gives a whole picture, the missing part grey."""
    tear(coco / '2.png', '.jpg')
    monkeypatch.setattr(images, 'read_image', lambda path: np.zeros((64, 64, 3)))
    monkeypatch.setattr(cv2, '__version__', '4.11.0')
    (found,) = run('detector', coco)
    assert found[:2] == ('undecodable image', str(coco / '2.png'))


def test_image_turned_by_its_orientation(coco, run):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    Image.new('RGB', (60, 64)).save(coco / '1.jpg', exif=exif)
    edit(coco, image(file_name='1.jpg', width=60, height=64))
    (found,) = run('detector', coco)
    assert found[0] == 'image size' and 'EXIF' in found[2]


@pytest.mark.parametrize('prefix', ['', "data_prefix=dict(img_path='')"])
def test_folder_that_is_not_named(coco, run, prefix):
    text = CONFIGS['detector'].replace("data_prefix=dict(img='')", prefix)
    text = text.replace("'ann.json', ,", "'ann.json',")
    (found,) = run('detector', coco, text=text)
    assert found[::2] == ('image folder', "its data_prefix has no 'img'")


def test_home_folder(coco, cls, run, monkeypatch):
    """MMPretrain expands ~, the others look for a folder of that name."""
    monkeypatch.setenv('HOME', str(coco.parent))
    ((rule, message, _),) = run('detector', Path('~/coco'))
    assert rule == 'missing path'
    assert 'data_root: ~/coco is read as it' in message
    assert message.endswith(f'Write {coco}.')
    assert run('classifier', Path('~/cls')) == []


def test_missing_folder(run, tmp_path):
    (found,) = run('detector', tmp_path / 'nowhere')
    assert found[0] == 'missing path' and 'does not exist' in found[1]
