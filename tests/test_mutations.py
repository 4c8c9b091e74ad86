"""The seeded faults of scripts/mutations.py still fit the sources (the script itself, `make mutants`, runs the
mutants).
"""

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
mutations = pytest.importorskip("mutations", reason="a copy of the tests without the scripts")
MUTATIONS = [mutation for library in mutations.LIBRARIES.values() for mutation in library.mutations]


def test_there_are_at_least_ten():
    for library in mutations.LIBRARIES.values():
        assert len({m.name for m in library.mutations}) == len(library.mutations) >= 10


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name.replace(" ", "_"))
def test_a_mutation_matches_once_and_changes_something(mutation, tmp_path):
    target = tmp_path / mutation.file
    target.parent.mkdir(parents=True)
    shutil.copy(ROOT / mutation.file, target)
    mutations.mutate(mutation, tmp_path)
    assert mutation.after in target.read_text()
