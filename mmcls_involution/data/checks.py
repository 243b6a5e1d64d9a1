"""Which checks a data set of a config gets: before a run, and in full."""

from __future__ import annotations

import inspect
import math
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
from mmcv.image import rescale_size
from mmengine.config import Config
from mmengine.registry import DATASETS, EVALUATOR, METRICS, MODELS, TRANSFORMS
from rich.progress import track

from mmcls_involution.data import coco, folders, images, segmentation
from mmcls_involution.data.rules import RULES, Files, Finding, together
from mmcls_involution.engine.config import (
    dicts,
    is_called,
    is_local,
    missing,
    registered,
)
from mmcls_involution.engine.errors import UserError

# Parts of a model whose num_classes is the number of the data set's.
HEADS = ('bbox_head', 'mask_head', 'decode_head', 'head')
# Models that count otherwise: they read the class names as text.
BY_TEXT = {'detector', 'language_model', 'text_encoder'}
# What a data set's config may have under these keys.
KINDS = dict(
    data_prefix=(dict | str, 'a dict or a text'),
    metainfo=(dict, 'a dict, such as dict(classes=(...))'),
    classes=(Iterable, 'a list of names, or a file of them'),
)


def data_sets(cfg: Config, split: str) -> list[tuple[str, dict]]:
    """The data sets of a split, by their places, without the wrappers around them."""
    name = f'{split}_dataloader'
    return [
        (path, part)
        for path, part in dicts((cfg.get(name) or {}).get('dataset'), f'{name}.dataset')
        if {'ann_file', 'data_root', 'data_prefix'} & set(part)
    ]


# ------------------------------------------------------------------------ before a run


def check_split_quickly(cfg: Config, split: str) -> Iterator[Finding]:
    """Look for what would stop or spoil a run at once, without reading the data.

    Args:
        cfg (Config): The whole config.
        split (str): ``train``, ``val`` or ``test``.
    """
    results = []
    for path, part in data_sets(cfg, split):
        found = list(check_quickly(cfg, path, part))
        if not any(RULES[finding.rule].quick for finding in found):
            found += _check_sample(cfg, path, part)
        results.append(found)
    for found in together(results):
        yield from found
    name = f'{split}_evaluator'
    for path, evaluator in dicts(cfg.get(name), name):
        yield from _check_topk(cfg, path, evaluator)
        if is_local(evaluator, file := evaluator.get('ann_file')):
            key = f'{path}.ann_file'
            if message := missing(Path(file), key, cfg):
                yield Finding('missing path', message)
            elif coco.scores_coco(registered(METRICS, evaluator.get('type'))):
                yield from _check_evaluator(key, file, _scored(cfg, split, path))


def _scored(cfg: Config, split: str, path: str) -> list[tuple[str, dict]]:
    """The data sets of a split that the evaluator at a path scores."""
    parts, whole = data_sets(cfg, split), cfg[f'{split}_evaluator']
    if isinstance(whole, dict) and is_called(
        whole.get('type'), 'MultiDatasetsEvaluator', EVALUATOR
    ):  # one for each
        number = path.removeprefix(f'{split}_evaluator.metrics.')
        fits = number.isdigit() and len(whole.metrics) == len(parts)
        return [parts[int(number)]] if fits else []
    return parts


def _check_topk(cfg: Config, path: str, evaluator: dict) -> Iterator[Finding]:
    """MMPretrain's Accuracy would stop a training at its first validation."""
    number = (cfg.model.get('head') or {}).get('num_classes')
    topk = evaluator.get('topk', 1)
    most = max(topk) if isinstance(topk, list | tuple) and topk else topk
    if (
        isinstance(number, int)
        and isinstance(most, int)
        and most > number
        and is_called(evaluator.get('type'), 'Accuracy', METRICS)
    ):
        yield Finding(
            'number of classes',
            f'{path}.topk asks for the best {most} of {number} classes. Set it, with '
            f'--cfg-options {path}.topk=[1].',
        )


def _check_sample(cfg: Config, path: str, part: dict) -> Iterator[Finding]:
    """Look into the data of a data set, as far as that is quick."""
    kind = registered(DATASETS, part.get('type'))
    if not is_local(part, 'any') or kind is None:
        return
    family = _family(kind)
    if family is folders.check_classification and not _can_download(kind):
        yield from folders.check_quickly(_unbuilt(part), cfg)
    elif family is segmentation.check_segmentation and any(
        is_called(step.get('type'), 'LoadAnnotations', TRANSFORMS)
        for _, step in dicts(part.get('pipeline'))
    ):
        yield from segmentation.check_sample(_unbuilt(part), cfg, path)


def _unbuilt(part: dict) -> Any:
    """The data set of a config that has read nothing yet, without its transforms."""
    return DATASETS.build({**part, 'pipeline': [], 'lazy_init': True})


def _check_evaluator(
    key: str, file: str, parts: list[tuple[str, dict]]
) -> Iterator[Finding]:
    """An evaluator must compare with the annotations of the data set.

    With several data sets it reads a file that holds all of theirs.
    """
    if not parts or not all(part.get('ann_file') for _, part in parts):
        return
    places = [Path(p.get('data_root') or '', p['ann_file']) for _, p in parts]
    used = places[0]
    if len(parts) > 1:
        yield from _check_common_file(key, file, places)
    # Links, and .. in a path, lead to one file by two names.
    elif not used.exists() or not used.samefile(file):
        yield Finding(
            'other annotations',
            f'{key} is {file}, but the data set reads {used}: the '
            f'metrics would be wrong. Set both, with --cfg-options {key}={used}.',
        )


def _check_common_file(key: str, file: str, places: list[Path]) -> Iterator[Finding]:
    """One metric of several data sets tells their images apart by the ids alone."""
    try:
        common, *others = (
            dict.fromkeys(repr(image.get('id')) for image in coco.read(place).images)
            for place in (Path(file), *places)
        )
    except coco.NotCoco:  # which the checks of the data sets say
        return
    seen: dict[Any, Path] = {}
    for place, ids in zip(places, others, strict=True):
        twice = next((i for i in ids if i in seen), None)
        absent = next((i for i in ids if i not in common), None)
        if twice is not None:
            problem = f'image id {twice} is in {seen[twice]} and in {place}, and '
            problem += 'predictions for both would be scored as of one image'
        elif absent is not None:
            problem = f'{file} has no image id {absent}, which {place} has'
        else:
            seen |= dict.fromkeys(ids, place)
            continue
        yield Finding(
            'other annotations',
            f'{key}: {problem}. Score each data set by itself, with a '
            'MultiDatasetsEvaluator; or name a file of all images, numbered anew there '
            'and in the files of the data sets.',
        )
        return


def check_quickly(cfg: Config, path: str, dataset: dict) -> Iterator[Finding]:
    """Check the files, classes and categories of one data set's config.

    Args:
        cfg (Config): The whole config.
        path (str): Where in it the data set is.
        dataset (dict): The data set's config.

    Raises:
        UserError: If a part of it is of a kind that nobody can use.
    """
    _check_kinds(path, dataset)
    cls = registered(DATASETS, dataset.get('type'))
    root = dataset.get('data_root') or ''
    prefix = dataset.get('data_prefix') or {}
    if isinstance(prefix, str):
        prefix = {'': prefix}
    parts = {'data_root': '', 'ann_file': dataset.get('ann_file')}
    parts |= {f'data_prefix.{key}'.rstrip('.'): part for key, part in prefix.items()}
    if dataset.get('download', True) and _can_download(cls):
        parts = {}
    for key, part in parts.items():
        if is_local(dataset, part or root):
            place = Path(root, part or '')
            whole = place.expanduser()
            message = missing(whole, f'{path}.{key}', cfg)
            if not message and place != whole and not _expands(cls):
                message = f'{path}.{key}: {place} is read as it stands, with a folder '
                message += f'called {place.parts[0]}. Write {whole}.'
            if message:
                yield Finding('missing path', message)
                return

    classes = _class_names(dataset, cls)
    if isinstance(classes, str):
        yield Finding(
            'classes as text',
            f'{path}: classes is the text {classes!r}, and no file has that name. '
            f"A single class is written classes=('{classes}',), with a comma, or "
            f'on the command line classes="[{classes}]".',
        )
        return
    if classes is None:
        return
    ann_file = dataset.get('ann_file')
    if coco.reads_objects(cls) and 'img' not in prefix:
        # MMDetection's own default has none, and ends in KeyError: 'img'.
        yield Finding('image folder', path, "its data_prefix has no 'img'")
    elif is_local(dataset, ann_file) and coco.loads_as_coco(cls):
        split = path.partition('_')[0]
        yield from coco.check_quickly(
            path,
            Path(root, ann_file).expanduser(),
            Path(root, prefix.get('img', '')),
            classes,
            coco.reads_objects(cls),
            coco.loads_masks(cfg, split),
            split == 'train' and coco.reads_polygons_alone(dataset),
            _metrics(cfg, split),
        )
    # Panoptic boxes are of fewer classes than the data set, tracks of fewer than the
    # videos.
    if 'thing_classes' not in getattr(cls, 'METAINFO', {}) and not BY_TEXT & {
        *cfg.model
    }:
        yield from _check_heads(cfg, path, classes)
        yield from _check_order(cfg, path, classes)


def _check_kinds(path: str, dataset: dict) -> None:
    """Refuse what nobody can use under one of KINDS, before anybody reads it."""
    for place, part in ((path, dataset), (f'{path}.metainfo', dataset.get('metainfo'))):
        for key in KINDS.keys() & (part if isinstance(part, dict) else {}):
            value, (kind, name) = part[key], KINDS[key]
            if value is not None and not isinstance(value, kind):
                raise UserError(
                    f'{place}.{key} is {value!r:.80}, and should be {name}.'
                )


def _class_names(dataset: dict, cls: type | None) -> list[str] | str | None:
    """The classes of a data set; or the text in their place that names no file."""
    classes = dataset.get('classes') or (dataset.get('metainfo') or {}).get('classes')
    if isinstance(classes, str):
        file = Path(classes).expanduser()
        if not file.is_file():
            return classes
        classes = file.read_text().splitlines()
    if classes is None:
        classes = getattr(cls, 'METAINFO', {}).get('classes')
    return None if classes is None else list(classes)


def _check_order(cfg: Config, path: str, classes: list[str]) -> Iterator[Finding]:
    """A class must have the same number wherever a model is trained or scored.

    Each data set may fit its own file, where an annotation tool has written the
    categories of one in another order than those of the other.
    """
    if not (parts := data_sets(cfg, 'train')):
        return
    first, part = parts[0]
    try:
        _check_kinds(first, part)
        trained = _class_names(part, registered(DATASETS, part.get('type')))
    except UserError:  # which the check of that one says; a test is without it
        return
    if not isinstance(trained, list):
        return
    for number, name in enumerate(classes):
        if name in trained and trained[number : number + 1] != [name]:
            detail = f'{name!r} is class {number} here, and class '
            detail += f'{trained.index(name)} of {first}'
            yield Finding('order of classes', path, detail)
            return


def _metrics(cfg: Config, split: str) -> set[str]:
    """What the evaluators of a split compute, and not only write down."""
    found: set[str] = set()
    for _, part in dicts(cfg.get(f'{split}_evaluator')):
        names = part.get('metric', 'bbox' if part.get('ann_file') else ()) or ()
        if not part.get('format_only'):
            found |= {names} if isinstance(names, str) else {*names}
    return found


def _expands(cls: type | None) -> bool:
    """Whether a data set takes ~ for the home folder, as MMPretrain's do."""
    bases = inspect.getmro(cls) if inspect.isclass(cls) else ()
    return any(base.__module__.startswith('mmpretrain.') for base in bases)


def _can_download(cls: type | None) -> bool:
    return cls is not None and 'download' in inspect.signature(cls).parameters


def _check_heads(cfg: Config, path: str, classes: list[str]) -> Iterator[Finding]:
    for head_path, head in dicts(cfg.model, 'model'):
        *_, name = [name for name in head_path.split('.') if not name.isdigit()]
        number = head.get('num_classes')
        if (
            isinstance(number, int)
            and not head.get('class_agnostic')
            and number != len(classes)
            and (name in HEADS or (number < len(classes) and _helps(name, head)))
        ):
            yield Finding(
                'number of classes',
                f'{head_path}.num_classes is {number}, but {path} has {len(classes)} '
                f'classes ({", ".join(map(str, classes[:10]))}'
                f'{", ..." if len(classes) > 10 else ""})',
            )


def _helps(name: str, head: dict) -> bool:
    """Whether it is a second head of a segmenter for the same classes.

    It may have more, without harm; one of another type may tell something else apart.
    """
    return name == 'auxiliary_head' and is_called(head.get('type'), 'FCNHead', MODELS)


# ----------------------------------------------------------------------------- in full


Check = Callable[[Any, Config], tuple[list[Finding], list[Files]]]


def _family(kind: type) -> Check | None:
    """The function that checks data sets of a class; None for one it cannot."""
    if coco.reads_objects(kind):
        return coco.check_coco
    families = dict(
        BaseSegDataset=segmentation.check_segmentation,
        CustomDataset=folders.check_classification,
    )
    for base in kind.__mro__:
        if 'load_data_list' in vars(base):
            return families.get(base.__name__)
    return None


def format_of(kind: type) -> Check:
    """The function that checks data sets of a class.

    Raises:
        UserError: If the class reads its data in a way of its own.
    """
    if check := _family(kind):
        return check
    raise UserError(
        f'{kind.__name__} reads its data in a way that the check does not know: '
        'expected one that reads like CocoDataset, BaseSegDataset or CustomDataset'
    )


def check_in_full(cfg: Config, path: str, part: dict, workers: int) -> list[Finding]:
    """Check one data set of a config, its config first, every image and label of it.

    Args:
        cfg (Config): The whole config.
        path (str): Where in it the data set is.
        part (dict): The data set's config.
        workers (int): Processes that decode images.

    Raises:
        UserError: If it cannot be checked at all.
    """
    if not is_local(part, 'any'):
        raise UserError(f'{path}: the check reads local files, not backend_args')
    check = format_of(registered(DATASETS, part.get('type')))
    found = list(check_quickly(cfg, path, part))
    dataset = _unbuilt(part)
    more, files = check(dataset, cfg)
    print(f'{path}: {len(files)} images', flush=True)
    found += more
    scale = _scale(part)
    files = [replace(file, scale=scale) for file in files]
    if not found and not files:
        found = [Finding('no data', path, 'the data set holds no image')]
    pixels: Counter[int] = Counter()
    for more, counts in _decode(files, workers):
        found += more
        pixels += counts
    wrong = any('label' in finding.rule for finding in found)
    # Those of a test may have none.
    labels = [file.label for file in files if file.label is not None]
    if labels and files[0].values and not wrong:
        place = str(dataset.data_prefix['seg_map_path'])
        trains = path.startswith('train')
        found += files[0].values.check_use(place, pixels, trains, len(labels))
    return found


def _scale(part: dict) -> tuple[int, int] | None:
    """What the pipeline of a data set resizes images to, keeping their ratio."""
    for _, step in dicts(part.get('pipeline')):
        scale = step.get('scale')
        resizes = is_called(step.get('type'), 'Resize', TRANSFORMS)
        if resizes and step.get('keep_ratio') and isinstance(scale, list | tuple):
            return tuple(scale)
    return None


def check_files(files: Files) -> tuple[list[Finding], Counter[int]]:
    """Decode an image and its label map in full, and compare them.

    Returns:
        tuple: What is wrong, and the label map's number of pixels by value.
    """
    found, size = images.check_image(files.image, files.size)
    if files.note and size is None:
        found = [Finding(f.rule, f.place, files.note) for f in found]
    if size and files.scale and min(rescale_size(size, files.scale)) < 1:
        detail = f'is {images.times(size)}, and resized to '
        detail += images.times(rescale_size(size, files.scale))
        found.append(Finding('too narrow', files.image, detail))
    if files.label is None:
        return found, Counter()
    more, pixels = segmentation.check_label(files.label, size, files.values)
    return found + more, pixels


def _decode(
    files: list[Files], workers: int
) -> Iterator[tuple[list[Finding], Counter[int]]]:
    """:func:`check_files` in ``workers`` processes, under a progress bar."""
    show = partial(track, description='decoding', total=len(files))
    # More processes than chunks of work would start for nothing.
    workers = min(workers, math.ceil(len(files) / 16))
    if not files:
        return
    if workers <= 1:
        yield from show(map(check_files, files))
        return
    pool = ProcessPoolExecutor(workers, initializer=_start_worker)
    try:
        chunk = max(1, min(64, len(files) // (8 * workers)))
        yield from show(pool.map(check_files, files, chunksize=chunk))
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
