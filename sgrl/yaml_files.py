"""YAML as experiment files use it.

PyYAML follows YAML 1.1. ruamel.yaml knows 1.2 and refuses keys given twice, but neither refuses
`on` nor quotes for readers of 1.1, so it would replace half of what is here at the price of a
dependency.
"""

import re
from collections.abc import Mapping
from typing import Any

import yaml


class YAMLFileError(ValueError):
    """A text is not valid YAML; one line.

    Attributes:
        line: where, from 1; None where that is not known.
    """

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


class _Loader(yaml.SafeLoader):
    """Loader with YAML 1.2's scalars: 1e-3 is a number, 017 is 17, 1:30 and 2024-01-01 are text.

    YAML 1.1, PyYAML's own, has them as text, 15, 90 and a date. A key given twice, of which PyYAML
    would silently keep the last, is refused.
    """

    yaml_implicit_resolvers: dict[str, list[Any]] = {}

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"key '{key.value}' is given twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
                if key.tag == _UNCERTAIN:
                    key.tag = "tag:yaml.org,2002:str"
        return node

    def construct_whole_number(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node).replace("_", "")
        digits = text.lstrip("+-")
        base = {"0o": 8, "0x": 16}.get(digits[:2], 10)
        return int(text, base)

    def construct_uncertain(self, node: yaml.ScalarNode) -> str:
        value = self.construct_scalar(node)
        problem = f"{value} is true or false to some and a word to others: write true or false, or"
        raise yaml.constructor.ConstructorError(
            None, None, f"{problem} '{value}' in quotes for the word", node.start_mark
        )


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes whatever YAML 1.1 or 1.2 would read as other than text.

    Every value is written out where it stands.
    """

    def ignore_aliases(self, data: Any) -> bool:
        return True


# Words that YAML 1.1 reads as true or false, and 1.2 as text.
_UNCERTAIN = "tag:uncertain"
for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    (_UNCERTAIN, r"(?i:yes|no|on|off)", list("yYnNoO")),
    (
        "tag:yaml.org,2002:int",
        r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+",
        list("-+0123456789"),
    ),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?([0-9][0-9_]*\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+|[-+]?([0-9][0-9_]*\.[0-9]*|\.[0-9]+)"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("tag:yaml.org,2002:merge", r"<<", ["<"]),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole_number)
_Loader.add_constructor(_UNCERTAIN, _Loader.construct_uncertain)


def dump_yaml(content: Mapping[str, Any]) -> str:
    """Return YAML that `parse_yaml` reads back as the same content, without anchors."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False)


def parse_yaml(text: str) -> Any:
    """Return the content of a YAML text; every alias becomes a copy of its own.

    Raises:
        YAMLFileError: the text is not YAML, gives a key twice, or an alias contains itself.
    """
    try:
        # _Loader is a SafeLoader.
        return _unshared(yaml.load(text, _Loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = None if mark is None else mark.line + 1
        raise YAMLFileError(f"{error.problem or error.context}", line) from None
    except (yaml.YAMLError, ValueError) as error:
        raise YAMLFileError(f"not YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise YAMLFileError("a YAML alias contains itself") from None


def _unshared(value: Any) -> Any:
    """Copy aliases: to override a value is not to write through to others."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unshared(item) for item in value]
    return value
