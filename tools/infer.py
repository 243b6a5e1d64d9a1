"""Run a model on images and videos: mmcls_involution/apis/infer.py."""

from mmcls_involution.__main__ import run

if __name__ == '__main__':
    run('infer')
