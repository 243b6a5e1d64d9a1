"""ImageNet weights of RedNet from PaddleClas: the scheme ``paddleclas://RedNet50``.

PaddleClas converted the authors' five classifiers, whose own links are dead. A file of
it is a pickle of a dict, names to numpy arrays. The names are the official ones but for
the statistics of batch norm and for the classifier, whose weight is transposed.
"""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from mmcls_involution import __version__
from mmcls_involution.engine.errors import UserError, did_you_mean
from mmcls_involution.weights.download import alone, cache_folder, download
from mmcls_involution.weights.files import save, sha256
from mmcls_involution.weights.fit import Fit

SCHEME = 'paddleclas://'
# As PaddleClas 2.6 has them in ppcls/arch/backbone/model_zoo/rednet.py.
BASE_URL = 'https://paddle-imagenet-models-name.bj.bcebos.com/dygraph'
FILES = {
    f'RedNet{depth}': f'RedNet{depth}_pretrained.pdparams'
    for depth in (26, 38, 50, 101, 152)
}
PLACE = 'MMCLS_INVOLUTION_WEIGHTS'


class _Unpickler(pickle.Unpickler):
    """Knows dicts, lists, text, numbers and numpy's arrays. No code of a file runs."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            'collections.OrderedDict': dict,
            'numpy.dtype': np.dtype,
            # Only handed on to the next one.
            'numpy.ndarray': None,
            # The array's shape, type and content are set afterwards.
            'numpy.core.multiarray._reconstruct': lambda *_: np.empty(0),
            # Of protocol 5.
            'numpy.core.numeric._frombuffer': lambda buffer, dtype, shape, order: (
                np.frombuffer(buffer, dtype).reshape(shape, order=order)
            ),
            # How bytes are written before protocol 3.
            '_codecs.encode': lambda text, _: text.encode('latin1'),
        }
        asked = f'{module}.{name}'.replace('numpy._core.', 'numpy.core.')  # numpy 2
        if asked not in known:
            raise UserError(
                f'refused, it asks for {module}.{name}; reading it could run code, and '
                'weights need none'
            )
        return known[asked]


def read_pdparams(path: Path) -> dict[str, Tensor]:
    """Read a file of PaddleClas under the names of a classifier here.

    Args:
        path (Path): A ``.pdparams`` file with the weights of a RedNet.

    Returns:
        dict[str, Tensor]: ``backbone.*`` and ``head.fc.*``. Batch norm's counters,
        which Paddle does not have, are missing.

    Raises:
        UserError: If the file is cut short, holds something else than arrays of real
            numbers by name, or asks for anything that could run code.
        OSError: If it cannot be read.
    """
    try:
        with path.open('rb') as file:
            content = _Unpickler(file).load()
    except OSError:
        raise
    except UserError as error:
        raise UserError(f'{path}: {error}') from None
    except Exception as error:  # a broken pickle raises all kinds
        raise UserError(
            f'{path} is cut short, or no .pdparams file ({type(error).__name__}: '
            f'{error!s:.200})'
        ) from None
    if not isinstance(content, dict):
        content = {'': content}
    content.pop('StructuredToParameterName@@', None)
    weights = {}
    for name, array in content.items():
        is_array = isinstance(array, np.ndarray)
        kind = array.dtype.name if is_array else type(array).__name__
        if not is_array or kind not in ('float16', 'float32', 'float64'):
            raise UserError(
                f'{path} is no file of weights: expected arrays of floating-point '
                f'numbers by name, found {kind} under {name!r:.80}'
            )
        tensor = torch.from_numpy(array.astype(kind, 'C'))  # in this machine's order
        name = re.sub(r'\._mean$', '.running_mean', str(name))
        name = re.sub(r'\._variance$', '.running_var', name)
        if name == 'fc.weight':
            tensor = tensor.mT.contiguous()
        part = 'head' if name.startswith('fc.') else 'backbone'
        weights[f'{part}.{name}'] = tensor
    return weights


def register() -> None:
    """Let MMEngine's loader, and so every config, know ``paddleclas://``."""

    def load_from_paddleclas(filename: str, map_location: Any = None) -> dict:
        return torch.load(fetch(filename), map_location, weights_only=True)

    CheckpointLoader.register_scheme(SCHEME, load_from_paddleclas, force=True)


def fetch(address: str) -> Path:
    """Download and convert the weights that an address stands for, if need be.

    Files lie in torch hub's cache (``$TORCH_HOME/hub/checkpoints``, by default under
    ``~/.cache/torch``): PaddleClas's own, and beside it ours, which loads weights-only.
    The environment variable ``MMCLS_INVOLUTION_WEIGHTS`` names a folder that holds the
    former, or the base URL of a mirror. Several processes may ask at once.

    Args:
        address (str): ``paddleclas://RedNet50``, say.

    Returns:
        Path: A checkpoint of a classifier: ``backbone.*`` and ``head.fc.*``.

    Raises:
        UserError: If there are no such weights, they cannot be fetched or kept, or are
            not what they should be. The message says what to put where by hand.
    """
    name = address.removeprefix(SCHEME)
    if name not in FILES:
        raise UserError(
            f'{address} is unknown; there are {", ".join(FILES)}.'
            f'{did_you_mean(name, FILES)}'
        )
    file = FILES[name]
    place = os.environ.get(PLACE, '').rstrip('/')
    mirror = '://' in place
    cache = cache_folder()
    source = (Path(place).expanduser() if place and not mirror else cache) / file
    url = f'{place if mirror else BASE_URL}/{file}'
    result = (cache / file).with_suffix('.pth')
    try:
        if source.parent == cache:
            download(url, source, lambda file: _read(file, name))
        _check_present(source)
        size, digest = source.stat().st_size, sha256(source)
        if not _made_from(digest, result):
            with alone(result):
                if not _made_from(digest, result):
                    _convert(source, digest, result, name)
    except (OSError, UserError) as error:
        raise UserError(
            f'{error}. What to do: fetch {BASE_URL}/{file} on a machine with '
            f'network, and put it into {cache}, or into a folder that the environment '
            f'variable {PLACE} names'
        ) from None
    print_log(
        f'{address} is {url}: {source}, {size / 1e6:.1f} MB, sha256 {digest}',
        logger='current',
    )
    return result


def _check_present(source: Path) -> None:
    if not source.is_file():
        found = ', '.join(
            sorted(file.name for file in source.parent.glob('*.pdparams'))
        )
        raise UserError(f'{source} does not exist (there: {found or "no .pdparams"})')


def _made_from(digest: str, result: Path) -> bool:
    """Whether a converted file is there, whole, and of the source with this sha256."""
    if not result.is_file():
        return False
    try:
        meta = torch.load(result, 'cpu', weights_only=True)['meta']
        return meta['converted_from']['sha256'] == digest
    except Exception:  # whatever it is, it is made again
        return False


def _read(path: Path, name: str) -> dict[str, Tensor]:
    """The weights of a file, if they are those of the model ``name``."""
    from mmcls_involution.models import RedNet

    weights = read_pdparams(path)
    with torch.device('meta'):
        backbone = RedNet(int(name.removeprefix('RedNet')))
        head = nn.ModuleDict(dict(fc=nn.Linear(2048, 1000)))
        model = nn.ModuleDict(dict(backbone=backbone, head=head)).state_dict()
    for key in model:  # counts steps of training; nothing reads it
        if key.endswith('.num_batches_tracked'):
            weights.setdefault(key, torch.zeros((), dtype=torch.long))
    for what, names in zip(
        ('missing', 'unknown', 'of another shape'),
        Fit(model).differences(weights),
        strict=True,
    ):
        if names:
            raise UserError(
                f'{path} does not hold the weights of {name}: {len(names)} of '
                f'{len(model)} tensors are {what}, {names[0]} for one'
            )
    return weights


def _convert(source: Path, digest: str, result: Path, name: str) -> None:
    meta = dict(
        mmcls_involution_version=__version__,
        converted_from=dict(name=source.name, sha256=digest),
    )
    save(dict(meta=meta, state_dict=_read(source, name)), result)
