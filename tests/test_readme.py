"""The code of the documents runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\((?!https?:)([^)#]+)\)")

QUICK_START = """\
model  = offramp.attach(backbone, example, exits=3)
offramp.fit(model, train_loader, scheme="joint", epochs=10)
trace  = offramp.record(model, calibration_loader)
policy = offramp.calibrate(trace, "confidence", max_accuracy_drop=0.005)
print(offramp.evaluate(offramp.record(model, test_loader), policy))
runner = offramp.Runner(model, policy, example)
result = runner(x)
offramp.export(model, policy, example, "digits.offramp")
"""


def blocks(document: Path) -> list[str]:
    return BLOCK.findall(document.read_text("utf-8"))


def test_the_quick_start_is_the_eight_lines():
    shown = "\n".join(blocks(DOCUMENTS[0]))
    bare = re.sub(r" +#.*", "", shown)
    assert QUICK_START in bare


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_code_runs(document, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for number, code in enumerate(blocks(document)):
        exec(compile(code, f"{document.name}, block {number}", "exec"), names)
    if document.name == "README.md":
        assert "Verdict: " in capsys.readouterr().out
        assert names["result"].prediction.shape == (64,)
        assert (tmp_path / "digits.offramp").exists()


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(document):
    broken = [
        link
        for link in LINK.findall(document.read_text("utf-8"))
        if not (document.parent / link).exists()
    ]
    assert broken == []
