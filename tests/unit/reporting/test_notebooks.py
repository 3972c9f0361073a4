"""Every notebook runs on small stored results, keeps no output, and holds no logic."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import nbformat
import pytest
from helpers.report_runs import make_study, store_tokens
from nbclient import NotebookClient

from lkspec.runs.folder import RunFolder

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
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": FOLDER}}
    ).execute()  # raises what a cell raises
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = {kind for output in outputs for kind in output.get("data", {})}
    assert shown & {"image/png", "text/html"}
    assert not [output for output in outputs if output.get("name") == "stderr"]


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
