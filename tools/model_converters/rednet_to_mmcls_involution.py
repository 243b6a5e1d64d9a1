"""Convert an official checkpoint of involution: mmcls_involution/weights/convert.py."""

from mmcls_involution.__main__ import run

if __name__ == '__main__':
    run('convert')
