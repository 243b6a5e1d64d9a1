"""Train the model of a config: mmcls_involution/engine/train.py."""

from mmcls_involution.__main__ import run

if __name__ == '__main__':
    run('train')
