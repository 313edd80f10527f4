"""Runs the guide: its blocks in order, as one program."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

from conftest import in_time

ROOT = Path(__file__).parents[3]


def blocks(page: Path) -> list[tuple[int, str]]:
    """The Python of a page, each block with the line before it."""
    text = page.read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)
    return [(text.count("\n", 0, one.start()) + 1, one[1]) for one in found]


async def run(page: Path) -> int:
    names: dict[str, object] = {"__name__": "guide"}
    count = 0
    for line, source in blocks(page):
        tree = ast.increment_lineno(ast.parse(source), line)
        code = compile(tree, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        result = eval(code, names)
        if inspect.isawaitable(result):
            await in_time(result)
        count += 1
    return count


async def test_the_guide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert await run(ROOT / "docs" / "guide" / "python.md") >= 14


async def test_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert await run(ROOT / "crates" / "udpack-python" / "README.md") == 1


def test_every_public_name_is_described():
    import udpack
    import udpack.sync

    for module in (udpack, udpack.sync):
        for name in module.__all__:
            thing = getattr(module, name)
            if not (inspect.isclass(thing) or inspect.isfunction(thing)):
                continue
            assert inspect.getdoc(thing), name
            for member, value in vars(thing).items() if inspect.isclass(thing) else ():
                if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                    assert inspect.getdoc(value), f"{name}.{member}"
