"""Every notebook runs on small stored results, keeps no output, and holds no logic."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from report_runs import make_study, store_tokens

from lkspec.reporting.notebook import read_cells, render
from lkspec.results import RunFolder

FOLDER = Path(__file__).parents[3] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    root = make_study(tmp_path_factory.mktemp("runs"), seeds=(0, 1))
    store_tokens(RunFolder.open(next(root.glob("mlp-kl-*-s0-*"))))
    return root


def test_there_are_notebooks():
    assert {"02_ablation", "03_acceptance"} <= {path.stem for path in NOTEBOOKS}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_runs_on_stored_results(path, study, monkeypatch):
    monkeypatch.setenv("LKSPEC_RUNS", str(study / "*"))
    monkeypatch.setenv("LKSPEC_RUN", str(next(study.glob("mlp-kl-*-s0-*"))))
    page = render(path)
    num_code = sum(cell["cell_type"] == "code" for cell in read_cells(path))
    assert page.count("<pre>") >= num_code
    assert "data:image/png;base64" in page or "<table" in page


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_keeps_no_output_and_holds_no_logic(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    logic = ast.FunctionDef | ast.ClassDef | ast.If | ast.For | ast.While | ast.Try
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            assert not [node for node in ast.parse("".join(cell["source"])).body if isinstance(node, logic)]


def test_a_failing_cell_is_named(tmp_path):
    cells = [{"cell_type": "markdown", "source": ["# a"]}, {"cell_type": "code", "source": ["x = 1\n", "x / 0"]}]
    (tmp_path / "bad.ipynb").write_text(json.dumps({"cells": cells}))
    with pytest.raises(ValueError, match=r"bad\.ipynb, cell 1: ZeroDivisionError"):
        render(tmp_path / "bad.ipynb")


def test_cells_share_names_and_show_what_they_print_and_end_with(tmp_path):
    sources = ["x = 2\nprint('<a>')", "x + 1", "x = 5;\nNone"]
    cells = [{"cell_type": "code", "source": [source]} for source in sources]
    (tmp_path / "good.ipynb").write_text(json.dumps({"cells": cells}))
    page = render(tmp_path / "good.ipynb")
    assert page.count('<pre class="out">') == 2
    assert '<pre class="out">&lt;a&gt;\n</pre>' in page
    assert '<pre class="out">3</pre>' in page
