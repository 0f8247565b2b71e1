"""YAML files checked against pydantic models: unknown keys and wrong types become one clear message."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from shards.errors import UserError, unknown_name

Model = TypeVar("Model", bound=BaseModel)

_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


class Settings(BaseModel):
    """Base of all YAML sections: unknown keys are errors, values are not changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers (3e-4 is a float, 2_000 an int) and no duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key '{key}'", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*)(?:\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text; `where` names its origin in error messages."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        kind = "JSON" if where.endswith(".json") else "YAML"
        raise UserError(f"{where}: not valid {kind}: {error}") from None


def load_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load a YAML file whose top level is a mapping."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        names = [other.name for other in path.parent.glob("*")]
        nearest = difflib.get_close_matches(path.name, names, n=1, cutoff=0.8)
        hint = f"; did you mean {path.parent / nearest[0]}?" if nearest else ""
        raise UserError(f"{path}: no such file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping (key: value) at the top level, found {type(data).__name__}")
    return data


def expand_variables(text: str, where: str) -> str:
    """Replace `${NAME}` and `${NAME:-default}` by environment variables.

    Raises:
        UserError: a variable is not set and has no default.
    """

    def value(match: re.Match[str]) -> str:
        name, default = match.groups()
        found = os.environ.get(name) or default
        if found is None:
            raise UserError(
                f"{where}: the environment variable {name} is not set; set it or write ${{{name}:-default}}"
            )
        return found

    return _VARIABLE.sub(value, text)


def validate(model: type[Model], data: Any, where: str) -> Model:
    """Check `data` against `model`; every problem found goes into one message.

    Raises:
        UserError: with the file (`where`), the dotted field and, for an unknown key, the nearest name.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = [_explain(model, problem) for problem in error.errors(include_url=False)]
        raise UserError("\n  ".join([f"{where}: {len(problems)} problem(s)", *problems])) from None


def _explain(model: type[BaseModel], problem: Any) -> str:
    *parents, name = problem["loc"] or ("",)
    field = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{field}: {unknown_name('key', str(name), _fields_at(model, parents))}"
    if problem["type"] == "missing":
        return f"{field}: required, but not given"
    message = str(problem["msg"]).removeprefix("Value error, ")
    given = problem.get("input")
    return (
        (f"{field}: " if field else "")
        + message
        + (f" (given: {given!r})" if isinstance(given, str | int | float | bool) else "")
    )


def _fields_at(model: type[BaseModel], location: list[str | int]) -> list[str]:
    """Names of the fields of the nested model that a pydantic error location points into."""
    for part in location:
        if isinstance(part, int):
            continue
        field = {info.alias or name: info for name, info in model.model_fields.items()}.get(part)
        inner = _model_in(field.annotation) if field else None
        if inner is None:
            return []
        model = inner
    return [info.alias or name for name, info in model.model_fields.items()]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model inside an annotation such as `list[Source] | None`, if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((inner for part in get_args(annotation) if (inner := _model_in(part))), None)
