"""Count parameters and FLOPs: mmcls_involution/flops.py."""

from mmcls_involution.__main__ import run

if __name__ == '__main__':
    run('flops')
