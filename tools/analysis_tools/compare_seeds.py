"""Compare configs over several seeds: mmcls_involution/runs/compare.py."""

from mmcls_involution.__main__ import run

if __name__ == '__main__':
    run('compare')
