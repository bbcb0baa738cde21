"""The operators' schemas as text. Free of torch and of the package, so that setup.py can load this file by its path."""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path


def read_schemas(folder: Path) -> list[str]:
    """The schemas of all operators, read from the sources in `folder` without importing them."""
    schemas: list[str] = []
    for path in sorted(folder.glob("[!_]*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "SCHEMAS":
                schemas += ast.literal_eval(node.value)
    return schemas


def digest(schemas: list[str]) -> str:
    """A fingerprint of the schemas, by which a stale extension is noticed."""
    return hashlib.sha256("\n".join(schemas).encode()).hexdigest()[:16]
