"""Every law of an encoding holds for torch's tables and for the compiled kernels."""

from collections.abc import Iterator

import pytest

from moeglot.kernels import backend


@pytest.fixture(scope="module", params=backend.NAMES)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels that a module's tests compute with, one after the other."""
    if request.param == "numba" and not backend.installed():
        pytest.skip("numba is not installed")
    with backend.using(request.param):
        yield request.param
