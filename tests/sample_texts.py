"""Real text for tests of what reads text."""

from pathlib import Path

NOVELS = Path(__file__).resolve().parents[1] / "benchmarks" / "data" / "novels.txt.xz"


def sentences(count):
    from training import files

    found = (one for text in files.documents([str(NOVELS)]) for one in files.sentences(text))
    return [one for _, one in zip(range(count), found, strict=False)]
