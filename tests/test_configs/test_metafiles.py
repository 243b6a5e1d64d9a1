"""The metafiles, the model index and the READMEs of configs: they agree with it all."""

from __future__ import annotations

import functools
import pickle
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.registry import init_default_scope
from modelindex.load_model_index import load
from paddleclas_cases import paddle_weights

import mmcls_involution.models  # noqa: F401
from mmcls_involution.flops import build_model, measure
from mmcls_involution.models import model_hub
from mmcls_involution.weights import paddleclas

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / 'configs'
PAPER = yaml.safe_load((CONFIGS / 'paper.yml').read_text())
# model-index.yml leaves configs/demo out
FILES = [f for f in CONFIGS.glob('*/*.py') if f.parent.name not in ('_base_', 'demo')]
METAFILES = sorted(CONFIGS.glob('*/metafile.yml'))
INDEX = load(str(ROOT / 'model-index.yml'))
MODELS = {model.name: model.full_model for model in INDEX.models}  # with collections
# metric in configs/paper.yml -> task and metric in metafiles, column in READMEs
METRICS = {
    'accuracy/top1': ('Image Classification', 'Top 1 Accuracy', 'Top-1 (%)'),
    'accuracy/top5': ('Image Classification', 'Top 5 Accuracy', 'Top-5 (%)'),
    'coco/bbox_mAP': ('Object Detection', 'box AP', 'box AP'),
    'coco/segm_mAP': ('Instance Segmentation', 'mask AP', 'mask AP'),
    'mIoU': ('Semantic Segmentation', 'mIoU', 'mIoU'),
}
# Weights of others, by the names of their models here: the depth of a RedNet
CONVERTED = {f'rednet{depth}_3rdparty_in1k': depth for depth in (26, 38, 50, 101, 152)}
TASKS = {
    'mmpretrain': 'Image Classification',
    'mmdet': 'Object Detection',
    'mmseg': 'Semantic Segmentation',
}

every_model = pytest.mark.parametrize('name', MODELS)
every_readme = pytest.mark.parametrize(
    'readme',
    [file.with_name('README.md') for file in METAFILES],
    ids=lambda file: file.parent.name,
)


@functools.cache
def read(name: str) -> Config:
    return Config.fromfile(ROOT / MODELS[name].config)


def length(cfg: Config) -> tuple[str, int]:
    """Epochs or iterations of training."""
    key = 'max_epochs' if 'max_epochs' in cfg.train_cfg else 'max_iters'
    return {'max_epochs': 'Epochs', 'max_iters': 'Iterations'}[key], cfg.train_cfg[key]


@functools.cache
def figures(name: str) -> tuple[int, int, str]:
    """Parameters, FLOPs and where they come from, as they should be."""
    if paper := PAPER.get(Path(MODELS[name].config).stem):
        return round(paper['params'] * 1e6), round(paper['flops'] * 1e9), 'paper'
    shape = map(int, MODELS[name].metadata.data['Input Shape'].split('x'))
    with torch.device('meta'):  # initializes nothing
        model = build_model(read(name))
    whole = measure(model, tuple(shape))['']
    return whole.trained, whole.flops, 'this package'


# --------------------------------------------------------------------------- metafiles


def test_index_imports_every_metafile():
    imports = yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']
    assert sorted(imports) == [str(f.relative_to(ROOT)) for f in METAFILES]
    errors = {e for item in INDEX.collect_check_errors() for e in item['errors']}
    # That check looks beside the metafile; OpenMMLab's paths begin at the root.
    assert {e for e in errors if not e.startswith('Path to README file')} == set()


def test_every_config_is_in_one_metafile():
    found = Counter(m.config for m in INDEX.models if m.name not in CONVERTED)
    assert found == Counter(str(file.relative_to(ROOT)) for file in FILES)


@every_model
def test_entry_fits_its_config(name):
    model, cfg = MODELS[name], read(name)
    folder = Path(model.filepath).parent
    if name not in CONVERTED:
        assert ROOT / model.config == folder / f'{name}.py'
    assert ROOT / model.readme == folder / 'README.md'
    assert (folder / 'README.md').is_file()
    assert model.in_collection in {c.name for c in INDEX.collections}
    assert name == name.lower()  # the hub and mim look up lower case

    metadata = model.metadata.data
    unit, number = length(cfg)
    assert metadata[unit] == number
    assert len(metadata.keys() & {'Epochs', 'Iterations'}) == 1
    batch_size = cfg.train_dataloader.batch_size
    if gpus := re.search(r'_(\d+)xb', model.config):
        batch_size *= int(gpus[1])
        assert metadata['Batch Size'] == batch_size
    base = cfg.get('auto_scale_lr', {}).get('base_batch_size', batch_size)
    assert metadata['Batch Size'] == base

    tasks = [TASKS[cfg.default_scope]]
    if 'mask_head' in cfg.model.get('roi_head', {}):
        tasks.append('Instance Segmentation')
    assert [result.task for result in model.results] == tasks
    data = metadata['Training Data']
    assert {result.dataset for result in model.results} == {data}


@every_model
def test_figures_are_the_papers_or_ours_and_say_so(name):
    model, paper = MODELS[name], PAPER.get(name, {})
    metadata = model.metadata.data
    found = [metadata[key] for key in ('Parameters', 'FLOPs', 'Figures From')]
    assert found == list(figures(name))
    if paper:
        assert metadata['Input Shape'] == '{}x{}'.format(*paper['input_shape'])
        assert model.paper['URL'] == 'https://arxiv.org/abs/2103.06255'

    scores = {
        (result.task, metric): score
        for result in model.results
        for metric, score in result.metrics.items()
    }
    expected = {METRICS[key][:2]: v for key, v in paper.get('scores', {}).items()}
    if name not in CONVERTED:
        assert scores == expected
        # The paper's scores are those of weights that nobody can get.
        assert model.weights is None


@pytest.mark.parametrize('name', CONVERTED)
def test_converted_weights_are_those_of_their_scheme(name):
    model, depth = MODELS[name], CONVERTED[name]
    assert read(name).model.backbone.get('depth', 50) == depth
    assert read(name).model.backbone.get('stem_kernel_size', 3) == 3
    file = paddleclas.FILES[f'RedNet{depth}']
    assert model.weights == f'{paddleclas.SCHEME}RedNet{depth}'
    converted = model.data['Converted From']
    assert converted['Weights'] == f'{paddleclas.BASE_URL}/{file}'
    assert model.metadata.data['Scores From'] == 'PaddleClas'
    # Copies of the authors' weights: the scores are a little apart, and no more.
    ours = model.results[0].metrics
    paper = PAPER[Path(model.config).stem]['scores']
    assert ours['Top 1 Accuracy'] == pytest.approx(paper['accuracy/top1'], abs=0.06)
    assert ours['Top 5 Accuracy'] == pytest.approx(paper['accuracy/top5'], abs=0.06)
    text = (CONFIGS / 'imagenet' / 'README.md').read_text()
    row = f'| {name} | `{model.weights}` | {ours["Top 1 Accuracy"]:.2f} | '
    assert f'{row}{ours["Top 5 Accuracy"]:.2f} | PaddleClas |' in text


def test_small_models_have_the_input_of_their_tests():
    """What the paper does not say, the configs do."""
    for name, model in MODELS.items():
        if name in PAPER:
            continue
        sizes = {
            (step['scale'][1], step['scale'][0])
            if step['type'] == 'Resize'
            else (step['crop_size'],) * 2
            for step in read(name).test_dataloader.dataset.pipeline
            if step['type'] in ('Resize', 'CenterCrop')
        }
        shape = tuple(map(int, model.metadata.data['Input Shape'].split('x')))
        assert sizes == {shape}, name


# ----------------------------------------------------------------------------- READMEs


@every_readme
def test_readme_table_has_the_figures_of_every_config(readme):
    tables = re.findall(r'(?m)(?:^\|.*\n)+', readme.read_text())
    (table,) = [table for table in tables if '| Config |' in table]
    header, _, *rows = [
        [cell.strip() for cell in line.strip('|').split('|')]
        for line in table.splitlines()
    ]
    rows = [dict(zip(header, row, strict=True)) for row in rows]
    link = re.compile(r'\[config\]\((.+)\.py\)')
    configs = [link.fullmatch(row['Config'])[1] for row in rows]
    assert sorted(configs) == sorted(f.stem for f in FILES if f.parent == readme.parent)

    for name, row in zip(configs, rows, strict=True):
        parameters, flops, source = figures(name)
        paper = PAPER.get(name)
        expected = {
            'Params (M)': str(paper['params']) if paper else f'{parameters / 1e6:.2f}',
            'FLOPs (G)': str(paper['flops']) if paper else f'{flops / 1e9:.2f}',
            'Figures from': source,
        }
        for key, (_, _, column) in METRICS.items():
            cell = '–'
            if score := (paper or {}).get('scores', {}).get(key):
                resnet50 = paper.get('resnet50', {}).get(key)
                cell = f'{score} ({resnet50})' if resnet50 else str(score)
            elif column not in header:
                continue
            expected[column] = cell
        assert row.items() >= expected.items()


@every_readme
def test_readme_names_what_exists(readme):
    text = readme.read_text()
    for link in re.findall(r'\]\(([^)]+)\)', text):
        if not link.startswith('https://'):
            file, _, section = link.partition('#')
            assert (readme.parent / file).exists(), link
            if section:
                titles = re.findall(r'#+ (.*)', (readme.parent / file).read_text())
                assert section in [t.lower().replace(' ', '-') for t in titles], link

    blocks = re.findall(r'```(?:sh|python)\n(.*?)```', text, re.DOTALL)
    assert blocks
    trained = []
    for block in blocks:
        if name := re.search(r"^name = '(.*)'$", block, re.MULTILINE):
            block = block.replace('{name}', name[1])
        for path in re.findall(r'\b(?:configs|tools|docs)/[\w./-]+', block):
            assert (ROOT / path).is_file(), path
        trained += re.findall(r'work_dirs/([^/\s]+)/(\w+)_(\d+)\.pth', block)
    assert trained
    for name, unit, number in trained:
        assert (ROOT / MODELS[name].config).parent == readme.parent
        key = {'epoch': 'Epochs', 'iter': 'Iterations'}[unit]
        assert length(read(name)) == (key, int(number)), name


# --------------------------------------------------------------------------- model hub


def classifiers() -> list[str]:
    return sorted(n for n in MODELS if read(n).default_scope == 'mmpretrain')


def test_hub_has_every_classifier_and_nothing_else_of_ours():
    from mmpretrain import list_models
    from mmpretrain.apis.model import ModelHub

    assert list_models('rednet', task='Image Classification') == classifiers()
    for name in MODELS:
        assert ModelHub.has(name) == (name in classifiers())


@pytest.mark.parametrize(
    'name',
    [
        'rednet152_64xb32-warmup-coslr_in1k',
        'rednet26_1xb32_bccd-cells',
        'rednet38_3rdparty_in1k',
    ],
)
def test_hub_reads_our_config(name):
    from mmpretrain.apis.model import ModelHub

    cfg = ModelHub.get(name).config
    assert cfg.model.to_dict() == read(name).model.to_dict()
    assert cfg.model.backbone.get('depth', 50) == int(re.match(r'rednet(\d+)', name)[1])


def test_examples_of_the_imagenet_readme_run(tmp_path, monkeypatch):
    """With weights of Paddle's form, put where the README says.

    What the examples print is taken from their own calls of print: standard output
    has MMPretrain's progress bar as well, in a form that depends on the terminal.
    """
    text = (CONFIGS / 'imagenet' / 'README.md').read_text()
    use, predict = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    init_default_scope('mmpretrain')  # other tests of this process had others
    weights = paddle_weights(50)
    weights['fc.bias'][7] = 1e6
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    cache = tmp_path / 'hub' / 'checkpoints'
    cache.mkdir(parents=True)
    (cache / 'RedNet50_pretrained.pdparams').write_bytes(pickle.dumps(weights))

    def run(example: str) -> tuple[dict, list[str]]:
        printed: list[str] = []
        scope = {'print': lambda *values: printed.append(' '.join(map(str, values)))}
        exec(example, scope)
        return scope, printed

    scope, (names, *shapes) = run(use)
    assert names == str(classifiers())
    assert shapes == re.findall(r'\)  # (torch\.Size.*)', use)
    model = scope['model']
    assert type(model.backbone).__name__ == 'RedNet'
    assert model.head.fc.weight.tolist() == weights['fc.weight'].T.tolist()
    monkeypatch.chdir(ROOT)
    assert run(predict)[1] == ['cock 1.0']


def test_registering_is_quiet_where_there_is_nothing_to_do(monkeypatch, tmp_path):
    from mmpretrain.apis.model import ModelHub

    model_hub.register_classifiers()  # a second time
    register = model_hub.register_classifiers.__wrapped__
    with pytest.raises(ValueError, match='conflict'):
        register()  # what its cache prevents
    with monkeypatch.context() as patch:
        patch.setattr(ModelHub, '_models_dict', {})
        patch.setattr(model_hub, 'ROOT', tmp_path)
        register()
        assert ModelHub._models_dict == {}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'mmpretrain.apis.model', None)
        register()
