"""Read from an answer which option of a multiple-choice question it gives."""

from __future__ import annotations

import re
import unicodedata

# What a letter that stands alone may not touch: letters and digits, but not those of scripts that
# are written without spaces.
_WORD = r"[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
_BEFORE = rf"(?<!{_WORD})(?<![-°#@\\])(?<!{_WORD}[.'])(?<!\d\s)"
_AFTER = rf"(?!{_WORD}|[-'.]{_WORD}|[+#°%])"
# "A" and "I" are words as well, as small letters are in many languages. Before another word they
# are letters if that word goes on about an option.
_GOES_ON = "is|was|nor|because|since|as|and|or|which|so|due|given"
_ALONE = rf"(?!\s+(?!(?:{_GOES_ON})\b){_WORD})"
_PRONOUN = rf"(?!\s+(?!(?:is|or|because|since)\b){_WORD})"
_LETTER = rf"{_BEFORE}(?:[B-HJ-Z]{_AFTER}|[Aa-hj-z]{_AFTER}{_ALONE}|[Ii]{_AFTER}{_PRONOUN})"
_CAPITAL = rf"{_BEFORE}(?:[B-HJ-Z]{_AFTER}{_ALONE}|A{_AFTER}{_ALONE}|I{_AFTER}{_PRONOUN})"
_KIND = r"(?:option|choice|letter|answer|选项|選択肢|보기)"

# Left of a text that says nothing but letters of options: several at once, or what they are not.
_NONE = "\ufffc"
_SEVERAL = re.compile(
    rf"(?:{_KIND}s?\s+)?\(?{_LETTER}\)?"
    rf"(?:\s*(?:,?\s*\b(?i:and|or|nor)\b|[,/&、和或])\s*(?:{_KIND}\s+)?\(?{_LETTER}\)?)+"
)
_NOT_BEFORE = re.compile(
    rf"(?i:\bnot|n't|\bneither|\brather than|\binstead of|\bexcept|\brul(?:e|es|ing) out"
    rf"|\beliminat(?:e|es|ing)|不是)\s*(?i:{_KIND}\s+)?\(?{_LETTER}\)?"
)
_NOT_AFTER = re.compile(
    rf"(?i:{_KIND}\s+)?\(?{_LETTER}\)?\s*"
    r"(?i:(?:is|was|are)(?:n't|\s+not|\s+(?:also\s+)?(?:wrong|incorrect|false))\b|不对|不正确|错)"
)

_STATED = re.compile(
    rf"(?:(?i:\b(?:{_KIND}|correct one|i(?:'d)? (?:choose|chose|select|pick|go with|would choose))"
    r"|答案|正解|答え|정답|답|选择?)"
    r"(?i:\s+to\s+(?:the|this|that|your)\s+question)?"
    r"(?:\W|(?i:\b(?:is|are|was|be|would|should|must|will|has to|therefore|thus|clearly|definitely"
    rf"|probably|likely|most|the|an|indeed|{_KIND})\b)|[是为為は은는이])*?"
    rf"(?P<after>{_LETTER}))"
    rf"|(?P<before>{_LETTER})\W*(?i:(?:is|was|seems)\s+(?:(?:the|most|likely|clearly|indeed)\s+)*"
    r"(?:correct|right|true|best|answer)\b|(?:是|が)?(?:正确|正解))"
)
_LEADING = re.compile(rf"\W*(?i:{_KIND}\s+)?\W*({_LETTER})")
_ENUMERATED = re.compile(rf"^\W*({_LETTER})\s*[.):]", re.MULTILINE)
# No letter of a formula, and of no "E. coli".
_CLEAR = re.compile(rf"(?<![=*^/+<>])(?<![=*^/+<>]\s){_CAPITAL}(?!\s*[=*^/+<>]|\.\s+[a-z])")
_BOXED = re.compile(r"\\boxed\s*\{\s*((?:[^{}]|\{[^{}]*\})*)\}")
_TEX = re.compile(r"\\(?:text|textbf|mathrm|mathbf|rm|bf)\b\s*\{?")


def option_letter(answer: str) -> str | None:
    """Return the letter of the option that an answer gives, or None where it gives none or several.

    Read is, in this order, what is in the last \\boxed{}; the last statement ("the answer is B",
    "option B", "B is correct"); the letter that the answer begins with, or its last line; and the
    only capital letter that stands alone. "A" and "I" before another word are words, not letters.

    Example:
        >>> [option_letter(text) for text in ("b)", "So it is **C**.", "A dog", "B and C")]
        ['B', 'C', None, None]
    """
    text = unicodedata.normalize("NFKC", answer).replace("\u2019", "'").rpartition("</think>")[2]
    boxed = _BOXED.findall(text)
    return (_read(boxed[-1]) if boxed else None) or _read(text)


def _read(text: str) -> str | None:
    text = re.sub(r"[*`$_{}]", " ", _TEX.sub(" ", text))
    for pattern in (_SEVERAL, _NOT_BEFORE, _NOT_AFTER):
        text = pattern.sub(_NONE, text)
    if stated := list(_STATED.finditer(text)):
        return (stated[-1]["after"] or stated[-1]["before"]).upper()
    lines = [line for line in text.splitlines() if line.strip()]
    if len(set(_ENUMERATED.findall(text))) < 2 and (leading := _LEADING.match(text)):
        return leading[1].upper()
    *_, before, last = ["", "", *lines]
    if (option := _ENUMERATED.match(last)) and not _ENUMERATED.match(before):
        return option[1].upper()
    clear = set(_CLEAR.findall(text))
    return clear.pop() if len(clear) == 1 else None
