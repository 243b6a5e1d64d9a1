"""Turn the blood-cell data set BCCD from VOC into COCO format.

Input: a checkout of GitHub's Shenggan/BCCD_Dataset (MIT licence), its folder
BCCD, or the zip file GitHub makes of it. Output, what configs/bccd/ reads:

    data/bccd/images/*.jpg
    data/bccd/annotations/{train,val,test}.json

Example:
    python tools/dataset_converters/bccd.py BCCD_Dataset --out data/bccd
"""

from __future__ import annotations

import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

from converter_utils import (
    CocoSplit,
    open_download,
    run_converter,
    staged_output,
)
from rich.progress import track

from mmcls_involution.data.images import read_image

CLASSES = ('RBC', 'WBC', 'Platelets')
SPLITS = ('train', 'val', 'test')
SOURCE = 'a checkout or zip of GitHub Shenggan/BCCD_Dataset, or its BCCD/'


def read_split(root: Path, split: str) -> list[str]:
    """Read the sorted image names (without suffix) of a split.

    Raises:
        FileNotFoundError: If the list is missing.
        ValueError: If it is empty or names an image twice.
    """
    path = root / 'ImageSets' / 'Main' / f'{split}.txt'
    if not path.is_file():
        raise FileNotFoundError(f'{path} is missing: expected {SOURCE}')
    names = path.read_text().split()
    if not names:
        raise ValueError(f'{path} is empty: the {split} split has no image')
    if len(set(names)) < len(names):
        raise ValueError(f'{path} names an image more than once')
    return sorted(names)


def read_boxes(path: Path, width: int, height: int) -> list[tuple[str, list[float]]]:
    """Read the class and box [x, y, w, h] (pixels) of every object in a VOC file.

    Boxes without area are kept, for the caller to report.

    Args:
        path (Path): VOC annotation file.
        width (int): Width of the image, in pixels.
        height (int): Height of the image, in pixels.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not VOC, is of another image size, or has an
            unknown class or a box outside of the image.
    """
    if not path.is_file():
        raise FileNotFoundError(f'annotation {path} is missing')
    try:
        tree = ET.parse(path)
        size = [int(tree.find(f'size/{k}').text) for k in ('width', 'height')]
        boxes = [
            (
                node.find('name').text,
                [
                    float(node.find(f'bndbox/{k}').text)
                    for k in ('xmin', 'ymin', 'xmax', 'ymax')
                ],
            )
            for node in tree.iter('object')
        ]
    except (ET.ParseError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f'annotation {path} is not a VOC detection file ({error})'
        ) from error
    if size != [width, height]:
        raise ValueError(
            f'annotation {path} is for a {size[0]}x{size[1]} image, but the '
            f'image is {width}x{height}'
        )
    for name, (x1, y1, x2, y2) in boxes:
        if name not in CLASSES:
            raise ValueError(
                f'annotation {path} has the unknown class {name!r}: expected '
                f'one of {", ".join(CLASSES)}'
            )
        if min(x1, y1) < 0 or x2 > width or y2 > height:
            raise ValueError(
                f'annotation {path} has the box ({x1:g}, {y1:g}, {x2:g}, {y2:g}) '
                f'outside of its {width}x{height} image'
            )
    return [(name, [x1, y1, x2 - x1, y2 - y1]) for name, (x1, y1, x2, y2) in boxes]


def convert(src: Path, out: Path) -> None:
    """Convert the download ``src`` into the data set ``out``.

    Raises:
        OSError, ValueError: If the input is not what it should be; ``out`` is
            then left as it was.
    """
    folders = ('Annotations', 'JPEGImages', 'ImageSets')
    with (
        open_download(src, folders, SOURCE) as root,
        staged_output(out, ('images', 'annotations')) as staging,
    ):
        (staging / 'images').mkdir()
        splits = {split: read_split(root, split) for split in SPLITS}
        seen: dict[str, str] = {}
        for split, names in splits.items():
            coco, dropped = CocoSplit(CLASSES), []
            for name in track(names, split):
                if name in seen:
                    raise ValueError(
                        f'image {name} is in both the {seen[name]} and the '
                        f'{split} split'
                    )
                seen[name] = split
                source = root / 'JPEGImages' / f'{name}.jpg'
                height, width = read_image(source).shape[:2]
                coco.add_image(source.name, width, height)
                xml = root / 'Annotations' / f'{name}.xml'
                for cls, box in read_boxes(xml, width, height):
                    if min(box[2:]) <= 0:
                        dropped.append(f'{cls} in {xml.name}: x, y, w, h = {box}')
                    else:
                        coco.annotate(cls, box, box[2] * box[3])
                shutil.copyfile(source, staging / 'images' / source.name)
            coco.write(staging / 'annotations' / f'{split}.json')
            print(f'{len(coco.images)} images, {len(coco.annotations)} boxes')
            for box in dropped:
                print(f'dropped a box without area: {box}')
    print(f'Data set is in {out}')


if __name__ == '__main__':
    run_converter(convert, __doc__, 'data/bccd')
