from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from chandlery.builds.popularity_tables import PopularityTables
from chandlery.machine.download import Address, DownloadFailedError
from chandlery.plan.popularity import Popularity
from tests.support.ordinary_user import ordinary_folder, run_as_ordinary_user

TABLE = Popularity({"glibc": 9, "zlib": 5}, {"glibc": "glibc", "zlib": "glibc"}, "test")
OTHER = Popularity({"glibc": 8})


def test_a_folder_that_cannot_be_written_costs_no_pull() -> None:
    script = """if True:
        import sys
        from pathlib import Path
        from chandlery.plan.popularity import Popularity
        from chandlery.builds.popularity_tables import PopularityTables
        (Path(sys.argv[1]) / "popularity").mkdir(mode=0o500)
        tables = PopularityTables(Path(sys.argv[1]))
        print(dict(tables.table(tables.keep(Popularity({"glibc": 9})))))
    """
    with ordinary_folder() as folder:
        assert "{'glibc': 9}" in run_as_ordinary_user(script, str(folder))


@contextmanager
def served(folder: Path) -> Iterator[Address]:
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield Address.parse(f"http://127.0.0.1:{server.server_port}/table.json")
        server.shutdown()
        thread.join()


async def test_the_last_table_of_an_address_is_used_while_it_is_away(tmp_path: Path) -> None:
    with served(tmp_path) as address:
        for table in (TABLE, OTHER):
            (tmp_path / "table.json").write_bytes(table.encode())
            assert (await PopularityTables(tmp_path).fetch(address)).identity == table.identity

    assert (await PopularityTables(tmp_path).fetch(address)).identity == OTHER.identity
    with pytest.raises(DownloadFailedError, match=str(address)):
        await PopularityTables(tmp_path / "new").fetch(address)


@pytest.mark.parametrize("answer", [b"<html>", b'{"version": 9}', b""])
async def test_an_answer_that_is_no_table_counts_as_none(tmp_path: Path, answer: bytes) -> None:
    with served(tmp_path) as address:
        (tmp_path / "table.json").write_bytes(TABLE.encode())
        await PopularityTables(tmp_path).fetch(address)
        (tmp_path / "table.json").write_bytes(answer)
        assert (await PopularityTables(tmp_path).fetch(address)).identity == TABLE.identity
        with pytest.raises(ValueError, match=r"no table of popularity|its version is 9"):
            await PopularityTables(tmp_path / "new").fetch(address)
