"""A box read in the wrong frame is still a box. Frames are declared, and every text has one reading."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivt_agents.vlm.codec import STOP_TEXT, BoxCodec, parse_action
from ivt_env.text_actions import LONGEST_ANSWER

SIZES = st.tuples(st.integers(28, 2000), st.integers(28, 2000))
BOXES = st.tuples(*[st.floats(0, 1)] * 4)


@given(BOXES, SIZES)
def test_relative_boxes_survive_the_round_trip_to_half_a_thousandth(box, size):
    codec = BoxCodec("relative_1000")
    assert np.abs(np.array(codec.decode(codec.encode(box, size), size)) - box).max() <= 0.0005 + 1e-12


@given(BOXES, SIZES)
def test_pixel_boxes_survive_the_round_trip_to_one_pixel(box, size):
    codec = BoxCodec("resized_pixels")
    height, width = size
    error = np.abs(np.array(codec.decode(codec.encode(box, size), size)) - box)
    assert (error * [width, height, width, height] <= 1 + 1e-9).all()


@given(BOXES, SIZES, st.sampled_from(["relative_1000", "resized_pixels"]))
def test_what_the_codec_writes_the_parser_reads(box, size, frame):
    codec = BoxCodec(frame)
    action = parse_action("Too high; move down.\n" + codec.action_text(box, size))
    assert action.numbers == tuple(codec.encode(box, size)) and not action.stop


def test_the_published_example_decodes_to_its_pixels():
    """VLM-R1's row for image 581857 (427 x 640): solution 103.93, 299.99, 238.15, 477.41."""
    box = BoxCodec("relative_1000").decode((243, 468, 557, 745), (640, 427))
    assert np.allclose(np.array(box) * [427, 640, 427, 640], [103.93, 299.99, 238.15, 477.41], atol=0.7)


def test_an_unknown_frame_is_refused():
    with pytest.raises(ValueError, match="percent"):
        BoxCodec("percent")


def test_a_stop_is_read_with_and_without_words():
    for text in (STOP_TEXT, "The box fits.\n" + STOP_TEXT, '```json\n{"stop": true}\n```'):
        assert parse_action(text).stop and parse_action(text).numbers is None


@pytest.mark.parametrize(
    "text",
    [
        '```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "cup"}]\n```',
        'First {"bbox_2d": [9, 9, 9, 9]}, no: {"bbox_2d": [1, 2, 3, 4]}',
        '{"bbox_2d": [1.0, 2, 3, 4], "stop": false}',
        '{"bbox_2d": [1, 2, 3, 4], "label": "the key marked {Esc}"}',
        '{"label": "the } and the { key, {}", "bbox_2d": [1, 2, 3, 4]}',
        r'{"label": "the \"{\" key, a \\", "bbox_2d": [1, 2, 3, 4]}',
        r'{"label": "{\"stop\": true}", "bbox_2d": [1, 2, 3, 4]}',
        r'{"bbox_2d": [1, 2, 3, 4], "label": "{\"bbox_2d\": [5, 6, 7, 8]}"}',
        '{"label": "grüne Tasse 红色 🟥 {Ü}", "bbox_2d": [1, 2, 3, 4]}',
        '{"label": "two\nlines", "bbox_2d": [1, 2, 3, 4]}',
        '{"bbox_2d": [1, 2, 3, 4], "why": {"rows": [{"x": {}}]}}',
        '{"bbox_2d": [1, 2, 3, 4], "before": {"bbox_2d": [5, 6, 7, 8]}}',
        '{"objects": [{"bbox_2d": [9, 9, 9, 9]}, {"bbox_2d": [1, 2, 3, 4]}]}',
        '{"bbox_2d": [1, 2, 3, 4]} {"note": "fits"} {}',
        '{"bbox_2d": [1, 2, 3, 4]}\n{"bbox_2d": [5, 6, 7',
        '{"stop": true} {"bbox_2d": [1, 2, 3, 4]} {"stop": tr',
        '{"objects": [{"bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": [5, 6',
        'It is {"Esc} that is meant: {"bbox_2d": [1, 2, 3, 4]}',
        'The "{" key, the \'{"\' key, C:\\{"bbox_2d": [1, 2, 3, 4]} }}"',
        '{"' * 1001 + '{"bbox_2d": [1, 2, 3, 4]}' + '{"' * 1001,
        '{"a":' * 5000 + '{"bbox_2d": [1, 2, 3, 4]}' + "}" * 5000,
        '{"bbox_2d": [1, 2, 3, 4]}' + '{"a":' * 5000,
        '{"x": ' + "[" * 5000 + "]" * 5000 + '} {"bbox_2d": [1, 2, 3, 4]}',
        '{"bbox_2d": [1, 2, 3, 4], "id": ' + "9" * 10_000 + "}",
        "x" * 100_000 + '{"bbox_2d": [1, 2, 3, 4]}',
    ],
)
def test_the_last_complete_object_counts_whatever_is_around_it_and_in_its_strings(text):
    assert parse_action(text).numbers == (1, 2, 3, 4)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I cannot see it.",
        "[1, 2, 3, 4]",
        '{"bbox_2d": [1, 2, 3]}',
        '{"bbox_2d": [1, 2, 3, "4"]}',
        '{"bbox_2d": [1, 2, 3, NaN]}',
        '{"bbox_2d": [1, 2, 3, true]}',
        '{"bbox_2d": [1, 2, 3, 4], "stop": true}',
        '{"stop": "true"}',
        '{"stop": false}',
        '{"bbox_2d": [1, 2, 3, 4',
        '{"box": [1, 2, 3, 4]}',
        '{"bbox_2d": {"x": 1}}',
        '{"bbox_2d": [1, 2, 3, 4]} {"bbox_2d": "none"}',
        r'{"label": "{\"stop\": true}"}',
        '{"bbox_2d": [1, 2, 3, ' + "9" * 10_000 + "]}",
        '{"bbox_2d": [1, 2, 3, 1e999]}',
        '{"a":' * 5000 + "}" * 5000,
    ],
)
def test_anything_else_is_a_failure_and_never_a_guess(text):
    assert parse_action(text).failed


NESTED = ['{"a":', '{"', "[", '{"a":[1,1,', '\\"', '{"a":{"b":1},"c":', '{"\\"', "9"]


@pytest.mark.parametrize("part", NESTED)
def test_reading_takes_time_in_proportion_to_the_length(part):
    """Measured: at most 0.3 s for 60,000 characters."""
    action = '{"bbox_2d": [1, 2, 3, 4]}'
    text = action + part * (LONGEST_ANSWER // len(part))
    begun = time.process_time()
    parse_action(text)
    assert parse_action(text[len(action) :] + action).numbers == (1, 2, 3, 4)
    assert time.process_time() - begun < 3
