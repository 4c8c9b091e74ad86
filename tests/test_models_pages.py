"""The example program, and the Python on the pages about models, run as they are written."""

import runpy

import pytest
from helpers import ROOT, run_page

pytest.importorskip("transformers")


def test_the_example(capsys):
    runpy.run_path(str(ROOT / "examples" / "drop_in.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    first, last = (float(line.rpartition(" ")[2]) for line in lines[-2:])
    assert last < first
    assert "examples/drop_in.py" in (ROOT / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/models.md"])
def test_pages_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_page(page)
