"""Every example, and the code in the README and the tutorial, runs as it stands."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
ANALYZERS = ROOT / "docs" / "writing-an-analyzer.md"
DOCUMENTS = [
    ROOT / "README.md",
    *(ROOT / "docs" / f"{n}.md" for n in ("tutorial", "data", "experiments", "with-other-tools")),
    ANALYZERS,
]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if path.stem.startswith("with_"):
        pytest.importorskip(path.stem.removeprefix("with_"))
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_documented_code(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code_of(path), str(path), "exec"), {"__name__": "document"})
    capsys.readouterr()


def code_of(document: Path) -> str:
    blocks = re.findall(r"^```python\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    return "\n".join(blocks)


def test_an_analyzer_takes_few_lines() -> None:
    classes = [
        node for node in ast.parse(code_of(ANALYZERS)).body if isinstance(node, ast.ClassDef)
    ]
    assert [node.name for node in classes] == ["Sparsity", "MeanByLabel", "TopTokens", "Effect"]
    for node in classes:
        assert node.end_lineno is not None
        assert node.end_lineno - node.lineno < 25, node.name
    tested = ast.parse((ROOT / "tests" / "analyzers" / "own.py").read_text()).body
    assert ast.dump(classes[0]) in map(ast.dump, tested)


def test_local_links_lead_somewhere() -> None:
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for document in documents:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
