"""Train a detector, a segmenter or a classifier: any config of MMDetection,
MMSegmentation or MMPretrain, on a GPU or on the CPU.

    python -m mmcls_involution train CONFIG [--work-dir DIR] [--resume [CHECKPOINT]] ...

Several GPUs: python -m torch.distributed.run --nproc_per_node=N -m mmcls_involution
train CONFIG --launcher pytorch. In a checkout tools/dist.sh and tools/slurm.sh do so.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import time
from collections import defaultdict
from pathlib import Path

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.logging import print_log
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import Runner

from mmcls_involution.engine.checks import check
from mmcls_involution.engine.config import (
    add_common_arguments,
    build_runner,
    is_called,
    load_config,
)
from mmcls_involution.engine.errors import UserError
from mmcls_involution.engine.hooks import LossCheck, OwnBest, WeightsCheck
from mmcls_involution.engine.loops import resume_exactly
from mmcls_involution.engine.resume import check_resume
from mmcls_involution.engine.samples import BadSamples, samples_by_name
from mmcls_involution.engine.saving import save_safely
from mmcls_involution.weights.files import (
    check_checkpoint,
    checkpoint_files,
    checkpoint_places,
    later_checkpoints,
    latest_checkpoint,
    starting_points,
    write_text,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument('config', help='file, or name of a config of this package')
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
    parser.add_argument(
        '--skip-not-finite',
        action='store_true',
        help='pass over a batch whose loss or gradient is not finite, and name it, '
        'instead of stopping there',
    )
    parser.add_argument(
        '--max-bad-samples',
        type=int,
        default=0,
        metavar='N',
        help='pass over up to N samples whose image or label is missing, damaged or '
        'does not fit the annotations, and name them; another sample takes the place '
        'of each (default 0: stop at the first one)',
    )
    add_common_arguments(parser)


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
        check_checkpoint(args.resume, '--resume')
        cfg.resume, cfg.load_from = True, args.resume
    elif args.resume == 'auto' or (cfg.get('resume') and not cfg.get('load_from')):
        latest = latest_checkpoint(Path(cfg.work_dir), cfg)
        cfg.resume = latest is not None
        if latest is None:
            print_log(f'Nothing to resume in {cfg.work_dir}: training starts anew')
        else:
            cfg.load_from = str(latest)


def use_amp(cfg: Config, requested: bool) -> None:
    """Choose the optimizer wrapper for ``--amp`` and for what the machine has."""
    wrapper = cfg.get('optim_wrapper') or {}
    kind = wrapper.get('type', 'OptimWrapper')
    amp, plain = (
        is_called(kind, name, OPTIM_WRAPPERS)
        for name in ('AmpOptimWrapper', 'OptimWrapper')
    )
    if requested and get_device() == 'cpu':
        raise UserError(
            '--amp needs a GPU, and torch sees none. Without the flag the CPU trains '
            'in float32.'
        )
    if requested and amp:
        print_log('--amp: the config uses AMP already', level=logging.WARNING)
    elif requested and plain:
        wrapper.update(type='AmpOptimWrapper', loss_scale='dynamic')
    elif requested:
        raise UserError(
            f'--amp replaces an OptimWrapper, and the config has a {kind}. Set the '
            'precision in the config.'
        )
    elif amp and get_device() == 'cpu':
        print_log(
            'The config uses AMP, which needs a GPU; the CPU trains in float32',
            level=logging.WARNING,
        )
        wrapper['type'] = 'OptimWrapper'
        for argument in ('loss_scale', 'dtype', 'use_fsdp'):
            wrapper.pop(argument, None)


def set_aside_checkpoints(runner: Runner) -> None:
    """Move the checkpoints of an earlier run out of the way of this one.

    A run that does not go on from its work dir would overwrite them one by one; one
    that goes back to an earlier of them, those after it, and until then --resume would
    take the last of these.
    """
    work_dir = Path(runner.work_dir)
    files = {*checkpoint_files(work_dir, runner.cfg)}
    for folder, template in checkpoint_places(work_dir, runner.cfg):
        # A folder in the name of the files included; the best ones are not in it.
        for place in (folder, Path(folder, template).parent):
            files |= {*place.glob('*.pth'), *place.glob('best_*')}
    earlier: dict[Path, set[str]] = defaultdict(set)
    for file in sorted(files):
        earlier[file.parent.resolve()].add(file.name)
    for key, start in starting_points(runner.cfg).items():
        file = Path(start).expanduser()
        if not earlier.keys() & {file.parent.resolve(), file.resolve().parent}:
            continue
        if runner.cfg.get('resume'):
            _set_aside_later(runner)
            return
        raise UserError(
            f"{key} is a checkpoint in this run's own work dir {file.parent}, which "
            'training would overwrite. Give another --work-dir, or go on with --resume.'
        )
    for folder, names in earlier.items():
        aside = _move(folder, [*names, 'last_checkpoint'])
        runner.logger.warning(
            f'{folder} holds the checkpoints of an earlier run: moved to {aside}. '
            '(To go on from them, use --resume.)'
        )


def _set_aside_later(runner: Runner) -> None:
    """Move the checkpoints out of the way that came after the one to go on from."""
    work_dir, start = Path(runner.work_dir), Path(runner.cfg.load_from).expanduser()
    later: dict[Path, list[str]] = defaultdict(list)
    for file in later_checkpoints(start, work_dir, runner.cfg):
        later[file.parent].append(file.name)
    if later:
        write_text(work_dir / 'last_checkpoint', str(start.absolute()))
    for folder, names in later.items():
        runner.logger.warning(
            f'{", ".join(names)} came after {start.name}, from which this run goes on: '
            f'moved to {_move(folder, names)}'
        )


def _move(folder: Path, names: list[str]) -> Path:
    """Move files of a folder into a new one in it, which is returned."""
    aside = folder / time.strftime('earlier_%Y%m%d_%H%M%S')
    aside.mkdir()
    for file in (folder / name for name in names):
        if file.exists():
            shutil.move(file, aside)
    return aside


def main(args: argparse.Namespace) -> None:
    """The command ``train``."""
    cfg = load_config(args)
    apply_flags(cfg, args)
    check(cfg, ('train', 'val'))
    save_safely(cfg)
    resume_exactly(cfg)
    if cfg.get('resume') and cfg.get('load_from'):
        check_resume(cfg)
    runner = build_runner(cfg)
    runner.register_hook(LossCheck(args.skip_not_finite))
    runner.register_hook(OwnBest())
    runner.register_hook(WeightsCheck(complete=False))
    if is_main_process():
        set_aside_checkpoints(runner)
    bad = BadSamples(
        Path(runner.work_dir), args.max_bad_samples, bool(cfg.get('resume'))
    )
    with samples_by_name(runner, bad):
        runner.train()
    bad.report()
    print_log(f'Done. Checkpoints and logs: {runner.work_dir}', logger='current')
