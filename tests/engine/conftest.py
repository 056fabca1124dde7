"""Tests of kernels run in Triton's interpreter, beside this process."""

from collections.abc import Iterator

import pytest

from tests.engine.interpreter import INTERPRETED, Interpreter


@pytest.fixture(scope="session", autouse=True)
def interpreter(request: pytest.FixtureRequest) -> Iterator[Interpreter]:
    wanted = [item for item in request.session.items if item.get_closest_marker("interpreted")]
    child = Interpreter(sorted({item.nodeid.partition("::")[0] for item in wanted}))
    yield child
    child.close()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if INTERPRETED or pyfuncitem.get_closest_marker("interpreted") is None:
        return None
    child: Interpreter = pyfuncitem._request.getfixturevalue("interpreter")
    wrong = child.run(pyfuncitem.nodeid)
    if wrong:
        pytest.fail(wrong, pytrace=False)
    return True
