"""A tokenizer whose tokens are the single characters of a text, as they stand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

_ANY_CHARACTER = Regex(r"[\s\S]")  # a dot does not match a line end, and (?s) is unknown to this library


@dataclass(frozen=True)
class Alphabet:
    """The characters of a text, Unicode code points, by how many of them a vocabulary has.

    Attributes:
        known: those that become tokens, the most frequent first; of equally frequent ones the lower code point.
        unknown: the number of different characters besides.
        unknown_share: the share of the text that those are.
    """

    known: tuple[str, ...]
    unknown: int
    unknown_share: float

    @classmethod
    def of(cls, counts: Counter[str], room: int) -> Alphabet:
        """Choose at most `room` of the characters that were counted, at least one."""
        ordered = sorted(counts, key=lambda character: (-counts[character], character))
        lost = sum(counts[character] for character in ordered[room:])
        return cls(tuple(ordered[:room]), len(ordered[room:]), lost / counts.total())

    def describe(self, special: int) -> str:
        """Say how many different characters there are, and how much of the text is unknown.

        Args:
            special: the number of special tokens, which a vocabulary has besides.
        """
        different = len(self.known) + self.unknown
        if not self.unknown:
            found = "1 character" if different == 1 else f"{different:,} different characters"
            return f"The text has {found}; the vocabulary has {'it' if different == 1 else 'them all'}."
        share = f"{self.unknown_share:.2%}" if self.unknown_share >= 0.00005 else "less than 0.01%"
        return (
            f"The text has {different:,} different characters; {self.unknown:,} of them, {share} of the text, are "
            f"unknown. --vocab-size {different + special} has room for all."
        )


def character_tokenizer(alphabet: Alphabet, special: Sequence[AddedToken], unknown: str) -> Tokenizer:
    """Build the tokenizer: special tokens first, then the alphabet; any text of known characters comes back from it.

    Args:
        unknown: that of the special tokens which stands for all other characters.
    """
    tokens = [*(token.content for token in special), *alphabet.known]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.add_special_tokens(list(special))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(_ANY_CHARACTER, "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer
