"""A comparison as one HTML file that needs neither the network nor other files."""

import base64
from collections.abc import Sequence
from html import escape

from experiments.comparison.tables import Table

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff }
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.5rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .8rem; text-align: left; border-bottom: 1px solid #ddd; white-space: nowrap }
th { cursor: pointer; white-space: normal; border-bottom: 2px solid #888; vertical-align: bottom }
th[aria-sort=ascending]::after { content: " ▲" } th[aria-sort=descending]::after { content: " ▼" }
tbody tr:hover { background: #f4f7fa }
img { max-width: 100%; height: auto }
p, li, summary { color: #444 } code { background: #f3f3f3; padding: .1rem .3rem; overflow-wrap: anywhere }
"""

# Sorts numbers by size, `1,024 ± 3` by the mean, and cells without a number last.
_SORT = """
document.querySelectorAll('th').forEach(head => head.onclick = () => {
  const up = head.getAttribute('aria-sort') !== 'ascending';
  head.parentNode.querySelectorAll('th').forEach(other => other.removeAttribute('aria-sort'));
  head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
  const body = head.closest('table').tBodies[0], rows = [...body.rows];
  const text = row => row.cells[head.cellIndex].textContent.trim();
  const number = row => parseFloat(text(row).replaceAll(',', ''));
  const numbers = rows.filter(row => !isNaN(number(row)));
  const others = rows.filter(row => isNaN(number(row))).sort((a, b) => text(a).localeCompare(text(b)));
  numbers.sort((a, b) => number(a) - number(b));
  if (!up) { numbers.reverse(); others.reverse(); }
  body.append(...numbers, ...others);
});
"""


def page(
    command: str,
    notes: Sequence[str],
    sections: dict[str, Table | bytes | None],
    runs: Table,
    title: str = "Comparison of runs",
) -> str:
    """Return the page: sections with a table or a PNG image, notes on the first, and the runs to unfold."""
    shown = [
        f"<h2>{escape(heading)}</h2>\n{_table(content) if isinstance(content, Table) else _image(content, heading)}\n"
        for heading, content in sections.items()
        if content is not None
    ]
    shown.insert(1, f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>\n")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(command)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f"<body><h1>{escape(title)}</h1>\n<p><code>{escape(command)}</code></p>\n{''.join(shown)}"
        f"<h2>Runs</h2>\n<details><summary>all {len(runs.rows)}</summary>{_table(runs)}</details>\n"
        f"<script>{_SORT}</script>\n</body></html>\n"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in table.rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def _image(png: bytes, what: str) -> str:
    return f'<img alt="{escape(what)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
