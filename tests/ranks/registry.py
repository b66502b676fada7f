"""Which architectures of a vLLM build experts, read from its source without importing it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

EXPERTS = {"FusedMoEFactory", "fused_moe", "fused_experts"}
"""What vLLM builds or computes experts with."""
Place = tuple[str, str]


class Source:
    """The modules of a vLLM that hold its models; `root` is the folder of the package `vllm`."""

    def __init__(self, root: Path) -> None:
        files = [
            path
            for sub in ("model_executor/models", "models")
            for path in root.glob(f"{sub}/**/*.py")
        ]
        self.defined: dict[Place, ast.stmt] = {}
        self.imported: dict[Place, Place] = {}
        self.entries: dict[str, Place] = {}
        self._led: dict[Place, list[Place]] = {}
        for path in files:
            parts = ("vllm", *path.relative_to(root).with_suffix("").parts)
            inside = parts[:-1]
            name = ".".join(inside if parts[-1] == "__init__" else parts)
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom):
                    base = ".".join(inside[: len(inside) + 1 - node.level]) if node.level else ""
                    module = ".".join(filter(None, (base, node.module)))
                    for alias in node.names:
                        self.imported[name, alias.asname or alias.name] = module, alias.name
            for statement in tree.body:
                for node in ast.walk(statement) if isinstance(statement, ast.If) else [statement]:
                    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                        self.defined[name, node.name] = node
                if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                    self.defined.setdefault((name, statement.targets[0].id), statement)
        registry = root / "model_executor/models/registry.py"
        for node in ast.walk(ast.parse(registry.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple):
                        module, cls = map(ast.literal_eval, value.elts[:2])
                        prefix = "" if module.startswith("vllm.") else "vllm.model_executor.models."
                        self.entries[key.value] = prefix + module, cls

    def expert_architectures(self) -> set[str]:
        """Return the registry entries from whose class names lead to vLLM's expert layer."""
        return {name for name, place in self.entries.items() if self._builds_experts(place)}

    def _builds_experts(self, start: Place) -> bool:
        seen: set[Place] = set()
        todo = [start]
        while todo:
            place = self._resolved(todo.pop())
            if place[1] in EXPERTS and place[0].startswith("vllm.model_executor.layers.fused_moe"):
                return True
            if place not in seen and place in self.defined:
                seen.add(place)
                todo += self._led_to(place)
        return False

    def _led_to(self, place: Place) -> list[Place]:
        if place not in self._led:
            node = self.defined[place]
            own = {(place[0], name) for name in self._names(node)}
            known = [p for p in own if p in self.defined or p in self.imported]
            self._led[place] = [*known, *self._registered(node)]
        return self._led[place]

    def _resolved(self, place: Place) -> Place:
        hops = 0
        while place not in self.defined and place in self.imported and hops < 9:
            place, hops = self.imported[place], hops + 1
        return place

    @staticmethod
    def _names(node: ast.AST) -> Iterator[str]:
        for part in ast.walk(node):
            if isinstance(part, ast.Name):
                yield part.id
            elif isinstance(part, ast.Attribute):
                yield part.attr

    def _registered(self, node: ast.AST) -> Iterator[Place]:
        """Yield the language models that a multimodal class names by their registry entry."""
        for part in ast.walk(node):
            called = getattr(part, "func", None)
            name = getattr(called, "id", getattr(called, "attr", ""))
            if name.endswith("init_vllm_registered_model"):
                for text in ast.walk(part):
                    if isinstance(text, ast.Constant) and text.value in self.entries:
                        yield self.entries[text.value]
