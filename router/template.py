"""The model's chat template, rendered in an immutable sandbox (sandbox.py) with a time limit.

Templates come with the checkpoint and never from a request. The sandbox has no access to attributes that
begin with an underscore, to the file system or to other templates, and cannot change what it is given.
"""

import datetime
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2

from router.checkpoint import read_json
from router.config import RouterConfigError
from router.errors import ApiError, invalid
from router.sandbox import Sandbox, TemplateRefusal, TemplateTimeout
from router.template_budget import TemplateTooLarge

MAX_PROMPT_CHARACTERS = 64 << 20
MAX_TIME_FORMAT = 256
TIME_LIMIT_S = 1.0
"""Those of known models need microseconds."""


def _source(model_dir: Path, settings: dict[str, Any]) -> tuple[Path, str | None]:
    path = model_dir / "chat_template.jinja"
    if path.exists():
        try:
            return path, path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise RouterConfigError(f"{path} cannot be read: {error}") from error
    path = model_dir / "chat_template.json"
    if path.exists():
        settings = read_json(path)
    else:
        path = model_dir / "tokenizer_config.json"
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise RouterConfigError(f"{path}: chat_template must be a text or a list of named templates")
    return path, found


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
    if len(form) > MAX_TIME_FORMAT or re.search(r"%[^%A-Za-z]*\d{3}", form):
        raise TemplateTooLarge("a time in a format that is too long")
    return moment.strftime(form)


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
        path, source = _source(model_dir, settings)
        self._names = {**_special_tokens(model_dir, settings), **(special_tokens or {})}
        self._template: jinja2.Template | None = None
        self._sandbox = Sandbox(time_limit_s, clock)
        self._sandbox.globals["strftime_now"] = lambda form: _time_as(str(form), now())
        if source is not None:
            try:
                self._template = self._sandbox.compiled(source)
            except jinja2.TemplateError as error:
                raise RouterConfigError(f"{path}: the chat template does not compile: {error}") from error

    @property
    def present(self) -> bool:
        return self._template is not None

    def render(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool, extra: dict[str, Any] | None = None
    ) -> str:
        """The prompt. `extra` are a request's `chat_template_kwargs`; they cannot replace the names given
        here. Raises ApiError 400 where the template refuses the messages, or fails on them."""
        if self._template is None:
            raise invalid("This model has no chat template: use /v1/completions.", code="no_chat_template")
        names = {
            **(extra or {}),
            **self._names,
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        parts: list[str] = []
        characters = 0
        self._sandbox.begin()
        try:
            for part in self._template.generate(names):
                characters += len(part)
                if characters > MAX_PROMPT_CHARACTERS:
                    raise invalid("The chat template made a prompt that is too long.", "messages")
                parts.append(part)
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
        return "".join(parts)
