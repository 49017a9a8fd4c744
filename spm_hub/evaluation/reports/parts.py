"""Parts of pages: their head and style, tables, and pictures as data addresses."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL.Image import Image, Resampling

LARGEST = 256
"""Pixels of the longer side of a picture on a page."""

HEAD = (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
)
"""The begin of a page, which loads nothing."""

STYLE = """
:root { color-scheme: light dark; --ink: #18181b; --paper: #fff; --faint: #71717a; --line: #d4d4d8; --bad: #b91c1c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #f4f4f5; --paper: #18181b; --faint: #a1a1aa; --line: #3f3f46; --bad: #f87171; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1200px; padding: 16px; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } h3 { font-size: 1rem; margin: 1rem 0 .25rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 12px; }
figure { margin: 0; } figcaption { font-size: .8rem; color: var(--faint); }
.pair { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: 2px; }
.pair img { width: 100%; image-rendering: auto; display: block; } .damage { color: var(--bad); }
svg { width: 100%; height: auto; min-width: 560px; max-width: 760px; }
.heat th { white-space: normal; font-weight: normal; min-width: 11rem; } .heat td { text-align: center; padding: 4px; }
.heat td { min-width: 4.5rem; background-color: #fff; } svg text { font: 13px system-ui, sans-serif; fill: var(--ink); }
"""


def data_address(picture: Image) -> str:
    """Return a picture as a data address, at most LARGEST pixels wide and high."""
    if max(picture.size) > LARGEST:
        picture = picture.copy()
        picture.thumbnail((LARGEST, LARGEST), Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def rows_in_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table that scrolls on its own where the page is narrow."""
    head = "".join(f"<th>{escape(one)}</th>" for one in headings)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
