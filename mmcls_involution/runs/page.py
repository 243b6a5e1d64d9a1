"""The pages report.md and report.html: one template, and the second from the first."""

from __future__ import annotations

import base64
import html
import os
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import cv2
from jinja2 import Environment
from markdown_it import MarkdownIt
from markdown_it.token import Token

TEMPLATE = """\
# {{ title }}

{{ table }}

{% if pages|length > 1 %}
{% for page in pages if page.error %}
**{{ page.name }} failed**

```text
{{ page.error }}
```

{% endfor %}
{% else %}
{% set page = pages[0] %}
{% if page.error %}
**Failed; what follows is from before.**

```text
{{ page.error }}
```

{% endif %}
{% for text in page.tolerances + page.notes %}
- {{ text }}
{% endfor %}

## What ran

{% for key, value in page.about %}
- {{ key }}: `{{ value }}`
{% endfor %}
{% for name, step in page.steps %}

{{ name }}, {{ step.time }}, {{ step.revision }}:

```sh
{{ step.command }}
```
{% endfor %}

## Curves

{% if page.curves %}
![Loss and scores over the training]({{ page.curves|path }})
{% else %}
None: {{ page.no_curves }}.
{% endif %}

## Example predictions

{{ page.caption }}

{% for file in page.examples %}
![{{ file.stem }}]({{ file|path }})
{% else %}
None.
{% endfor %}

## All scores of the test

{% for key, value in page.scores %}
- {{ key }}: {{ value }}
{% else %}
None.
{% endfor %}

## Environment

{% for key, value in page.environment %}
- {{ key }}: {{ value }}
{% else %}
Nothing has run.
{% endfor %}
{% endif %}

Written {{ now }} by `python -m mmcls_involution reproduce`.
"""
# The columns of the scores, as runs.metrics.compare gives them.
SCORES = (
    *('Score', 'Paper, RedNet', 'Paper, ResNet-50', 'Ours'),
    *('Difference', 'Tolerance', 'Verdict'),
)
STYLE = """\
:root { color-scheme: light dark;
  --line: color-mix(in srgb, currentColor 20%, Canvas); }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere;
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
pre { border: 1px solid var(--line); padding: .7rem .9rem; white-space: pre-wrap; }
pre, code { font-size: .85rem; }
img { max-width: min(100%, 40rem); height: auto; background: #fff; }
"""


def embed(file: Path) -> str:
    """A picture as a data URI, photos no wider than a page shows them."""
    if file.name == 'curves.png':
        kind, content = 'png', file.read_bytes()
    else:
        picture = cv2.imread(str(file))
        height, width = picture.shape[:2]
        if width > 960:
            size = (960, round(height * 960 / width))
            picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        quality = [cv2.IMWRITE_JPEG_QUALITY, 88]
        kind, content = 'jpeg', cv2.imencode('.jpg', picture, quality)[1].tobytes()
    return f'data:image/{kind};base64,{base64.b64encode(content).decode()}'


def write(folder: Path, pages: list[dict[str, Any]]) -> None:
    """Write report.md and report.html: one page whole, or several as one table.

    Args:
        folder: Where to; links in the report are relative to it.
        pages: What :func:`mmcls_involution.runs.report.describe` gives.
    """
    names = pages[0]['name'] if len(pages) == 1 else f'{len(pages)} configs'
    title = f'Reproduction of {names}'

    def path(file: Path) -> str:
        return quote(os.path.relpath(file, folder))

    several = len(pages) > 1
    rows = [[*(['Config'] if several else []), *SCORES]]
    rows.append(['---'] * len(rows[0]))
    for page in pages:
        link = [f'[{page["name"]}]({path(page["link"])}.md)'] if several else []
        rows += [[*link, *row.values()] for row in page['rows']]
    jinja = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    jinja.filters['path'] = path
    text = jinja.from_string(TEMPLATE).render(
        title=title,
        table='\n'.join(f'| {" | ".join(row)} |' for row in rows),
        pages=pages,
        now=time.strftime('%Y-%m-%d %H:%M:%S'),
    )
    (folder / 'report.md').write_text(text, encoding='utf-8')
    (folder / 'report.html').write_text(as_html(text, title, folder), encoding='utf-8')


def as_html(text: str, title: str, folder: Path) -> str:
    """A page in one file: pictures are in it, links lead to other such pages.

    Args:
        text: The page in Markdown.
        title: For the browser.
        folder: What its links are relative to.
    """
    markdown = MarkdownIt('commonmark', dict(html=False, xhtmlOut=False))
    markdown.enable('table')

    def picture(tokens: list[Token], index: int, *_: Any) -> str:
        token = tokens[index]
        file, name = folder / unquote(token.attrs['src']), html.escape(token.content)
        return f'<img src="{embed(file)}" alt="{name}" title="{name}">'

    markdown.renderer.rules['image'] = picture
    tokens = markdown.parse(text)
    for token in tokens:
        for link in token.children or ():
            if link.type == 'link_open' and link.attrs['href'].endswith('.md'):
                link.attrs['href'] = link.attrs['href'].removesuffix('md') + 'html'
    body = markdown.renderer.render(tokens, markdown.options, {})
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{html.escape(title)}</title>\n<style>\n{STYLE}</style>\n{body}'
        '</html>\n'
    )
