"""Write a trained model as a file for ONNX Runtime and others, or for PyTorch alone.

    python -m mmcls_involution export CONFIG [CHECKPOINT] --out model.onnx ...

The file takes normalized images [N, 3, H, W], float32, and gives

- of a classifier logits [N, classes];
- of a segmenter logits [N, classes, H, W];
- of a detector with --boxes dets [N, K, 5], labels [N, K] and of Mask R-CNN masks;
  else what its heads say of each level, and of a two-stage one the features:
  mmcls_involution.deployment.detections makes boxes of them, with MMDetection;
- with --backbone the features of each stage.

Before the command says done it runs the file, at several odd sizes if it is --dynamic,
and compares every output with PyTorch's: 1e-5 of the largest value is allowed. Boxes
are compared with those that MMDetection makes of the same maps.
Classes, mean, std and the order of the channels are in the file's metadata; of pt2
they are its extra files.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import TRANSFORMS
from torch import Tensor

from mmcls_involution.apis.inferencer import build_inferencer, class_names
from mmcls_involution.console import console
from mmcls_involution.deployment.boxes import BOXES, WithBoxes, check_boxes
from mmcls_involution.deployment.nodes import BOXES_OPSET, LOWEST_OPSET, translations
from mmcls_involution.deployment.runtime import register_custom_operators
from mmcls_involution.deployment.wrappers import TOLERANCE, Exported, difference
from mmcls_involution.engine.config import (
    add_cfg_options,
    check_output,
    dicts,
    is_called,
)
from mmcls_involution.engine.errors import UserError
from mmcls_involution.flops import SHAPES
from mmcls_involution.ops import standard

# What torch's exporters write.
OPSETS = {'torchscript': (LOWEST_OPSET, 20), 'dynamo': (18, 23)}


def need(*packages: str) -> None:
    """Check that packages can be imported.

    Raises:
        UserError: If one is not installed.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f'ONNX needs {", ".join(missing)}, which is not installed: pip install '
            f'{" ".join(missing)}. --format pt2 needs none of these.'
        )


def export_onnx(
    model: Exported,
    image: Tensor,
    file: Path,
    *,
    dynamic: bool = False,
    opset: int = 18,
    exporter: str = 'torchscript',
    operator: str = 'standard',
) -> None:
    """Write a model as ONNX.

    Args:
        model (Exported): What to write.
        image (Tensor): An example, ``[N, 3, H, W]``.
        file (Path): Where to.
        dynamic (bool): Whether N, H and W may be others. Defaults to False.
        opset (int): Of ONNX's operators. Defaults to 18.
        exporter (str): ``'torchscript'`` or ``'dynamo'``, torch's two. Defaults to
            ``'torchscript'``.
        operator (str): ``'standard'``, or ``'custom'`` for this package's own, which
            :func:`register_custom_operators` makes known to ONNX Runtime. Defaults to
            ``'standard'``.

    Raises:
        UserError: If torch cannot write the model.
    """
    with torch.no_grad():
        names = model.names(model(image))
    options: dict[str, Any] = dict(
        input_names=['image'], output_names=names, opset_version=opset
    )
    axes = {0: 'batch', 2: 'height', 3: 'width'}
    if exporter == 'dynamo':
        options.update(dynamo=True, verbose=False)
        options['custom_translation_table'] = translations(operator)
        if dynamic:
            any_size = dict.fromkeys(axes, torch.export.Dim.DYNAMIC)
            options['dynamic_shapes'] = (any_size,)
    else:
        options['dynamo'] = False
        if dynamic:
            options['dynamic_axes'] = {'image': axes} | {
                name: model.axes(name) for name in names
            }
    # TorchScript's exporter sees the standard form, the other one is given it.
    seen = exporter == 'torchscript' and operator == 'standard'
    kept = nullcontext() if seen else standard.kept()
    fixed = nullcontext() if dynamic else standard.fixed_sizes()
    with _silent(), kept, fixed:
        try:
            if exporter == 'dynamo':
                proto = torch.onnx.export(model, (image,), **options).model_proto
            else:
                torch.onnx.export(model, (image,), str(file), **options)
        except RuntimeError as error:  # torch.onnx's own are such too
            raise UserError(
                f'torch cannot write this model by --exporter {exporter} in opset '
                f'{opset}: {str(error).strip().splitlines()[0]} Another --opset or '
                '--exporter may do, or --format pt2.'
            ) from error
    if exporter == 'dynamo':
        import onnx

        # The sizes between layers that torch 2.11 writes hold for some sizes of images
        # alone, and ONNX Runtime relies on them: it infers its own.
        if dynamic:
            del proto.graph.value_info[:]
        onnx.save(proto, file)


@contextmanager
def _silent() -> Iterator[None]:
    """No warnings of tracing: what comes out is compared."""
    logger = logging.getLogger('onnx_ir')
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logger.setLevel(level)


def export_pt2(
    model: Exported,
    image: Tensor,
    file: Path,
    *,
    dynamic: bool,
    decompose: bool,
    about: dict[str, str] | None = None,
) -> None:
    """Write a model for ``torch.export.load``.

    Args:
        model, image, file, dynamic: See :func:`export_onnx`.
        decompose (bool): Into torch's own operators; else involution stays one, and who
            loads the file imports ``mmcls_involution.ops`` first.
        about (dict[str, str], optional): Extra files of the archive. Defaults to None.

    Raises:
        UserError: If torch cannot write the model.
    """
    shapes = None
    if dynamic:
        any_size = torch.export.Dim.DYNAMIC
        shapes = ({0: any_size, 2: any_size, 3: any_size},)
    try:
        with torch.no_grad():
            program = torch.export.export(model, (image,), dynamic_shapes=shapes)
    except (RuntimeError, ValueError) as error:  # torch.export's own are such too
        why = ' '.join(str(error).strip().splitlines()[:2]).strip()
        raise UserError(
            f'torch cannot write this model as pt2: {why} '
            f'{"Without --dynamic, or with" if dynamic else "With"} --format onnx, it '
            'may do.'
        ) from error
    if decompose:
        forms = dict(
            involution2d=standard.involution2d,
            fused_involution2d=standard.fused_involution2d,
            involution2d_grad_weight=standard.grad_of_weight,
        )
        if dynamic:
            forms['involution2d'] = standard.involution2d_by_rows
            forms['fused_involution2d'] = standard.fused_involution2d_by_rows
        program = program.run_decompositions(
            {  # without the last argument, the backend
                getattr(torch.ops.mmcls_involution, name).default: (
                    lambda *arguments, form=form: form(*arguments[:-1])
                )
                for name, form in forms.items()
            }
        )
    torch.export.save(program, file, extra_files=about)


def load(
    file: Path, form: str, threads: int = 0, operator: str = 'standard'
) -> Callable[[Tensor], list[Tensor]]:
    """A function that runs an exported file.

    Args:
        file (Path): From :func:`export_onnx` or :func:`export_pt2`.
        form (str): ``'onnx'`` or ``'pt2'``.
        threads (int): Of ONNX Runtime; 0 for its default. Defaults to 0.
        operator (str): See :func:`export_onnx`. Defaults to ``'standard'``.
    """
    if form == 'pt2':
        module = torch.export.load(file).module()

        def run(image: Tensor) -> list[Tensor]:
            with torch.no_grad():
                return list(module(image))

        return run
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    options.intra_op_num_threads = threads
    # Else its threads go on to wait for work, at full speed, when it is others' turn.
    options.add_session_config_entry('session.force_spinning_stop', '1')
    if operator == 'custom':
        register_custom_operators(options)
    session = onnxruntime.InferenceSession(
        str(file), options, providers=['CPUExecutionProvider']
    )
    return lambda image: [
        torch.from_numpy(out) for out in session.run(None, {'image': image.numpy()})
    ]


def _outputs(model: Exported, image: Tensor) -> tuple[Tensor, ...]:
    try:
        with torch.no_grad():
            return model(image)
    # Of a pool or convolution that nothing is left for, or a norm over one value; U-Net
    # asserts that its strides divide the sides.
    except (RuntimeError, ValueError, AssertionError) as error:
        height, width = image.shape[2:]
        raise UserError(
            f'The model does not take an image of {height}x{width}: {error}. Give a '
            'larger --shape, or one that its strides divide; with --dynamic half its '
            'sides are tried too, and odd ones.'
        ) from error


def compare(
    model: Exported,
    run: Callable[[Tensor], list[Tensor]],
    shapes: Sequence[tuple],
    check: Callable[[list[Tensor], list[Tensor], Sequence[int]], None] | None = None,
) -> float:
    """The largest difference of a file's outputs and the model's, over their scale.

    Args:
        model (Exported): What the file is compared with.
        run (Callable): The file, from :func:`load`.
        shapes (Sequence[tuple]): Of images, ``[N, 3, H, W]``.
        check (Callable, optional): Is given what the file has before the outputs of
            `model`, those, and height and width. Defaults to None: it has no more.

    Raises:
        UserError: If it is above 1e-5, a shape differs, or an image is too small.
    """
    worst = 0.0
    for shape in shapes:
        image = torch.randn(shape)
        expected = _outputs(model, image)
        try:
            found = run(image)
        except Exception as error:  # a runtime's own classes
            raise UserError(
                f'The exported model does not run on {list(shape)}: {error}'
            ) from error
        more = len(found) - len(expected) if check else 0
        boxes, maps = found[:more], found[more:]
        for name, ours, theirs in zip(
            model.names(expected), expected, maps, strict=True
        ):
            if ours.shape != theirs.shape:
                raise UserError(
                    f'The exported model gives {name} {list(theirs.shape)} for an '
                    f'image {list(shape)}, PyTorch {list(ours.shape)}.'
                )
            apart = difference(ours, theirs)
            worst = max(worst, apart)
            if not apart <= TOLERANCE:  # NaN too
                raise UserError(
                    f'The exported model differs from PyTorch: {name} for an image '
                    f'{list(shape)} by {apart:.1e} of its largest value; '
                    f'{TOLERANCE:g} is allowed. No file was written.'
                )
        if check:
            check(boxes, maps, shape[2:])
    return worst


def metadata(
    model: torch.nn.Module, classes: Any, size: Sequence[int]
) -> dict[str, str]:
    """What who runs the file has to know of images and classes, each as JSON."""
    preprocessor = model.data_preprocessor
    # MMPretrain's, MMDetection's and MMSegmentation's name for it.
    names = ('to_rgb', '_channel_conversion', 'channel_conversion')
    swaps = any(getattr(preprocessor, name, False) for name in names)
    found = {
        'classes': list(classes or []),
        'channel_order': 'RGB' if swaps else 'BGR',
        'size': list(size),
    }
    for key, none in (('mean', 0.0), ('std', 1.0)):  # where nothing is normalized
        values = getattr(preprocessor, key, None)
        found[key] = [none] * 3 if values is None else values.flatten().tolist()
    return {key: json.dumps(value) for key, value in found.items()}


def tested_size(cfg: Config) -> tuple[int, int]:
    """Height and width that the test pipeline of a config resizes or crops images to.

    Where it keeps the ratio of sides, that is what images are fitted into. The paper's,
    as of the command ``flops``, where it does neither.
    """
    size = SHAPES[cfg.default_scope]
    for _, step in dicts(cfg.get('test_dataloader')):
        for name, key in (('Resize', 'scale'), ('CenterCrop', 'crop_size')):
            if is_called(step.get('type'), name, TRANSFORMS) and step.get(key):
                width_height = step[key]
                if isinstance(width_height, int):
                    width_height = (width_height, width_height)
                size = tuple(width_height[::-1])
    return size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument('config', help='config file, or the name of one of ours')
    parser.add_argument('checkpoint', nargs='?', help='default: as of infer')
    parser.add_argument('--out', required=True, help='the file to write')
    parser.add_argument(
        '--format', choices=('onnx', 'pt2'), default='onnx', help='default: onnx'
    )
    parser.add_argument(
        '--shape',
        type=int,
        nargs=2,
        metavar=('HEIGHT', 'WIDTH'),
        help='of the image in pixels (default: what the config resizes to for tests)',
    )
    parser.add_argument(
        '--dynamic', action='store_true', help='any batch, height and width'
    )
    parser.add_argument('--opset', type=int, help='of ONNX (default: 18)')
    parser.add_argument(
        '--exporter',
        choices=('torchscript', 'dynamo'),
        help="which of torch's two writes ONNX (default: torchscript)",
    )
    parser.add_argument(
        '--operator',
        choices=('standard', 'custom'),
        default='standard',
        help="involution in standard operators, or as this package's own, which is "
        'faster in ONNX Runtime and unknown elsewhere; of pt2, decomposed into '
        "torch's operators or kept (default: %(default)s)",
    )
    parser.add_argument(
        '--backbone', action='store_true', help="the model's backbone alone"
    )
    parser.add_argument(
        '--boxes',
        action='store_true',
        help="of a detector boxes, by ONNX's NonMaxSuppression and RoiAlign, in place "
        "of its heads' maps",
    )
    add_cfg_options(parser)


def main(args: argparse.Namespace) -> None:
    """The command ``export``."""
    out = Path(args.out)
    _check(args, out)
    inferencer = build_inferencer(
        args.config, args.checkpoint, 'cpu', cfg_options=args.cfg_options
    )
    toolbox_model = inferencer.model
    cfg = getattr(inferencer, 'cfg', None) or inferencer.config  # MMPretrain's
    shape = args.shape or tested_size(cfg)
    # Not with the model as it is written, in which batch norms are folded. It runs
    # first, because --boxes sends those it refuses to the maps: there must be some.
    reference = Exported(toolbox_model, args.backbone, fold=False)
    image = torch.randn(2 if args.dynamic else 1, 3, *shape)
    _outputs(reference, image)  # before the exporter says it in its words
    model = (
        WithBoxes(toolbox_model, image)
        if args.boxes
        else Exported(toolbox_model, args.backbone, image=image)
    )
    tests = getattr(toolbox_model, 'test_cfg', None) or {}
    if model.kind == 'segmenter' and tests.get('mode') == 'slide':
        size = ' '.join(map(str, tests['crop_size']))
        console.print(
            f'{args.config} tests images in windows (test_cfg.mode is slide). The file '
            'takes an image as a whole, so that labels differ from those of infer and '
            f'test: give it windows of --shape {size}, and average where they overlap.',
            highlight=False,
        )
    if model.kind == 'detector' and getattr(toolbox_model, 'semantic_head', None):
        console.print(
            f'{type(toolbox_model).__name__} has a semantic_head too, which the file '
            'leaves out: detections() makes boxes and masks of its outputs, no maps of '
            'stuff. In PyTorch the head takes the outputs feature0, feature1, ...',
            highlight=False,
        )
    about = metadata(toolbox_model, class_names(inferencer), shape)
    # torch takes no archive whose name is empty up to its last point.
    partial = out.with_name(f'.{out.stem}.partial{out.suffix}')
    try:
        if args.format == 'onnx':
            export_onnx(
                *(model, image, partial),
                dynamic=args.dynamic,
                opset=args.opset,
                exporter=args.exporter,
                operator=args.operator,
            )
        else:
            decompose = args.operator == 'standard'
            kept = dict(dynamic=args.dynamic, decompose=decompose, about=about)
            export_pt2(model, image, partial, **kept)
        shapes = [tuple(image.shape)]
        if args.dynamic:
            height, width = shape
            shapes += [
                (1, 3, height // 2 * 2 + 1, max(width // 2 * 2 - 1, 1)),
                (3, 3, height // 4 * 2 + 1, width // 2 + 7),
                (1, 3, max(height - 1, 1), width // 4 * 2 + 3),
            ]
        run = load(partial, args.format, operator=args.operator)
        counts = []

        def check(boxes: list, maps: list, size: Sequence[int]) -> None:
            counts.append(check_boxes(toolbox_model, boxes, maps, size))

        worst = compare(reference, run, shapes, check if args.boxes else None)
        if args.format == 'onnx':
            _finish(partial, about, args.boxes)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    console.print(
        f'{out}: {model.kind}, {out.stat().st_size / 1e6:.1f} MB, at most {worst:.1e} '
        f'of scale from PyTorch at {", ".join("x".join(map(str, s)) for s in shapes)}'
        + (
            f'; its {sum(counts)} boxes there are those of MMDetection'
            if any(counts)
            else '; no box was compared, because there is none in noise'
            if args.boxes
            else ''
        )
    )


def _check(args: argparse.Namespace, out: Path) -> None:
    """Refuse what cannot work, before it is built; fill in ONNX's defaults."""
    if args.format == 'onnx':
        exporter = args.exporter = args.exporter or 'torchscript'
        opset = args.opset = 18 if args.opset is None else args.opset
        lowest, highest = OPSETS[exporter]
        lowest = max(lowest, BOXES_OPSET) if args.boxes else lowest
        if not lowest <= opset <= highest:
            raise UserError(
                f'--opset {opset}: --exporter {exporter} writes {lowest} to {highest}'
                f'{" with --boxes" if args.boxes else ""}.'
            )
        need('onnx', 'onnxruntime', *['onnxscript'] * (exporter == 'dynamo'))
        if args.operator == 'custom':
            import onnxruntime

            register_custom_operators(onnxruntime.SessionOptions())
    else:
        for flag in ('opset', 'exporter', 'boxes'):
            if getattr(args, flag) not in (None, False):
                raise UserError(f'--{flag} is for --format onnx.')
    if args.boxes and args.backbone:
        raise UserError('--boxes and --backbone: a backbone has no boxes.')
    check_output(out, '--out')
    if args.shape and min(args.shape) < 1:
        raise UserError('--shape: HEIGHT and WIDTH are pixels, at least 1 of each.')


def _finish(file: Path, about: dict[str, str], boxes: bool) -> None:
    """Add metadata, and with boxes take the maps out that they were compared by."""
    import onnx

    proto = onnx.load(file)
    onnx.helper.set_model_props(proto, about)
    if boxes:
        outputs = [o for o in proto.graph.output if o.name in BOXES]
        del proto.graph.output[:]
        proto.graph.output.extend(outputs)
    onnx.save(proto, file)
