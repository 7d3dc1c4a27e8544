from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rl.utils.heartbeat import Heartbeat, read_beats


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"process": "engine-1"}', b"\xff" * 10, b" " * 5000])
def test_a_file_that_holds_no_beat_is_left_out(tmp_path: Path, content: bytes) -> None:
    Heartbeat(tmp_path, "engine-0", "node").write("generate", "")
    (tmp_path / "engine-1.json").write_bytes(content)
    assert [(beat.process, beat.call) for beat in read_beats(tmp_path)] == [("engine-0", "generate")]


def test_a_beat_that_cannot_be_written_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beat = Heartbeat(tmp_path, "engine-0", "node")

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    beat.write("generate", "")
    assert [beat.call for beat in read_beats(tmp_path)] == ["idle"]
