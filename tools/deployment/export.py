"""Write a model for other runtimes: mmcls_involution/deployment/export.py."""

from mmcls_involution.__main__ import run

if __name__ == '__main__':
    run('export')
