"""What is looked at before a runner is built: the config's parts, weights, data."""

from __future__ import annotations

import logging
from collections import defaultdict

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import OPTIMIZERS

from mmcls_involution.data.checks import check_split_quickly
from mmcls_involution.data.rules import RULES
from mmcls_involution.engine.config import registered
from mmcls_involution.engine.errors import UserError, did_you_mean
from mmcls_involution.weights.files import check_checkpoint, starting_points

# What the runner builds its loops from: all of a row, or none.
PARTS = {
    'model': ('model',),
    'train': ('train_dataloader', 'train_cfg', 'optim_wrapper'),
    'val': ('val_dataloader', 'val_cfg', 'val_evaluator'),
    'test': ('test_dataloader', 'test_cfg', 'test_evaluator'),
}


def check(cfg: Config, splits: tuple[str, ...]) -> None:
    """Look for what would stop or spoil the run.

    Args:
        cfg: The complete config.
        splits: Which of ``train``, ``val`` and ``test`` the run uses.

    Raises:
        UserError: If a part of the config or a checkpoint is missing, an optimizer is
            misspelt, or a quick rule about data is broken.
    """
    for split, parts in PARTS.items():
        absent = [part for part in parts if cfg.get(part) is None]
        # Validation may be left out, but not in part.
        needed = split == 'model' or (split in splits and split != 'val')
        if absent and (needed or len(absent) < len(parts)):
            raise UserError(
                f'The config has no {absent[0]!r}.{did_you_mean(absent[0], cfg)} It '
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
        found = defaultdict(list)
        for finding in check_split_quickly(cfg, split):
            found[finding.rule].append(finding)
        for rule in sorted(found, key=list(RULES).index):
            first, *more = found[rule]
            message = first.message
            if more:
                message += (
                    f' {len(more)} more like this: `python -m mmcls_involution check` '
                    'lists them.'
                )
            if RULES[rule].quick:
                raise UserError(message)
            if RULES[rule].warns:
                print_log(message, level=logging.WARNING)


def _warn_of_frozen_noise(cfg: Config) -> None:
    """Name settings for pre-trained weights that are left over where there are none."""
    backbone = cfg.model.get('backbone') or {}
    if backbone.get('init_cfg') or cfg.model.get('pretrained'):
        return
    # Of the whole model: load_from, or its own init_cfg.
    if any(
        key.startswith(('load_from', 'model.init_cfg')) for key in starting_points(cfg)
    ):
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
