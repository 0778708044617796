"""Guests for the tests of this level."""

import pytest

from tests.kernel.build import Images, MissingError, images
from tests.kernel.frozen import FrozenNode, frozen_node


@pytest.fixture(scope="session")
def guest_images() -> Images:
    try:
        return images()
    except MissingError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def frozen(guest_images: Images) -> FrozenNode:
    """What machines with a node in them go on from."""
    return frozen_node(guest_images)
