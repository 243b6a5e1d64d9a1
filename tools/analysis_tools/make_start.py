"""Write the untrained weights of a config, with another start of its involutions.

    python tools/analysis_tools/make_start.py CONFIG OUT.pth --scale 0.1 --bias identity

For studies of what a RedNet should be before training (docs/initialization.md): the
weights of the last convolution of the kernel generators are the official ones times
`--scale`, its bias is that of `--bias`. Train from it with
`--cfg-options load_from=OUT.pth`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.config import DictAction
from mmengine.logging import MMLogger
from mmengine.registry import MODELS
from mmengine.runner import set_random_seed
from torch import nn

import mmcls_involution.models  # noqa: F401  (registers them)
from mmcls_involution import compat
from mmcls_involution.engine.config import read_config
from mmcls_involution.engine.errors import UserError, one_message_per_error
from mmcls_involution.ops import Involution2d

BIASES = ('identity', 'random', 'random3', 'zero')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config')
    parser.add_argument('out', type=Path)
    parser.add_argument(
        '--scale', type=float, default=1.0, help='of the weights (default: 1)'
    )
    parser.add_argument(
        '--bias',
        choices=BIASES,
        default='zero',
        help='1 at the middle tap and 0 elsewhere; normal with standard deviation 1 / '
        'kernel size, so that the energy of a kernel is 1; the same of the middle 3x3 '
        'taps alone, as of a depthwise convolution; 0 (default, and official)',
    )
    parser.add_argument(
        '--parts',
        nargs='+',
        default=[''],
        metavar='NAME',
        help='beginnings of names of modules, such as backbone.stem or neck; others '
        'start as the config says (default: all)',
    )
    parser.add_argument('--seed', type=int, default=0, help='default: 0')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    return parser.parse_args()


@torch.no_grad()
def restart(
    model: nn.Module, scale: float, bias: str, parts: Sequence[str] = ('',)
) -> list[str]:
    """Give the generators of a model another start, in place.

    Args:
        model: With involutions whose generator ends in a convolution with a bias.
        scale: Factor of He's normal initialization of that convolution's weights.
        bias: One of ``'identity'``, ``'random'``, ``'random3'`` and ``'zero'``; see
            ``--bias``.
        parts: Beginnings of the names of involutions. Defaults to ``('',)``: all.

    Returns:
        The names of the involutions that were changed.
    """
    changed = []
    for name, module in model.named_modules():
        if not isinstance(module, Involution2d) or not name.startswith(tuple(parts)):
            continue
        span = module.conv2.conv
        nn.init.kaiming_normal_(span.weight, mode='fan_out', nonlinearity='relu')
        span.weight.mul_(scale)
        nn.init.zeros_(span.bias)
        size = module.kernel_size
        taps = span.bias.unflatten(0, (-1, size, size))
        if bias == 'random':
            nn.init.normal_(taps, std=1 / size)
        elif bias == 'random3':
            border = max(size - 3, 0) // 2
            middle = taps[:, border : size - border, border : size - border]
            nn.init.normal_(middle, std=1 / min(size, 3))
        elif bias == 'identity':
            taps[:, size // 2, size // 2] = 1
        changed.append(name)
    return changed


def main() -> None:
    args = parse_args()
    compat.apply()
    cfg = read_config(args.config, args.cfg_options)
    set_random_seed(args.seed)
    with MODELS.switch_scope_and_registry(cfg.default_scope) as registry:
        model = registry.build(cfg.model)
    # Below that level MMEngine says how each parameter starts, before it is changed.
    MMLogger.get_current_instance().setLevel('WARNING')
    model.init_weights()
    changed = restart(model, args.scale, args.bias, args.parts)
    if not changed:
        raise UserError(f'No involution of {args.config} is in {args.parts}')
    torch.save(dict(state_dict=model.state_dict()), args.out)
    print(*changed, sep='\n')
    print(f'{len(changed)} involutions: weights x {args.scale}, bias {args.bias}')


if __name__ == '__main__':
    with one_message_per_error():
        main()
