"""Files: atomic writes, packed weights, strict codecs, resumable cells, staged folders, exported programs."""

from __future__ import annotations

from fxquant.core.storage.cells import Arrays, ScoreStore
from fxquant.core.storage.codecs import (
    checked_document,
    pack_arrays,
    parse_json,
    read_array,
    read_arrays,
    read_json,
    read_tensors,
    tensor_digest,
    text_digest,
    unpack_arrays,
    write_arrays,
    write_json,
    write_json_once,
    write_tensors,
)
from fxquant.core.storage.exported import StoredProgram, load_exported
from fxquant.core.storage.files import UNFINISHED, atomic_path, check_writable, flush_to_disk, unwritable, work_folder
from fxquant.core.storage.lock import HOLDER, LOCK, only_writer
from fxquant.core.storage.packing import Layout, Packed, Part, layout_of, pack, packed_bytes, unpack
from fxquant.core.storage.pt2_audit import LONGEST, is_arithmetic, is_operator
from fxquant.core.storage.staging import OUTPUT, READY, RESULT, finish, staged, sweep
from fxquant.core.storage.symbols import CODES, Code, code_for
