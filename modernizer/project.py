"""The files of one run: those the user named, and those that these import, read when first asked for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from modernizer.source import SourceError, SourceFile

# Never looked for beside the user's files, even where a folder of that name lies there.
EXTERNAL = frozenset(
    "torch modernizer numpy math einops typing typing_extensions collections functools copy itertools os"
    " sys dataclasses abc warnings random json re time enum operator logging tqdm scipy pandas"
    " torchvision torchtext torchaudio".split()
)
SKIPPED_FOLDERS = frozenset(
    {".git", ".venv", "venv", "__pycache__", "node_modules", "build", "dist", ".eggs", "site-packages"}
)
MAX_SCANNED = 2000  # files beside the named ones whose text is looked at
LEVELS_UP = 8  # how many parent folders may be the root that an absolute import starts from


def python_files(folder: Path) -> Iterator[Path]:
    """All `.py` files below a folder, in a stable order, without environments, caches and builds."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            if entry.name not in SKIPPED_FOLDERS and not entry.name.startswith("."):
                yield from python_files(entry)
        elif entry.suffix == ".py" and entry.is_file():
            yield entry


class Project:
    """Source files by path, and the resolution of imports between them. Nothing is ever imported or executed."""

    def __init__(self, named: Sequence[Path], texts: Mapping[Path, str] | None = None) -> None:
        self.named = tuple(dict.fromkeys(named))
        self.errors: list[SourceError] = []
        self._texts = dict(texts or {})
        self._files: dict[Path, SourceFile | None] = {}
        self._found: dict[tuple[Path, str], Path | None] = {}
        self._around: dict[Path, dict[Path, str]] = {}
        for path in self.named:
            self.source(path)

    @classmethod
    def open(cls, paths: Sequence[Path]) -> Project:
        """A project of the given files and all Python files below the given folders."""
        named: list[Path] = []
        for path in paths:
            resolved = path.resolve()
            named.extend(python_files(resolved) if resolved.is_dir() else [resolved])
        return cls(named)

    def source(self, path: Path) -> SourceFile | None:
        """The file, or None where it cannot be read or parsed; a named file's error is kept in `errors`."""
        if path not in self._files:
            try:
                file = SourceFile.read(path)
                if path in self._texts:
                    file = SourceFile(path, self._texts[path], file.encoding, file.bom)
                _ = file.tree
                self._files[path] = file
            except SourceError as error:
                self._files[path] = None
                if path in self.named:
                    self.errors.append(error)
        return self._files[path]

    def files(self) -> list[SourceFile]:
        """Every file that was read so far."""
        return [file for file in self._files.values() if file is not None]

    def with_texts(self, texts: Mapping[Path, str]) -> Project:
        """The same project in which some files read differently."""
        fresh = Project((), {**self._texts, **texts})
        fresh.named = self.named
        fresh._files = {p: f for p, f in self._files.items() if p not in texts}
        fresh._found, fresh._around = self._found, self._around
        for path in self.named:
            fresh.source(path)
        return fresh

    def texts_around(self) -> Mapping[Path, str]:
        """The text on disk of the Python files of the package, or else the folder, that the named files are in."""
        root = min((path.parent for path in self.named), key=lambda folder: len(folder.parts), default=None)
        while root is not None and (root / "__init__.py").is_file():
            root = root.parent
        if root is None:
            return {}
        if root not in self._around:
            files = itertools.islice(python_files(root), MAX_SCANNED)
            self._around[root] = {file: file.read_text(encoding="utf-8", errors="replace") for file in files}
        return self._around[root]

    def find_module(self, importer: Path, module: str, level: int = 0) -> Path | None:
        """The file that `import module` (or `from ..module import`, with its level) in `importer` refers to."""
        key = (importer.parent, "." * level + module)
        if key not in self._found:
            self._found[key] = self._search(importer, module, level)
        return self._found[key]

    def _search(self, importer: Path, module: str, level: int) -> Path | None:
        parts = [p for p in module.split(".") if p]
        if level:
            return _module_file(importer.parents[level - 1], parts) if level <= len(importer.parents) else None
        if not parts or parts[0] in EXTERNAL:
            return None
        for folder in _import_roots(importer):
            if folder.name in ("site-packages", "dist-packages") and parts[0] != _package_of(importer, folder):
                return None
            found = _module_file(folder, parts)
            if found is not None and found != importer:
                return found
        return None


def _import_roots(importer: Path) -> list[Path]:
    """The folders that an absolute import may start from, likeliest first: a file inside a package is imported from
    beside the package, so its own siblings come last."""
    folders = list(importer.parents)[:LEVELS_UP]
    inside = [folder for folder in folders if (folder / "__init__.py").is_file()]
    return [folder for folder in folders if folder not in inside] + inside


def _package_of(importer: Path, folder: Path) -> str:
    return importer.relative_to(folder).parts[0].removesuffix(".py")


def _module_file(folder: Path, parts: Sequence[str]) -> Path | None:
    target = folder.joinpath(*parts)
    if parts and target.with_name(target.name + ".py").is_file():
        return target.with_name(target.name + ".py")
    if (target / "__init__.py").is_file():
        return target / "__init__.py"
    return target if target.is_dir() and any(target.glob("*.py")) else None  # a namespace package
