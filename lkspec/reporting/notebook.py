"""Executes notebooks without Jupyter and renders each as one HTML page: ``python -m lkspec.reporting.notebook FILES``.

Cells run in order in one namespace, in the notebook's folder. What a cell prints and the value of its last expression
are shown, as Jupyter would: by ``_repr_html_``, ``_repr_png_`` or ``repr``. No magics, no widgets.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import html
import io
import json
import os
from pathlib import Path
from typing import Any

import markdown

from lkspec.files import write_text

_STYLE = """
body { font: 15px/1.55 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
pre { background: #f6f6f6; padding: .6rem .8rem; overflow-x: auto; font-size: .85rem; }
pre.out { background: none; border-left: 3px solid #ddd; } table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #eee; } img { max-width: 100%; }
"""


def render(path: Path) -> str:
    """Executes a notebook; returns the page.

    Raises:
        ValueError: a cell that fails; says which, the cause is the cell's own error.
    """
    parts = []
    with contextlib.chdir(path.parent):
        namespace: dict[str, Any] = {"__name__": "__main__"}
        for number, cell in enumerate(read_cells(path.name)):
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                parts.append(markdown.markdown(source, extensions=["tables", "fenced_code"]))
            elif cell["cell_type"] == "code":
                parts.append(f"<pre>{html.escape(source)}</pre>")
                parts.append(_executed(source, namespace, f"{path.name}, cell {number}"))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(path.stem)}</title>\n'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def read_cells(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The cells of a notebook file."""
    cells: list[dict[str, Any]] = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    return cells


def _executed(source: str, namespace: dict[str, Any], place: str) -> str:
    """Runs a cell; what it printed and its last value, as HTML."""
    tree = ast.parse(source, place)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(tree, place, "exec"), namespace)
            value = None if last is None else eval(compile(ast.Expression(last.value), place, "eval"), namespace)  # type: ignore[attr-defined]
    except Exception as error:
        raise ValueError(f"{place}: {type(error).__name__}: {error}") from error
    text = f'<pre class="out">{html.escape(printed.getvalue())}</pre>' if printed.getvalue() else ""
    return text if value is None else text + _displayed(value)


def _displayed(value: Any) -> str:
    if hasattr(value, "_repr_html_") and (text := value._repr_html_()) is not None:
        return str(text)
    if hasattr(value, "_repr_png_"):
        return f'<img alt="" src="data:image/png;base64,{base64.b64encode(value._repr_png_()).decode()}">'
    return f'<pre class="out">{html.escape(repr(value))}</pre>'


def main() -> None:
    """Renders notebooks into a folder."""
    parser = argparse.ArgumentParser(description="Executes notebooks and renders each as one HTML page.")
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("notebooks/rendered"))
    options = parser.parse_args()
    for path in options.notebooks:
        target = options.out.resolve() / f"{path.stem}.html"
        write_text(target, render(path))
        print(target)


if __name__ == "__main__":
    main()
