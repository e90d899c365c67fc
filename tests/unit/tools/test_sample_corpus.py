from __future__ import annotations

from pathlib import Path

import pytest

from tests.preparing import folder_hashes
from tools.sample_corpus import write_corpus
from trainer.errors import UserError

PROSE = "This function returns the largest value of the list, and complains when the list is empty."
MODULE = f'''
"""{PROSE.replace("function", "module")}

Second paragraphs are kept together with the first one when they are also prose of the usual kind.
"""
x = """
This is only a value that is assigned to a name, and should not be taken for a docstring at all.
"""


def f():
    r"""{PROSE}

    Parameters
    ----------
    a : int
        The number of values that are read from the list before the largest of them is returned.

    >>> f()
    """
'''


def test_prose_is_kept_and_code_is_not(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "module.py").write_text(MODULE)
    (tmp_path / "package" / "copy.py").write_text(MODULE)
    summary = write_corpus(tmp_path / "out", 100, [tmp_path])
    documents = sorted("".join(path.read_text() for path in sorted((tmp_path / "out").iterdir())).split("\n"))

    assert summary.documents == 2
    assert [line for line in documents if line] == [
        "Second paragraphs are kept together with the first one when they are also prose of the usual kind.",
        PROSE,
        PROSE.replace("function", "module"),
    ]


def test_the_installed_packages_give_the_same_mixed_text_each_time(tmp_path: Path) -> None:
    first = write_corpus(tmp_path / "a", 300_000)
    write_corpus(tmp_path / "b", 300_000)

    assert folder_hashes(tmp_path / "a") == folder_hashes(tmp_path / "b")
    assert 300_000 <= sum(path.stat().st_size for path in (tmp_path / "a").iterdir()) <= 400_000
    assert first.packages > 20
    texts = [path.read_text() for path in (tmp_path / "a").iterdir()]
    documents = [document for text in texts for document in text.strip().split("\n\n")]
    assert len(set(documents)) == len(documents) == first.documents


def test_too_little_text_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hold only 0 bytes"):
        write_corpus(tmp_path / "out", 100, [tmp_path])
