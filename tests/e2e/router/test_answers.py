"""What a client gets for its requests: the openai client in strict mode, and the wire itself."""

import json
import shutil
from pathlib import Path

import pytest

from services.protocol.messages import Cancel, Prefill, ReserveKv, StartDecode
from tests.checkpoints import IM_END
from tests.e2e.router.harness import MESSAGES, Cluster, small_cluster, until


def test_chat(cluster: Cluster) -> None:
    cluster.says("Hello", end_token=cluster.encode(IM_END)[0], cached_tokens=3)
    answer = cluster.router.client().chat.completions.create(model="tiny", messages=MESSAGES)
    assert answer.choices[0].message.content == "Hello"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    work = cluster.prefill.wait_for(Prefill)[0].work
    expected = "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"
    assert work.prompt == cluster.encode(expected)
    assert work.sampling.max_tokens == 1024 - len(work.prompt)
    assert answer.usage.prompt_tokens == len(work.prompt)


def test_the_two_workers_are_told_the_same(cluster: Cluster) -> None:
    cluster.router.client().completions.create(model="tiny", prompt="abc", max_tokens=3, seed=7, n=2)
    prefill = cluster.prefill.wait_for(Prefill)[0]
    reserve = cluster.decode.wait_for(ReserveKv)[0]
    assert prefill.work == reserve.work
    assert prefill.transfer_id == reserve.transfer_id
    assert reserve.source.endpoint == "ipc:///fake/prefill"
    assert (prefill.work.choices, prefill.work.sampling.seed, prefill.work.salt) == (2, 7, b"")
    assert [first.choice for first in cluster.decode.wait_for(StartDecode)[0].first_tokens] == [0, 1]


def test_streamed_chat_with_several_choices_and_usage(cluster: Cluster) -> None:
    cluster.says("Hello", "By")
    stream = cluster.router.client().chat.completions.create(
        model="tiny", messages=MESSAGES, n=3, stream=True, stream_options={"include_usage": True}
    )
    texts, finishes, roles = ["", "", ""], {}, []
    usages = []
    for chunk in stream:
        if chunk.usage is not None:
            usages.append(chunk.usage)
            assert chunk.choices == []
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles += [choice.index] if choice.delta.role else []
            if choice.finish_reason is not None:
                assert choice.index not in finishes, "a second finish_reason"
                finishes[choice.index] = choice.finish_reason
    assert texts == ["Hello", "By", "By"]
    assert finishes == {0: "length", 1: "length", 2: "length"}
    assert sorted(roles) == [0, 1, 2]
    assert [usage.completion_tokens for usage in usages] == [9]


def test_the_stream_ends_as_clients_expect(cluster: Cluster) -> None:
    with cluster.router.http() as http:
        body = {"prompt": "a", "stream": True, "max_tokens": 5}
        answer = http.post("/v1/completions", json=body, headers={"x-request-id": "my\tlabel<1>"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-request-id"] == "mylabel1"
    frames = answer.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    assert all(frame.startswith("data: {") for frame in frames[:-2])
    assert "".join(json.loads(frame[6:])["choices"][0]["text"] for frame in frames[:-2]) == "Hello"


def test_completions_of_many_prompts(cluster: Cluster) -> None:
    cluster.says("x", "y")
    client = cluster.router.client()
    answer = client.completions.create(model="tiny", prompt=["a", "bb"], n=2, max_tokens=4)
    assert [(choice.index, choice.text) for choice in answer.choices] == [
        (0, "x"),
        (1, "y"),
        (2, "x"),
        (3, "y"),
    ]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 4)
    answer = client.completions.create(model="tiny", prompt=[[1, 2, 3], [4]], echo=True, max_tokens=1)
    assert [work.work.prompt for work in cluster.prefill.wait_for(Prefill, 4)[2:]] == [[1, 2, 3], [4]]


def test_one_token_needs_no_decode_worker(cluster: Cluster) -> None:
    answer = cluster.router.client().completions.create(model="tiny", prompt="a", max_tokens=1)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("H", "length")
    cluster.decode.wait_for(Cancel)
    assert not cluster.decode.of(StartDecode)
    assert not cluster.prefill.of(Cancel)


def test_logprobs(cluster: Cluster) -> None:
    cluster.says("Hey", end_token=cluster.encode(IM_END)[0])
    client = cluster.router.client()
    chat = client.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=2)
    content = chat.choices[0].logprobs
    assert content is not None
    assert content.content is not None
    assert "".join(entry.token for entry in content.content) == "Hey" + IM_END
    assert [len(entry.top_logprobs) for entry in content.content] == [2] * 4
    assert content.content[0].logprob == -cluster.encode("H")[0] / 100
    streamed = client.chat.completions.create(
        model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=2, stream=True
    )
    entries = [
        entry
        for chunk in streamed
        for choice in chunk.choices
        if choice.logprobs is not None and choice.logprobs.content
        for entry in choice.logprobs.content
    ]
    assert [entry.model_dump() for entry in entries] == [entry.model_dump() for entry in content.content]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_as_evaluation_harnesses_ask(cluster: Cluster, stream: bool) -> None:
    prompt = cluster.encode("the cat")
    body = {"prompt": [prompt], "echo": True, "logprobs": 1, "max_tokens": 1, "stream": stream}
    with cluster.router.http() as http:
        answer = http.post("/v1/completions", json=body)
    if stream:
        first = json.loads(answer.text.split("\n\n")[0][6:])["choices"][0]
    else:
        first = answer.json()["choices"][0]
    assert first["text"] == "the catH"
    logprobs = first["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:-1] == [-token / 100 for token in prompt[1:]]
    assert len(logprobs["tokens"]) == len(logprobs["text_offset"]) == len(prompt) + 1
    assert "".join(logprobs["tokens"]) == "the catH"
    assert logprobs["text_offset"][-1] == len("the cat")
    assert cluster.prefill.of(Prefill)[0].work.sampling.prompt_logprobs == 1


def test_echo_alone_generates_nothing(cluster: Cluster) -> None:
    answer = cluster.router.client().completions.create(model="tiny", prompt="abc", echo=True, max_tokens=0)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("abc", "length")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_over_token_borders_ends_the_choice_and_the_work(
    cluster: Cluster, stream: bool
) -> None:
    cluster.says("one. STOP two", decode_limit=9)
    client = cluster.router.client(strict=not stream)
    if stream:
        chunks = list(
            client.completions.create(model="tiny", prompt="a", max_tokens=50, stop=["STOP"], stream=True)
        )
        text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
        finish = chunks[-1].choices[0].finish_reason
    else:
        answer = client.completions.create(model="tiny", prompt="a", max_tokens=50, stop="STOP")
        text, finish = answer.choices[0].text, answer.choices[0].finish_reason
    assert (text, finish) == ("one. ", "stop")
    assert cluster.decode.wait_for(Cancel)[0].choice is None


def test_one_choice_stops_while_the_other_goes_on(cluster: Cluster) -> None:
    cluster.says("ab!cdefgh", "abcdefghi")
    answer = cluster.router.client().completions.create(model="tiny", prompt="a", n=2, max_tokens=9, stop="!")
    assert [choice.text for choice in answer.choices] == ["ab", "abcdefghi"]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "length"]
    assert cluster.decode.wait_for(Cancel)[0].choice == 0


def test_a_stop_string_in_the_first_token_frees_both_sides(cluster: Cluster) -> None:
    answer = cluster.router.client().completions.create(model="tiny", prompt="a", stop="H", max_tokens=5)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "stop")
    cluster.decode.wait_for(Cancel)
    cluster.prefill.wait_for(Cancel)


def test_characters_of_many_tokens_are_never_torn(cluster: Cluster) -> None:
    cluster.says("né 🙂!")
    stream = cluster.router.client(strict=False).completions.create(
        model="tiny", prompt="a", max_tokens=50, stream=True
    )
    pieces = [choice.text for chunk in stream for choice in chunk.choices]
    assert "".join(pieces) == "né 🙂!"
    assert "🙂" in "".join(pieces[-3:])


def test_models_and_tokens(cluster: Cluster) -> None:
    client = cluster.router.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with cluster.router.http() as http:
        tokens = http.post("/tokenize", json={"prompt": "the cat", "return_token_strs": True}).json()
        assert tokens["tokens"] == cluster.encode("the cat")
        assert tokens["count"] == len(tokens["tokens"])
        assert "".join(tokens["token_strs"]) == "the cat"
        assert http.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": "the cat"}
        chat = http.post("/tokenize", json={"messages": MESSAGES}).json()
        assert chat["tokens"][:1] == cluster.encode("<|im_start|>")


def test_views_of_the_cluster(cluster: Cluster) -> None:
    cluster.router.client().completions.create(model="tiny", prompt="abc", max_tokens=3)
    values = cluster.router.get("/cluster")
    assert values["ready"] is True
    assert [worker["status"]["role"] for worker in values["workers"]] == ["prefill", "decode"]
    assert values["workers"][0]["status"]["pages"] == {"total": 256, "free": 200, "cached": 36, "used": 20}
    assert set(values["last_request"]) == {"queue_s", "prefill_s", "transfer_s", "decode_s", "total_s"}
    memory = cluster.router.get("/memory")["workers"][0]["ledger"]
    assert memory["sums"]["outside"] == {"planned_bytes": 64 << 20, "measured_bytes": 64 << 20}
    with cluster.router.http() as http:
        metrics = http.get("/metrics").text
        assert 'baton_requests_total{outcome="completed"}' in metrics
        assert 'baton_worker_slots{role="decode",state="free",worker="decode"} 14.0' in metrics
        page = http.get("/")
        assert page.headers["content-type"].startswith("text/html")
        assert "http://" not in page.text.replace("http://www.w3.org/", "")
        assert "innerHTML" not in page.text
        assert http.get("/version").json()["version"]


def test_sampling_defaults_of_the_checkpoint_apply(model_dir: Path, tmp_path: Path) -> None:
    directory = tmp_path / "m"
    shutil.copytree(model_dir, directory)
    values = {"temperature": 0.25, "top_k": 3, "top_p": 0.5, "repetition_penalty": 1.25}
    (directory / "generation_config.json").write_text(json.dumps(values))
    with small_cluster(directory, tmp_path) as cluster, cluster.router.http() as http:
        for path, body in (
            ("chat/completions", {"messages": MESSAGES, "temperature": None}),
            ("completions", {"prompt": "a"}),
            ("completions", {"prompt": "a", "temperature": 0, "top_k": -1}),
        ):
            answer = http.post(f"/v1/{path}", json={**body, "max_tokens": 2})
            assert answer.status_code == 200, answer.text
        sampled = [one.work.sampling for one in cluster.prefill.wait_for(Prefill, 3)]
        until(cluster.router.at_rest, "a router at rest")
    for sampling in sampled[:2]:
        assert {name: getattr(sampling, name) for name in values} == values
    assert (sampled[2].temperature, sampled[2].top_k, sampled[2].top_p) == (0.0, 0, 0.5)
