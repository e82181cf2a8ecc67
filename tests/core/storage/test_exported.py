from __future__ import annotations

import errno
import os
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from fxquant.core.errors import OutputError
from fxquant.core.storage import StoredProgram, load_exported
from tests.small import images, small


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    return torch.export.export(small(), (images(2),))


def test_round_trip_without_example_inputs(program: torch.export.ExportedProgram, tmp_path: Path) -> None:
    StoredProgram.of(program).save(tmp_path / "new" / "net.pt2")
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
        StoredProgram.of(program).save(tmp_path / "net.pt2")
    assert list(tmp_path.iterdir()) == []


def test_the_description_is_that_of_the_first_moment(tmp_path: Path) -> None:
    shapes = ({0: torch.export.Dim.AUTO},)
    stored = StoredProgram.of(torch.export.export(small(), (images(2),), dynamic_shapes=shapes))
    for node in stored.exported.graph.nodes:
        if node.op == "placeholder" and not isinstance(node.meta["val"].shape[0], int):
            # Whoever asks a traced value for its size as a number fixes it in the whole program.
            assert int(node.meta["val"].shape[0]) == 2
    stored.save(tmp_path / "net.pt2")
    found = StoredProgram.load(tmp_path / "net.pt2")
    assert found.description == stored.description
    assert found.exported.module()(images(5)).shape[0] == 5
    assert list(found.exported.state_dict) == list(stored.exported.state_dict)
    for name, value in stored.exported.state_dict.items():
        assert torch.equal(found.exported.state_dict[name], value)
        assert type(found.exported.state_dict[name]) is type(value)


class Unknown(dict[str, torch.Tensor]):
    """A container that torch flattens and cannot name in a file."""


torch.utils._pytree.register_pytree_node(
    Unknown, lambda d: (list(d.values()), list(d)), lambda values, keys: Unknown(zip(keys, values, strict=True))
)


class Answer(nn.Module):
    def forward(self, x: torch.Tensor) -> Unknown:
        return Unknown(twice=2 * x)


def test_what_torch_cannot_write_is_said_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stored = StoredProgram.of(torch.export.export(Answer(), (images(2),)))
    assert "its result cannot be saved" in caplog.text
    assert torch.equal(stored.exported.module()(images(2))["twice"], 2 * images(2))
    with pytest.raises(OutputError, match="torch cannot store this model"):
        stored.save(tmp_path / "net.pt2")
