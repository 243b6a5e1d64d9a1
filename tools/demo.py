"""Draw a small data set, train a slim RedNet on it and show what it has learnt.

    python tools/demo.py

Mask R-CNN with a RedNet-26 of a quarter of the channels learns to find, name
and outline shapes. Runs on the CPU in about six minutes on two cores, through
tools/train.py and tools/test.py. Interrupted or killed, it goes on where it was;
finished, a second call only tests again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path

import cv2
import numpy as np
from mmengine.config import Config

from mmcls_involution import compat
from mmcls_involution.runs.commands import StepError, run_command

ROOT = Path(__file__).resolve().parents[1]
CONFIG = Path('configs/demo/mask-rcnn_rednet26-slim_fpn_shapes.py')  # from ROOT
# what the demo promises on the held-out images, AP at IoU 0.5
PROMISE = {
    'coco/bbox_mAP_50': ('box AP50', 0.5),
    'coco/segm_mAP_50': ('mask AP50', 0.4),
}
NEXT_STEPS = """\
What to try next
  - the swap itself is one dict: model.backbone in
      {config}
  - real photos: get GitHub's Shenggan/BCCD_Dataset (blood cells), then
      python tools/dataset_converters/bccd.py BCCD_Dataset
      python tools/train.py configs/bccd/faster-rcnn_rednet50_fpn_bccd.py
    and compare with its ResNet-50 twin, configs/bccd/faster-rcnn_r50_fpn_bccd.py
  - your own data: the top of configs/_base_/datasets/bccd_detection.py says how
  - the tests: make test"""


def run_tool(name: str, *args: object) -> None:
    """Run a script of tools/ on the CPU and show its progress.

    Args:
        name (str): Path of the script below tools/.
        *args: Its arguments.

    Raises:
        StepError: If it fails.
    """
    env = {
        **os.environ,
        'CUDA_VISIBLE_DEVICES': '',
        # The model is so small that a second thread gains little, and where another
        # program keeps a core busy the threads' waiting makes it many times slower.
        'OMP_NUM_THREADS': '1',
        'PYTHONWARNINGS': 'ignore',
    }

    def show(line: str) -> None:
        if progress := summarize(line):
            print(f'  {progress}', flush=True)

    command = [sys.executable, str(ROOT / 'tools' / name), *map(str, args)]
    run_command(f'tools/{name}', command, show, env=env)


def summarize(line: str) -> str | None:
    """Shorten a progress line of MMEngine's log; None for any other line."""
    if found := re.search(
        r'Epoch\(train\)\s+\[(\d+)\]\[\s*(\d+)/(\d+)\].*eta: (\S+).*? loss: (\S+)', line
    ):
        epoch, iteration, total, eta, loss = found.groups()
        return (
            f'epoch {epoch:>2}  iteration {iteration:>3}/{total}  '
            f'loss {float(loss):.3f}  time left {eta}'
        )
    if scores := dict(re.findall(r'(coco/\w+_mAP_50): (-?[\d.]+)', line)):
        return '  '.join(
            f'{name} {float(scores[key]):.3f}'
            for key, (name, _) in PROMISE.items()
            if key in scores
        )
    if found := re.search(r'Epoch\(test\)\s+\[\s*(\d+)/(\d+)\].*eta: (\S+)', line):
        done, total, eta = found.groups()
        return f'image {done:>3}/{total}  time left {eta}'
    return None


def draw_contact_sheet(
    pictures: list[Path], out: Path, scale: float = 0.75, columns: int = 3
) -> None:
    """Tile pictures of ground truth beside prediction, under a heading.

    Args:
        pictures (list[Path]): Pictures of one size.
        out (Path): JPEG file to write.
        scale (float): Of the pictures. Defaults to 0.75.
        columns (int): Defaults to 3.
    """
    gap, heading = 8, 26
    tiles = []
    for path in pictures:
        tile = cv2.imread(str(path))
        tile = cv2.resize(tile, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        tile[:, tile.shape[1] // 2 - 1 : tile.shape[1] // 2 + 1] = 255
        tiles.append(cv2.copyMakeBorder(tile, gap, 0, gap, 0, 0, value=(255,) * 3))
    rows = [
        np.hstack(tiles[i : i + columns])
        for i in range(0, len(tiles) - columns + 1, columns)
    ]
    sheet = np.vstack(rows)
    sheet = cv2.copyMakeBorder(sheet, heading, gap, 0, gap, 0, value=(255,) * 3)
    width = tiles[0].shape[1]
    for column in range(columns):
        for half, text in enumerate(('ground truth', 'prediction')):
            cv2.putText(
                sheet,
                text,
                (column * width + gap + half * (width - gap) // 2, heading - 4),
                cv2.FONT_HERSHEY_SIMPLEX,
                0.55,
                (40, 40, 40),
                1,
                cv2.LINE_AA,
            )
    cv2.imwrite(str(out), sheet, [cv2.IMWRITE_JPEG_QUALITY, 88])


def run_demo(work_dir: Path) -> bool:
    """Do all the steps that are not yet done.

    Args:
        work_dir (Path): Folder for checkpoints, logs and pictures.

    Returns:
        bool: Whether the scores are what the demo promises.

    Raises:
        StepError: If a step fails.
    """
    compat.apply()
    cfg = Config.fromfile(CONFIG)
    data = Path(cfg.data_root)
    if (data / 'annotations' / 'val.json').is_file():
        print(f'[1/3] Data: {data} is there already', flush=True)
    else:
        print('[1/3] Drawing the data set (some seconds)', flush=True)
        run_tool('dataset_converters/shapes.py', '--out', data)

    checkpoint = work_dir / f'epoch_{cfg.train_cfg.max_epochs}.pth'
    if checkpoint.is_file():
        print(f'[2/3] Training: {checkpoint} is there already', flush=True)
    else:
        print('[2/3] Training on the CPU (about five minutes)', flush=True)
        run_tool('train.py', CONFIG, '--work-dir', work_dir, '--resume')

    print('[3/3] Testing on the held-out images (half a minute)', flush=True)
    pictures, metrics = work_dir / 'pictures', work_dir / 'scores.json'
    run_tool(
        'test.py',
        CONFIG,
        checkpoint,
        '--work-dir',
        work_dir / 'test',
        '--show-dir',
        pictures,
        '--out',
        metrics,
        '--out-item',
        'metrics',
    )
    sheet = work_dir / 'demo.jpg'
    draw_contact_sheet(sorted(pictures.glob('*.jpg'))[:12], sheet)

    scores = json.loads(metrics.read_text())
    kept = True
    print()
    for key, (name, least) in PROMISE.items():
        verdict = 'as promised' if scores[key] > least else 'TOO LOW'
        kept &= scores[key] > least
        print(f'{name:>9} {scores[key]:.3f}   (promised: above {least}; {verdict})')
    print(f'\nPictures, ground truth beside prediction: {pictures}')
    print(f'Twelve of them on one sheet:              {sheet}')
    print(f'\n{NEXT_STEPS.format(config=CONFIG)}')
    return kept


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--work-dir',
        type=Path,
        default=ROOT / 'work_dirs' / 'demo',
        help='folder for checkpoints, logs and pictures (default: %(default)s)',
    )
    work_dir = parser.parse_args().work_dir.resolve()
    os.chdir(ROOT)  # CONFIG and its data root are relative to it
    start = time.time()
    try:
        kept = run_demo(work_dir)
    except StepError as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        sys.exit('\nInterrupted: the same command goes on from the last epoch')
    print(f'\nDone in {(time.time() - start) / 60:.1f} minutes.')
    if not kept:
        sys.exit(
            'error: the scores are below what the demo promises. Train anew by '
            f'removing {work_dir}; if they stay low, please report it with '
            'the output of python -m mmcls_involution.doctor.'
        )


if __name__ == '__main__':
    main()
