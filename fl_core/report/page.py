"""A self-contained HTML page: one file, pictures inside, no script, nothing fetched from elsewhere."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from fl_core.storage import atomic

STYLE = """
:root{color-scheme:light dark;--ink:#1b2733;--soft:#5b6b7a;--line:#d9e0e6;--back:#f6f8fa;--card:#fff;--accent:#0b7a53}
@media(prefers-color-scheme:dark){:root{--ink:#e4eaf0;--soft:#9fb0c0;--line:#2c3a47;--back:#10181f;--card:#182430;--accent:#3ecf9a}}
*{box-sizing:border-box}body{margin:0;background:var(--back);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:1060px;margin:0 auto;padding:2.2rem 1.2rem 4rem}h1{margin:0;font-size:1.9rem}h2{margin:2.4rem 0 .6rem;font-size:1.25rem}
p.lead{margin:.3rem 0 1.4rem;color:var(--soft)}.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:.8rem}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.8rem 1rem}.card b{display:block;font-size:1.45rem;color:var(--accent)}
.card span{color:var(--soft);font-size:.88rem}figure{margin:1rem 0;background:#fff;border:1px solid var(--line);border-radius:10px;padding:.6rem}
figure img{width:100%;height:auto;display:block}figcaption{color:#5b6b7a;font-size:.88rem;padding:.4rem .3rem 0}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;background:var(--card);border:1px solid var(--line);font-size:.93rem}
th,td{padding:.42rem .7rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}th{color:var(--soft);font-weight:600}
th:first-child,td:first-child{text-align:left}code{font-size:.88em;overflow-wrap:anywhere}footer{margin-top:3rem;color:var(--soft);font-size:.85rem}
"""


def shown(value: Any) -> str:
    """Numbers as people read them; None and NaN as a dash."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


class Page:
    """Built from top to bottom; all text is escaped."""

    def __init__(self, title: str, lead: str) -> None:
        self.title, self._parts = title, [f"<h1>{html.escape(title)}</h1><p class=lead>{html.escape(lead)}</p>"]

    def section(self, heading: str) -> Self:
        self._parts.append(f"<h2>{html.escape(heading)}</h2>")
        return self

    def text(self, paragraph: str) -> Self:
        self._parts.append(f"<p>{html.escape(paragraph)}</p>")
        return self

    def cards(self, facts: Sequence[tuple[str, Any]]) -> Self:
        """(label, value) pairs as large figures."""
        cells = "".join(
            f"<div class=card><b>{html.escape(shown(v))}</b><span>{html.escape(k)}</span></div>" for k, v in facts
        )
        self._parts.append(f"<div class=cards>{cells}</div>")
        return self

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> Self:
        head = "".join(f"<th>{html.escape(h)}</th>" for h in headings)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(shown(v))}</td>" for v in row) + "</tr>" for row in rows)
        self._parts.append(
            f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )
        return self

    def picture(self, png: bytes, caption: str) -> Self:
        data = base64.b64encode(png).decode()
        text = html.escape(caption)
        self._parts.append(
            f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'
        )
        return self

    def write(self, path: Path) -> None:
        body = "\n".join(self._parts)
        document = (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>{html.escape(self.title)}</title><style>{STYLE}</style></head><body><main>{body}"
            f"<footer>fieldfleet</footer></main></body></html>\n"
        )
        atomic.write_bytes(path, document.encode())
