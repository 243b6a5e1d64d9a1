"""The old place of tools/check_dataset.py, for one release."""

from mmcls_involution.__main__ import run

if __name__ == '__main__':
    run('check')
