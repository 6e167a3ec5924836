"""Requests to stop: the first asks, a second Ctrl+C insists, and earlier handlers come back."""

from __future__ import annotations

import os
import signal

import pytest
from indomain_guidance.training.engine.signals import StopRequest

posix = pytest.mark.skipif(os.name == "nt", reason="Windows cannot send itself these signals")


def receive(number: int) -> None:
    """Deliver a signal to this process; on POSIX its handler has run when the call returns."""
    signal.raise_signal(number)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", pytest.param("SIGHUP", marks=posix)])
def test_first_signal_is_a_question_answered_with_yes(name):
    number, told = getattr(signal, name), []
    with StopRequest(told.append) as request:
        assert not request() and request.exit_code == 0
        receive(number)
        assert request() and request.number == number and told == [number]
        assert request.exit_code == 128 + number


def test_second_ctrl_c_does_not_wait_and_a_second_sigterm_does(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with StopRequest() as request:
        receive(signal.SIGTERM)
        receive(signal.SIGTERM)
        receive(signal.SIGINT)  # a launcher that passes both on
        assert request.number == signal.SIGTERM
    with pytest.raises(KeyboardInterrupt), StopRequest():
        receive(signal.SIGINT)
        receive(signal.SIGINT)


def test_one_of_several_processes_waits_however_often_it_is_told(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with StopRequest() as request:
        receive(signal.SIGINT)
        receive(signal.SIGINT)
    assert request.exit_code == 130


def test_earlier_handlers_come_back_and_nohup_is_respected():
    earlier = signal.getsignal(signal.SIGINT)
    with StopRequest():
        assert signal.getsignal(signal.SIGINT) != earlier
    assert signal.getsignal(signal.SIGINT) == earlier
    if hasattr(signal, "SIGHUP"):
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with StopRequest() as request:
                receive(signal.SIGHUP)
                assert not request()
        finally:
            signal.signal(signal.SIGHUP, before)
