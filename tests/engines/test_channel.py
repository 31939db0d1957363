"""Whole messages over a stream, however it cuts them, and the descriptors that belong to them."""

import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from inference_service.engines.channel import Channel


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    ours, theirs = Channel.pair()
    other = Channel(theirs)
    yield ours, other
    ours.close()
    other.close()


def received(channel: Channel, count: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while len(found) < count:
        found += channel.receive() or []
    return found


def test_messages_stay_apart_and_in_order(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    sent = [{"number": number, "text": "é\n" * number} for number in range(200)]
    for message in sent:
        ours.send(message)
    assert received(theirs, 200) == sent


def test_a_message_that_comes_in_pieces(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    raw = socket.socket(fileno=os.dup(ours.fileno()))
    raw.send(b'{"a": ')
    assert theirs.receive() == []
    raw.send(b'1}\n{"b"')
    assert theirs.receive() == [{"a": 1}]
    raw.send(b": 2}\n")
    assert theirs.receive() == [{"b": 2}]
    raw.close()


def test_descriptors_belong_to_their_messages(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    pipes = [os.pipe() for _ in range(3)]
    for number, pair in enumerate(pipes):
        ours.send({"between": number})
        ours.send({"launch": number}, pair)
    found: list[tuple[int, list[int]]] = []
    while len(found) < 3:
        launches = [message["launch"] for message in theirs.receive() or [] if "launch" in message]
        found += [(number, theirs.descriptors(2)) for number in launches]
    for number, (reader, writer) in found:
        os.write(writer, b"%d" % number)
        assert os.read(pipes[number][0], 9) == b"%d" % number
        for descriptor in (reader, writer, *pipes[number]):
            os.close(descriptor)


def test_an_end_that_is_closed_or_never_reads(ends: tuple[Channel, Channel]) -> None:
    ours, _ = ends
    ours.setblocking(False)
    with pytest.raises(BlockingIOError):
        ours.receive()

    def fill() -> None:
        for _ in range(10_000):
            ours.send({"text": "x" * 9_000})

    with pytest.raises((BlockingIOError, ConnectionResetError)):
        fill()
    other, end = Channel.pair()
    end.close()
    assert other.receive() is None
    other.close()
