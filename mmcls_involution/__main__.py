"""The commands: ``python -m mmcls_involution COMMAND``."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from types import ModuleType

from mmcls_involution import compat

# name -> module with add_arguments(parser) and main(args), what it does
COMMANDS = {
    'train': ('engine.train', 'train the model of a config'),
    'test': ('engine.test', 'test a checkpoint: metrics, predictions, pictures'),
    'infer': ('apis.infer', 'run a model on images and videos'),
    'kernels': ('apis.vis_kernels', 'draw the kernels that a model generates'),
    'web': ('apis.web', 'a page for models, images and kernels, in the browser'),
    'check': ('data.report', 'the data of a config: what would spoil its training'),
    'flops': ('flops', 'parameters and FLOPs of a config'),
    'export': ('deployment.export', 'write a model for ONNX Runtime and others'),
    'reproduce': (
        'runs.reproduce',
        'train and test, and report beside the paper',
    ),
    'compare': ('runs.compare', 'compare configs over several seeds'),
    'convert': ('weights.convert', 'an official checkpoint into one of this package'),
    'publish': ('weights.publish', 'a checkpoint: make it small and safe to pass on'),
    'doctor': ('doctor', 'check the installation'),
}


def run(name: str) -> None:
    """Run a command with the arguments in ``sys.argv``; the scripts of tools/ do.

    What the user can put right ends in one message.
    """
    module = f'mmcls_involution.{COMMANDS[name][0]}'
    if name == 'doctor':  # it must run where nothing else does
        sys.exit(import_module(module).main())
    try:
        compat.apply()
        from mmcls_involution.engine.errors import one_message_per_error
        from mmcls_involution.engine.processes import leave_process_group
    except ImportError as error:
        sys.exit(
            f'Error: {error}\n'
            '`python -m mmcls_involution.doctor` checks the installation'
        )
    with one_message_per_error():
        command = import_module(module)
        command.main(parse(command))
        leave_process_group()


def parse(command: ModuleType) -> argparse.Namespace:
    """The arguments in ``sys.argv`` as a command's module understands them."""
    parser = argparse.ArgumentParser(
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    return parser.parse_args()


def main() -> None:
    """Run the command that the first argument names."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        asked = sys.argv[1:2] in (['-h'], ['--help'])
        lines = [f'  {name:<11}{what}' for name, (_, what) in COMMANDS.items()]
        print(
            'usage: python -m mmcls_involution COMMAND [--help] [ARGUMENTS ...]\n',
            *lines,
            sep='\n',
            file=sys.stdout if asked else sys.stderr,
        )
        sys.exit(0 if asked else 2)
    name = sys.argv.pop(1)
    sys.argv[0] = f'python -m mmcls_involution {name}'
    run(name)


if __name__ == '__main__':
    main()
