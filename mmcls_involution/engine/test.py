"""Test a checkpoint: metrics, predictions and pictures, for any config of
MMDetection, MMSegmentation or MMPretrain, on a GPU or on the CPU.

    python -m mmcls_involution test CONFIG CHECKPOINT [--show-dir DIR] [--out FILE] ...
"""

from __future__ import annotations

import argparse
import contextlib
from copy import deepcopy
from pathlib import Path

import mmengine
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.evaluator import DumpResults
from mmengine.logging import print_log
from mmengine.registry import METRICS

from mmcls_involution.engine.checks import check
from mmcls_involution.engine.config import (
    add_common_arguments,
    build_runner,
    check_output,
    is_called,
    load_config,
)
from mmcls_involution.engine.errors import UserError
from mmcls_involution.engine.hooks import WeightsCheck
from mmcls_involution.engine.samples import samples_by_name
from mmcls_involution.weights.files import check_checkpoint

PICKLES = ('.pkl', '.pickle')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument('config', help='file, or name of a config of this package')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument(
        '--out',
        help='save the predictions to this .pkl file; or, of a segmenter, the label '
        'maps to this folder; or, with --out-item metrics, the metrics to this .json, '
        '.yaml or .pkl file',
    )
    parser.add_argument(
        '--out-item',
        choices=('pred', 'metrics'),
        default='pred',
        help='what --out saves (default: pred)',
    )
    parser.add_argument('--show', action='store_true', help='show the pictures')
    parser.add_argument('--show-dir', help='draw the predictions into this folder')
    parser.add_argument(
        '--interval',
        type=int,
        default=1,
        help='draw every n-th batch (segmenters) or image (classifiers); detectors '
        'draw all (default: 1)',
    )
    parser.add_argument(
        '--wait-time',
        type=float,
        default=2,
        help='seconds that --show shows a picture (default: 2)',
    )
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    parser.add_argument(
        '--amp', action='store_true', help='test in mixed precision (needs a GPU)'
    )
    add_common_arguments(parser)


def apply_flags(cfg: Config, args: argparse.Namespace) -> None:
    """Write the flags of testing into the config."""
    check_checkpoint(args.checkpoint, 'checkpoint')
    cfg.load_from, cfg.resume = args.checkpoint, False
    check(cfg, ('test',))
    if args.amp:
        if get_device() == 'cpu':
            raise UserError(
                '--amp needs a GPU, and torch sees none. Without the flag the CPU '
                'tests in float32.'
            )
        cfg.test_cfg.fp16 = True
    if args.show or args.show_dir:
        draw_predictions(cfg, args)
    if args.tta:
        if cfg.default_scope == 'mmpretrain' and (args.show or args.show_dir):
            raise UserError(
                '--tta: MMPretrain cannot draw augmented pictures; leave --show out'
            )
        use_tta(cfg)
    if args.out and not saves_file(args):
        evaluators = cfg.test_evaluator
        for evaluator in evaluators if isinstance(evaluators, list) else [evaluators]:
            evaluator.output_dir = args.out
            if is_called(evaluator.get('type'), 'CityscapesMetric', METRICS):
                evaluator.keep_results = True


def saves_file(args: argparse.Namespace) -> bool:
    """Whether ``--out`` is a file, not the folder of a segmenter's label maps."""
    return Path(args.out).suffix in PICKLES or args.out_item == 'metrics'


def check_out(cfg: Config, args: argparse.Namespace) -> None:
    """Refuse an ``--out`` that could not be written, before the test is run."""
    if not args.out:
        if args.out_item == 'metrics':
            raise UserError('--out-item metrics needs --out FILE')
        return
    known = Path(args.out).suffix in ('.json', '.yaml', '.yml', *PICKLES)
    if args.out_item == 'metrics' and not known:
        raise UserError(f'--out {args.out}: metrics go to a .json, .yaml or .pkl file')
    if not saves_file(args) and cfg.default_scope != 'mmseg':
        raise UserError(f'--out {args.out}: predictions go to a .pkl file')
    if saves_file(args):
        out = Path(args.out)
        with contextlib.suppress(OSError):
            out.parent.mkdir(parents=True, exist_ok=True)  # as MMEngine would
        check_output(out, '--out', in_place=True)


def draw_predictions(cfg: Config, args: argparse.Namespace) -> None:
    """Switch the visualization hook on; the three toolboxes name its options apart."""
    hook = (cfg.get('default_hooks') or {}).get('visualization')
    if not hook:
        raise UserError(
            '--show and --show-dir need a visualization hook in default_hooks, such as '
            'visualization=dict(type="DetVisualizationHook") for a detector.'
        )
    if args.interval < 1:
        raise UserError(f'--interval must be at least 1, got {args.interval}.')
    hook.update(show=args.show, wait_time=args.wait_time)
    folder = str(Path(args.show_dir).absolute()) if args.show_dir else None
    if cfg.default_scope == 'mmpretrain':
        hook.update(enable=True, out_dir=folder, interval=args.interval)
    elif cfg.default_scope == 'mmseg':
        hook.update(draw=True, interval=args.interval)
        if folder:
            cfg.visualizer.save_dir = folder
    else:
        hook.update(draw=True, test_out_dir=folder)


def use_tta(cfg: Config) -> None:
    """Wrap the model and replace the pipeline for test-time augmentation.

    ``tta_model`` and ``tta_pipeline`` of the config; where these are missing, flipped
    images for detectors and classifiers, as upstream's own scripts have it.
    """
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    if 'tta_model' not in cfg:
        if cfg.default_scope == 'mmdet':
            nms = dict(type='nms', iou_threshold=0.5)
            tta_cfg = dict(nms=nms, max_per_img=100)
            cfg.tta_model = dict(type='DetTTAModel', tta_cfg=tta_cfg)
        elif cfg.default_scope == 'mmpretrain':
            cfg.tta_model = dict(type='AverageClsScoreTTA')
        else:
            raise UserError('--tta needs tta_model and tta_pipeline in the config')
    if 'tta_pipeline' not in cfg:
        if cfg.default_scope not in ('mmdet', 'mmpretrain'):
            raise UserError('--tta needs tta_pipeline in the config')
        *steps, pack = deepcopy(dataset.pipeline)
        if cfg.default_scope == 'mmdet':
            # The boxes are flipped back by what the pictures' meta data say.
            pack.meta_keys = (
                'img_id',
                'img_path',
                'ori_shape',
                'img_shape',
                'scale_factor',
                'flip',
                'flip_direction',
            )
        flips = [dict(type='RandomFlip', prob=prob) for prob in (1.0, 0.0)]
        cfg.tta_pipeline = [
            *steps,
            dict(type='TestTimeAug', transforms=[flips, [pack]]),
        ]
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    dataset.pipeline = cfg.tta_pipeline


def main(args: argparse.Namespace) -> None:
    """The command ``test``."""
    cfg = load_config(args)
    check_out(cfg, args)
    apply_flags(cfg, args)
    runner = build_runner(cfg)
    runner.register_hook(WeightsCheck(complete=True))
    if args.out and args.out_item == 'pred' and saves_file(args):
        dump = DumpResults
        if cfg.default_scope == 'mmdet':  # stores masks run-length encoded
            from mmdet.evaluation import DumpDetResults as dump
        # First, so that they are written whatever becomes of the metrics.
        runner.test_evaluator.metrics.insert(0, dump(out_file_path=args.out))
    with samples_by_name(runner):
        metrics = runner.test()
    if args.out and args.out_item == 'metrics' and is_main_process():
        mmengine.dump(metrics, args.out)
    saved = 'Predictions' if args.out_item == 'pred' else 'Metrics'
    for what, path in ((saved, args.out), ('Pictures', args.show_dir)):
        if path:
            print_log(f'{what}: {path}', logger='current')
