"""Settings of a command as one frozen dataclass, from flags, environment, a YAML file and defaults.

A field made by `setting` is at once a flag (`mem_fraction` → `--mem-fraction`), a variable
(`BATON_MEM_FRACTION`) and a YAML key (`mem-fraction`), read in this order of precedence by one parser,
so that a wrong value gets the same message wherever it was written.
"""

import dataclasses
import difflib
import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from deploy.errors import UserError
from deploy.settings.values import Parser, path

S = TypeVar("S")

_KEY = "setting"


@dataclass(frozen=True, slots=True)
class Setting:
    """How one field is written and read. `internal` ones are flags between our own processes only."""

    parse: Parser
    help: str
    aliases: tuple[str, ...] = ()
    positional: bool = False
    switch: bool = False
    many: bool = False
    internal: bool = False


def setting(default: Any, parse: Parser, help: str, *aliases: str, **traits: bool) -> Any:
    """A dataclass field. `default` MISSING makes it required; with `many`, a tuple of values."""
    metadata = {_KEY: Setting(parse, help, aliases, **traits)}
    return dataclasses.field(default=default, metadata=metadata)


def required(parse: Parser, help: str, *aliases: str, **traits: bool) -> Any:
    return setting(dataclasses.MISSING, parse, help, *aliases, **traits)


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def settings_of(kind: type) -> dict[str, tuple["dataclasses.Field[Any]", Setting]]:
    return {field.name: (field, field.metadata[_KEY]) for field in dataclasses.fields(kind)}


def register(app: typer.Typer, name: str, kind: type[S], run: Callable[[S], None]) -> None:
    """Adds a command `name` that resolves a `kind` and returns what is to be done with it.

    Returned, not done: the parser is then out of the way, and out of every traceback.
    """

    def command(**flags: Any) -> Callable[[], None]:
        return functools.partial(run, resolve(kind, flags, os.environ))

    parameters = [_parameter(field, how) for field, how in settings_of(kind).values()]
    config = Annotated[str | None, typer.Option("--config", help="YAML file with any of these settings.")]
    parameters.append(
        inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=config)
    )
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {}
    _KINDS.append(kind)
    app.command(name, help=inspect.getdoc(kind))(command)


_KINDS: list[type] = []
"""Every command's settings: a YAML file may be shared by commands that read different parts of it."""


def resolve(kind: type[S], flags: Mapping[str, Any], environ: Mapping[str, str]) -> S:
    """A `kind` from what was given. Raises UserError, one line, on the first thing that is wrong."""
    config = flags.get("config") or environ.get("BATON_CONFIG")
    written = read_config_file(path(config), _known_names(kind)) if config else {}
    values: dict[str, Any] = {}
    for name, (field, how) in settings_of(kind).items():
        flag = name.upper() if how.positional else flag_of(name)
        variable = "BATON_" + name.upper()
        if flags.get(name) not in (None, []):
            values[name] = _parsed(how, flags[name], flag)
        elif not how.internal and environ.get(variable):
            given: Any = environ[variable].split(",") if how.many else environ[variable]
            values[name] = _parsed(how, given, variable)
        elif name in written:
            values[name] = _parsed(how, written[name], f"{config}: {name.replace('_', '-')}")
        elif field.default is dataclasses.MISSING:
            raise UserError(f"{flag} is missing: {how.help[0].lower()}{how.help[1:]}")
    return kind(**values)


def read_config_file(file: Path, known: Mapping[str, str]) -> dict[str, Any]:
    """Field names and their YAML values, as text or lists of text. `known` maps accepted keys to fields.

    Raises UserError on an unreadable file, or an unknown key (with the nearest known one).
    """
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config: {file} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--config: {file} is not YAML: {reason}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"--config: {file} must hold keys and values, like 'mem-fraction: 0.8'")
    written: dict[str, Any] = {}
    for key, value in content.items():
        name = known.get(str(key).replace("_", "-"))
        if name is None:
            near = difflib.get_close_matches(str(key).replace("_", "-"), sorted(known), n=1, cutoff=0.0)
            raise UserError(f"{file}: unknown key {key!r}; did you mean {near[0]!r}?")
        if name in written:
            raise UserError(f"{file}: {key!r} is given twice, under two names")
        written[name] = value
    return written


def _known_names(kind: type) -> dict[str, str]:
    known = {}
    for each in (kind, *_KINDS):
        for name, (_, how) in settings_of(each).items():
            if not how.internal:
                for spelling in (flag_of(name), *how.aliases):
                    known[spelling.removeprefix("--")] = name
    return known


def _parsed(how: Setting, given: Any, where: str) -> Any:
    if how.many:
        entries = given if isinstance(given, list | tuple) else [given]
        return tuple(_parsed_one(how, entry, where) for entry in entries)
    return _parsed_one(how, given, where)


def _parsed_one(how: Setting, given: Any, where: str) -> Any:
    if isinstance(given, bool):
        given = "true" if given else "false"
    if not isinstance(given, str | int | float):
        raise UserError(f"{where}: must be a single value, not {type(given).__name__}")
    try:
        return how.parse(str(given).strip())
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _parameter(field: "dataclasses.Field[Any]", how: Setting) -> inspect.Parameter:
    needed = field.default is dataclasses.MISSING
    help_text = (
        how.help if needed or field.default in (None, ()) else f"{how.help} (default: {field.default})"
    )
    kind: Any
    if how.positional:
        kind = Annotated[str | None, typer.Argument(metavar=field.name.upper(), help=how.help)]
    elif how.switch:
        name = flag_of(field.name)
        kind = Annotated[bool | None, typer.Option(f"{name}/--no-{name[2:]}", help=help_text)]
    else:
        spellings: Sequence[str] = (flag_of(field.name), *how.aliases)
        value_type: Any = list[str] if how.many else str
        kind = Annotated[
            value_type | None, typer.Option(*spellings, help=help_text, hidden=how.internal, metavar="VALUE")
        ]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
