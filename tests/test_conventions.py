"""Keeps the house in order: who may import whom, what rules and components come with, that pages tell the truth."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from modernizer import pipeline
from modernizer.cli import main
from modernizer.registry import all_rules, page
from modernizer.report import Status
from modernizer.rule import Effect, Rule
from modernizer.vendor import component_names

ROOT = Path(__file__).parents[1]
PACKAGES = ("modernizer", "codemods")
FILES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
COMPONENTS = [path for path in FILES if path.is_relative_to("modernizer/components")]
VERIFY = [path for path in FILES if path.is_relative_to("modernizer/verify")]  # partly a child process of its own
CODEMODS = [path for path in FILES if path.is_relative_to("codemods")]
WITH_TORCH = (
    "apply batches bridging calibrate capture checkpoint folding keeping least_squares migrate objective optimizer programs"
    " safetensors_file stream trace".split()
)
TENSORS = [Path(f"modernizer/weights/{name}.py") for name in WITH_TORCH]  # imported when used
ENGINE = [path for path in FILES if path not in COMPONENTS + VERIFY + TENSORS]
OPTIONAL = {
    "safetensors",
    "transformers",
    "lightning",
    "pytorch_lightning",
    "yaml",
}  # what components may import in a function that needs it
RULES = list(all_rules().values())
BLOCK = re.compile(r"^```python (before|after|modern|refused)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def imports(path: Path) -> Iterator[str]:
    """The absolute names of all modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            yield node.module or ""


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def packages_at_import(path: Path) -> set[str]:
    """The packages that a file imports when it is imported itself, not first when one of its functions runs."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    lazy = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    found = [n for n in ast.walk(tree) if n not in lazy]
    plain = {alias.name for n in found if isinstance(n, ast.Import) for alias in n.names}
    return {name.partition(".")[0] for name in plain | {n.module or "" for n in found if isinstance(n, ast.ImportFrom)}}


def names(files: list[Path]) -> list[str]:
    return [str(path) for path in files]


@pytest.mark.parametrize("path", ENGINE, ids=names(ENGINE))
def test_engine_and_rules_never_import_torch(path: Path) -> None:
    assert "torch" not in packages(path)
    assert not [name for name in imports(path) if name.startswith("modernizer.components")]


@pytest.mark.parametrize("path", COMPONENTS, ids=names(COMPONENTS))
def test_components_import_torch_and_nothing_of_the_engine(path: Path) -> None:
    kernel = {"triton"} if path.stem.endswith("_triton") else set()  # loaded by name, where there is Triton
    assert packages_at_import(path) <= {"torch", "modernizer"} | kernel | sys.stdlib_module_names
    assert packages(path) <= {"torch", "modernizer", *OPTIONAL} | kernel | sys.stdlib_module_names
    ours = [name for name in imports(path) if name.startswith("modernizer")]
    assert all(name.startswith("modernizer.components") for name in ours)


@pytest.mark.parametrize("path", CODEMODS, ids=names(CODEMODS))
def test_rules_import_only_modernizer(path: Path) -> None:
    assert packages(path) <= {"modernizer", "codemods"} | sys.stdlib_module_names
    assert all(name.startswith("codemods._") for name in imports(path) if name.startswith("codemods"))


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_only_the_registry_imports_rules(path: Path) -> None:
    if path != Path("modernizer/registry.py") and path not in CODEMODS:
        assert "codemods" not in packages(path)


def test_commands_verify_and_weight_maps_are_imported_without_torch() -> None:
    code = "import sys, modernizer.cli, modernizer.verify, modernizer.weights.recorded, modernizer.weights.resolve\n"
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_module_and_public_definitions_have_docstrings(path: Path) -> None:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    public = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        if not is_handler(node)
    ]
    assert [node.name for node in public if ast.get_docstring(node) is None] == []
    assert ast.get_docstring(tree) or not tree.body


def is_handler(node: ast.FunctionDef | ast.ClassDef) -> bool:
    """Registered for something by a decorator that says what it is for, such as `@evaluates(ast.Name)`."""
    return isinstance(node, ast.FunctionDef) and any(isinstance(one, ast.Call) for one in node.decorator_list)


def component_exports() -> list[str]:
    """What the package exports, and what its sub-packages do."""
    folder = ROOT / "modernizer" / "components"
    inner = [
        elt.value
        for path in sorted(folder.glob("*/__init__.py"))
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List)
        for elt in node.value.elts
        if isinstance(elt, ast.Constant)
    ]
    return sorted({*component_names(), *map(str, inner)})


@pytest.mark.parametrize("name", component_exports())
def test_component_is_tested(name: str) -> None:
    tests = (ROOT / "tests" / "components").glob("test_*.py")
    assert any(re.search(rf"\b{name}\b", path.read_text(encoding="utf-8")) for path in tests)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
class TestEveryRule:
    def test_has_a_test_file(self, rule: Rule) -> None:
        assert (ROOT / "tests" / "codemods" / f"test_{rule.name}.py").is_file()

    def test_declares_itself(self, rule: Rule) -> None:
        assert rule.summary and not rule.summary.endswith(".")
        assert isinstance(rule.effect, Effect)
        assert all(re.fullmatch("[a-z_]+", option.name) and option.help for option in rule.options)

    def test_runs_after_rules_that_exist(self, rule: Rule) -> None:
        assert set(rule.after) <= set(all_rules())

    def test_page_begins_with_its_name_and_has_an_example(self, rule: Rule) -> None:
        text = page(rule)
        assert text.startswith(f"# {rule.name}\n")
        kinds = [kind for kind, _ in BLOCK.findall(text)]
        assert "before" in kinds
        assert len(re.findall("^```python", text, re.MULTILINE)) == len(kinds), "a block that is not executed"

    def test_page_examples_are_what_the_rule_does(self, rule: Rule, tmp_path: Path) -> None:
        blocks: list[tuple[str, str]] = BLOCK.findall(page(rule))
        for number, (kind, code) in enumerate(blocks):
            if kind == "after":
                continue
            path = tmp_path / f"example{number}.py"
            path.write_text(code, encoding="utf-8")
            report = pipeline.upgrade([path], [rule], {})
            assert not report.problems
            found = {site.status for site in report.sites}
            if kind == "before":
                following, expected = blocks[number + 1]
                assert following == "after"
                assert path.read_text(encoding="utf-8") == expected
                assert Status.DONE in found
            else:
                assert path.read_text(encoding="utf-8") == code
                assert found == {Status(kind)}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_readme_lists_every_rule_with_its_effect(rule: Rule) -> None:
    (line,) = [line for line in readme().splitlines() if line.startswith(f"| `{rule.effect.value}` |")]
    assert f"`{rule.name}`" in line


@pytest.mark.parametrize("effect", Effect, ids=lambda effect: effect.value)
def test_readme_gives_each_effects_promise(effect: Effect) -> None:
    assert f"| `{effect.value}` | {effect.promise} |" in readme()


@pytest.mark.parametrize("command", sorted(main.commands))
def test_readme_shows_every_command(command: str) -> None:
    assert f"modernize {command}" in readme()


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")
