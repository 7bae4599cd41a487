"""The map of the package, read off the source with ``ast``: what lies flat, what may be imported where, and a clean import.

The arithmetic lies flat in ``minisft/``; what serves it has a folder. A new module goes into a folder, and a new folder is
entered in ``LEVELS``. A folder may import from its own level or from those below, and nothing may import in a circle, not even
inside a function.
"""

import ast
import functools
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "minisft"

# The files that lie flat, in the order in which they are best read.
FLAT = [
    "config",
    "model",
    "attention",
    "elementwise",
    "matmul",
    "generation",
    "lora",
    "adapter",
    "lora_fused",
    "dora",
    "pissa",
    "trained_rows",
    "new_rows",
    "surgery",
    "nf4",
    "nf4_linear",
    "batching",
    "loss",
    "preference",
    "optim",
    "adam_8bit",
    "schedule",
    "step",
    "merge_weights",
    "effect",
]
# And those that are no arithmetic: how Python and the shell get at it all.
FRONT = ["__init__", "api", "__main__"]
# A folder is one place, and so is a flat file.
LEVELS = (
    "adam_8bit common optim preference schedule",
    "config data nf4",
    "kernels quality",
    "effect elementwise matmul",
    "attention loss nf4_linear trained_rows",
    "adapter batching dora lora lora_fused model new_rows pissa",
    "generation native step surgery",
    "formats",
    "evaluation merge_weights parallel selection",
    "judging merging serving training",
    "quickstart",
    "api",
    "__init__",
    "cli",
    "__main__",
)
LEVEL_OF = {place: level for level, places in enumerate(LEVELS) for place in places.split()}

CORE = {"torch", "numpy", "safetensors", "tokenizers", "jinja2"}
EXTRAS = {
    "transformers",
    "sacrebleu",
    "rouge_score",
    "starlette",
    "uvicorn",
    "lm_eval",
    "xllamacpp",
    "wandb",
    "mlflow",
    "trackio",
}
LATE = {"triton", "gguf", "matplotlib", "tqdm", "huggingface_hub", "pyarrow"} | EXTRAS  # only where they are needed
UNSAFE = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
NETWORK = {"socket", "ssl", "http", "urllib", "urllib3", "requests", "httpx", "aiohttp", "ftplib", "smtplib", "xmlrpc"}


def name_of(path: Path) -> str:
    """``minisft.formats.hf`` for minisft/formats/hf.py, ``minisft`` for its __init__."""
    return ".".join(("minisft", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {name_of(path): ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in sorted(PACKAGE.rglob("*.py"))}


def place_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def level_of(module: str) -> int:
    place = place_of(module)
    assert place in LEVEL_OF, f"enter {place} in LEVELS"
    return LEVEL_OF[place]


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Full names that import statements among ``nodes`` ask for; a name from minisft is resolved to its module."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports in full"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in MODULES else str(node.module)


def at_import_time(tree: ast.Module) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: not function bodies, not what only a type checker reads."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            waiting += node.orelse
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)


def top(names: Iterator[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@functools.cache
def kernel_files() -> frozenset[str]:
    """Modules of ``minisft.kernels`` that need Triton at import, because their functions are decorated by it."""
    found = {m for m, tree in MODULES.items() if "triton" in top(imported(at_import_time(tree)))}
    while more := {m for m, tree in MODULES.items() if set(imported(at_import_time(tree))) & found} - found:
        found |= more
    return frozenset(found)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_level(module):
    level_of(module)


def test_every_place_in_the_levels_exists():
    assert {place_of(module) for module in MODULES} == set(LEVEL_OF)
    assert sum(len(places.split()) for places in LEVELS) == len(LEVEL_OF)  # on one level only


def test_only_the_arithmetic_lies_flat():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*FRONT, *FLAT}
    assert set(FLAT) < set(LEVEL_OF)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    level = level_of(module)
    for name in imported(ast.walk(MODULES[module])):
        if name.split(".")[0] == "minisft":
            assert name in MODULES, f"{module} imports {name}, which does not exist"
            assert level_of(name) <= level, f"{module} (level {level}) imports {name} (level {level_of(name)})"


def test_nothing_imports_in_a_circle():
    graph = {m: {name for name in imported(ast.walk(tree)) if name in MODULES} for m, tree in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_places_do_not_import_each_other_in_a_circle():
    """Not even through different files of a package."""
    graph: dict[str, set[str]] = {}
    for module, tree in MODULES.items():
        places = {place_of(name) for name in imported(ast.walk(tree)) if name in MODULES}
        graph.setdefault(place_of(module), set()).update(places - {place_of(module)})
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("module", MODULES)
def test_third_party_imports(module):
    """The core dependencies anywhere, the others late, and nothing else at all: no PEFT, no bitsandbytes."""
    tree = MODULES[module]
    known = set(sys.stdlib_module_names) | {"minisft"} | CORE
    everywhere, at_once = top(imported(ast.walk(tree))), top(imported(at_import_time(tree)))
    assert everywhere <= known | LATE, f"{module} imports {everywhere - known - LATE}"
    late = at_once - known
    if module in kernel_files():
        late -= {"triton"}
    assert not late, f"{module} imports {late} outside a function"
    assert not everywhere & (UNSAFE | NETWORK), f"{module} imports {everywhere & (UNSAFE | NETWORK)}"


def test_only_kernels_need_triton():
    assert {place_of(module) for module in kernel_files()} <= {"kernels"}
    assert "minisft.kernels" not in kernel_files()


def forbidden_call(node: ast.Call) -> str | None:
    """What is wrong with a call: it runs text as code, unpickles, or imports by a name made at run time."""
    if isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec", "compile", "__import__"}:
        return node.func.id
    if any(keyword.arg == "allow_pickle" for keyword in node.keywords):
        return "allow_pickle"
    text = ast.unparse(node.func)
    return (
        text
        if text
        in {"torch.load", "torch.save", "torch.hub.load", "np.load", "numpy.load", "importlib.import_module", "os.system"}
        else None
    )


@pytest.mark.parametrize("module", MODULES)
def test_no_text_becomes_code(module):
    calls = [(node.lineno, forbidden_call(node)) for node in ast.walk(MODULES[module]) if isinstance(node, ast.Call)]
    assert not [call for call in calls if call[1]]
    shell = [
        k.lineno for node in ast.walk(MODULES[module]) if isinstance(node, ast.Call) for k in node.keywords if k.arg == "shell"
    ]
    assert not shell, f"subprocess with a shell in line {shell}"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import a.b", {"a"}),
        ("def f():\n  from c import d", set()),
        ("class A:\n  import e", {"e"}),
        ("try:\n  import g\nexcept ImportError:\n  pass", {"g"}),
        ("if TYPE_CHECKING:\n  import h\nelse:\n  import i", {"i"}),
    ],
)
def test_the_reader_of_imports_itself(source, found):
    assert top(imported(at_import_time(ast.parse(source)))) == found


def test_the_reader_of_calls_itself():
    bad = ["eval('1')", "torch.load(f)", "np.load(f, allow_pickle=True)", "__import__(x)", "exec(s)"]
    good = ["model.eval()", "re.compile(p)", "safe_json.loads(t)", "load(f)"]
    assert all(forbidden_call(ast.parse(text, mode="eval").body) for text in bad)
    assert not any(forbidden_call(ast.parse(text, mode="eval").body) for text in good)


CLEAN_IMPORT = """
import importlib, importlib.abc, logging, os, signal, socket, sys
blocked, modules = set(sys.argv[1].split(",")), sys.argv[2].split(",")

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is not installed", name=name)

sys.meta_path.insert(0, Absent())

def refuse(*args, **kwargs):
    raise SystemExit(f"an import reached for the network: {args}")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse

import torch

def process():
    return {
        "environment": dict(os.environ),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "precision": (torch.get_float32_matmul_precision(), torch.get_default_dtype(), torch.is_grad_enabled()),
        "random": torch.get_rng_state().tolist(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "logging": (logging.root.level, list(logging.root.handlers)),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
        "folder": os.getcwd(),
        "cuda": torch.cuda.is_initialized(),
    }

before = process()
for name in modules:
    importlib.import_module(name)
    after = process()
    changed = [key for key in before if before[key] != after[key]]
    assert not changed, f"importing {name} changed {changed}"
print("clean")
"""


@pytest.mark.slow
def test_every_module_imports_with_the_core_dependencies_alone():
    """In a process without Triton, plotting, GGUF, the hub, any oracle or a network; and no import changes the process."""
    absent = (
        LATE
        | UNSAFE - {"pickle", "_pickle", "marshal"}
        | {"transformers", "peft", "bitsandbytes", "accelerate", "hypothesis", "pytest"}
    )
    modules = ["minisft", *sorted(set(MODULES) - kernel_files() - {"minisft"})]
    command = [sys.executable, "-c", CLEAN_IMPORT, ",".join(absent), ",".join(modules)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "clean\n"
    assert result.stderr == ""
