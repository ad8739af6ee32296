"""The notebooks run from top to bottom; run as a script, this module executes them and saves their outputs."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
PATH = re.compile(r"/(home|root|tmp|work|Users)/")  # of the machine that made an output


def execute(path: Path) -> nbformat.NotebookNode:
    """Run a notebook in its folder, and return it with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(notebook, timeout=900, record_timing=False, resources=resources).execute()
    return notebook


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path):
    execute(path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_saved_as_it_ran(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs and all(output.output_type != "error" for output in outputs)
    assert not PATH.search(str(outputs)), "an output names a path of the machine that made it"


if __name__ == "__main__":
    for path in NOTEBOOKS:
        notebook = execute(path)
        for cell in notebook.cells:
            if "outputs" in cell:  # warnings name paths of this machine
                cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        nbformat.write(notebook, path)
        print(path.name)
