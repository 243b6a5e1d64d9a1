"""Run a script of OpenMMLab's on today's torch.

    python -m mmcls_involution.compat SCRIPT [ARGS]

runs SCRIPT as ``python SCRIPT [ARGS]`` would, with the repairs and mmcv's operators in
place. ``mmdet::analysis_tools/analyze_logs.py`` names a script in the ``tools`` folder
that came with a toolbox, as ``mmdet::...`` names a config in ``_base_``.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from mmcls_involution import compat


def find_script(name: str) -> Path:
    """The file that SCRIPT names.

    Raises:
        SystemExit: If there is none; the text says where it was looked for.
    """
    package, separator, rest = name.rpartition('::')
    if separator:
        try:
            script = Path(compat.get_installed_path(package), '.mim', 'tools', rest)
        except ModuleNotFoundError as error:
            raise SystemExit(str(error)) from None
    else:
        script = Path(name)
    if not script.is_file():
        raise SystemExit(f'There is no script {script}')
    return script


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    if sys.argv[1] in ('-h', '--help'):
        print(__doc__)
        return
    compat.check_versions()
    compat.apply()
    script = find_script(sys.argv[1])
    sys.argv = [str(script), *sys.argv[2:]]
    sys.path[0] = str(script.resolve().parent)  # as Python does for a script
    try:
        runpy.run_path(str(script), run_name='__main__')
    except ModuleNotFoundError as error:
        # Some of the scripts need more than their toolbox installs.
        raise SystemExit(
            f'{error}: {script} needs it; pip install {error.name}'
        ) from error


if __name__ == '__main__':
    main()
