"""A command's end leaves nothing that could meet the end of Python."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('mmengine')

THREADS = Path('/proc/self/task')
# As after a command: gloo has communicated tensors, and a model's wrapper, which holds
# the group, is part of a cycle.
SCRIPT = """
import sys
from pathlib import Path
import torch
from torch import distributed, nn
from mmcls_involution.engine.processes import leave_process_group

def threads():
    return len(list(Path('/proc/self/task').iterdir()))

def command():
    distributed.init_process_group(
        'gloo', init_method='file://' + sys.argv[1], rank=0, world_size=1
    )
    cycle = [nn.parallel.DistributedDataParallel(nn.Linear(2, 2))]
    cycle.append(cycle)
    cycle[0](torch.rand(1, 2)).sum().backward()
    distributed.all_gather([torch.zeros(2)], torch.ones(2))

before = threads()
command()
print(threads() - before > 0)
leave_process_group()
print(threads() - before, distributed.is_initialized())
leave_process_group()  # a command of one process
"""


@pytest.mark.skipif(not THREADS.exists(), reason='reads the threads from /proc')
def test_leave_process_group(tmp_path):
    result = subprocess.run(
        [sys.executable, '-c', SCRIPT, tmp_path / 'meeting'],
        env={**os.environ, 'OMP_NUM_THREADS': '1'},  # no threads but gloo's
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ['True', '0', 'False']
