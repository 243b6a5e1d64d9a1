"""Checkpoint files: which ones a run names, reading weights-only, writing safely."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import logging
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import is_distributed
from mmengine.logging import print_log
from mmengine.registry import WEIGHT_INITIALIZERS
from mmengine.runner import CheckpointLoader
from torch import Tensor

from mmcls_involution.engine.config import dicts, is_called, missing
from mmcls_involution.engine.errors import UserError


def check_checkpoint(path: str | None, what: str, cfg: Config | None = None) -> None:
    """Refuse a checkpoint path that names no file; fetch what is elsewhere.

    Args:
        path: The path, URL, or address of a scheme such as ``torchvision://``; None
            passes.
        what: The flag, or the key of the config, that gave it.
        cfg: The config, where it gave the path.

    Raises:
        UserError: If ``path`` is a placeholder or a local file that does not exist, is
            of Paddle's form, or cannot be downloaded.
    """
    if not path:
        return
    path = str(path)
    message = None
    if '://' in path:
        # The first process before they are joined, the others find what it left; and
        # once they are, all of them, because MMEngine's loader lets them meet.
        if is_distributed() or os.environ.get('RANK', '0') == '0':
            try:
                CheckpointLoader.load_checkpoint(path, 'cpu', logger='silent')
            except (KeyError, OSError, RuntimeError, UserError) as error:
                message = f'{what}: cannot load {path}: {error}.'
    elif path.endswith('.pdparams'):
        message = (
            f'{what}: {path} is a file of Paddle. '
            '`python -m mmcls_involution convert` makes a checkpoint of it.'
        )
    else:
        file = Path(path).expanduser()
        if not file.exists():
            bring_back(file.parent)
        message = missing(file, what, cfg)
        # Only then: a folder may be called histopath/tower.
        if message and re.search(r'(?<![a-z])path[/_]?to(?![a-z])|<.*>', path, re.I):
            raise UserError(
                f'{what} is a placeholder: {path}. Put the path of your checkpoint '
                'there.'
            )
    if message:
        if cfg is not None:
            message += f' {what.removesuffix(".checkpoint")}=None: from random weights.'
        raise UserError(message)


def is_pretrained(part: dict) -> bool:
    """Whether a part of a config is an ``init_cfg`` that loads a checkpoint."""
    return is_called(part.get('type'), 'Pretrained', WEIGHT_INITIALIZERS)


def starting_points(cfg: Config) -> dict[str, str]:
    """Checkpoints that a training starts from, by the keys that name them."""
    starts = {
        f'{path}.checkpoint': part['checkpoint']
        for path, part in dicts(cfg.model, 'model')
        if is_pretrained(part) and part.get('checkpoint')
    }
    return starts | ({'load_from': cfg.load_from} if cfg.get('load_from') else {})


def checkpoint_places(
    work_dir: Path, cfg: Config | None = None
) -> list[tuple[Path, str]]:
    """The folders where a training writes checkpoints, and templates of their names.

    Args:
        work_dir (Path): Of the training.
        cfg (Config, optional): Its config, whose hooks may name an ``out_dir`` and a
            ``filename_tmpl``. Folders elsewhere than on this machine are left out.
    """
    found = [(work_dir, 'epoch_{}.pth'), (work_dir, 'iter_{}.pth')]
    cfg = cfg or {}
    hooks = [(cfg.get('default_hooks') or {}).get('checkpoint')]
    for hook in [*hooks, *(cfg.get('custom_hooks') or [])]:
        if not isinstance(hook, dict) or '://' in str(hook.get('out_dir')):
            continue
        own = [hook['filename_tmpl']] if hook.get('filename_tmpl') else []
        folder, own_dir = work_dir, os.path.abspath(work_dir)
        if hook.get('out_dir') not in (None, own_dir):  # as CheckpointHook has it
            folder = Path(hook['out_dir'], Path(own_dir).name)
            own = own or ['epoch_{}.pth', 'iter_{}.pth']
        # Relative, also where the hook names an absolute path.
        found += [(folder, os.path.relpath(Path(folder, x), folder)) for x in own]
    return found


def checkpoint_files(work_dir: Path, cfg: Config | None = None) -> dict[Path, int]:
    """The checkpoints of a training with the numbers in their names, -1 for none.

    The best ones and published copies are not among them.

    Args:
        work_dir, cfg: As of :func:`checkpoint_places`.
    """
    numbers = {}
    for folder, template in checkpoint_places(work_dir, cfg):
        parts = re.split(r'\{.*?\}', template)
        for file in folder.glob('*'.join(map(glob.escape, parts))):
            name = file.relative_to(folder).as_posix()
            if found := re.fullmatch(r'(\d+)'.join(map(re.escape, parts)), name):
                numbers[file] = int(found[1]) if found.re.groups else -1
    return numbers


def later_checkpoints(
    start: Path, work_dir: Path, cfg: Config | None = None
) -> list[Path]:
    """The checkpoints of a training, the best ones too, of a higher number than one.

    Args:
        start (Path): That one.
        work_dir, cfg: As of :func:`checkpoint_places`.
    """
    found, files = set(), checkpoint_files(work_dir, cfg)
    for folder, template in checkpoint_places(work_dir, cfg):
        own = r'(\d+)'.join(map(re.escape, re.split(r'\{.*?\}', template)))
        name = re.compile(f'{own}|best_.*_{own.replace("/", "_")}')
        numbers = {}
        for file in [*files, *folder.glob('best_*')]:
            match = name.fullmatch(Path(os.path.relpath(file, folder)).as_posix())
            if match and match.lastindex:
                numbers[file] = int(match[match.lastindex])
        began = [n for f, n in numbers.items() if f.resolve() == start.resolve()]
        found |= {file for file, n in numbers.items() if began and n > began[0]}
    return sorted(found)


def latest_checkpoint(work_dir: Path, cfg: Config | None = None) -> Path | str | None:
    """The newest checkpoint of a training that loads in full, or None.

    Those passed over are named in a warning. ``last_checkpoint`` names the newest by
    an absolute path: of a folder that was moved or copied since, so that only the
    file's name counts. A run that was killed may have left a newer one.

    Args:
        work_dir (Path): Of the training.
        cfg (Config, optional): As of :func:`checkpoint_places`.

    Returns:
        Path | str | None: The file; or the address, where ``last_checkpoint`` has one.
    """
    numbers = checkpoint_files(work_dir, cfg)
    # Of one time, as file systems count in steps of up to seconds, by their numbers.
    candidates = sorted(numbers, key=lambda f: (_age(f), numbers[f]), reverse=True)
    pointer = work_dir / 'last_checkpoint'
    if pointer.is_file():
        text = pointer.read_text(errors='replace').strip()
        if '://' in text:
            return text
        name = Path(text).name
        named = next((file for file in candidates if file.name == name), None)
        if named is None:
            print_log(
                f'Passed over {text[:200]!r} of {pointer}: missing',
                level=logging.WARNING,
            )
        else:
            # The times of a folder that was copied say little, its names do.
            newer = [
                file
                for file in candidates
                if _age(file) >= _age(named) and numbers[file] > numbers[named]
            ]
            rest = [file for file in candidates if file not in (*newer, named)]
            candidates = [*newer, named, *rest]
    for file in candidates:
        problem = _damage(file)
        if problem is None:
            return file
        print_log(f'Passed over {file}: {problem}', level=logging.WARNING)
    return None


def _age(file: Path) -> float:
    return file.stat().st_mtime if file.exists() else 0.0


def _damage(file: Path) -> str | None:
    """What keeps a checkpoint from being loaded in full; None if nothing does."""
    if not file.exists():
        return 'a link to nothing'
    if file.is_dir():
        # Whether all processes have written all of it cannot be seen.
        return 'a folder, as FSDP writes; --resume FOLDER takes it'
    try:
        # torch does not look at the check sums.
        with zipfile.ZipFile(file) as archive:
            if (part := archive.testzip()) is not None:
                return f'damaged at {part}'
        CheckpointLoader.load_checkpoint(str(file), 'cpu', logger='silent')
    except pickle.UnpicklingError:
        return None  # whole; to resume it says what it asks for
    except zipfile.BadZipFile as error:
        return f'cut short ({error})'
    except Exception as error:
        # torch raises whatever the damaged bytes made it stumble over.
        return f'damaged ({type(error).__name__}: {error})'
    return None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint weights-only, to the CPU. compat.apply() must have run.

    Args:
        path (Path): A file of MMCV or MMEngine, or a bare state dict.

    Returns:
        dict: The file's content; a bare state dict is put under ``state_dict``. Its
        names no longer begin with the ``module.`` of a parallel model. ``meta`` is
        :func:`meta_of` it.

    Raises:
        UserError: If there is no such file, it is cut short, or it holds no weights.
        pickle.UnpicklingError: If reading it could run code; the message says how to
            extract its weights.
    """
    check_checkpoint(str(path), 'the input')
    try:
        checkpoint = CheckpointLoader.load_checkpoint(str(path), map_location='cpu')
    except RuntimeError as error:
        raise UserError(str(error)) from None
    if 'state_dict' not in checkpoint:
        checkpoint = dict(state_dict=checkpoint)
    weights = checkpoint['state_dict']
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(
            f'{path} holds no weights: expected a dict of tensors, by itself or under '
            f"the key 'state_dict', found {list(weights)[:8]}"
        )
    while all(name.startswith('module.') for name in weights):
        weights = {n.removeprefix('module.'): value for n, value in weights.items()}
    return {**checkpoint, 'state_dict': weights, 'meta': meta_of(checkpoint)}


def meta_of(checkpoint: dict) -> dict[str, Any]:
    """The meta data of a checkpoint; those that are no dict say nothing."""
    meta = checkpoint.get('meta')
    return meta if isinstance(meta, dict) else {}


def read_meta(checkpoint: str) -> dict[str, Any]:
    """Epoch, iteration and seed of a local checkpoint, as far as it has them."""
    if '://' in checkpoint:
        return {}
    content = CheckpointLoader.load_checkpoint(checkpoint, 'cpu', logger='silent')
    meta = meta_of(content)
    return {key: meta[key] for key in ('epoch', 'iter', 'seed') if key in meta}


def identity(checkpoint: str) -> str:
    """What tells this checkpoint from any other: its sha256, or its URL."""
    if checkpoint.startswith('paddleclas://'):
        meta = CheckpointLoader.load_checkpoint(checkpoint, 'cpu', 'silent')['meta']
        return f'{checkpoint}, sha256 {meta["converted_from"]["sha256"]}'
    if '://' in checkpoint:
        return checkpoint
    return f'sha256 {sha256(Path(checkpoint).expanduser())}'


def sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def save(
    checkpoint: dict[str, Any], path: Path, name: Callable[[Path], Path] | None = None
) -> Path:
    """Write a checkpoint, whole or not at all. The same content gives the same bytes.

    Args:
        checkpoint (dict): What loads weights-only.
        path (Path): The file.
        name (Callable, optional): Gives the file's path instead, once it is written
            under another name, which is the argument.

    Returns:
        Path: The file.

    Raises:
        OSError, UserError: If it cannot be written, or has no name; nothing is left
            behind then.
    """
    partial = path.with_name(f'.{path.name}.{os.getpid()}.partial')
    try:
        # As an open file: torch would write the name of a path into the file.
        with partial.open('wb') as file:
            torch.save(checkpoint, file)
        path = name(partial) if name else path
        put_in_place(partial, path)
    except RuntimeError as error:  # torch's word for a full disk
        raise UserError(f'cannot write {path}: {error}') from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def put_in_place(partial: Path, target: Path) -> None:
    """Give a file, or a folder of files, its name, once it is safe on the disk.

    After this the target is there in full, whatever happens to the machine; before it
    ends, either that or what was there earlier. Of a folder, a kill may leave what was
    there under another name, which :func:`bring_back` knows.

    Args:
        partial (Path): What has been written, in the folder of the target.
        target (Path): The name to give to it.

    Raises:
        OSError: If the disk fails; an earlier target is as it was.
    """
    if partial.is_dir():
        for file in partial.iterdir():
            _sync(file)
        _sync(partial)
        if target.is_dir():  # folders are not replaced by a rename
            aside = partial.with_name(f'{partial.name}.old')
            target.rename(aside)
            try:
                partial.rename(target)
            except OSError:
                aside.rename(target)
                raise
            shutil.rmtree(aside, ignore_errors=True)
            _sync(target.parent)
            return
    else:
        _sync(partial)
    os.replace(partial, target)
    _sync(target.parent)


def bring_back(folder: Path) -> None:
    """Give the folders that a kill in :func:`put_in_place` left aside their names.

    Any number of processes may call it. Those whose place is taken stay aside.

    Args:
        folder (Path): Where they are.

    Raises:
        OSError: If the disk fails.
    """
    for aside in folder.glob('.*.partial.old'):
        # .NAME.PROCESS.partial.old
        target = aside.with_name(aside.name[1:].rsplit('.', 3)[0])
        if not target.exists():
            with contextlib.suppress(FileNotFoundError):  # by another process
                aside.rename(target)


def write_text(path: Path, text: str) -> None:
    """Replace a small text file at once, and see it onto the disk.

    Raises:
        OSError: If the disk fails; an earlier file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'.{path.name}.{os.getpid()}.partial')
    try:
        partial.write_text(text)
        put_in_place(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    """Have the system write out a file, or the names in a folder."""
    if path.is_dir() and os.name == 'nt':
        return  # which has no such call for folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems over a network have none for folders.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def plain(value: Any) -> Any:
    """What of a checkpoint's meta data loads weights-only in any program.

    Args:
        value: Text, numbers, and dicts, lists and tuples of them stay; numpy's numbers
            and arrays become Python's; of the rest nothing remains (``None``).
    """
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        items = [plain(item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if hasattr(value, 'tolist'):  # numpy and torch
        return plain(value.tolist())
    # The exact types: a subclass would be pickled by its own name.
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return None
