"""A wait is said where it takes long, and only then."""

import threading

import pytest

from mealfast.machine import waiting as module
from mealfast.machine.waiting import waiting


@pytest.fixture
def said(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    monkeypatch.delenv("RANK", raising=False)
    return []


def block(said, long, **options):
    done = threading.Event()
    with waiting("looking", lambda text: (said.append(text), done.set()), **options):
        if long:
            done.wait(0.4)
    done.wait(0.2)
    return said


def test_a_long_wait_is_said_once(said):
    assert block(said, True) == ["looking ..."]


def test_a_short_one_is_not_nor_one_that_failed(said):
    assert block(said, False) == []
    with pytest.raises(KeyError), waiting("failing", said.append):
        raise KeyError
    threading.Event().wait(0.15)
    assert said == []


def test_only_the_first_process_says_it(said, monkeypatch):
    assert block(said, True, enabled=False) == []
    monkeypatch.setenv("RANK", "1")
    assert block(said, True) == []
