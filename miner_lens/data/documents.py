"""Documents of every Python installation: what text-domains is cut from."""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import random
import re
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import NamedTuple

# Distributions of Python leave these out or install them apart.
APART = {"distutils", "ensurepip", "idlelib", "lib2to3", "test", "tkinter", "turtle", "turtledemo"}
LICENCE = re.compile(r"(LICEN[CS]E|COPYING|NOTICE|COPYRIGHT)", re.IGNORECASE)
TOPICS = "pydoc_data/topics.py"  # one large table; its texts are documents of their own
SHEETS = 500


class Document(NamedTuple):
    """A file, as far as it belongs to a domain.

    Attributes:
        name: Its path, relative to what it comes from, the same on every machine.
        sections: Texts that follow one another without being one text.
    """

    name: str
    sections: list[str]


def in_test(name: str) -> bool:
    """Whether a document, or a sum, is of the test split: one in five, by the hash of its name.

    Example:
        >>> in_test("json/decoder.py"), in_test("bisect.py")
        (False, False)
    """
    return hashlib.sha256(name.encode()).digest()[0] % 5 == 0


def code() -> Iterator[Document]:
    """The source of the standard library without comments and docstrings."""
    for name, source in standard_library(_base()).items():
        yield Document(name, [bare_code(source)])


def prose() -> Iterator[Document]:
    """The docstrings of the standard library, and the topics of Python's `help`.

    A topic is a document: it was a file before they were packed into one.
    """
    for name, source in standard_library(_base()).items():
        texts = (ast.get_docstring(node) for node in _documented(ast.parse(source)))
        yield Document(name, [text for text in texts if text])
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Document(f"pydoc_data/topics/{name}", [inspect.cleandoc(text)])


def licences() -> Iterator[Document]:
    """The licences of Python and of the packages that miner-lens depends on."""
    for name in ("LICENSE.txt", "LICENSE"):
        path = _base() / name
        if path.is_file():
            yield Document("python/LICENSE", [path.read_text("utf-8")])
            break
    for package in _dependencies("miner-lens"):
        for file in sorted(metadata.files(package) or (), key=str):
            folder, *inner = file.parts
            if folder.endswith(".dist-info") and inner and LICENCE.match(inner[-1]):
                path = Path(str(file.locate()))
                if path.is_file():
                    text = path.read_text("utf-8", errors="replace")
                    yield Document("/".join((package, *inner)), [text])


def arithmetic() -> Iterator[Document]:
    """Sheets of sums, differences and products, in figures or in words, one on each line.

    Those of a test sheet are on no training sheet.
    """
    for number in range(SHEETS):
        name = f"sheet-{number}"
        rng = random.Random(name)
        in_words = rng.random() < 0.5
        lines = (line(*sum_, in_words) for sum_ in _sums(rng, in_test(name)))
        length = rng.randrange(12, 20) if in_words else rng.randrange(24, 60)
        yield Document(name, ["\n".join(islice(lines, length))])


def line(a: int, sign: str, b: int, in_words: bool) -> str:
    """One worked sum.

    Example:
        >>> line(47, "+", 12, False), line(9, "-", 4, True)
        ('47 + 12 = 59.', 'Nine minus four is five.')
    """
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    if not in_words:
        return f"{a} {sign} {b} = {result}."
    word = {"+": "plus", "-": "minus", "*": "times"}[sign]
    return f"{in_english(a)} {word} {in_english(b)} is {in_english(result)}.".capitalize()


def in_english(number: int) -> str:
    """A number from 0 to 999 in words.

    Example:
        >>> in_english(321), in_english(20)
        ('three hundred and twenty-one', 'twenty')
    """
    hundreds, rest = divmod(number, 100)
    if hundreds:
        return f"{_SMALL[hundreds]} hundred" + (f" and {in_english(rest)}" if rest else "")
    tens, ones = divmod(number, 10)
    if number < len(_SMALL):
        return _SMALL[number]
    return _TENS[tens - 2] + (f"-{_SMALL[ones]}" if ones else "")


_SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen"),
    *("sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def _sums(rng: random.Random, test: bool) -> Iterator[tuple[int, str, int]]:
    """Sums of a split, none twice; what can be swapped is of one split both ways round."""
    used = set()
    while True:
        sign = rng.choice("+-*")
        most = 20 if sign == "*" else 99
        small, large = sorted((rng.randint(2, most), rng.randint(2, most)))
        name = f"{small} {sign} {large}"
        if in_test(name) == test and name not in used:
            used.add(name)
            swapped = sign == "-" or rng.random() < 0.5
            yield (large, sign, small) if swapped else (small, sign, large)


def bare_code(source: str) -> str:
    r"""Python source without comments and docstrings.

    Example:
        >>> bare_code('def f(x):\n    "Add one."\n    # So.\n    return x + 1  # or 2\n')
        'def f(x):\n    return x + 1'
    """
    lines: list[str | None] = list(source.splitlines())
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = token.line[:column].rstrip() or None
    for node in _documented(ast.parse(source)):
        first = node.body[0]
        if ast.get_docstring(node, clean=False) is None:
            continue
        for row in range(first.lineno, (first.end_lineno or first.lineno) + 1):
            lines[row - 1] = None
        if len(node.body) == 1:
            lines[first.lineno - 1] = " " * first.col_offset + "pass"
    return "\n".join(one for one in lines if one is not None)


_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _documented(tree: ast.AST) -> Iterator[_Documented]:
    """What can have a docstring and has a body."""
    for node in ast.walk(tree):
        if isinstance(node, _Documented) and node.body:
            yield node


def _base() -> Path:
    return Path(sysconfig.get_path("stdlib"))


@cache
def standard_library(base: Path) -> dict[str, str]:
    """The source of the modules that every distribution of Python has, by path.

    Args:
        base: Where the standard library is.

    Raises:
        FileNotFoundError: There is no source.
    """
    paths = []
    for name in sys.stdlib_module_names - APART:
        paths += [base / f"{name}.py", *(base / name).rglob("*.py")]
    sources = {}
    for path in paths:
        name = path.relative_to(base).as_posix()
        if path.is_file() and not APART & {*name.split("/")} and name != TOPICS:
            sources[name] = path.read_text("utf-8")
    if not sources:
        raise FileNotFoundError(
            f"There is no source of the standard library in {base}. Use a Python that comes with "
            "its source, such as one from python.org, or another data set."
        )
    return dict(sorted(sources.items()))


def _dependencies(package: str) -> list[str]:
    """The packages that a package needs on every platform, and those that they need so."""
    found: set[str] = set()
    waiting = [package]
    while waiting:
        for requirement in metadata.requires(waiting.pop()) or ():
            needed, _, condition = requirement.partition(";")
            name = re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", needed)[0]).lower()
            if not condition and name not in found:
                found.add(name)
                waiting.append(name)
    return sorted(found)
