"""Cut the cells of BCCD into a small classification data set.

Input: the output of bccd.py. Output, what configs/bccd_cells/ reads: one
square crop per box, as long as the box's longer side, in a folder per class:

    data/bccd_cells/{train,val,test}/{RBC,WBC,Platelets}/*.jpg

Example:
    python tools/dataset_converters/bccd_cells.py data/bccd --out data/bccd_cells
"""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from bccd import CLASSES, SPLITS
from converter_utils import (
    open_download,
    run_converter,
    staged_output,
    write_image,
)
from rich.progress import track

from mmcls_involution.data import coco
from mmcls_involution.data.images import read_image

SOURCE = 'the output of tools/dataset_converters/bccd.py'


def square_crop(image: np.ndarray, box: list[float]) -> np.ndarray:
    """Cut a square around a box, moved to lie inside of the image.

    Args:
        image (np.ndarray): [H, W, 3].
        box (list[float]): x, y, w, h, in pixels.

    Returns:
        np.ndarray: [S, S, 3] with S the longer side of the box, or the shorter
        side of the image if that is less.
    """
    x, y, w, h = box
    height, width = image.shape[:2]
    side = min(max(1, round(max(w, h))), height, width)
    left = min(max(0, round(x + (w - side) / 2)), width - side)
    top = min(max(0, round(y + (h - side) / 2)), height - side)
    return image[top : top + side, left : left + side]


def read_split(path: Path) -> tuple[list[dict], dict[int, list], dict[int, str]]:
    """Images, their annotations and the classes of an annotation file of bccd.py.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not COCO, has no box, or has an unknown class.
    """
    if not path.is_file():
        raise FileNotFoundError(f'{path} is missing: expected {SOURCE}')
    try:
        content = coco.read(path)
    except coco.NotCoco as error:
        raise ValueError(f'{error}: expected {SOURCE}') from error
    classes = {category['id']: category['name'] for category in content.categories}
    boxes = defaultdict(list)
    for annotation in content.annotations:
        boxes[annotation.get('image_id')].append(annotation)
    used = {annotation.get('category_id') for annotation in content.annotations}
    unknown = sorted(set(classes.values()) - set(CLASSES))
    unknown += [f'category_id {i}' for i in sorted(used - set(classes), key=str)]
    if unknown:
        raise ValueError(
            f'{path} has the unknown class(es) {", ".join(unknown)}: '
            f'expected {", ".join(CLASSES)}'
        )
    if not content.annotations:
        raise ValueError(f'{path} is empty: it has no box')
    return content.images, boxes, classes


def convert(src: Path, out: Path) -> None:
    """Cut the boxes of the data set ``src`` into the data set ``out``.

    Raises:
        OSError, ValueError: If the input is not what it should be; ``out`` is
            then left as it was.
    """
    with (
        open_download(src, ('images', 'annotations'), SOURCE) as root,
        staged_output(out, SPLITS) as staging,
    ):
        splits = {
            split: read_split(root / 'annotations' / f'{split}.json')
            for split in SPLITS
        }
        for split, (images, boxes, classes) in splits.items():
            counts: Counter[str] = Counter()
            for info in track(images, split):
                path = root / 'images' / info['file_name']
                image = read_image(path)
                for annotation in boxes[info['id']]:
                    cls = classes[annotation['category_id']]
                    name = f'{path.stem}_{annotation["id"]}.jpg'
                    crop = square_crop(image, annotation['bbox'])
                    write_image(staging / split / cls / name, crop)
                    counts[cls] += 1
            absent = set(CLASSES) - set(counts)
            if absent:
                raise ValueError(
                    f'the {split} split of {src} has no {", ".join(sorted(absent))}'
                )
            print(', '.join(f'{counts[cls]} {cls}' for cls in CLASSES))
    print(f'Data set is in {out}')


if __name__ == '__main__':
    run_converter(convert, __doc__, 'data/bccd_cells')
