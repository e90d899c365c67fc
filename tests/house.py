"""Figures of the code's structure: `python -m tests.house` prints them, `tests/unit/test_house.py` bounds them."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("launcher", "tools", "trainer")
_NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING)


@dataclass(frozen=True)
class Figures:
    """What is counted.

    Attributes:
        places: files and folders of code at the root of trainer/.
        arrows: pairs of places of which one imports from the other.
        circles: groups of modules, in all packages, that import each other in a circle.
        train_lines: of `_train` in trainer/train.py.
        files: by path, their lines.
        functions: by path and name, their lines.
        code_lines: by package, without docstrings, comments and blanks.
    """

    places: list[str]
    arrows: list[tuple[str, str]]
    circles: list[list[str]]
    train_lines: int
    files: dict[str, int]
    functions: dict[str, int]
    code_lines: dict[str, int]


def count() -> Figures:
    """Read the code in the working tree."""
    paths = {_module(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in paths.items()}
    imports = {name: set(_imports(tree, trees)) - {name} for name, tree in trees.items()}
    functions = {
        f"{paths[name].relative_to(ROOT)}:{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    between = {(_place(name), _place(other)) for name, others in imports.items() for other in others}
    return Figures(
        places=sorted({_place(name) for name in trees if _place(name)}),
        arrows=sorted((one, other) for one, other in between if one and other and one != other),
        circles=_circles(imports),
        train_lines=functions["trainer/train.py:_train"],
        files={
            str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in paths.values()
        },
        functions=functions,
        code_lines={
            package: sum(
                _code_lines(path, trees[name]) for name, path in paths.items() if name.split(".")[0] == package
            )
            for package in PACKAGES
        },
    )


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _place(module: str) -> str:
    """The room or file at the root of trainer/ that a module is in; empty for the package itself and for others."""
    package, *inner = module.split(".")
    return inner[0] if package == "trainer" and inner else ""


def _imports(tree: ast.Module, known: Iterable[str]) -> Iterator[str]:
    names = set(known)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names if each.name in names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for each in node.names:
                inner = f"{node.module}.{each.name}"
                if inner in names or node.module in names:
                    yield inner if inner in names else node.module


def _circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules of which each reaches each other, of two at least."""
    reached = {name: _reach(name, imports) for name in imports}
    groups = {tuple(sorted({name, *(each for each in reached[name] if name in reached[each])})) for name in imports}
    return [list(group) for group in sorted(groups) if len(group) > 1]


def _reach(start: str, imports: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for each in imports[waiting.pop()] - found:
            found.add(each)
            waiting.append(each)
    return found


def _code_lines(path: Path, tree: ast.Module) -> int:
    source = path.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {
        line
        for token in tokens
        if token.type not in _NO_CODE and token.type != tokenize.ENDMARKER
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def main() -> None:
    """Print the figures."""
    found = count()
    print(f"places at the root of trainer/  {len(found.places)}")
    print(f"import arrows between them      {len(found.arrows)}")
    print(f"circles of imports              {len(found.circles)}")
    print(f"lines of _train                 {found.train_lines}")
    print(f"code lines                      {found.code_lines}")
    for name, sizes in (("file", found.files), ("function", found.functions)):
        place, lines = max(sizes.items(), key=lambda each: each[1])
        print(f"{f'longest {name}':32}{lines}, {place}")


if __name__ == "__main__":
    main()
