"""What is found in data before a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image

from mmcls_involution.data.checks import check_split_quickly


def odd_annotations(coco_root: Path, file: Path, change: Callable[[dict], None]) -> str:
    """Write changed annotations; give the options that train and evaluate with them."""
    content = json.loads((coco_root / 'ann.json').read_text())
    change(content)
    file.write_text(json.dumps(content), encoding='utf-8-sig')
    keys = ('train_dataloader.dataset', 'val_dataloader.dataset', 'val_evaluator')
    return ['--cfg-options', *(f'{key}.ann_file={file}' for key in keys)]


def test_annotations_that_say_what_everybody_means(coco_root, tmp_path, tool):
    """A byte order mark, no iscrowd, ids from 0: trained and evaluated."""

    def change(content: dict) -> None:
        for i, annotation in enumerate(content['annotations']):
            annotation['id'] = i
            del annotation['iscrowd']

    options = odd_annotations(coco_root, tmp_path / 'ann.json', change)
    assert tool('train', 'detector', '--work-dir', tmp_path / 'work', *options) == ''
    log = next((tmp_path / 'work').glob('*/vis_data/scalars.json')).read_text()
    assert 'coco/bbox_mAP' in log


def test_info_of_a_coco_file_may_have_categories(coco_root, tmp_path, tool):
    def change(content: dict) -> None:
        content['info'] = dict(categories=['blood'], images=[], annotations=7)
        for key in [*content][:-1]:  # info comes first
            content[key] = content.pop(key)

    options = odd_annotations(coco_root, tmp_path / 'ann.json', change)
    options += ['train_cfg.max_epochs=1']
    arguments = ['--work-dir', tmp_path / 'work', '--no-validate', *options]
    assert tool('train', 'detector', *arguments) == ''


def test_nothing_to_train_on(coco_root, tmp_path, tool, capfd):
    def crowds(labels: tuple[int, ...]) -> Callable[[dict], None]:
        def change(content: dict) -> None:
            for annotation in content['annotations']:
                annotation['iscrowd'] = int(annotation['category_id'] in labels)

        return change

    arguments = ['train', 'detector', '--work-dir', tmp_path / 'work']
    options = odd_annotations(coco_root, tmp_path / 'ann.json', crowds((1, 2)))
    message = tool(*arguments, *options)
    assert message.startswith('Error: ') and str(tmp_path / 'ann.json') in message
    assert 'none of its annotations can be trained on: 8 with iscrowd=1.' in message
    assert not (tmp_path / 'work').exists()
    capfd.readouterr()
    options = odd_annotations(coco_root, tmp_path / 'ann.json', crowds((2,)))
    assert tool(*arguments, *options) == ''
    assert 'ann.json: bar (1 of 2 classes); ' in ''.join(capfd.readouterr())


def test_more_findings_than_one_are_counted(coco_root, tmp_path, tool):
    def change(content: dict) -> None:
        for annotation in content['annotations'][2:5]:
            annotation['bbox'] = [str(number) for number in annotation['bbox']]

    options = odd_annotations(coco_root, tmp_path / 'ann.json', change)
    message = tool('train', 'detector', '--work-dir', tmp_path / 'work', *options)
    assert 'annotation 3' in message and 'expected 4 numbers' in message
    assert message.endswith(
        ' 2 more like this: `python -m mmcls_involution check` lists them.'
    )


def test_category_twice_in_the_file(coco_root, tmp_path, tool):
    content = json.loads((coco_root / 'ann.json').read_text())
    content['categories'].append(dict(id=3, name='bar'))
    file = tmp_path / 'ann.json'
    file.write_text(json.dumps(content))
    option = f'train_dataloader.dataset.ann_file={file}'
    message = tool('train', 'detector', '--work-dir', tmp_path, '--cfg-options', option)
    assert 'twice' in message


@pytest.mark.parametrize('text', ['', '{}', '[1]', '{"categories": [1]}'])
def test_annotation_file_that_is_not_coco(text, tmp_path, tool):
    (tmp_path / 'ann.json').write_text(text)
    option = f'train_dataloader.dataset.ann_file={tmp_path / "ann.json"}'
    message = tool('train', 'detector', '--work-dir', tmp_path, '--cfg-options', option)
    assert 'is not a COCO annotation file' in message


@pytest.mark.parametrize('metric', ['CocoMetric', 'mmdet.CocoMetric', 'subclass'])
@pytest.mark.parametrize('wrapped', [False, True])
def test_metrics_of_other_annotations(
    metric, wrapped, coco_root, tmp_path, tool, edited
):
    if metric == 'subclass':
        from mmdet.evaluation import CocoMetric
        from mmdet.registry import METRICS

        metric = 'MetricOfMyOwn'
        METRICS.register_module(
            name=metric, module=type(metric, (CocoMetric,), {}), force=True
        )
    other = tmp_path / 'ann.json'
    shutil.copy(coco_root / 'ann.json', other)
    text = f'val_evaluator = dict(type={metric!r})\n'
    place = 'val_dataloader.dataset'
    if wrapped:
        text += """
_inner = dict(type='CocoDataset', data_root='{{$TINY_DATA:x}}',
    data_prefix=dict(img=''), ann_file='ann.json', test_mode=True,
    metainfo=dict(classes=('square', 'bar')))
val_dataloader = dict(dataset=dict(
    _delete_=True, type='mmdet.ConcatDataset', datasets=[_inner]))
"""
        place += '.datasets.0'
    file = edited('detector', text)
    message = tool(
        'train', 'detector', file, '--work-dir', tmp_path / 'work',
        '--cfg-options', f'{place}.ann_file={other}',
    )  # fmt: skip
    assert f'but the data set reads {other}' in message
    assert f'--cfg-options val_evaluator.ann_file={other}' in message


@pytest.mark.parametrize(
    ('first', 'evaluator', 'expected'),
    [
        (0, '{a}', 'image id 1 is in {a} and in {b}, and predictions for both would'),
        (4, '{a}', 'val_evaluator.ann_file: {a} has no image id 5, which {b} has'),
        (4, '{both}', None),
        (0, 'each', None),
        (0, 'each the other', 'val_evaluator.metrics.0.ann_file is {b}, but'),
    ],
)
def test_metrics_of_several_data_sets(coco_root, tmp_path, first, evaluator, expected):
    """What annotation tools write numbers the images of each set from the same number.

    pycocotools takes those of one number for one image, without a word.
    """
    a, b, both = files = [tmp_path / f'{name}.json' for name in ('a', 'b', 'both')]
    one, other = (json.loads((coco_root / 'ann.json').read_text()) for _ in range(2))
    for image in other['images']:
        image['id'] += first
    for annotation in other['annotations']:
        annotation['image_id'] += first
        annotation['id'] += len(one['annotations'])
    keys = ('images', 'annotations')
    whole = dict(one, **{key: one[key] + other[key] for key in keys})
    for file, content in zip(files, (one, other, whole), strict=True):
        file.write_text(json.dumps(content))
    metrics = [dict(type='CocoMetric', ann_file=str(file)) for file in (a, b)]
    if evaluator == 'each the other':
        metrics.reverse()
    scored = dict(type='CocoMetric', ann_file=evaluator.format(a=a, both=both))
    if evaluator.startswith('each'):
        scored = dict(type='MultiDatasetsEvaluator', metrics=metrics)
    inner = dict(
        type='CocoDataset',
        data_root=str(coco_root),
        data_prefix=dict(img=''),
        metainfo=dict(classes=('square', 'bar')),
    )
    parts = [dict(inner, ann_file=str(file)) for file in (a, b)]
    cfg = Config(
        dict(
            model=dict(bbox_head=dict(num_classes=2)),
            val_dataloader=dict(dataset=dict(type='ConcatDataset', datasets=parts)),
            val_evaluator=scored,
        )
    )
    init_default_scope('mmdet')
    found = [finding.message for finding in check_split_quickly(cfg, 'val')]
    if expected is None:
        assert found == []
    else:
        assert expected.format(a=a, b=b) in found[0]


@pytest.mark.parametrize('name', ['none/../ann.json', 'link.json'])
def test_metrics_of_the_same_annotations_by_another_name(
    name, coco_root, tmp_path, tool
):
    root = shutil.copytree(coco_root, tmp_path / 'data')
    (root / 'none').mkdir()
    (root / 'link.json').symlink_to('ann.json')
    options = [
        f'val_dataloader.dataset.data_root={root}',
        f'val_dataloader.dataset.ann_file={name}',
        f'val_evaluator.ann_file={root}/ann.json',
    ]
    arguments = ['--work-dir', tmp_path / 'work', '--cfg-options', *options]
    assert tool('train', 'detector', *arguments) == ''


def test_filter_that_leaves_nothing(tool, tmp_path):
    options = ['train_dataloader.dataset.filter_cfg.min_size=99']
    message = tool(
        'train', 'detector', '--work-dir', tmp_path / 'w', '--cfg-options', *options
    )
    assert 'CocoDataset holds no sample' in message and "'min_size': 99" in message


def rewrite(file: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    Image.fromarray(change(np.array(Image.open(file)))).save(file)


@pytest.mark.parametrize(
    ('damage', 'expected'),
    [
        (
            lambda file: file.unlink(),
            'labels/2.png: does not exist. Training stops here',
        ),
        (lambda file: rewrite(file, lambda a: a * 3), 'labels/2.png: has 3 ('),
        (lambda file: rewrite(file, lambda a: np.dstack([a] * 3)), 'shape (64, 64, 3)'),
        (lambda file: rewrite(file, lambda a: a[:32]), 'is 64x32, its image 64x64'),
        (lambda file: file.write_bytes(file.read_bytes()[:-40]), 'labels/2.png: '),
        (
            lambda file: [rewrite(f, lambda a: a * 255) for f in file.parent.iterdir()],
            'bottom (1 of 2 classes) in 4 label maps; ignored is 255, 56.2% of all',
        ),
    ],
)
def test_damaged_label_maps(damage, expected, seg_copy, tool, tmp_path):
    damage(seg_copy / 'labels' / '2.png')
    options = [f'train_dataloader.dataset.data_root={seg_copy}']
    message = tool(
        'train', 'segmenter', '--work-dir', tmp_path / 'w', '--cfg-options', *options
    )
    assert message.startswith('Error: ') and expected in message, message
    assert not (tmp_path / 'w').exists()


def test_wrong_suffix(tool, tmp_path):
    options = ['train_dataloader.dataset.img_suffix=.jpg']
    message = tool(
        'train', 'segmenter', '--work-dir', tmp_path / 'w', '--cfg-options', *options
    )
    assert 'images: no file name ends in .jpg; there are 0.png, 1.png' in message


@pytest.mark.parametrize(
    ('damage', 'expected'),
    [
        (lambda root: (root / '.hidden').mkdir(), 'cls/.hidden. Take it away: it'),
        (lambda root: (root / 'third').mkdir(), 'holds 3 folders: expected one per'),
        (
            lambda root: [f.rename(f.with_suffix('.heic')) for f in root.glob('*/*')],
            'cls: no file name ends in one of .bmp, .jpeg',
        ),
    ],
)
def test_class_folders(damage, expected, cls_root, tool, tmp_path):
    root = shutil.copytree(cls_root, tmp_path / 'cls')
    damage(root)
    options = [f'train_dataloader.dataset.data_prefix={root}']
    message = tool(
        'train', 'classifier', '--work-dir', tmp_path / 'w', '--cfg-options', *options
    )
    assert message.startswith('Error: ') and expected in message, message
