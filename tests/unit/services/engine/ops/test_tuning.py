"""Tables of tuned launches: which entry a shape gets, whose table goes first, what a broken one says."""

from pathlib import Path

import pytest
import torch

from services.engine.ops import tuning
from services.engine.ops.rms_norm import NormLaunch
from services.engine.ops.tuning import Config, Shape, TuningTableError

GPU = "NVIDIA Example 80GB"


def named(*shapes: Shape) -> dict[Shape, Config]:
    return {shape: {"name": "x".join(map(str, shape))} for shape in shapes}


@pytest.fixture
def directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The package's directory and the user's, both still missing."""
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("BATON_CACHE_DIR", str(tmp_path / "cache"))
    tuning.lookup.cache_clear()
    tuning._tables.cache_clear()
    return tmp_path / "shipped", tmp_path / "cache" / "tuned"


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((8, 4096, 4096), (8, 4096, 4096)),
        ((9, 4096, 4096), (64, 4096, 4096)),  # tiles for enough tokens
        ((65, 4096, 4096), (64, 4096, 4096)),  # or for the most there are
        ((8, 3000, 4096), (8, 4096, 4096)),
        ((8, 24576, 4096), (1, 16384, 4096)),  # the matrix matters before the tokens
        ((1, 4096, 20000), (8, 4096, 12288)),
    ],
)
def test_the_nearest_shape(shape: Shape, expected: Shape) -> None:
    entries = named((8, 4096, 4096), (64, 4096, 4096), (1, 16384, 4096), (8, 4096, 12288), (8, 4096))
    assert tuning.nearest(entries, shape) == entries[expected]


def test_no_shape_is_like_one_with_other_dimensions() -> None:
    assert tuning.nearest(named((8, 4096)), (8, 4096, 4096)) is None
    assert tuning.nearest({}, (8,)) is None


def test_without_a_table_there_is_no_configuration(directories: tuple[Path, Path]) -> None:
    assert tuning.lookup("linear", (1, 2, 3), GPU) is None


def test_a_saved_table_is_found_and_keeps_what_was_there(directories: tuple[Path, Path]) -> None:
    _, own = directories
    assert tuning.lookup("linear", (1, 2, 3), GPU) is None  # what was looked up before is no obstacle
    path = tuning.save({"linear": {(1, 2, 3): {"a": 1, "b": True}}}, GPU, own)
    assert tuning.save({"linear": {(4, 5, 6): {"a": 2}}, "norm": {(7,): {"c": "d"}}}, GPU, own) == path
    assert tuning.lookup("linear", (1, 2, 3), GPU) == {"a": 1, "b": True}
    assert tuning.lookup("linear", (4, 5, 6), GPU) == {"a": 2}
    assert tuning.lookup("norm", (7,), GPU) == {"c": "d"}
    assert tuning.lookup("linear", (1, 2, 3), "another GPU") is None
    assert [one.name for one in own.iterdir()] == ["NVIDIA_Example_80GB.json"]


def test_the_users_table_goes_before_the_shipped_one(directories: tuple[Path, Path]) -> None:
    shipped, own = directories
    tuning.save({"linear": {(1, 2, 3): {"a": 1}, (9, 2, 3): {"a": 9}}}, GPU, shipped)
    tuning.save({"linear": {(1, 2, 3): {"a": 2}}}, GPU, own)
    assert tuning.lookup("linear", (1, 2, 3), GPU) == {"a": 2}
    assert tuning.lookup("linear", (9, 2, 3), GPU) == {"a": 9}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"linear": {"1x0": {}}}',
        '{"linear": {"1x": {}}}',
        '{"linear": {"a": {}}}',
        '{"linear": {"1": {"a": [1]}}}',
    ],
)
def test_a_broken_table_is_named(directories: tuple[Path, Path], text: str) -> None:
    _, own = directories
    own.mkdir(parents=True)
    path = own / tuning.file_name(GPU)
    path.write_text(text)
    with pytest.raises(TuningTableError, match=path.name):
        tuning.lookup("linear", (1,), GPU)
    with pytest.raises(TuningTableError):
        tuning.save({"linear": {(1,): {}}}, GPU, own)
    assert path.read_text() == text


def test_a_kernel_gets_its_launch_from_the_table_and_its_default_without_one(
    directories: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, cache = directories
    default, measured, gpu = NormLaunch(8), NormLaunch(16), torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    tuning.tuned.cache_clear()
    assert tuning.tuned("rms_norm", (64, 1, 4096), gpu, default) == default
    tuning.save({"rms_norm": {(256, 1, 4096): {"num_warps": 16}}}, GPU, cache)
    assert tuning.tuned("rms_norm", (64, 1, 4096), gpu, default) == measured
    assert tuning.tuned("rms_norm", (64, 1, 4096), torch.device("cpu"), default) == default
    tuning.save({"rms_norm": {(256, 1, 4096): {"warps": 16}}}, GPU, cache)
    with pytest.raises(TuningTableError, match="num_warps"):
        tuning.tuned("rms_norm", (64, 1, 4096), gpu, default)
    tuning.tuned.cache_clear()
