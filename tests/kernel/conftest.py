"""Guests for the tests of this level."""

import pytest

from tests.kernel.build import Images, MissingError, images


@pytest.fixture(scope="session")
def guest_images() -> Images:
    try:
        return images()
    except MissingError as error:
        pytest.skip(str(error))
