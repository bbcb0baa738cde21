"""Every tensor parameter carries its shape in a comment, with letters from one glossary: see CONTRIBUTING.md."""

from __future__ import annotations

import ast
import io
import re
import string
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "fastroute"
PACKAGES = ("ops", "reference", "triton", "models", "rewrite", "runtime", "budget", "patch", "pixel", "cascades", "files")
TENSOR = re.compile(r"(torch\.)?Tensor|(Sequence|Iterable|list|tuple)\[Tensor( \| None)?(, \.\.\.)?\]")


def is_tensor(annotation: ast.expr | None) -> bool:
    """Whether a parameter is a tensor or a plain list of tensors, or may be one."""
    if annotation is None:
        return False
    if isinstance(annotation, ast.BinOp):
        return is_tensor(annotation.left) or is_tensor(annotation.right)
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return is_tensor(ast.parse(annotation.value, mode="eval").body)
    return TENSOR.fullmatch(ast.unparse(annotation)) is not None


def groups(comment: str) -> list[str]:
    """The shapes in a comment, of the parameters alone: what stands in its outermost brackets."""
    text = re.sub(r"(type: ignore|noqa)(\[[^\]]*\]|:\s*\w+)?", "", comment).partition("->")[0]
    found, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        if letter == "[":
            depth += 1
            start = place if depth == 1 else start
        elif letter == "]" and depth:
            depth -= 1
            if not depth:
                found.append(text[start + 1 : place])
    return found


def tensors_of(source: str) -> Iterator[tuple[str, list[ast.arg], str]]:
    """For every line of a signature that has tensors: the function, these, and the comment that says their shapes.

    The comment stands on the line itself or, where the whole signature has one, behind its end.
    """
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        every = function.args
        parameters = [*every.posonlyargs, *every.args, *every.kwonlyargs, every.vararg]
        tensors = [a for a in parameters if a is not None and is_tensor(a.annotation)]
        # A signature in one line ends with it, a longer one below its last parameter.
        above = max((a.lineno for a in parameters if a is not None), default=function.lineno)
        below = range(above + (above > function.lineno), function.body[0].lineno)
        end = next((line for line in below if line in comments), function.lineno)
        alone = [a for a in tensors if groups(comments.get(a.lineno, ""))]
        for line in sorted({a.lineno for a in alone}):
            yield function.name, [a for a in alone if a.lineno == line], comments[line]
        if others := [a for a in tensors if a not in alone]:
            yield function.name, others, comments.get(end, "")


def untagged(source: str) -> list[str]:
    """Lines and names of the tensor parameters of `source` without a shape: a comment has one for each of its parameters."""
    return [
        f"{a.lineno}: {function}({a.arg})"
        for function, tensors, comment in tensors_of(source)
        if len(groups(comment)) < len(tensors)
        for a in tensors
    ]


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_tensor_parameter_has_its_shape(path: Path):
    assert untagged(path.read_text("utf-8")) == []


@pytest.mark.slow
def test_letters_are_those_of_the_glossary():
    """Longer names are words, which explain themselves."""
    text = (ROOT.parent / "CONTRIBUTING.md").read_text("utf-8").partition("The letters are:")[2].partition("Longer names")[0]
    glossary = set(re.findall(r"\b[A-Za-z]\b", text))
    assert {"B", "C", "H", "W", "N", "p", "K", "s", "D"} <= glossary < set(string.ascii_letters)
    for path in sources():
        for _, _, comment in tensors_of(path.read_text("utf-8")):
            letters = re.findall(r"(?<![A-Za-z_])[A-Za-z](?![A-Za-z_])", " ".join(groups(comment)))
            assert set(letters) <= glossary, f"{path.relative_to(ROOT)}: {comment}"


def test_missing_shapes_are_noticed():
    good = [
        "def f(x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, K]\n    pass",
        "def f(x: Tensor, y: Tensor):  # [N], [K]\n    pass",
        "def f(\n    x: Tensor,  # [N]\n    n: int,\n    *rest: Tensor,  # [...] each\n):\n    pass",
        "def f(\n    x: Tensor, y: Tensor | None, name_of_the_third: int\n) -> Tensor:  # [N], [K, S] -> [N]\n    pass",
        "def f(n: int) -> Tensor:\n    pass",
    ]
    assert [untagged(source) for source in good] == [[]] * len(good)
    assert untagged("def f(x: Tensor):  # an image\n    pass") == ["1: f(x)"]
    assert untagged("def f(x: Tensor, y: Tensor):  # [N]\n    pass") == ["1: f(x)", "1: f(y)"]
    assert untagged("def f(x: Tensor) -> Tensor:  # -> [N]\n    pass") == ["1: f(x)"]
    assert untagged("def f(x: Tensor):  # type: ignore[override]\n    pass") == ["1: f(x)"]
    assert untagged("def f(\n    x: Tensor,  # [N]\n    y: 'Tensor | None' = None,\n):\n    pass") == ["3: f(y)"]
    assert untagged("def f(xs: Sequence[Tensor], y: Sequence[Tensor | None]):  # [N]\n    pass") == ["1: f(xs)", "1: f(y)"]
