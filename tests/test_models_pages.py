"""The example program, and the Python on the pages about models, run as they are written."""

import re
import runpy
from pathlib import Path

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parent.parent


def test_the_example(capsys):
    runpy.run_path(str(ROOT / "examples" / "drop_in.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    first, last = (float(line.rpartition(" ")[2]) for line in lines[-2:])
    assert last < first
    assert "examples/drop_in.py" in (ROOT / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/models.md"])
def test_pages_run(page, tmp_path, monkeypatch):
    """The Python of a page, from top to bottom, is one program."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    assert blocks
    exec(compile("\n".join(blocks), page, "exec"), {"__name__": "page"})
