"""What to say of an image or label that stops a run in the middle.

The quick checks do not read all data. What a run falls over later is looked at with the
full check's rules, and said in its words.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.dist import barrier, is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner

from mmcls_involution.data import images, segmentation
from mmcls_involution.data.rules import Finding, printable
from mmcls_involution.engine.errors import UserError

ALL = '`python -m mmcls_involution check` with this config looks through all data.'
# Where an error is of the data or of the config, not a bug in somebody's transform.
UPSTREAM = {'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain'}


class LastBatch(Hook):
    """For :func:`samples_by_name`: the samples that a model gets, what it trains on.

    Not by ``test_mode``: configs of MMSegmentation do not set it for validation.
    """

    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self.dataset: Any = None
        self.samples: list[Any] = []
        self.trained_on: list[Any] = []

    def before_train(self, runner: Runner) -> None:
        self.trained_on = [runner.train_dataloader.dataset]
        for dataset in self.trained_on:  # it grows by those inside
            inner = [getattr(dataset, 'dataset', None)]
            inner += getattr(dataset, 'datasets', None) or []
            self.trained_on += [part for part in inner if part is not None]

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


class BadSamples:
    """Those that a training passes over, counted in a file of its work dir.

    A file, because worker processes meet them, and because those of before a kill
    count as well. Processes on machines that share no file system count for themselves.

    Args:
        folder (Path): The work dir.
        limit (int): How many there may be.
        resumed (bool): Whether the training goes on from an earlier one.
    """

    def __init__(self, folder: Path, limit: int, resumed: bool) -> None:
        self.file = folder / 'bad_samples.txt'
        self.limit = limit
        if not resumed and is_main_process():
            self.file.unlink(missing_ok=True)
        barrier()

    @property
    def messages(self) -> list[str]:
        """What is wrong with each, once."""
        lines = self.file.read_text('utf-8').splitlines() if self.file.exists() else []
        return [*dict.fromkeys(lines)]

    def add(self, message: str) -> None:
        """Count one, unless it has been.

        Raises:
            UserError: If it is one too many; it says which ones there are.
        """
        message = printable(message)
        known = self.messages
        new = message not in known
        found = [*known, message] if new else known
        if new and len(found) <= self.limit:
            with self.file.open('a', encoding='utf-8') as file:
                file.write(f'{message}\n')
            found = self.messages  # other processes may have met others since
        if len(found) > self.limit:
            earlier = f' {len(known)} before it: {self.file}.' if known else ''
            raise UserError(
                f'{message}{earlier} {ALL} To pass over such samples, up to N of '
                f'them: --max-bad-samples N (now {self.limit}).'
            )
        if not new:
            return
        print_log(
            f'Bad sample {len(found)} of at most {self.limit}, another one takes its '
            f'place: {message}',
            logger='current',
            level=logging.WARNING,
        )

    def report(self) -> None:
        """Say at the end of a training what it has passed over."""
        if found := self.messages:
            print_log(
                f'{len(found)} bad sample(s) were passed over, others took their '
                f'place: {" ".join(found[:5])}{" ..." if len(found) > 5 else ""} All: '
                f'{self.file}',
                logger='current',
                level=logging.WARNING,
            )


@contextlib.contextmanager
def samples_by_name(runner: Runner, bad: BadSamples | None = None) -> Iterator[None]:
    """End a run that an image or a label stops with a message that names the file.

    Worker processes inherit this where they are forked, as on Linux.

    Args:
        runner (Runner): Of the run.
        bad (BadSamples, optional): Counts the samples that training passes over, for
            which its data sets give another one, by the random numbers of the batch.
            Those of validation are never passed over: the scores would be of others.

    Raises:
        UserError: For an error in the preparation of a sample, or in a model whose
            batch has a sample that the full check finds fault with. Other errors pass.
    """
    last = LastBatch()
    runner.register_hook(last)
    stock = BaseDataset.prepare_data

    @functools.wraps(stock)
    def prepare_data(self: BaseDataset, idx: int) -> Any:
        cause = None
        trains = bad is not None and any(self is part for part in last.trained_on)
        try:
            data = stock(self, idx)
            if not trains:
                return data
            message = _unfit(self, idx, data, bad.limit > 0, runner.cfg)
            if message is None:
                return data
        except Exception as error:
            message, cause = _unprepared(self, idx, error, runner.cfg), error
            if message is None:
                raise
            if not trains:
                raise UserError(f'{message} {ALL}') from error
        bad.add(message)
        # Of this process; where all are bad a data set would search for ever.
        indices = vars(self).setdefault('_bad_indices', set())
        indices.add(idx)
        if len(indices) == len(self):
            raise UserError(f'All {len(self)} samples are bad. {message}') from cause
        return None

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


def _unfit(
    dataset: BaseDataset, idx: int, data: Any, ahead: bool, cfg: Config
) -> str | None:
    """What is wrong with a sample that the pipeline has prepared.

    Args:
        dataset: Of the sample.
        idx: Its index.
        data: What the pipeline made of it.
        ahead: Whether to look for what the model will fail on, too late to pass over
            it: a label map of another size, or with values that are no class.
        cfg: The whole config.
    """
    sample = data.get('data_samples') if isinstance(data, dict) else None
    info = dataset.get_data_info(idx)
    shape = getattr(sample, 'ori_shape', None)
    said = info.get('height'), info.get('width')
    if shape is not None and None not in said and tuple(shape[:2]) != said:
        finding = images.other_size(info['img_path'], tuple(shape[1::-1]), said[::-1])
        return finding.message
    if ahead and info.get('seg_map_path') and hasattr(dataset, 'label_map'):
        known = vars(dataset).setdefault('_sound_indices', set())
        if idx not in known:
            if found := _faults(dataset, info, cfg):
                return found[0].message
            known.add(idx)
    return None


def _unprepared(
    dataset: BaseDataset, idx: int, error: Exception, cfg: Config
) -> str | None:
    """The message for a sample that the pipeline fails on; None for a bug."""
    info = dataset.get_data_info(idx)
    if found := _faults(dataset, info, cfg):
        return found[0].message
    place = traceback.extract_tb(error.__traceback__)[-1]
    folders = {
        Path(sys.modules[name].__file__).parent for name in UPSTREAM & set(sys.modules)
    }
    if not folders & set(Path(place.filename).parents) or not info.get('img_path'):
        return None
    return (
        f'{info["img_path"]} cannot be prepared by the pipeline of the config: '
        f'{type(error).__name__}: {" ".join(str(error).split())} '
        f'({place.filename}:{place.lineno}).'
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
