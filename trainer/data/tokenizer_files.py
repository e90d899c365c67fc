"""What lies in a tokenizer's folder, where transformers alone cannot tell or would read it wrongly."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.runtime.files import is_lfs_pointer
from trainer.runtime.paths import user_path

TOKENIZER_JSON, VOCAB_TXT = "tokenizer.json", "vocab.txt"
_BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_CASED_SHARE = 0.01  # of the words with ASCII letters; names that were added to an uncased vocabulary are fewer


@dataclass(frozen=True)
class BertVocabulary:
    """A `vocab.txt` to be read as BERT's, whatever config.json says or does not say.

    Attributes:
        options: what BertTokenizer does not find in the folder itself.
        note: one line for the user: what is taken for granted.
    """

    options: dict[str, Any]
    note: str


def bert_vocabulary(folder: Path) -> BertVocabulary | None:
    """Tell whether the folder's tokenizer is BERT's vocab.txt, which it is where that file holds BERT's special tokens
    and nothing else says how to read it.

    The folders of Chinese models are like that: a lone vocab.txt; a config.json without model_type (ERNIE 1.0); one
    that says roberta (RoBERTa-wwm-ext), whose tokenizer would look for vocab.json.

    Returns:
        None for any other tokenizer.
    """
    path = folder / VOCAB_TXT
    if (folder / TOKENIZER_JSON).is_file() or not path.is_file() or sentencepiece_files(folder):
        return None
    if (folder / "vocab.json").is_file() or _reads_vocab_txt_itself(folder):
        return None
    words = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if not {word.strip() for word in words}.issuperset(_BERT_TOKENS):
        return None
    if "do_lower_case" in _json_object(folder / "tokenizer_config.json"):
        return BertVocabulary({}, "")
    cased = _is_cased(words)
    how = "cased, as its words have capitals" if cased else "lower case, as its words have no capitals"
    note = f"tokenizer: {folder.name}/{VOCAB_TXT} is read as BERT's, {how} (do_lower_case in tokenizer_config.json)"
    return BertVocabulary({"do_lower_case": not cased}, note)


def loading_note(source: str | Path) -> str:
    """Say what was taken for granted when the tokenizer of a folder was loaded; empty when nothing was."""
    folder = user_path(source)
    found = bert_vocabulary(folder) if folder.is_dir() else None
    return found.note if found else ""


def sentencepiece_files(folder: Path) -> list[str]:
    """List the names of SentencePiece models (spm.model, sentencepiece.bpe.model, spiece.model)."""
    return sorted(path.name for path in folder.glob("*.model"))


def sentencepiece_is_missing() -> bool:
    """Tell whether the package that reads SentencePiece models cannot be imported."""
    return find_spec("sentencepiece") is None


def check_files(folder: Path) -> None:
    """Look at a folder before transformers does.

    Raises:
        UserError: for Git LFS pointers in the place of files, and a SentencePiece model that nothing here can read.
    """
    for path in sorted((*folder.glob("*.json"), *folder.glob("*.txt"), *folder.glob("*.model"))):
        if is_lfs_pointer(path):
            raise UserError(
                f"'{path.name}' is a Git LFS pointer: the file itself was not fetched.",
                where=str(path),
                remedy=f"Run `git lfs pull` in {folder}, or download the file.",
            )
    models = sentencepiece_files(folder)
    if models and not (folder / TOKENIZER_JSON).is_file() and sentencepiece_is_missing():
        raise sentencepiece_needed(f"'{folder.name}' has its tokenizer as a SentencePiece model ({models[0]})", folder)


def sentencepiece_needed(problem: str, where: str | Path) -> UserError:
    return UserError(
        f"{problem}, and the package sentencepiece is not installed.",
        where=str(where),
        remedy="Install it with `pip install sentencepiece` (in a clone of maskwright: pip install -e "
        "'.[sentencepiece]').",
    )


def _reads_vocab_txt_itself(folder: Path) -> bool:
    """Tell whether the class that the folder names is another than BERT's, with its vocabulary in vocab.txt too."""
    import transformers
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    named = _json_object(folder / "tokenizer_config.json").get("tokenizer_class")
    named = named or TOKENIZER_MAPPING_NAMES.get(str(_json_object(folder / "config.json").get("model_type")))
    kind = getattr(transformers, str(named), None) or getattr(transformers, str(named).removesuffix("Fast"), None)
    files = getattr(kind, "vocab_files_names", None) or {}
    return VOCAB_TXT in files.values() and kind is not transformers.BertTokenizer


def _is_cased(words: list[str]) -> bool:
    latin = [word for word in words if word.isascii() and not word.startswith("[") and word.lower() != word.upper()]
    return sum(word != word.lower() for word in latin) > _CASED_SHARE * len(latin)


def _json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one where there is none: transformers says what is wrong with the file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
