"""One message for what the person who typed the command can put right."""

from __future__ import annotations

import contextlib
import difflib
import errno
import functools
import inspect
import pickle
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import weight_init
from mmengine.registry import Registry
from mmengine.runner import Runner

from mmcls_involution import compat
from mmcls_involution.compat.checkpoints import NoCheckpoint
from mmcls_involution.weights.fit import Misfit


class UserError(Exception):
    """Something that the person who typed the command can put right."""


# What a place that cannot be written to raises.
OF_THE_DISK = (
    *(errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST),
)
# What a wrong value in a config raises while something is built from it.
CAUSED_BY_CONFIG = (AssertionError, KeyError, OSError, TypeError, ValueError)


@contextlib.contextmanager
def one_message_per_error() -> Iterator[None]:
    """End the program with one message for what the user can put right.

    Other exceptions, which are bugs, keep their traceback.
    """
    try:
        compat.check_versions()
        with _builds_on_record():
            yield
        return
    except KeyboardInterrupt:
        sys.exit('Interrupted; training goes on from its last checkpoint with --resume')
    except (UserError, Misfit, NoCheckpoint, pickle.UnpicklingError) as error:
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


@contextlib.contextmanager
def _builds_on_record() -> Iterator[None]:
    """Note on an exception which part of a config was being built when it arose.

    The innermost one; the exception itself stays what it is, for those who catch it.
    """

    def noting(function: Callable[..., Any], explain: Callable[..., str]) -> Any:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except CAUSED_BY_CONFIG as error:
                if not hasattr(error, 'explanation'):
                    error.explanation = explain(error, *args, **kwargs)
                raise

        return wrapper

    def of_the_runner(method: Any) -> Any:
        plain = getattr(method, '__func__', method)  # of a static method
        wrapper = noting(plain, lambda e, *_, **__: _explain_set_up(e, plain.__name__))
        return wrapper if plain is method else staticmethod(wrapper)

    # What the runner does with a config besides building its parts.
    methods = {
        name: method
        for name, method in vars(Runner).items()
        if name.startswith(('build_', 'register_', 'set_randomness', 'setup_env'))
    }
    for name, method in methods.items():
        setattr(Runner, name, of_the_runner(method))
    stock = Registry.build, weight_init.build_from_cfg
    Registry.build = noting(stock[0], _explain_build)
    # MMEngine builds initializers without Registry.build.
    weight_init.build_from_cfg = noting(
        stock[1], lambda e, cfg, registry, *_: _explain_build(e, registry, cfg)
    )
    try:
        yield
    finally:
        Registry.build, weight_init.build_from_cfg = stock
        for name, method in methods.items():
            setattr(Runner, name, method)


def _explain_build(
    error: Exception, registry: Registry, cfg: Any, *_: Any, **__: Any
) -> str:
    """A message for an error that building ``cfg`` from ``registry`` has raised."""
    if not isinstance(cfg, dict | Config):
        return (
            f'Cannot build a {registry.name} from {cfg!r:.80}: it should be a dict, '
            f"such as dict(type='NAME OF A CLASS', ...)."
        )
    kind = built = cfg.get('type', cfg.get('runner_type'))
    with registry.switch_scope_and_registry(cfg.get('_scope_')) as registry:
        if isinstance(kind, str):
            built = registry.get(kind)
            if built is None:
                return unknown_type(registry, kind)
    text = str(error)
    if 'need at least one array to concatenate' in text:  # MMEngine packs its samples
        keys = ('data_root', 'ann_file', 'data_prefix', 'img_suffix', 'filter_cfg')
        given = ', '.join(f'{k}={cfg[k]!r}' for k in keys if cfg.get(k))
        return (
            f'{getattr(built, "__name__", kind)} holds no sample: nothing is found, or '
            f'filter_cfg leaves nothing ({given}). `python -m mmcls_involution check` '
            'with this config says what is there.'
        )
    unexpected = re.search(r"unexpected keyword argument '(\w+)'", text)
    if unexpected and unexpected[1] in cfg and inspect.isclass(built):
        accepted = {
            name
            for base in built.__mro__
            for name in inspect.signature(base.__init__).parameters
        }
        accepted -= {'self', 'args', 'kwargs'}
        return (
            f'{built.__name__} has no argument {unexpected[1]!r}.'
            f'{did_you_mean(unexpected[1], accepted)} It takes '
            f'{", ".join(sorted(accepted))}.'
        )
    return (
        f'Cannot build {getattr(built, "__name__", kind)} from the config: '
        f'{_with_place(error)}'
    )


def _explain_set_up(error: Exception, method: str) -> str:
    """A message for an error that a method of the runner has raised."""
    part = method.partition('_')[2].replace('_', ' ')
    return f'Cannot set up the {part} of the config: {_with_place(error)}'


def _with_place(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f'{type(error).__name__}: {error} ({where.filename}:{where.lineno})'


def _explain(error: Exception) -> str | None:
    """A message for an error that config or machine caused; None for any other."""
    explanation = getattr(error, 'explanation', None)
    if isinstance(error, OSError) and error.errno in OF_THE_DISK:
        return explanation or str(error)
    # What one process meets when another is gone: NCCL's error, and the text of gloo's.
    if isinstance(error, torch.distributed.DistBackendError) or '/gloo/' in str(error):
        found = str(error).partition('. This is typically')[0]
        return (
            f'Another process of this run has ended or cannot be reached ({found}). '
            'Its own error is in the log; one that was killed, perhaps for want of '
            'memory, says nothing. A training goes on from its last checkpoint with '
            '--resume.'
        )
    # MMEngine's, where init_cfg.prefix does not fit the checkpoint
    if str(error).endswith('is not in the pretrained model'):
        return (
            f'{error}: no name in it begins so. For a bare backbone set '
            "model.backbone.init_cfg.prefix=None; the authors' weights go through "
            '`python -m mmcls_involution convert`.'
        )
    return explanation


def unknown_type(registry: Registry, kind: str) -> str:
    """Say that no class of a registry has the name ``kind``, and which are close."""
    names: set[str] = set()
    parent: Registry | None = registry
    while parent is not None:
        names |= set(parent.module_dict)
        parent = parent.parent
    return (
        f'No {registry.name} is called {kind!r} in {registry.scope}.'
        f'{did_you_mean(kind, names)} A class of your own is registered by '
        'custom_imports in the config.'
    )


def did_you_mean(word: str, candidates: Iterable[Any]) -> str:
    """A question that names up to three close candidates; '' where none is close."""
    close = difflib.get_close_matches(word, [str(c) for c in candidates], 3)
    return f' Did you mean {" or ".join(close)}?' if close else ''
