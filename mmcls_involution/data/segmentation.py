"""Data sets that read like MMSegmentation's BaseSegDataset, CityscapesDataset."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from PIL import Image

from mmcls_involution.data.images import image_size, there, times, why_unread
from mmcls_involution.data.rules import Files, Finding

# Labels as Cityscapes' archives hold them; 34 classes, not the 19 that are trained.
LABEL_IDS, TRAIN_IDS = '_labelIds.png', '_labelTrainIds.png'
POLYGONS = '_polygons.json'
NO_SOURCE = 'nor what it is made from: unpack gtFine_trainvaltest.zip again'


# Label maps that are read before each run, spread over the data set.
SAMPLE = 32


@dataclass(frozen=True)
class Values:
    """What the values of label maps mean to a data set of a config.

    Args:
        classes (tuple[str, ...]): Names of the classes.
        meaning (dict[int, int | None]): The class of each value, None where it is
            ignored; others are wrong.
        reduced (bool): Whether the data set has ``reduce_zero_label``.
    """

    classes: tuple[str, ...]
    meaning: dict[int, int | None]
    reduced: bool

    def check_use(
        self, place: str, pixels: Counter[int], trains: bool, maps: int
    ) -> Iterator[Finding]:
        """Whether there are pixels of each class.

        Args:
            place (str): Where the label maps are.
            pixels (Counter): Number of pixels by value, in all of them.
            trains (bool): Whether they are trained on; otherwise one class may lack.
            maps (int): Their number.
        """
        seen = {self.meaning.get(value) for value in pixels} - {None}
        lacks = tuple(name for i, name in enumerate(self.classes) if i not in seen)
        of = len(self.classes)
        few = len(seen) < min(2, of)
        if not lacks or not maps or not (trains or few):
            return
        detail = f' in {maps} label maps'
        shares = [
            f'{value}{" (by reduce_zero_label)" if self.reduced and not value else ""}'
            f', {count / pixels.total():.1%} of all pixels'
            for value, count in sorted(pixels.items())
            if value in self.meaning and self.meaning[value] is None
        ]
        if shares:
            detail += f'; ignored is {" and ".join(shares)}'
        if few and trains:
            yield Finding('one class alone', place, detail, lacks=lacks, of=of)
        else:
            yield Finding('class without pixels', place, detail, lacks=lacks, of=of)


def label_values(dataset: Any, cfg: Config) -> Values:
    """What values on the disk mean to a BaseSegDataset of a config."""
    model = cfg.model.get('module', cfg.model)  # inside that of test --tta
    heads = model.decode_head
    heads = heads if isinstance(heads, list) else [heads]
    ignored = {head.get('ignore_index', 255) for head in heads}
    # The classes on the disk: of a label map some are ignored, or get other numbers.
    names = dataset.metainfo.get('classes')
    mapping = dataset.label_map
    number = len(mapping or names or range(heads[-1].num_classes))
    read = {value: value for value in range(number)}
    if mapping:
        read |= {old: new for old, new in mapping.items() if old in read}
    meaning: dict[int, int | None] = {
        value: None if new in ignored or not 0 <= new < number else new
        for value, new in read.items()
    }
    if dataset.reduce_zero_label:  # 0 is read as 255, n as n - 1
        meaning = {value + 1: new for value, new in meaning.items()} | {0: None}
        ignored = {255}
    meaning = dict.fromkeys(ignored) | meaning
    return Values(
        tuple(names or map(str, range(number))), meaning, dataset.reduce_zero_label
    )


def _samples(dataset: Any) -> list[dict]:
    """Images and label maps, of a data set that is not built in full."""
    images = Path(dataset.data_prefix.get('img_path') or '')
    return dataset.load_data_list() if images.is_dir() else []


def check_sample(dataset: Any, cfg: Config, path: str) -> Iterator[Finding]:
    """Read some label maps before a run; all, until a second class is found.

    Args:
        dataset (BaseSegDataset): Not built in full.
        cfg (Config): The whole config.
        path (str): Where in it the data set is.
    """
    samples = _samples(dataset)
    if not samples:
        yield from _no_image(dataset)
    pairs = [(s['img_path'], s['seg_map_path']) for s in samples if 'seg_map_path' in s]
    values = label_values(dataset, cfg)
    pixels: Counter[int] = Counter()
    step = max(1, len(pairs) // SAMPLE)
    order = [pair for start in range(step) for pair in pairs[start::step]]
    for count, (image, label) in enumerate(order):
        seen = {values.meaning.get(value) for value in pixels} - {None}
        if count >= SAMPLE and len(seen) > 1:
            return
        found, counts = check_label(label, image_size(image), values)
        yield from found
        if found:
            return
        pixels += counts
    place = str(dataset.data_prefix.get('seg_map_path'))
    yield from values.check_use(place, pixels, path.startswith('train'), len(pairs))


def _no_image(dataset: Any) -> Iterator[Finding]:
    """Say why a data set is empty: which folder, which pattern, what is there."""
    images = str(dataset.data_prefix.get('img_path'))
    if not Path(images).is_dir():
        return  # the quick check has said so
    if dataset.ann_file:
        yield Finding('no data', f'{dataset.ann_file} names no image')
        return
    detail = f'no file name ends in {dataset.img_suffix}{there(Path(images))}'
    yield Finding('no data', images, detail)


def check_segmentation(dataset: Any, cfg: Config) -> tuple[list[Finding], list[Files]]:
    """Give the images and label maps of a BaseSegDataset, and find lone ones."""
    samples = _samples(dataset)
    if not samples:
        return list(_no_image(dataset)), []
    values = label_values(dataset, cfg)
    files = [
        Files(
            sample['img_path'],
            label=sample.get('seg_map_path'),
            values=values,
        )
        for sample in samples
    ]
    found = []
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


def check_label(
    path: str, size: tuple[int, int] | None, values: Values
) -> tuple[list[Finding], Counter[int]]:
    """Check the label map of an image of ``size`` (None: not known).

    Returns:
        tuple: What is wrong with it, and its number of pixels by value.
    """
    nothing: Counter[int] = Counter()
    if not os.path.isfile(path):
        if not path.endswith(TRAIN_IDS):
            return [Finding('missing label', path, 'does not exist')], nothing
        stem = path.removesuffix(TRAIN_IDS)
        there = [end for end in (LABEL_IDS, POLYGONS) if os.path.isfile(stem + end)]
        detail = f'there is {" and ".join(there)}' if there else NO_SOURCE
        return [Finding('missing labelTrainIds', path, detail)], nothing
    try:
        # As MMSegmentation's LoadAnnotations reads it: palette images give indices.
        with Image.open(path) as file:
            label = np.array(file).squeeze()
    except Exception as error:  # Pillow raises whatever a broken file leads to
        detail = why_unread(error, str(error))
        return [Finding('undecodable label', path, detail)], nothing
    if label.ndim != 2:
        detail = f'has the shape {label.shape}: expected one channel of class numbers'
        return [Finding('undecodable label', path, detail)], nothing
    found = []
    if size is not None and label.shape != size[::-1]:
        detail = f'is {times(label.shape[::-1])}, its image {times(size)}'
        found.append(Finding('label size', path, detail))
    present, numbers = np.unique(label, return_counts=True)
    counts = Counter(dict(zip(present.tolist(), numbers.tolist(), strict=True)))
    wrong = {
        value: count for value, count in counts.items() if value not in values.meaning
    }
    if wrong:
        detail = f'has {", ".join(map(str, wrong))} ({sum(wrong.values())} pixels)'
        if path.endswith(LABEL_IDS):
            detail += '; training needs its labelTrainIds'
        elif set(counts) <= {0, 255}:
            detail += '; a class of 255 must be written as 1'
        found.append(Finding('label value', path, detail))
    return found, counts
