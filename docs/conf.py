"""The documentation site: `make docs`.

The source folder of Sphinx is the repository, so that links between its pages, also to
configs and their READMEs, are the same in the site as on the repository's page. Files
that are no pages are copied into the site where a page links to them.
"""

from __future__ import annotations

import re
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

from mmcls_involution import __version__, compat

compat.apply()  # the toolboxes can be imported, for the docstrings of the models

ROOT = Path(__file__).resolve().parents[1]

project = 'mmcls_involution'
author = 'the contributors of mmcls_involution'
version = release = __version__
root_doc = 'docs/index'
include_patterns = [
    *('docs/*.md', 'configs/*/README.md', 'CHANGELOG.md', 'CONTRIBUTING.md'),
]
exclude_patterns = ['.*', 'build', 'data', 'work_dirs', 'tests', 'mmcls_involution']

extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
myst_heading_anchors = 3
myst_enable_extensions = ['html_image']  # the README's pictures have widths

autodoc_typehints = 'none'  # docstrings have them, with shapes
napoleon_google_docstring = True
napoleon_custom_sections = [('Shape', 'notes_style')]

html_theme = 'furo'
html_title = f'mmcls_involution {version}'
html_extra_path = ['site']  # index.html, which leads to docs/index.html
html_copy_source = html_show_copyright = False
html_math_renderer = 'mathml'


def begin_with_readme(app: Sphinx, name: str, source: list[str]) -> None:
    """Put the README before the table of contents; its links are from the root."""
    if name == root_doc:
        readme = (ROOT / 'README.md').read_text(encoding='utf-8')
        source[0] = (
            re.sub(r'(\]\(|<img src=")(?!https?:|#)', r'\1../', readme) + source[0]
        )


def write_inline(translator, node: nodes.math) -> None:
    """Write a formula as MathML, which browsers know: MathJax comes by network."""
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def write_block(translator, node: nodes.math_block) -> None:
    """Write a displayed formula, as :func:`write_inline` does."""
    translator.body.append(tex2mathml(node.astext(), as_block=True))
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Register what is above."""
    app.connect('source-read', begin_with_readme)
    app.add_html_math_renderer('mathml', (write_inline, None), (write_block, None))
