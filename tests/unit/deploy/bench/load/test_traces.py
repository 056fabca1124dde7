"""Traces: both formats are read, and a bad line is refused with its file and number."""

import gzip
import json
from pathlib import Path

import pytest

from deploy.bench.load.prompts import Prompts
from deploy.bench.load.traces import TracedRequest, TraceError, read_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-17 00:00:00,4096,1
"""
MOONCAKE = [
    {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [7, 8, 9]},
    {"timestamp": 3000, "input_length": 512, "output_length": 1, "hash_ids": [7]},
    {"timestamp": 3001, "input_length": 1030, "output_length": 2, "hash_ids": [7, 8, 10]},
]


def written(path: Path, *lines: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_azure(tmp_path: Path) -> None:
    file = tmp_path / "azure.csv"
    file.write_text(AZURE)
    one, two, three = read_trace(file, 100)
    assert (one.input_tokens, one.output_tokens, one.block_ids) == (374, 44, ())
    assert two.at_s - one.at_s == pytest.approx(4.314579, abs=1e-6)
    assert three.at_s - one.at_s == pytest.approx(5 * 3600 + 44 * 60 + 13.31941, abs=1e-5)
    assert read_trace(file, 2) == [one, two]


@pytest.mark.parametrize("zipped", [False, True])
def test_mooncake(tmp_path: Path, zipped: bool) -> None:
    file = written(tmp_path / "trace.jsonl", *MOONCAKE)
    if zipped:
        file.write_bytes(gzip.compress(file.read_bytes()))
    assert read_trace(file, 100) == [
        TracedRequest(0.0, 1100, 5, (7, 8, 9)),
        TracedRequest(3.0, 512, 1, (7,)),
        TracedRequest(3.001, 1030, 2, (7, 8, 10)),
    ]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (AZURE + "2023-11-17 00:00:01,12\n", "line 5: 2 fields, not 3"),
        (AZURE + "2023-11-17 00:00:01,0,5\n", "line 5: ContextTokens: 0 is out of range"),
        (AZURE + "2023-11-17 00:00:01,many,5\n", "line 5: ContextTokens: 'many' is not a whole number"),
        (AZURE + "2023-11-17 00:00:01.5x,3,5\n", "line 5: '2023-11-17 00:00:01.5x' is not a time"),
        (AZURE + "yesterday,3,5\n", "line 5: 'yesterday' is not a time"),
        (AZURE + "2023-11-16 23:00:01,3,5\n", "line 5: earlier than the request before it"),
        ("a,b,c\n1,2,3\n", "line 1: neither Azure's head"),
        ("", "line 1: neither Azure's head"),
        (AZURE.splitlines()[0] + "\n", "holds no request"),
        (json.dumps(MOONCAKE[0]) + "\n{\n", "line 2: Input data was truncated"),
        (json.dumps(MOONCAKE[0]) + '\n{"timestamp": 1}\n', "line 2: Object missing required field"),
        (json.dumps({**MOONCAKE[0], "hash_ids": [7, 8]}), "line 1: 2 hash_ids for 3 blocks of 512 tokens"),
        (json.dumps({**MOONCAKE[0], "hash_ids": [7, 8, -1]}), "line 1: a negative hash id"),
        (json.dumps({**MOONCAKE[0], "output_length": 0}), "line 1: output_length: 0 is out of range"),
    ],
)
def test_a_bad_line_is_named(content: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "bad"
    file.write_text(content)
    with pytest.raises(TraceError) as refused:
        read_trace(file, 100)
    assert str(file) in str(refused.value)
    assert says in str(refused.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be read: No such file"):
        read_trace(tmp_path / "none", 1)
    (tmp_path / "cut.gz").write_bytes(gzip.compress(AZURE.encode())[:-12])
    with pytest.raises(TraceError, match="not a whole gzip file"):
        read_trace(tmp_path / "cut.gz", 100)
    (tmp_path / "bytes").write_bytes(AZURE.encode() + b"\xff\n")
    with pytest.raises(TraceError, match="line 5: not UTF-8"):
        read_trace(tmp_path / "bytes", 100)


def test_prompts_repeat_where_the_hash_ids_do_and_nowhere_else() -> None:
    prompts = Prompts(seed=1, stream=0, low=256, high=1023)
    first = prompts.of_blocks((7, 8, 9), 512, 1100).tolist()
    third = prompts.of_blocks((7, 8, 10), 512, 1030).tolist()
    assert (len(first), len(third)) == (1100, 1030)
    assert first[:1024] == third[:1024]
    assert first[1024:1030] != third[1024:]
    assert first[:512] != first[512:1024]
    assert all(256 <= token <= 1023 for token in first)
    assert prompts.of_blocks((7,), 512, 100).tolist() == first[:100]
    assert Prompts(1, 1, 256, 1023).of_blocks((7,), 512, 512).tolist() != first[:512], "another rate"
    assert Prompts(2, 0, 256, 1023).of_blocks((7,), 512, 512).tolist() != first[:512], "another seed"


def test_unique_prompts() -> None:
    prompts = Prompts(seed=1, stream=0, low=256, high=1023)
    sampled = [tuple(prompts.unique(number, 16).tolist()) for number in range(500)]
    assert len(set(sampled)) == 500
    assert tuple(prompts.unique(7, 16).tolist()) == sampled[7]
