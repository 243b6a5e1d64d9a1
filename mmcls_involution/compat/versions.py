"""The versions of torch and OpenMMLab that this package works with."""

from __future__ import annotations

import importlib.metadata

# distribution -> (lowest version, inclusive; highest version, exclusive)
SUPPORTED: dict[str, tuple[str, str]] = {
    # docs/install.md says which are tested; 2.6 made torch.load weights-only.
    'torch': ('2.7.0', '3.0.0'),
    # Older ones register Adafactor twice (mmengine#1609); the repairs of this
    # package patch functions of the 0.10 series.
    'mmengine': ('0.10.7', '0.11.0'),
    # What mmdet and mmsegmentation accept: they stop at import outside of it.
    'mmcv': ('2.0.0rc4', '2.2.0'),
    # The oldest tested release (it is also the newest) up to the next major one.
    'mmdet': ('3.3.0', '4.0.0'),
    'mmsegmentation': ('1.2.2', '2.0.0'),
    'mmpretrain': ('1.2.0', '2.0.0'),
}


def check_versions() -> None:
    """Refuse installed libraries whose version is outside :data:`SUPPORTED`.

    A library that is not installed is fine. ``mmcv-lite`` counts as ``mmcv``.

    Raises:
        ImportError: If a version is out of range. The message names every such
            package, what is installed, what is needed, and the pip command.
    """
    from packaging.version import Version

    problems, wanted = [], []
    for name, (lowest, highest) in SUPPORTED.items():
        for distribution in (name, 'mmcv-lite') if name == 'mmcv' else (name,):
            try:
                installed = importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                continue
            if not Version(lowest) <= Version(installed) < Version(highest):
                need = f'>={lowest},<{highest}'
                problems.append(
                    f'  {distribution} {installed} is installed, but {need} is needed'
                )
                wanted.append(f'"{distribution}{need}"')
    if problems:
        raise ImportError(
            'mmcls_involution does not work with these versions:\n'
            + '\n'.join(problems)
            + f'\nTo fix it: pip install {" ".join(wanted)}\n(mmcv has no wheel for '
            "today's torch; mmcv-lite of the same version is enough, in its place: "
            'pip uninstall --yes mmcv first, as the two write over each other.)'
        )
