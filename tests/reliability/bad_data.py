"""Trainings of a second on the data of MMDetection's and MMSegmentation's formats.

Their data sets and pipelines, and a model of one layer, so that what is bad in the data
is all that matters.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import Tensor, nn

COMMON = """
default_scope = '{scope}'
train_cfg = dict(by_epoch=True, max_epochs=2)
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.01))
env_cfg = dict(mp_cfg=dict(mp_start_method='fork'))
default_hooks = dict(checkpoint=dict(interval=1, by_epoch=False))
randomness = dict(seed=3)
log_level = 'WARNING'
"""
CONFIGS = dict(
    detector=COMMON.replace('{scope}', 'mmdet')
    + """
model = dict(type='mmengine.OneLayer', bbox_head=dict(num_classes=2),
    data_preprocessor=dict(type='DetDataPreprocessor', bgr_to_rgb=True))
train_dataloader = dict(batch_size=2, num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='CocoDataset',
        data_root='{root}', ann_file='ann.json', data_prefix=dict(img=''),
        metainfo=dict(classes=('square', 'bar')),
        pipeline=[dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=False),
            dict(type='Resize', scale=(64, 64)),
            dict(type='RandomFlip', prob=0.5),
            dict(type='PackDetInputs')]))
""",
    segmenter=COMMON.replace('{scope}', 'mmseg')
    + """
model = dict(type='mmengine.OneLayer', decode_head=dict(num_classes=2),
    data_preprocessor=dict(type='SegDataPreProcessor', bgr_to_rgb=True, size=(64, 64)))
train_dataloader = dict(batch_size=2, num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='BaseSegDataset',
        data_root='{root}', img_suffix='.png',
        data_prefix=dict(img_path='images', seg_map_path='labels'),
        metainfo=dict(classes=('top', 'bottom')),
        pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),
            dict(type='RandomFlip', prob=0.5), dict(type='PackSegInputs')]))
""",
)


@MODELS.register_module(force=True)
class OneLayer(BaseModel):
    """A 1x1 convolution, taught the classes of pixels where there are any."""

    def __init__(self, data_preprocessor: dict, **_: Any) -> None:
        super().__init__(data_preprocessor)
        self.layer = nn.Conv2d(3, 2, 1)

    def forward(self, inputs: Tensor, data_samples: list, mode: str) -> dict:
        scores = self.layer(inputs.float() / 255)
        loss = scores.square().mean()
        if hasattr(data_samples[0], 'gt_sem_seg'):
            label = torch.cat([sample.gt_sem_seg.data for sample in data_samples])
            loss = nn.functional.cross_entropy(scores, label.long(), ignore_index=255)
        return dict(loss=loss)


def png_that_says(width: int, height: int, file: Path) -> None:
    """Make the header of a PNG file say another size, with its check sum in order."""
    content = bytearray(file.read_bytes())
    content[16:24] = struct.pack('>II', width, height)
    content[29:33] = struct.pack('>I', zlib.crc32(content[12:29]))
    file.write_bytes(content)
