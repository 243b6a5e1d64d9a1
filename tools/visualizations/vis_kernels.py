"""Draw generated kernels: mmcls_involution/apis/vis_kernels.py."""

from mmcls_involution.__main__ import run

if __name__ == '__main__':
    run('kernels')
