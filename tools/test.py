"""Test a checkpoint: mmcls_involution/engine/test.py."""

from mmcls_involution.__main__ import run

if __name__ == '__main__':
    run('test')
