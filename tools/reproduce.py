"""Train, test and report configs: mmcls_involution/runs/reproduce.py."""

from mmcls_involution.__main__ import run

if __name__ == '__main__':
    run('reproduce')
