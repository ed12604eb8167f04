"""Names from records as they may stand in a figure, a table, a page and on a terminal."""

import unicodedata
import zlib

# Control characters, lone surrogates, and the separators of lines and paragraphs.
_ESCAPED = ("Cc", "Cs", "Zl", "Zp")
_MOST_LETTERS = 300  # settings of a large sweep take two hundred


def printable(text: str) -> str:
    r"""The text on one line that every encoding of Unicode can hold: others become \n or \ud800."""
    return text if text.isprintable() else "".join(map(_letter, text))


def shown(text: str, most_letters: int = _MOST_LETTERS) -> str:
    """`printable`, and of bounded length: the end of a longer text becomes a checksum of it, so
    that two long names which differ at the end are still two."""
    text = printable(text)
    if len(text) <= most_letters:
        return text
    return f"{text[: most_letters - 11]}...{zlib.crc32(text.encode()):08x}"


def _letter(letter: str) -> str:
    if unicodedata.category(letter) not in _ESCAPED:
        return letter
    return letter.encode("unicode_escape").decode("ascii")
