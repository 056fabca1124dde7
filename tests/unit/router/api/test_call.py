"""A prompt and its answer as one text; a stream whose client does not keep up; what is counted."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models

import router.api.call
from router.api.call import Call, PromptStream, ResponseBuilder
from router.api.responses import ResponseHeader, StreamBuilder, WholeBuilder
from router.openai.requests import BodyDecoder, ChatBody, CompletionBody
from router.prepare.parameters import options_of
from router.routing.limits import RequestLimits
from router.routing.metrics import Metrics
from router.text.tokenizer import TextTokenizer
from services.protocol.messages import PrefillDone, TokenLogprob, Tokens
from tests.checkpoints import write_tokenizer

LIMITS = RequestLimits(320, 1024, 1024, 8, 8, 8)


def push(output: PromptStream, report: Tokens, now_s: float = 0.0) -> bool:
    return output.choices[report.choice].on_tokens(report, now_s)


def test_frames_that_nobody_takes_end_the_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router.api.call, "MAX_UNSENT_FRAMES", 10)
    write_tokenizer(tmp_path)
    tokenizer = TextTokenizer(tmp_path)
    options = options_of(CompletionBody(prompt="a", stream=True, n=2, max_tokens=500), LIMITS, 1)
    builder = StreamBuilder(ResponseHeader("id", 0, "tiny"), tokenizer, False, None, False)
    call = Call(options, builder, tokenizer, Metrics())
    output = call.add_prompt([5], None)
    for taken in range(100):
        assert push(output, Tokens(1, taken % 2, [65], None, None), float(taken))
        call.take_frames()
    assert not call.ended
    going_on = [push(output, Tokens(1, at % 2, [65], None, None), 100.0) for at in range(14)]
    assert going_on == [True] * 10 + [False] * 4
    assert call.ended and call.error is not None
    assert (call.error.status, call.error.code) == (408, "client_too_slow")


def answer(tokenizer: TextTokenizer, body: CompletionBody, text: str | None, prompt: list[int]) -> Any:
    """The choices of a whole answer, made of `COMPLETIONS`."""
    limits = RequestLimits(2000, 4096, 4096, 8, 8, 8)
    options = options_of(body, limits, 1)
    builder = WholeBuilder(ResponseHeader("id", 0, "tiny"), tokenizer, False, options.logprobs)
    call = Call(options, builder, tokenizer, Metrics())
    output = call.add_prompt(prompt, text)
    logprobs = [TokenLogprob(-1.0, []) for _ in prompt[1:]]
    output.on_prefilled(PrefillDone(1, 0.0, 0.0, 0, logprobs if options.logprobs is not None else None))
    for choice, tokens in enumerate(COMPLETIONS[: options.choices]):
        own = [TokenLogprob(-1.0, []) for _ in tokens] if options.logprobs is not None else None
        push(output, Tokens(1, choice, tokens, own, "length"), 0.0)
    assert call.ended
    return json.loads(call.builder.body(call.usage))["choices"]


COMPLETIONS = [[500, 501], [502]]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """`<s>`, then `▁w1` to `▁w999` with a Metaspace decoder."""
    library = Tokenizer(models.WordLevel({f"▁w{i}": i for i in range(1000)}, unk_token="▁w0"))
    library.decoder = decoders.Metaspace(prepend_scheme="always")
    library.add_special_tokens(["<s>"])
    directory: Path = tmp_path_factory.mktemp("words")
    library.save(str(directory / "tokenizer.json"))
    return TextTokenizer(directory)


@pytest.mark.parametrize("text", [None, "w5 w600 w7"])
def test_prompt_and_completion_of_an_echo_are_one_text(words: TextTokenizer, text: str | None) -> None:
    body = CompletionBody(prompt="", echo=True, max_tokens=2, n=2, logprobs=0)
    first, second = answer(words, body, text, [5, 600, 7])
    assert first["text"] == words.decode([5, 600, 7, 500, 501]) == "w5 w600 w7 w500 w501"
    assert second["text"] == "w5 w600 w7 w502"
    assert first["logprobs"]["text_offset"] == [0, 2, 7, 10, 15]
    assert first["logprobs"]["tokens"][3:] == [" w500", " w501"]


def test_without_an_echo_the_text_begins_where_the_prompt_ends(words: TextTokenizer) -> None:
    (choice,) = answer(words, CompletionBody(prompt="", max_tokens=2, logprobs=0), None, [5, 600, 7])
    assert choice["text"] == " w500 w501"
    assert choice["logprobs"]["text_offset"] == [0, 5]


def test_a_prompt_of_ids_shows_its_special_tokens(words: TextTokenizer) -> None:
    body = CompletionBody(prompt="", echo=True, max_tokens=2, logprobs=0)
    (choice,) = answer(words, body, None, [1000, 5])
    assert choice["text"] == "<s> w5 w500 w501"
    assert choice["logprobs"]["text_offset"] == [0, 3, 6, 11]
    (choice,) = answer(words, CompletionBody(prompt="", max_tokens=2), None, [1000])
    assert choice["text"] == "w500 w501"


def test_an_echo_of_half_a_character_is_made_whole(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = TextTokenizer(tmp_path)
    tokens = tokenizer.encode("xé", False)
    body = CompletionBody(prompt="", echo=True, max_tokens=2, logprobs=0)
    options = options_of(body, LIMITS, 1)
    for streamed in (False, True):
        response_header = ResponseHeader("id", 0, "tiny")
        builder: ResponseBuilder = (
            StreamBuilder(response_header, tokenizer, False, 0, False)
            if streamed
            else WholeBuilder(response_header, tokenizer, False, 0)
        )
        call = Call(options, builder, tokenizer, Metrics())
        output = call.add_prompt(tokens[:2], None)
        logprobs = [TokenLogprob(-1.0, [])]
        output.on_prefilled(PrefillDone(1, 0.0, 0.0, 0, logprobs))
        push(output, Tokens(1, 0, tokens[2:], logprobs, "length"), 0.0)
        bodies = (
            [line[6:] for line in b"".join(builder.frames).splitlines() if line.startswith(b"data: {")]
            if streamed
            else [builder.body(call.usage)]
        )
        choices = [json.loads(one)["choices"][0] for one in bodies]
        assert "".join(choice["text"] for choice in choices) == "xé"
        offsets = [choice["logprobs"]["text_offset"] for choice in choices if choice["logprobs"]]
        assert [at for each in offsets for at in each] == [0, 1, 1]


def test_an_echo_alone_is_what_the_prompt_decodes_to(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = TextTokenizer(tmp_path)
    tokens = tokenizer.encode("xé", False)[:2]
    (choice,) = answer(tokenizer, CompletionBody(prompt="", echo=True, max_tokens=0), None, tokens)
    assert choice["text"] == tokenizer.decode(tokens) == "x\ufffd"


LETTERS = [65, 66, 67, 68]  # b, c, d, e
CASES: list[dict[str, Any]] = [
    {},
    {"n": 2},
    {"prompt": ["a", "b"], "n": 2},
    {"max_tokens": 0, "echo": True},
    {"max_tokens": 0, "echo": True, "n": 2, "logprobs": 1},
    {"echo": True, "logprobs": 1},
    {"stop": "c"},
    {"stop": "cd", "n": 2, "include_stop_str_in_output": True},
    {"ends": True},
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fields", CASES, ids=str)
def test_counters_and_usage_and_ids_agree(fields: dict[str, Any], stream: bool, tmp_path: Path) -> None:
    """Whatever workers send past a choice's end, and however many of its tokens come at once."""
    write_tokenizer(tmp_path)
    tokenizer = TextTokenizer(tmp_path)
    fields = {"prompt": "a", **fields}
    ends = fields.pop("ends", False)
    options = options_of(CompletionBody(**fields, stream=stream, return_token_ids=True), LIMITS, 1)
    response_header = ResponseHeader("id", 0, "tiny")
    builder: ResponseBuilder = (
        StreamBuilder(response_header, tokenizer, False, options.logprobs, True)
        if stream
        else WholeBuilder(response_header, tokenizer, False, options.logprobs)
    )
    metrics = Metrics()
    call = Call(options, builder, tokenizer, metrics)
    prompts = fields["prompt"] if isinstance(fields["prompt"], list) else [fields["prompt"]]
    top = [TokenLogprob(-1.0, [])] * len(LETTERS)
    for number, text in enumerate(prompts):
        output = call.add_prompt([5, 6 + number], text)
        for choice in range(options.choices):
            for tokens, finish in ((LETTERS[:1], None), (LETTERS[1:], "stop" if ends else "length")):
                if not push(output, Tokens(1, choice, tokens, top[: len(tokens)], finish), 0.0):
                    break
    assert call.ended and call.error is None
    raw = builder.body(call.usage).decode()
    answers = [json.loads(line) for line in raw.replace("data: ", "").split("\n\n") if line[:1] == "{"]
    made = [(one["index"], one.get("token_ids", [])) for answer in answers for one in answer["choices"]]
    usage = answers[-1]["usage"]
    assert usage["completion_tokens"] == sum(len(ids) for _, ids in made) == metrics.generation_tokens
    shown = [
        one["prompt_token_ids"]
        for answer in answers
        for one in answer["choices"]
        if "prompt_token_ids" in one
    ]
    assert sorted(shown) == sorted(
        [5, 6 + number] for number in range(len(prompts)) for _ in range(options.choices)
    )
    for index in range(len(prompts) * options.choices):
        ids = [token for at, tokens in made for token in tokens if at == index]
        assert ids == LETTERS[: len(ids)]
        assert len(ids) == (
            0 if options.max_tokens == 0 else {"c": 2, "cd": 3}.get(fields.get("stop", ""), 4)
        )


@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_can_say_its_usage_all_along(chat: bool, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = TextTokenizer(tmp_path)
    raw = {"stream": True, "n": 2, "stream_options": {"continuous_usage_stats": True, "include_usage": True}}
    raw |= (
        {"messages": [{"role": "user", "content": "a"}], "return_prompt_text": True}
        if chat
        else {"prompt": "a"}
    )
    body = BodyDecoder().decode(ChatBody if chat else CompletionBody, json.dumps(raw).encode())
    options = options_of(body, LIMITS, 1)
    builder = StreamBuilder(
        ResponseHeader("id", 0, "tiny"), tokenizer, chat, None, True, options.continuous_usage
    )
    call = Call(options, builder, tokenizer, Metrics())
    output = call.add_prompt([5, 6, 7], "the prompt")
    for choice in (0, 1):
        push(output, Tokens(1, choice, LETTERS[:1], None, None), 0.0)
        push(output, Tokens(1, choice, LETTERS[1:], None, "length"), 0.0)
    frames = [json.loads(line[6:]) for line in builder.body(call.usage).decode().split("\n\n")[:-2]]
    counts = [frame["usage"]["completion_tokens"] for frame in frames]
    assert counts == sorted(counts)
    assert set(counts) == {1, 4, 5, 8}
    assert {frame["usage"]["prompt_tokens"] for frame in frames} == {3}
    assert (frames[-1]["choices"], counts[-1]) == ([], 8)
    with_text = [frame["choices"][0]["index"] for frame in frames if frame.get("prompt_text") == "the prompt"]
    assert with_text == ([0, 1] if chat else [])
