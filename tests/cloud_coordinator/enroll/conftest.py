from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fleetfed_testing.enrolment import Bench


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Bench]:
    made = Bench(tmp_path)
    capsys.readouterr()
    yield made
    made.enroller.close()
