import asyncio
from pathlib import Path

from chandlery.oci.digest import Digest
from chandlery.storage.leases import Leases
from tests.support.tasks import suspended

BLOB, OTHER = Digest.of(b"blob"), Digest.of(b"other")


async def test_a_lease_holds_from_when_it_is_taken_to_the_end_of_its_body(tmp_path: Path) -> None:
    with Leases(tmp_path) as leases:
        async with leases.lease() as lease:
            assert leases.leased() == set()
            await lease.take(BLOB, OTHER)
            await lease.take(BLOB)
            assert leases.leased() == {BLOB, OTHER}
            lease.give_back(OTHER)
            lease.give_back(OTHER)
            assert leases.leased() == {BLOB}
        assert leases.leased() == set()


async def test_a_blob_is_leased_until_the_last_lease_of_it_ends(tmp_path: Path) -> None:
    with Leases(tmp_path) as leases:
        async with leases.lease() as first:
            await first.take(BLOB)
            async with leases.lease() as second:
                await second.take(BLOB)
            assert leases.leased() == {BLOB}


async def test_no_lease_is_taken_under_the_lock_of_this_process_or_another(tmp_path: Path) -> None:
    with Leases(tmp_path) as ours, Leases(tmp_path) as others:
        async with ours.lease() as first, others.lease() as second:
            taking = []
            async with ours.locked():
                taking = [asyncio.create_task(lease.take(BLOB)) for lease in (first, second)]
                await suspended(*taking)
                assert ours.leased() == set()
            await asyncio.gather(*taking)
            assert ours.leased() == others.leased() == {BLOB}
