"""COCO annotation files as annotation tools write them, in training and evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mmcls_involution import compat

pytest.importorskip('mmdet')


@pytest.fixture
def ann_file(coco_root, tmp_path) -> Callable[..., Path]:
    """The tiny annotations, each changed by a function of itself and its place."""

    def write(change: Callable[[dict, int], object], encoding: str = 'utf-8') -> Path:
        content = json.loads((coco_root / 'ann.json').read_text())
        for place, annotation in enumerate(content['annotations']):
            change(annotation, place)
        file = tmp_path / 'ann.json'
        file.write_text(json.dumps(content), encoding=encoding)
        return file

    return write


def score_of_perfect_predictions(file: Path) -> dict[str, float]:
    """Box AP of each object of the tiny data, predicted where it is."""
    compat.apply()
    from mmdet.evaluation import CocoMetric

    content = json.loads(file.read_bytes())
    metric = CocoMetric(str(file))
    metric.dataset_meta = dict(classes=('square', 'bar'))
    for image in content['images']:
        own = [a for a in content['annotations'] if a['image_id'] == image['id']]
        boxes = torch.tensor([a['bbox'] for a in own], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        predictions = dict(
            bboxes=boxes,
            scores=torch.ones(len(own)),
            labels=torch.tensor([a['category_id'] - 1 for a in own]),
        )
        sample = dict(
            img_id=image['id'], ori_shape=(64, 64), pred_instances=predictions
        )
        metric.process({}, [sample])
    return metric.evaluate(len(content['images']))


@pytest.mark.parametrize(
    'change',
    [
        lambda a, i: None,
        lambda a, i: a.update(id=i),  # from 0
        lambda a, i: a.update(id=f'object-{i}'),
        lambda a, i: a.update(id=str(i)),
        lambda a, i: a.pop('iscrowd'),
        lambda a, i: a.update(iscrowd=None),
    ],
)
def test_perfect_predictions_score_one(ann_file, change):
    scores = score_of_perfect_predictions(ann_file(change))
    assert scores['coco/bbox_mAP'] == pytest.approx(1)
    assert scores['coco/bbox_mAP_50'] == pytest.approx(1)


def test_byte_order_mark(ann_file):
    file = ann_file(lambda a, i: None, 'utf-8-sig')
    assert score_of_perfect_predictions(file)['coco/bbox_mAP'] == pytest.approx(1)


def test_ids_that_are_there_stay(ann_file):
    from mmdet.datasets.api_wrappers import COCO

    compat.apply()
    file = ann_file(lambda a, i: a.update(id=[0, 7, 'x', 3, 4, 5, 8, 2][i]))
    ids = [a['id'] for a in COCO(str(file)).dataset['annotations']]
    assert ids == [9, 7, 10, 3, 4, 5, 8, 2]


def test_an_id_that_occurs_twice_is_not_hidden(ann_file):
    from mmdet.datasets.api_wrappers import COCO

    compat.apply()
    file = ann_file(lambda a, i: a.update(id=0))
    assert len(COCO(str(file)).anns) == 1


def test_what_is_no_annotation_file(tmp_path):
    from mmdet.datasets.api_wrappers import COCO

    compat.apply()
    (tmp_path / 'list.json').write_text('[]')
    with pytest.raises(ValueError, match='is not a COCO annotation file'):
        COCO(str(tmp_path / 'list.json'))
