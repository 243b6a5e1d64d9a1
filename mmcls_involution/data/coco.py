"""Data sets that read like MMDetection's CocoDataset."""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmcls_involution.data.images import times
from mmcls_involution.data.rules import Files, Finding, repeated
from mmcls_involution.engine.config import dicts

# Pixels that a box may exceed its image: annotation tools round, and count from 0 or 1.
MARGIN = 1


class NotCoco(ValueError):
    """A file is not a COCO annotation file; the message says why."""


def loads_as_coco(cls: type | None) -> bool:
    """Whether the data set reads its categories the way MMDetection's COCO does."""
    if importlib.util.find_spec('mmdet') is None or not inspect.isclass(cls):
        return False
    from mmdet.datasets import CocoDataset

    return getattr(cls, 'load_data_list', None) is CocoDataset.load_data_list


def read(ann_file: Path) -> tuple[list[dict], list[dict], list[dict]]:
    """Images, annotations and categories of a COCO annotation file.

    There may be no annotations, as in the lists of test images.

    Raises:
        NotCoco: If one of these is not a list of dicts, there is no image, or an item
            of the categories has no id or no name.
    """
    what = f'{ann_file} is not a COCO annotation file'
    try:
        content = json.loads(ann_file.read_bytes())
        lists = [
            content['images'],
            content.get('annotations', []),
            content['categories'],
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise NotCoco(f'{what}: {type(error).__name__}: {error}') from error
    for name, items in zip(('images', 'annotations', 'categories'), lists, strict=True):
        if not isinstance(items, list) or not all(isinstance(i, dict) for i in items):
            raise NotCoco(f'{what}: its "{name}" is no list of dicts')
    if not lists[0]:
        raise NotCoco(f'{what}: its "images" is empty')
    for item in lists[2]:
        if 'name' not in item or not isinstance(item.get('id'), int | str):
            raise NotCoco(
                f'{what}: not every item of its "categories" has an "id" and a "name"'
            )
    images, annotations, categories = lists
    return images, annotations, categories


def check_quickly(
    path: str, ann_file: Path, folder: Path, classes: list[str]
) -> Iterator[Finding]:
    """Compare an annotation file with the config: its classes, the first photo.

    MMDetection numbers the labels in the order of the file, and drops without a word
    the boxes of every category that ``classes`` does not name.

    Args:
        path (str): Where in the config the data set is.
        ann_file (Path): The annotation file.
        folder (Path): The folder of the photos.
        classes (list[str]): What the config says.
    """
    try:
        images, _, categories = read(ann_file)
    except NotCoco as error:
        yield Finding('no COCO file', str(error))
        return
    names = [category['name'] for category in categories]
    found = [name for name in names if name in classes]
    if found != classes:
        missing = [name for name in classes if name not in names]
        if missing:
            problem = f'{", ".join(map(repr, missing))} not among its categories'
        elif len(found) > len(classes):
            problem = 'some category appears twice in the file'
        else:
            problem = 'the order differs, so the labels would get the wrong names'
            names = found
        yield Finding(
            'classes',
            f'{path}: metainfo.classes does not fit {ann_file}',
            f'{problem}. The file has, in this order: {tuple(names)}',
        )
    name = str(images[0].get('file_name'))
    if not (folder / name).expanduser().exists():
        yield Finding(
            'image folder',
            path,
            f'{ann_file} names the photo {name}, which is not in the folder {folder}',
        )


def check_coco(dataset: Any, cfg: Config) -> tuple[list[Finding], list[Files]]:
    """Check the annotation file of a CocoDataset; give its images."""
    path = Path(dataset.ann_file)
    if not path.is_file():
        return [], []  # the quick check has said so
    try:
        images, annotations, categories = read(path)
    except NotCoco:
        return [], []  # likewise
    names = {category['id']: category['name'] for category in categories}
    found = [
        *repeated('image id', (i.get('id') for i in images)),
        *repeated('image', (i.get('file_name') for i in images)),
        *repeated('annotation id', (a.get('id') for a in annotations)),
        *repeated('category id', (c['id'] for c in categories)),
    ]
    files, sizes = [], {}
    for image in images:
        place = f'image {image.get("file_name", image.get("id"))}'
        try:
            sizes[image['id']] = place, None
            size = int(image['width']), int(image['height'])
            name = os.path.join(dataset.data_prefix.get('img', ''), image['file_name'])
            sizes[image['id']] = image['file_name'], size
            files.append(Files(name, size))
        except (KeyError, TypeError, ValueError) as error:
            found.append(Finding('malformed entry', place, repr(error)))

    classes = dataset.metainfo['classes']
    unused: Counter[str] = Counter()
    masks = _trains_masks(cfg)
    for annotation in annotations:
        place = f'annotation {annotation.get("id")}'
        try:
            _, category, number = (
                annotation[key] for key in ('id', 'category_id', 'image_id')
            )
            if category not in names:
                unused[f'category_id {category}, not among the categories'] += 1
            elif names[category] not in classes:
                unused[f'{names[category]} (id {category}), not among classes'] += 1
            if number not in sizes:
                found.append(Finding('unknown image', place, f'image_id {number}'))
                continue
            image, size = sizes[number]
            place += f' of {image}'
            found += _check_box(place, annotation['bbox'], annotation['area'], size)
        except (KeyError, TypeError, ValueError) as error:
            found.append(Finding('malformed entry', place, repr(error)))
        if masks and not annotation.get('segmentation'):
            found.append(Finding('no mask', place))
    found += [
        Finding('unknown category', what, f'{count} annotation(s)')
        for what, count in unused.items()
    ]
    return found, files


def _check_box(
    place: str, box: list[float], area: float, size: tuple[int, int] | None
) -> list[Finding]:
    """Check a COCO box (x, y, width, height) against its image's (width, height).

    None: the image's size is not known.

    Raises:
        TypeError, ValueError: If these are not four and one finite numbers.
    """
    x, y, w, h = map(float, box)
    if not all(map(math.isfinite, (x, y, w, h, area))):
        raise ValueError(f'bbox {box}, area {area}')
    if w <= 0 or h <= 0 or area <= 0:
        return [Finding('box without area', place, f'bbox {box}, area {area}')]
    width, height = size or (math.inf, math.inf)
    if min(x, y) < -MARGIN or x + w > width + MARGIN or y + h > height + MARGIN:
        detail = f'bbox {box}' + (f', image {times(size)}' if size else '')
        return [Finding('box outside the image', place, detail)]
    return []


def _trains_masks(cfg: Config) -> bool:
    loader = cfg.get('train_dataloader') or {}
    return any(part.get('with_mask') for _, part in dicts(loader))
