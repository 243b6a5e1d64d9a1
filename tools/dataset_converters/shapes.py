"""Draw a small instance-segmentation data set of shapes, in COCO format.

Circles, squares, triangles and stars of any colour and size, somewhat tilted,
lie over one another on a blurred, noisy ground. Nothing is read or downloaded; the same
seed draws the same images. Output, what configs/demo/ reads:

    data/shapes/images/{train,val}_*.jpg        256x256
    data/shapes/annotations/{train,val}.json    boxes and masks of what is visible

Example:
    python tools/dataset_converters/shapes.py --out data/shapes
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
from converter_utils import CocoSplit, staged_output, write_image
from pycocotools import mask as mask_utils
from rich.progress import track

CLASSES = ('circle', 'square', 'triangle', 'star')
SPLIT_SIZES = {'train': 400, 'val': 50}
IMAGE_SIZE = 256  # pixels
MAX_TILT = np.pi / 8
MIN_VISIBLE = 0.5  # of a shape's area, after all others are drawn


def outline(cls: str, radius: float, angle: float) -> np.ndarray:
    """Corner points [P, 2] (x to the right, y down) of a shape around the origin.

    Args:
        cls (str): One of :data:`CLASSES`.
        radius (float): Distance of the outer corners from the centre.
        angle (float): Rotation from the upright position, in radians.
    """
    corners = {'circle': 90, 'square': 4, 'triangle': 3, 'star': 10}[cls]
    upright = {'square': np.pi / 4}.get(cls, -np.pi / 2)
    angles = upright + angle + np.arange(corners) * 2 * np.pi / corners
    radii = np.full(corners, float(radius))
    if cls == 'star':
        radii[1::2] *= 0.45
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def coverage(points: np.ndarray) -> np.ndarray:
    """Share [S, S] of every pixel that the polygon ``points`` covers."""
    canvas = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    fraction_bits = 4
    corners = np.round(points * 2**fraction_bits).astype(np.int32)
    cv2.fillPoly(canvas, [corners], 255, cv2.LINE_AA, fraction_bits)
    return canvas / 255


def draw_ground(rng: np.random.Generator) -> np.ndarray:
    """Draw a ground [S, S, 3] of blurred, muted colours, about 0 to 255, float."""
    blots = rng.uniform(50, 205, (4, 4, 1)) + rng.uniform(-35, 35, (4, 4, 3))
    shape = (IMAGE_SIZE, IMAGE_SIZE)
    return cv2.resize(blots, shape, interpolation=cv2.INTER_CUBIC)


def draw_scene(
    rng: np.random.Generator,
) -> tuple[np.ndarray, list[tuple[str, np.ndarray]]]:
    """Draw two to five shapes.

    Args:
        rng (np.random.Generator): Decides everything about the scene.

    Returns:
        tuple: The image [S, S, 3], BGR, uint8, and the class and the visible
        mask [S, S], bool, of every shape.
    """
    image = draw_ground(rng)
    shapes: list[tuple[str, np.ndarray]] = []
    areas: list[int] = []
    wanted = rng.integers(2, 6)
    for _ in range(50):  # placements tried; some would hide what is there
        if len(shapes) == wanted:
            break
        cls = CLASSES[rng.integers(len(CLASSES))]
        radius = rng.uniform(24, 60)
        centre = rng.uniform(0.6 * radius, IMAGE_SIZE - 0.6 * radius, 2)
        share = coverage(
            centre + outline(cls, radius, rng.uniform(-MAX_TILT, MAX_TILT))
        )
        mask = share > 0.5
        left = [(old & ~mask).sum() for _, old in shapes]
        if any(n < MIN_VISIBLE * area for n, area in zip(left, areas, strict=True)):
            continue
        # a colour that stands out from the ground under it
        while True:
            colour = rng.uniform(0, 255, 3)
            if np.abs(colour - image[mask].mean(axis=0)).sum() > 180:
                break
        share = share[..., None]
        image = image * (1 - share) + colour * share
        shapes = [(c, old & ~mask) for c, old in shapes] + [(cls, mask)]
        areas.append(mask.sum())
    image += rng.normal(0, rng.uniform(2, 14), image.shape)
    return image.clip(0, 255).astype(np.uint8), shapes


def generate(
    out: Path, split_sizes: Mapping[str, int] = SPLIT_SIZES, seed: int = 0
) -> None:
    """Draw the data set into the folder ``out``.

    Args:
        out (Path): Folder of the data set.
        split_sizes (Mapping[str, int]): Number of images of each split.
            Defaults to :data:`SPLIT_SIZES`.
        seed (int): Every image depends on it, its split and its number alone.
            Defaults to 0.

    Raises:
        OSError: If ``out`` holds other things or cannot be written.
    """
    with staged_output(out, ('images', 'annotations')) as staging:
        for split_id, (split, size) in enumerate(split_sizes.items()):
            coco = CocoSplit(CLASSES)
            for number in track(range(size), f'Drawing {split} images'):
                rng = np.random.default_rng([seed, split_id, number])
                image, shapes = draw_scene(rng)
                name = f'{split}_{number:04d}.jpg'
                write_image(staging / 'images' / name, image)
                coco.add_image(name, IMAGE_SIZE, IMAGE_SIZE)
                for cls, mask in shapes:
                    rle = mask_utils.encode(np.asfortranarray(mask, np.uint8))
                    coco.annotate(
                        cls,
                        mask_utils.toBbox(rle).tolist(),
                        int(mask_utils.area(rle)),
                        segmentation=dict(
                            size=rle['size'], counts=rle['counts'].decode()
                        ),
                    )
            coco.write(staging / 'annotations' / f'{split}.json')
    print(f'Data set is in {out}')


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('data/shapes'),
        help='folder of the data set to write (default: %(default)s)',
    )
    parser.add_argument(
        '--seed', type=int, default=0, help='of the drawing (default: %(default)s)'
    )
    args = parser.parse_args()
    try:
        generate(args.out, seed=args.seed)
    except (OSError, ValueError) as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main()
