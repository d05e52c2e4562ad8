"""Text domains: what a passage is, which split it is in, and that it is the same everywhere."""

import ast
import io
import os
import re
import subprocess
import sys
import sysconfig
import tokenize
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch

import miner_lens as ml
from miner_lens.data import documents
from miner_lens.data.datasets import load
from miner_lens.data.text_domains import CONTINUATION, DOMAINS, PER_DOCUMENT, PROMPT, passages

LIBRARY = Path(sysconfig.get_path("stdlib"))


def parts(sample):
    """The prompt and its continuation."""
    (message,), (answer,) = sample.messages, sample.answers
    assert message["role"] == "user"
    return message["content"], answer


def document_of(sample):
    return re.fullmatch(r"text-domains/(?:train|test)/\w+/(.+)/\d+", sample.id)[1]


@pytest.fixture(scope="module")
def _made_once():
    """Bare code, which takes seconds to make, and is read again below."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "bare_code", cache(documents.bare_code))
        yield


@pytest.fixture(scope="module")
def both_splits(_made_once):
    """Samples of every domain, by domain and split."""
    return {
        domain: {split: load("text-domains", split, ask=domain) for split in ("train", "test")}
        for domain in DOMAINS
    }


@pytest.mark.parametrize("domain", DOMAINS)
def test_passages_are_labelled_and_of_bounded_length(domain, both_splits):
    for split, samples in both_splits[domain].items():
        few = {"train": 40, "test": 20}
        most = {"train": 320, "test": 80}
        assert (few if domain == "licences" else most)[split] <= len(samples) <= most[split]
        assert samples.name == f"text-domains/{split}/{domain}"
        assert {sample.label for sample in samples} == {domain}
        assert len({sample.id for sample in samples}) == len(samples)
        for sample in samples:
            assert sample.id.startswith(f"text-domains/{split}/{domain}/")
            prompt, answer = parts(sample)
            assert PROMPT[0] <= len(prompt) <= PROMPT[1], sample.id
            shortest = 2 if domain == "arithmetic" else CONTINUATION[0]
            assert shortest <= len(answer) <= CONTINUATION[1], sample.id
            assert re.match(r" \S", answer)
            assert re.search(r"\S\Z", prompt)


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_passage_is_in_its_document(domain, both_splits):
    samples = [sample for one in both_splits[domain].values() for sample in one]
    wanted = set(map(document_of, samples))
    sources = {
        one.name: [" ".join(text.split()) for text in one.sections]
        for one in getattr(documents, domain)()
        if one.name in wanted
    }
    for sample in samples:
        passage = " ".join("".join(parts(sample)).split())
        assert any(passage in text for text in sources[document_of(sample)]), sample.id


def test_no_document_is_in_both_splits(both_splits):
    documents_of = {
        split: {
            document_of(sample) for domains in both_splits.values() for sample in domains[split]
        }
        for split in ("train", "test")
    }
    assert len(documents_of["test"]) > 100
    assert not documents_of["train"] & documents_of["test"]


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_long_paragraph_is_there_twice_and_no_file_is_all(domain, both_splits):
    samples = [sample for one in both_splits[domain].values() for sample in one]
    letters = [
        re.sub(r"[\W\d_]+", "", paragraph).lower()
        for sample in samples
        for paragraph in "".join(parts(sample)).split("\n\n")
    ]
    assert max(Counter(one for one in letters if len(one) >= 40).values(), default=1) == 1
    assert len({prompt for prompt, _ in map(parts, samples)}) == len(samples)
    assert max(Counter(map(document_of, samples)).values()) <= PER_DOCUMENT


def test_a_known_paragraph_separates_what_is_around_it():
    known = set()
    first, second, third = (letter * 300 for letter in "abc")
    assert list(passages([first, second], known)) == [f"{first}\n\n{second}"]
    assert list(passages([third, second, "d" * 300], known)) == [third, "d" * 300]
    assert list(passages(["e" * 2000, "short"], known)) == []


DIGEST = """
import hashlib
from miner_lens.data.datasets import load

samples = [(s.id, s.messages, s.answers, s.label) for s in load("text-domains")]
found = hashlib.sha256(repr(samples).encode()).hexdigest()
"""


def test_another_process_makes_the_same_list(both_splits):
    here = {}
    exec(DIGEST, here)
    script = f"{DIGEST}print(found)"
    theirs = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONHASHSEED": "7", "LC_ALL": "C", "PYTHONUTF8": "0"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert theirs.stdout.split() == [here["found"]]


def test_ids_say_nothing_of_the_machine(both_splits):
    for domains in both_splits.values():
        for sample in (*domains["train"], *domains["test"]):
            assert not {"site-packages", sys.prefix.strip("/")} & {*sample.id.split("/")}
            assert "//" not in sample.id
            assert str(LIBRARY) not in sample.id


def test_the_library_is_the_same_wherever_it_lies(tmp_path):
    """Even in a folder with the name of one that is left out."""
    files = {
        "bisect.py": "x = 1",
        "json/decoder.py": "y = 2",
        "unittest/test/a.py": "",
        "my.py": "",
    }
    for base in (tmp_path / "test" / "lib", tmp_path / "lib"):
        for name, text in files.items():
            (base / name).parent.mkdir(parents=True, exist_ok=True)
            (base / name).write_text(text)
        found = documents.standard_library(base)
        assert found == {"bisect.py": "x = 1", "json/decoder.py": "y = 2"}


def test_a_library_without_source_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no source of the standard library in .*Use a"):
        documents.standard_library(tmp_path)


@pytest.mark.parametrize("name", ["bisect.py", "json/decoder.py", "argparse.py", "socketserver.py"])
def test_code_is_the_program_without_comments_and_docstrings(name):
    source = (LIBRARY / name).read_text()
    bare = documents.bare_code(source)
    tokens = tokenize.generate_tokens(io.StringIO(bare).readline)
    assert tokenize.COMMENT not in {token.type for token in tokens}
    assert ast.dump(without_docstrings(bare)) == ast.dump(without_docstrings(source))
    texts = [ast.get_docstring(node) for node in ast.walk(ast.parse(bare)) if documented(node)]
    assert not any(texts)


def documented(node):
    return isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)


def without_docstrings(source):
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if documented(node) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


NUMBERS = {documents.in_english(number): number for number in range(1000)}


def sums(text):
    """The sums of a sheet, as numbers."""
    for line in text.splitlines():
        a, sign, b, result = re.fullmatch(
            r"(.+) (\+|-|\*|plus|minus|times) (.+) (?:=|is) (.+)\.", line.lower()
        ).groups()
        sign = {"plus": "+", "minus": "-", "times": "*"}.get(sign, sign)
        a, b, result = (NUMBERS[n] if n in NUMBERS else int(n) for n in (a, b, result))
        yield a, sign, b, result


def test_sums_are_right_and_those_of_the_splits_are_others(both_splits):
    seen = {}
    for split, samples in both_splits["arithmetic"].items():
        found = [list(sums("".join(parts(sample)))) for sample in samples]
        for a, sign, b, result in (one for sheet in found for one in sheet):
            assert result == {"+": a + b, "-": a - b, "*": a * b}[sign] >= 0
        asked = [[(min(a, b), sign, max(a, b)) for a, sign, b, _ in sheet] for sheet in found]
        assert all(len(set(sheet)) == len(sheet) for sheet in asked)
        seen[split] = {one for sheet in asked for one in sheet}
        assert all(parts(sample)[0].endswith((" is", " =")) for sample in samples)
        in_words = [parts(sample)[0].endswith(" is") for sample in samples]
        assert 0.35 < sum(in_words) / len(samples) < 0.65
    assert {sign for _, sign, _ in seen["test"]} == {*"+-*"}
    assert not seen["train"] & seen["test"]


def test_numbers_in_words_are_unique():
    assert len(NUMBERS) == 1000
    assert documents.in_english(105) == "one hundred and five"
    assert documents.in_english(999) == "nine hundred and ninety-nine"


def test_all_domains_take_turns_and_limits_are_nested():
    few, many = (load("text-domains", limit=limit) for limit in (10, 23))
    assert [sample.label for sample in few] == [*DOMAINS, *DOMAINS, *DOMAINS[:2]]
    assert {sample.id for sample in few} < {sample.id for sample in many}
    assert len(many) == 23
    assert load("text-domains", limit=0) == []
    everything = load("text-domains")
    assert Counter(sample.label for sample in everything) == {
        domain: len(load("text-domains", ask=domain)) for domain in DOMAINS
    }


@pytest.mark.parametrize("domain", DOMAINS)
def test_prompt_and_continuation_are_cut_between_tokens(domain, shapes, both_splits):
    tokenizer = shapes.processor.tokenizer
    for sample in both_splits[domain]["test"]:
        prompt, answer = parts(sample)
        apart = tokenizer(prompt)["input_ids"] + tokenizer(answer)["input_ids"]
        assert apart == tokenizer(prompt + answer)["input_ids"], sample.id


class TokensByLabel(ml.Analyzer):
    """How many prompt tokens there are, by label."""

    def points(self, model):
        return ml.activation_points(model, self.site)

    def see(self, x, point, batch):
        for label, real in zip(batch.labels, batch.real, strict=True):
            self.sum(f"{label}.tokens", real.sum(), at=point.layer)

    def result(self):
        return {label: self[f"{label}.tokens"] for label in self.labels}


def test_an_analyzer_groups_by_domain(shapes):
    data = load("text-domains", limit=8)
    tokens = ml.run(shapes, data, TokensByLabel(), batch_size=3, progress=False)
    expected = Counter()
    for sample in data:
        expected[sample.label] += ml.inputs(shapes, sample.messages)["input"].shape[1]
    assert {label: set(count.tolist()) for label, count in tokens.items()} == {
        label: {count} for label, count in expected.items()
    }
    assert all(torch.is_tensor(count) for count in tokens.values())
