"""The shape of the code base: which way imports point, what a format file may hold, and that every file says what it knows."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "moeglot"
FILES = sorted(SOURCE.rglob("*.py"))
LAYERS = (
    {"errors", "version", "dtypes", "rounding", "survival", "scratch", "share", "sizes"},
    {"encoding", "kernels"},
    {"encoded"},
    {"encodings"},
    {"floats", "folding"},
    {"axes"},
    {"layout"},
    {"straddled", "family", "codings"},
    {"format"},
    {"formats", "conventions"},
    {"factors", "experts"},
    {"files"},
    {"checkpoints"},
    {"checks", "adapters"},
    {"planning"},
    {"verification"},
    {"conversion"},
    {"nn", "reports"},
    {"integrations", "inspection"},
    {"live"},
    {"demo"},
    {"cli"},
    {"__main__"},
)
"""An import points to the same row or to one above it."""


def module(path: Path) -> str:
    """A file's name as an import says it, without `moeglot.`."""
    return ".".join(part.removesuffix(".py") for part in path.relative_to(SOURCE).parts if part != "__init__.py")


MODULES = {module(path) for path in FILES}


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module of ours, whether only on demand inside a function, or for types alone) for every import of a file."""
    tree = ast.parse(path.read_text())
    later = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")]
    inner = {id(node) for outer in later for node in ast.walk(outer) if node is not outer}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "moeglot":
            within = node.module.split(".")[1:]
            named = {".".join((*within, one.name)) for one in node.names} & MODULES
            found += [(name, id(node) in inner) for name in named or ({".".join(within)} - {""})]
    return found


def test_imports_point_one_way():
    rank = {name: n for n, row in enumerate(LAYERS) for name in row}
    wrong = []
    for path in FILES:
        mine = module(path).split(".")[0]
        for name, on_demand in imports(path) if mine else ():
            allowed = on_demand and name.split(".")[0] == "integrations"
            if rank[name.split(".")[0]] > rank[mine] and not allowed:
                wrong.append(f"{path.relative_to(SOURCE)} imports {name}")
    assert not wrong
    assert {name.split(".")[0] for name in MODULES} - {""} == rank.keys()


def test_no_file_needs_itself():
    """Within a row and a package, too: what a file imports when it is imported never leads back to it."""
    needs = {module(path): {name for name, on_demand in imports(path) if not on_demand} for path in FILES}
    TopologicalSorter(needs).prepare()


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "formats" and p.name not in ("__init__.py", "lines.py")], ids=lambda p: p.stem)
def test_a_format_file_is_data(path):
    tree = ast.parse(path.read_text())
    logic = [type(node).__name__ for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.If, ast.While, ast.ClassDef, ast.Lambda, ast.Try))]
    assert not logic
    assert {name.split(".")[0] for name, _ in imports(path)} <= {"encodings", "layout", "family", "format", "formats"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_file_says_what_it_knows_and_stays_small(path):
    text = path.read_text()
    first = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    assert len(first) > 20
    assert text.count("\n") <= 300, "which idea is hiding in it?"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_axes_are_moved_in_one_place(path):
    """`.mT` on the way into a matrix product is arithmetic; `.transpose`, `.permute` and `.t()` of a weight are not."""
    moved = [
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("transpose", "permute", "t", "T", "swapaxes")
    ]
    assert not moved or path.name == "layout.py"


FACTORIES = {
    *(
        "empty",
        "zeros",
        "ones",
        "full",
        "arange",
        "range",
        "linspace",
        "logspace",
        "eye",
        "rand",
        "randn",
        "randint",
        "randperm",
        "normal",
        "tensor",
        "as_tensor",
    ),
    *("asarray", "scalar_tensor", "empty_strided", "empty_permuted", "tril_indices", "triu_indices"),
}
"""Functions of torch that make a tensor of its default dtype, or on its default device, where neither is said."""
OF_THE_PROCESS = {"get_default_dtype", "set_default_dtype", "get_default_device", "set_default_device", "set_default_tensor_type", "Tensor", "FloatTensor"}


def by_default(tree: ast.Module) -> list[str]:
    """What takes torch's default dtype or default device, which are the program's, and may be another's in every thread."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    named = [(call, call.func) for call in calls if isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "torch"]
    found = [call for call, func in named if func.attr in FACTORIES and not {"dtype", "device"} <= {keyword.arg for keyword in call.keywords}]
    found += [call for call, func in named if func.attr in OF_THE_PROCESS or (func.attr == "finfo" and not call.args)]
    bare = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "torch" and FACTORIES & {one.name for one in node.names}]
    return [ast.unparse(node) for node in (*found, *bare)]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_tensor_that_is_made_says_its_dtype_and_device(path):
    assert by_default(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.empty(3)",
        "torch.zeros(3, dtype=torch.float32)",
        "torch.tensor([0.5], device='cpu')",
        "x = [torch.arange(0, 3, step) for step in y]",
        "torch.set_default_dtype(dtype)",
        "torch.Tensor([1])",
        "torch.finfo().eps",
        "from torch import zeros",
    ],
)
def test_what_is_left_to_a_default_is_seen(line):
    assert len(by_default(ast.parse(line))) == 1
    assert not by_default(ast.parse("torch.zeros(3, dtype=d, device=x.device); torch.zeros_like(x); x.new_zeros(3); torch.finfo(d)"))


def test_nothing_foreign_is_imported_with_us():
    code = "import sys, moeglot, moeglot.cli.main; print([m for m in ('torch', 'transformers', 'numpy', 'huggingface_hub', 'einops') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
