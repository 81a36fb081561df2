"""Everything that can be set in an experiment, and what can be named there.

Type, default and one line each, from the dataclasses, signatures and docstrings that declare it.

    for section, settings in all_settings().items():
        for setting in settings:
            setting.name, setting.type, setting.default, setting.line
"""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from sgrl.annotations import in_words
from sgrl.errors import UserError, one_line
from sgrl.markdown import markdown_table
from sgrl.names import did_you_mean
from sgrl.results.columns import METRICS, columns_page
from sgrl.results.plan import Checkpointing, Evaluating, Stop
from sgrl.tuning.experiment.file import (
    CheckpointKeys,
    EvaluateKeys,
    ExperimentFile,
    Method,
    SearchKeys,
    StopKeys,
)
from sgrl.tuning.experiment.sections import section_arguments
from sgrl.tuning.experiment.shipped import about, shipped_experiments
from sgrl.user_code import module_of

#: What can be listed.
KINDS = ("envs", "policies", "rules", "settings", "columns", "experiments")
#: Sections of `config` whose settings are listed.
SECTIONS = (
    "environment",
    "env_runners",
    "training",
    "learners",
    "evaluation",
    "fault_tolerance",
    "resources",
)


class ListError(UserError):
    """There is nothing of that name; the message is one line with the nearest one."""


def check_kind(kind: str) -> None:
    """Raise ListError unless it can be listed."""
    if kind not in KINDS:
        raise ListError(f"no such list: {kind!r}; {did_you_mean(kind, KINDS)}")


class Setting(NamedTuple):
    """One setting.

    Attributes:
        name: its key.
        type: the values that it takes, in words.
        default: as YAML writes it.
        line: what it does.
    """

    name: str
    type: str
    default: str
    line: str


def names_of(kind: str) -> dict[str, str]:
    """Return what can be named in an experiment.

    Args:
        kind: envs, policies or rules; columns, of metrics.csv, are named in the results,
            experiments where `sgrl sweep` takes a file.

    Returns:
        By its name, what it is.
    """
    if kind == "columns":
        return {name: column.line for name, column in METRICS.items()}
    if kind == "experiments":
        return {name: about(path) for name, path in shipped_experiments().items()}
    things = _things(kind)
    return {name: first_sentence(inspect.getdoc(thing) or "") for name, thing in things.items()}


def _things(kind: str) -> Mapping[str, Any]:
    from sgrl.envs.registry import ENVIRONMENTS
    from sgrl.nn.mixing_rules import MIXING_RULES
    from sgrl.nn.registry import POLICIES

    if kind == "envs":
        return {name: entry.vector for name, entry in ENVIRONMENTS.items()}
    return POLICIES if kind == "policies" else MIXING_RULES


def all_settings() -> dict[str, list[Setting]]:
    """Return all settings, by what the experiment file says before their names."""
    from sgrl.envs import by_id
    from sgrl.envs.registry import ENVIRONMENTS
    from sgrl.nn.registry import POLICIES

    groups = {"experiment": list(_of_keys(ExperimentFile, ExperimentFile))}
    groups["stop"] = list(_of_keys(StopKeys, Stop))
    groups["checkpoint"] = list(_of_keys(CheckpointKeys, Checkpointing))
    groups["evaluate"] = list(_of_keys(EvaluateKeys, Evaluating))
    groups["search"] = list(_of_keys(SearchKeys, SearchKeys))
    groups["methods.NAME"] = list(_of_keys(Method, Method))
    groups["methods.NAME.model"] = [
        Setting("policy", "text", "", "The network; the sections below have the settings of each."),
        Setting("dtype", "text", "float32", "float32 or float64: of parameters and gradients."),
        Setting(
            "max_seq_len",
            "a whole number",
            "",
            "Under PPO, APPO and IMPALA, steps of a training sequence; by default an episode's.",
        ),
    ]
    for section in SECTIONS:
        groups[f"config.{section}"] = list(_of_section(section))
    for name, policy in POLICIES.items():
        groups[f"policy {name}"] = list(_of_policy(policy))
    for name, entry in ENVIRONMENTS.items():
        lines = described(*entry.vector.__mro__, entry.single)
        defaults = {**entry.defaults, "vectorized": True}
        groups[f"env {name}"] = list(_of_defaults(defaults, lines))
    lines = described(by_id.make)
    groups["env of gymnasium"] = list(_of_defaults({**by_id.DEFAULTS, "vectorized": True}, lines))
    return groups


def docstring_of(kind: str, name: str) -> str:
    """Return what an environment, a policy or a rule is, in full.

    Args:
        kind: envs, policies, rules or columns.
        name: one of `names_of`, or a policy or rule of the user's own, as in module:Class.
    """
    if kind == "columns":
        return METRICS[name].line
    things = _things(kind)
    return inspect.getdoc(things[name] if name in things else _own(kind, name)) or ""


def _own(kind: str, name: str) -> Any:
    """The user's own policy or rule."""
    from sgrl.nn.mixing_rules import mixing_rule
    from sgrl.nn.registry import policy_class

    try:
        return policy_class(name) if kind == "policies" else mixing_rule(name)
    except ValueError as error:
        raise ListError(one_line(error)) from None


def page_table(name: str) -> str:
    """Return what a page holds between two marks.

    Args:
        name: of the marks; settings (docs/settings.md) or columns (docs/metrics.md).

    Raises:
        ListError: there is no such table.
    """
    pages = {"settings": settings_page, "columns": columns_page}
    if name not in pages:
        raise ListError(f"no such table: {name!r}; {did_you_mean(name, pages)}")
    return pages[name]()


def settings_page() -> str:
    """Return all settings and rules in Markdown, as docs/settings.md holds them."""
    parts = []
    for group, settings in all_settings().items():
        rows = [(f"`{s.name}`", s.type, s.default and f"`{s.default}`", s.line) for s in settings]
        table = markdown_table(("key", "values", "default", "what it is"), rows)
        parts.append(f"## {group}\n\n{table}")
    rules = [(f"`{name}`", line) for name, line in names_of("rules").items()]
    parts.append(f"## Mixing rules\n\n{markdown_table(('mixing_rule', 'what it is'), rules)}")
    return "\n".join(parts)


def settings_named(kind: str, name: str | None) -> dict[str, list[Setting]]:
    """Return the settings of one environment or policy, those of one name or group, or all.

    Args:
        kind: one of `KINDS`.
        name: of what is asked for; None, among settings, for all.

    Returns:
        As `all_settings`.

    Raises:
        ListError: there is no such thing.
    """
    if name is not None and module_of(name) and kind in ("policies", "rules"):
        thing = _own(kind, name)
        return {f"policy {name}": list(_of_policy(thing))} if kind == "policies" else {}
    groups = all_settings()
    if name is None:
        return groups
    keys = [setting.name for settings in groups.values() for setting in settings]
    names = [*groups, *keys] if kind == "settings" else list(names_of(kind))
    if name not in names:
        raise ListError(f"no such name among the {kind}: {name!r}; {did_you_mean(name, names)}")
    if kind in ("rules", "columns", "experiments"):
        return {}
    if kind != "settings":
        group = {"envs": "env", "policies": "policy"}[kind]
        return {f"{group} {name}": groups[f"{group} {name}"]}
    if name in groups:
        return {name: groups[name]}
    found = {group: [s for s in of_group if s.name == name] for group, of_group in groups.items()}
    return {group: settings for group, settings in found.items() if settings}


def described(*things: Any) -> dict[str, str]:
    """Return what the docstrings say of attributes and arguments, in one line each.

    Args:
        things: classes and functions with docstrings in Google's style; earlier ones win.
    """
    found: dict[str, str] = {}
    for thing in things:
        text = inspect.cleandoc(getattr(thing, "__doc__", None) or "")
        for block in re.findall(r"^(?:Args|Attributes):\n((?:[ ]+.*\n?|\n)*)", text, re.MULTILINE):
            block = inspect.cleandoc("\n" + block)
            for names, line in re.findall(
                r"^([\w, ]+)(?: \([^)]*\))?: ((?:.*\n?)(?:[ ]+.*\n?|\n(?=[ ]))*)",
                block,
                re.MULTILINE,
            ):
                for name in names.split(", "):
                    sentence = first_sentence(line)
                    found.setdefault(name, sentence[:1].upper() + sentence[1:])
    return found


def first_sentence(text: str) -> str:
    """Return the first sentence of a text, in one line."""
    line = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[^.]\.)\s(?=[A-Z`])", line)[0]


def type_words(kind: Any) -> str:
    """Return the values of a type in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return type_words(arguments[0])
    if origin in (typing.Union, types.UnionType):
        words = dict.fromkeys(type_words(a) for a in arguments if a is not types.NoneType)
        if "a number" in words:
            words.pop("a whole number", None)
        # What is left of RLlib's own classes.
        known = [word for word in words if "cannot hold" not in word] or list(words)
        return " or ".join([*known, *(["null"] if types.NoneType in arguments else [])])
    return in_words(dict if hasattr(kind, "model_fields") else kind)


def _of_keys(model: Any, documented: Any) -> Iterator[Setting]:
    """The keys of a part of the file."""
    lines = described(documented)
    for name, field in model.model_fields.items():
        default = "" if field.is_required() else _in_yaml(field.default)
        yield Setting(name, type_words(field.annotation), default, lines.get(name, ""))


def _of_policy(policy: Any) -> Iterator[Setting]:
    from sgrl.nn.registry import setting_defaults

    kinds, lines = typing.get_type_hints(policy.Settings), described(*policy.Settings.__mro__)
    for name, default in setting_defaults(policy.Settings).items():
        written = "" if default is dataclasses.MISSING else _in_yaml(default)
        yield Setting(name, type_words(kinds[name]), written, lines.get(name, ""))


def _of_section(section: str) -> Iterator[Setting]:
    """The settings that `Reinforce` reads of a section of `config`."""
    from sgrl.rllib.algorithm import ReinforceConfig
    from sgrl.rllib.settings import REINFORCE_READS, setting_names

    defaults, arguments = ReinforceConfig(), section_arguments(ReinforceConfig, section)
    bases = [vars(base)[section] for base in ReinforceConfig.__mro__ if section in vars(base)]
    lines = described(*bases)
    for attribute, (of_section, name) in setting_names(ReinforceConfig).items():
        known = hasattr(defaults, attribute) and attribute in REINFORCE_READS
        if of_section == section and known and name in arguments and name in lines:
            kind, default = type_words(arguments[name]), getattr(defaults, attribute)
            if "cannot hold" not in kind:
                yield Setting(name, kind, _in_yaml(default), lines[name])


def _of_defaults(defaults: Mapping[str, Any], lines: Mapping[str, str]) -> Iterator[Setting]:
    for name, default in defaults.items():
        lines = {"vectorized": "Whether all are stepped at once, not one by one.", **lines}
        kind = "a value or null" if default is None else type_words(type(default))
        yield Setting(name, kind, _in_yaml(default), lines.get(name, ""))


def _in_yaml(value: Any) -> str:
    """A default as it is written in YAML."""
    if hasattr(value, "model_dump"):
        value = value.model_dump()
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_in_yaml(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_in_yaml, value))}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
