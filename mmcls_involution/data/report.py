"""Look through the data of a config for what would stop or spoil its training.

    python -m mmcls_involution check CONFIG [--split train val test]

reads every image and every label of the config's data sets, on all processor cores,
and lists what is wrong with them, the first ten places of each kind; --out gets all, a
line each. The exit code is 1 if there is anything. It knows the data sets that read
like MMDetection's CocoDataset, MMSegmentation's BaseSegDataset (CityscapesDataset) or
MMPretrain's CustomDataset (ImageNet). See docs/datasets.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from pathlib import Path

from mmcls_involution.data.checks import check_in_full, data_sets
from mmcls_involution.data.rules import RULES, Finding, together
from mmcls_involution.engine.config import add_cfg_options, check_output, read_config
from mmcls_involution.engine.errors import UserError

SHOWN = 10  # findings per rule in the report


def report(found: list[Finding]) -> None:
    """Print findings grouped by rule, the first of each."""
    groups = defaultdict(list)
    for finding in found:
        groups[finding.rule].append(finding)
    for name in sorted(groups, key=list(RULES).index):
        group = groups[name]
        print(f'  {name}: {len(group)} ({RULES[name].fix})')
        for finding in group[:SHOWN]:
            print(f'    {finding}')
        if len(group) > SHOWN:
            print(f'    ... and {len(group) - SHOWN} more')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument('config', help='file, or name of a config of this package')
    parser.add_argument(
        '--split',
        nargs='+',
        choices=('train', 'val', 'test'),
        help='what to check (default: all that the config has)',
    )
    parser.add_argument(
        '--out', type=Path, help='write all findings to this file, a line each'
    )
    parser.add_argument(
        '--workers',
        type=int,
        default=os.cpu_count(),
        help='processes that decode images (default: the number of cores)',
    )
    add_cfg_options(parser)


def check(args: argparse.Namespace) -> int:
    """Check the splits of a config and print the report.

    Returns:
        int: Number of findings.
    """
    if args.out:
        check_output(args.out, '--out', in_place=True)
    cfg = read_config(args.config, args.cfg_options)
    if not cfg.get('model'):
        raise UserError(
            f"{args.config} has no 'model', to whose classes the data must fit. It may "
            'be one that others are meant to inherit.'
        )
    splits = args.split or [
        split for split in ('train', 'val', 'test') if cfg.get(f'{split}_dataloader')
    ]
    lines, seen = [], {}
    for split in splits:
        parts = data_sets(cfg, split)
        if not parts:
            raise UserError(f'{args.config} has no data set in {split}_dataloader')
        results = []
        for path, part in parts:
            content = str({k: v for k, v in part.items() if k != 'pipeline'})
            if content in seen:
                print(f'{path}: the same as {seen[content]}')
                continue
            seen[content] = path
            found = check_in_full(cfg, path, part, args.workers)
            report([finding for finding in found if not finding.lacks])
            results.append(found)
        for found in together(results):
            report([finding for finding in found if finding.lacks])
            lines += [f'{split}\t{f.rule}\t{f.place}\t{f.what}' for f in found]
    if args.out:
        args.out.write_text(''.join(f'{line}\n' for line in lines))
    where = f', listed in {args.out}' if args.out and lines else ''
    print(f'Findings: {len(lines) or "none"}{where}')
    return len(lines)


def main(args: argparse.Namespace) -> None:
    """The command ``check``."""
    try:
        number = check(args)
    except KeyboardInterrupt:
        sys.exit('Interrupted: the check is not complete')
    sys.exit(1 if number else 0)
