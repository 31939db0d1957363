"""The names that the installed engines support: architectures, and vLLM's parsers and quantization methods.

Parsed from their source, because importing vLLM takes many seconds and the service never does. If a table is
not found (another release), the result is None: nothing is rejected on a guess.
"""

import ast
import importlib.util
from collections.abc import Iterable
from functools import cache
from pathlib import Path

_NAMES = frozenset[str]


@cache
def architectures() -> _NAMES | None:
    """Architectures that vLLM supports: its own, and those that it runs through transformers."""
    own = _table("vllm", "model_executor/models/registry.py", "_TEXT_GENERATION_MODELS")
    if own is None:
        return None
    more = (
        _table("vllm", "model_executor/models/registry.py", "_MULTIMODAL_MODELS"),
        _table("vllm", "model_executor/models/registry.py", "_TRANSFORMERS_SUPPORTED_MODELS"),
        _table("vllm", "model_executor/models/registry.py", "_TRANSFORMERS_BACKEND_MODELS"),
        transformers_architectures(),
    )
    return own.union(*(table for table in more if table is not None))


@cache
def transformers_architectures() -> _NAMES | None:
    """Architectures that transformers supports for text generation."""
    own = _table("transformers", "models/auto/modeling_auto.py", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
    seeing = _table(
        "transformers", "models/auto/modeling_auto.py", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"
    )
    return own if own is None or seeing is None else own | seeing


def modules_of(names: Iterable[str]) -> list[str]:
    """The modules of vLLM that implement these architectures."""
    known = _modules()
    return sorted({f"vllm.model_executor.models.{known[name]}" for name in names if name in known})


@cache
def _modules() -> dict[str, str]:
    """Architecture -> module of vLLM's own text models: `{"LlamaForCausalLM": ("llama", ...)}`."""
    value = _value("vllm", "model_executor/models/registry.py", "_TEXT_GENERATION_MODELS")
    if not isinstance(value, ast.Dict):
        return {}
    found = {}
    for key, entry in zip(value.keys, value.values, strict=True):
        match key, entry:
            case ast.Constant(value=str(name)), ast.Tuple(elts=[ast.Constant(value=str(module)), *_]):
                found[name] = module
    return found


@cache
def tool_parsers() -> _NAMES | None:
    return _table("vllm", "tool_parsers/__init__.py", "_TOOL_PARSERS_TO_REGISTER")


@cache
def reasoning_parsers() -> _NAMES | None:
    return _table("vllm", "reasoning/__init__.py", "_REASONING_PARSERS_TO_REGISTER")


@cache
def quantizations() -> _NAMES | None:
    return _table("vllm", "model_executor/layers/quantization/__init__.py", "QuantizationMethods")


def _table(package: str, file: str, variable: str) -> _NAMES | None:
    """The names in the module-level table `variable` of one source file."""
    value = _value(package, file, variable)
    return None if value is None else frozenset(_names(value)) or None


def _value(package: str, file: str, variable: str) -> ast.expr | None:
    """The value of the module-level `variable` of one source file."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    try:
        lines = (Path(spec.origin).parent / file).read_text().splitlines()
        statement = ast.parse(_statement(lines, variable)).body
    except (OSError, ValueError, SyntaxError):
        return None
    return statement[0].value if statement and isinstance(statement[0], ast.Assign) else None


def _statement(lines: list[str], variable: str) -> str:
    """The source of the assignment to `variable`, up to its closing bracket.

    These files have thousands of lines: parsing them whole would block the service for 50 ms.
    """
    begin = next((number for number, line in enumerate(lines) if line.startswith(f"{variable} =")), None)
    if begin is None:
        return ""
    if lines[begin].rstrip()[-1] not in "([{":
        return lines[begin]
    ends = (number for number in range(begin + 1, len(lines)) if lines[number].startswith((")", "]", "}")))
    return "\n".join(lines[begin : next(ends, begin) + 1])


def _names(value: ast.expr) -> list[str]:
    match value:
        case ast.Dict(keys=keys):  # {"LlamaForCausalLM": ("llama", "LlamaForCausalLM")}
            return [key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
        case ast.Subscript(slice=ast.Tuple(elts=elements)):  # Literal["awq", "fp8"]
            return [str(element.value) for element in elements if isinstance(element, ast.Constant)]
        case ast.Call(args=[ast.List(elts=pairs)]):  # OrderedDict([("llama", "LlamaForCausalLM")])
            return [_second(pair) for pair in pairs if _second(pair)]
    return []


def _second(pair: ast.expr) -> str:
    match pair:
        case ast.Tuple(elts=[_, ast.Constant(value=str(name))]):
            return name
    return ""
