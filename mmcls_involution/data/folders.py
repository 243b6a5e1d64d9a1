"""Data sets that read like MMPretrain's CustomDataset, ImageNet: folders or a list."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmcls_involution.data.images import backslash, there
from mmcls_involution.data.rules import Files, Finding, repeated


def check_quickly(dataset: Any, cfg: Config) -> Iterator[Finding]:
    """Check the class folders of a CustomDataset, or the lines of its list.

    Args:
        dataset (CustomDataset): Not built in full.
        cfg (Config): The whole config.
    """
    root, number = Path(dataset.img_prefix), _number(dataset, cfg)
    if dataset.ann_file:
        if Path(dataset.ann_file).is_file():
            found, names = _check_list(dataset, number)
            yield from found
            if not names and not found:
                yield Finding('no data', f'{dataset.ann_file} names no image')
        return
    if not root.is_dir():
        if Path(dataset.data_root).is_dir():  # else the check of paths has said so
            detail = 'does not exist; docs/datasets.md says how it is made'
            yield Finding('missing path', str(root), detail)
        return
    yield from _check_folders(dataset, root, number)


def _number(dataset: Any, cfg: Config) -> int | None:
    """Number of classes, as far as the config says it."""
    classes = dataset.CLASSES
    head = cfg.model.get('head') or {}
    return len(classes) if classes else head.get('num_classes')


def _check_folders(dataset: Any, root: Path, number: int | None) -> Iterator[Finding]:
    from mmpretrain.datasets.custom import find_folders

    # Into links, as MMPretrain goes: a subset may be links to some class folders.
    walk = os.walk(root, followlinks=True)
    if not any(dataset.is_valid_file(name) for _, _, names in walk for name in names):
        suffixes = ', '.join(sorted(dataset.extensions))
        detail = f'no file name ends in one of {suffixes}{there(root)}'
        yield Finding('no data', str(root), detail)
        return
    if not dataset.with_label:
        return
    folders, _ = find_folders(str(root))
    hidden = [name for name in folders if name.startswith('.')]
    for name in hidden:
        yield Finding('hidden folder', str(root / name))
    folders = [name for name in folders if name not in hidden]
    classes = dataset.CLASSES
    if not folders:
        detail = f'holds no folders: expected one per class{there(root)}'
        yield Finding('number of classes', str(root), detail)
    elif number is not None and len(folders) != number:
        detail = f'holds {len(folders)} folders: expected one per class, {number}'
        yield Finding('number of classes', str(root), detail)
    elif classes and set(folders) == set(classes) and folders != list(classes):
        detail = (
            f'the labels get the wrong names: folders count in alphabetical order, '
            f'so metainfo.classes must be {tuple(folders)}'
        )
        yield Finding('classes', str(root), detail)


def check_classification(
    dataset: Any, cfg: Config
) -> tuple[list[Finding], list[Files]]:
    """Give the images of a CustomDataset, and check its folders or its list."""
    found = list(check_quickly(dataset, cfg))
    root = Path(dataset.img_prefix)
    if dataset.ann_file:
        if not Path(dataset.ann_file).is_file():
            return [], []  # the check of paths has said so
        _, names = _check_list(dataset, _number(dataset, cfg))
        return found, [Files(str(root / name), note=backslash(name)) for name in names]
    if not root.is_dir():
        return found, []
    from mmpretrain.datasets.custom import find_folders, get_samples

    indices = find_folders(str(root))[1] if dataset.with_label else None
    samples, empty = get_samples(str(root), indices, dataset.is_valid_file)
    found += [
        Finding('empty class folder', str(root / name))
        for name in sorted(empty)
        if not name.startswith('.')
    ]
    names = [sample if indices is None else sample[0] for sample in samples]
    return found, [Files(str(root / name)) for name in names]


def _check_list(dataset: Any, number: int | None) -> tuple[list[Finding], list[str]]:
    """Check a list of file names and labels, as in ImageNet's meta/val.txt.

    Returns:
        tuple: What is wrong with its lines, and the file names.
    """
    found, names = [], []
    try:
        text = Path(dataset.ann_file).read_text('utf-8')
    except UnicodeDecodeError as error:
        return [Finding('malformed entry', dataset.ann_file, f'no text: {error}')], []
    for count, line in enumerate(text.splitlines(), 1):
        name, _, label = line.strip().rpartition(' ')
        place = f'{dataset.ann_file}:{count}'
        if not dataset.with_label:
            name = line.strip()
        elif not name or not label.isdecimal():
            detail = f'{line!r}: expected a file name and a number'
            found.append(Finding('malformed entry', place, detail))
            continue
        elif number is not None and int(label) >= number:
            detail = f'label {label}: expected 0 to {number - 1}'
            found.append(Finding('label value', place, detail))
        names.append(name)
    found += repeated('image', names)
    return found, names
