"""Make a checkpoint small and safe to pass on: mmcls_involution/weights/publish.py."""

from mmcls_involution.__main__ import run

if __name__ == '__main__':
    run('publish')
