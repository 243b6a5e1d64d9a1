"""A training of a second that uses all that must survive a kill.

Random augmentation by Python, NumPy and torch, dropout, batch norm, momentum, a
schedule, an averaged model. MMEngine alone, no toolbox. Configs in files import it as
``toy``.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS
from torch import Tensor, nn
from torch.utils.data import Dataset

SIZE = 10


@DATASETS.register_module()
class ToyData(Dataset):
    """Vectors whose sum decides; each sample that is read is noted in a file."""

    metainfo: dict = {}

    def __init__(self, record: str | None = None, size: int = SIZE) -> None:
        self.record, self.size = record, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        if self.record:
            with open(self.record, 'a') as file:
                file.write(f'{index}\n')
        x = torch.linspace(-1, 1, 8).roll(index)
        noise = random.random() + np.random.rand() + torch.rand(8)
        return dict(
            x=x + 0.1 * noise, y=torch.tensor(index % 2), img_path=f'{index}.png'
        )


@MODELS.register_module()
class ToyModel(BaseModel):
    """Two layers with batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 2)
        )

    def forward(self, x: Tensor, y: Tensor, mode: str, **_: Any) -> Any:
        scores = self.layers(x)
        if mode == 'loss':
            return dict(loss=nn.functional.cross_entropy(scores, y))
        return [
            dict(right=bool(s.argmax() == t)) for s, t in zip(scores, y, strict=True)
        ]


@METRICS.register_module()
class ToyMetric(BaseMetric):
    """The share of samples that are right."""

    def process(self, data_batch: dict, data_samples: list[dict]) -> None:
        self.results += [sample['right'] for sample in data_samples]

    def compute_metrics(self, results: list[bool]) -> dict:
        return dict(accuracy=float(np.mean(results)))


@HOOKS.register_module()
class Killed(Hook):
    """One of several processes is killed in the eighth iteration.

    Args:
        rank: Of the process.
        in_save: While the checkpoint after it is flushed, or before the iteration's
            step, for which the other processes wait.
    """

    def __init__(self, rank: int, in_save: bool) -> None:
        self.rank, self.in_save = rank, in_save

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if runner.iter == 7 and get_rank() == self.rank:
            if self.in_save:
                os.fsync = self._kill
            else:
                self._kill()

    @staticmethod
    def _kill(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def for_two(folder: Path, **changes: Any) -> dict[str, Any]:
    """Write a config of 20 iterations that saves after each.

    Returns:
        Arguments of ``subprocess`` for the command ``train`` in two processes, as
        torchrun starts them. It resumes what there is in the folder.
    """
    folder.mkdir(exist_ok=True)
    cfg = config(folder, by_epoch=False, **changes)
    cfg.custom_imports = dict(imports=['toy'], allow_failed_imports=False)
    cfg.default_hooks.checkpoint.update(interval=1, max_keep_ckpts=2)
    file = folder / 'two.py'
    cfg.dump(file)
    here = Path(__file__).parent
    root = here.parents[1]
    return dict(
        args=[
            *(sys.executable, '-m', 'torch.distributed.run', '--standalone'),
            *('--nproc_per_node=2', root / 'tools' / 'train.py', file),
            *('--launcher', 'pytorch', '--resume'),
        ],
        env={**os.environ, 'PYTHONPATH': f'{here}{os.pathsep}{root}'},
    )


def config(work_dir: Path, by_epoch: bool = True, **changes: Any) -> Config:
    """A config of the training.

    Args:
        work_dir: Where it writes.
        by_epoch: An epoch-based loop of 4 epochs of 5 iterations, or one of 20
            iterations. Defaults to True.
        **changes: Dotted keys, with ``__`` for the dot.
    """
    cfg = Config(
        dict(
            work_dir=str(work_dir),
            default_scope='mmengine',
            model=dict(type='ToyModel'),
            train_dataloader=dict(
                batch_size=2,
                num_workers=0,
                sampler=dict(
                    type='DefaultSampler' if by_epoch else 'InfiniteSampler',
                    shuffle=True,
                ),
                collate_fn=dict(type='default_collate'),
                dataset=dict(type='ToyData'),
            ),
            train_cfg=dict(by_epoch=True, max_epochs=4)
            if by_epoch
            else dict(by_epoch=False, max_iters=20, val_interval=5),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9)),
            param_scheduler=[
                dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=7),
                dict(type='CosineAnnealingLR', by_epoch=False, begin=7, end=20),
            ],
            default_hooks=dict(
                checkpoint=dict(
                    type='CheckpointHook',
                    by_epoch=by_epoch,
                    interval=1 if by_epoch else 5,
                ),
            ),
            custom_hooks=[dict(type='EMAHook')],
            env_cfg=dict(mp_cfg=dict(mp_start_method='fork')),
            log_level='WARNING',
            randomness=dict(seed=3),
        )
    )
    cfg.merge_from_dict({key.replace('__', '.'): v for key, v in changes.items()})
    return cfg


VALIDATION = dict(
    val_dataloader=dict(
        batch_size=2,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=dict(type='default_collate'),
        dataset=dict(type='ToyData'),
    ),
    val_cfg=dict(),
    val_evaluator=dict(type='ToyMetric'),
)
