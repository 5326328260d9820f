"""A pickle from a stranger gives plain data or an error, and never runs anything.

Silent when false: a pickle from a mirror runs code with the user's rights, and an expression loses
its accents.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from refer_layout import python2_pickle

from ivt_env.data import DataError
from ivt_env.data.refer import read_pickle

PLAIN = [
    {"ref_id": number, "sent_ids": [number], "split": "train", "sentences": [{"sent": "the café", "sent_id": number}]}
    for number in range(3)
]


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "refs(umd).p"


class Attack:
    """Creates a file when unpickled by ``pickle.load``."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", [PLAIN, {}, [], "refs", 7, None, [1.5, True, (2, b"x"), {3}]])
def test_plain_data_are_read_in_every_protocol(path, protocol, value):
    if protocol < 4 and (isinstance(value, list) and value[-1:] == [{3}]):
        value = value[:-1] if protocol > 2 else value[:2]  # sets, and before that bytes, were calls
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    assert read_pickle(path) == value


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_that_tries_to_run_code_runs_nothing_and_is_named(path, tmp_path, protocol):
    target = tmp_path / "was-run"
    payload = pickle.dumps([*PLAIN, Attack(target)], protocol=protocol)
    pickle.loads(payload)
    assert target.exists(), "the attack must work on an unguarded reader, or this test shows nothing"
    target.unlink()
    path.write_bytes(payload)
    with pytest.raises(DataError, match=r"refs\(umd\)\.p: refused, .*can run code. Nothing was run"):
        read_pickle(path)
    assert not target.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x80\x02X\x03\x00\x00\x00abcQ.", "refused, .*outside object 'abc'"),
        (b"\x80\x02\x82\x01.", "not a whole pickle"),  # EXT1, a registered extension
        (pickle.dumps([{"ref_id": np.int64(0)}]), "numpy.*save it again as plain lists"),
        *(
            (pickle.dumps(PLAIN, protocol=2)[:cut], "not a whole pickle .*unpack the data set again")
            for cut in (0, 1, -1)
        ),
    ],
)
def test_what_is_no_plain_data_or_not_whole_is_refused_and_named(path, content, said):
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"refs\(umd\)\.p: .*{said}"):
        read_pickle(path)


@pytest.mark.parametrize("encoding", ["utf-8", "latin1"])
def test_python_2_pickles_keep_their_accents(path, encoding):
    path.write_bytes(python2_pickle(PLAIN, encoding))
    assert read_pickle(path) == PLAIN


def test_pickle_that_is_missing_or_a_folder_is_named(path):
    with pytest.raises(DataError, match=r"refs\(umd\)\.p: cannot be read .*; unpack the data set again"):
        read_pickle(path)
    path.mkdir()
    with pytest.raises(DataError, match=r"refs\(umd\)\.p: cannot be read .*; unpack the data set again"):
        read_pickle(path)


def test_any_damaged_pickle_gives_data_or_a_data_error(path):
    whole = np.frombuffer(pickle.dumps(PLAIN, protocol=2), np.uint8)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = whole.copy()
        damaged[rng.integers(len(damaged), size=3)] = rng.integers(256, size=3)
        path.write_bytes(damaged.tobytes())
        try:
            read_pickle(path)
        except DataError as error:
            assert "refs(umd).p" in str(error)
            refused += 1
    assert refused > 50
