"""Packaging of mmcls_involution.

torch is not imported here, so that the build also works in isolation.
"""

import os
import shutil
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# What OpenMMLab's tools look for in `<package>/.mim`.
MIM_PARTS = ('configs', 'tools', 'model-index.yml')


class BuildPyWithMim(build_py):
    """Puts configs and tools beside the modules, under ``.mim``.

    A wheel gets copies. An editable install gets links, so that an edited
    config is the one in use; it runs this command too, with `editable_mode`
    set.
    """

    def run(self) -> None:
        super().run()
        parent = ROOT if self.editable_mode else Path(self.build_lib)
        mim = parent / 'mmcls_involution' / '.mim'
        shutil.rmtree(mim, ignore_errors=True)
        mim.mkdir(parents=True)
        for part in MIM_PARTS:
            source = ROOT / part
            if not source.exists():
                continue
            if self.editable_mode:
                try:
                    (mim / part).symlink_to(os.path.relpath(source, mim))
                    continue
                except OSError:
                    pass  # a system that allows no links gets a copy
            if source.is_dir():
                shutil.copytree(
                    source,
                    mim / part,
                    ignore=shutil.ignore_patterns('__pycache__', '*.py[cod]'),
                )
            else:
                shutil.copy2(source, mim / part)


def read_version() -> str:
    scope: dict = {}
    exec((ROOT / 'mmcls_involution' / 'version.py').read_text(), scope)
    return scope['__version__']


def read_readme() -> str:
    readme = ROOT / 'README.md'
    return readme.read_text(encoding='utf-8') if readme.exists() else ''


# The ranges are those of mmcls_involution.compat.SUPPORTED (a test compares).
# mmcv and torchvision are left out on purpose: their right builds depend on the
# torch that is there, and pip would fetch an mmcv without ops, or a torchvision
# that replaces torch. `python -m mmcls_involution.doctor` says how to get them.
MMENGINE = 'mmengine>=0.10.7,<0.11.0'
EXTRAS = {
    'det': [MMENGINE, 'mmdet>=3.3.0,<4.0.0'],
    # mmsegmentation imports ftfy and regex and declares neither.
    'seg': [MMENGINE, 'mmsegmentation>=1.2.2,<2.0.0', 'ftfy', 'regex'],
    'cls': [MMENGINE, 'mmpretrain>=1.2.0,<2.0.0'],
    'dev': ['pytest', 'pytest-xdist', 'ruff'],
}

# Plain C++ behind a C interface, loaded with ctypes: it links neither torch nor Python,
# so one build serves every torch and every Python from 3.11 on. Where it cannot be
# compiled the package installs without it and says so when the operator is first used.
NATIVE = 'mmcls_involution/ops/native'
KERNELS = Extension(
    'mmcls_involution.ops.native._kernels',
    sources=[
        f'{NATIVE}/{name}.cpp'
        for name in ('native', 'kernels_avx512', 'kernels_avx2', 'kernels_baseline')
    ],
    depends=[f'{NATIVE}/involution.h', f'{NATIVE}/kernels.h'],
    language='c++',
    extra_compile_args=[
        *('-std=c++17', '-O3', '-g0', '-fvisibility=hidden', '-pthread'),
    ],
    extra_link_args=['-pthread'],
    py_limited_api=True,
    optional=True,
)

setup(
    name='mmcls_involution',
    version=read_version(),
    description='Involution and RedNet for MMDetection, MMSegmentation and MMPretrain',
    long_description=read_readme(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    classifiers=[
        'License :: OSI Approved :: Apache Software License',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.11',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    packages=find_packages(include=['mmcls_involution', 'mmcls_involution.*']),
    python_requires='>=3.11',
    # torch without a range: whichever is there stays as it is. Ranges are
    # checked when the models are registered, with a message that says the fix.
    install_requires=['torch'],
    extras_require=EXTRAS,
    cmdclass={'build_py': BuildPyWithMim},
    ext_modules=[KERNELS],
    options={'bdist_wheel': {'py_limited_api': 'cp311'}},
    zip_safe=False,
)
