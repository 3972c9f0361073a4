"""What notebooks show: pages and pictures that know how to display themselves."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.figure import Figure

from lkspec.reporting.figure_style import png
from lkspec.reporting.model import Table
from lkspec.reporting.renderers.html_page import fragment


@dataclass(frozen=True)
class Html:
    """A piece of HTML."""

    text: str

    def _repr_html_(self) -> str:
        return self.text


@dataclass(frozen=True)
class Picture:
    """A figure drawn without pyplot, which Jupyter would not show by itself."""

    figure: Figure

    def _repr_png_(self) -> bytes:
        return png(self.figure, dpi=100)


def shown(table: Table) -> Html:
    """A table as `lkspec report format=html` lays it out, with its caption."""
    return Html(fragment(table))
