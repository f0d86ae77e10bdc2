"""What the log file keeps of what a terminal shows."""

from __future__ import annotations

import pytest

from bigtrain.launch.output import final_text


@pytest.mark.parametrize(
    ("printed", "kept"),
    [
        (b"plain text", b"plain text"),
        (b"  indented", b"  indented"),
        (b"", b""),
        (b"\x1b[1;32mgreen\x1b[0m text", b"green text"),
        (b"\x1b[38;2;1;2;3mrgb\x1b[m", b"rgb"),
        (b"\x1b[?25lhidden cursor\x1b[?25h", b"hidden cursor"),
        (b"\x1b[2K\x1b[1Aredrawn", b"redrawn"),
        (b"10%\r50%\r100%", b"100%"),
        (b"10%\r100%\r", b"100%"),
        (b"line of a terminal\r", b"line of a terminal"),
        (b"\r\r", b""),
        (b"bar 1\r\x1b[2Kbar 2\r\x1b[2K", b"bar 2"),
        ("é 😀".encode(), "é 😀".encode()),
        (b"\xff\xfe not UTF-8", b"\xff\xfe not UTF-8"),
        (b"array[0] = (1, 2) [~]", b"array[0] = (1, 2) [~]"),
        pytest.param(b"a\x1b]0;title\x07b", b"ab"),
        pytest.param(b"\x1b]8;id=1;http://x\x1b\\link\x1b]8;;\x1b\\", b"link"),
        pytest.param(b"\x1b(Btext\x1b7\x1b8", b"text"),
    ],
)
def test_final_text(printed: bytes, kept: bytes) -> None:
    assert final_text(printed) == kept
