"""Look through the data of a config: mmcls_involution/data/report.py."""

from mmcls_involution.__main__ import run

if __name__ == '__main__':
    run('check')
