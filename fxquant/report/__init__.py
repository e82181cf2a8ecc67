"""What a program's facts say, as JSON values, one self-contained HTML page, and text for terminals and notebooks."""

from __future__ import annotations

from fxquant.report.budget_curve import frontier
from fxquant.report.curve_geometry import HEIGHT, WIDTH, curve
from fxquant.report.html import render, tiles, write_page
from fxquant.report.layers import average_bits, layer_rows, model_bytes, most_sensitive
from fxquant.report.notebook import one_line, page
from fxquant.report.operands import operand_rows
from fxquant.report.page_data import FORMAT_VERSION, content, coverage, overview
from fxquant.report.pictures import FULL_MATRIX, MOST_ROWS, bars, heat_map
from fxquant.report.quantizer_tables import edge_rows, weight_noise
from fxquant.report.rounded_units import rounding
from fxquant.report.speed import comparison, runtime_text, speed_table
from fxquant.report.terminal import COLUMNS, summary, table_text
from fxquant.report.text import bytes_text, count_text, latency_text, limit_text, loss_text, percent_text
