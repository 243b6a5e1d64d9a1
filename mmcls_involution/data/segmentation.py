"""Data sets that read like MMSegmentation's BaseSegDataset, CityscapesDataset."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from PIL import Image

from mmcls_involution.data.images import times
from mmcls_involution.data.rules import Files, Finding

# Labels as Cityscapes' archives hold them; 34 classes, not the 19 that are trained.
LABEL_IDS, TRAIN_IDS = '_labelIds.png', '_labelTrainIds.png'
POLYGONS = '_polygons.json'
NO_SOURCE = 'nor what it is made from: unpack gtFine_trainvaltest.zip again'


def check_segmentation(dataset: Any, cfg: Config) -> tuple[list[Finding], list[Files]]:
    """Give the images and label maps of a BaseSegDataset, and find lone ones."""
    images = Path(dataset.data_prefix.get('img_path') or '')
    if not images.is_dir():
        return [], []  # the quick check has said so
    samples = dataset.load_data_list()
    found = []
    if not samples:
        place, detail = str(images), f'no file name ends in {dataset.img_suffix}'
        found.append(Finding('missing image', place, detail))
    values = _label_values(dataset, cfg)
    files = [
        Files(
            sample['img_path'],
            label=sample.get('seg_map_path'),
            values=values,
        )
        for sample in samples
    ]
    labels = Path(dataset.data_prefix.get('seg_map_path') or '')
    if not dataset.ann_file and dataset.data_prefix.get('seg_map_path'):
        # Without a list of names an image that is lost leaves its label behind.
        used = {os.path.normpath(file.label) for file in files}
        found += [
            Finding('missing image', str(label), 'is a label without an image')
            for label in sorted(labels.rglob(f'*{dataset.seg_map_suffix}'))
            if os.path.normpath(label) not in used
        ]
    return found, files


def _label_values(dataset: Any, cfg: Config) -> frozenset[int]:
    """The values that a label map may have, as it lies on the disk."""
    heads = cfg.model.decode_head
    heads = heads if isinstance(heads, list) else [heads]
    ignored = {head.get('ignore_index', 255) for head in heads}
    # The classes on the disk: of a label map some are ignored, or get other numbers.
    classes = dataset.label_map or dataset.metainfo.get('classes')
    number = len(classes) if classes else heads[-1].num_classes
    if dataset.reduce_zero_label:  # 0 is read as 255, n as n - 1
        return frozenset(range(number + 1)) | {255}
    return frozenset(range(number)) | ignored


def check_label(
    path: str, size: tuple[int, int] | None, values: frozenset[int]
) -> list[Finding]:
    """Check the label map of an image of ``size`` (None: not known)."""
    if not os.path.isfile(path):
        if not path.endswith(TRAIN_IDS):
            return [Finding('missing label', path)]
        stem = path.removesuffix(TRAIN_IDS)
        there = [end for end in (LABEL_IDS, POLYGONS) if os.path.isfile(stem + end)]
        detail = f'there is {" and ".join(there)}' if there else NO_SOURCE
        return [Finding('missing labelTrainIds', path, detail)]
    try:
        # As MMSegmentation's LoadAnnotations reads it: palette images give indices.
        with Image.open(path) as file:
            label = np.array(file).squeeze()
    except Exception as error:  # Pillow raises whatever a broken file leads to
        return [Finding('undecodable label', path, str(error))]
    if label.ndim != 2:
        detail = f'has the shape {label.shape}: expected one channel of class numbers'
        return [Finding('undecodable label', path, detail)]
    found = []
    if size is not None and label.shape != size[::-1]:
        detail = f'is {times(label.shape[::-1])}, its image {times(size)}'
        found.append(Finding('label size', path, detail))
    present, counts = np.unique(label, return_counts=True)
    wrong = {
        int(value): int(count)
        for value, count in zip(present, counts, strict=True)
        if int(value) not in values
    }
    if wrong:
        detail = f'has {", ".join(map(str, wrong))} ({sum(wrong.values())} pixels)'
        if path.endswith(LABEL_IDS):
            detail += '; training needs its labelTrainIds'
        found.append(Finding('label value', path, detail))
    return found
