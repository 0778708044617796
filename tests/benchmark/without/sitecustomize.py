"""Python runs this in every process of the server that `complications` starts: take out what the environment names."""

import os

from tests.benchmark.taking_out import COMPLICATIONS, VARIABLE

COMPLICATIONS[os.environ[VARIABLE]].take_out()
