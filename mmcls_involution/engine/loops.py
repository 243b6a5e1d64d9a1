"""Training loops that go on, after a kill, exactly where they were."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import InfiniteSampler
from mmengine.dist import all_gather_object, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import LOOPS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch.utils.data import DataLoader, IterableDataset

from mmcls_involution import compat
from mmcls_involution.engine.config import is_called

# Streams of random numbers: of the steps of the model, of reading data, of its order.
STEP, DATA, ORDER = 1, 2, 3
Key = tuple[int, int, int, int]  # stream, seed, rank, number of the batch or step


def _seeds(key: Key) -> list[int]:
    """Independent seeds for Python, NumPy and torch."""
    words = np.random.SeedSequence(key).generate_state(3)
    return [int(word) for word in words]


@contextmanager
def own_random_numbers(key: Key) -> Iterator[None]:
    """Have the CPU's random numbers follow from ``key`` inside, be as before outside.

    Those of Python, NumPy and torch, as data sets use them.
    """
    generator = torch.default_generator
    before = random.getstate(), np.random.get_state(), generator.get_state()
    seeds = _seeds(key)
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    generator.manual_seed(seeds[2])
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        generator.set_state(before[2])


class SeededBatch(list):
    """The indices of a batch, with the seed of the random numbers to read it with.

    A data loader iterates over it, in the process that reads the samples, and so it
    does not matter which of how many workers that is, nor what it read before.
    """

    def __init__(self, indices: list[int], key: Key) -> None:
        super().__init__(indices)
        self.key = key

    def __iter__(self) -> Iterator[int]:
        with own_random_numbers(self.key):
            yield from super().__iter__()

    def __reduce__(self) -> tuple:  # pickling would iterate
        return type(self), (self[:], self.key)


class SeekableSampler(InfiniteSampler):
    """MMEngine's ``InfiniteSampler`` that begins anywhere, in the same time.

    Each pass over the data has an order of its own, from the seed and the number of the
    pass; ``InfiniteSampler`` draws one order after another from one generator, and
    would draw all earlier ones again.

    Args:
        sampler (InfiniteSampler): Its data, whether it shuffles, and its seed.
    """

    def __init__(self, sampler: InfiniteSampler) -> None:
        super().__init__(sampler.dataset, sampler.shuffle, sampler.seed)
        self.start = 0  # of the samples of this process

    def __iter__(self) -> Iterator[int]:
        drawn, order = None, range(self.size)
        for place in itertools.count(
            self.rank + self.start * self.world_size, self.world_size
        ):
            number, index = divmod(place, self.size)
            if self.shuffle and number != drawn:
                seed = _seeds((ORDER, self.seed, 0, number))[2]
                generator = torch.Generator().manual_seed(seed)
                order = torch.randperm(self.size, generator=generator).tolist()
                drawn = number
            yield order[index]


class SeekableLoader(DataLoader):
    """A ``DataLoader`` that can begin in the middle, reading nothing before that.

    Args:
        loader (DataLoader): What to read, and how.
        endless (bool): Go on with the next epoch, in the same workers, when the sampler
            has come to its end.
    """

    def __init__(self, loader: DataLoader, endless: bool) -> None:
        self.endless = endless
        self.seed = self.start = self.skip = 0
        if loader.batch_size is None:
            batches = dict(batch_sampler=loader.batch_sampler)
        else:
            sampler = loader.sampler
            if type(sampler) is InfiniteSampler:
                sampler = SeekableSampler(sampler)
            batches = dict(
                batch_size=loader.batch_size,
                sampler=sampler,
                drop_last=loader.drop_last,
            )
        workers = (
            dict(
                prefetch_factor=loader.prefetch_factor,
                persistent_workers=loader.persistent_workers,
                multiprocessing_context=loader.multiprocessing_context,
            )
            if loader.num_workers
            else {}
        )
        super().__init__(
            loader.dataset,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            generator=loader.generator,
            **batches,
            **workers,
        )

    def seek(self, seed: int, start: int, skip: int) -> None:
        """Say where the next iteration over the loader begins.

        Args:
            seed: Of the training.
            start: Number of the first batch to read, in the whole training.
            skip: Batches of the sampler before that one.
        """
        self.seed, self.start, self.skip = seed, start, skip

    @property
    def samplers(self) -> list[Any]:
        """All that decides on the order, outermost first."""
        found = [self.batch_sampler]
        while (inner := getattr(found[-1], 'sampler', None)) is not None:
            found.append(inner)
        return found

    def __iter__(self) -> Iterator[Any]:
        # A generator: no worker starts, and reads, before the first batch is asked for.
        yield from super().__iter__()

    @property
    def _index_sampler(self) -> _Order:  # what torch's loader takes its batches from
        return _Order(self)


class _Order:
    """The batches of a loader from where it begins, each with its random numbers."""

    def __init__(self, loader: SeekableLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader.batch_sampler)

    def __iter__(self) -> Iterator[SeededBatch]:
        loader, rank = self.loader, get_rank()
        start, skip, loader.skip = loader.start, loader.skip, 0
        if isinstance(sampler := loader.sampler, SeekableSampler):
            sampler.start = skip * loader.batch_size
            skip = 0
        batches = self._batches(loader.seed, rank, start - skip)
        numbered = enumerate(itertools.islice(batches, skip, None), start)
        for number, batch in numbered:
            yield SeededBatch(batch, (DATA, loader.seed, rank, number))

    def _batches(self, seed: int, rank: int, start: int) -> Iterator[list[int]]:
        loader = self.loader
        for epoch in itertools.count():
            if loader.endless:
                for sampler in loader.samplers:
                    if hasattr(sampler, 'set_epoch'):
                        sampler.set_epoch(epoch)
            # Samplers of MMEngine have generators of their own; torch's draw the seed
            # of theirs here.
            with own_random_numbers((ORDER, seed, rank, start + epoch)):
                batches = iter(loader.batch_sampler)
                first = next(batches, None)
            if first is None:
                return
            yield first
            yield from batches
            if not loader.endless:
                return


class _Exact:
    """What the two loops share: a loader that can seek, and what a checkpoint needs."""

    endless: bool

    def __init__(
        self, runner: Runner, dataloader: DataLoader | dict, **kwargs: Any
    ) -> None:
        compat.apply()
        for name in ('max_epochs', 'max_iters', 'val_interval'):
            # MMEngine's loops check that they are ints, and with 0 train for nothing,
            # or divide by it when an epoch is over.
            if isinstance(number := kwargs.get(name), int) and number < 1:
                message = f'train_cfg.{name} must be at least 1, got {number}.'
                if name == 'val_interval':
                    parts = 'val_cfg=None val_dataloader=None val_evaluator=None'
                    message += f' Without validation: {parts}.'
                raise ValueError(message)
        if isinstance(dataloader, dict):
            dataloader = runner.build_dataloader(
                dataloader,
                seed=runner.seed,
                diff_rank_seed=runner._randomness_cfg.get('diff_rank_seed', False),
            )
        if dataloader.batch_sampler is None or isinstance(
            dataloader.dataset, IterableDataset
        ):
            raise TypeError(
                f'{type(self).__name__} needs a data set with indices, in batches; '
                f'train_dataloader has {type(dataloader.dataset).__name__} and '
                f'batch_size {dataloader.batch_size}. Use the loop of MMEngine, '
                f'{type(self).__mro__[2].__name__}, which cannot resume exactly.'
            )
        if not len(dataloader):
            raise ValueError(
                f'train_dataloader has {len(dataloader.dataset)} samples and gives no '
                'batch: make batch_size smaller, or set drop_last=False.'
            )
        super().__init__(runner, SeekableLoader(dataloader, self.endless), **kwargs)
        self.skip = 0
        self.epoch_start = 0
        self.gradients: dict = {}
        self.gathered: list[dict] = []
        runner.register_hook(_Place(self))

    def begin(self) -> None:
        """Put the loader where the loop is, gradients where they were."""
        self.dataloader.seek(self.runner.seed, self._iter, self.skip)
        for name, parameter in self.runner.model.named_parameters():
            if name in self.gradients:
                parameter.grad = self.gradients[name].to(parameter)
        self.gradients = {}

    @property
    def accumulates(self) -> bool:
        """Whether a step takes the gradients of several iterations."""
        return getattr(self.runner.optim_wrapper, '_accumulative_counts', 1) > 1

    def gather(self) -> None:
        """Bring the gradients that each process has accumulated into a checkpoint.

        All processes call it before one of them writes; without that it has those of
        the process that writes.
        """
        if self.accumulates:
            parts = all_gather_object(self.own_gradients())
            self.gathered = [] if get_rank() else parts  # the first one writes

    def own_gradients(self) -> dict[str, torch.Tensor]:
        """Those of this process, by the names of their parameters."""
        return {
            name: parameter.grad.cpu()
            for name, parameter in self.runner.model.named_parameters()
            if parameter.grad is not None
        }

    def seed_step(self) -> None:
        """Make the random numbers of a step follow from its number alone.

        There is no state of them to save, then, and none that a validation, which a
        resumed training does not repeat, could have changed.
        """
        # runner.seed differs between processes where they are to have other numbers.
        seeds = _seeds((STEP, self.runner.seed, 0, self._iter))
        random.seed(seeds[0])
        np.random.seed(seeds[1])
        torch.manual_seed(seeds[2])  # and of all devices


class _Place(Hook):
    """Note in a checkpoint where in the data its training was."""

    priority = 'VERY_HIGH'

    def __init__(self, loop: _Exact) -> None:
        self.loop = loop

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        loop, meta = self.loop, checkpoint['meta']
        within = loop.endless or meta['epoch'] == loop._epoch
        place = dict(
            skip=meta['iter'] - loop.epoch_start if within else 0,
            batches=len(loop.dataloader),
            processes=get_world_size(),
            seeds=[_seed(sampler) for sampler in loop.dataloader.samplers],
        )
        if loop.accumulates:
            place['gradients'] = loop.gathered or [loop.own_gradients()]
            loop.gathered = []
        checkpoint['place'] = place

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if not runner._resume:
            return
        loop, meta = self.loop, checkpoint['meta']
        place = checkpoint.get('place')
        batches = len(loop.dataloader)
        if place is None:  # of the loops of MMEngine
            skip = meta['iter'] - (0 if loop.endless else meta['epoch'] * batches)
            place = dict(skip=skip if loop.endless or 0 <= skip <= batches else 0)
            place |= dict(batches=batches, processes=get_world_size(), seeds=[])
        now = dict(batches=batches, processes=get_world_size())
        loop.skip = place['skip']
        if any(place[key] != now[key] for key in now):
            print_log(
                'The checkpoint is of a training with '
                f'{place["batches"]} batches in an epoch and {place["processes"]} '
                f'process(es), this one has {batches} and {now["processes"]}: it goes '
                'on with other samples than that one would have',
                logger='current',
                level=logging.WARNING,
            )
            if place['batches'] != batches and not loop.endless:
                loop.skip = 0
        for sampler, seed in itertools.zip_longest(
            loop.dataloader.samplers, place['seeds'], fillvalue=meta.get('seed')
        ):
            if _seed(sampler) is not None and seed is not None:
                sampler.seed = seed
        parts = place.get('gradients') or [{}]
        loop.gradients = parts[get_rank() % len(parts)]
        loop.epoch_start = meta['iter'] - loop.skip


def _seed(sampler: Any) -> int | None:
    """Of a sampler that has one, and draws from it when it is iterated over."""
    seed = getattr(sampler, 'seed', None)
    return int(seed) if isinstance(seed, int | np.integer) else None


@LOOPS.register_module()
class ExactEpochLoop(_Exact, EpochBasedTrainLoop):
    """MMEngine's ``EpochBasedTrainLoop`` that resumes as if nothing had happened.

    On the CPU, N iterations, a kill, and N more after resuming give the very weights
    of 2N iterations, within an epoch too. Random numbers follow from the seed and the
    number of the batch, whichever worker reads it; batches that have been trained on
    are not read again.

    In any config, installed beside this package::

        train_cfg = dict(
            type='mmcls_involution.engine.loops.ExactEpochLoop', max_epochs=12
        )

    Args:
        runner (Runner): The runner.
        dataloader (DataLoader | dict): Of a data set with indices, in batches.
        **kwargs: As of ``EpochBasedTrainLoop``.

    Raises:
        TypeError: If the data has no indices (``IterableDataset``) or no batches.
        ValueError: If there is not one batch, or a number is smaller than 1.
    """

    endless = False

    def run_epoch(self) -> None:
        """Train for one epoch, or for what is left of it."""
        self.begin()
        super().run_epoch()
        self.skip, self.epoch_start = 0, self._iter

    def run_iter(self, idx: int, data_batch: Any) -> None:
        """Train on one batch."""
        self.seed_step()
        super().run_iter(idx + self.skip, data_batch)


@LOOPS.register_module()
class ExactIterLoop(_Exact, IterBasedTrainLoop):
    """MMEngine's ``IterBasedTrainLoop``, with the promises of :class:`ExactEpochLoop`.

    A sampler with an end begins anew in the same workers.

    Args:
        runner (Runner): The runner.
        dataloader (DataLoader | dict): Of a data set with indices, in batches.
        **kwargs: As of ``IterBasedTrainLoop``.

    Raises:
        TypeError: If the data has no indices (``IterableDataset``) or no batches.
        ValueError: If there is not one batch, or a number is smaller than 1.
    """

    endless = True

    def run(self) -> Any:
        """Train, from where the checkpoint was."""
        self.begin()
        # MMEngine's loop calls for all that has been trained on once more.
        seen = itertools.repeat(None, self._iter)
        self.dataloader_iterator = itertools.chain(seen, self.dataloader)
        return super().run()

    def run_iter(self, data_batch: Any) -> None:
        """Train on one batch."""
        self.seed_step()
        super().run_iter(data_batch)


def resume_exactly(cfg: Config) -> None:
    """Put the loops of this module in the place of MMEngine's in a config.

    A loop of somebody else's stays.

    Args:
        cfg (Config): The config; changed in place.
    """
    loop = cfg.get('train_cfg')
    if not loop:
        return
    kind = loop.get('type')
    if kind is None and 'by_epoch' in loop:
        by_epoch = loop.pop('by_epoch')
    elif is_called(kind, 'EpochBasedTrainLoop', LOOPS):
        by_epoch = True
    elif is_called(kind, 'IterBasedTrainLoop', LOOPS):
        by_epoch = False
    else:
        return
    ours = ExactEpochLoop if by_epoch else ExactIterLoop
    loop['type'] = f'{__name__}.{ours.__name__}'
