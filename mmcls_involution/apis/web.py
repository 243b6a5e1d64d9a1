"""A web page: what a model finds in an image, and the kernels that it generates there.

    python -m mmcls_involution web [FOLDER] [--config CONFIG] [--host HOST] ...

Choose a checkpoint, drop an image, see boxes, masks or labels beside heat maps, click
on a pixel to see the kernels that it generates in each stage. The checkpoints are those
in FOLDER, each with the one config that lies beside it (as training leaves it) or else
with --config, and the hub's ImageNet classifiers, which are downloaded when they are
first chosen. Runs on the CPU, for this machine alone (127.0.0.1) unless --host says
otherwise, and needs no network but for these downloads.
"""

from __future__ import annotations

import argparse
import functools
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmcls_involution.apis.infer import (
    as_results,
    frames,
    label_map,
    picture_of,
    predict,
)
from mmcls_involution.apis.inferencer import (
    build_inferencer,
    class_names,
    find_config,
    hub,
)
from mmcls_involution.apis.vis_kernels import View, as_image, draw_kernels, look
from mmcls_involution.console import console
from mmcls_involution.engine.errors import UserError
from mmcls_involution.weights.fit import Misfit

SCORE_THR = 0.3  # as of the command `infer`
MAX_FILE_SIZE = '50mb'
TABLE = ('class', 'score', 'box or share')
# Whatever gradio's page asks for elsewhere, a browser leaves alone.
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'"
)


@dataclass(frozen=True)
class Answer:
    """What the page shows for an image.

    Attributes:
        message: One sentence: what was found, or why nothing is shown.
        picture: The prediction on the image, ``[H, W, 3]``, uint8, RGB.
        rows: Class, score, and box or share of the image, as text.
        heat: The heat maps, ``[h, w, 3]``, uint8, RGB.
        view: For :func:`kernels_at`.
        size: Width and height of the image.
    """

    message: str
    picture: np.ndarray | None = None
    rows: tuple[tuple[str, str, str], ...] = ()
    heat: np.ndarray | None = None
    view: View | None = None
    size: tuple[int, int] = (0, 0)


def find_models(
    folder: Path | None, config: str | None = None
) -> dict[str, tuple[str, str]]:
    """Config and weights by the names that the page offers: the newest first.

    Args:
        folder (Path, optional): Where checkpoints are looked for. None: only the hub's.
        config (str, optional): Of checkpoints that have not one config beside them;
            these are left out otherwise. Defaults to None.

    Raises:
        UserError: If there is no such folder or config.
    """
    if folder is not None and not folder.is_dir():
        raise UserError(f'No folder of checkpoints: {folder}.')
    fallback = find_config(config)[0] if config else None
    models = {}
    files = sorted(folder.rglob('*.pth'), key=os.path.getmtime) if folder else []
    for file in reversed(files):
        beside = [*file.parent.glob('*.py')]
        chosen = str(beside[0]) if len(beside) == 1 else fallback
        name = str(file.relative_to(folder))
        if chosen is None:
            console.print(f'{file} is left out: no config, or several, beside it')
        else:
            models[name] = chosen, str(file)
    return models | {f'hub: {name}': pair for name, pair in hub().items()}


@functools.lru_cache(maxsize=1)  # MMEngine has one default scope at a time
def load(config: str, weights: str) -> Any:
    """The Inferencer on the CPU; the last one is kept."""
    return build_inferencer(config, weights, 'cpu')


@torch.no_grad()
def answer(config: str, weights: str, file: str) -> Answer:
    """Run a model on an image file.

    Returns:
        Answer: With nothing but a message if the file is no image, or the checkpoint
        cannot be used.
    """
    (frame,) = frames([Path(file)], videos=False)
    if frame.fault:
        return Answer(frame.fault.replace(file, Path(file).name) + '.')
    try:
        inferencer = load(config, weights)
    except (UserError, Misfit, pickle.UnpicklingError, RuntimeError, OSError) as error:
        return Answer(f'{Path(weights).name} cannot be used: {error}')
    ((_, sample, fault),) = predict(inferencer, [frame])
    if fault:
        return Answer(fault.replace(file, Path(file).name))
    picture, undrawn = picture_of(inferencer, frame, sample, SCORE_THR)
    size, rows = frame.image.shape[1::-1], ()
    try:
        rows = _rows(sample, class_names(inferencer))
        view = look(inferencer, frame.image)
    except UserError as error:
        return Answer(str(error), picture, rows, size=size)
    found = f'{len(rows)} {"results" if len(rows) != 1 else "result"}'
    message = f'{found}. Click on a pixel of the prediction to see its kernels.'
    if undrawn:
        message = f'{undrawn.replace(file, Path(file).name)}. {message}'
    return Answer(message, picture, rows, as_image(draw_kernels(view)), view, size)


def _rows(sample: Any, classes: Any) -> tuple[tuple[str, str, str], ...]:
    def called(label: int) -> str:
        return str(classes[label]) if classes else f'class {label}'

    if hasattr(sample, 'pred_sem_seg'):
        labels, counts = np.unique(label_map(sample), return_counts=True)
        order = np.argsort(-counts)
        shares = counts / counts.sum()
        return tuple((called(labels[i]), '', f'{shares[i]:.1%}') for i in order)
    if hasattr(sample, 'pred_score'):
        scores = sample.pred_score
        best = scores.argsort(descending=True)[:5].tolist()
        return tuple((called(i), f'{scores[i]:.3f}', '') for i in best)
    return tuple(
        (
            called(result['category_id'] - 1),
            f'{result["score"]:.3f}',
            'x {:.0f}, y {:.0f}, {:.0f} x {:.0f}'.format(*result['bbox']),
        )
        for result in as_results(sample, 0, '', None)
        if result['score'] >= SCORE_THR
    )


def kernels_at(given: Answer | None, x: float, y: float) -> tuple[str, Any]:
    """The kernels of a pixel of the picture in an answer, in each stage.

    Returns:
        tuple[str, np.ndarray | None]: A message, and the picture.
    """
    if given is None or given.view is None:
        return 'There are no kernels to show: choose a model and drop an image.', None
    # the toolboxes may draw larger than the image
    height, width = given.picture.shape[:2]
    point = int(x * given.size[0] / width), int(y * given.size[1] / height)
    try:
        figure = draw_kernels(given.view, [point], heat=False)
    except UserError as error:
        return str(error), None
    message = (
        f'Kernels of the pixel x={point[0]}, y={point[1]}: in each stage, by group.'
    )
    return message, as_image(figure)


class _OwnFilesOnly:
    """Sends POLICY with every response."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: dict) -> None:
            if message['type'] == 'http.response.start':
                header = b'content-security-policy', POLICY.encode()
                message['headers'] = [*message.get('headers', ()), header]
            await send(message)

        await self.app(scope, receive, send_with_policy)


def build_page(models: dict[str, tuple[str, str]]) -> Any:
    """The page, a ``gradio.Blocks``.

    Args:
        models (dict): Of :func:`find_models`.

    Raises:
        UserError: If gradio is not installed.
    """
    os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
    try:
        import gradio
        from gradio import SelectData  # a folder of that name would do for the first
    except ImportError as error:
        raise UserError(
            'The web page needs gradio, and it cannot be imported '
            f'({error}): pip install gradio, or the extra [demo] of this package.'
        ) from error

    def show(name: str, file: str | None) -> tuple:
        if not file:
            given = Answer('Drop an image.')
        else:
            given = answer(*models[name], file)
        rows = [list(row) for row in given.rows]
        return given.message, given.picture, rows, given.heat, None, given

    def click(given: Answer | None, event: Any) -> tuple:
        return kernels_at(given, *event.index)

    # By which gradio knows what to pass; as text it could not be resolved.
    click.__annotations__['event'] = SelectData

    with gradio.Blocks(
        analytics_enabled=False,
        title='Involution',
        delete_cache=(3600, 3600),  # nobody's photos stay
    ) as page:
        with gradio.Row():
            model = gradio.Dropdown([*models], label='Model')
            file = gradio.File(label='Image', height=120, elem_id='file')
        message = gradio.Textbox(
            'Choose a model and drop an image.', label='Answer', elem_id='message'
        )
        options = dict(interactive=False, show_label=False, buttons=['fullscreen'])
        with gradio.Row():
            with gradio.Column():
                gradio.Markdown('**Prediction:** click on a pixel')
                picture = gradio.Image(elem_id='picture', **options)
                rows = gradio.Dataframe(headers=[*TABLE], interactive=False)
            with gradio.Column():
                gradio.Markdown('**Heat maps:** the sum of the values of each kernel')
                heat = gradio.Image(elem_id='heat', **options)
        gradio.Markdown('**Kernels of the pixel,** over what they read')
        kernels = gradio.Image(elem_id='kernels', **options)
        state = gradio.State(time_to_live=3600)
        shown = [message, picture, rows, heat, kernels, state]
        gradio.on([file.upload, file.clear, model.change], show, [model, file], shown)
        picture.select(click, [state], [message, kernels])
    return page


def serve(page: Any, host: str, port: int, block: bool = True) -> str:
    """Serve a page, and give its address.

    Raises:
        UserError: If the port is taken.
    """
    import gradio
    from starlette.middleware import Middleware

    fonts = dict(font=['system-ui', 'sans-serif'], font_mono=['monospace'])
    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            ssr_mode=False,
            quiet=True,
            footer_links=[],
            max_file_size=MAX_FILE_SIZE,
            state_session_capacity=8,  # each holds the kernels of an image
            theme=gradio.themes.Default(**fonts),
            app_kwargs=dict(middleware=[Middleware(_OwnFilesOnly)]),
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise UserError(f'Cannot serve at {host}:{port}: {error}') from error
    console.print(f'The page is at {url} until Ctrl-C')
    if block:
        page.block_thread()
    return url


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        'folder', nargs='?', type=Path, help='with checkpoints (default: work_dirs)'
    )
    parser.add_argument('--config', help='of checkpoints that have none beside them')
    parser.add_argument(
        '--host',
        default='127.0.0.1',
        help='address to serve at; 0.0.0.0 lets everybody in the network use the page, '
        'without a password (default: 127.0.0.1)',
    )
    parser.add_argument('--port', type=int, default=7860, help='default: 7860')


def main(args: argparse.Namespace) -> None:
    """The command ``web``."""
    folder = args.folder
    if folder is None and Path('work_dirs').is_dir():
        folder = Path('work_dirs')
    page = build_page(find_models(folder, args.config))
    serve(page, args.host, args.port)
