"""Make a trained checkpoint small and safe to pass on.

    python -m mmcls_involution publish work_dirs/.../epoch_12.pth NAME

writes NAME-<first 8 digits of its SHA-256>.pth, the form that torch.hub verifies. It
holds the weights and the meta data (config, names of the classes, versions), and loads
weights-only in any program; optimizer, schedules and logs are left out. A checkpoint of
a run with EMAHook gives the averaged weights, as MMPretrain's script of this name does.

MMDetection's and MMPretrain's own scripts keep meta data that only loads by running
code, and write without a care for what is there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import Tensor

from mmcls_involution import __version__
from mmcls_involution.engine.config import check_output
from mmcls_involution.engine.errors import UserError
from mmcls_involution.weights.files import plain, read_checkpoint, save, sha256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument('in_file', type=Path, help='checkpoint to publish')
    parser.add_argument(
        'out_file', type=Path, help='path and name of the result, without the hash'
    )
    parser.add_argument(
        '--no-ema',
        action='store_true',
        help='of a run with EMAHook, publish the weights that are not averaged',
    )


def publish(in_file: Path, out_file: Path, ema: bool = True) -> Path:
    """Write the weights and meta data of ``in_file``.

    Args:
        in_file (Path): Checkpoint of MMEngine, or a bare state dict.
        out_file (Path): Name of the result; a ``.pth`` at its end is dropped.
        ema (bool): Of a run with EMAHook, publish the averaged weights.
            Defaults to True.

    Returns:
        Path: The file, ``<out_file>-<sha8>.pth``.

    Raises:
        UserError: If ``in_file`` holds no weights, or another file has the name of the
            result already.
    """
    checkpoint = read_checkpoint(in_file)
    weights = checkpoint['state_dict']
    averaged = checkpoint.get('ema_state_dict')
    if averaged is not None:
        # EMAHook swaps the two before it saves: here are the weights of training.
        trained = {
            name.removeprefix('module.'): value
            for name, value in (averaged if isinstance(averaged, dict) else {}).items()
            if str(name).startswith('module.') and isinstance(value, Tensor)
        }
        if not trained or not trained.keys() <= weights.keys():
            raise UserError(
                f'{in_file}: ema_state_dict is not of the model whose weights are in '
                'state_dict; MMEngine wrote no such file'
            )
        if not ema:
            weights = {**weights, **trained}
        print('EMA: the averaged weights are', 'published' if ema else 'left out')
    elif not ema:
        raise UserError(f'--no-ema: {in_file} has no ema_state_dict')

    meta = plain(checkpoint['meta'])
    meta['mmcls_involution_version'] = __version__
    stem = out_file.with_suffix('') if out_file.suffix == '.pth' else out_file
    # detached: a Parameter is not a plain tensor
    state = {name: value.detach() for name, value in weights.items()}

    def by_content(file: Path) -> Path:
        digest = sha256(file)
        final = stem.with_name(f'{stem.name}-{digest[:8]}.pth')
        if final.exists() and sha256(final) != digest:
            raise UserError(f'{final} exists and is another file: move it away')
        return final

    final = save(dict(meta=meta, state_dict=state), stem, by_content)
    left_out = sorted(map(str, checkpoint.keys() - {'meta', 'state_dict'}))
    print(f'left out: {", ".join(left_out) or "nothing"}')
    print(f'{final}\nsha256 {sha256(final)}')
    return final


def main(args: argparse.Namespace) -> None:
    """The command ``publish``."""
    check_output(args.out_file)
    publish(args.in_file, args.out_file, ema=not args.no_ema)
