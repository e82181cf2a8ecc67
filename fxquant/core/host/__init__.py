"""The machine that fxquant runs on: clock, memory, progress display, worker processes."""

from __future__ import annotations

from fxquant.core.host.markup import ROWS, STYLE, card, line, printable, table, text, tiles
from fxquant.core.host.memory import give_back, is_shortage, memory_named
from fxquant.core.host.processor import cpu_model, int8_instructions, machine
from fxquant.core.host.progress import SILENT, Reporter, seconds_text
from fxquant.core.host.shards import ALONE, Shards
from fxquant.core.host.timing import Speed, Timing, sample_interleaved, time_runs, warn_if_busy
from fxquant.core.host.timing_cache import TimingCache, cache_folder
