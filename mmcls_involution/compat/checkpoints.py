"""Read checkpoints weights-only, MMEngine's own training checkpoints too."""

from __future__ import annotations

import functools
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


class NoCheckpoint(RuntimeError):
    """A file is torn, or holds something else than weights."""


def pickle_history_plainly() -> None:
    """Make the training checkpoints that MMEngine writes loadable weights-only.

    A checkpoint holds the log history as ``HistoryBuffer`` objects, which pickle
    references to their methods through ``builtins.getattr``; torch >= 2.6 rightly
    refuses that, so MMEngine cannot resume its own file. Here the buffer is pickled as
    its constructor's arguments, two number arrays and an int, and the few types that
    this takes are allow-listed. Such a file is also readable by an unrepaired MMEngine.

    Answers https://github.com/open-mmlab/mmengine/issues/1655. Does nothing to a
    ``HistoryBuffer`` that already defines how it is pickled.
    """
    import numpy as np
    import torch
    from mmengine.logging import HistoryBuffer

    if '__reduce__' in HistoryBuffer.__dict__:
        return

    def __reduce__(self: HistoryBuffer) -> tuple:
        return type(self), (*self.data, self.max_length)

    HistoryBuffer.__reduce__ = __reduce__

    # Arrays and scalars of numbers: no code runs when they are rebuilt. numpy 1 and 2
    # pickle them under different module names.
    reconstruct = np.empty(0).__reduce__()[0]
    scalar = np.float64(0).__reduce__()[0]
    allowed: list[Any] = [HistoryBuffer, np.ndarray, np.dtype]
    for module in ('numpy._core.multiarray', 'numpy.core.multiarray'):
        allowed += [
            (reconstruct, f'{module}._reconstruct'),
            (scalar, f'{module}.scalar'),
        ]
    allowed += sorted(
        {
            type(np.dtype(code))
            for code in '?' + np.typecodes['AllInteger'] + np.typecodes['Float']
        },
        key=str,
    )
    torch.serialization.add_safe_globals(allowed)


def load_weights_only() -> None:
    """Read every checkpoint weights-only, whatever torch's default or environment.

    MMEngine leaves ``weights_only`` to torch.load, which TORCH_FORCE_NO_WEIGHTS_ONLY_
    LOAD turns off, and to torch.hub for a URL, whose default is an unrestricted load.
    Resuming does not need that either: the one call that MMEngine's own training
    checkpoints ask for is answered by :func:`_history_statistic`.

    Answers https://github.com/open-mmlab/mmengine/issues/1655. Does nothing the second
    time.
    """
    from mmengine.runner import CheckpointLoader, checkpoint

    if checkpoint.load_from_local is _load_from_local:
        return
    CheckpointLoader.register_scheme('', _load_from_local, force=True)
    checkpoint.load_from_local = _load_from_local
    checkpoint.load_url = functools.partial(_load_url, checkpoint.load_url)


def _load_from_local(filename: str, map_location: Any = None) -> Any:
    """Load a local checkpoint: the loader MMEngine uses for plain paths.

    Raises:
        FileNotFoundError: If there is no such file.
        pickle.UnpicklingError: If the file asks for code that weights do not need.
        NoCheckpoint: If it is a folder, torn, or is not a checkpoint.
    """
    import torch

    path = Path(filename).expanduser()
    if path.is_dir():
        raise NoCheckpoint(f'{path} is a folder: name a checkpoint in it')
    if not path.is_file():
        raise FileNotFoundError(f'Checkpoint not found: {filename}')
    try:
        with torch.serialization.safe_globals(
            [(_history_statistic, 'builtins.getattr')]
        ):
            content = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refusal(filename, error) from None
    except (RuntimeError, EOFError, LookupError) as error:  # of text the last one
        raise NoCheckpoint(
            f'{filename} is not a complete checkpoint: {error}. It may have been cut '
            'short by a full disk or a kill; use an earlier one.'
        ) from error
    # MMEngine would end in an error of Python.
    weights = content.get('state_dict', content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(n, str) for n in weights):
        found: Any = type(content if weights is None else weights)
        if isinstance(weights, dict):
            found = [name for name in weights if not isinstance(name, str)][:8]
        raise NoCheckpoint(
            f'{filename} holds no weights: expected a dict of tensors, by itself or '
            f"under the key 'state_dict', found {found}"
        )
    return content


def _load_url(stock: Callable[..., Any], url: str, **kwargs: Any) -> Any:
    """torch.hub's download with weights-only loading."""
    try:
        return stock(url, **{**kwargs, 'weights_only': True})
    except pickle.UnpicklingError as error:
        raise _refusal(url, error) from None


def _history_statistic(owner: type, name: str) -> Callable:
    """Stand in for ``builtins.getattr`` in checkpoints of an unrepaired MMEngine.

    They use it for the four statistics of ``HistoryBuffer`` and nothing else.
    """
    from mmengine.logging import HistoryBuffer

    if owner is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise pickle.UnpicklingError(
            f'Unsupported global: getattr({owner!r}, {name!r})'
        )
    return getattr(HistoryBuffer, name)


def _reason(path: Path, error: Exception) -> str:
    """What in the file asks for more than weights-only loading gives."""
    import torch

    if zipfile.is_zipfile(path):
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if names:
            return 'it asks for ' + ', '.join(sorted(names))
    found = re.search(
        r'nsupported (?:global: (?:GLOBAL )?|GLOBAL )(getattr\(.*?\)|\S+)', str(error)
    )
    return f'it asks for {found[1]}' if found else 'it is not a file of weights'


def _refusal(source: str, error: Exception) -> pickle.UnpicklingError:
    reason = _reason(Path(source).expanduser(), error)
    return pickle.UnpicklingError(
        f'Refused to load {source}: {reason}. Loading it could run code, and weights '
        'need none. If you trust the file, extract its weights with '
        "torch.save(torch.load(PATH, weights_only=False)['state_dict'], NEW_PATH) "
        'and load those; to resume from it, a module in custom_imports of the config '
        'can allow what it asks for by torch.serialization.add_safe_globals.'
    )
