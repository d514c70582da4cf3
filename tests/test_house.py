"""The house itself: sizes, names, docstrings, what is never used, and that what is shown exists.

Each rule is a function from a syntax tree to complaints, so that the rule is tested too, on code that breaks it.
"""

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gaisnet.config.file import load_config

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "gaisnet"
MODULES = sorted(PACKAGE.rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").rglob("*.y*ml"))

LONGEST_FUNCTION = 60
LONGEST_MODULE = 400
MOST_DEFINITIONS = 4
PROTOCOLS = {
    *("close", "forward", "backward", "state_dict", "load_state_dict", "handle"),  # of contextlib, torch, handlers
    *("send", "peer", "crop", "extend", "put_body"),  # of links and sessions
    *("device_flops", "device_peak_bytes", "run"),  # of contenders
}
"""Names of methods that implement an interface; a search for one of them finds the interface."""
OPENINGS = re.compile(r"(What|Of|Who|Whoever|Whom|Whose|How|Where|That|Those|Such|Because|But|And)\b")
"""Words that a docstring does not open with: it begins with a verb or a concrete noun."""
RETIRED = {
    *(
        "Cluster",
        "Combined",
        "Holding",
        "Intake",
        "Learned",
        "Outlet",
        "Parts",
        "PluggedBody",
        "Ration",
        "Reach",
    ),
    *(
        "SideBySide",
        "Steepness",
        "Stint",
        "Stock",
        "Teacher",
        "Texts",
        "Turn",
        "Everywhere",
        "WritingModel",
        "ClassifyingModel",
    ),
    *(
        "few_bits",
        "intake",
        "let_in",
        "outlet",
        "plugged_in",
        "put_out",
        "recast",
        "steepness",
        "stint",
        "then_ask",
    ),
    "unfit",
}
"""Identifiers that gave way to terms of the field (docs/architecture.md has a glossary); in prose they are free."""
DRAWERS = {"common", "core", "helper", "helpers", "manager", "managers", "util", "utils"}
UNPICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
Rule = Callable[[ast.Module], Iterator[str]]


def long_functions(tree: ast.Module) -> Iterator[str]:
    """A function, from its ``def`` to its last line, fits on a screen."""
    for node in ast.walk(tree):
        if isinstance(node, FUNCTION):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > LONGEST_FUNCTION:
                yield f"line {node.lineno}: {node.name} has {lines} lines"


def undocumented(tree: ast.Module) -> Iterator[str]:
    """A module with code in it, and each public class, function and method in it, says what it is."""
    if tree.body and not ast.get_docstring(tree):
        yield "line 1: the module has no docstring"
    yield from _undocumented_in(tree)


def _undocumented_in(scope: ast.Module | ast.ClassDef) -> Iterator[str]:
    for node in scope.body:
        if isinstance(node, (*FUNCTION, ast.ClassDef)) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                yield f"line {node.lineno}: {node.name} has no docstring"
            if isinstance(node, ast.ClassDef):
                yield from _undocumented_in(node)


def openings(tree: ast.Module) -> Iterator[str]:
    """A docstring that opens with a free relative or a fragment instead of a verb or a noun."""
    for node in ast.walk(tree):
        if isinstance(node, (*FUNCTION, ast.ClassDef, ast.Module)):
            text = ast.get_docstring(node) or ""
            if OPENINGS.match(text):
                yield f"line {getattr(node, 'lineno', 1)}: {text.splitlines()[0]}"


def retired(tree: ast.Module) -> Iterator[str]:
    """An identifier that the code once used and gave up for a term of the field."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Name):
            names = [node.id]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, (*FUNCTION, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, ast.arg | ast.keyword):
            names = [node.arg or ""]
        elif isinstance(node, ast.alias):
            names = node.name.split(".")
        for name in names:
            if name.strip("_") in RETIRED:
                yield f"line {getattr(node, 'lineno', 1)}: {name}"


def unpickling(tree: ast.Module) -> Iterator[str]:
    """Nothing unpickles: a peer's bytes would run as code. Words in comments and docstrings do no harm."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute | ast.Name):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.keyword):
            names = [node.arg or ""]
        else:
            continue
        for name in names:
            root = name.partition(".")[0]
            unpickles = root in UNPICKLERS or (root == "torch" and name.endswith(".load")) or name == "allow_pickle"
            if unpickles:
                yield f"{name} is used"


def unguarded_loads(tree: ast.Module) -> Iterator[str]:
    """A pretrained model runs no foreign code, unpickles nothing, and has no say in how attention is computed."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        method, owner = node.func.attr, ast.unparse(node.func.value)
        if method not in {"from_pretrained", "from_config", "get_config_dict"}:
            continue
        told = {each.arg: ast.unparse(each.value) for each in node.keywords}
        wanted = {"trust_remote_code": "False"}
        if method == "from_config" or not owner.endswith(("Config", "Tokenizer")):
            wanted["attn_implementation"] = "ATTENTION"
        if method == "from_pretrained" and "attn_implementation" in wanted:
            wanted["use_safetensors"] = "True"
        if wanted.items() - told.items():
            yield f"line {node.lineno}: {owner}.{method} lacks {sorted(wanted.items() - told.items())}"


def loads(tree: ast.Module) -> Iterator[str]:
    """Reads a pretrained model, under whatever name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in {"from_pretrained", "get_config_dict"}:
            yield f"line {node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [alias.name for alias in node.names]
            if "pipeline" in names and isinstance(node, ast.ImportFrom) and node.module == "transformers":
                yield f"line {node.lineno}: a pipeline loads by itself"


def tensorboard_imports(tree: ast.Module) -> Iterator[str]:
    """What import-linter cannot see: torch brings tensorboard in by a module of its own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        if any(name.startswith("torch.utils.tensorboard") for name in names):
            yield f"line {node.lineno}: tensorboard is imported"


TOKENIZERS = {"tokenizer", "_tokenizer", "reader", "_reader"}
ENCODERS = {"encode", "decode", "batch_decode", "tokenize", "convert_tokens_to_ids", "encode_plus", "pad"}


def tokenizer_calls(tree: ast.Module) -> Iterator[str]:
    """A tokenizer that is called, or a chat template that is applied: what ``models.tokenization`` alone does."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        last = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
        owner = ast.unparse(called.value).rpartition(".")[2] if isinstance(called, ast.Attribute) else ""
        if (
            last == "apply_chat_template"
            or (last in TOKENIZERS and node.args)
            or (owner in TOKENIZERS and last in ENCODERS)
        ):
            yield f"line {node.lineno}: {ast.unparse(called)} is called"


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize(
    "rule",
    [long_functions, undocumented, openings, retired, unpickling, unguarded_loads],
    ids=lambda rule: rule.__name__,
)
@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_module(path: Path, rule: Rule) -> None:
    assert list(rule(parse(path))) == []


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_no_module_is_too_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_MODULE


def test_a_method_name_has_few_meanings() -> None:
    """A search for a name answers who is meant, unless many unrelated classes define it."""
    found = Counter[str]()
    for path in MODULES:
        for scope in ast.walk(parse(path)):
            if isinstance(scope, ast.ClassDef):
                found.update({node.name for node in scope.body if isinstance(node, FUNCTION)})
    public = {name: count for name, count in found.items() if not name.startswith("_") and name not in PROTOCOLS}
    assert {name: count for name, count in public.items() if count > MOST_DEFINITIONS} == {}


def test_no_module_is_a_drawer() -> None:
    assert MODULES
    drawers = [relative(path) for path in MODULES if DRAWERS & set(path.relative_to(PACKAGE).with_suffix("").parts)]
    assert drawers == []


def test_pretrained_models_have_one_way_in() -> None:
    way_in = PACKAGE / "models" / "pretrained.py"
    assert [relative(path) for path in MODULES if list(loads(parse(path)))] == [relative(way_in)]


def test_tensorboard_lives_in_runs() -> None:
    elsewhere = [path for path in MODULES if PACKAGE / "runs" not in path.parents]
    assert [relative(path) for path in elsewhere if list(tensorboard_imports(parse(path)))] == []


def test_one_module_calls_tokenizers() -> None:
    home = PACKAGE / "models" / "tokenization.py"
    assert list(tokenizer_calls(parse(home)))
    found = {relative(path): list(tokenizer_calls(parse(path))) for path in MODULES if path != home}
    assert {path: calls for path, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        (long_functions, "def long():\n" + "    x = 1\n" * LONGEST_FUNCTION),
        (long_functions, "class A:\n    async def long(self):\n" + "        x = 1\n" * LONGEST_FUNCTION),
        (undocumented, "x = 1"),
        (undocumented, '"""Doc."""\nclass A:\n    x = 1'),
        (undocumented, '"""Doc."""\ndef f():\n    pass'),
        (undocumented, '"""Doc."""\nclass A:\n    """Doc."""\n    def f(self):\n        pass'),
        (openings, '"""What it is."""'),
        (openings, '"""Doc."""\nclass A:\n    """Of a thing."""'),
        (retired, "class Stint:\n    pass"),
        (retired, "from gaisnet.tiers import stint"),
        (retired, "def f(outlet):\n    pass"),
        (retired, "x.let_in(y)"),
        (unpickling, "import pickle"),
        (unpickling, "import cloudpickle as c"),
        (unpickling, "from pickle import loads"),
        (unpickling, "torch.load(path)"),
        (unpickling, "torch.load(path, weights_only=True)"),
        (unpickling, "read = torch.load"),
        (unpickling, "torch.serialization.load(path)"),
        (unpickling, "from torch import load"),
        (unpickling, "numpy.load(path, allow_pickle=True)"),
        (unguarded_loads, "AutoTokenizer.from_pretrained(path)"),
        (unguarded_loads, "AutoConfig.from_pretrained(path, trust_remote_code=True)"),
        (unguarded_loads, "kind.from_pretrained(path, trust_remote_code=False, use_safetensors=True)"),
        (unguarded_loads, "kind.from_pretrained(path, trust_remote_code=False, attn_implementation=ATTENTION)"),
        (unguarded_loads, "AutoModel.from_config(config)"),
        (unguarded_loads, "AutoModel.from_config(config, trust_remote_code=False, attn_implementation=asked)"),
        (loads, "read = AutoModel.from_pretrained"),
        (loads, "from transformers import pipeline"),
        (tensorboard_imports, "import torch.utils.tensorboard"),
        (tensorboard_imports, "from torch.utils.tensorboard import SummaryWriter"),
        (tensorboard_imports, "from torch.utils import tensorboard"),
        (tokenizer_calls, "tokenizer.encode(text)"),
        (tokenizer_calls, "self._foundation.tokenizer(text, truncation=True)"),
        (tokenizer_calls, "x = tokenizer(text)['input_ids']"),
        (tokenizer_calls, "self._tokenizer.decode(ids)"),
        (tokenizer_calls, "anything.apply_chat_template(messages)"),
    ],
)
def test_a_rule_finds_what_breaks_it(rule: Rule, code: str) -> None:
    assert len(list(rule(ast.parse(code)))) >= 1


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        (long_functions, "def f():\n" + "    x = 1\n" * (LONGEST_FUNCTION - 1)),
        (undocumented, ""),
        (undocumented, '"""Doc."""\ndef _private():\n    pass'),
        (undocumented, '"""Doc."""\nclass A:\n    """Doc."""\n    def __init__(self):\n        pass'),
        (openings, '"""Whatever follows, whole words count."""'),
        (retired, '"""The stint of an outlet, in prose."""'),
        (unpickling, '"""No pickle, no torch.load(path)."""\n# pickle'),
        (unpickling, "from safetensors.torch import load\nload(data)\njson.load(file)\nfile.load()"),
        (unguarded_loads, "AutoTokenizer.from_pretrained(path, trust_remote_code=False)"),
        (loads, "'from_pretrained'\nfrom transformers import AutoModel"),
        (tensorboard_imports, "import torch\nfrom torch import Tensor, nn"),
        (tokenizer_calls, "codec.encode(message)\nlen(tokenizer)\ntext.encode()\nprompt_ids(tokenizer, text)"),
    ],
)
def test_a_rule_passes_what_keeps_it(rule: Rule, code: str) -> None:
    assert list(rule(ast.parse(code))) == []


@pytest.mark.parametrize("path", CONFIGS, ids=relative)
def test_a_configuration_that_ships_loads(path: Path) -> None:
    assert load_config(path).edges


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_a_target_that_a_document_names_exists(name: str) -> None:
    shown = re.findall(r"```.*?```|`[^`\n]+`", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", "\n".join(shown)))
    assert {"demo", "test"} <= named
    assert named <= make_targets()


def test_a_file_that_the_makefile_names_exists() -> None:
    named = set(re.findall(r"\bconfigs/[\w./-]+", (ROOT / "Makefile").read_text(encoding="utf-8")))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
