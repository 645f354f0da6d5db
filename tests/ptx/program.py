"""A kernel's PTX as statements."""

import re
from typing import Any

import numpy as np

TYPES = {
    **dict.fromkeys(("b8", "u8"), np.uint8),
    **dict.fromkeys(("b16", "u16", "f16", "bf16"), np.uint16),
    **dict.fromkeys(("b32", "u32", "f16x2", "bf16x2", "u16x2"), np.uint32),
    **dict.fromkeys(("b64", "u64"), np.uint64),
    "s8": np.int8,
    "s16": np.int16,
    "s32": np.int32,
    "s64": np.int64,
    "f32": np.float32,
    "pred": np.bool_,
}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Kernel:
    """A parsed program: statements as (predicate, opcode, operands), names of inner scopes made unique."""

    def __init__(self, ptx: str) -> None:
        self.types: dict[str, Any] = {}  # by name of a register, or of a family of them without its number
        self.labels: dict[str, int] = {}
        self.code: list[tuple[str, str, list[str]]] = []
        scopes: list[dict[str, str]] = []
        opened = 0
        body = re.sub(r"\{(?=\s*\.reg)|(?<=;)\s*(?=\})", r"\g<0>\n", ptx[ptx.index(".entry") :])
        for line in body[body.index("{") :].splitlines():
            line = line.split("//")[0].strip()
            if line == "{":
                scopes.append({})
                opened += 1
            elif line == "}":
                scopes.pop()
            elif line.endswith(":"):
                scopes[-1][line[:-1]] = name = line[:-1] + (f"@{opened}" if len(scopes) > 1 else "")
                self.labels[name] = len(self.code)
            else:
                for statement in filter(None, map(str.strip, line.split(";"))):
                    self._parse(statement, scopes, opened)

    def _parse(self, statement: str, scopes: list[dict[str, str]], opened: int) -> None:
        if statement.startswith(".reg"):
            _, kind, names = statement.split(None, 2)
            for name in names.replace(" ", "").split(","):
                name = name.split("<")[0]
                unique = name + (f"@{opened}" if len(scopes) > 1 else "")
                scopes[-1][name] = unique
                self.types[unique] = np.bool_ if kind == ".pred" else UNSIGNED[np.dtype(TYPES[kind[1:]]).itemsize]
        elif not statement.startswith("."):
            found = re.fullmatch(r"(?:@(!?[%\w]+)\s+)?([\w.:]+)\s*(.*)", statement)
            assert found, statement
            inner = {name: unique for scope in scopes[1:] for name, unique in scope.items()}
            predicate, operands = (re.sub(r"[%$\w]+", lambda m: inner.get(m[0], m[0]), found[i] or "") for i in (1, 3))
            self.code.append((predicate, found[2], split(operands)))

    def type_of(self, operand: str) -> Any:
        """Of a register; None for what is not one."""
        return self.types.get(operand) or self.types.get(re.sub(r"\d+$", "", operand))


def split(text: str) -> list[str]:
    """What stands between commas outside of brackets."""
    return re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,\s])+", text)
