"""The toolbox's own Inferencer for a config, and what all three have in common."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import mmengine
import numpy as np
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.device import get_device
from mmengine.logging import MMLogger, print_log
from mmengine.registry import DATASETS, FUNCTIONS, Registry, init_default_scope
from mmengine.runner import load_checkpoint

from mmcls_involution import models  # noqa: F401 (registers models and paddleclas://)
from mmcls_involution.engine.config import read_config, shipped
from mmcls_involution.engine.errors import UserError, did_you_mean
from mmcls_involution.paths import ROOT
from mmcls_involution.weights.files import check_checkpoint, meta_of
from mmcls_involution.weights.fit import Fit

# default_scope -> the visualizer of its Inferencer, where the config names none
VISUALIZERS = {
    'mmdet': 'DetLocalVisualizer',
    'mmseg': 'SegLocalVisualizer',
    'mmpretrain': 'UniversalVisualizer',
}


def find_config(name: str) -> tuple[str, str | None]:
    """The config file that a name means, and the weights that the hub has for it.

    Args:
        name (str): Path of a config; or, of one that comes with this package, the
            file's name or the model's name in its metafile, such as
            ``rednet50_3rdparty_in1k``.

    Raises:
        UserError: If there is none; the message names those that are close.
    """
    if Path(name).is_file():
        return name, None
    known, stem = _models(), name.removesuffix('.py')
    if stem in known:
        return known[stem]
    if file := shipped(Path(name)):
        return str(file), None
    names = {file.stem for file in (ROOT / 'configs').glob('[!_]*/*.py')}
    raise UserError(
        f'No config: {name} is no file, and no config of this package is called so.'
        + did_you_mean(Path(stem).name, names | known.keys())
    )


def _models() -> dict[str, tuple[str, str | None]]:
    """Config and weights, where there are some, of every model in a metafile."""
    return {
        model['Name']: (str(ROOT / model['Config']), model.get('Weights'))
        for metafile in sorted((ROOT / 'configs').glob('*/metafile.yml'))
        for model in mmengine.load(metafile)['Models']
    }


def hub() -> dict[str, tuple[str, str]]:
    """Config and weights of the models that come with weights, by their names."""
    return {name: pair for name, pair in _models().items() if pair[1]}


def class_names(inferencer: Any) -> Sequence[str] | None:
    """The names of the classes, as far as checkpoint or config says them."""
    meta = getattr(inferencer.model, 'dataset_meta', None) or {}
    return getattr(inferencer, 'classes', None) or meta.get('classes')


def build_inferencer(
    config: str | Path | Config,
    weights: str | None = None,
    device: str | None = None,
    cfg_options: dict | None = None,
) -> Any:
    """The Inferencer of the toolbox that a config is for.

    Args:
        config (str | Path | Config): As of :func:`find_config`; or a config that has
            been read.
        weights (str, optional): Checkpoint file, URL or address such as
            ``paddleclas://RedNet50``, read weights-only. Defaults to None: those that
            the hub has for the name, else the config's ``load_from``, else those that
            training starts from, after a warning.
        device (str, optional): Such as ``'cpu'`` or ``'cuda:0'``. Defaults to None: a
            GPU where there is one.
        cfg_options (dict, optional): Settings that override those of a config that is
            read here, such as ``{'model.test_cfg.rcnn.score_thr': 0.3}``. Defaults to
            None.

    Returns:
        mmdet.apis.DetInferencer | mmseg.apis.MMSegInferencer |
        mmpretrain.ImageClassificationInferencer: With class names and colours from the
        checkpoint, else from the config's data set, and a visualizer.

    Raises:
        UserError: If the config is not there, cannot be read, or is for no toolbox
            that has an Inferencer; if the weights are not there, or leave parameters
            of the model unfilled.
        Misfit: If the weights are of other involutions than the model's.
        pickle.UnpicklingError: If reading the weights could run code.

    Example:
        >>> from mmcls_involution.apis import build_inferencer
        >>> inferencer = build_inferencer('rednet50_3rdparty_in1k')
        >>> inferencer('photo.jpg')[0]['pred_class']
    """
    if isinstance(config, Config):
        cfg, name = config.copy(), config.filename
        init_default_scope(cfg.get('default_scope', 'mmengine'))
    else:
        name, hub = find_config(str(config))
        cfg, weights = read_config(name, cfg_options), weights or hub
    weights = weights or cfg.get('load_from')
    check_checkpoint(weights, 'checkpoint')
    scope = cfg.get('default_scope')
    if scope not in VISUALIZERS:
        raise UserError(
            f'{name} is for {scope}; there are Inferencers of {", ".join(VISUALIZERS)}.'
        )
    for key in ('model', 'test_dataloader'):
        if not cfg.get(key):
            raise UserError(f'{name} has no {key!r}, which inference needs.')
    cfg.setdefault('visualizer', dict(type=VISUALIZERS[scope]))
    cfg.visualizer.vis_backends = None  # pictures are returned, not kept
    # Loaded below, and all three in the same way: theirs keep random values for what
    # they do not find, and take COCO's or Cityscapes' classes for unknown ones.
    cfg.load_from = None
    # The toolboxes have no functions of their own, and MMEngine warns of it.
    if scope not in FUNCTIONS.children:
        where = [f'{scope}.registry']
        Registry('function', parent=FUNCTIONS, scope=scope, locations=where)
    device = device or get_device()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that no weights are loaded yet
        inferencer = _build(cfg, scope, device)
    meta = _load(inferencer.model, weights, name)
    _name_classes(inferencer, meta or _dataset_meta(cfg), scope)
    return inferencer


def _build(cfg: Config, scope: str, device: str) -> Any:
    if scope == 'mmpretrain':
        from mmpretrain import ImageClassificationInferencer
        from mmpretrain.visualization import UniversalVisualizer

        inferencer = ImageClassificationInferencer(cfg, pretrained=False, device=device)
        inferencer.visualizer = UniversalVisualizer()
        return inferencer
    if scope == 'mmseg':
        from mmseg.apis import MMSegInferencer

        return MMSegInferencer(cfg, device=device)
    from mmdet.apis import DetInferencer

    return DetInferencer(cfg, device=device, show_progress=False)


def _load(model: Any, weights: str | None, name: str) -> dict[str, Any]:
    """Load the weights; give what the checkpoint says of classes and colours."""
    if weights is None:
        print_log(
            f'No checkpoint for {name}: the model is as training starts, from the '
            "backbone's weights or from random ones.",
            logger='current',
            level=30,
        )
        logger = MMLogger.get_current_instance()
        level = logger.level
        logger.setLevel('WARNING')  # a line for each parameter, below that
        model.init_weights()
        logger.setLevel(level)
        return {}
    fit = Fit(dict(model.named_parameters()))
    meta = meta_of(load_checkpoint(model, weights, 'cpu', logger='silent'))
    if kept := fit.empty:
        raise UserError(
            f'{weights} does not fit {name}: {len(kept)} of {len(fit.tensors)} '
            f'parameters are not in it, or have another shape: {", ".join(kept[:5])}'
            f'{", ..." if len(kept) > 5 else ""}. Use the config that the checkpoint '
            'was trained with.'
        )
    found = meta.get('dataset_meta')
    if not found or not isinstance(found, dict):
        found = dict(classes=meta.get('CLASSES'))
    found = {str(key).lower(): value for key, value in found.items()}
    classes = found.get('classes')
    return found if classes and isinstance(classes, list | tuple) else {}


def _dataset_meta(cfg: Config) -> dict[str, Any]:
    """Classes and colours of the test data, which need not be there."""
    dataset = cfg.test_dataloader.dataset
    try:
        return DATASETS.build(dict(dataset, lazy_init=True)).metainfo
    except AssertionError:  # CustomDataset wants a place, though it reads nothing
        return BaseDataset._load_metainfo(dataset.get('metainfo'))
    except (OSError, TypeError):  # one that must read, or does not know lazy_init
        return {}


def _name_classes(inferencer: Any, meta: dict[str, Any], scope: str) -> None:
    """Tell an Inferencer the names and the colours of the classes."""
    classes, palette = meta.get('classes'), meta.get('palette')
    if scope == 'mmpretrain':
        inferencer.classes = classes
        return
    if scope == 'mmseg':
        number = len(classes or []) or inferencer.model.num_classes
        classes = classes or [f'class {i}' for i in range(number)]
        if not palette:
            colors = matplotlib.colormaps['tab20'].colors
            palette = [
                [round(255 * value) for value in colors[i % len(colors)]]
                for i in range(number)
            ]
    meta = dict(classes=classes, palette=palette or 'random')
    inferencer.model.dataset_meta = meta
    if scope == 'mmseg':
        inferencer.visualizer.set_dataset_meta(**meta)
    else:
        inferencer.visualizer.dataset_meta = meta


def preprocess(inferencer: Any, images: Sequence[np.ndarray]) -> Any:
    """One batch, as the model's ``test_step`` takes it.

    Args:
        inferencer (Any): From :func:`build_inferencer`.
        images (Sequence[np.ndarray]): ``[H, W, 3]``, uint8, BGR.
    """
    (batch,) = inferencer.preprocess(list(images), batch_size=len(images))
    # MMDetection gives what went in beside it
    return batch[1] if isinstance(batch, (tuple, list)) else batch


def draw(
    inferencer: Any, image: np.ndarray, sample: Any, score_thr: float
) -> np.ndarray:
    """A prediction on its image.

    Args:
        inferencer (Any): From :func:`build_inferencer`.
        image (np.ndarray): ``[H, W, 3]``, uint8, BGR.
        sample (Any): The data sample that the model gave for it.
        score_thr (float): Boxes and masks of a lower score are not drawn.

    Returns:
        np.ndarray: ``[H, W, 3]``, uint8, RGB.
    """
    rgb = np.ascontiguousarray(image[..., ::-1])
    visualizer = inferencer.visualizer
    if hasattr(visualizer, 'visualize_cls'):
        visualizer.visualize_cls(rgb, sample, inferencer.classes, draw_gt=False)
    else:
        options = dict(draw_gt=False)
        if hasattr(sample, 'pred_instances'):
            options['pred_score_thr'] = score_thr
        visualizer.add_datasample('', rgb, sample, **options)
    return visualizer.get_image()


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name a model."""
    parser.add_argument(
        '--config',
        required=True,
        help='config file, or the name of a config or model of this package',
    )
    parser.add_argument(
        '--weights',
        help='checkpoint file, URL or address such as paddleclas://RedNet50 '
        '(default: those of the model that --config names, else its load_from, else '
        'those that training starts from)',
    )
    parser.add_argument(
        '--device', help='such as cpu or cuda:0 (default: a GPU, if there is one)'
    )
