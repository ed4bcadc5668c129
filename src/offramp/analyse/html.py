"""The report as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
from html import escape
from typing import TYPE_CHECKING

from offramp.analyse.plot import picture
from offramp.analyse.table import columns, facts, rows

if TYPE_CHECKING:
    from offramp.analyse.report import Report

__all__ = ["page"]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
       color: #1a1a1a; background: #fff }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .8rem; text-align: right; white-space: nowrap;
         border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
tr.chosen td { font-weight: 600; background: #fdf0e6 }
.verdict { padding: .8rem 1rem; border-left: 4px solid #1b9e77; background: #eef7f4 }
.verdict.no { border-color: #d95f02; background: #fdf0e6 }
.note { color: #a04000 }
img { max-width: 100% }
pre { overflow-x: auto; background: #f6f6f6; padding: 1rem; font-size: 12px }
"""


def page(report: Report) -> str:
    """Verdict, table, picture and the whole JSON on one page; the picture is inside it."""
    image = base64.b64encode(picture(report)).decode("ascii")
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns(report))
    lines = []
    for label, cells in rows(report):
        marked = ' class="chosen"' if label == "early exits" else ""
        filled = "".join(f"<td>{escape(cell)}</td>" for cell in (label, *cells))
        lines.append(f"<tr{marked}>{filled}</tr>")
    below = "".join(f"<li>{escape(name)}: {escape(text)}</li>" for name, text in facts(report))
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in report.notes)
    tone = "verdict" if report.verdict.worth_it else "verdict no"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Early exits: report</title>
<style>{STYLE}</style>
</head>
<body>
<h1>Early exits: report</h1>
<p class="{tone}">{escape(report.verdict.text)}</p>
{notes}
<div class="scroll"><table>
<thead><tr>{heads}</tr></thead>
<tbody>
{"".join(lines)}
</tbody>
</table></div>
<ul>{below}</ul>
<img alt="{escape(report.measure)} against cost" src="data:image/png;base64,{image}">
<details><summary>All numbers (JSON)</summary><pre>{escape(report.to_json())}</pre></details>
</body>
</html>
"""
