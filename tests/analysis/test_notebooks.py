"""The notebooks run from top to bottom, at small size."""

import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
SMALL = {
    "erf": {"MODEL": "vmamba_test", "PEER": "convnext_atto", "SIZE": 64, "IMAGES": 1},
    "attention": {"MODEL": "vmamba_test", "EPOCHS": 1, "SIZE": (64, 96), "QUERY": (40, 50)},
    "scaling": {
        "MODEL": "vmamba_test",
        "PEERS": ["convnext_atto"],
        "SIZES": [32, 64],
        "ROUNDS": 1,
        "ACCURACY_SIZES": [32],
        "EPOCHS": 1,
    },
}

# Of the clients of Jupyter's kernels, not of ours.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def test_every_notebook_has_a_small_size() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "commit notebooks without their outputs"
    (place,) = (i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    defined = {line.partition("=")[0].strip() for line in notebook.cells[place].source.splitlines()}
    assert all(any(key in names for names in defined) for key in SMALL[name])
    values = "\n".join(f"{key} = {value!r}" for key, value in SMALL[name].items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(values))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) >= 3
