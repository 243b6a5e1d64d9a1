"""Data sets that read like MMDetection's CocoDataset."""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import os
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmcls_involution.data.images import backslash, times
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


def reads_objects(cls: type | None) -> bool:
    """Whether it reads the annotations so too, not captions, say, or segments."""
    if not loads_as_coco(cls):
        return False
    from mmdet.datasets import CocoDataset

    return cls.parse_data_info is CocoDataset.parse_data_info


def scores_coco(cls: type | None) -> bool:
    """Whether a metric reads its annotations the way MMDetection's CocoMetric does."""
    if importlib.util.find_spec('mmdet') is None or not inspect.isclass(cls):
        return False
    from mmdet.evaluation import CocoMetric

    return issubclass(cls, CocoMetric)


@dataclass(frozen=True)
class Content:
    """The lists of a COCO annotation file."""

    images: list[dict]
    annotations: list[dict]
    categories: list[dict]

    @cached_property
    def used(self) -> Counter[Any]:
        """How many annotations each category has, by :func:`_key` of its id."""
        return Counter(_key(a.get('category_id')) for a in self.annotations)

    def roots(self) -> list[int | str]:
        """Ids of categories that no annotation has and that others are under.

        Roboflow writes one before the classes, with the name of the project.
        """
        above = {_key(c.get('supercategory')) for c in self.categories}
        return [
            c['id']
            for c in self.categories
            if not self.used[_key(c['id'])] and _key(c['name']) in above
        ]


def _key(value: Any) -> Any:
    """Something hashable in place of an id, whatever a file has there."""
    return value if isinstance(value, int | str) else repr(value)


def read(ann_file: Path) -> Content:
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
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
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
    return Content(*lists)


def check_quickly(
    path: str,
    ann_file: Path,
    folder: Path,
    classes: list[str],
    objects: bool,
    masks: bool,
    polygons: bool = False,
    scored: Collection[str] = (),
) -> Iterator[Finding]:
    """Check an annotation file: against the config, in itself, its first photos.

    Args:
        path (str): Where in the config the data set is.
        ann_file (Path): The annotation file.
        folder (Path): The folder of the photos.
        classes (list[str]): What the config says.
        objects (bool): Whether the annotations are objects in boxes.
        masks (bool): Whether their masks are loaded.
        polygons (bool): Whether masks of another form than polygons are not read.
            Defaults to False.
        scored (Collection[str]): The metrics that are computed of them, such as
            ``segm``, which reads the masks too. Defaults to none.
    """
    try:
        content = read(ann_file)
    except NotCoco as error:
        yield Finding('no COCO file', str(error))
        return
    yield from _check_classes(path, ann_file, content, classes)
    # One may be missing; where several are, the folder is another one.
    names = [str(image.get('file_name')) for image in content.images[:8]]
    # os.path's takes names that no file can have
    if names and not any(
        os.path.exists((folder / name).expanduser()) for name in names
    ):
        name = names[0]
        detail = f'{ann_file} names the photo {name}, which is not in the folder '
        detail += '; '.join(filter(None, [str(folder), backslash(name)]))
        yield Finding('image folder', path, detail)
    if not objects:
        return
    entries = Entries(content, classes, masks or 'segm' in scored, polygons)
    trains = path.startswith('train')
    for finding in entries.found:
        rule = finding.rule
        if rule == 'short polygon' and 'segm' in scored:
            # pycocotools takes 4 numbers for a box, and stops at fewer.
            rule = 'broken mask'
        yield replace(finding, rule=rule, file=str(ann_file))
    yield from entries.check_use(str(ann_file), trains, bool(scored))


def _check_classes(
    path: str, ann_file: Path, content: Content, classes: list[str]
) -> Iterator[Finding]:
    """Compare the categories of a file with the classes of the config.

    MMDetection numbers the labels in the order of the file, and drops without a word
    the boxes of every category that ``classes`` does not name.
    """
    names = [category['name'] for category in content.categories]
    found = [name for name in names if name in classes]
    if found == classes:
        return
    roots = content.roots()
    missing = [name for name in classes if name not in names]
    twice = [name for name in classes if names.count(name) > 1]
    if missing:
        problem = f'{", ".join(map(repr, missing))} not among its categories'
        names = [c['name'] for c in content.categories if c['id'] not in roots]
    elif twice:
        yield _twice(ann_file, content, twice[0])
        return
    else:
        problem = 'the order differs, so the labels would get the wrong names'
        names = found
    left_out = [c['name'] for c in content.categories if c['id'] in roots]
    if missing and left_out:
        problem += (
            f'. {", ".join(map(repr, left_out))} is the root that Roboflow adds, which '
            'no annotation has: leave it out'
        )
    yield Finding(
        'classes',
        f'{path}: metainfo.classes does not fit {ann_file}',
        f'{problem}. The file has, in this order: {tuple(names)}',
    )


def _twice(ann_file: Path, content: Content, name: str) -> Finding:
    """Two categories of one name, and how to become rid of one."""
    same = [c['id'] for c in content.categories if c['name'] == name]
    counts = [content.used[_key(number)] for number in same]
    detail = f'{name!r} is category ' + ' and '.join(
        f'{number!r} ({count} annotations)'
        for number, count in zip(same, counts, strict=True)
    )
    empty = [n for n, count in zip(same, counts, strict=True) if not count]
    if len(empty) == len(same) - 1:
        if empty[0] in content.roots():
            detail += f'; {empty[0]!r} is the root that Roboflow adds'
        command = (
            f"import json; p = {str(ann_file)!r}; c = json.load(open(p, 'rb')); "
            "c['categories'] = [i for i in c['categories'] "
            f"if i['id'] not in {empty}]; json.dump(c, open(p, 'w'))"
        )
        detail += f'. python -c "{command}" takes it out'
    return Finding('category twice', str(ann_file), detail)


class Entries:
    """What the images and annotations of a file say, one by one.

    Args:
        content (Content): Of the file.
        classes (list[str]): Those of the config.
        masks (bool): Whether masks are trained or evaluated.
        polygons (bool): Whether only those that are polygons. Defaults to False.

    Attributes:
        found (list[Finding]): What is wrong with single entries.
        usable (Counter): Objects that are trained or evaluated, by class.
        unused (Counter): The others, by the reason.
    """

    def __init__(
        self,
        content: Content,
        classes: list[str],
        masks: bool,
        polygons: bool = False,
    ) -> None:
        self.masks = masks
        self.polygons = polygons
        self.classes = classes
        self.names = {c['id']: c['name'] for c in content.categories}
        self.sizes: dict[Any, tuple[str, tuple[float, float] | None]] = {}
        self.usable: Counter[str] = Counter()
        self.unused: Counter[str] = Counter()
        self.found = [
            *repeated('image id', (i.get('id') for i in content.images)),
            *repeated('image', (i.get('file_name') for i in content.images)),
            *repeated('annotation id', (a.get('id') for a in content.annotations)),
            *repeated('category id', (c['id'] for c in content.categories)),
        ]
        for image in content.images:
            self._check_image(image)
        unknown: Counter[Any] = Counter()
        zero = text = 0
        wanted = set(classes)
        for annotation in content.annotations:
            try:
                reason = self._check_annotation(annotation, wanted, unknown)
            except (KeyError, TypeError, ValueError) as error:
                place = f'annotation {annotation.get("id")}'
                self.found.append(Finding('malformed entry', place, _reason(error)))
                reason = 'malformed'
            if reason is None:
                self.usable[self.names[annotation['category_id']]] += 1
            else:
                self.unused[reason] += 1
            number = annotation.get('id')
            zero += number == 0
            text += isinstance(number, str)
        for category, count in unknown.items():
            detail = f'{count} annotation(s)'
            if category in self.names:
                what = f'{self.names[category]} (id {category}), not among classes'
                self.found.append(Finding('unknown category', what, detail))
            else:
                what = f'category_id {category!r}, not among the categories'
                self.found.append(Finding('no such category', what, detail))
        if zero or text:
            what = 'annotation id 0' if zero else f'{text} annotation ids that are text'
            self.found.append(Finding('annotation id', what))

    def _check_image(self, image: dict) -> None:
        place = f'image {image.get("file_name", image.get("id"))}'
        try:
            name, number = image['file_name'], image['id']
            self.sizes[number] = str(name), None
            if not isinstance(name, str):
                raise ValueError(f'file_name is {name!r}: expected text')
            size = image['width'], image['height']
            if not all(isinstance(length, int | float) for length in size):
                raise ValueError(f'width and height are {size}: expected two numbers')
            self.sizes[number] = str(name), size
        except (KeyError, TypeError, ValueError) as error:
            self.found.append(Finding('malformed entry', place, _reason(error)))

    def _check_annotation(
        self, annotation: dict, wanted: set[str], unknown: Counter[Any]
    ) -> str | None:
        """Check one; give the reason why it is not used, or None.

        Raises:
            KeyError, TypeError, ValueError: If something lacks or is of another kind.
        """
        key, category = annotation['id'], annotation['category_id']
        image, size = self.sizes.get(annotation['image_id'], (None, None))
        box, area = annotation['bbox'], annotation['area']
        if not isinstance(key, int | float | str):
            raise ValueError(f'id {key!r}: expected a number')
        try:
            x, y, w, h = box
            finite = math.isfinite(x + y + w + h + area)
        except (OverflowError, TypeError, ValueError):
            finite = False
        if not finite:
            raise ValueError(f'bbox {box}, area {area}: expected 4 numbers and 1')
        crowd = annotation.get('iscrowd')
        if crowd not in (0, 1, None):
            raise ValueError(f'iscrowd {crowd!r}: expected 0 or 1')

        reason = None
        name = self.names.get(category)
        if name is None:
            unknown[category] += 1
            reason = 'of an unknown category'
        elif name not in wanted:
            unknown[category] += 1
            reason = 'of a category that metainfo.classes does not name'
        if image is None:
            number = annotation['image_id']
            detail = f'image_id {number!r}{self._twin(number)}'
            self.found.append(Finding('unknown image', f'annotation {key}', detail))
            return 'of an unknown image'
        place = f'annotation {key} of {image}'
        if w < 1 or h < 1 or area <= 0:
            detail = f'bbox {box}, area {area}'
            self.found.append(Finding('box without area', place, detail))
            reason = reason or 'without area'
        elif size is not None:
            width, height = size
            # Inverted, as a box that lies well inside is the rule.
            if not (
                x >= -MARGIN
                and y >= -MARGIN
                and x + w <= width + MARGIN
                and y + h <= height + MARGIN
            ):
                detail = f'bbox {box}, image {times(size)}'
                self.found.append(Finding('box outside the image', place, detail))
                if not (x < width and y < height and x + w > 0 and y + h > 0):
                    reason = reason or 'outside the image'
        if reason is None and (crowd or annotation.get('ignore')):
            reason = 'with iscrowd=1' if crowd else 'with "ignore"'
        if self.masks and reason in (None, 'with iscrowd=1'):
            mask = annotation.get('segmentation')
            if wrong := _wrong_mask(mask, size, place):
                self.found.append(wrong)
            elif reason is None and self.polygons and isinstance(mask, dict):
                detail = 'a run-length code, no polygons'
                self.found.append(Finding('run-length mask', place, detail))
                reason = 'with a run-length mask, which poly2mask=False leaves out'
        return reason

    def _twin(self, number: Any) -> str:
        """Whether an id is known as text instead of a number, or the other way."""
        keys = (k for k in self.sizes if str(k) == str(number))
        twin = next(keys, None) if isinstance(number, int | str) else None
        if twin is None:
            return ''
        return f'; the images have {twin!r}: both must be numbers'

    def check_use(self, ann_file: str, trains: bool, scored: bool) -> Iterator[Finding]:
        """Whether there is something to train on, of each class, or to score."""
        reasons = ', '.join(f'{n} {why}' for why, n in self.unused.most_common())
        if not self.usable:
            counts = 'can be trained on' if trains else 'counts'
            detail = f'none of its annotations {counts}: {reasons}'
            lacks: tuple[str, ...] = ()
            if not self.unused:  # photos of the background, or without labels
                detail, lacks = 'it has no annotations', tuple(self.classes)
            if trains:
                yield Finding('nothing to train on', ann_file, detail, lacks=lacks)
            elif self.unused or scored:
                yield Finding('nothing to score', ann_file, detail, lacks=lacks)
        if not self.usable or not trains:
            return
        named = [*self.names.values()]  # perhaps of lists
        lacks = tuple(c for c in self.classes if c in named and not self.usable[c])
        if lacks:
            detail = f'; annotations that are not used: {reasons}' if reasons else ''
            of = len(self.classes)
            yield Finding('class without objects', ann_file, detail, lacks=lacks, of=of)


def _reason(error: Exception) -> str:
    """What an entry lacks, or has of the wrong kind."""
    if isinstance(error, KeyError):
        return f'it has no {error}'
    if 'unhashable' in str(error):
        return 'an id is a list or a dict: expected a number'
    return str(error)


def _wrong_mask(
    mask: Any, size: tuple[float, float] | None, place: str
) -> Finding | None:
    """What is wrong with the mask of an object, if anything."""
    if not mask:
        return Finding('no mask', place, 'has no segmentation')
    if isinstance(mask, dict):
        shape, counts = mask.get('size'), mask.get('counts')
        detail = ''
        if not isinstance(counts, list | str) or len(shape or []) != 2:
            detail = 'a run-length code needs "counts" and "size"'
        elif size is not None and shape != [size[1], size[0]]:
            detail = f'its code is of {times(shape[::-1])}, not {times(size)}'
        return Finding('broken mask', place, detail) if detail else None
    if not isinstance(mask, list):
        detail = f'{str(mask)[:40]!r}: expected polygons, [[x1, y1, x2, y2, ...]]'
        return Finding('broken mask', place, detail)
    for polygon in mask:
        if not isinstance(polygon, list):
            detail = 'a flat list: expected a list of polygons, [[x1, y1, ...]]'
            return Finding('broken mask', place, detail)
        try:
            finite = math.isfinite(sum(polygon))
        except (TypeError, OverflowError):
            finite = False
        if not finite:
            detail = 'a polygon has something else than numbers'
            return Finding('broken mask', place, detail)
    for polygon in mask:
        if len(polygon) < 6 or len(polygon) % 2:
            detail = f'a polygon of {len(polygon)} numbers: expected 3 or more pairs'
            return Finding('short polygon', place, detail)
    for polygon in mask if size is not None else ():
        right, bottom = max(polygon[::2]), max(polygon[1::2])
        if (
            min(polygon) < -MARGIN
            or right > size[0] + MARGIN
            or bottom > size[1] + MARGIN
        ):
            detail = f'a polygon goes from {min(polygon[::2])}, {min(polygon[1::2])} '
            detail += f'to {right}, {bottom}; image {times(size)}'
            return Finding('mask outside the image', place, detail)
    return None


def check_coco(dataset: Any, cfg: Config) -> tuple[list[Finding], list[Files]]:
    """Give the images of a CocoDataset; the quick check has looked at the file."""
    path, folder = Path(dataset.ann_file), dataset.data_prefix.get('img')
    if not path.is_file() or folder is None:
        return [], []
    try:
        content = read(path)
    except NotCoco:
        return [], []
    entries = Entries(content, list(dataset.metainfo['classes']), masks=False)
    counts = ', '.join(f'{c} {entries.usable[c]}' for c in entries.classes)
    print(f'{path}: objects by class: {counts}', flush=True)
    return [], [
        Files(os.path.join(folder, name), size, note=backslash(name))
        for name, size in entries.sizes.values()
        if size is not None
    ]


def reads_polygons_alone(dataset: dict) -> bool:
    """Whether its pipeline loads masks that are polygons, and no run-length codes.

    MMDetection's LoadAnnotations takes the objects of the others for ignored ones.
    """
    return any(
        step.get('with_mask') and not step.get('poly2mask', True)
        for _, step in dicts(dataset.get('pipeline'))
    )


def loads_masks(cfg: Config, split: str) -> bool:
    """Whether a pipeline of a split loads masks."""
    loader = cfg.get(f'{split}_dataloader')
    return any(part.get('with_mask') for _, part in dicts(loader))
