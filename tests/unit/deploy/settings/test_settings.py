"""Flag, variable, file and default: precedence, and one message whatever the source."""

import os
from pathlib import Path

import pytest

from deploy.errors import UserError
from deploy.settings.options import ServeSettings
from tests.unit.deploy.commandline import parse


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("BATON_")]:
        monkeypatch.delenv(name)


def written(tmp_path: Path, text: str) -> str:
    file = tmp_path / "baton.yaml"
    file.write_text(text)
    return str(file)


def test_defaults() -> None:
    settings = parse(["serve", "m"])
    assert settings == ServeSettings(model_dir=Path("m"))
    assert (settings.host, settings.port, settings.device, settings.tp) == ("127.0.0.1", 8000, "auto", 1)


def test_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path, "port: 1111\nmax-batch: 7\ndrain_timeout: 5")
    from_file = parse(["serve", "m", "--config", file])
    assert (from_file.port, from_file.max_batch, from_file.drain_timeout) == (1111, 7, 5.0)
    monkeypatch.setenv("BATON_PORT", "2222")
    assert parse(["serve", "m", "--config", file]).port == 2222
    assert parse(["serve", "m", "--config", file, "--port", "3333"]).port == 3333
    assert parse(["serve", "m", "--config", file]).max_batch == 7


def test_the_file_may_be_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_CONFIG", written(tmp_path, "model_dir: /srv/m\ncheckpoint: 1"))
    with pytest.raises(UserError, match="unknown key 'checkpoint'"):
        parse(["serve"])
    monkeypatch.setenv("BATON_CONFIG", written(tmp_path, "model_dir: /srv/m\ntensor-parallel-size: 1"))
    assert parse(["serve"]).model_dir == Path("/srv/m")


def test_keys_repeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse(["serve", "m", "--api-key", "a", "--api-key", "b"]).api_key == ("a", "b")
    monkeypatch.setenv("BATON_API_KEY", "c,d")
    assert parse(["serve", "m"]).api_key == ("c", "d")
    monkeypatch.setenv("BATON_API_KEY", "")
    assert parse(["serve", "m"]).api_key == ()
    file = written(tmp_path, "api-key: [e, f]")
    assert parse(["serve", "m", "--config", file]).api_key == ("e", "f")


def test_a_key_that_the_router_would_not_get_whole_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("sk-one,two", "sk-\u00fc", "", "sk-\x7fa"):
        for command in (["serve", "m"], ["memory"]):
            with pytest.raises(UserError, match=r"^--api-key: a key must be") as caught:
                parse([*command, "--api-key", key])
            assert "sk-" not in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="api-key: a key must be"):
        parse(["serve", "m", "--config", written(tmp_path, "api-key: 'e,f'")])
    monkeypatch.setenv("BATON_API_KEY", "c,,d")
    with pytest.raises(UserError, match=r"^BATON_API_KEY: a key must be"):
        parse(["serve", "m"])


def test_switches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse(["serve", "m", "--checksum"]).checksum is True
    monkeypatch.setenv("BATON_CHECKSUM", "yes")
    assert parse(["serve", "m"]).checksum is True
    assert parse(["serve", "m", "--no-checksum"]).checksum is False
    file = written(tmp_path, "prefix-cache: false")
    assert parse(["serve", "m", "--config", file]).prefix_cache is False


def test_a_wrong_switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"yaml: checksum: 'perhaps' is neither true nor false$"):
        parse(["serve", "m", "--config", written(tmp_path, "checksum: perhaps")])
    monkeypatch.setenv("BATON_CHECKSUM", "maybe")
    with pytest.raises(UserError, match=r"^BATON_CHECKSUM: 'maybe' is neither true nor false$"):
        parse(["serve", "m"])


def test_a_list_in_a_variable_is_split_at_commas_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_API_KEY", "a  b, c")
    assert parse(["serve", "m"]).api_key == ("a  b", "c")


def test_a_list_in_the_file_gives_way_to_flags(tmp_path: Path) -> None:
    for text in ("api-key: e", "api-key: [e]"):
        file = written(tmp_path, text)
        assert parse(["serve", "m", "--config", file]).api_key == ("e",)
        assert parse(["serve", "m", "--config", file, "--api-key", "f"]).api_key == ("f",)


def test_a_positional_setting_has_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_MODEL_DIR", "/srv/with blanks")
    assert parse(["serve"]).model_dir == Path("/srv/with blanks")
    assert parse(["serve", "m"]).model_dir == Path("m")


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_PORT", "")
    assert parse(["serve", "m"]).port == 8000


def test_flags_between_our_own_processes_have_no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_PARENT_PID", "7")
    assert parse(["router", "m", "--worker", "ipc:///w"]).parent_pid is None


def test_sizes() -> None:
    settings = parse(["serve", "m", "--device-memory", "1.5GB", "--staging-slot-bytes", "1MiB"])
    assert (settings.device_memory, settings.staging_slot_bytes) == (1_500_000_000, 1 << 20)


def test_a_file_may_be_shared_by_commands(tmp_path: Path) -> None:
    file = written(tmp_path, "port: 9000\nmem-fraction: 0.4")
    assert parse(["plan", "m", "--config", file]).mem_fraction == 0.4


def test_the_same_message_from_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path, "mem-fraction: 1.5")
    messages = []
    for arguments, variable in (
        (["--mem-fraction", "1.5"], None),
        ([], "1.5"),
        (["--config", file], None),
    ):
        if variable is None:
            monkeypatch.delenv("BATON_MEM_FRACTION", raising=False)
        else:
            monkeypatch.setenv("BATON_MEM_FRACTION", variable)
        with pytest.raises(UserError) as caught:
            parse(["serve", "m", *arguments])
        messages.append(str(caught.value))
    wheres = ("--mem-fraction", "BATON_MEM_FRACTION", f"{file}: mem-fraction")
    assert messages == [f"{where}: 1.5 must lie between 0 and 1, both excluded" for where in wheres]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mem-fractoin: 0.5", "unknown key 'mem-fractoin'; did you mean 'mem-fraction'?"),
        ("Port: 1", "unknown key 'Port'; did you mean 'port'?"),
        ("parent-pid: 1", "unknown key 'parent-pid'"),
        ("port: [1, 2]", "port: must be a single value, not list"),
        ("port: {a: 1}", "port: must be a single value, not dict"),
        ("port: 99999", "port: 99999 is out of range; allowed are 0 to 65535"),
        ("port:", "port: must be a single value, not NoneType"),
        ("tp: 65", "tp: 65 is out of range; allowed are 1 to 64"),
        ("tp: 1\ntensor-parallel-size: 1", "is given twice"),
        ("- port", "must hold keys and values"),
        ("port: [", "is not YAML"),
    ],
)
def test_a_wrong_file(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(["serve", "m", "--config", written(tmp_path, text)])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_such_file() -> None:
    with pytest.raises(UserError, match=r"--config: /nowhere\.yaml cannot be read"):
        parse(["serve", "m", "--config", "/nowhere.yaml"])
