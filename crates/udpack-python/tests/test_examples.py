"""Runs each example as a program of its own: it must end by itself, well, and with the line it promises."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import PATIENCE

EXAMPLES = Path(__file__).parents[3] / "examples" / "python"
LAST = {
    "chat.py": "here: ann, bob",
    "reduce.py": "2000000 values, mean 999999.5",
    "upload.py": "4 files, 12582912 bytes are stored",
}


def test_each_example_is_run():
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == sorted(LAST)


@pytest.mark.parametrize("name", LAST)
def test_example(name):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)], capture_output=True, text=True, timeout=PATIENCE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == LAST[name]
