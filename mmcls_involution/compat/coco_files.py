"""Read COCO annotation files as they are meant."""

from __future__ import annotations

import importlib.util
import json
from collections import defaultdict
from pathlib import Path
from typing import Any


def read_coco_as_meant() -> None:
    """Let pycocotools take what annotation tools leave out or write differently.

    - A byte order mark, and UTF-8 in any locale.
    - ``iscrowd`` missing or null is 0; evaluation ends in a KeyError otherwise.
    - An annotation id of 0, or of text, gets a number of its own: evaluation marks the
      object that a prediction matches by its id, and takes 0 for none. Perfect
      predictions score less than 1 otherwise.

    Answers https://github.com/cocodataset/cocoapi/issues/507. Does nothing the second
    time, nor without pycocotools; files that need none of this are read as before.
    """
    if importlib.util.find_spec('pycocotools') is None:
        return
    from pycocotools.coco import COCO

    if COCO.__init__ is _init:
        return
    COCO.__init__ = _init
    stock = COCO.createIndex

    def create_index(self: Any) -> None:
        _complete(self.dataset.get('annotations') or [])
        stock(self)

    COCO.createIndex = create_index


def _init(self: Any, annotation_file: str | None = None) -> None:
    """An index of the file; an empty one without.

    Raises:
        ValueError: If the file is no JSON, or holds something else than a dict.
    """
    self.dataset, self.anns, self.cats, self.imgs = {}, {}, {}, {}
    self.imgToAnns, self.catToImgs = defaultdict(list), defaultdict(list)
    if annotation_file is None:
        return
    # As bytes: so json finds the encoding.
    self.dataset = json.loads(Path(annotation_file).read_bytes())
    if not isinstance(self.dataset, dict):
        raise ValueError(f'{annotation_file} is not a COCO annotation file')
    self.createIndex()


def _complete(annotations: list[dict]) -> None:
    """Set what is left out, in place."""
    lost = []
    for annotation in annotations:
        if annotation.get('iscrowd') is None:
            annotation['iscrowd'] = 0
        number = annotation.get('id')
        if number == 0 or isinstance(number, str):
            lost.append(annotation)
    if not lost:
        return
    used = (a.get('id') for a in annotations)
    start = max((number for number in used if isinstance(number, int)), default=0)
    renamed: dict[Any, int] = {}  # what occurs twice still does, and is refused
    for annotation in lost:
        new = max(start, 0) + len(renamed) + 1
        annotation['id'] = renamed.setdefault(annotation['id'], new)
