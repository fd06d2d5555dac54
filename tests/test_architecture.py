"""The rules of the code base that a reader relies on, held by reading the sources.

A rule is a function from a syntax tree to its offences, (line, what). Each has a snippet that it
must object to, so that a rule which has gone blind fails as well.
"""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
Offences = Iterator[tuple[int, str]]
Rule = Callable[[ast.AST], Offences]

MOST_LINES = 400
SCRIPT_LINES = 10

# A search on the shipped tables must not wait for these to load.
HEAVY = ("torch", "torchvision", "sklearn", "scipy", "matplotlib", "tensorboard")
LIGHT = ("compofa/space", "compofa/networks", "nas/search", "nas/cost", "nas/report")
"""Folders whose modules load without them, but for those of ``MEASURING``."""
MEASURING = ("nas/cost/fit", "nas/cost/block_regression", "nas/cost/sampling",
             "nas/search/from_checkpoint")  # fmt: skip
"""Beginnings of the paths of modules that measure and fit."""

DEFINITIONS = ("compofa/space", "compofa/networks")
"""Folders that never import beyond ``MAY_IMPORT``, not inside a function either."""

# What each folder may import at its modules' top, beside itself and ``FREE``.
FREE = ("compofa.errors", "compofa.seeds", "compofa.__version__")
SPACES = ("compofa.space", "compofa.networks")
FILES = (*SPACES, "compofa.nn", "compofa.distributed", "compofa.data", "compofa.io")
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "compofa/space": (),
    "compofa/networks": ("compofa.space",),
    "compofa/distributed": (),
    "compofa/data": (),
    "compofa/nn": (*SPACES, "compofa.distributed"),
    "compofa/io": FILES,
    "compofa/details": (*FILES, "compofa.plots"),
    "compofa/training": (*FILES, "compofa.evaluate"),
    "nas/cost": (*FILES, "nas.model_file", "nas.tables"),
    "nas/accuracy": (*FILES, "compofa.evaluate", "nas.model_file", "nas.tables", "nas.cost"),
    "nas/search": (
        *FILES, "compofa.evaluate", "nas.tables", "nas.cost", "nas.accuracy",
    ),
    "nas/report": (
        *FILES, "compofa.plots", "nas.tables", "nas.cost", "nas.accuracy", "nas.search",
    ),
}  # fmt: skip
"""A folder that is not here, such as a ``cli``, may import all; nothing but a ``cli`` and a
``__main__`` may import a ``cli``, and nothing of ``compofa`` may import ``nas``."""


def sources(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def is_cli(path: Path) -> bool:
    return any(path.is_relative_to(ROOT / package / "cli") for package in ("compofa", "nas"))


LIBRARY = [path for path in sources("compofa", "nas") if not is_cli(path)]


def module_path(module: str) -> Path | None:
    """Return the file of a module of this project, or None where it does not exist."""
    base = ROOT.joinpath(*module.split("."))
    return next((p for p in (base / "__init__.py", base.with_suffix(".py")) if p.is_file()), None)


def offences(rule: Rule, paths: list[Path]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for path in paths
        for line, what in rule(ast.parse(path.read_text(encoding="utf-8"), str(path)))
    ]


# --- what the rules read ---


def dotted(node: ast.AST) -> str:
    """Return ``a.b.c`` for such an expression, and an empty string for any other."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, dotted(node.func)


def imports(tree: ast.AST) -> Offences:
    """Yield every name imported, at module level or inside a function, also by import_module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
    for call, name in calls(tree):
        if name.split(".")[-1] in ("import_module", "__import__") and call.args:
            target = call.args[0]
            if isinstance(target, ast.Constant) and isinstance(target.value, str):
                yield call.lineno, target.value


def imports_of(*forbidden: str) -> Rule:
    def rule(tree: ast.AST) -> Offences:
        for line, name in imports(tree):
            if any(name == each or name.startswith(f"{each}.") for each in forbidden):
                yield line, f"imports {name}"

    return rule


def given(call: ast.Call, keyword: str) -> object:
    """Return the constant that a keyword argument of ``call`` has, else None."""
    for argument in call.keywords:
        if argument.arg == keyword and isinstance(argument.value, ast.Constant):
            return argument.value.value
    return None


# --- the rules ---


def global_statements(tree: ast.AST) -> Offences:
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield node.lineno, f"global {', '.join(node.names)}"


def global_generators(tree: ast.AST) -> Offences:
    """Yield uses of the generators that all code shares; seeded ones are made explicitly."""
    explicit = ("BitGenerator", "Generator", "PCG64", "Philox", "SeedSequence", "default_rng")
    yield from imports_of("random")(tree)
    for node in ast.walk(tree):
        match = re.fullmatch(r"(np|numpy)\.random\.(\w+)", dotted(node))
        if match and match[2] not in explicit:
            yield node.lineno, f"{match[0]} uses the global generator"
    for call, name in calls(tree):
        if name.endswith(".default_rng") and not call.args and not call.keywords:
            yield call.lineno, "default_rng() without a seed"


def terminal_use(tree: ast.AST) -> Offences:
    for call, name in calls(tree):
        if name in ("print", "input"):
            yield call.lineno, f"{name}() in the library: log, or leave it to the command"


def bare_excepts(tree: ast.AST) -> Offences:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield node.lineno, "bare except"


def unsafe_loading(tree: ast.AST) -> Offences:
    """Yield what could run code from a file."""
    modules = ("pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
    yield from imports_of(*modules)(tree)
    for call, name in calls(tree):
        if name == "torch.load":
            yield call.lineno, "torch.load: read with compofa.io.tensors"
        if name in ("np.load", "numpy.load") and given(call, "allow_pickle"):
            yield call.lineno, "numpy.load with allow_pickle"
        if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"):
            yield call.lineno, name


LAYERS = imports_of("nas", "benchmarks", "tests")
COMMANDS = imports_of("compofa.cli", "nas.cli", "benchmarks", "tests")


def imports_beyond(folder: str) -> Rule:
    """Return the rule for what a folder's modules may import: at their top, or anywhere."""
    allowed = (folder.replace("/", "."), *MAY_IMPORT[folder], *FREE)

    def rule(tree: ast.AST) -> Offences:
        body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        read = tree if folder in DEFINITIONS else ast.Module(body, [])
        for line, name in imports(read):
            ours = name.split(".")[0] in ("compofa", "nas")
            if ours and not any(name == each or name.startswith(f"{each}.") for each in allowed):
                yield line, f"imports {name}"

    return rule


RULES: list[tuple[Rule, str]] = [
    (imports_beyond("compofa/space"), "from compofa.networks import layout"),
    (imports_beyond("compofa/networks"), "def build():\n    from compofa.nn.build import build"),
    (imports_beyond("compofa/networks"), "def read():\n    import_module('compofa.io.open')"),
    (imports_beyond("compofa/nn"), "from compofa.io.checkpoint import load_checkpoint"),
    (LAYERS, "from nas import search"),
    (LAYERS, "def late():\n    import nas.cost.base"),
    (LAYERS, "import_module('nas.cost.base')"),
    (COMMANDS, "from compofa import cli"),
    (global_statements, "def count():\n    global total"),
    (global_generators, "np.random.seed(0)"),
    (global_generators, "numpy.random.permutation(3)"),
    (global_generators, "import random"),
    (global_generators, "rng = np.random.default_rng()"),
    (terminal_use, "print('done')"),
    (terminal_use, "input('go on?')"),
    (bare_excepts, "try:\n    go()\nexcept:\n    pass"),
    (unsafe_loading, "torch.load(path)"),
    (unsafe_loading, "torch.load(path, weights_only=True)"),
    (unsafe_loading, "import pickle"),
    (unsafe_loading, "from pickle import loads"),
    (unsafe_loading, "import pickle as quiet"),
    (unsafe_loading, "np.load(path, allow_pickle=True)"),
    (unsafe_loading, "yaml.load(text)"),
]


@pytest.mark.parametrize(("rule", "bad"), RULES, ids=[bad.split("\n")[-1] for _, bad in RULES])
def test_rules_see_what_they_forbid(rule: Rule, bad: str) -> None:
    assert list(rule(ast.parse(bad)))


def test_compofa_stands_without_nas() -> None:
    assert offences(LAYERS, sources("compofa")) == []


def test_the_library_does_not_import_commands() -> None:
    inside = [path for path in LIBRARY if path.name != "__main__.py"]  # which are commands
    assert len(inside) > 50
    assert offences(COMMANDS, inside) == []


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folders_import_what_stands_before_them(folder: str) -> None:
    inside = sources(folder)
    assert inside
    assert offences(imports_beyond(folder), inside) == []


@pytest.mark.parametrize("rule", [global_generators, terminal_use])
def test_library(rule: Rule) -> None:
    assert offences(rule, LIBRARY) == []


@pytest.mark.parametrize("rule", [global_statements, bare_excepts, unsafe_loading])
def test_library_and_commands(rule: Rule) -> None:
    assert offences(rule, sources("compofa", "nas", "benchmarks")) == []


def test_files_stay_small() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in sources("compofa", "nas")
    }
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


def test_light_modules_import_without_torch() -> None:
    assert all(sources(folder) for folder in LIGHT)
    files = [path.relative_to(ROOT).with_suffix("") for path in sources(*LIGHT)]
    light = [path.as_posix() for path in files if not path.as_posix().startswith(MEASURING)]
    names = ["compofa", *(name.removesuffix("/__init__").replace("/", ".") for name in light)]
    assert len(names) > 25
    program = (
        "import importlib, json, sys\n"
        "found = {}\n"
        f"for name in {names}:\n"
        "    importlib.import_module(name)\n"
        f"    loaded = [heavy for heavy in {HEAVY} if heavy in sys.modules]\n"
        "    if loaded and not found: found[name] = loaded\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}, "the first module that loads something heavy"


# --- scripts and commands ---

NO_SCRIPTS = ("hubconf.py", "setup.py")  # what torch.hub and pip read
SCRIPTS = [path for path in sorted(ROOT.glob("*.py")) if path.name not in NO_SCRIPTS]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_hold_no_logic(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= SCRIPT_LINES
    *before, last = ast.parse(text).body
    plain = (ast.Expr, ast.Import, ast.ImportFrom)
    assert all(isinstance(node, plain) for node in before)
    assert isinstance(last, ast.If)
    assert ast.unparse(last) == "if __name__ == '__main__':\n    sys.exit(main())"


def test_every_script_and_console_command_has_its_main() -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    modules = re.findall(r'"compofa-\w+ = ([\w.]+):main"', setup)
    assert len(modules) == 3
    for script in SCRIPTS:
        modules += re.findall(r"^from ([\w.]+) import main$", script.read_text(), re.MULTILINE)
    assert len(modules) == 3 + len(SCRIPTS)
    without = []
    for module in sorted(set(modules)):
        path = module_path(module)
        body = ast.parse(path.read_text(encoding="utf-8")).body if path else []
        if not any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in body):
            without.append(module)
    assert without == []


CITATION = re.compile(
    r"([A-Z]\w+) (?:et al\.|and ([A-Z]\w+)),? \(?(?:\"[^\"]+\", )?(?:([A-Z]\w+) )?(20\d\d)"
)
"""Such as "Cai et al., ICLR 2020", "Sahni et al. (ICLR 2021)" and "Deb et al., 2002"."""


def test_notice_lists_every_paper_that_is_cited() -> None:
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    entries = [" ".join(entry.split()) for entry in re.split(r"\n\s*\n|;\n", notice)]
    pages = [*sources("compofa", "nas"), *ROOT.glob("docs/*.md"), ROOT / "README.md"]
    cited, missing = 0, []
    for path in pages:
        text = re.sub(r"\s+(?:# )?", " ", path.read_text(encoding="utf-8"))
        for found in CITATION.finditer(text):
            first, second, venue, year = found.groups()
            wanted = [name for name in (first, second, venue, year) if name]
            cited += 1
            if not any(all(word in entry for word in wanted) for entry in entries):
                missing.append(f"{path.relative_to(ROOT)}: {found[0]}")
    assert cited > 30 and missing == []
