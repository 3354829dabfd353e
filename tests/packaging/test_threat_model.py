"""`docs/threat-model.md` names a test for every attack that it says is stopped; the tests must be there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def functions(path: Path) -> set[str]:
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def rows() -> list[list[str]]:
    text = (ROOT / "docs" / "threat-model.md").read_text()
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return [row for row in cells if len(row) == 3 and row[1] in ("stopped", "bounded", "not stopped")]


def test_every_attack_that_is_stopped_has_a_test_that_mounts_it() -> None:
    found = rows()
    assert len(found) > 20
    for attack, verdict, why in found:
        named = _TEST.findall(why)
        assert named or verdict == "not stopped", attack
        for file, test in named:
            assert test in functions(ROOT / file), f"{attack}: {file} has no {test}"
