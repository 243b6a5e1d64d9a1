"""Convert an official checkpoint of involution into one of this package.

    python -m mmcls_involution convert SRC DST --config CONFIG

SRC is a file that the official code (mmcls 0.x, mmdet 2.x, mmseg 0.x) or a copy of it
wrote: a classifier, a detector, a segmenter, or a backbone alone, with names that begin
with `stem.`, `backbone.` or `module.`; or a classifier of PaddleClas, a .pdparams file.
It may also be the URL of such a file, or paddleclas://RedNet50.

The weights are compared, name by name and shape by shape, with the model that CONFIG
builds (a backbone alone: with its backbone), and any difference is an error, but for
involutions of smaller kernels, which are laid into larger ones. DST holds the weights
under MMEngine's names and the names of the classes; the optimizer and all else is left
out. It loads weights-only:

    python -m mmcls_involution test CONFIG DST            # a whole model
    REDNET50=DST python -m mmcls_involution train CONFIG  # a classifier or backbone

The modules of this package carry the official names, and the heads of mmdet 2.x, mmseg
0.x and mmcls 0.x those of today, so that nothing is renamed but prefixes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from mmengine.config import Config
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmcls_involution import __version__
from mmcls_involution.engine.config import (
    check_output,
    is_called,
    missing,
    read_config,
)
from mmcls_involution.engine.errors import UserError
from mmcls_involution.weights.download import cache_folder, download
from mmcls_involution.weights.files import plain, read_checkpoint, save, sha256
from mmcls_involution.weights.fit import Fit, Misfit
from mmcls_involution.weights.paddleclas import SCHEME, fetch, read_pdparams

SHOWN = 20  # names per kind of difference


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument('src', help='official checkpoint: a file, URL or paddleclas://')
    parser.add_argument('dst', type=Path, help='file to write')
    parser.add_argument(
        '--config', required=True, help='config of the model that the weights are of'
    )
    parser.add_argument('--overwrite', action='store_true', help='replace DST')


def with_prefix(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name the weights of a bare backbone as those of a whole model's backbone."""
    if all(re.match(r'(stem|layer\d)\.', name) for name in weights):
        return {f'backbone.{name}': value for name, value in weights.items()}
    return weights


def describe(weights: dict[str, Tensor]) -> str:
    """Say which RedNet the weights are of, and which parts of a model they fill."""
    from mmcls_involution.models import RedNet

    names = (re.match(r'backbone\.layer(\d)\.(\d+)\.', name) for name in weights)
    blocks = {match.groups() for match in names if match}
    numbers = Counter(stage for stage, _ in blocks)
    sizes = {stages: depth for depth, stages in RedNet.arch_settings.items()}
    depth = sizes.get(tuple(numbers[stage] for stage in sorted(numbers)), '?')
    kernel, stem = '?', 'backbone.stem.1.conv{}.conv.weight'
    shapes = [weights[n].shape for i in (1, 2) if (n := stem.format(i)) in weights]
    if len(shapes) == 2 and all(len(shape) == 4 and 0 not in shape for shape in shapes):
        # K*K elements for each group of 16 channels
        kernel = round((shapes[1][0] * 16 / shapes[0][1]) ** 0.5)
    parts = dict.fromkeys(name.split('.')[0] for name in weights)
    return f'RedNet-{depth}, stem_kernel_size {kernel}; {", ".join(parts)}'


def load_strictly(model: nn.Module, weights: dict[str, Tensor], prefix: str) -> int:
    """Load weights that must be the model's, all of them and no others.

    Batch norm's ``num_batches_tracked`` may be missing: torch has it since 0.4.1, and
    nothing but ``momentum=None`` reads it. It keeps the model's 0.

    Args:
        model (nn.Module): The model.
        weights (dict[str, Tensor]): Its weights, names with ``prefix``.
        prefix (str): What the names begin with in addition to the model's.

    Returns:
        int: Number of batch norm counters that were missing.

    Raises:
        Misfit: If the weights are of another stem.
        UserError: If a name is missing, too many, or of another shape. The message
            lists them.
    """
    weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    fit = Fit(model.state_dict(keep_vars=True))
    with contextlib.suppress(RuntimeError):  # listed below, beside the rest
        model.load_state_dict(weights, strict=False)
    missing, unknown, reshaped = fit.differences(weights)
    # torch itself fills them for files that say no version.
    counters = [
        name
        for name in fit.tensors
        if name.endswith('.num_batches_tracked') and name not in weights
    ]
    differences = {
        'missing': [prefix + name for name in missing if name not in counters],
        'of no use': [prefix + name for name in unknown],
        'of another shape': [
            f'{prefix}{name} is {tuple(weights[name].shape)}, the model has '
            f'{tuple(fit.tensors[name].shape)}'
            for name in reshaped
        ],
    }
    if any(differences.values()):
        lines = []
        for what, names in differences.items():
            if names:
                lines += [f'{len(names)} {what}:', *(f'  {n}' for n in names[:SHOWN])]
                if len(names) > SHOWN:
                    lines.append(f'  ... and {len(names) - SHOWN} more')
        raise UserError('the weights do not fit the model.\n' + '\n'.join(lines))
    return len(counters)


def hint(weights: dict[str, Tensor], cfg: Config) -> str:
    """What to do about weights that are of another kind of model than the config."""
    theirs = {name.split('.')[0] for name in weights}
    if 'head' in theirs and cfg.default_scope != 'mmpretrain':
        return (
            'These are weights of a classifier. Convert them with its config, '
            'configs/imagenet/...; detectors and segmenters start from its backbone '
            '(the environment variable REDNET50).'
        )
    if 'backbone' not in theirs:
        return (
            'No name begins with stem., layer1., backbone. or module.: these are no '
            'weights of RedNet.'
        )
    return (
        '--config must be the config of the very model: same depth, same number of '
        'classes, involution (InvolutionFPN, InvolutionRPNHead ...) in neck and head '
        'where the official one has it.'
    )


def local(src: str) -> Path:
    """The file that a path, a URL or an address of PaddleClas's weights stands for.

    Raises:
        UserError: If there is no such file, or it cannot be downloaded.
    """
    if src.startswith(SCHEME):
        return fetch(src)
    if '://' not in src:
        if message := missing(Path(src), 'the input'):
            raise UserError(message)
        return Path(src)
    # By the whole address: many a file is called latest.pth.
    folder = cache_folder() / hashlib.sha256(src.encode()).hexdigest()[:16]
    path = folder / Path(urlparse(src).path).name
    download(src, path, reader(path))
    return path


def reader(path: Path) -> Callable[[Path], dict[str, Any]]:
    """What reads files of the kind that a name says."""
    if path.suffix == '.pdparams':
        return lambda file: dict(state_dict=read_pdparams(file))
    return read_checkpoint


def convert(src: Path, dst: Path, cfg: Config) -> None:
    """Write the weights of ``src`` to ``dst`` if they are the ones ``cfg`` needs.

    Raises:
        UserError: If they are not; ``dst`` is then left as it was.
    """
    checkpoint = reader(src)(src)
    weights = with_prefix(checkpoint['state_dict'])
    digest = sha256(src)
    print(f'source  {src}\n        sha256 {digest}\n        {describe(weights)}')
    if named := re.search(r'-([0-9a-f]{8})\.pth$', src.name):
        if digest.startswith(named[1]):
            print('        the published file: its name has the hash of its content')
        else:
            print(
                f'        not the published file {src.name}: the hash of that one '
                f'begins with {named[1]}'
            )

    alone = all(name.startswith('backbone.') for name in weights)
    prefix = 'backbone.' if alone else ''
    model = MODELS.build(cfg.model.backbone if alone else cfg.model)
    try:
        counters = load_strictly(model, weights, prefix)
    except (UserError, Misfit) as error:
        # The stem's reason names its own remedy.
        advice = f'\n{hint(weights, cfg)}' if isinstance(error, UserError) else ''
        raise UserError(f'{src} and {cfg.filename}: {error}{advice}') from None
    state = {prefix + name: value for name, value in model.state_dict().items()}
    print(f'fits    {cfg.filename}{", its backbone alone" if alone else ""}')
    print(f'        {len(state)} tensors')
    if counters:
        print(f'        {counters} x num_batches_tracked was missing: set to 0')

    meta = checkpoint.get('meta', {})
    classes = {
        new: plain(meta[old])
        for old, new in (('CLASSES', 'classes'), ('PALETTE', 'palette'))
        if isinstance(meta.get(old), list | tuple)
    }
    published = dict(
        mmcls_involution_version=__version__,
        converted_from=meta.get('converted_from') or dict(name=src.name, sha256=digest),
    )
    if classes:  # of which libraries make labels; without it they guess
        published['dataset_meta'] = classes
    save(dict(meta=published, state_dict=state), dst)
    print(f'result  {dst}\n        sha256 {sha256(dst)}')


def main(args: argparse.Namespace) -> None:
    """The command ``convert``."""
    check_output(args.dst)
    if args.dst.exists() and not args.overwrite:
        raise UserError(f'{args.dst} exists: name another file, or --overwrite it')
    cfg = read_config(args.config)
    kind = (cfg.get('model') or {}).get('backbone', {}).get('type')
    if not is_called(kind, 'RedNet', MODELS):
        raise UserError(
            f'{args.config} has no model with the backbone RedNet: name the config '
            'of the model that the weights are of'
        )
    convert(local(args.src), args.dst, cfg)
