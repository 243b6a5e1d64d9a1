"""What train.py and test.py do before the runner starts: options, checks, errors.

Everything a user can get wrong is looked for here, before a model is built or a weight
downloaded, and ends in one message (:class:`UserError`) instead of a traceback from
deep inside a library.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import importlib.util
import inspect
import json
import logging
import mmap
import os
import pickle
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import (
    DATASETS,
    OPTIMIZERS,
    RUNNERS,
    Registry,
    init_default_scope,
)
from mmengine.runner import Runner

from mmcls_involution import compat

PRECEDENCE = (
    'Where a setting is given twice: flag > --cfg-options > config file > default '
    '(work_dir: ./work_dirs/<name of the config>).'
)
ROOT = Path(__file__).resolve().parents[1]
# default_scope -> what pip installs for it
LIBRARIES = {'mmdet': 'det', 'mmseg': 'seg', 'mmpretrain': 'cls'}
# What the runner builds its loops from: all of a row, or none.
PARTS = {
    'model': ('model',),
    'train': ('train_dataloader', 'train_cfg', 'optim_wrapper'),
    'val': ('val_dataloader', 'val_cfg', 'val_evaluator'),
    'test': ('test_dataloader', 'test_cfg', 'test_evaluator'),
}


class UserError(Exception):
    """Something that the person who typed the command can put right."""


# ------------------------------------------------------------------------------ options


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that training and testing share."""
    parser.add_argument('--work-dir', help='folder for logs, checkpoints and results')
    add_cfg_options(parser)
    parser.add_argument(
        '--no-pin-memory',
        action='store_true',
        help='do not pin the memory of the data loaders',
    )
    parser.add_argument(
        '--no-persistent-workers',
        action='store_true',
        help='start the data loader workers anew for each epoch',
    )
    parser.add_argument(
        '--launcher',
        choices=('none', 'pytorch', 'slurm', 'mpi'),
        default='none',
        help='how several processes are started; see dist_train.sh',
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Add the flag that overrides settings of the config."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='settings that override the config, such as '
        'train_dataloader.batch_size=4; a list is written key="[a,b]" or key=a,b, '
        'without spaces',
    )


def read_config(path: str, options: dict[str, Any] | None = None) -> Config:
    """Read a config, and make the library that it is for the default scope.

    Args:
        path: Of the file.
        options: Settings that override it; see :func:`add_cfg_options`.
            Defaults to None.

    Raises:
        UserError: If the file is missing or not a config, a key is misspelled, or the
            library it is for is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f'Config not found: {path}.{_similar_files(path)}')
    try:
        cfg = Config.fromfile(path)
    except ImportError:
        raise
    except Exception as error:
        raise UserError(
            f'Cannot read the config {path}: {type(error).__name__}: {error}'
        ) from error

    options = options or {}
    known = {*cfg, *_runner_arguments()}
    for option in options:
        key = option.split('.')[0]
        if key not in known:
            raise UserError(
                f'--cfg-options {option}: the config has no {key!r}.'
                + _did_you_mean(key, known)
            )
    cfg.merge_from_dict(options)
    for key in set(cfg) - _runner_arguments():
        close = difflib.get_close_matches(key, _runner_arguments(), 1, 0.92)
        if close:
            raise UserError(
                f'{path}: {key!r} would be ignored; did you mean {close[0]!r}? '
                '(Rename it if it is a variable of yours.)'
            )

    scope = cfg.setdefault('default_scope', 'mmengine')
    if importlib.util.find_spec(scope) is None:
        fix = _did_you_mean(scope, LIBRARIES)
        if scope in LIBRARIES:
            fix = f' In the repository: pip install -e ".[{LIBRARIES[scope]}]"'
        raise UserError(
            f'default_scope of {path} is {scope!r}, and no library of that name is '
            f'installed.{fix}'
        )
    init_default_scope(scope)
    return cfg


def load_config(args: argparse.Namespace) -> Config:
    """Read the config and apply the flags common to training and testing.

    Args:
        args: Parsed flags; see :func:`add_common_arguments`.

    Raises:
        UserError: As of :func:`read_config`; or if the launcher needs a GPU and there
            is none.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = read_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(args.config).stem)
    _set_dataloader_defaults(cfg, args)
    if args.launcher != 'none' and not torch.cuda.is_available():
        _distribute_on_cpu(cfg)
    return cfg


def _runner_arguments() -> set[str]:
    """Top-level keys that have a meaning to MMEngine."""
    return {*inspect.signature(Runner.__init__).parameters} - {'self', 'cfg'} | {
        'activation_checkpointing',
        'compile',
        'custom_imports',
        'efficient_conv_bn_eval',
        'find_unused_parameters',
        'model_wrapper_cfg',
        'runner_type',
        'sync_bn',
        'tta_model',
        'tta_pipeline',
    }


def _did_you_mean(word: str, candidates: Any) -> str:
    close = difflib.get_close_matches(word, [str(c) for c in candidates], 3)
    return f' Did you mean {" or ".join(close)}?' if close else ''


def _similar_files(path: Path) -> str:
    """Name the config files whose path resembles ``path``."""
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    if folder == Path():
        folder = Path('configs')
    files = [str(file) for file in folder.glob('**/*.py')]
    return _did_you_mean(str(path), files)


def _set_dataloader_defaults(cfg: Config, args: argparse.Namespace) -> None:
    """Complete the data loaders with what this machine can do."""
    for split in ('train', 'val', 'test'):
        loader = cfg.get(f'{split}_dataloader')
        if not loader:
            continue
        if cfg.default_scope == 'mmpretrain':  # what its own tools/train.py assumes
            loader.setdefault('pin_memory', True)
            loader.setdefault('persistent_workers', True)
            loader.setdefault('collate_fn', dict(type='default_collate'))
        if args.no_pin_memory or get_device() == 'cpu':
            loader.pin_memory = False
        if args.no_persistent_workers or loader.get('num_workers', 0) == 0:
            loader.persistent_workers = False


def _distribute_on_cpu(cfg: Config) -> None:
    """Let several processes train without a GPU: gloo, and BN in place of SyncBN.

    MMEngine would select a CUDA device and give it to DistributedDataParallel.
    """
    if cfg.launcher != 'pytorch':
        raise UserError(
            f'--launcher {cfg.launcher} needs a GPU and torch sees none. On CPU, start '
            'the processes with tools/dist_train.sh or tools/dist_test.sh.'
        )
    if os.environ.get('RANK') == '0':
        print_log('No GPU: the processes communicate by gloo, on CPU')
    cfg.merge_from_dict({'env_cfg.dist_cfg.backend': 'gloo'})
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group('gloo')
    cfg.model_wrapper_cfg = dict(
        type='MMDistributedDataParallel',
        device_ids=None,
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    for _, part in dicts(cfg.get('model', {})):
        if part.get('type') == 'SyncBN':
            part['type'] = 'BN'
    cfg.pop('sync_bn', None)


# ------------------------------------------------------------------------------- checks


def check(cfg: Config, splits: tuple[str, ...]) -> None:
    """Look for what would stop or spoil the run.

    Args:
        cfg: The complete config.
        splits: Which of ``train``, ``val`` and ``test`` the run uses.

    Raises:
        UserError: If a part of the config, a data folder, an annotation file or a
            checkpoint is missing, if annotated categories do not fit ``classes``, or
            ``num_classes`` of a head does not fit the data set.
    """
    for split, parts in PARTS.items():
        absent = [part for part in parts if cfg.get(part) is None]
        # Validation may be left out, but not in part.
        needed = split == 'model' or (split in splits and split != 'val')
        if absent and (needed or len(absent) < len(parts)):
            raise UserError(
                f'The config has no {absent[0]!r}.{_did_you_mean(absent[0], cfg)} It '
                'may be one that others are meant to inherit.'
            )
    for key, file in starting_points(cfg).items():
        if 'train' in splits or key == 'load_from':
            check_checkpoint(file, key, cfg)
    if 'train' in splits:
        # MMEngine does not check this one, and fails on the missing class later.
        registered(OPTIMIZERS, cfg.optim_wrapper.get('optimizer', {}).get('type'))
        _warn_of_frozen_noise(cfg)
    for split in splits:
        loader, name = cfg.get(f'{split}_dataloader') or {}, f'{split}_dataloader'
        for path, dataset in dicts(loader.get('dataset'), f'{name}.dataset'):
            if {'ann_file', 'data_root', 'data_prefix'} & set(dataset):
                check_dataset(cfg, path, dataset)
        name = f'{split}_evaluator'
        for path, evaluator in dicts(cfg.get(name), name):
            if is_local(evaluator, evaluator.get('ann_file')):
                _check_exists(Path(evaluator.ann_file), f'{path}.ann_file', cfg)
                _check_same_annotations(path, evaluator, loader)


def starting_points(cfg: Config) -> dict[str, str]:
    """Checkpoints that a training starts from, by the keys that name them."""
    starts = {
        f'{path}.checkpoint': part['checkpoint']
        for path, part in dicts(cfg.model, 'model')
        if part.get('type') == 'Pretrained' and part.get('checkpoint')
    }
    return starts | ({'load_from': cfg.load_from} if cfg.get('load_from') else {})


def _warn_of_frozen_noise(cfg: Config) -> None:
    """Name settings for pre-trained weights that are left over where there are none."""
    backbone = cfg.model.get('backbone') or {}
    if backbone.get('init_cfg') or cfg.model.get('pretrained') or cfg.get('load_from'):
        return
    left = []
    if backbone.get('frozen_stages', -1) >= 0:
        left.append(('frozen_stages', backbone.frozen_stages, -1))
    if backbone.get('norm_eval'):
        left.append(('norm_eval', True, False))
    if left:
        found = ' and '.join(f'{key}={value}' for key, value, _ in left)
        fix = ' '.join(f'model.backbone.{key}={value}' for key, _, value in left)
        print_log(
            f'model.backbone has no pre-trained weights, and {found} would keep random '
            f'ones. To train it from scratch: {fix}',
            level=logging.WARNING,
        )


def registered(registry: Registry, kind: Any) -> Any:
    """The class of a ``type`` in a config, looked up in its default scope.

    Raises:
        UserError: If no class has that name.
    """
    if not isinstance(kind, str):
        return kind
    with registry.switch_scope_and_registry(None) as registry:
        found = registry.get(kind)
        if found is None:
            raise UserError(_unknown_type(registry, kind))
        return found


def _unknown_type(registry: Registry, kind: str) -> str:
    names: set[str] = set()
    parent: Registry | None = registry
    while parent is not None:
        names |= set(parent.module_dict)
        parent = parent.parent
    return (
        f'No {registry.name} is called {kind!r} in {registry.scope}.'
        f'{_did_you_mean(kind, names)} A class of your own is registered by '
        'custom_imports in the config.'
    )


def check_checkpoint(path: str | None, what: str, cfg: Config | None = None) -> None:
    """Refuse a checkpoint path that names no file; URLs pass.

    Args:
        path: The path; None passes too.
        what: The flag, or the key of the config, that gave it.
        cfg: The config, where it gave the path.

    Raises:
        UserError: If ``path`` is a placeholder or a local file that does not exist.
    """
    if not path or '://' in str(path):
        return
    if re.search(r'path[/_]?to|<.*>', str(path)):
        raise UserError(
            f'{what} is a placeholder: {path}. Put the path of your checkpoint there.'
        )
    try:
        _check_exists(Path(path).expanduser(), what, cfg)
    except UserError as error:
        if cfg is None:
            raise
        key = what.removesuffix('.checkpoint')
        raise UserError(
            f'{error}{_source(str(path), cfg)} {key}=None starts from random weights.'
        ) from None


def _source(path: str, cfg: Config) -> str:
    """Where the weights come from that one of our configs leaves in its work dir."""
    for name, default in places(cfg).items():
        config = next(ROOT.glob(f'configs/*/{Path(default).parent.name}.py'), None)
        if config is not None and path == os.environ.get(name, default):
            return (
                f' tools/train.py {config.relative_to(ROOT)} makes it, '
                'tools/model_converters/rednet_to_mmcls_involution.py converts the '
                "authors' weights."
            )
    return ''


def places(cfg: Config) -> dict[str, str]:
    """The environment variables that a config reads as {{$NAME:default}}."""
    return dict(re.findall(r'\{\{\$(\w+):(\S*?)\}\}', cfg.text))


def _check_exists(path: Path, what: str, cfg: Config | None) -> None:
    if path.exists():
        return
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    message = f'{what}: {path} does not exist (the nearest folder that does: {parent}).'
    if cfg is not None:
        ways = [
            f'the environment variable {name}'
            for name, default in places(cfg).items()
            if str(path).startswith(os.environ.get(name, default))
        ]
        ways.append(f'--cfg-options {what}=PLACE')
        message += f' Put it there, or name its place with {" or ".join(ways)}.'
    raise UserError(message)


def is_local(cfg: dict, path: Any) -> bool:
    backend = (cfg.get('backend_args') or {}).get('backend', 'local')
    return (
        bool(path)
        and isinstance(path, str)
        and backend == 'local'
        and '://' not in path
    )


def dicts(cfg: Any, path: str = '') -> Iterator[tuple[str, dict]]:
    """All dicts inside ``cfg`` with their dotted paths, outermost first."""
    if isinstance(cfg, dict):
        yield path, cfg
        items: Any = cfg.items()
    elif isinstance(cfg, (list, tuple)):
        items = enumerate(cfg)
    else:
        return
    for key, value in items:
        yield from dicts(value, f'{path}.{key}' if path else str(key))


def check_dataset(cfg: Config, path: str, dataset: dict) -> None:
    """Check the files, classes and categories of one data set config."""
    cls = registered(DATASETS, dataset.get('type'))
    root = dataset.get('data_root') or ''
    downloads = (
        cls is not None
        and dataset.get('download', True)
        and 'download' in inspect.signature(cls).parameters
    )
    prefix = dataset.get('data_prefix') or {}
    if isinstance(prefix, str):
        prefix = {'': prefix}
    if not downloads:
        for key, part in (
            ('data_root', ''),
            ('ann_file', dataset.get('ann_file')),
            *((f'data_prefix.{k}', v) for k, v in prefix.items()),
        ):
            if is_local(dataset, part or root):
                _check_exists(
                    Path(root, part or '').expanduser(),
                    f'{path}.{key}'.rstrip('.'),
                    cfg,
                )

    classes = _classes(path, dataset, cls)
    if classes is None:
        return
    ann_file = dataset.get('ann_file')
    if is_local(dataset, ann_file) and loads_as_coco(cls):
        ann_file = Path(root, ann_file).expanduser()
        _check_categories(path, ann_file, classes)
        _check_first_photo(path, ann_file, Path(root, prefix.get('img', '')))
    # Panoptic boxes are of fewer classes than the data set, tracks of fewer than the
    # videos, and models that read the class names as text count otherwise.
    if 'thing_classes' in getattr(cls, 'METAINFO', {}) or {
        'detector',
        'language_model',
        'text_encoder',
    } & set(cfg.model):
        return
    heads = ('bbox_head', 'mask_head', 'decode_head', 'head')
    for head_path, head in dicts(cfg.model, 'model'):
        names = [name for name in head_path.split('.') if not name.isdigit()]
        number = head.get('num_classes')
        if (
            names[-1] in heads
            and isinstance(number, int)
            and not head.get('class_agnostic')
            and number != len(classes)
        ):
            raise UserError(
                f'{head_path}.num_classes is {number}, but {path} has {len(classes)} '
                f'classes ({", ".join(map(str, classes[:10]))}'
                f'{", ..." if len(classes) > 10 else ""}). Make them equal: set '
                'num_classes of the head, or metainfo.classes of the data set.'
            )


def _classes(path: str, dataset: dict, cls: type | None) -> list[str] | None:
    """Class names of a data set config; None where only its files know them."""
    classes = dataset.get('classes') or (dataset.get('metainfo') or {}).get('classes')
    if isinstance(classes, str):
        if not Path(classes).expanduser().is_file():
            raise UserError(
                f'{path}: classes is the text {classes!r}, and no file has that name. '
                f"A single class is written classes=('{classes}',), with a comma, or "
                f'on the command line classes="[{classes}]".'
            )
        return Path(classes).expanduser().read_text().splitlines()
    if classes is None:
        classes = getattr(cls, 'METAINFO', {}).get('classes')
    return None if classes is None else list(classes)


def loads_as_coco(cls: type | None) -> bool:
    """Whether the data set reads its categories the way MMDetection's COCO does."""
    if importlib.util.find_spec('mmdet') is None or not inspect.isclass(cls):
        return False
    from mmdet.datasets import CocoDataset

    return getattr(cls, 'load_data_list', None) is CocoDataset.load_data_list


def _check_categories(path: str, ann_file: Path, classes: list[str]) -> None:
    """Compare ``classes`` with the categories of a COCO annotation file.

    MMDetection numbers the labels in the order of the file, and drops without a word
    the boxes of every category that ``classes`` does not name.
    """
    names = read_categories(ann_file)
    found = [name for name in names if name in classes]
    if found == classes:
        return
    missing = [name for name in classes if name not in names]
    if missing:
        problem = f'{", ".join(map(repr, missing))} not among its categories'
    elif len(found) > len(classes):
        problem = 'some category appears twice in the file'
    else:
        problem = 'the order differs, so the labels would get the wrong names'
        names = found
    raise UserError(
        f'{path}: metainfo.classes does not fit {ann_file}: {problem}. '
        f'The file has, in this order: {tuple(names)}. Set metainfo.classes to these, '
        'or to some of them in the same order, and num_classes of the heads to their '
        'number.'
    )


def _check_first_photo(path: str, ann_file: Path, folder: Path) -> None:
    """Refuse a photo folder that does not hold the photos of the annotation file."""
    name = _read_coco(ann_file, 'images', rb'"file_name"\s*:\s*(?=")')
    if not (folder / name).expanduser().exists():
        raise UserError(
            f'{path}: {ann_file} names the photo {name}, which is not in the folder '
            f'{folder}. Set data_prefix=dict(img=...) to the folder of the photos, '
            'relative to data_root.'
        )


def _check_same_annotations(path: str, evaluator: dict, loader: dict) -> None:
    """Refuse to compare with other annotations than those of the data set."""
    dataset = loader.get('dataset') or {}
    if evaluator.get('type') != 'CocoMetric' or dataset.get('type') != 'CocoDataset':
        return
    used = Path(dataset.get('data_root') or '', dataset.ann_file)
    if used.absolute() != Path(evaluator.ann_file).absolute():
        raise UserError(
            f'{path}.ann_file is {evaluator.ann_file}, but the data set reads {used}: '
            f'the metrics would be wrong. Set both, with --cfg-options {path}.ann_file'
            f'={used}.'
        )


def read_categories(ann_file: Path) -> list[str]:
    """Names of the categories of a COCO annotation file, in its order.

    Raises:
        UserError: If the file has no list of categories with names.
    """
    categories = _read_coco(ann_file, 'categories', rb'(?=\[)')
    if not all(isinstance(item, dict) and 'name' in item for item in categories):
        raise UserError(
            f'{ann_file} is not a COCO annotation file: not every item of its '
            '"categories" has a "name".'
        )
    return [item['name'] for item in categories]


def _read_coco(ann_file: Path, section: str, start: bytes) -> Any:
    """The first value after ``start`` in a section of a COCO annotation file.

    Only that value is parsed: COCO's own file is half a gigabyte.
    """
    try:
        with (
            ann_file.open('rb') as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            found = re.search(rf'"{section}"\s*:\s*(?=\[)'.encode(), content)
            position = re.compile(start).search(content, found.end()).end()
            text = content[position : position + 2**24].decode(errors='ignore')
        return json.JSONDecoder().raw_decode(text)[0]
    except (AttributeError, ValueError) as error:
        raise UserError(
            f'{ann_file} is not a COCO annotation file: its "{section}" cannot be read.'
        ) from error


# ------------------------------------------------------------------------------ running


class WeightsCheck(Hook):
    """Stop when a checkpoint does not fit the model.

    MMEngine loads what fits and only logs the rest; a model that keeps its random
    weights would be tested or trained as if nothing had happened. A parameter counts
    as loaded if torch's version counter of it has moved.

    Args:
        complete: Whether every parameter must be loaded (testing), or any (training).
    """

    priority = 'VERY_HIGH'

    def __init__(self, complete: bool) -> None:
        self.complete = complete
        self.versions: dict[str, int] = {}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self.versions = {n: p._version for n, p in runner.model.named_parameters()}

    def _check(self, runner: Runner) -> None:
        parameters = dict(runner.model.named_parameters())
        kept = [n for n, v in self.versions.items() if parameters[n]._version == v]
        if kept and (self.complete or len(kept) == len(self.versions)):
            raise UserError(
                f'The checkpoint {runner._load_from} does not fit the model: '
                f'{len(kept)} of {len(self.versions)} parameters are not in it, or have'
                f' another shape: {", ".join(kept[:5])}'
                f'{", ..." if len(kept) > 5 else ""}. They would keep their random '
                'values. Use the config that the checkpoint was trained with.'
            )
        self.versions = {}

    def before_train(self, runner: Runner) -> None:
        self._check(runner)

    def before_test(self, runner: Runner) -> None:
        self._check(runner)


def build_runner(cfg: Config) -> Runner:
    """The runner of the config: its ``runner_type``, or MMEngine's."""
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)


@contextlib.contextmanager
def one_message_per_error() -> Iterator[None]:
    """End the program with one message for what the user can put right.

    Other exceptions, which are bugs, keep their traceback.
    """
    try:
        compat.check_versions()
        yield
        return
    except KeyboardInterrupt:
        sys.exit('Interrupted; training goes on from its last checkpoint with --resume')
    except (UserError, pickle.UnpicklingError) as error:
        message = str(error)
    except ImportError as error:
        message = (
            f'{error}\n`python -m mmcls_involution.doctor` checks the installation'
        )
    except torch.OutOfMemoryError as error:
        message = (
            f'{error}\nTry a smaller train_dataloader.batch_size (--cfg-options), '
            '--amp, or model.backbone.with_cp=True, which recomputes activations.'
        )
    except Exception as error:
        message = _explain(error)
        if message is None:
            raise
    if torch.distributed.is_initialized():
        message = f'[rank {torch.distributed.get_rank()}] {message}'
    sys.exit(f'Error: {message}')


def _explain(error: Exception) -> str | None:
    """A message for an error that the config caused; None for any other."""
    if isinstance(error, OSError) and error.errno in (
        errno.EACCES,
        errno.ENOSPC,
        errno.EROFS,
    ):
        return str(error)
    # MMEngine's, where init_cfg.prefix does not fit the checkpoint
    if str(error).endswith('is not in the pretrained model'):
        return (
            f'{error}: no name in it begins so. For a bare backbone set '
            "model.backbone.init_cfg.prefix=None; the authors' weights go through "
            'tools/model_converters/rednet_to_mmcls_involution.py.'
        )
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    builds = [
        f
        for f in frames
        if f.f_code.co_name.endswith('_from_cfg') and 'args' in f.f_locals
    ]
    if not builds or not isinstance(
        error, (AssertionError, KeyError, OSError, TypeError, ValueError)
    ):
        return None
    scope = builds[-1].f_locals
    registry = scope['registry']
    kind = scope.get('obj_type', scope.get('scheduler_type'))
    built = scope.get('obj_cls', scope.get('scheduler_cls'))
    if isinstance(error, KeyError) and isinstance(kind, str) and built is None:
        return _unknown_type(registry, kind)
    where = frames[-1]
    text = str(error)
    unexpected = re.search(r"unexpected keyword argument '(\w+)'", text)
    if unexpected and unexpected[1] in scope['args'] and inspect.isclass(built):
        accepted = {
            name
            for base in built.__mro__
            for name in inspect.signature(base.__init__).parameters
        }
        return (
            f'{built.__name__} has no argument {unexpected[1]!r}.'
            f'{_did_you_mean(unexpected[1], accepted)}'
        )
    return (
        f'Cannot build {getattr(built, "__name__", kind)} from the config: '
        f'{type(error).__name__}: {text} '
        f'({where.f_code.co_filename}:{where.f_lineno})'
    )
