"""Settings of a command as one frozen dataclass, filled by Click.

A field made by `setting` is at once a flag (`mem_fraction` → `--mem-fraction`), a variable
(`BATON_MEM_FRACTION`) and a YAML key (`mem-fraction`). Click takes the first of them that is given: the
variable by its prefix, the file as its `default_map`. One parser reads them all, so that a wrong value gets
the same message wherever it was written.
"""

import dataclasses
import difflib
import functools
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from deploy.errors import UserError
from deploy.settings.values import Parser, path

S = TypeVar("S")

_PREFIX = "BATON"
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


def key_of(name: str) -> str:
    return name.replace("_", "-")


def flag_of(name: str) -> str:
    return "--" + key_of(name)


def variable_of(name: str) -> str:
    return f"{_PREFIX}_{name.upper()}"


def settings_of(kind: type) -> dict[str, tuple["dataclasses.Field[Any]", Setting]]:
    return {field.name: (field, field.metadata[_KEY]) for field in dataclasses.fields(kind)}


def register(app: typer.Typer, name: str, kind: type[S], run: Callable[[S], None]) -> None:
    """Adds a command `name` that makes a `kind` and returns what is to be done with it.

    Returned, not done: the parser is then out of the way, and out of every traceback.
    """
    fields = settings_of(kind)

    def command(config: str | None, **given: Any) -> Callable[[], None]:
        values = {
            name: tuple(value) if fields[name][1].many else value
            for name, value in given.items()
            if value is not None
        }
        return functools.partial(run, kind(**values))

    def read_config(context: typer.Context, file: str | None) -> str | None:
        written = read_config_file(path(file), _known_names(kind)) if file else {}
        context.default_map = {}
        for name, value in written.items():
            if name in fields:
                if value is None:  # To Click it would be as good as absent.
                    raise UserError(f"{file}: {key_of(name)}: must be a single value, not NoneType")
                is_alone = fields[name][1].many and not isinstance(value, list)
                context.default_map[name] = [value] if is_alone else value
        return file

    parameters = [_parameter(field, how) for field, how in fields.values()]
    help_text = "YAML file with any of these settings."
    config = typer.Option(help=help_text, is_eager=True, callback=read_config, show_envvar=False)
    parameters.append(_keyword("config", str, config))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {}
    _KINDS.append(kind)
    environment = {"auto_envvar_prefix": _PREFIX}
    app.command(name, help=inspect.getdoc(kind), context_settings=environment)(command)


_KINDS: list[type] = []
"""Every command's settings: a YAML file may be shared by commands that read different parts of it."""


def read_config_file(file: Path, known: Mapping[str, str]) -> dict[str, Any]:
    """Field names and their YAML values. `known` maps accepted keys to fields.

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


def _parser(field: "dataclasses.Field[Any]", how: Setting) -> Callable[..., Any]:
    """Click's callback for a field: it is called once with what Click found, or with None."""
    flag = field.name.upper() if how.positional else flag_of(field.name)
    variable = variable_of(field.name)

    def parse(context: typer.Context, parameter: typer.CallbackParam, given: Any) -> Any:
        if given is None:
            if field.default is dataclasses.MISSING:
                raise UserError(f"{flag} is missing: {how.help[0].lower()}{how.help[1:]}")
            return None
        source = context.get_parameter_source(field.name)
        match source and source.name:
            case "ENVIRONMENT":
                where = variable
                if how.many:  # Click splits at blanks; ours are lists with commas.
                    given = os.environ[variable].split(",")
            case "DEFAULT_MAP":
                where = f"{context.params['config']}: {key_of(field.name)}"
            case _:
                where = flag
        return [_parsed(how, one, where) for one in given] if how.many else _parsed(how, given, where)

    return parse


def _parsed(how: Setting, given: Any, where: str) -> Any:
    if isinstance(given, bool):
        given = "true" if given else "false"
    if not isinstance(given, str | int | float):
        raise UserError(f"{where}: must be a single value, not {type(given).__name__}")
    try:
        return how.parse(str(given).strip())
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _parameter(field: "dataclasses.Field[Any]", how: Setting) -> inspect.Parameter:
    has_default = field.default not in (dataclasses.MISSING, None, ())
    info: dict[str, Any] = {
        "help": f"{how.help} (default: {field.default})" if has_default and not how.positional else how.help,
        "callback": _parser(field, how),
        "parser": _as_given,
        "show_envvar": False,
    }
    name = flag_of(field.name)
    if how.positional:
        argument = typer.Argument(metavar=field.name.upper(), envvar=variable_of(field.name), **info)
        return _keyword(field.name, str, argument)
    if how.switch:
        return _keyword(field.name, bool, typer.Option(f"{name}/--no-{name[2:]}", **info))
    option = typer.Option(
        name, *how.aliases, metavar="VALUE", hidden=how.internal, allow_from_autoenv=not how.internal, **info
    )
    return _keyword(field.name, list[str] if how.many else str, option)


def _keyword(name: str, kind: Any, how: Any) -> inspect.Parameter:
    annotation = Annotated[kind | None, how]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _as_given(value: Any) -> Any:
    return value
