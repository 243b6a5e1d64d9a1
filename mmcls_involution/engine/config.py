"""Reading configs: files, options, and what comes near to a name that is not there."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import inspect
import logging
import os
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.registry import MODELS, RUNNERS, Registry, init_default_scope
from mmengine.runner import Runner

from mmcls_involution.engine.errors import UserError, did_you_mean, unknown_type
from mmcls_involution.paths import ROOT

PRECEDENCE = (
    'Where a setting is given twice: flag > --cfg-options > config file > default '
    '(work_dir: ./work_dirs/<name of the config>).'
)
# Top-level keys that have a meaning to MMEngine.
SETTINGS = {*inspect.signature(Runner.__init__).parameters} - {'self', 'cfg'} | {
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
KINDS = {dict: 'a dict', list: 'a list', str: 'a text', bool: 'True or False'}
# Parts below the top level that are read before they are built.
DICTS = (
    *('model.backbone', 'model.head', 'optim_wrapper.optimizer'),
    *(f'{split}_dataloader.dataset' for split in ('train', 'val', 'test')),
    *(f'{split}_dataloader.sampler' for split in ('train', 'val', 'test')),
)
# default_scope -> what pip installs for it
LIBRARIES = {'mmdet': 'det', 'mmseg': 'seg', 'mmpretrain': 'cls'}


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that training and testing share."""
    parser.epilog = PRECEDENCE
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
        help='how several processes are started: pytorch is for python -m '
        'torch.distributed.run --nproc_per_node=N -m mmcls_involution ...',
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
        path: Of the file; or, of a config that comes with this package, its path from
            the folder that holds ``configs``, or its name.
        options: Settings that override it; see :func:`add_cfg_options`.
            Defaults to None.

    Raises:
        UserError: If the file is missing or not a config, a key is misspelled, or the
            library it is for is not installed.
    """
    path = Path(path)
    if not path.is_file():
        path = shipped(path) or path
    if not path.is_file():
        raise UserError(f'Config not found: {path}.{_similar_files(path)}')
    try:
        cfg = Config.fromfile(path)
    except ImportError:
        raise
    except Exception as error:
        raise UserError(
            f'Cannot read the config {path}: {type(error).__name__}: {error}'
            + _quotes_in_places(path)
        ) from error

    _override(cfg, options or {})
    _check_names(cfg, path)
    _check_kinds(cfg, path)
    scope = cfg.setdefault('default_scope', 'mmengine')
    if importlib.util.find_spec(scope) is None:
        fix = did_you_mean(scope, LIBRARIES)
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


def _override(cfg: Config, options: dict[str, Any]) -> None:
    """Take over the settings of ``--cfg-options``.

    Raises:
        UserError: If the config has no place for one of them.
    """
    known = {*cfg, *SETTINGS}
    for option, value in options.items():
        key = option.split('.')[0]
        if key not in known:
            raise UserError(
                f'--cfg-options {option}: the config has no {key!r}.'
                + did_you_mean(key, known)
            )
        try:
            cfg.merge_from_dict({option: value})
        except (KeyError, TypeError) as error:
            raise UserError(
                f'--cfg-options {option} does not fit the config: {error.args[0]} '
                'A config of your own, with `_base_` and that part in it, can set it.'
            ) from error
        if key not in SETTINGS and _is_used(key, cfg.text):
            print_log(
                f'--cfg-options {option}: {key!r} is a variable of the config, whose '
                'places have its value of before already, and keep it. Set these, as '
                'in train_dataloader.dataset.data_root=PLACE',
                level=logging.WARNING,
            )


def _check_names(cfg: Config, path: Path) -> None:
    """Refuse a key that is a slip of a setting's name: nobody would read it.

    Raises:
        UserError: If there is one.
    """
    for key in set(cfg) - SETTINGS:
        close = difflib.get_close_matches(key, SETTINGS, 1, 0.92)
        if not close or _is_used(key, cfg.text):
            continue
        if key == f'{close[0]}s':  # a name for several, more likely than a slip
            print_log(
                f'{path}: {key!r} is taken for a variable of yours, as nothing reads '
                f'it; the setting is called {close[0]!r}',
                level=logging.WARNING,
            )
            continue
        raise UserError(
            f'{path}: {key!r} would be ignored; did you mean {close[0]!r}? '
            '(Rename it if it is a variable of yours.)'
        )


def _check_kinds(cfg: Config, path: Path) -> None:
    """Refuse a number where a dict should be, and so on, before anybody reads it.

    What the top-level keys may be, MMEngine's runner says in its annotations.

    Raises:
        UserError: If a part of the config is of a kind that nobody can use.
    """
    kinds = typing.get_type_hints(Runner.__init__)
    found = [
        wrong
        for key in kinds.keys() - {'log_level', 'cfg'}
        for wrong in _of_another_kind(key, cfg.get(key), kinds[key])
    ]
    for key in DICTS:
        outer, _, inner = key.partition('.')
        if isinstance(part := cfg.get(outer), dict):
            found += _of_another_kind(key, part.get(inner), dict)
    if found:
        key, value, kind = min(found)
        raise UserError(
            f'{path}: {key} is {value:.80}, and should be {kind}. Write it so in the '
            f'config, or with --cfg-options {key}...'
        )


def _of_another_kind(key: str, value: Any, kind: Any) -> Iterator[tuple[str, str, str]]:
    """Key, value and what it should be, of each value that is not as annotated."""
    if value is None:  # left out
        return
    options = typing.get_args(kind) if typing.get_origin(kind) is typing.Union else ()
    written = []  # what a config can hold: no objects
    for option in options or (kind,):
        plain, inner = typing.get_origin(option) or option, typing.get_args(option)
        if isinstance(value, plain) or (plain is list and isinstance(value, tuple)):
            if inner:  # a kind of its items
                items = value.items() if plain is dict else enumerate(value)
                for name, item in items:
                    yield from _of_another_kind(f'{key}.{name}', item, inner[-1])
            return
        if plain in KINDS:
            written.append(KINDS[plain])
    yield key, repr(value), ' or '.join(written)


def _is_used(name: str, text: str) -> bool:
    """Whether a config not only sets a variable, but reads it too."""
    found = len(re.findall(rf'\b{name}\b', text))
    return found > len(re.findall(rf'^{name}\s*=', text, re.MULTILINE))


def shipped(path: Path) -> Path | None:
    """The config of this package that a path from its folder, or a name, means."""
    name = f'{path.name.removesuffix(".py")}.py'
    folders = [path.parent] if path.parent != Path() else (ROOT / 'configs').glob('*')
    files = (ROOT / folder / name for folder in folders)
    return next(filter(Path.is_file, files), None)


def _similar_files(path: Path) -> str:
    """Name the config files whose path or name resembles ``path``."""
    # No deeper: it may be a home folder, or the root of the disk.
    folder = path.parent if path.parent.is_dir() else path.parent.parent
    patterns = ('*.py', '*/*.py', 'configs/*/*.py')
    files = [str(file) for pattern in patterns for file in folder.glob(pattern)]
    files += [file.stem for file in (ROOT / 'configs').glob('[!_]*/*.py')]
    return did_you_mean(str(path), files)


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
            'the processes with python -m torch.distributed.run --nproc_per_node=N '
            '-m mmcls_involution ..., and take --launcher pytorch.'
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
        if is_called(part.get('type'), 'SyncBN', MODELS):
            part['type'] = 'BN'
    cfg.pop('sync_bn', None)


def registered(registry: Registry, kind: Any) -> Any:
    """The class of a ``type`` in a config, looked up in its default scope.

    Raises:
        UserError: If no class has that name.
    """
    if not isinstance(kind, str):
        if kind is not None and not callable(kind):
            raise UserError(f'{kind!r} is no type: the name of a class is one.')
        return kind
    with registry.switch_scope_and_registry(None) as registry:
        found = registry.get(kind)
        if found is None:
            raise UserError(unknown_type(registry, kind))
        return found


def _quotes_in_places(path: Path) -> str:
    """What to say of a path that MMEngine cannot put into a config's text."""
    variables: set[str] = set()
    files = [path]
    for file in files:  # it grows by the files that these inherit
        text = file.read_text(errors='replace')
        variables |= set(re.findall(r'\{\{\$(\w+):', text))
        bases = (
            file.parent / name for name in re.findall(r"""['"](.+?\.py)['"]""", text)
        )
        files += [base for base in bases if base.is_file() and base not in files]
    return ''.join(
        f'. The environment variable {name} is {value}: a config cannot hold a place '
        'with a quote or a backslash. Give it another name, or a link (ln -s) that '
        'has none'
        for name in sorted(variables)
        if set(value := os.environ.get(name, '')) & set('\'"\\')
    )


def is_called(kind: Any, name: str, registry: Registry) -> bool:
    """Whether a ``type`` in a config means the class that a registry calls ``name``.

    Args:
        kind: A name, which may begin with a scope (``mmdet.``), or the class itself.
        name: Without a scope.
        registry: The one that has it.
    """
    if isinstance(kind, str):
        return kind.rpartition('.')[2] == name
    return kind is not None and kind is registered(registry, name)


def places(cfg: Config) -> dict[str, str]:
    """The environment variables that a config reads as {{$NAME:default}}."""
    return dict(re.findall(r'\{\{\$(\w+):(\S*?)\}\}', cfg.text))


def missing(path: Path, key: str, cfg: Config | None = None) -> str | None:
    """What to say of a path that does not exist; None for one that does.

    Args:
        path: The path.
        key: The flag, or the key of the config, that gave it.
        cfg: The config, where it gave the path. Defaults to None.
    """
    if path.exists():
        return None
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    message = f'{key}: {path} does not exist (the nearest folder that does: {parent}).'
    if cfg is not None:
        ways = [
            f'the environment variable {name}'
            for name, default in places(cfg).items()
            if str(path).startswith(os.environ.get(name, default))
        ]
        ways.append(f'--cfg-options {key}=PLACE')
        message += f' Put it there, or name its place with {" or ".join(ways)}.'
    return message


def check_output(path: Path, what: str = 'the output', in_place: bool = False) -> None:
    """Refuse an output file that could not be written, before any work is done.

    Args:
        path: The file.
        what: The flag that gave it. Defaults to 'the output'.
        in_place: Whether an earlier file is written over; else a new one takes its
            place. Defaults to False.

    Raises:
        UserError: If it is a folder, its folder is missing, or one that has to be
            written to is read-only.
    """
    if path.is_dir():
        raise UserError(f'{what}: {path} is a folder: name a file')
    if not path.parent.is_dir():
        raise UserError(f'{what}: the folder {path.parent} does not exist: make it')
    place = path if in_place and path.exists() else path.parent
    if not os.access(place, os.W_OK):
        raise UserError(f'{what}: {place} is read-only: name another place')


def check_picture(path: Path | str | None, what: str) -> None:
    """Refuse a file that matplotlib cannot draw to, before any work is done.

    Args:
        path: The file; None if none was named.
        what: The flag that gives it.

    Raises:
        UserError: If its suffix is not that of a picture.
    """
    from matplotlib.figure import Figure  # half a second, for those who draw alone

    suffixes = sorted(f'.{kind}' for kind in Figure().canvas.get_supported_filetypes())
    if Path(path or '').suffix.lower() not in suffixes:
        raise UserError(f'{what} must be a file of {", ".join(suffixes)}, got {path}.')


def is_local(cfg: dict, path: Any) -> bool:
    """Whether a path that a part of a config gives is one of this machine."""
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


def build_runner(cfg: Config) -> Runner:
    """The runner of the config: its ``runner_type``, or MMEngine's."""
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
