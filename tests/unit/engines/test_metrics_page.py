"""Counters of a Prometheus page: the text format's own corners."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lkspec.engines.vllm_api import counters

PAGE = r"""
# HELP vllm:drafts_total Number of drafts.
# TYPE vllm:drafts_total counter
vllm:drafts_total{engine="0",model_name="a \"quoted\" {name}"} 3.0
vllm:drafts_total{engine="1",model_name="a \"quoted\" {name}"} 4.0 1795333800000
vllm:drafts_created{engine="0"} 1.7953338003282106e+09
vllm:drafts_other_total{engine="0"} 100.0
bare 2
vllm:per_pos_total{engine="0",position="1"} 1.0
vllm:per_pos_total{engine="0",position="0"} 5.0
vllm:per_pos_total{position="0",engine="1"} 2e1
"""


def test_engines_are_summed_and_other_names_are_not():
    assert counters(PAGE, "vllm:drafts") == {"": 7.0}
    assert counters(PAGE, "bare") == {"": 2.0}
    assert counters(PAGE, "vllm:draft") == {}


def test_counts_by_a_label():
    assert counters(PAGE, "vllm:per_pos", label="position") == {"0": 25.0, "1": 1.0}
    assert counters(PAGE, "absent", label="position") == {}


@given(st.lists(st.tuples(st.text(st.characters(codec="utf-8", exclude_characters="\n\r")), st.integers(0, 2**50))))
def test_any_label_text(values):
    """Written as the format wants it: backslash, quote and line feed escaped."""
    escaped = [(text.replace("\\", r"\\").replace('"', r"\""), value) for text, value in values]
    page = "\n".join(
        f'n_total{{position="{number}",m="{text}"}} {value}' for number, (text, value) in enumerate(escaped)
    )
    assert dict(counters(page, "n", label="position")) == {str(n): value for n, (_, value) in enumerate(values)}
