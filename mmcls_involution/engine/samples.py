"""What to say of an image or label that stops a run in the middle.

The quick checks do not read all data. What a run falls over later is looked at with the
full check's rules, and said in its words.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmcls_involution.data import images, segmentation
from mmcls_involution.data.rules import Finding
from mmcls_involution.engine.errors import UserError

ALL = 'tools/check_dataset.py with this config looks through all data.'
# Where an error is of the data or of the config, not a bug in somebody's transform.
UPSTREAM = {'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain'}


class LastBatch(Hook):
    """Keep the samples that a model is given, for :func:`samples_by_name`."""

    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self.dataset: Any = None
        self.samples: list[Any] = []

    def _keep(self, dataloader: Any, data_batch: Any) -> None:
        self.dataset = dataloader.dataset
        batch = data_batch if isinstance(data_batch, dict) else {}
        self.samples = list(batch.get('data_samples') or [])

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None
    ) -> None:
        self._keep(runner.train_dataloader, data_batch)

    def before_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None
    ) -> None:
        self._keep(runner.val_dataloader, data_batch)

    def before_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None
    ) -> None:
        self._keep(runner.test_dataloader, data_batch)


@contextlib.contextmanager
def samples_by_name(runner: Runner) -> Iterator[None]:
    """End a run that an image or a label stops with a message that names the file.

    Worker processes inherit this where they are forked, as on Linux.

    Raises:
        UserError: For an error in the preparation of a sample, or in a model whose
            batch has a sample that the full check finds fault with. Other errors pass.
    """
    last = LastBatch()
    runner.register_hook(last)
    stock = BaseDataset.prepare_data

    @functools.wraps(stock)
    def prepare_data(self: BaseDataset, idx: int) -> Any:
        try:
            return stock(self, idx)
        except Exception as error:
            if message := _unprepared(self, idx, error, runner.cfg):
                raise UserError(message) from error
            raise

    BaseDataset.prepare_data = prepare_data
    try:
        yield
    except UserError as error:
        # Of a worker: torch wraps its traceback in the message.
        _, caught, message = str(error).rpartition(f'{UserError.__qualname__}: ')
        if str(error).startswith('Caught ') and caught:
            raise UserError(message.strip()) from error
        raise
    except Exception as error:
        for sample in last.samples:
            info = getattr(sample, 'metainfo', {})
            if found := _faults(last.dataset, info, runner.cfg):
                raise UserError(f'{found[0].message} {ALL}') from error
        raise
    finally:
        BaseDataset.prepare_data = stock


def _unprepared(
    dataset: BaseDataset, idx: int, error: Exception, cfg: Config
) -> str | None:
    """The message for a sample that the pipeline fails on; None for a bug."""
    info = dataset.get_data_info(idx)
    if found := _faults(dataset, info, cfg):
        return f'{found[0].message} {ALL}'
    place = traceback.extract_tb(error.__traceback__)[-1]
    folders = {
        Path(sys.modules[name].__file__).parent for name in UPSTREAM & set(sys.modules)
    }
    if not folders & set(Path(place.filename).parents) or not info.get('img_path'):
        return None
    return (
        f'{info["img_path"]} cannot be prepared by the pipeline of the config: '
        f'{type(error).__name__}: {" ".join(str(error).split())} '
        f'({place.filename}:{place.lineno}). {ALL}'
    )


def _faults(dataset: Any, info: dict, cfg: Config) -> list[Finding]:
    """What the full check finds wrong with the files of a sample."""
    while hasattr(dataset, 'dataset') or hasattr(dataset, 'datasets'):
        dataset = getattr(dataset, 'dataset', None) or dataset.datasets[0]
    image, label = info.get('img_path'), info.get('seg_map_path')
    if not isinstance(image, str) or '://' in image:
        return []
    found, size = images.check_image(image, None)
    if isinstance(label, str) and hasattr(dataset, 'label_map'):
        values = segmentation.label_values(dataset, cfg)
        found += segmentation.check_label(label, size, values)[0]
    return found
