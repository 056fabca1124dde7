"""Sampling defaults of a checkpoint: taken where a request says nothing, and checked at start."""

import json
from pathlib import Path
from typing import Any

import pytest

from deploy.commands.serve import checked_defaults
from deploy.errors import UserError
from deploy.settings.options import ServeSettings
from router.config import RouterConfigError
from router.openai.requests import BodyDecoder, ChatBody, CompletionBody, GenerationBody
from router.prepare.generation_config import SamplingDefaults, sampling_defaults
from router.prepare.parameters import Options, options_of
from router.routing.limits import RequestLimits

LIMITS = RequestLimits(320, 64, 100, 4, 3, 6)
GIVEN = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1}
CHAT = {"messages": [{"role": "user", "content": "a"}]}
COMPLETION = {"prompt": "a"}
ENDPOINTS: Any = pytest.mark.parametrize(
    ("kind", "least"), [(ChatBody, CHAT), (CompletionBody, COMPLETION)], ids=["chat", "completion"]
)


def write(directory: Path, values: object) -> Path:
    path = directory / "generation_config.json"
    path.write_text(json.dumps(values))
    return path


def ask(kind: type[GenerationBody], body: dict[str, Any], defaults: SamplingDefaults) -> Options:
    decoded = BodyDecoder().decode(kind, json.dumps(body).encode())
    assert isinstance(decoded, ChatBody | CompletionBody)
    return options_of(decoded, LIMITS, 5, defaults)


@ENDPOINTS
def test_what_a_request_does_not_say_is_what_the_file_says(
    tmp_path: Path, kind: type[GenerationBody], least: dict[str, Any]
) -> None:
    write(tmp_path, {**GIVEN, "eos_token_id": 2, "do_sample": True})
    defaults = sampling_defaults(tmp_path)
    explicit = ask(kind, {**least, **GIVEN}, SamplingDefaults())
    assert ask(kind, least, defaults) == explicit
    assert ask(kind, {**least, **dict.fromkeys(GIVEN)}, defaults) == explicit
    assert ask(kind, least, sampling_defaults(tmp_path, "none")) == ask(kind, least, SamplingDefaults())
    assert explicit != ask(kind, least, SamplingDefaults())


@ENDPOINTS
@pytest.mark.parametrize(
    ("field", "value", "is_then"),
    [("temperature", 0, 0.0), ("temperature", 1, 1.0), ("top_p", 1, 1.0), ("top_k", 0, 0), ("top_k", -1, 0),
     ("min_p", 0, 0.0), ("repetition_penalty", 1, 1.0)],
)  # fmt: skip
def test_what_a_request_says_wins(
    tmp_path: Path,
    kind: type[GenerationBody],
    least: dict[str, Any],
    field: str,
    value: float,
    is_then: float,
) -> None:
    write(tmp_path, GIVEN)
    sampling = ask(kind, {**least, field: value}, sampling_defaults(tmp_path)).sampling
    assert getattr(sampling, field) == is_then
    others = {name: getattr(sampling, name) for name in GIVEN if name != field}
    assert others == {name: given for name, given in GIVEN.items() if name != field}


@pytest.mark.parametrize(("most", "chat", "completion"), [(None, None, 16), (9, 9, 9), (900, 900, 16)])
def test_how_much_is_generated(tmp_path: Path, most: int | None, chat: int | None, completion: int) -> None:
    write(tmp_path, {"max_new_tokens": most})
    defaults = sampling_defaults(tmp_path)
    assert ask(ChatBody, CHAT, defaults).max_tokens == chat
    assert ask(CompletionBody, COMPLETION, defaults).max_tokens == completion
    assert ask(ChatBody, {**CHAT, "max_tokens": 3}, defaults).max_tokens == 3
    assert ask(ChatBody, {**CHAT, "max_completion_tokens": 1000}, defaults).max_tokens == 1000
    assert ask(CompletionBody, {**COMPLETION, "max_tokens": 30}, defaults).max_tokens == 30


def test_no_sampling_is_greedy(tmp_path: Path) -> None:
    write(tmp_path, {"do_sample": False, "temperature": 0.7})
    defaults = sampling_defaults(tmp_path)
    assert ask(ChatBody, CHAT, defaults).sampling.temperature == 0
    assert ask(ChatBody, {**CHAT, "temperature": 0.5}, defaults).sampling.temperature == 0.5


@pytest.mark.parametrize("values", [{}, {"eos_token_id": [1, 2]}, {"temperature": None, "top_k": None}])
def test_a_file_that_says_nothing_changes_nothing(tmp_path: Path, values: dict[str, Any]) -> None:
    assert sampling_defaults(tmp_path) == SamplingDefaults()
    write(tmp_path, values)
    assert sampling_defaults(tmp_path) == SamplingDefaults()


@pytest.mark.parametrize(
    ("key", "value"),
    [("temperature", "warm"), ("temperature", -1), ("temperature", 2.5), ("temperature", True),
     ("temperature", float("nan")), ("temperature", float("inf")), ("top_p", 0), ("top_p", 1.5),
     ("top_p", [1]), ("top_k", 2.5), ("top_k", -2), ("top_k", True), ("top_k", 2**40),
     ("min_p", -0.1), ("min_p", {}),
     ("repetition_penalty", 0), ("repetition_penalty", 3), ("max_new_tokens", 0), ("max_new_tokens", 1.5),
     ("do_sample", "no"), ("do_sample", 0)],
)  # fmt: skip
def test_a_value_that_cannot_be_obeyed_is_named(tmp_path: Path, key: str, value: object) -> None:
    path = write(tmp_path, {key: value})
    with pytest.raises(RouterConfigError) as caught:
        sampling_defaults(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{path}: {key} is ") and "\n" not in message
    assert "--generation-config none" in message
    with pytest.raises(UserError, match=key):
        checked_defaults(ServeSettings(model_dir=tmp_path))
    assert sampling_defaults(tmp_path, "none") == SamplingDefaults()


def test_the_file_may_be_another(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    path = write(tmp_path / "other", {"top_k": 7})
    for source in (path, tmp_path / "other"):
        assert sampling_defaults(tmp_path, str(source)).top_k == 7
    with pytest.raises(RouterConfigError, match="nowhere does not exist"):
        sampling_defaults(tmp_path, str(tmp_path / "nowhere"))


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(RouterConfigError, match=r"generation_config\.json"):
        sampling_defaults(tmp_path)


def test_one_line_says_what_applies(tmp_path: Path) -> None:
    assert sampling_defaults(tmp_path).describe() == "sampling defaults: temperature 1, nothing else"
    path = write(tmp_path, {"temperature": 0.6, "top_k": 20, "max_new_tokens": 100})
    said = sampling_defaults(tmp_path).describe()
    assert said == f"sampling defaults: temperature 0.6, top_k 20, max_tokens 100 ({path})"
