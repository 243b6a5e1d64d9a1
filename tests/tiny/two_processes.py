"""What two processes compute beside one; tests/test_tools/test_dist.py compares them.

    python -m torch.distributed.run --nproc_per_node 2 two_processes.py FOLDER

Everything that needs no launcher of its own is here, because to start two processes
takes longer than all of it.
"""

from __future__ import annotations

import copy
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from mmcls_involution import compat
from mmcls_involution.__main__ import parse

compat.apply()
import mmpretrain.models  # noqa: E402, F401
from mmpretrain.structures import DataSample  # noqa: E402

from mmcls_involution.engine import train as command  # noqa: E402
from mmcls_involution.engine.processes import leave_process_group  # noqa: E402
from mmcls_involution.models.backbones.rednet import Bottleneck  # noqa: E402

TINY = Path(__file__).parent
STEPS = 3


def train(config: str, folder: Path, *arguments: str) -> None:
    """As the command in this process, which stays with the other one after it."""
    sys.argv = ['train', str(TINY / config), '--work-dir', str(folder), *arguments]
    command.main(parse(command))


@functools.cache
def classifier() -> Config:
    """Config of the model; to read it takes longer than to train it."""
    cfg = Config.fromfile(TINY / 'classifier_parity.py')
    init_default_scope('mmpretrain')
    return Config(dict(cfg.model, data_preprocessor=cfg.data_preprocessor))


def ddp(model: nn.Module, **kwargs: bool) -> nn.Module:
    # As engine/config.py has it.
    return MMDistributedDataParallel(model, broadcast_buffers=False, **kwargs)


def shard(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, Bottleneck):
            fully_shard(module)
    return fully_shard(model)


def steps(model: nn.Module, pictures: Tensor, labels: list[int]) -> list[float]:
    """Train and give the losses, the mean over all processes."""
    model.train()
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9
    )
    wrapper, losses = OptimWrapper(optimizer), []
    samples = [DataSample().set_gt_label(label) for label in labels]
    for _ in range(STEPS):
        data = dict(inputs=pictures, data_samples=copy.deepcopy(samples))
        loss = model.train_step(data, wrapper)['loss'].detach()
        dist.all_reduce(loss)
        losses.append(loss.item() / dist.get_world_size())
    return losses


def compare(wrap: Callable[[nn.Module], nn.Module], options: dict) -> dict:
    """Train a classifier alone, and in two processes on half of the batch each.

    Returns:
        dict: ``one`` and ``two``, the losses; ``difference``, the largest of two
        parameters relative to their norm; ``changed``, the parts that training changed.
    """
    torch.manual_seed(0)
    cfg = copy.deepcopy(classifier())
    cfg.merge_from_dict(options)
    model = MODELS.build(cfg._cfg_dict)
    model.init_weights()
    first = {k: v.detach().clone() for k, v in model.named_parameters()}
    alone = copy.deepcopy(model)
    pictures, labels = 255 * torch.rand(4, 3, 64, 64), [0, 1, 1, 0]
    one = steps(alone, pictures, labels)
    rank = dist.get_rank()
    two = steps(wrap(model), pictures[rank::2], labels[rank::2])

    difference, changed = 0.0, set()
    for name, parameter in alone.named_parameters():
        other = model.get_parameter(name).detach()
        if hasattr(other, 'full_tensor'):
            other = other.full_tensor()
        distance = (other - parameter).norm() / parameter.norm().clamp(min=1e-3)
        difference = max(difference, distance.item())
        if not torch.equal(other, first[name]):
            changed.add(name.removeprefix('backbone.').split('.')[0])
    return dict(one=one, two=two, difference=difference, changed=sorted(changed))


def main(folder: Path) -> None:
    # torchrun's variables do not make a run distributed; --launcher does.
    if int(torch.distributed.get_node_local_rank()) == 0:
        train('classifier_parity.py', folder / 'one')
    flags = ('--launcher', 'pytorch')
    train(
        'classifier_fsdp.py', folder / 'fsdp', *flags,
        '--cfg-options', 'train_cfg.max_epochs=1',
    )  # fmt: skip
    train('classifier_fsdp.py', folder / 'fsdp', *flags, '--resume')

    results = {
        f'frozen_stages={n}': compare(ddp, {'backbone.frozen_stages': n})
        for n in range(-1, 5)
    }
    results['with_cp'] = compare(ddp, {'backbone.with_cp': True})
    results['unused stage'] = compare(
        functools.partial(ddp, find_unused_parameters=True),
        {'backbone.out_indices': (2,), 'head.in_channels': 256},
    )
    results['fully_shard'] = compare(shard, {'backbone.frozen_stages': 1})
    if dist.get_rank() == 0:
        (folder / 'results.json').write_text(json.dumps(results))
    leave_process_group()


if __name__ == '__main__':
    main(Path(sys.argv[1]))
