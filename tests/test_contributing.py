"""The pages about the code are true: their paths, links, commands and quotations exist."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md")))
    if path.name != "results.md"  # generated
}
HOMES = (".ci", "benchmarks", "convkernels", "csrc", "docs", "examples", "scripts", "tests")
FILES = [path for home in HOMES for path in (ROOT / home).rglob("*") if "__pycache__" not in path.parts]
PATHS = [f"/{path.relative_to(ROOT).as_posix()}" for path in (*FILES, *ROOT.glob("*"))]
# Folders and files that commands make, and paths of other programs.
MADE = re.compile(
    r"(build|results|study|convkernels/_native|\.\./shared|~)/|(<device>|steps|results|run)\.json|(attention|models)-\w+\.png|.*\.gz"
    r"|counters-cuda\.md"
)
# Programs that take no options: --help would start their work.
WITHOUT_OPTIONS = {"benchmarks.report": "benchmarks/report.py", "scripts/build_native.py": "scripts/build_native.py"}
SOURCES = (".py", ".h", ".cuh", ".cpp", ".cu")
LIMIT = 400


def spans(text):
    """What stands in code blocks, line by line, and between backticks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line.partition("   #")[0] for block in blocks for line in block.splitlines()]
    return re.findall(r"`([^`\n]+)`", outside), lines


def commands():
    return [code for text in PAGES.values() for kind in spans(text) for code in kind]


def programs():
    """The Python programs of this project that pages start, each with the options that it is given there."""
    found = {}
    for code in commands():
        for module, script, rest in re.findall(r"python3? (?:-m ([\w.]+)|(scripts/\w+\.py))([^|;&]*)", code):
            if script or module.partition(".")[0] in ("benchmarks", "convkernels"):
                command = re.match(r" (bench|plot)\b", rest)
                line = (script or module, *(command.groups() if command else ()))
                found.setdefault(line, set()).update(re.findall(r"(?<=\s)--[a-z-]+", rest))
    return [(line, sorted(options)) for line, options in sorted(found.items())]


def exists(path):
    pattern = "*/" + re.sub(r"<\w+>", "*", path.rstrip("/"))
    return any(fnmatch(known, pattern) or fnmatch(known, f"{pattern}.py") for known in PATHS)


def test_paths_exist():
    path = r"[\w.<>*~-]+(/[\w.<>*-]+)+/?|[\w-]+\.(py|md|h|cuh|cpp|cu|toml|txt|inc|json|png|gz)"
    named = [(page, code) for page, text in PAGES.items() for code in spans(text)[0] if re.fullmatch(path, code)]
    assert len(named) > 100
    assert [(page, path) for page, path in named if not MADE.match(path) and not exists(path)] == []


def anchors(text):
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere():
    links = [(page, link) for page, text in PAGES.items() for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    for page, link in links:
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
            assert file.exists(), (page, link)
            assert not anchor or anchor in anchors(file.read_text()), (page, link)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_has_the_targets():
    found = (re.findall(r"(?:^|[\s;(])make ([a-z][a-z-]*)", code) for code in commands())
    targets = {target for several in found for target in several}
    assert len(targets) > 20
    # The rehearsal calls make in a copy of the checkout that it makes first.
    assert re.search(r"^gpu-rehearsal:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    dry = ["make", "-n", *sorted(targets - {"gpu-rehearsal"})]
    done = subprocess.run(dry, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("line", "options"), programs(), ids=lambda value: " ".join(value))
def test_programs_have_the_options(line, options, monkeypatch, capsys):
    program, *command = line
    if program in WITHOUT_OPTIONS:
        assert (ROOT / WITHOUT_OPTIONS[program]).exists() and not options
        return
    monkeypatch.setattr(sys, "argv", [program, *command, "--help"])
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with pytest.raises(SystemExit) as left:
        if program.endswith(".py"):
            runpy.run_path(str(ROOT / program), run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    assert left.value.code == 0
    told = capsys.readouterr().out
    assert [option for option in options if option not in told] == []


def test_the_kernel_that_is_explained_is_the_one_in_the_source():
    page = PAGES["docs/reading-the-kernels.md"].partition("# conv_tile, line by line")[2]
    quoted = [line for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    source = (ROOT / "convkernels" / "backends" / "triton" / "conv" / "forward.py").read_text()
    at = source.index(quoted[1])
    kernel = source[source.rindex("@triton.jit", 0, at) : source.index("\n\n\n", at)]
    assert quoted == kernel.splitlines()


def test_functions_of_the_tour_exist():
    """The names between backticks in a row of its tables, in the files that the row names."""
    tour = PAGES["docs/reading-the-kernels.md"].partition("## From a call to a kernel")[2].partition("## conv_tile")[0]
    for row in re.findall(r"^\| `(.*)` \| (.*) \|$", tour, re.MULTILINE):
        names = re.findall(r"`([\w:.<>\[\]]+)`", row[1])
        files = tuple(f"/{name}" for name in (row[0], *names) if name.endswith(SOURCES))
        texts = [path.read_text() for path in FILES if path.as_posix().endswith(files)]
        for name in names:
            for part in re.findall(r"[A-Za-z]\w+", "" if f"/{name}" in files else re.sub(r"<\w+>", "", name)):
                assert any(re.search(rf"{part}\b", text) for text in texts), (row[0], name)


def test_no_file_is_longer_than_the_limit_but_those_that_are_named():
    stated = PAGES["CONTRIBUTING.md"].partition("## Rules")[2]
    lengths = {path: len(path.read_text().splitlines()) for path in FILES if path.suffix in SOURCES}
    long = [path.relative_to(ROOT).as_posix() for path, lines in lengths.items() if lines > LIMIT]
    assert f"{LIMIT} lines" in stated and [path for path in long if f"`{path}`" not in stated] == []


def test_the_words_are_used():
    """The sources name things by the words of the glossary."""
    table = PAGES["CONTRIBUTING.md"].partition("### Words")[2].partition("## Rules")[0]
    words = [word for row in re.findall(r"^\| ([a-z, ]+) \|", table, re.MULTILINE) for word in row.split(", ")][1:]
    kernels = [path for path in FILES if path.suffix in SOURCES and {"convkernels", "csrc"} & set(path.parts)]
    text = "\n".join(path.read_text() for path in kernels).lower()
    assert len(words) > 30
    assert [word for word in words if not re.search(rf"\b(k|\w*_)?{word.replace(' ', '_?')}", text)] == []
