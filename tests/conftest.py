"""What several test files need."""

import gc
import os

import pytest

from helpers.files import BadInput
from helpers.view import browser


def pytest_collection_finish() -> None:
    """What the tests have imported stays: a collection need not go through it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def program() -> str:
    """Chromium, which draws the pictures."""
    try:
        return browser.chromium()
    except BadInput:
        if os.environ.get("CI"):
            raise
        pytest.skip("2026-11-23: no Chromium on this machine; CI installs it and fails without it")
