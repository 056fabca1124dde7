"""The model's chat template, rendered in an immutable sandbox (template_sandbox.py) with a time limit.

Templates come with the checkpoint and never from a request. The sandbox has no access to attributes that
begin with an underscore, to the file system or to other templates, and cannot change what it is given.
"""

import datetime
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from router.chat.content_form import Study, study
from router.chat.template_budget import TemplateTooLarge, joined_pieces
from router.chat.template_sandbox import Sandbox, TemplateRefusal, TemplateTimeout
from router.config import RouterConfigError
from router.errors import ApiError, invalid
from router.text.checkpoint import read_json

MAX_PROMPT_CHARACTERS = 64 << 20
MAX_TIME_FORMAT = 256
_WIDE = re.compile(r"%[^%A-Za-z]*\d{3}")
TIME_LIMIT_S = 1.0
"""Those of known models need microseconds."""


_FIELDS = (
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "tokenize",
)
"""What is not a template's variable to choose, or has a field of its own in the request."""


def _sources(model_dir: Path, settings: dict[str, Any]) -> dict[str, tuple[Path, str]]:
    """The templates by name, `default` and `tool_use`, each with the file that it is from."""
    path = model_dir / "chat_template.jinja"
    if path.exists():
        others = model_dir / "additional_chat_templates"
        named = {"default": path, "tool_use": others / "tool_use.jinja"}
        return {name: (one, _read(one)) for name, one in named.items() if one.exists()}
    path = model_dir / "chat_template.json"
    if path.exists():
        settings = read_json(path)
    else:
        path = model_dir / "tokenizer_config.json"
    found = settings.get("chat_template")
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    else:
        found = {"default": found}
    sources = {name: found[name] for name in ("default", "tool_use") if found.get(name) is not None}
    if not all(isinstance(one, str) for one in sources.values()):
        raise RouterConfigError(f"{path}: chat_template must be a text or a list of named templates")
    return {name: (path, source) for name, source in sources.items()}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RouterConfigError(f"{path} cannot be read: {error}") from error


def _special_tokens(model_dir: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """By role, `bos_token` and others. Before transformers wrote `added_tokens_decoder` into
    tokenizer_config.json, they had a file of their own, which comes first."""
    path = model_dir / "special_tokens_map.json"
    older = read_json(path) if "added_tokens_decoder" not in settings and path.exists() else {}
    return {
        role: value.get("content") if isinstance(value, dict) else value
        for role, value in {**settings, **older}.items()
        if role.endswith("_token") and value is not None
    }


def _time_as(form: str, moment: datetime.datetime) -> str:
    """C's strftime takes widths, of any size."""
    if len(form) > MAX_TIME_FORMAT or _WIDE.search(form):
        raise TemplateTooLarge("a time in a format that is too long")
    return moment.strftime(form)


class Program:
    """One compiled template of a checkpoint. `study` finds out once what it takes."""

    def __init__(self, sandbox: Sandbox, source: str, names: Mapping[str, Any]) -> None:
        """Raises TemplateError for a source that does not compile."""
        self._sandbox, self._source, self._names = sandbox, source, names
        self._template = sandbox.compiled(source)
        self._study: Study | None = None

    @property
    def study(self) -> Study:
        if self._study is None:
            self._study = study(self._sandbox.parse(self._source), self._try)
        return self._study

    def run(self, messages: list[dict[str, Any]], names: Mapping[str, Any], at_least_s: float = 0.0) -> str:
        """Raises whatever a template can raise."""
        given = {"tools": None, "documents": None, **names, **self._names, "messages": messages}
        self._sandbox.begin(at_least_s)
        template = self._template  # its `generate` would pass each piece on for the sake of tracebacks
        return joined_pieces(template.root_render_func(template.new_context(given)), MAX_PROMPT_CHARACTERS)

    def _try(self, messages: list[dict[str, Any]], names: dict[str, Any]) -> str | None:
        try:
            # What is found must not depend on how busy the machine is.
            return self.run(messages, {**names, "add_generation_prompt": True}, TIME_LIMIT_S)
        except (TemplateTimeout, TemplateTooLarge):
            raise
        except Exception:  # it refuses the messages, or fails on them
            return None


class ChatTemplate:
    """Renders messages as the prompt the model was trained on.

    `special_tokens` are those of a converted tokenizer, and come before what the files say. Raises
    RouterConfigError for a template that does not compile. A checkpoint without one is fine until a chat is
    asked of it.
    """

    def __init__(
        self,
        model_dir: Path,
        special_tokens: Mapping[str, str] | None = None,
        now: Callable[[], datetime.datetime] = datetime.datetime.now,
        clock: Callable[[], float] = time.monotonic,
        time_limit_s: float = TIME_LIMIT_S,
    ) -> None:
        settings_path = model_dir / "tokenizer_config.json"
        settings = read_json(settings_path) if settings_path.exists() else {}
        self._names = {**_special_tokens(model_dir, settings), **(special_tokens or {})}
        self._programs: dict[str, Program] = {}
        sandbox = Sandbox(time_limit_s, clock)
        sandbox.globals["strftime_now"] = lambda form: _time_as(str(form), now())
        for name, (path, source) in _sources(model_dir, settings).items():
            try:
                self._programs[name] = Program(sandbox, source, self._names)
            except Exception as error:  # Python's compiler, too, refuses what nests too deep
                raise RouterConfigError(f"{path}: the chat template does not compile: {error}") from error

    @property
    def present(self) -> bool:
        return "default" in self._programs

    @property
    def own_names(self) -> frozenset[str]:
        """What a request's names cannot stand for."""
        return frozenset((*self._names, *_FIELDS))

    def program(self, for_tools: bool = False) -> Program:
        """The template to render with: some checkpoints have one of its own for tools. Raises ApiError 400
        where there is none."""
        named = "tool_use" if for_tools and "tool_use" in self._programs else "default"
        if named not in self._programs:
            raise invalid("This model has no chat template: use /v1/completions.", code="no_chat_template")
        return self._programs[named]

    def learn(self) -> None:
        """Studies every template now, so that no request waits for it."""
        for program in self._programs.values():
            _ = program.study

    def render(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool, extra: dict[str, Any] | None = None
    ) -> str:
        """The prompt. `extra` are further names, `tools` and `documents` among them; they cannot replace the
        messages or the names of special tokens. Raises ApiError 400 where the template refuses the messages,
        or fails on them."""
        names = {**(extra or {}), "add_generation_prompt": add_generation_prompt}
        program = self.program(bool(names.get("tools")))
        try:
            return program.run(messages, names)
        except TemplateRefusal as error:
            raise invalid(f"The chat template refuses these messages: {error}", "messages") from error
        except TemplateTooLarge as error:
            raise invalid(f"The chat template makes too much: {error}.", "messages") from error
        except TemplateTimeout as error:
            raise invalid(f"The chat template does not come to an end: {error}.", "messages") from error
        except ApiError:
            raise
        except Exception as error:  # a template is a program of its own, and may fail as any program can
            raise invalid(f"The chat template fails on these messages: {error}", "messages") from error
