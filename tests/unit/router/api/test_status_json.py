"""The table of a worker's status fields is all that JSON, metrics and page are made of."""

from itertools import count
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from router.api.app import STATIC_PAGE
from router.api.status_json import status_values, table_values
from router.routing.metrics import Metrics, Snapshot, exposition
from services.protocol.worker_status import METRIC_FAMILIES, STATUS_FIELDS, FieldEntry, Status

OF_THE_CONNECTION = {"ask_id", "worker_epoch"}
NUMBERS = count(1001)


def example(kind: Any) -> Any:
    """A value of a field's type; no two numbers are alike."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return example(next(one for one in inner if one is not NoneType))
    if origin is Literal:
        return inner[0]
    if origin is list:
        return [example(inner[0]), example(inner[0])]
    if origin is dict:
        return {f"event {number}": float(number) for number in (next(NUMBERS), next(NUMBERS))}
    if issubclass(kind, msgspec.Struct):
        return kind(**{name: example(hint) for name, hint in get_type_hints(kind).items()})
    number = next(NUMBERS)
    return f"text {number}" if kind is str else kind(number)


STATUS: Status = example(Status)


def all_entries(fields: tuple[FieldEntry, ...] = STATUS_FIELDS, path: str = "") -> list[Any]:
    """Every row of the table, those of a field's parts as well, by their path."""
    rows = []
    for field in fields:
        rows.append(pytest.param(f"{path}{field.name}", field, id=f"{path}{field.name}"))
        rows += all_entries(field.parts, f"{path}{field.name}.")
    return rows


def at(path: str, value: Any) -> Any:
    for name in path.split("."):
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    return value


def exposed(statuses: list[Status]) -> dict[str, Any]:
    body = exposition(Metrics(), Snapshot(0, 0, [], [(one.name, one) for one in statuses], 0.0))
    return {family.name: family for family in text_string_to_metric_families(body.decode())}


def test_the_table_has_every_field_of_a_status() -> None:
    names = [field.name for field in STATUS_FIELDS]
    assert names == [name for name in Status.__struct_fields__ if name not in OF_THE_CONNECTION]
    assert [field["name"] for field in table_values(STATUS_FIELDS)] == names
    assert all(field.values[1].about.help for field in all_entries())


def test_a_status_is_the_same_after_the_wire() -> None:
    raw = msgspec.msgpack.encode(STATUS)
    assert msgspec.msgpack.decode(raw, type=Status) == STATUS
    assert msgspec.msgpack.decode(raw)[0] == "status"


@pytest.mark.parametrize(("path", "field"), all_entries())
def test_every_field_is_in_the_json(path: str, field: FieldEntry) -> None:
    found, value = at(path, status_values(STATUS)), at(path, STATUS)
    if isinstance(value, int | float | str):
        assert found == value
    else:
        assert msgspec.json.decode(msgspec.json.encode(found))


@pytest.mark.parametrize(("path", "field"), all_entries())
def test_every_field_is_in_its_metrics(path: str, field: FieldEntry) -> None:
    families = exposed([STATUS])
    for metric in field.about.metrics:
        family = families[metric.family.name]
        assert (family.type, family.documentation) == (metric.family.kind, metric.family.help)
        suffix = "_total" if metric.family.kind == "counter" else ""
        expected = [
            (dict(zip(metric.family.labels, labels, strict=True)), number)
            for labels, number in metric.samples(at(path, STATUS))
        ]
        assert expected
        for labels, number in expected:
            labels |= {"worker": STATUS.name, "role": STATUS.role}
            assert [one.value for one in family.samples if one.labels == labels] == [number]
        assert {one.name for one in family.samples} == {metric.family.name + suffix}


def test_metrics_of_fields_that_are_none_are_left_out() -> None:
    bare = msgspec.structs.replace(STATUS, slots=None, counters={}, rank_ledgers=[])
    families = exposed([bare])
    assert families["baton_worker_slots"].samples == []
    assert [one.value for one in families["baton_nonfinite_logits"].samples] == [0.0]
    assert {family.name for family in METRIC_FAMILIES} <= set(exposed([])), "HELP and TYPE without a worker"


def test_memory_is_that_of_each_rank() -> None:
    families = exposed([STATUS])
    ledgers = [STATUS.ledger, *STATUS.rank_ledgers]
    entries = [entry for ledger in ledgers for entry in ledger.entries]
    found = families["baton_worker_memory_bytes"].samples
    assert sorted(one.value for one in found) == sorted(
        number for entry in entries for number in (entry.planned_bytes, entry.measured_bytes)
    )
    ranks = {one.labels["process"].rpartition("-")[2] for one in found}
    assert {"1", "2"} < ranks


@pytest.mark.parametrize(("path", "field"), all_entries())
def test_the_page_shows_what_has_a_label(path: str, field: FieldEntry) -> None:
    """The page goes through the table that comes with `/cluster`, and names no field that it finds there."""
    page = STATIC_PAGE.read_text()
    assert "for (const field of fields)" in page and "cluster.status_fields" in page
    value = at(path, STATUS)
    if field.about.page is not None and "." not in path:
        assert "{}" in field.about.page
        assert f"status.{field.name}" not in page
        ledger = field.about.unit == "bytes" and hasattr(value, "entries")
        assert field.parts or ledger or isinstance(value, int | float | str), "a kind that the page can show"
    if field.parts:
        assert hasattr(value, "total") and any(part.about.page is not None for part in field.parts)
