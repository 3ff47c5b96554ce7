"""The toy verbs, installed the way another package would install them: a distribution with entry points on sys.path."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ENTRY_POINTS = """[surgery.operations]
toy = tests.language.toys:Toy
tune = tests.language.toys:Tune
broken = tests.language.nowhere:Broken
lora = tests.language.toys:Toy
"""


@pytest.fixture(scope="session", autouse=True)
def toys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("site")
    info = folder / "toys-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        importlib.invalidate_caches()
        yield folder
