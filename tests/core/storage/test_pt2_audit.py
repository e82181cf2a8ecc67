"""What a `.pt2` file could run while torch loads it, tried with files that would do so."""

from __future__ import annotations

import copy
import io
import json
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from fxquant.core.errors import FileFormatError
from fxquant.core.storage import LONGEST, is_arithmetic, is_operator, load_exported
from tests.readers import Evil
from tests.small import small

MODEL, SAMPLES = "net/models/model.json", "net/data/sample_inputs/model.pt"
WEIGHTS, CONSTANTS = "net/data/weights/model_weights_config.json", "net/data/constants/model_constants_config.json"
MARK = "MARK"
"""Stands for the folder that an attack would make, until a test knows its own."""

Entries = dict[str, bytes]
Attack = Callable[[Entries, Path], None]


def pickled(mark: Path) -> bytes:
    stream = io.BytesIO()
    torch.save(Evil(mark), stream)
    return stream.getvalue()


@cache
def intact() -> Entries:
    """Return the entries of an exported network as torch writes them."""
    stream = io.BytesIO()
    program = torch.export.export(small(), (torch.randn(2, 1, 8, 8),), dynamic_shapes=({0: Dim.AUTO},))
    torch.export.save(program, stream)
    with zipfile.ZipFile(stream) as archive:
        # Torch calls the root after the file, and a stream has no name.
        return {f"net/{name.partition('/')[2]}": archive.read(name) for name in archive.namelist()}


def write(entries: Entries, path: Path, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


def edited(entries: Entries, name: str, change: Callable[[Any], None]) -> None:
    document = json.loads(entries[name])
    change(document)
    entries[name] = json.dumps(document).encode()


def in_model(change: Callable[[Any, str], None]) -> Attack:
    return lambda entries, mark: edited(entries, MODEL, lambda document: change(document, str(mark)))


def in_graph(change: Callable[[Any, str], None]) -> Attack:
    return in_model(lambda document, mark: change(document["graph_module"]["graph"], mark))


def pickled_weight(entries: Entries, mark: Path) -> None:
    def change(document: Any) -> None:
        document["config"]["head.bias"]["use_pickle"] = True

    edited(entries, WEIGHTS, change)
    entries["net/data/weights/weight_5"] = pickled(mark)


def pickled_constant(name: str) -> Attack:
    def attack(entries: Entries, mark: Path) -> None:
        weight = json.loads(entries[WEIGHTS])["config"]["head.bias"]

        def change(document: Any) -> None:
            document["config"]["c"] = {**weight, "path_name": name, "use_pickle": True}

        edited(entries, CONSTANTS, change)
        plain = f"cos\nmkdir\n(S'{mark}'\ntR.".encode()
        entries[f"net/data/constants/{name}"] = plain if name.startswith("opaque") else pickled(mark)

    return attack


def put(name: str) -> Attack:
    def attack(entries: Entries, mark: Path) -> None:
        entries[name] = pickled(mark)

    return attack


def expression(text: str) -> Attack:
    def change(graph: Any, mark: str) -> None:
        graph["tensor_values"]["x"]["sizes"][0]["as_expr"]["expr_str"] = text.replace(MARK, mark)

    return in_graph(change)


def operator(target: str) -> Attack:
    def change(graph: Any, mark: str) -> None:
        argument = {"name": "x", "arg": {"as_string": mark}, "kind": 1}
        graph["nodes"].append({**graph["nodes"][1], "target": target, "inputs": [argument]})

    return in_graph(change)


def name_of_an_input(graph: Any, mark: str) -> None:
    graph["inputs"][-1]["as_tensor"]["name"] = f"x=__import__('os').mkdir({mark!r})"


def name_of_an_argument(document: Any, mark: str) -> None:
    signature = document["graph_module"]["module_call_graph"][0]["signature"]
    signature["forward_arg_names"] = [f"x=__import__('os').mkdir({mark!r})"]


def endless_counter(document: Any, _: str) -> None:
    document["range_constraints"]["u99999999999"] = {"min_val": 0, "max_val": None}


def spread_weight(entries: Entries, _: Path) -> None:
    def change(document: Any) -> None:
        meta = document["config"]["head.bias"]["tensor_meta"]
        meta["sizes"], meta["strides"] = [{"as_int": 10**13}], [{"as_int": 0}]

    edited(entries, WEIGHTS, change)


def deep(entries: Entries, _: Path) -> None:
    entries[MODEL] = b"[" * 200_000


def old_format(entries: Entries, mark: Path) -> None:
    model = entries[MODEL]
    version = json.loads(model)["schema_version"]
    entries.clear()
    entries["version"] = f"{version['major']}.{version['minor']}".encode()
    entries["serialized_exported_program.json"] = model
    for name in ("state_dict", "constants", "example_inputs"):
        entries[f"serialized_{name}.pt"] = pickled(mark)


ATTACKS: dict[str, Attack] = {
    "pickled weight": pickled_weight,
    "pickled constant": pickled_constant("tensor_0"),
    "opaque object": pickled_constant("opaque_obj_0"),
    "script object": pickled_constant("custom_obj_0"),
    "example inputs": put(SAMPLES),
    "old weights": put("net/data/weights/model.pt"),
    "old constants": put("net/data/constants/model.pt"),
    "old format": old_format,
    "size expression": expression("__import__('os').mkdir('MARK')"),
    "quoted size expression": expression('Add(\'__import__("os").mkdir("MARK")\', 1)'),
    "endless size expression": expression("9**9**9**9"),
    "endless power": expression("Pow(Integer(99), Integer(999999999))"),
    "operator of a module": operator("torch.os.mkdir"),
    "operator of files": operator("torch.ops.aten.from_file.default"),
    "operator that is none": operator("torch.ops.load_library"),
    "name of an input": in_graph(name_of_an_input),
    "name of an argument": in_model(name_of_an_argument),
    "endless counter": in_model(endless_counter),
    "weight of terabytes": spread_weight,
    "nested without end": deep,
    "machine code": put("net/data/aotinductor/model/model.so"),
    "second model": put("net/models/other.json"),
    "entry of no kind": put("net/other"),
    "second root": put("other/models/model.json"),
    "name that leads outside": put("net/extra/../../../outside"),
    "absolute name": put("/net/extra/outside"),
    "name with a line": put("net/extra/a\nb"),
    "same name in capitals": put("net/MODELS/MODEL.JSON"),
}

RUN = (
    *("pickled weight", "pickled constant", "opaque object", "example inputs", "old weights"),
    *("old format", "size expression"),
)
"""Attacks that run when torch alone reads the file and its graph is made."""


@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_of_the_files_own_is_run(name: str, tmp_path: Path) -> None:
    entries, mark = copy.copy(intact()), tmp_path / "mark"
    ATTACKS[name](entries, mark)
    path = write(entries, tmp_path / "net.pt2")
    with pytest.raises(FileFormatError, match=r"net\.pt2 "):
        load_exported(path)
    assert not mark.exists()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RUN)
def test_the_attacks_are_real(name: str, tmp_path: Path) -> None:
    entries, mark = copy.copy(intact()), tmp_path / "mark"
    ATTACKS[name](entries, mark)
    with suppress(Exception):
        # Most fail after the deed is done.
        torch.export.load(write(entries, tmp_path / "net.pt2")).module(check_guards=False)(torch.zeros(1, 1, 8, 8))
    assert mark.exists()


def test_an_archive_as_no_writer_makes_it(tmp_path: Path) -> None:
    entries, path = intact(), tmp_path / "net.pt2"
    with pytest.raises(FileFormatError, match="compressed entries"):
        load_exported(write(entries, path, zipfile.ZIP_DEFLATED))
    write(entries, path)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr(MODEL, b"{}")
    with pytest.raises(FileFormatError, match="two entries of one name"):
        load_exported(path)
    with pytest.raises(FileFormatError, match="no plain file"):
        load_exported(tmp_path)


class Sized(nn.Module):
    """Sizes of every kind: halves, sums, products of the batch with others."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        joined = torch.cat([x, y.repeat(1, 1, 2, 2)], 2)
        pooled = nn.functional.avg_pool2d(joined, 2, ceil_mode=True)
        return pooled.reshape(x.shape[0] * pooled.shape[2], -1) * (x.shape[3] // 2 + 1)


def test_what_networks_are_made_of_is_read(tmp_path: Path) -> None:
    free: dict[int, Any] = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
    x, y = torch.randn(2, 3, 12, 8), torch.randn(2, 3, 6, 4)
    torch.export.save(torch.export.export(Sized(), (x, y), dynamic_shapes=(free, free)), tmp_path / "net.pt2")
    read = load_exported(tmp_path / "net.pt2")
    assert torch.equal(read.module()(x, y), Sized()(x, y))


ARITHMETIC = ["s77", "Symbol('s77', positive=True, integer=True)", "2*s1 + 3*(s2//4)", "s1**2"]
ARITHMETIC += ["Add(Mul(Integer(2), Symbol('s3', integer=True)), Integer(-1))"]
ARITHMETIC += [
    "Pow(Symbol('s3', positive=True, integer=True), Integer(2))",
    "FloorDiv(Symbol('s3', integer=True), Integer(2))",
]
OTHER_TEXTS = ["s1**s2", "2**22", "s1.__class__", "open", "lambda x: x", "[s1]", "s1;s2", "'a b'", "9" * 30]
OTHER_TEXTS += ["s1+" * LONGEST + "s1"]
OPERATORS = ["torch.ops.aten.conv2d.default", "torch.ops.higher_order.cond", "torch.sym_max", "_operator.floordiv"]
OTHER_TARGETS = ["_operator.methodcaller", "torch.ops.aten.add", "torch.ops.aten.no_such.default", "torch.load"]
OTHER_TARGETS += ["torch.ops.aten.from_file.default", "torch.ops.aten.add.default.__init__.__globals__"]
OTHER_TARGETS += ["math.perm", "os.system"]


def test_size_expressions() -> None:
    assert [text for text in ARITHMETIC + OTHER_TEXTS if is_arithmetic(text)] == ARITHMETIC


def test_operators() -> None:
    assert [target for target in OPERATORS + OTHER_TARGETS if is_operator(target)] == OPERATORS
