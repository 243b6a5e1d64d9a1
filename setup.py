"""Packaging of mmcls_involution.

torch is not imported here, so that the build also works in isolation.
"""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
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


class BuildExtSideBySide(build_ext):
    """Compiles the files of an extension at the same time: setuptools has no option."""

    def build_extensions(self) -> None:
        compile_files = self.compiler.compile

        def compile_each(sources: list[str], **options) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                each = pool.map(lambda file: compile_files([file], **options), sources)
                return [objects for (objects,) in each]

        self.compiler.compile = compile_each
        super().build_extensions()


def read_version() -> str:
    scope: dict = {}
    exec((ROOT / 'mmcls_involution' / 'version.py').read_text(), scope)
    return scope['__version__']


def read_readme() -> str:
    readme = ROOT / 'README.md'
    return readme.read_text(encoding='utf-8') if readme.exists() else ''


# The ranges are those of mmcls_involution.compat.SUPPORTED (a test compares).
# mmcv is left out of the extras of the toolboxes: mmcv and mmcv-lite are one package
# under two names, and installing one writes over the other. Only `all`, which is for
# environments without either, brings mmcv-lite.
MMENGINE = 'mmengine>=0.10.7,<0.11.0'
DET = [MMENGINE, 'mmdet>=3.3.0,<4.0.0']
# mmsegmentation imports ftfy and regex and declares neither.
SEG = [MMENGINE, 'mmsegmentation>=1.2.2,<2.0.0', 'ftfy', 'regex']
CLS = [MMENGINE, 'mmpretrain>=1.2.0,<2.0.0']  # which imports torchvision
EXTRAS = {
    'det': DET,
    'seg': SEG,
    'cls': CLS,
    'all': [*DET, *SEG, *CLS, 'mmcv-lite>=2.0.1,<2.2.0', 'torchvision'],
    'demo': ['gradio>=6.0,<7.0'],  # the command `web`
    'docs': ['sphinx', 'myst-parser', 'furo'],
    'deploy': ['onnx>=1.16', 'onnxscript', 'onnxruntime>=1.17'],
    # Triton's interpreter and compiler test the GPU kernels where there is no GPU. A
    # torch for CUDA pins one of its own.
    'dev': [
        'hypothesis',
        # onnxruntime has no wheels for Python 3.10 any more
        'onnx; python_version >= "3.11"',
        'onnxruntime; python_version >= "3.11"',
        'onnxscript; python_version >= "3.11"',
        'pytest',
        'pytest-xdist',
        'ruff',
        'triton; sys_platform == "linux"',
    ],
}

# Plain C++ behind a C interface, loaded with ctypes: it links neither torch nor Python,
# so one build serves every torch and every Python from 3.10 on. Where it cannot be
# compiled the package installs without it and says so when the operator is first used.
NATIVE = 'mmcls_involution/ops/backends/native'
KERNELS = Extension(
    'mmcls_involution.ops.backends.native._kernels',
    sources=[
        f'{NATIVE}/{name}.cpp'
        for name in (
            *('native', 'onnxruntime'),
            *('kernels_avx512', 'kernels_avx2', 'kernels_baseline'),
        )
    ],
    depends=[
        f'{NATIVE}/{name}.h' for name in ('involution', 'kernels', 'scratch', 'vectors')
    ],
    language='c++',
    extra_compile_args=['-std=c++17', '-O3', '-g0', '-fvisibility=hidden', '-pthread'],
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
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    packages=find_packages(include=['mmcls_involution', 'mmcls_involution.*']),
    python_requires='>=3.10',
    # torch without a range: whichever is there stays as it is. Ranges are
    # checked when the models are registered, with a message that says the fix.
    install_requires=['torch'],
    extras_require=EXTRAS,
    cmdclass={'build_py': BuildPyWithMim, 'build_ext': BuildExtSideBySide},
    ext_modules=[KERNELS],
    options={'bdist_wheel': {'py_limited_api': 'cp310'}},
    zip_safe=False,
)
