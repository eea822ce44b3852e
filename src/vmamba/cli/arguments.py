"""Command lines and YAML files into typed dataclasses, with errors that name the nearest thing that exists."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

import yaml
from jsonargparse import ArgumentParser

Options = TypeVar("Options")


class UsageError(ValueError):
    """A command line that cannot be understood; the message says what would be right."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the member of `known` closest to `name`, comparing whole names and the last part of dotted ones."""
    known = list(known)
    candidates = {option: option for option in known} | {
        option.rpartition(".")[2]: option for option in known if "." in option
    }
    for cutoff in (0.75, 0.5):
        for word in (name, name.rpartition(".")[2]):
            matches = difflib.get_close_matches(word, candidates, n=1, cutoff=cutoff)
            if matches:
                return candidates[matches[0]]
    return None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return '; did you mean X?' for an unknown name, or nothing when no known name is close."""
    match = nearest(name, known)
    return f"; did you mean {match}?" if match else ""


def parse(
    command: str,
    options: type[Options],
    argv: Sequence[str],
    positionals: Sequence[tuple[str, str]] = (),
) -> Options:
    """Read the flags and YAML files of one subcommand.

    Args:
        command: Name of the subcommand.
        options: Dataclass whose fields are the flags.
        argv: Words after the name of the subcommand.
        positionals: Fields given without a flag: pairs of the field and its number of words ('*' or '?').

    Returns:
        An instance of `options`.

    Raises:
        UsageError: An unknown flag or key, or a value of the wrong type.
        ValueError: A value the dataclass itself refuses.
    """
    parser = _build_parser(command, options, positionals)
    words = [_with_underscores(word) for word in argv]
    known = list(_names(options))
    task = next((str(item.default) for item in fields(options) if item.name == "task"), "")  # type: ignore[arg-type]
    _refuse_unknown(words, known, task)
    if not positionals:
        words = _with_lists_joined(words, options)
    try:
        namespace = parser.parse_args(words)
    except UsageError as error:
        raise UsageError(_one_line(str(error), known)) from None
    instantiated = parser.instantiate(namespace)
    return options(**{item.name: getattr(instantiated, item.name) for item in fields(options)})  # type: ignore[arg-type]


class _Parser(ArgumentParser):
    """A parser that raises instead of printing its usage, which would hide the one line that matters."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise UsageError(message)


def _build_parser(command: str, options: type, positionals: Sequence[tuple[str, str]]) -> ArgumentParser:
    summary = (options.__doc__ or "").partition("\n")[0]
    parser = _Parser(prog=f"vmamba {command}", description=summary)
    parser.add_argument("--config", action="config", help="A YAML file with any of the keys below; flags win over it.")
    _resolve_annotations(options)
    hints = get_type_hints(options)
    defaults = {item.name: item.default for item in fields(options) if item.default is not MISSING}
    for name, number in positionals:
        extra = {"default": defaults[name]} if name in defaults else {}
        kind = str if number == "*" else hints[name]
        parser.add_argument(name, type=kind, nargs=number, help=_help_of(options, name), **extra)
    parser.add_class_arguments(options, as_group=False, skip={name for name, _ in positionals})
    return parser


def _resolve_annotations(options: type) -> None:
    """Put types in place of annotations that are text.

    jsonargparse resolves text itself, and to do so carries out the imports under TYPE_CHECKING of the module: torch and
    all, for a line of help.
    """
    hints = get_type_hints(options)
    options.__init__.__annotations__ = hints  # type: ignore[misc]
    for item in fields(options):
        item.type = hints[item.name]
        if is_dataclass(item.type):
            _resolve_annotations(item.type)  # type: ignore[arg-type]


def _help_of(options: type, name: str) -> str:
    found = re.search(rf"^\s+{name}: (.+?)(?=\n\s+\w+: |\n\s*\n|\Z)", options.__doc__ or "", re.MULTILINE | re.DOTALL)
    return " ".join(found.group(1).split()) if found else ""


def _names(options: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every field, and `name.*` for those that take keys of their own."""
    hints = get_type_hints(options)
    for item in fields(options):
        yield prefix + item.name
        if is_dataclass(hints[item.name]):
            yield from _names(hints[item.name], f"{prefix}{item.name}.")
        elif str(hints[item.name]).startswith("dict"):
            yield f"{prefix}{item.name}.*"


def _lists(options: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every field that holds several values."""
    hints = get_type_hints(options)
    for item in fields(options):
        if is_dataclass(hints[item.name]):
            yield from _lists(hints[item.name], f"{prefix}{item.name}.")
        elif re.search(r"\b(list|tuple)\[", str(hints[item.name])):
            yield prefix + item.name


def _with_underscores(word: str) -> str:
    """Let `--batch-size` stand for `--batch_size`."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _with_lists_joined(words: Sequence[str], options: type) -> list[str]:
    """Let `--names a b` stand for `--names [a,b]`, for fields that are lists or tuples."""
    lists = {f"--{name}" for name in _lists(options)}
    joined: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        joined.append(word)
        if word not in lists:
            continue
        start = position
        while position < len(words) and not words[position].startswith("--"):
            position += 1
        values = words[start:position]
        bracketed = len(values) == 1 and values[0].startswith("[")
        if not values:
            raise UsageError(f"{word} needs a value; {word} [] gives none")
        joined += values if bracketed else [json.dumps(values)]
    return joined


def _is_known(name: str, known: Sequence[str]) -> bool:
    return name in known or any(option.endswith(".*") and name.startswith(option[:-1]) for option in known)


def _refuse_unknown(words: Sequence[str], known: Sequence[str], task: str) -> None:
    shown = [name for name in known if not name.endswith(".*")]
    own = ["help", "config", "print_config"]
    for position, word in enumerate(words):
        if word == "--":
            return
        if not word.startswith("--"):
            continue
        name, _, value = word[2:].partition("=")
        if name not in own and not _is_known(name, known):
            options = [f"--{option}" for option in shown + own]
            raise UsageError(f"there is no option --{name}{did_you_mean('--' + name, options)}")
        if name == "config":
            _check_file(value or next(iter(words[position + 1 : position + 2]), ""), known, task)


def _check_file(path: str, known: Sequence[str], task: str) -> None:
    try:
        with open(path, encoding="utf-8") as stream:
            content = yaml.safe_load(stream)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise UsageError(f"{path} is not readable YAML{where}: {getattr(error, 'problem', None) or error}") from None
    except OSError as error:
        raise UsageError(f"cannot read --config {path or '(no file given)'}: {error.strerror}") from None
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise UsageError(f"{path} must hold keys and values, not {found}")
    shown = [name for name in known if not name.endswith(".*")]
    for name in _keys(content, known):
        if not _is_known(name, known):
            other = content.get("task", "classification")
            if task and other != task:
                raise UsageError(f"{path} is of --task {other}, and this is --task {task}, which has no key {name}")
            raise UsageError(f"{path}: there is no key {name}{did_you_mean(name, shown)}")


def _keys(content: dict[Any, Any], known: Sequence[str], prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and any(option.startswith(f"{name}.") for option in known):
            yield from _keys(value, known, f"{name}.")
        else:
            yield name


def _one_line(message: str, known: Sequence[str]) -> str:
    """Condense a message of jsonargparse, which spreads over lines, into one sentence."""
    text = " ".join(message.split())
    unknown = re.fullmatch(r"Group '([\w.]+)' does not accept option '([\w.]+)'", text)
    if unknown:
        name = ".".join(unknown.groups())
        return f"there is no key {name}{did_you_mean(name, known)}"
    wrong_value = re.search(r'(?:Parser key|argument) "?-*([\w.]+)"?: (.*)', text)
    if not wrong_value:
        stray = re.fullmatch(r"[uU]nrecognized arguments: ([^-].*)", text)
        return f"{text}; a value follows the name of its option, as in --name {stray[1]}" if stray else text
    name, rest = wrong_value.groups()
    rest = re.sub(r"<class '(\w+)'>", r"\1", rest).replace("typing.", "")
    rest = re.sub(r"Literal\[(.*?)\]", lambda found: f"one of {found.group(1)}", rest)
    rest = re.sub(r"Expected an? (.*?)\. Got value: (.*)", r"expected \1, got \2", rest)
    rest = re.sub(
        r"Unable to load config '(.*?)' .*", rf"expected a YAML file, got \1; --{name}.KEY sets one of its keys", rest
    )
    union = re.search(r"Subtypes: \[(.*?)\] .*Given value: (.*)", rest)
    if union:
        kinds = union.group(1).replace(", NoneType", " or null").replace("NoneType, ", "null or ")
        rest = f"expected {kinds}, got {union.group(2)}"
    return f"--{name}: {rest}"
