"""An opened table is a view of the index on disk: processes share it, and none gets other samples.

Silent when false: every worker of a data loader holds a copy of 80,000 expressions, opening takes a
minute, or a worker that starts after a rebuild trains on other samples than its parent counts.
"""

from __future__ import annotations

import multiprocessing
import pickle
import time
import tracemalloc

import pyarrow as pa
import pytest
from made_up_source import MadeUp, read_in_another_process, refuse_writing, write_made_up

from ivt_env.data import DataError
from ivt_env.data import table as module
from ivt_env.data.table import open_table

pytestmark = pytest.mark.usefixtures("private_machine")


@pytest.fixture
def made(tmp_path) -> MadeUp:
    return write_made_up(tmp_path / "root")


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> MadeUp:
    """20,015 expressions, opened once."""
    made = write_made_up(tmp_path_factory.mktemp("large"))
    made.many(20_000)
    made.save()
    open_table(made.source(), "train")
    return made


def test_opening_20000_expressions_is_quick_and_makes_no_samples(large, monkeypatch):
    built = []
    monkeypatch.setattr(module, "Sample", lambda **fields: built.append(fields))
    start = time.perf_counter()
    table = open_table(large.source(), "train")
    seconds = time.perf_counter() - start
    assert (len(table), large.reads, built) == (20_009, 1, [])
    assert seconds < 2
    assert table[20_000] is None and len(built) == 1


def test_opened_and_received_tables_map_the_index_and_copy_nothing(large):
    sent = pickle.dumps(open_table(large.source(), "train"))
    assert len(sent) < 4096
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    tables = [open_table(large.source(), "train"), pickle.loads(sent)]
    in_arrow, in_python = pa.total_allocated_bytes() - before, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert large.index.stat().st_size > 2_000_000
    assert in_arrow < 100_000 and in_python < 200_000
    assert all(table[20_000].expression == "thing 19991" for table in tables)


def test_processes_opened_on_one_table_see_equal_samples_and_images(made):
    table = open_table(made.source(), "train")
    expected = read_in_another_process(table)
    assert len(pickle.dumps(table)) < 4096, "it travels without the images that it has read"
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.map(read_in_another_process, [table] * 4, chunksize=1)
    assert found == [expected] * 4
    assert made.reads == 1


def test_table_without_an_index_on_disk_travels_with_its_samples(made, monkeypatch, tmp_path):
    refuse_writing(monkeypatch, tmp_path)
    table = open_table(made.source(), "train")
    assert list(pickle.loads(pickle.dumps(table))) == list(table)


def test_table_sent_before_its_files_changed_is_refused_where_it_arrives(made):
    sent = pickle.dumps(open_table(made.source(), "train"))
    made.index.unlink()
    with pytest.raises(DataError, match=r"made-up-layout\.arrow: the index of made-up.* cannot be read any more"):
        pickle.loads(sent)
    open_table(made.source(), "train")
    assert len(pickle.loads(sent)) == 9, "an index built again from the same files is as good"
    made.texts["p0-0"] = "something else"
    made.save()
    open_table(made.source(), "train")
    with pytest.raises(DataError, match="was built again, from other files, since"):
        pickle.loads(sent)


def test_open_table_outlives_the_rebuilding_of_its_index(made):
    table = open_table(made.source(), "train")
    expected = list(table)
    made.texts = {key: "changed" for key in made.texts}
    made.save()
    assert open_table(made.source(), "train")[0].expression == "changed"
    assert list(table) == expected
