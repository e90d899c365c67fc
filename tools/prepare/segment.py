"""What `prepare --word-starts` and `--sentence-starts` may name: functions from a text to where its words start."""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from tools.prepare.phrases import phrase_segmenter, read_phrases
from tools.prepare.sentences import LINES_VERSION, RULES_VERSION, line_starts, sentence_starts
from trainer.data.manifest import SENTENCE_STARTS, WORD_STARTS
from trainer.data.token_marks import OPTION_OF_MARK, SETTING_OF_MARK
from trainer.errors import UserError, nearest
from trainer.runtime.files import file_hash

Segmenter = Callable[[str], np.ndarray]
"""Maps a text to offsets in characters, int64, strictly ascending, each below its length."""

_OF_SENTENCES: dict[str, tuple[Segmenter, int]] = {
    "rules": (sentence_starts, RULES_VERSION),
    "lines": (line_starts, LINES_VERSION),
}
_BUILT_IN = {WORD_STARTS: ("tokenizer", "jieba"), SENTENCE_STARTS: tuple(_OF_SENTENCES)}
_PHRASES = "phrases:"
_USERS_OWN = re.compile(r"[\w.]+:\w+")
_SHOWN_CHARACTERS = 60  # of a document or a value, in messages
_SIGNATURE = (
    "The function takes a text and gives the offsets, in characters, at which {things} start, in ascending order."
)


@dataclass(frozen=True)
class StartSettings:
    """What marks words and sentences, as the options name it; None is not marked."""

    words: str | None = None
    sentences: str | None = None

    @property
    def by_mark(self) -> dict[str, str]:
        """The name for each mark to write."""
        both = {WORD_STARTS: self.words, SENTENCE_STARTS: self.sentences}
        return {mark: name for mark, name in both.items() if name is not None}

    def check(self, tokenizer: Tokenizer) -> None:
        """Load all that is named, so that a mistake is found before the work starts.

        Raises:
            UserError: for an unknown name, a module or a function that is not there, jieba not installed, and a
                tokenizer that knows no words.
        """
        self.segmenters()
        if self.words == "tokenizer" and not _knows_words(tokenizer):
            raise UserError(
                "The tokenizer has no pre-tokenizer that cuts text into words.",
                where="--word-starts tokenizer",
                remedy="Use --word-starts jieba for Chinese, or module:function of your own.",
            )

    def segmenters(self) -> dict[str, Segmenter | None]:
        """Load for each mark to write its function; None for the words of the tokenizer."""
        return {mark: _load(mark, name) for mark, name in self.by_mark.items()}

    def recorded(self) -> dict[str, str]:
        """Collect what the manifest and a unit's identity hold: with each name the version that decides the result."""
        return {SETTING_OF_MARK[mark]: _with_version(name) for mark, name in self.by_mark.items()}


class UsersFunction:
    """A user's own segmenter; what it returns is checked, because a wrong offset would be wrong in silence."""

    def __init__(self, name: str, mark: str, function: Callable[[str], Iterable[int]]) -> None:
        self._name, self._function = name, function
        self._where = f"{OPTION_OF_MARK[mark]} {name}"
        self._remedy = _SIGNATURE.format(things="words" if mark == WORD_STARTS else "sentences")

    def __call__(self, text: str) -> np.ndarray:
        try:
            returned = self._function(text)
            listed = isinstance(returned, Iterable)
            offsets = returned.tolist() if isinstance(returned, np.ndarray) else list(returned) if listed else []
        except Exception as error:
            raise self._refusal(f"raised {type(error).__name__}: {error}{_place(error)},", text) from error
        if not listed:
            raise self._refusal(f"gave {_shortened(repr(returned))} instead of a list of offsets,", text)
        before = -1
        for offset in offsets:
            if isinstance(offset, bool) or not isinstance(offset, (int, np.integer)):
                shown = f"{_shortened(repr(offset))} ({type(offset).__name__})"
                raise self._refusal(f"gave {shown} where an offset is expected,", text)
            if not 0 <= offset < len(text):
                raise self._refusal(f"gave the offset {offset:,}, outside the {len(text):,} characters,", text)
            if offset <= before:
                raise self._refusal(f"gave the offset {offset:,} after {before:,}, not in ascending order,", text)
            before = offset
        return np.array(offsets, np.int64)

    def _refusal(self, problem: str, text: str) -> UserError:
        document = _shortened(repr(text[: 2 * _SHOWN_CHARACTERS]))
        return UserError(
            f"{self._name} {problem} for the document that begins {document}.", where=self._where, remedy=self._remedy
        )


def _load(mark: str, name: str) -> Segmenter | None:
    if name in _BUILT_IN[mark]:
        if name in _OF_SENTENCES:
            return _OF_SENTENCES[name][0]
        return _load_jieba() if name == "jieba" else None
    if mark == WORD_STARTS and name.startswith(_PHRASES):
        return phrase_segmenter(_phrases_of(name))
    if not _USERS_OWN.fullmatch(name):
        known = (*_BUILT_IN[mark], *([f"{_PHRASES}FILE"] if mark == WORD_STARTS else []))
        raise UserError(
            f"Unknown {OPTION_OF_MARK[mark]} '{name}'.{nearest(name, known)}",
            where=f"{OPTION_OF_MARK[mark]} {name}",
            remedy=f"Choose {', '.join(known)}, or module:function for one of your own.",
        )
    return UsersFunction(name, mark, _import_function(name, f"{OPTION_OF_MARK[mark]} {name}"))


def _phrases_of(name: str) -> list[str]:
    return read_phrases(Path(name.removeprefix(_PHRASES)), f"{OPTION_OF_MARK[WORD_STARTS]} {name}")


def _import_function(name: str, where: str) -> Callable[[str], Iterable[int]]:
    module_name, function_name = name.split(":")
    module = _import_module(module_name, where)
    if callable(getattr(module, function_name, None)):
        return getattr(module, function_name)
    found = [known for known, value in vars(module).items() if callable(value) and not known.startswith("_")]
    problem = "is no function" if hasattr(module, function_name) else "is not there"
    raise UserError(
        f"'{function_name}' {problem} in the module '{module_name}' ({module.__file__}).",
        where=where,
        remedy=f"Name a function of that module.{nearest(function_name, found)}",
    )


def _import_module(name: str, where: str) -> ModuleType:
    """Import from what is installed, or from the current folder, whose files hide nothing that is installed."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(name)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise UserError(
            f"Cannot import the module '{name}': {type(error).__name__}: {error}{_place(error)}.",
            where=where,
            remedy="Give a module of the current folder or an installed one, as module:function.",
        ) from error
    own = Path(*name.split(".")).with_suffix(".py")
    if own.is_file() and module.__file__ and not own.samefile(module.__file__):
        raise UserError(
            f"The installed module '{name}' ({module.__file__}) hides the file '{own}' of the current folder.",
            where=where,
            remedy="Give the file a name that no installed module has.",
        )
    return module


def _load_jieba() -> Segmenter:
    try:
        with warnings.catch_warnings():  # of its import of pkg_resources, and of its regular expressions
            warnings.simplefilter("ignore")
            import jieba
    except ImportError:
        raise UserError(
            "Chinese word starts need the package jieba, which is not installed.",
            where="--word-starts jieba",
            remedy="Install it with `pip install jieba` (in a clone of maskwright: pip install -e '.[chinese]').",
        ) from None
    jieba.setLogLevel(logging.WARNING)
    segmenter = jieba.Tokenizer()

    def word_starts(text: str) -> np.ndarray:
        if not segmenter.initialized:
            # Not its initialize(), which loads a cache from /tmp, of whatever version and whoever wrote it.
            segmenter.FREQ, segmenter.total = segmenter.gen_pfdict(segmenter.get_dict_file())
            segmenter.initialized = True
        lengths = [len(word) for word in segmenter.cut(text)]
        assert sum(lengths) == len(text), "jieba's words are not the whole text"
        return np.cumsum([0, *lengths], dtype=np.int64)[:-1]

    return word_starts


def _with_version(name: str) -> str:
    """Add its version to a name.

    A user's function is known by the content of its module's file: when that changes, so may its result. So is a list
    of phrases, wherever it lies.
    """
    if name.startswith(_PHRASES):
        content = "\n".join(_phrases_of(name)).encode()
        return f"phrases {sha256(content).hexdigest()[:16]}"
    if name == "jieba":
        return f"jieba {version('jieba')}"
    if name in _OF_SENTENCES:
        return f"{name} {_OF_SENTENCES[name][1]}"
    if ":" in name:
        file = _import_module(name.split(":")[0], name).__file__
        return f"{name} {file_hash(Path(file))[:16]}" if file else name
    return name


def _knows_words(tokenizer: Tokenizer) -> bool:
    pre_tokenizer: Any = tokenizer.pre_tokenizer
    return pre_tokenizer is not None and len(pre_tokenizer.pre_tokenize_str("one two")) > 1


def _place(error: Exception) -> str:
    """Say where in the user's code an exception comes from."""
    if isinstance(error, ImportError):
        return ""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"
