"""The number of torch's threads around mmcv's operators in plain torch."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mmcls_involution.compat.mmcv_ops import lane


@pytest.mark.parametrize('first_out', [0, 1])
def test_two_threads_at_once_leave_the_threads_as_they_were(first_out):
    seen = [[], []]
    entered, leave = ([threading.Event() for _ in range(2)] for _ in range(2))

    def work(i):
        with lane.one_thread():
            seen[i].append(torch.get_num_threads())
            entered[i].set()
            assert leave[i].wait(30)
            seen[i].append(torch.get_num_threads())
        seen[i].append(torch.get_num_threads())

    def in_a_new_thread():
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with ThreadPoolExecutor(2) as pool:
            done = []
            for i in range(2):
                done.append(pool.submit(work, i))
                assert entered[i].wait(30)
            for i in (first_out, 1 - first_out):
                leave[i].set()
                done[i].result()
        assert seen == [[1, 1, 4], [1, 1, 4]]
        assert torch.get_num_threads() == in_a_new_thread() == 4
    finally:
        torch.set_num_threads(before)
