"""Configs for data to check, and damage to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import cv2

# Just what the check reads: to inherit upstream's, as tests/tiny does, takes a second.
CONFIGS = dict(
    detector="""
default_scope = 'mmdet'
model = dict(bbox_head=dict(num_classes=2))
train_dataloader = dict(dataset=dict(type='CocoDataset',
    data_root='{root}', ann_file='ann.json', data_prefix=dict(img=''),
    metainfo=dict(classes=('square', 'bar')),
    pipeline=[dict(type='LoadAnnotations', with_mask=False)]))
""",
    segmenter="""
default_scope = 'mmseg'
model = dict(decode_head=dict(num_classes=2))
train_dataloader = dict(dataset=dict(type='BaseSegDataset',
    data_root='{root}', data_prefix=dict(img_path='images', seg_map_path='labels'),
    img_suffix='.png', metainfo=dict(classes=('top', 'bottom'))))
""",
    cityscapes="""
default_scope = 'mmseg'
model = dict(decode_head=dict(num_classes=19))
train_dataloader = dict(dataset=dict(type='CityscapesDataset', data_root='{root}',
    data_prefix=dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train')))
""",
    classifier="""
default_scope = 'mmpretrain'
model = dict(head=dict(num_classes=2))
train_dataloader = dict(dataset=dict(type='CustomDataset', data_prefix='{root}'))
""",
    imagenet="""
default_scope = 'mmpretrain'
model = dict(head=dict(num_classes=1000))
train_dataloader = dict(dataset=dict(
    type='ImageNet', data_root='{root}', split='train'))
val_dataloader = dict(dataset=dict(type='ImageNet', data_root='{root}', split='val'))
""",
)


def beside(name: str, other: Path) -> str:
    """One of CONFIGS whose data set stands beside another one, of another folder."""
    return f"""{CONFIGS[name]}
_inner = train_dataloader['dataset']
train_dataloader = dict(dataset=dict(type='ConcatDataset', datasets=[
    _inner, dict(_inner, data_root={str(other)!r})]))
"""


def tear(path: Path, form: str) -> None:
    """Replace an image by one of the same content that lacks its last tenth."""
    content = cv2.imencode(form, cv2.imread(str(path)))[1].tobytes()
    path.write_bytes(content[: len(content) * 9 // 10])


def edit(root: Path, change: Callable[[dict], object]) -> None:
    """Change the annotations of a data set in COCO format."""
    content = json.loads((root / 'ann.json').read_text())
    change(content)
    (root / 'ann.json').write_text(json.dumps(content))
