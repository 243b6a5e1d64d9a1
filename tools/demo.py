"""Draw a small data set, train a slim RedNet on it and show what it has learnt.

    python tools/demo.py

Mask R-CNN with a RedNet-26 of a quarter of the channels learns to find, name
and outline shapes. Runs on the CPU in about six minutes on two cores, as
tools/reproduce.py does it, and leaves the same page. Interrupted or killed, it goes on
where it was.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from matplotlib import pyplot as plt
from mmengine.config import Config

from mmcls_involution import compat
from mmcls_involution.engine.errors import UserError
from mmcls_involution.runs import reproduce

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
  - your own data: docs/own_data.md
  - the tests: make test"""


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


def show(line: str) -> None:
    """Print what is worth it of a line of MMEngine's log."""
    if progress := summarize(line):
        print(f'  {progress}', flush=True)


def draw_contact_sheet(pictures: list[Path], out: Path, columns: int = 3) -> None:
    """Tile pictures of ground truth beside prediction, under headings."""
    rows = -(-len(pictures) // columns)
    size = 3.2 * columns, 1.8 * rows
    figure, axes = plt.subplots(rows, columns, figsize=size, layout='constrained')
    for axis in axes.flat:
        axis.axis('off')
    for axis, picture in zip(axes.flat, pictures, strict=False):
        axis.imshow(plt.imread(picture))
        axis.set_title('ground truth | prediction', fontsize=8)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def run_demo(work_dir: Path) -> bool:
    """Do all the steps that are not yet done.

    Args:
        work_dir (Path): Folder for checkpoints, logs and pictures.

    Returns:
        bool: Whether the scores are what the demo promises.

    Raises:
        UserError: If a step fails.
    """
    compat.apply()
    data = Path(Config.fromfile(CONFIG).data_root)
    if (data / 'annotations' / 'val.json').is_file():
        print(f'Data: {data} is there already', flush=True)
    else:
        print('Drawing the data set (some seconds)', flush=True)
        script = ROOT / 'tools' / 'dataset_converters' / 'shapes.py'
        if subprocess.call([sys.executable, script, '--out', data]):
            raise UserError(f'{script.relative_to(ROOT)} failed, see above')

    print('Training and testing on the CPU (about five minutes)', flush=True)
    parser = argparse.ArgumentParser()
    reproduce.add_arguments(parser)
    arguments = [str(CONFIG), '--work-dir', str(work_dir)]
    (job,) = reproduce.prepare(parser.parse_args(arguments))
    job.show = show
    reproduce.reproduce(job)
    if job.error:
        raise UserError(job.error)

    pictures, sheet = job.folder / 'examples', work_dir / 'demo.jpg'
    draw_contact_sheet(sorted(pictures.glob('*.jpg')), sheet)
    scores = job.record['test']['scores']
    kept = True
    print()
    for key, (name, least) in PROMISE.items():
        verdict = 'as promised' if scores[key] > least else 'TOO LOW'
        kept &= scores[key] > least
        print(f'{name:>9} {scores[key]:.3f}   (promised: above {least}; {verdict})')
    print(f'\nPictures, ground truth beside prediction: {pictures}')
    print(f'On one sheet:                             {sheet}')
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
    os.environ.update(
        CUDA_VISIBLE_DEVICES='',
        # The model is so small that a second thread gains little, and where another
        # program keeps a core busy the threads' waiting makes it many times slower.
        OMP_NUM_THREADS='1',
        PYTHONWARNINGS='ignore',
    )
    start = time.time()
    try:
        kept = run_demo(work_dir)
    except UserError as error:
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
