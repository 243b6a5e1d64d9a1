"""Train a detector, a segmenter or a classifier: any config of MMDetection,
MMSegmentation or MMPretrain, on a GPU or on the CPU.

    python tools/train.py CONFIG [--work-dir DIR] [--resume [CHECKPOINT]] [--amp] ...

Several GPUs or machines: dist_train.sh, slurm_train.sh.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import time
import zipfile
from pathlib import Path

import preflight
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner
from preflight import UserError

from mmcls_involution import compat


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Train the model of a config.', epilog=preflight.PRECEDENCE
    )
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='go on from this checkpoint, or without a value from the newest one in '
        'the work dir, if there is one',
    )
    parser.add_argument(
        '--amp', action='store_true', help='train in mixed precision (needs a GPU)'
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by the batch size over all GPUs, relative to '
        'auto_scale_lr.base_batch_size of the config',
    )
    parser.add_argument(
        '--no-validate', action='store_true', help='do not evaluate while training'
    )
    preflight.add_common_arguments(parser)
    return parser.parse_args()


def apply_flags(cfg: Config, args: argparse.Namespace) -> None:
    """Write the flags of training into the config."""
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.auto_scale_lr:
        # MMPretrain's configs give the batch size alone, MMDetection's also `enable`.
        if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
            raise UserError(
                '--auto-scale-lr: the config does not say for which batch size its '
                'learning rate is. Add auto_scale_lr=dict(base_batch_size=...).'
            )
        cfg.auto_scale_lr.enable = True
    use_amp(cfg, args.amp)

    if args.resume not in (None, 'auto'):
        preflight.check_checkpoint(args.resume, '--resume')
        cfg.resume, cfg.load_from = True, args.resume
    elif args.resume == 'auto' or (cfg.get('resume') and not cfg.get('load_from')):
        latest = latest_checkpoint(Path(cfg.work_dir))
        cfg.resume = latest is not None
        if latest is None:
            print_log(f'Nothing to resume in {cfg.work_dir}: training starts anew')
        else:
            cfg.load_from = str(latest)


def use_amp(cfg: Config, requested: bool) -> None:
    """Choose the optimizer wrapper for ``--amp`` and for what the machine has."""
    wrapper = cfg.get('optim_wrapper') or {}
    kind = wrapper.get('type', 'OptimWrapper')
    if requested and get_device() == 'cpu':
        raise UserError(
            '--amp needs a GPU, and torch sees none. Without the flag the CPU trains '
            'in float32.'
        )
    if requested and kind == 'AmpOptimWrapper':
        print_log('--amp: the config uses AMP already', level=logging.WARNING)
    elif requested and kind == 'OptimWrapper':
        wrapper.update(type='AmpOptimWrapper', loss_scale='dynamic')
    elif requested:
        raise UserError(
            f'--amp replaces an OptimWrapper, and the config has a {kind}. Set the '
            'precision in the config.'
        )
    elif kind == 'AmpOptimWrapper' and get_device() == 'cpu':
        print_log(
            'The config uses AMP, which needs a GPU; the CPU trains in float32',
            level=logging.WARNING,
        )
        wrapper['type'] = 'OptimWrapper'
        for argument in ('loss_scale', 'dtype', 'use_fsdp'):
            wrapper.pop(argument, None)


def latest_checkpoint(work_dir: Path) -> Path | None:
    """The newest complete checkpoint of a work dir, or None.

    ``last_checkpoint`` names it. That file may be out of date if the folder was moved
    or the run was killed, and a checkpoint being written then is cut short.
    """
    candidates = sorted(
        [*work_dir.glob('epoch_*.pth'), *work_dir.glob('iter_*.pth')],
        key=lambda file: file.stat().st_mtime,
        reverse=True,
    )
    pointer = work_dir / 'last_checkpoint'
    if pointer.is_file():
        candidates.insert(0, Path(pointer.read_text().strip()))
    for file in candidates:
        if zipfile.is_zipfile(file):
            return file
        print_log(f'Passed over {file}, missing or cut short', level=logging.WARNING)
    return None


def set_aside_checkpoints(runner: Runner) -> None:
    """Move the checkpoints of an earlier run out of the way of this one.

    A run that does not go on from its work dir would overwrite them one by one.
    """
    work_dir = Path(runner.work_dir)
    starts = preflight.starting_points(runner.cfg)
    earlier = sorted(work_dir.glob('*.pth'))
    if not earlier:
        return
    for key, start in starts.items():
        if Path(start).absolute().parent != work_dir:
            continue
        if runner.cfg.get('resume'):
            return
        raise UserError(
            f"{key} is a checkpoint in this run's own work dir {work_dir}, which "
            'training would overwrite. Give another --work-dir, or go on with --resume.'
        )
    folder = work_dir / time.strftime('earlier_%Y%m%d_%H%M%S')
    folder.mkdir()
    for file in [*earlier, work_dir / 'last_checkpoint']:
        if file.exists():
            shutil.move(file, folder)
    runner.logger.warning(
        f'{work_dir} holds the checkpoints of an earlier run: moved to {folder}. '
        '(To go on from them, use --resume.)'
    )


class LossCheck(Hook):
    """Stop at a loss that is not finite, before a checkpoint of it is written.

    With dynamic loss scaling such a step is skipped and the scale lowered, so only a
    long row of them is an error.
    """

    priority = 'VERY_HIGH'
    patience = 50

    def __init__(self) -> None:
        self.row = 0

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict = None,
        outputs: dict | None = None,
    ) -> None:
        losses = {
            key: value.detach()
            for key, value in (outputs or {}).items()
            if 'loss' in key and torch.is_tensor(value)
        }
        if all(torch.isfinite(value).all() for value in losses.values()):
            self.row = 0
            return
        self.row += 1
        if hasattr(runner.optim_wrapper, 'loss_scaler') and self.row < self.patience:
            return
        values = ', '.join(f'{key} {value.mean():.4g}' for key, value in losses.items())
        rates = [f'{lr:.3g}' for lr in runner.optim_wrapper.get_lr()['lr']]
        raise UserError(
            f'The loss is not finite at iteration {runner.iter + 1}: {values}; '
            f'lr {rates[0]}. Training stopped; checkpoints in {runner.work_dir} are '
            'from before. Lower optim_wrapper.optimizer.lr, lengthen the warm-up, or '
            'clip gradients: optim_wrapper.clip_grad.max_norm=5.'
        )


def main() -> None:
    args = parse_args()
    compat.apply()
    with preflight.one_message_per_error():
        cfg = preflight.load_config(args)
        apply_flags(cfg, args)
        preflight.check(cfg, ('train', 'val'))
        runner = preflight.build_runner(cfg)
        runner.register_hook(LossCheck())
        runner.register_hook(preflight.WeightsCheck(complete=False))
        if is_main_process():
            set_aside_checkpoints(runner)
        runner.train()
        print_log(f'Done. Checkpoints and logs: {runner.work_dir}', logger='current')


if __name__ == '__main__':
    main()
