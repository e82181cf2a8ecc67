from __future__ import annotations

import errno
import os
import zipfile
from pathlib import Path

import pytest
import torch

from fxquant.core.errors import OutputError
from fxquant.core.storage import load_exported, save_exported
from tests.small import images, small


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    return torch.export.export(small(), (images(2),))


def test_round_trip_without_example_inputs(program: torch.export.ExportedProgram, tmp_path: Path) -> None:
    save_exported(program, tmp_path / "new" / "net.pt2")
    found = load_exported(tmp_path / "new" / "net.pt2")
    assert torch.equal(found.module()(images(2)), small()(images(2)))
    assert found.example_inputs is None
    # The caller's program is as it was.
    assert program.example_inputs is not None
    with zipfile.ZipFile(tmp_path / "new" / "net.pt2") as archive:
        assert not any("sample_inputs" in name and archive.read(name) for name in archive.namelist())


def test_a_full_disk_is_an_error_and_torch_never_sees_it(
    program: torch.export.ExportedProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    # Torch's own writer would end the process: it may only be given memory.
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match=r"net\.pt2: No space left on device after 0 bytes"):
        save_exported(program, tmp_path / "net.pt2")
    assert list(tmp_path.iterdir()) == []
