"""Look through the data of a config for what would stop or spoil its training.

    python tools/dataset_converters/check_dataset.py CONFIG [--split train val test]

reads every image and every label of the config's data sets, in all processor cores,
and lists what is wrong with them, a line per finding. The exit code is 1 if there is
anything. It knows the data sets that read like MMDetection's CocoDataset,
MMSegmentation's BaseSegDataset (CityscapesDataset) or MMPretrain's CustomDataset
(ImageNet). See docs/datasets.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from converter_utils import read_image
from mmengine.config import Config
from mmengine.registry import DATASETS
from PIL import Image
from rich.progress import track

sys.path.append(str(Path(__file__).parents[1]))

import preflight
from preflight import UserError

from mmcls_involution import compat

SHOWN = 10  # findings per kind in the report
# Pixels that a box may exceed its image: annotation tools round, and count from 0 or 1.
MARGIN = 1

# Every kind of finding, in the order of the report, and what to do about it.
KINDS = {
    'config': 'the config and its files do not fit; set right the one that is wrong',
    'malformed entry': 'the annotation file must give it in its format; write it anew',
    'missing image': 'get it again, or take it out of the annotations',
    'undecodable image': 'damaged: get it again',
    'image size': 'the annotations are of another image, or it was resized or turned',
    'duplicate': 'must be unique: training stops, or the later one hides the first',
    'unknown image': 'the annotation belongs to no image and is not used',
    'unknown category': 'its boxes are not used; set metainfo.classes to name it',
    'box without area': 'not used in training; draw it again, or take it out',
    'box outside the image': 'cut off in training; the box or the size is wrong',
    'no mask': 'the config trains masks, and training stops here; draw it',
    'missing label': 'training stops here; get it again, or take the image away',
    'missing labelTrainIds': (
        'make them: pip install cityscapesscripts; python $(python -c "import mmseg; '
        'print(mmseg.__path__[0])")/.mim/tools/dataset_converters/cityscapes.py '
        'data/cityscapes --nproc 8'
    ),
    'undecodable label': 'damaged, or no label map: get it again',
    'label size': 'the label is of another image, or one of them was resized',
    'label value': 'number the classes from 0 to their number - 1; 255 is ignored',
    'empty class folder': 'a class without images; get them again, or merge classes',
}
# Labels as Cityscapes' archives hold them; 34 classes, not the 19 that are trained.
LABEL_IDS, TRAIN_IDS = '_labelIds.png', '_labelTrainIds.png'
POLYGONS = '_polygons.json'
NO_SOURCE = 'nor what it is made from: unpack gtFine_trainvaltest.zip again'


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: a key of KINDS, where, and what exactly."""

    kind: str
    place: str
    detail: str = ''

    def __str__(self) -> str:
        return f'{self.place}: {self.detail}' if self.detail else self.place


@dataclass(frozen=True)
class Files:
    """An image, and what the annotations say about it.

    Args:
        image (str): Path.
        size (tuple[int, int], optional): Width and height in pixels.
        label (str, optional): Path of its segmentation map.
        values (frozenset[int], optional): The values that the map may have.
    """

    image: str
    size: tuple[int, int] | None = None
    label: str | None = None
    values: frozenset[int] | None = None


Findings = list[Finding]

# ---------------------------------------------------------------- images and label maps


def check_files(files: Files) -> Findings:
    """Decode an image and its label map in full, and compare them."""
    found: Findings = []
    size = None
    try:
        height, width = read_image(Path(files.image)).shape[:2]
        if int(cv2.__version__.split('.')[0]) < 5:
            # It may fill up a JPEG that is cut short. Pillow never does.
            with Image.open(files.image) as file:
                file.load()
    except FileNotFoundError:
        found.append(Finding('missing image', files.image))
    except (OSError, ValueError, cv2.error):
        found.append(Finding('undecodable image', files.image))
    else:
        size = width, height
        if files.size not in (None, size):
            detail = f'is {_times(size)}, its annotations say {_times(files.size)}'
            if files.size == size[::-1]:
                detail += ' (turned by its EXIF orientation?)'
            found.append(Finding('image size', files.image, detail))
    if files.label is not None:
        found += _check_label(files.label, size, files.values)
    return found


def _times(size: tuple[int, int]) -> str:
    return f'{size[0]}x{size[1]}'


def _check_label(
    path: str, size: tuple[int, int] | None, values: frozenset[int]
) -> Findings:
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
        detail = f'is {_times(label.shape[::-1])}, its image {_times(size)}'
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


# ------------------------------------------------------------------ the three libraries


def check_coco(dataset: Any, cfg: Config) -> tuple[Findings, list[Files]]:
    """Check the annotation file of a CocoDataset; give its images."""
    path = Path(dataset.ann_file)
    if not path.is_file():
        return [], []  # the check of the config has said so
    try:
        coco = json.loads(path.read_bytes())
        images, categories = coco['images'], coco['categories']
        annotations = coco.get('annotations', [])
        names = {category['id']: category['name'] for category in categories}
        if not all(isinstance(item, dict) for item in [*images, *annotations]):
            raise TypeError('an image or annotation is no dict')
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return [Finding('malformed entry', str(path), repr(error))], []

    found = [
        *_repeated('image id', (i.get('id') for i in images)),
        *_repeated('image', (i.get('file_name') for i in images)),
        *_repeated('annotation id', (a.get('id') for a in annotations)),
        *_repeated('category id', (c['id'] for c in categories)),
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


def _repeated(what: str, items: Iterable[Any]) -> Iterator[Finding]:
    for item, count in Counter(map(repr, items)).items():
        if count > 1:
            yield Finding('duplicate', f'{what} {item}', f'{count} times')


def _check_box(
    place: str, box: list[float], area: float, size: tuple[int, int] | None
) -> Findings:
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
        detail = f'bbox {box}' + (f', image {_times(size)}' if size else '')
        return [Finding('box outside the image', place, detail)]
    return []


def _trains_masks(cfg: Config) -> bool:
    loader = cfg.get('train_dataloader') or {}
    return any(part.get('with_mask') for _, part in preflight.dicts(loader))


def check_segmentation(dataset: Any, cfg: Config) -> tuple[Findings, list[Files]]:
    """Give the images and label maps of a BaseSegDataset, and find lone ones."""
    images = Path(dataset.data_prefix.get('img_path') or '')
    if not images.is_dir():
        return [], []  # the check of the config has said so
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


def check_classification(dataset: Any, cfg: Config) -> tuple[Findings, list[Files]]:
    """Give the images of a CustomDataset, and check its folders or its list."""
    root = Path(dataset.img_prefix)
    classes = dataset.CLASSES
    number = len(classes) if classes else cfg.model.get('head', {}).get('num_classes')
    if dataset.ann_file:
        return _check_list(dataset, root, number)
    if not root.is_dir():
        if not Path(dataset.data_root).is_dir():
            return [], []  # the check of the config has said so
        detail = 'does not exist; docs/datasets.md says how it is made'
        return [Finding('config', str(root), detail)], []
    from mmpretrain.datasets.custom import find_folders, get_samples

    if not dataset.with_label:
        names, _ = get_samples(str(root), None, dataset.is_valid_file)
        return [], [Files(str(root / name)) for name in names]
    folders, indices = find_folders(str(root))
    samples, empty = get_samples(str(root), indices, dataset.is_valid_file)
    found = [Finding('empty class folder', str(root / name)) for name in sorted(empty)]
    if number is not None and len(folders) != number:
        detail = f'holds {len(folders)} folders: expected one per class, {number}'
        found.append(Finding('config', str(root), detail))
    elif classes and set(folders) == set(classes) and folders != list(classes):
        detail = (
            f'the labels get the wrong names: folders count in alphabetical order, '
            f'so metainfo.classes must be {tuple(folders)}'
        )
        found.append(Finding('config', str(root), detail))
    return found, [Files(str(root / name)) for name, _ in samples]


def _check_list(
    dataset: Any, root: Path, number: int | None
) -> tuple[Findings, list[Files]]:
    """Check a list of file names and labels, as in ImageNet's meta/val.txt."""
    path = Path(dataset.ann_file)
    if not path.is_file():
        return [], []  # the check of the config has said so
    found, names = [], []
    for count, line in enumerate(path.read_text().splitlines(), 1):
        name, _, label = line.strip().rpartition(' ')
        place = f'{path}:{count}'
        if not dataset.with_label:
            name = line.strip()
        elif not name or not label.isdigit():
            detail = f'{line!r}: expected a file name and a number'
            found.append(Finding('malformed entry', place, detail))
            continue
        elif number is not None and int(label) >= number:
            detail = f'label {label}: expected 0 to {number - 1}'
            found.append(Finding('label value', place, detail))
        names.append(name)
    found += _repeated('image', names)
    return found, [Files(str(root / name)) for name in names]


def checker(kind: type) -> Any:
    """The function for a class of data sets.

    Raises:
        UserError: If the class reads its data in a way of its own.
    """
    if preflight.loads_as_coco(kind):
        return check_coco
    families = dict(
        BaseSegDataset=check_segmentation, CustomDataset=check_classification
    )
    for base in kind.__mro__:
        if 'load_data_list' in vars(base) and base.__name__ in families:
            return families[base.__name__]
        if 'load_data_list' in vars(base):
            break
    raise UserError(
        f'{kind.__name__} reads its data in a way that check_dataset does not know: '
        'expected one that reads like CocoDataset, BaseSegDataset or CustomDataset'
    )


# ---------------------------------------------------------------------------- the whole


def data_sets(cfg: Config, split: str) -> list[tuple[str, dict]]:
    """The data sets of a split, without the wrappers around them."""
    name = f'{split}_dataloader'
    return [
        (path, part)
        for path, part in preflight.dicts(cfg.get(name), name)
        if {'ann_file', 'data_root', 'data_prefix'} & set(part)
    ]


def check_data_set(cfg: Config, path: str, part: dict, workers: int) -> Findings:
    """Check one data set of a config, its config first.

    Args:
        cfg (Config): The whole config.
        path (str): Where in it the data set is.
        part (dict): The data set's config.
        workers (int): Processes that decode images.

    Raises:
        UserError: If it cannot be checked at all.
    """
    if not preflight.is_local(part, 'any'):
        raise UserError(f'{path}: check_dataset reads local files, not backend_args')
    check = checker(preflight.registered(DATASETS, part.get('type')))
    found = []
    try:
        preflight.check_dataset(cfg, path, part)
    except UserError as error:
        found.append(Finding('config', str(error)))
    # Read nothing yet, and build no transforms.
    dataset = DATASETS.build({**part, 'pipeline': [], 'lazy_init': True})
    more, files = check(dataset, cfg)
    print(f'{path}: {len(files)} images', flush=True)
    if not found and not more and not files:
        more = [Finding('config', path, 'the data set holds no image')]
    return found + more + list(_decode(files, workers))


def _decode(files: list[Files], workers: int) -> Iterator[Finding]:
    """Check images and label maps in ``workers`` processes, under a progress bar."""
    show = partial(track, description='decoding', total=len(files))
    # More processes than chunks of work would start for nothing.
    workers = min(workers, math.ceil(len(files) / 16))
    if not files:
        return
    if workers <= 1:
        for found in show(map(check_files, files)):
            yield from found
        return
    pool = ProcessPoolExecutor(workers, initializer=_start_worker)
    try:
        chunk = max(1, min(64, len(files) // (8 * workers)))
        for found in show(pool.map(check_files, files, chunksize=chunk)):
            yield from found
    except BrokenProcessPool as error:
        raise UserError(
            'a worker process was ended from outside, most likely for want of memory: '
            'try --workers 1'
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _start_worker() -> None:
    """One thread per process; the decoders' own words, and Ctrl-C, go nowhere."""
    cv2.setNumThreads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def report(found: Findings) -> None:
    """Print findings grouped by kind, the first of each."""
    groups = defaultdict(list)
    for finding in found:
        groups[finding.kind].append(finding)
    for kind in sorted(groups, key=list(KINDS).index):
        group = groups[kind]
        print(f'  {kind}: {len(group)} ({KINDS[kind]})')
        for finding in group[:SHOWN]:
            print(f'    {finding}')
        if len(group) > SHOWN:
            print(f'    ... and {len(group) - SHOWN} more')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--split',
        nargs='+',
        choices=('train', 'val', 'test'),
        help='what to check (default: all that the config has)',
    )
    parser.add_argument(
        '--out', type=Path, help='write all findings to this file, a line each'
    )
    parser.add_argument(
        '--workers',
        type=int,
        default=os.cpu_count(),
        help='processes that decode images (default: the number of cores)',
    )
    preflight.add_cfg_options(parser)
    return parser.parse_args()


def check(args: argparse.Namespace) -> int:
    """Check the splits of a config and print the report.

    Returns:
        int: Number of findings.
    """
    if args.out and (args.out.is_dir() or not args.out.parent.is_dir()):
        raise UserError(f'--out {args.out}: name a file in a folder that exists')
    cfg = preflight.read_config(args.config, args.cfg_options)
    splits = args.split or [
        split for split in ('train', 'val', 'test') if cfg.get(f'{split}_dataloader')
    ]
    lines, seen = [], {}
    for split in splits:
        parts = data_sets(cfg, split)
        if not parts:
            raise UserError(f'{args.config} has no data set in {split}_dataloader')
        for path, part in parts:
            content = str({k: v for k, v in part.items() if k != 'pipeline'})
            if content in seen:
                print(f'{path}: the same as {seen[content]}')
                continue
            seen[content] = path
            found = check_data_set(cfg, path, part, args.workers)
            report(found)
            lines += [f'{split}\t{f.kind}\t{f.place}\t{f.detail}' for f in found]
    if args.out:
        args.out.write_text(''.join(f'{line}\n' for line in lines))
    where = f', listed in {args.out}' if args.out and lines else ''
    print(f'Findings: {len(lines) or "none"}{where}')
    return len(lines)


def main() -> None:
    args = parse_args()
    compat.apply()
    with preflight.one_message_per_error():
        try:
            number = check(args)
        except KeyboardInterrupt:
            sys.exit('Interrupted: the check is not complete')
    sys.exit(1 if number else 0)


if __name__ == '__main__':
    main()
