"""Data sets that read like MMPretrain's CustomDataset, ImageNet: folders or a list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmcls_involution.data.rules import Files, Finding, repeated


def check_classification(
    dataset: Any, cfg: Config
) -> tuple[list[Finding], list[Files]]:
    """Give the images of a CustomDataset, and check its folders or its list."""
    root = Path(dataset.img_prefix)
    classes = dataset.CLASSES
    number = len(classes) if classes else cfg.model.get('head', {}).get('num_classes')
    if dataset.ann_file:
        return _check_list(dataset, root, number)
    if not root.is_dir():
        if not Path(dataset.data_root).is_dir():
            return [], []  # the quick check has said so
        detail = 'does not exist; docs/datasets.md says how it is made'
        return [Finding('missing path', str(root), detail)], []
    from mmpretrain.datasets.custom import find_folders, get_samples

    if not dataset.with_label:
        names, _ = get_samples(str(root), None, dataset.is_valid_file)
        return [], [Files(str(root / name)) for name in names]
    folders, indices = find_folders(str(root))
    samples, empty = get_samples(str(root), indices, dataset.is_valid_file)
    found = [Finding('empty class folder', str(root / name)) for name in sorted(empty)]
    if number is not None and len(folders) != number:
        detail = f'holds {len(folders)} folders: expected one per class, {number}'
        found.append(Finding('number of classes', str(root), detail))
    elif classes and set(folders) == set(classes) and folders != list(classes):
        detail = (
            f'the labels get the wrong names: folders count in alphabetical order, '
            f'so metainfo.classes must be {tuple(folders)}'
        )
        found.append(Finding('classes', str(root), detail))
    return found, [Files(str(root / name)) for name, _ in samples]


def _check_list(
    dataset: Any, root: Path, number: int | None
) -> tuple[list[Finding], list[Files]]:
    """Check a list of file names and labels, as in ImageNet's meta/val.txt."""
    path = Path(dataset.ann_file)
    if not path.is_file():
        return [], []  # the quick check has said so
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
    found += repeated('image', names)
    return found, [Files(str(root / name)) for name in names]
