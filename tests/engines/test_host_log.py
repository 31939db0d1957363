"""The last error of a host, out of what it printed."""

import os

import pytest

from inference_service.engines.host_log import HostLog

VLLM = "(EngineCore pid=7) ERROR 11-22 14:58:21 [core.py:1454] "


def log_of(*lines: str) -> HostLog:
    log = HostLog("m")
    os.write(log.writer, "\n".join(lines).encode() + b"\n")
    log.close()
    return log


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ([], None),
        (["INFO:     Started server process [7]"], None),
        (
            ["Traceback (most recent call last):", "  raise X", "KeyError: 'hidden_size'"],
            "KeyError: 'hidden_size'",
        ),
        ([VLLM + "ValueError: truncated", VLLM + "torch.OutOfMemoryError: 3 GiB"], "OutOfMemoryError: 3 GiB"),
        (
            [
                VLLM + "safetensors_rust.SafetensorError: header too small",
                "RuntimeError: Engine core initialization failed. See root cause above.",
            ],
            "SafetensorError: header too small",
        ),
        (
            ["RuntimeError: Engine core initialization failed. See"],
            "RuntimeError: Engine core initialization failed. See",
        ),
        (
            ["ValidationError: 1 problem", "  Value error, no_such [type=value_error, input=5]", "after"],
            "ValidationError: 1 problem Value error, no_such",
        ),
        (["KeyboardInterrupt"], "KeyboardInterrupt"),
        (["0% Error: done", "no ValueError: here"], None),
    ],
)
def test_last_error(lines: list[str], error: str | None) -> None:
    assert log_of(*lines).last_error() == error


def test_lines_are_tagged_and_keep_their_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    log_of(VLLM + "boom", "INFO:     fine", "plain", "10%\r50%\r100%\r", "\x00\xff")
    shown = [(record.levelname, record.message, record.model) for record in caplog.records]  # type: ignore[attr-defined]
    assert shown[:4] == [
        ("ERROR", "boom", "m"),
        ("INFO", "fine", "m"),
        ("INFO", "plain", "m"),
        ("INFO", "100%", "m"),
    ]
    assert caplog.records[0].program == "EngineCore"  # type: ignore[attr-defined]


def test_a_line_without_end_is_bounded() -> None:
    log = HostLog("m")
    os.set_blocking(log.writer, False)
    os.write(log.writer, b"x" * 60_000)
    log.close()
    assert max(map(len, log._lines)) <= 16_384
