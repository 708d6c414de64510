"""What fuzzing found stays found: the targets run over their whole corpus, without atheris."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[1] / "fuzz"


@pytest.fixture(scope="module", params=["xentrace", "text"])
def target(request: pytest.FixtureRequest) -> Iterator[tuple[str, Callable[[bytes], None]]]:
    stand_in = types.ModuleType("atheris")
    stand_in.instrument_imports = lambda **_: contextlib.nullcontext()  # type: ignore[attr-defined]
    before = sys.modules.get("atheris")
    sys.modules["atheris"] = stand_in
    try:
        spec = importlib.util.spec_from_file_location(f"fuzz_{request.param}", FUZZ / f"fuzz_{request.param}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield request.param, module.one
    finally:
        del sys.modules["atheris"]
        if before is not None:
            sys.modules["atheris"] = before


def test_corpus(target: tuple[str, Callable[[bytes], None]]) -> None:
    name, one = target
    paths = sorted((FUZZ / "corpus" / name).iterdir())
    assert len(paths) > 10
    for path in paths:
        one(path.read_bytes())
